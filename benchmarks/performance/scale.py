"""Cost of a step against parameters, batch, Krylov order and devices; on paper, up to a thousand devices."""

import argparse
import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import optcurv
from benchmarks.core.kept import Kept
from benchmarks.core.report import progress_bar, write
from benchmarks.core.style import save
from benchmarks.performance import scale_report
from benchmarks.performance.programs import Traffic
from benchmarks.performance.scale_steps import (
    CANDIDATES,
    GRADIENT_STEP,
    Candidate,
    Placement,
    Setup,
    average_cost,
    compare,
    edf,
    trust_region,
)
from benchmarks.performance.scaling_model import Machine, make_work, predict

NUM_DEVICES = 4
_NUM_THREADS = 4 * NUM_DEVICES  # of XLA: collectives in progress hold one each, and with too few wait for ever
MODEL_DEVICES = tuple(2**i for i in range(11))


_FAMILIES = {
    "EDF-G": partial(edf, curvature=optcurv.gauss_newton_product),
    "EDF-H": partial(edf, curvature=optcurv.hessian_product),
    "trust region G": trust_region,
}
"""Methods by the number of their products."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
      candidates: methods.
      families: likewise, by the number of their products.
      widths: of the networks of all sizes; the others have `width` and, on paper, `model_width`.
      batch_size: of the networks of all sizes.
      batches: of the network of `width`.
      orders: Krylov orders.
      on_devices: methods run on several devices.
      strong_batch: of all devices together, there; and twice as many on four of them, for weak scaling.
      model_batches: on paper, per device and of all devices together.
      rounds: in which methods take turns.
      hidden_layers: of all networks.
    """

    candidates: Sequence[Candidate] = CANDIDATES
    families: Sequence[str] = tuple(_FAMILIES)
    widths: Sequence[int] = (48, 156, 500, 1580, 5000)
    width: int = 500
    batch_size: int = 64
    batches: Sequence[int] = (16, 64, 1024)
    orders: Sequence[int] = (1, 2, 4, 8, 16)
    on_devices: Sequence[Candidate] = tuple(each for each in CANDIDATES if each.name not in ("Adam", "SGD-RK2"))
    strong_batch: int = 512
    model_width: int = 5000
    model_batches: tuple[int, int] = (4096, 64 * 4096)
    rounds: int = 7
    hidden_layers: int = 4


QUICK = Plan(
    candidates=tuple(each for each in CANDIDATES if each.name in (GRADIENT_STEP.name, "PAL")),
    families=("EDF-G",),
    widths=(1000, 10_000),
    width=1000,
    batch_size=16,
    batches=(8, 16),
    orders=(1,),
    on_devices=(GRADIENT_STEP,),
    strong_batch=16,
    model_width=1000,
    rounds=1,
    hidden_layers=0,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all", help="default: all")
    parser.add_argument(
        "--flops-rate", type=float, default=100.0, help="on paper: TFLOP/s of a device (default: %(default)s)"
    )
    parser.add_argument(
        "--bandwidth", type=float, default=50.0, help="on paper: GB/s sent by each device (default: %(default)s)"
    )
    parser.add_argument(
        "--latency", type=float, default=5.0, help="on paper: microseconds of a message (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="small networks, few methods, one round: does it run?")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/scale"),
        help="folder; measurements found in its runs/ are kept (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    """Measures part after part; writes tables, JSON and pictures."""
    if jax.config.jax_num_cpu_devices < NUM_DEVICES:  # must be said before JAX's backends start
        jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    if args.part == "devices":
        os.environ.setdefault("NPROC", str(_NUM_THREADS))  # likewise
    kept, plan = Kept(args.output), QUICK if args.quick else Plan()
    for name, part in PARTS.items():
        if args.part == "all" and name == "devices":  # its threads would slow the others
            options = ["--part", name, "--output", str(args.output), *(["--quick"] if args.quick else [])]
            subprocess.run([sys.executable, "-m", "benchmarks", "scale", *options], check=True)
        elif args.part in (name, "all"):
            part(args, plan, kept)
    Console().print(f"Written to {args.output}")
    return 0


def against_parameters(args: argparse.Namespace, plan: Plan, kept: Kept) -> None:
    """Networks of all sizes, on one small batch."""
    setups = [Setup(width, plan.batch_size, hidden_layers=plan.hidden_layers) for width in plan.widths]
    rows = _measure_rows([(setup, candidate) for setup in setups for candidate in plan.candidates], plan.rounds, kept)
    title = f"Cost of a step against parameters, batch {plan.batch_size}"
    write(args.output / "parameters", scale_report.ratios_table(title, "parameters", rows), {"rows": rows})
    save(scale_report.draw_against(title, "parameters", rows), args.output / "parameters")


def against_batch(args: argparse.Namespace, plan: Plan, kept: Kept) -> None:
    """One network on batches of all sizes."""
    setups = [Setup(plan.width, batch_size, hidden_layers=plan.hidden_layers) for batch_size in plan.batches]
    rows = _measure_rows([(setup, candidate) for setup in setups for candidate in plan.candidates], plan.rounds, kept)
    title = f"Cost of a step against the batch, {setups[0].num_params:,} parameters"
    write(args.output / "batch", scale_report.ratios_table(title, "batch_size", rows), {"rows": rows})
    save(scale_report.draw_against(title, "batch_size", rows), args.output / "batch")


def against_order(args: argparse.Namespace, plan: Plan, kept: Kept) -> None:
    """One network on one batch, with Krylov spaces of all orders."""
    setup = Setup(plan.width, plan.strong_batch, hidden_layers=plan.hidden_layers)
    labels = [{"family": family, "order": order} for family in plan.families for order in plan.orders]
    pairs = [(setup, _FAMILIES[label["family"]](label["order"])) for label in labels]
    measured = _measure_rows(pairs, plan.rounds, kept)
    rows = [label | row for label, row in zip(labels, measured, strict=True)]
    title = f"Cost of a step against the Krylov order, {setup.num_params:,} parameters, batch {setup.batch_size}"
    write(args.output / "order", scale_report.ratios_table(title, "order", rows), {"rows": rows})
    save(scale_report.draw_orders(title, rows), args.output / "order")


def _measure_rows(pairs: Sequence[tuple[Setup, Candidate]], rounds: int, kept: Kept) -> list[dict[str, Any]]:
    """Returns a row of figures for each method in its setup; ratios are to the gradient step."""

    def count(setup: Setup, candidate: Candidate) -> float:
        return average_cost(setup, candidate).flops / average_cost(setup, GRADIENT_STEP).flops

    rows = []
    with progress_bar(len(pairs)) as report:
        for setup, candidate in pairs:
            name = f"{setup.width}-{setup.batch_size}-{_slug(candidate)}"
            key = setup.description | {"method": candidate.name}
            timed = kept.get(f"step-{name}", key | {"rounds": rounds}, partial(compare, setup, candidate, rounds))
            flops_ratio = kept.get(f"flops-{name}", key, partial(count, setup, candidate))
            about = {"method": candidate.name, "floor": candidate.method.gradients}
            sizes = {"parameters": setup.num_params, "batch_size": setup.batch_size}
            rows.append(timed | about | sizes | {"flops_ratio": flops_ratio})
            report(f"{candidate.name}, {setup.num_params:,} parameters, batch {setup.batch_size}")
    return rows


def on_virtual_devices(args: argparse.Namespace, plan: Plan, kept: Kept) -> None:
    """Weak and strong scaling over the cores of one machine."""
    strong, rows = plan.strong_batch, []
    cases = {("strong", 2): strong, ("strong", 4): strong, ("weak", 2): strong, ("weak", 4): 2 * strong}
    places = [(candidate, placement) for candidate in plan.on_devices for placement in Placement]
    with progress_bar(len(cases) * len(places)) as report:
        for candidate, placement in places:
            row: dict[str, Any] = {"method": candidate.name, "placement": placement}
            for (scaling, count), batch_size in cases.items():
                alone = Setup(plan.width, batch_size, platform="cpu", hidden_layers=plan.hidden_layers)
                setup = dataclasses.replace(alone, num_devices=count, placement=placement)
                measure = partial(compare, setup, candidate, plan.rounds, (alone, candidate))
                name = f"devices-{count}-{batch_size}-{_slug(candidate)}"
                key = setup.description | {"method": candidate.name, "rounds": plan.rounds}
                row[f"{scaling} {count}"] = kept.get(name, key, measure)["ratio_quartiles"]
                report(f"{candidate.name}, {placement}, {count} devices")
            rows.append(row)
    num_params = Setup(plan.width, 1, hidden_layers=plan.hidden_layers).num_params
    title = f"Virtual devices that share the cores of one machine, {num_params:,} parameters"
    write(
        args.output / "devices", scale_report.devices_table(title, strong, rows), {"strong_batch": strong, "rows": rows}
    )
    save(scale_report.draw_devices(title, rows), args.output / "devices")


def on_paper(args: argparse.Namespace, plan: Plan, kept: Kept) -> None:
    """Collectives of the compiled steps, and what they cost on many devices."""
    machine = Machine(1e12 * args.flops_rate, 1e9 * args.bandwidth, 1e-6 * args.latency)
    weak_batch, strong_batch = plan.model_batches
    setup = Setup(plan.model_width, weak_batch, platform="cpu", hidden_layers=plan.hidden_layers)
    rows = []
    with progress_bar(len(plan.candidates)) as report:
        for candidate in plan.candidates:
            key = setup.description | {"method": candidate.name}
            counts = kept.get(f"counts-{_slug(candidate)}", key, partial(_count, setup, candidate))
            for placement in Placement:
                communication = {kind: Traffic(*traffic) for kind, traffic in counts[placement].items()}
                sharded = placement is Placement.ROWS
                work = make_work(counts["flops"], counts["batch_sizes"], communication, sharded)
                predictions = predict(work, machine, MODEL_DEVICES, weak_batch, strong_batch)
                about = {"method": candidate.name, "placement": placement, "parameters": setup.num_params}
                traffic = {kind: each._asdict() for kind, each in communication.items()}
                rows.append(about | {"communication": traffic, "predictions": predictions})
            report(candidate.name)
    title = f"Communicated in a step, {setup.num_params:,} parameters, {weak_batch} examples a device"
    counted = [{name: row[name] for name in row if name != "predictions"} for row in rows]
    write(args.output / "collectives", scale_report.collectives_table(title, rows), {"rows": counted})
    title = f"On paper: {setup.num_params:,} parameters, {args.flops_rate:g} TFLOP/s, {args.bandwidth:g} GB/s, "
    title += f"{args.latency:g} µs a message"
    content = {"machine": machine._asdict(), "weak_batch": weak_batch, "strong_batch": strong_batch}
    table = scale_report.model_table(title, weak_batch, strong_batch, rows)
    write(args.output / "model", table, content | {"rows": rows})
    save(scale_report.draw_model(title, rows), args.output / "model")


def _count(setup: Setup, candidate: Candidate) -> dict[str, Any]:
    """Counts operations on one device, at two batch sizes, and collectives on several; nothing runs."""
    batch_sizes = setup.batch_size, 2 * setup.batch_size
    flops = [average_cost(dataclasses.replace(setup, batch_size=size), candidate).flops for size in batch_sizes]
    together = dataclasses.replace(setup, num_devices=NUM_DEVICES, batch_size=NUM_DEVICES * setup.batch_size)
    communications = {
        placement: average_cost(dataclasses.replace(together, placement=placement), candidate).communication
        for placement in Placement
    }
    return {"batch_sizes": batch_sizes, "flops": flops} | communications


def _slug(candidate: Candidate) -> str:
    return candidate.name.replace(" ", "-")


PARTS = {
    "parameters": against_parameters,
    "batch": against_batch,
    "order": against_order,
    "devices": on_virtual_devices,
    "model": on_paper,
}

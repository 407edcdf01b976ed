"""Cost of a step against parameters, batch, Krylov order and devices; on paper, up to a thousand devices."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import optcurv
from benchmarks.core.cache import Cache
from benchmarks.core.report import progress_bar
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
NUM_THREADS = 4 * NUM_DEVICES  # of XLA: collectives in progress hold one each, and with too few wait for ever
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


def against_parameters(plan: Plan, cache: Cache) -> dict[str, Any]:
    """Networks of all sizes, on one small batch."""
    setups = [Setup(width, plan.batch_size, hidden_layers=plan.hidden_layers) for width in plan.widths]
    rows = _measure_rows([(setup, candidate) for setup in setups for candidate in plan.candidates], plan.rounds, cache)
    title = f"Cost of a step against parameters, batch {plan.batch_size}"
    return {"title": title, "varied": "parameters", "rows": rows}


def against_batch(plan: Plan, cache: Cache) -> dict[str, Any]:
    """One network on batches of all sizes."""
    setups = [Setup(plan.width, batch_size, hidden_layers=plan.hidden_layers) for batch_size in plan.batches]
    rows = _measure_rows([(setup, candidate) for setup in setups for candidate in plan.candidates], plan.rounds, cache)
    title = f"Cost of a step against the batch, {setups[0].num_params:,} parameters"
    return {"title": title, "varied": "batch_size", "rows": rows}


def against_order(plan: Plan, cache: Cache) -> dict[str, Any]:
    """One network on one batch, with Krylov spaces of all orders."""
    setup = Setup(plan.width, plan.strong_batch, hidden_layers=plan.hidden_layers)
    labels = [{"family": family, "order": order} for family in plan.families for order in plan.orders]
    pairs = [(setup, _FAMILIES[label["family"]](label["order"])) for label in labels]
    rows = [label | row for label, row in zip(labels, _measure_rows(pairs, plan.rounds, cache), strict=True)]
    title = f"Cost of a step against the Krylov order, {setup.num_params:,} parameters, batch {setup.batch_size}"
    return {"title": title, "varied": "order", "rows": rows}


def _measure_rows(pairs: Sequence[tuple[Setup, Candidate]], rounds: int, cache: Cache) -> list[dict[str, Any]]:
    """Returns a row of figures for each method in its setup; ratios are to the gradient step."""
    rows = []
    with progress_bar(len(pairs)) as report:
        for setup, candidate in pairs:
            key = setup.description | {"method": candidate.name}
            timed = cache.get(key | {"rounds": rounds}, compare, setup, candidate, rounds)
            flops_ratio = cache.get(key, count_flops_ratio, setup, candidate)
            about = {"method": candidate.name, "floor": candidate.method.gradients}
            sizes = {"parameters": setup.num_params, "batch_size": setup.batch_size}
            rows.append(timed | about | sizes | {"flops_ratio": flops_ratio})
            report(f"{candidate.name}, {setup.num_params:,} parameters, batch {setup.batch_size}")
    return rows


def count_flops_ratio(setup: Setup, candidate: Candidate) -> float:
    """Returns the operations of an average step, beside the gradient step's."""
    return average_cost(setup, candidate).flops / average_cost(setup, GRADIENT_STEP).flops


def on_virtual_devices(plan: Plan, cache: Cache) -> dict[str, Any]:
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
                key = setup.description | {"method": candidate.name, "rounds": plan.rounds}
                found = cache.get(key, compare, setup, candidate, plan.rounds, (alone, candidate))
                row[f"{scaling} {count}"] = found["ratio_quartiles"]
                report(f"{candidate.name}, {placement}, {count} devices")
            rows.append(row)
    num_params = Setup(plan.width, 1, hidden_layers=plan.hidden_layers).num_params
    title = f"Virtual devices that share the cores of one machine, {num_params:,} parameters"
    return {"title": title, "strong_batch": strong, "rows": rows}


def on_paper(plan: Plan, cache: Cache, machine: Machine) -> dict[str, Any]:
    """Collectives of the compiled steps, and what they cost on many devices."""
    weak_batch, strong_batch = plan.model_batches
    setup = Setup(plan.model_width, weak_batch, platform="cpu", hidden_layers=plan.hidden_layers)
    rows = []
    with progress_bar(len(plan.candidates)) as report:
        for candidate in plan.candidates:
            counts = cache.get(setup.description | {"method": candidate.name}, count_collectives, setup, candidate)
            for placement in Placement:
                communication = {kind: Traffic(*traffic) for kind, traffic in counts[placement].items()}
                sharded = placement is Placement.ROWS
                work = make_work(counts["flops"], counts["batch_sizes"], communication, sharded)
                predictions = predict(work, machine, MODEL_DEVICES, weak_batch, strong_batch)
                about = {"method": candidate.name, "placement": placement, "parameters": setup.num_params}
                traffic = {kind: each._asdict() for kind, each in communication.items()}
                rows.append(about | {"communication": traffic, "predictions": predictions})
            report(candidate.name)
    title = f"On paper: {setup.num_params:,} parameters, {machine.flops_rate / 1e12:g} TFLOP/s, "
    title += f"{machine.bandwidth / 1e9:g} GB/s, {machine.latency * 1e6:g} µs a message"
    content = {"machine": machine._asdict(), "weak_batch": weak_batch, "strong_batch": strong_batch}
    return {"title": title, **content, "rows": rows}


def count_collectives(setup: Setup, candidate: Candidate) -> dict[str, Any]:
    """Counts operations on one device, at two batch sizes, and collectives on several; nothing runs."""
    batch_sizes = setup.batch_size, 2 * setup.batch_size
    flops = [average_cost(dataclasses.replace(setup, batch_size=size), candidate).flops for size in batch_sizes]
    together = dataclasses.replace(setup, num_devices=NUM_DEVICES, batch_size=NUM_DEVICES * setup.batch_size)
    communications = {
        placement: average_cost(dataclasses.replace(together, placement=placement), candidate).communication
        for placement in Placement
    }
    return {"batch_sizes": batch_sizes, "flops": flops} | communications

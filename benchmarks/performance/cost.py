"""What one step of each method costs, in gradient steps."""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import track
from rich.table import Table

import optcurv
from benchmarks.core.kept import Kept
from benchmarks.core.methods import GRADIENT_DESCENT, METHODS, Method
from benchmarks.core.models import Batch
from benchmarks.core.report import environment, print_table, write_json, write_table
from benchmarks.core.timing import WORKLOADS, CompiledStep, Workload, count_flops, random_batch, temporary_bytes
from benchmarks.performance import memory
from benchmarks.performance.loops import loops_table, measure_loops, product_flops
from benchmarks.performance.slices import NUM_IMAGES, measure_planes, planes_table
from optcurv.curvature import ProductFn
from optcurv.methods.subproblems import Solver

RUNGE_KUTTA = Method("SGD-RK2", optcurv.sgd_rk2, "learning rate", (0.01,), 2)

_ITERATIONS = 4


def wide_trust_region(name: str, curvature: ProductFn, solver: Solver, gradients: float) -> Method:
    """A trust region so wide that every step takes all its products."""
    optimizer = functools.partial(optcurv.trust_region, curvature=curvature, solver=solver, max_radius=1e6)
    return Method(name, lambda radius: optimizer(initial_radius=radius), "initial radius", (1e6,), gradients)


LOOPED = {
    wide_trust_region(
        f"TR Steihaug G j={_ITERATIONS}",
        optcurv.gauss_newton_product,
        optcurv.steihaug(max_iter=_ITERATIONS, tol=0.0),
        4 / 3 + 4 / 3 * _ITERATIONS,
    ): optcurv.gauss_newton_product,
    wide_trust_region(
        f"TR Lanczos H j={_ITERATIONS}",
        optcurv.hessian_product,
        optcurv.gltr(_ITERATIONS, tol=0.0),
        4 / 3 + 2 * _ITERATIONS,
    ): optcurv.hessian_product,
}
"""Methods whose products are taken in a loop, and which; a step takes `_ITERATIONS` of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--model", choices=[*WORKLOADS, "all"], default="all", help="default: all")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/cost"),
        help="folder; models whose costs are found in its runs/ are not timed again (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="rounds in which each method runs in turn (default: 20)")


def main(args: argparse.Namespace) -> int:
    """Measures, prints and writes `cost.json` and `cost.txt`."""
    names = list(WORKLOADS) if args.model == "all" else [args.model]
    kept, measured = Kept(args.output), {}
    for name in names:
        workload = WORKLOADS[name]
        key = workload.description | {"rounds": args.rounds}
        measured[name] = kept.get(f"cost-{name}", key, functools.partial(measure, name, workload, args.rounds))
    rows = kept.get("memory", memory.TASK.description, memory.measure_memory)
    surroundings = environment()
    write_json(args.output / "cost.json", {"environment": surroundings, "cost": measured, "memory": rows})
    table = memory.memory_table(rows)
    print_table(table)
    write_table(args.output / "memory.txt", table)
    for name, figures in measured.items():
        table = cost_table(f"{name}, batch {figures['batch_size']}, on {surroundings['device']}", figures)
        print_table(table)
        write_table(args.output / f"cost-{name}.txt", table)
        table = loops_table(f"{name}: products inside and outside of a loop", figures["loops"])
        print_table(table)
        write_table(args.output / f"loops-{name}.txt", table)
        table = planes_table(f"{name}: a plane of the loss surface", figures["planes"])
        print_table(table)
        write_table(args.output / f"planes-{name}.txt", table)
    return 0


def _step_flops(workload: Workload, step: CompiledStep, batch: Batch) -> float:
    """Returns XLA's count of a step's operations, in which the products of a loop are all counted."""
    flops = count_flops(step.compiled)
    if step.method in LOOPED:  # XLA counts the body of a loop once
        flops += (_ITERATIONS - 1) * product_flops(workload.task, LOOPED[step.method], batch)
    return flops


def forward_flops(workload: Workload, batch: Batch) -> float:
    """Returns the operations of a forward pass: a little over a third of a gradient's.

    The first layer needs no gradient by its input, so a gradient costs less than three forward passes.
    """
    forward = jax.jit(lambda params, batch: workload.task.loss(batch)(params))
    return count_flops(forward.lower(jax.eval_shape(workload.task.init, jax.random.key(0), batch), batch).compile())


def measure(name: str, workload: Workload, rounds: int, num_steps: int = 3) -> dict[str, Any]:
    """Returns a row of figures for each method; ratios are to the gradient step.

    Every round runs every method, and a ratio is formed within its round: what else the machine does strikes all alike.
    """
    batch = random_batch(workload.batch_size)
    steps = [
        CompiledStep(workload, method, batch)
        for method in track((GRADIENT_DESCENT, *METHODS, RUNGE_KUTTA, *LOOPED), f"{name}: compiling", transient=True)
    ]
    for step in steps:
        step.seconds(num_steps)
    seconds = np.array(
        [[step.seconds(num_steps) for step in steps] for _ in track(range(rounds), f"{name}: timing", transient=True)]
    )
    quartiles = np.quantile(seconds / seconds[:, :1], [0.25, 0.5, 0.75], axis=0)
    flops = [_step_flops(workload, step, batch) for step in steps]
    rows = [
        {
            "method": step.method.name,
            "floor": step.method.gradients,
            "flops": flops[i],
            "flops_ratio": flops[i] / flops[0],
            "seconds": float(np.median(seconds[:, i])),
            "seconds_ratio_quartiles": quartiles[:, i].tolist(),
            "temporary_bytes": temporary_bytes(step.compiled),
            "compile_seconds": step.compile_seconds,
        }
        for i, step in enumerate(steps)
    ]
    forward = forward_flops(workload, batch) / flops[0]
    return {
        "batch_size": workload.batch_size,
        "forward_flops_ratio": forward,
        "rows": rows,
        "loops": measure_loops(workload.task, batch, rounds),
        "planes": measure_planes(workload.task, random_batch(NUM_IMAGES), rounds),
    }


def cost_table(title: str, figures: dict[str, Any]) -> Table:
    """Lays the figures out beside the floor."""
    caption = (
        "Floor, FLOPs and time are ratios to the gradient step; time: median of the rounds (quartiles).\n"
        f"The floor takes a forward pass for 1/3 of a gradient; here it is {figures['forward_flops_ratio']:.3f}."
    )
    table = Table(title=title, caption=caption)
    table.add_column("method", no_wrap=True)
    for column in ("floor", "FLOPs", "FLOPs / floor", "time", "ms a step", "temporary MB", "compile s"):
        table.add_column(column, justify="right")
    for row in figures["rows"]:
        low, median, high = row["seconds_ratio_quartiles"]
        table.add_row(
            row["method"],
            f"{row['floor']:.2f}",
            f"{row['flops_ratio']:.3f}",
            f"{row['flops_ratio'] / row['floor']:.3f}",
            f"{median:.2f} ({low:.2f}-{high:.2f})",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['temporary_bytes'] / 1e6:.1f}",
            f"{row['compile_seconds']:.1f}",
        )
    return table

"""What one step of each method costs, in gradient steps."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from rich.progress import track

import optcurv
from benchmarks.core.methods import GRADIENT_DESCENT, METHODS, Method
from benchmarks.core.report import table
from benchmarks.core.statistics import quartiles
from benchmarks.core.task import Task
from benchmarks.core.timing import CompiledStep, count_flops, temporary_bytes
from benchmarks.performance.loops import measure_loops, product_flops
from benchmarks.performance.slices import measure_planes
from optcurv.curvature import ProductFn
from optcurv.methods.subproblems import Solver

RUNGE_KUTTA = Method("SGD-RK2", optcurv.sgd_rk2, {"learning rate": (0.01,)}, 2)

_ITERATIONS = 4


def wide_trust_region(name: str, curvature: ProductFn, solver: Solver, gradients: float) -> Method:
    """A trust region so wide that every step takes all its products."""
    optimizer = functools.partial(optcurv.trust_region, curvature=curvature, solver=solver, max_radius=1e6)
    return Method(name, lambda radius: optimizer(initial_radius=radius), {"initial radius": (1e6,)}, gradients)


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


def _step_flops(task: Task, step: CompiledStep) -> float:
    """Returns XLA's count of a step's operations, in which the products of a loop are all counted."""
    flops = count_flops(step.compiled)
    if step.method in LOOPED:  # XLA counts the body of a loop once
        flops += (_ITERATIONS - 1) * product_flops(task, LOOPED[step.method])
    return flops


def forward_flops(task: Task) -> float:
    """Returns the operations of a forward pass: a little over a third of a gradient's.

    The first layer needs no gradient by its input, so a gradient costs less than three forward passes.
    """
    forward = jax.jit(lambda params, batch: task.loss(batch)(params))
    params = jax.eval_shape(task.init, jax.random.key(0))
    return count_flops(forward.lower(params, task.data.train).compile())


def measure(task: Task, rounds: int, num_steps: int = 3) -> dict[str, Any]:
    """Returns a row of figures for each method; ratios are to the gradient step.

    Every round runs every method, and a ratio is formed within its round: what else the machine does strikes all alike.
    """
    steps = [
        CompiledStep(task, method)
        for method in track((GRADIENT_DESCENT, *METHODS, RUNGE_KUTTA, *LOOPED), "compiling", transient=True)
    ]
    for step in steps:
        step.seconds(num_steps)
    seconds = np.array(
        [[step.seconds(num_steps) for step in steps] for _ in track(range(rounds), "timing", transient=True)]
    )
    quartiles = np.quantile(seconds / seconds[:, :1], [0.25, 0.5, 0.75], axis=0)
    flops = [_step_flops(task, step) for step in steps]
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
    forward = forward_flops(task) / flops[0]
    return {
        "batch_size": task.batch_size,
        "forward_flops_ratio": forward,
        "rows": rows,
        "loops": measure_loops(task, rounds),
        "planes": measure_planes(task, rounds),
    }


def cost_table(content: Mapping[str, Any]) -> str:
    """Lays the figures out beside the floor."""

    def row(one: Mapping[str, Any]) -> dict[str, str]:
        return {
            "method": one["method"],
            "floor": f"{one['floor']:.2f}",
            "FLOPs": f"{one['flops_ratio']:.3f}",
            "FLOPs / floor": f"{one['flops_ratio'] / one['floor']:.3f}",
            "time": quartiles(one["seconds_ratio_quartiles"]),
            "ms a step": f"{1e3 * one['seconds']:.1f}",
            "temporary MB": f"{one['temporary_bytes'] / 1e6:.1f}",
            "compile s": f"{one['compile_seconds']:.1f}",
        }

    caption = (
        f"Batch {content['batch_size']}, on {content['environment']['device']}. Floor, FLOPs and time are ratios to "
    )
    caption += "the gradient step; time: median of the rounds (quartiles). The floor takes a forward pass for 1/3 of a "
    return table(map(row, content["rows"]), caption + f"gradient; here it is {content['forward_flops_ratio']:.3f}.")

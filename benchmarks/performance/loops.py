"""What a Krylov iteration costs inside its loop, beside the same product outside of any."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import optcurv
from benchmarks.core.methods import GRADIENT_DESCENT, Method
from benchmarks.core.models import Batch
from benchmarks.core.report import table
from benchmarks.core.statistics import quartiles
from benchmarks.core.task import Task
from benchmarks.core.timing import count_flops, seconds_of
from benchmarks.core.train import init_state, train_step
from optcurv.arguments import PyTree
from optcurv.curvature import MatVec, ProductFn

CURVATURES = {"Gauss-Newton": optcurv.gauss_newton_product, "Hessian": optcurv.hessian_product}
NUM_COMPILES = 3
_FEW, _MORE = 2, 6  # a cost per iteration is the difference between two programs


def measure_loops(task: Task, rounds: int) -> list[dict[str, Any]]:
    """Returns, for each curvature, seconds of a CG iteration in its loop and of an unrolled product."""
    batch = task.data.train
    params = jax.jit(task.init)(jax.random.key(0))
    gradient = jax.jit(lambda params: jax.grad(task.loss(batch))(params))(params)
    gradient_compile = _step_compile_seconds(task, GRADIENT_DESCENT)
    rows = []
    for name, curvature in CURVATURES.items():
        programs = [
            jax.jit(functools.partial(program, task, curvature, steps)).lower(params, gradient, batch).compile()
            for program in (_looped, _unrolled)
            for steps in (_FEW, _MORE)
        ]
        times = np.array(
            [
                [seconds_of(program, params, gradient, batch) for program in programs]
                for _ in track(range(rounds + 1), f"{name}: timing", transient=True)
            ][1:]
        )
        few_looped, more_looped, few_unrolled, more_unrolled = times.T
        looped, unrolled = more_looped - few_looped, more_unrolled - few_unrolled
        step = Method("step", functools.partial(_trust_region, curvature), {"radius": (0.01,)})
        rows.append(
            {
                "curvature": name,
                "looped_seconds": float(np.median(looped)) / (_MORE - _FEW),
                "unrolled_seconds": float(np.median(unrolled)) / (_MORE - _FEW),
                "ratio_quartiles": np.quantile(looped / unrolled, [0.25, 0.5, 0.75]).tolist(),
                "compile_seconds": _step_compile_seconds(task, step),
                "gradient_compile_seconds": gradient_compile,
            }
        )
    return rows


def product_flops(task: Task, curvature: ProductFn) -> float:
    """Returns the operations of one product: what a second one adds."""
    params, batch = jax.eval_shape(task.init, jax.random.key(0)), task.data.train
    once, twice = (
        count_flops(
            jax.jit(functools.partial(_unrolled, task, curvature, steps)).lower(params, params, batch).compile()
        )
        for steps in (1, 2)
    )
    return twice - once


def _trust_region(curvature: ProductFn, radius: float | jax.Array) -> optax.GradientTransformation:
    return optcurv.trust_region(curvature=curvature, initial_radius=radius, solver=optcurv.steihaug(max_iter=50))


def _looped(task: Task, curvature: ProductFn, steps: int, params: PyTree, gradient: PyTree, batch: Batch) -> PyTree:
    """So many iterations of conjugate gradients, kept from stopping early by damping and a wide region."""
    identity = optcurv.Metric(lambda v: v, lambda v: v)
    solve = optcurv.steihaug(max_iter=steps, tol=0.0)
    product = _damped(curvature(task.loss(batch), params))
    return solve(product, gradient, identity, jnp.asarray(1e9), jax.random.key(0))


def _unrolled(task: Task, curvature: ProductFn, steps: int, params: PyTree, gradient: PyTree, batch: Batch) -> PyTree:
    """So many products in a row, outside of any loop."""
    product = _damped(curvature(task.loss(batch), params))
    vector = gradient
    for _ in range(steps):
        vector = jax.lax.optimization_barrier(product(vector))
    return vector


def _damped(product: MatVec) -> MatVec:
    """Adds 100 I, so that an indefinite Hessian stops no iteration."""
    return lambda vector: optax.tree.add_scale(product(vector), 100.0, vector)


def _step_compile_seconds(task: Task, method: Method) -> float:
    """Returns how long XLA takes for a training step: the least of some, as other work only adds to it."""
    setting = method.first_setting
    state = jax.jit(functools.partial(init_state, task, method))(jax.random.key(0), setting)

    def once() -> float:
        lowered = jax.jit(functools.partial(train_step, task, method)).lower(state, task.data.train, setting)
        start = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - start

    return min(once() for _ in range(NUM_COMPILES))


def loops_table(content: Mapping[str, Any]) -> str:
    """Lays the figures out; ratios: median of the rounds (quartiles)."""
    rows = [
        {
            "curvature": one["curvature"],
            **{f"ms {label}": f"{1e3 * one[f'{kind}_seconds']:.1f}" for kind, label in _PLACES.items()},
            "ratio": quartiles(one["ratio_quartiles"]),
            "compile s": f"{one['compile_seconds']:.1f}",
            "of the gradient step's": f"{one['compile_seconds'] / one['gradient_compile_seconds']:.2f}",
        }
        for one in content["loops"]
    ]
    caption = "Products inside and outside of a loop. Compile: of a whole trust region step with max_iter=50, and of a "
    return table(rows, caption + "gradient step.")


_PLACES = {"looped": "in the CG loop", "unrolled": "outside"}

"""What a Krylov iteration costs inside its loop, beside the same product outside of any."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track
from rich.table import Table

import optcurv
from benchmarks.core.methods import GRADIENT_DESCENT, Method
from benchmarks.core.models import Batch, Task
from benchmarks.core.timing import count_flops, seconds_of
from benchmarks.core.training import init_state, train_step
from optcurv.arguments import PyTree
from optcurv.curvature import MatVec, ProductFn

CURVATURES = {"Gauss-Newton": optcurv.gauss_newton_product, "Hessian": optcurv.hessian_product}
NUM_COMPILES = 3
_FEW, _MORE = 2, 6  # a cost per iteration is the difference between two programs


def measure_loops(task: Task, batch: Batch, rounds: int) -> list[dict[str, Any]]:
    """Returns, for each curvature, seconds of a CG iteration in its loop and of an unrolled product."""
    params = jax.jit(task.init)(jax.random.key(0), batch)
    gradient = jax.jit(lambda params: jax.grad(task.loss(batch))(params))(params)
    gradient_compile = _step_compile_seconds(task, batch, GRADIENT_DESCENT)
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
        step = Method("step", functools.partial(_trust_region, curvature), "radius", (0.01,), 0)
        rows.append(
            {
                "curvature": name,
                "looped_seconds": float(np.median(looped)) / (_MORE - _FEW),
                "unrolled_seconds": float(np.median(unrolled)) / (_MORE - _FEW),
                "ratio_quartiles": np.quantile(looped / unrolled, [0.25, 0.5, 0.75]).tolist(),
                "compile_seconds": _step_compile_seconds(task, batch, step),
                "gradient_compile_seconds": gradient_compile,
            }
        )
    return rows


def product_flops(task: Task, curvature: ProductFn, batch: Batch) -> float:
    """Returns the operations of one product: what a second one adds."""
    params = jax.eval_shape(task.init, jax.random.key(0), batch)
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


def _step_compile_seconds(task: Task, batch: Batch, method: Method) -> float:
    """Returns how long XLA takes for a training step: the least of some, as other work only adds to it."""
    state = jax.jit(functools.partial(init_state, task, method))(jax.random.key(0), batch)

    def once() -> float:
        lowered = jax.jit(functools.partial(train_step, task, method)).lower(state, batch, method.grid[0])
        start = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - start

    return min(once() for _ in range(NUM_COMPILES))


def loops_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Lays the figures out; ratios: median of the rounds (quartiles)."""
    table = Table(
        title=title, caption="Compile: of a whole trust region step with max_iter=50, and of a gradient step."
    )
    table.add_column("curvature", no_wrap=True)
    for column in ("ms in the CG loop", "ms outside", "ratio", "compile s", "of the gradient step's"):
        table.add_column(column, justify="right")
    for row in rows:
        low, median, high = row["ratio_quartiles"]
        table.add_row(
            row["curvature"],
            f"{1e3 * row['looped_seconds']:.1f}",
            f"{1e3 * row['unrolled_seconds']:.1f}",
            f"{median:.2f} ({low:.2f}-{high:.2f})",
            f"{row['compile_seconds']:.1f}",
            f"{row['compile_seconds'] / row['gradient_compile_seconds']:.2f}",
        )
    return table

"""The temporary memory of a compiled step, beside a gradient step's, in vectors of parameters."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.table import Table

import optcurv
from benchmarks.core.methods import GRADIENT_DESCENT, Method
from benchmarks.core.models import Batch, Mlp, Task, classification_loss
from benchmarks.core.timing import temporary_bytes
from benchmarks.core.training import init_state, train_step

TASK = Task(Mlp(hidden=(1700,) * 4), classification_loss, has_accuracy=True)
"""A network of ten million parameters; on a small batch its activations are nothing beside them."""

_BATCH_SIZE = 16


class Limit(NamedTuple):
    """An optimiser, and how many vectors it may take."""

    optimizer: optax.GradientTransformation
    vectors: float | None


LIMITS: Mapping[str, Limit] = {
    "Adam": Limit(optax.adam(0.1), None),
    "PAL": Limit(optcurv.pal(), 2),
    "SGD-RK2": Limit(optcurv.sgd_rk2(0.1), 3),
    "EDF-G k=2": Limit(optcurv.edf(1.0, 2), 10),
    "EDF-G k=8": Limit(optcurv.edf(1.0, 8), 10),
    "EDF-H k=2": Limit(optcurv.edf(1.0, 2, curvature=optcurv.hessian_product), 10),
    "TR Steihaug G": Limit(optcurv.trust_region(curvature=optcurv.gauss_newton_product), 10),
    "TR Steihaug H": Limit(optcurv.trust_region(), 10),
    "TR Lanczos H, 4 vectors": Limit(optcurv.trust_region(solver=optcurv.gltr(4)), None),
    "TSO-ALRA": Limit(optcurv.tso_alra(0.1, when=100), None),
}
"""Lanczos' method keeps a basis; Kronecker factors are no vectors."""


def measure_memory() -> list[dict[str, Any]]:
    """Returns a row for each method; steps are compiled, and nothing is run."""
    gradient_step = step_bytes(TASK, GRADIENT_DESCENT.optimizer(0.1))
    vector = 4 * num_parameters(TASK)
    return [
        {
            "method": name,
            "limit": limit.vectors,
            "vectors": (step_bytes(TASK, limit.optimizer) - gradient_step) / vector,
            "parameters": vector // 4,
        }
        for name, limit in LIMITS.items()
    ]


def step_bytes(task: Task, optimizer: optax.GradientTransformation) -> int:
    """Returns the temporary memory of a training step that overwrites its parameters and state."""
    method = Method("step", lambda setting: optimizer, "", (0.1,), 1)
    batch = _batch()
    state = jax.eval_shape(functools.partial(init_state, task, method), jax.random.key(0), batch)
    step = jax.jit(functools.partial(train_step, task, method), donate_argnums=0)
    return temporary_bytes(step.lower(state, batch, 0.1).compile())


def num_parameters(task: Task) -> int:
    """Returns the number of parameters of a task's network."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0), _batch())))


def _batch() -> Any:
    images = jax.ShapeDtypeStruct((_BATCH_SIZE, 28, 28, 1), jnp.float32)
    return Batch(images, jax.ShapeDtypeStruct((_BATCH_SIZE,), jnp.int32))  # pyright: ignore[reportArgumentType]


def memory_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Lays the figures out beside the limits."""
    table = Table(
        title=f"Temporary memory of a compiled step on {rows[0]['parameters'] / 1e6:.1f} million parameters",
        caption="Beyond a gradient step's, in vectors of parameters, as XLA counts it; parameters and state donated.",
    )
    table.add_column("method", no_wrap=True)
    for column in ("vectors", "at most", ""):
        table.add_column(column, justify="right")
    for row in rows:
        limit = row["limit"]
        verdict = "" if limit is None else "within" if row["vectors"] <= limit else "beyond"
        table.add_row(row["method"], f"{row['vectors']:.1f}", "" if limit is None else f"{limit:g}", verdict)
    return table

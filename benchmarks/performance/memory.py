"""The temporary memory of a compiled step, beside a gradient step's, in vectors of parameters."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

import optcurv
from benchmarks.core.methods import GRADIENT_DESCENT, Method
from benchmarks.core.models import Mlp, classification_loss
from benchmarks.core.report import table
from benchmarks.core.task import Task
from benchmarks.core.timing import noise, temporary_bytes
from benchmarks.core.train import init_state, train_step

_BATCH_SIZE = 16


def make_task(hidden: tuple[int, ...] = (1700,) * 4) -> Task:
    """Returns a network of ten million parameters; on a small batch its activations are nothing beside them."""
    return Task(Mlp(hidden), classification_loss, noise(_BATCH_SIZE), _BATCH_SIZE)


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


def measure(task: Task) -> list[dict[str, Any]]:
    """Returns a row for each method; steps are compiled, and nothing is run."""
    gradient_step = step_bytes(task, GRADIENT_DESCENT)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))))
    return [
        {
            "method": name,
            "limit": limit.vectors,
            "vectors": (step_bytes(task, Method("", lambda _, o=limit.optimizer: o, {"": (0.1,)})) - gradient_step)
            / (4 * num_parameters),
            "parameters": num_parameters,
        }
        for name, limit in LIMITS.items()
    ]


def step_bytes(task: Task, method: Method) -> int:
    """Returns the temporary memory of a training step that overwrites its parameters and state."""
    setting = method.first_setting
    state = jax.eval_shape(functools.partial(init_state, task, method), jax.random.key(0), setting)
    step = jax.jit(functools.partial(train_step, task, method), donate_argnums=0)
    return temporary_bytes(step.lower(state, task.data.train, setting).compile())


def memory_table(content: Mapping[str, Any]) -> str:
    """Lays the figures out beside the limits."""

    def row(one: Mapping[str, Any]) -> dict[str, str]:
        limit = one["limit"]
        verdict = "" if limit is None else "within" if one["vectors"] <= limit else "beyond"
        at_most = "" if limit is None else f"{limit:g}"
        return {"method": one["method"], "vectors": f"{one['vectors']:.1f}", "at most": at_most, "verdict": verdict}

    caption = (
        "Temporary memory of a compiled step beyond a gradient step's, in vectors of parameters, as XLA counts it, on "
    )
    caption += f"{content['rows'][0]['parameters'] / 1e6:.1f} million parameters; parameters and state donated."
    return table(map(row, content["rows"]), caption)

"""Trains the CNN with every method in float32 and in bfloat16, and compares the accuracies."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optcurv
from benchmarks.core import data
from benchmarks.core.cache import Cache
from benchmarks.core.methods import METHODS, Method, Setting
from benchmarks.core.models import Batch, Cnn, classification_loss
from benchmarks.core.report import progress_bar, table
from benchmarks.core.statistics import mean_interval, plus_minus
from benchmarks.core.task import Task
from benchmarks.core.train import Trainer, after_steps

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LIMIT = 0.01
"""Of the accuracy that bfloat16 may cost."""

_BATCH_SIZE = 128


@dataclasses.dataclass(frozen=True)
class TypedTask(Task):
    """A task whose parameters and activations have a dtype; the loss of its outputs is taken in float32."""

    dtype: jax.typing.DTypeLike = jnp.float32

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What distinguishes the task from others."""
        return super().description | {"dtype": jnp.dtype(self.dtype).name}

    def init(self, key: jax.Array) -> optax.Params:
        """Returns fresh parameters."""
        return optax.tree.cast(super().init(key), self.dtype)

    def loss(self, batch: Batch) -> optcurv.Composite:
        """Returns the loss on a batch as a function of the parameters."""
        images = batch.images.astype(self.dtype)
        return optcurv.Composite(
            model_fn=lambda params: self.network.apply({"params": params}, images),
            loss_fn=lambda outputs: self.loss_fn(outputs, batch),
        )


def _tso_alra(learning_rate: float | jax.Array) -> optax.GradientTransformation:
    return optcurv.tso_alra(learning_rate, when=300, max_update_norm=1.0)


_gauss_newton = functools.partial(optcurv.trust_region, curvature=optcurv.gauss_newton_product)

_SETTINGS = {
    "SGD-momentum": 0.1,
    "Adam": 0.005,
    "PAL": 0.1,
    "EDF-G k=1": 2.0,
    "EDF-G k=2": 2.0,
    "EDF-H k=1": 2.0,
    "EDF-H k=2": 1.0,
}

RUNS = (
    *(method.at(grid=dict.fromkeys(method.grid, (_SETTINGS[method.name],))) for method in METHODS),
    Method("Adam-RK2", optcurv.adam_rk2, {"learning rate": (0.005,)}),
    Method("TR Steihaug H", lambda radius: optcurv.trust_region(initial_radius=radius), {"radius": (0.3,)}),
    Method("TR Steihaug G", lambda radius: _gauss_newton(initial_radius=radius), {"radius": (0.3,)}),
    Method("adaptive cubic", lambda weight: optcurv.adaptive_cubic(initial_weight=weight), {"weight": (1.0,)}),
    Method("TSO-ALRA", _tso_alra, {"learning rate": (0.1,)}),
)
"""Every method at a setting that trains; what is compared is precision, not methods."""


def measure(cache: Cache, methods: tuple[Method, ...], num_seeds: int, num_steps: int) -> dict[str, Any]:
    """Returns the test accuracies of each method in each dtype after equally many steps, one a seed."""
    dataset = data.digits()
    measured: dict[str, Any] = {}
    with progress_bar(len(methods) * len(DTYPES) * num_seeds) as report:
        for method in methods:
            for name, dtype in DTYPES.items():
                task = TypedTask(Cnn(), classification_loss, dataset, _BATCH_SIZE, dtype=dtype)
                trainer, setting = Trainer(task, method), method.first_setting
                for seed in range(num_seeds):
                    key = task.description | method.description | {"setting": setting, "seed": seed, "steps": num_steps}
                    accuracy = cache.get(key, _accuracy, trainer, setting, seed, num_steps)
                    measured.setdefault(method.name, {}).setdefault(name, []).append(accuracy)
                    report(f"{method.name}, {name}")
    return {"seeds": num_seeds, "steps": num_steps, "limit": LIMIT, "accuracies": measured}


def _accuracy(trainer: Trainer, setting: Setting, seed: int, num_steps: int) -> float:
    return trainer.run(setting, seed, after_steps([num_steps])).final["test_accuracy"]


def precision_table(content: Mapping[str, Any]) -> str:
    """Lays out mean accuracies, and the difference with its 95 % interval over the seeds."""

    def row(name: str, accuracies: Mapping[str, Any]) -> dict[str, str]:
        columns = {dtype: np.array(accuracies[dtype]) for dtype in DTYPES}
        difference = mean_interval(columns["bfloat16"] - columns["float32"])
        return {
            "method": name,
            **{dtype: f"{column.mean():.4f}" for dtype, column in columns.items()},
            "bfloat16 - float32": plus_minus(difference, digits=2),
            f"loses at most {LIMIT:.0%}": "yes" if difference.mean >= -LIMIT else "no",
        }

    caption = (
        f"CNN on digits: test accuracy after {content['steps']} steps, by the dtype of parameters and activations; "
    )
    caption += "difference: mean over seeds of equal initialisation and batches with its 95 % interval."
    return table((row(*each) for each in content["accuracies"].items()), caption)

"""Trains the CNN with every method in float32 and in bfloat16, and compares the accuracies."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

import optcurv
from benchmarks.core import data
from benchmarks.core.claims import mean_interval, plus_minus
from benchmarks.core.kept import Kept
from benchmarks.core.methods import METHODS, Method
from benchmarks.core.models import Batch, Cnn, Task, classification_loss
from benchmarks.core.report import progress_bar, write
from benchmarks.core.training import Problem, Trainer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
LIMIT = 0.01
"""Of the accuracy that bfloat16 may cost."""

_BATCH_SIZE = 128


@dataclasses.dataclass(frozen=True)
class TypedTask(Task):
    """A task whose parameters and activations have a dtype; the loss of its outputs is taken in float32."""

    dtype: jax.typing.DTypeLike = jnp.float32

    @property
    def description(self) -> dict[str, str]:
        """What tells the task from others."""
        return super().description | {"dtype": jnp.dtype(self.dtype).name}

    def init(self, key: jax.Array, batch: Batch) -> optax.Params:
        """Returns fresh parameters."""
        return optax.tree.cast(super().init(key, batch), self.dtype)

    def loss(self, batch: Batch) -> optcurv.Composite:
        """Returns the loss on a batch as a function of the parameters."""
        images = batch.images.astype(self.dtype)
        return optcurv.Composite(
            model_fn=lambda params: self.network.apply({"params": params}, images),
            loss_fn=lambda outputs: self.loss_fn(outputs, batch),
        )


def _at(method: Method, setting: float) -> Method:
    """The method with one setting; all take as many steps, whatever they cost."""
    return dataclasses.replace(method, grid=(setting,), gradients=1)


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
    *(_at(method, _SETTINGS[method.name]) for method in METHODS),
    Method("Adam-RK2", optcurv.adam_rk2, "learning rate", (0.005,), 1),
    Method("TR Steihaug H", lambda radius: optcurv.trust_region(initial_radius=radius), "radius", (0.3,), 1),
    Method("TR Steihaug G", lambda radius: _gauss_newton(initial_radius=radius), "radius", (0.3,), 1),
    Method("adaptive cubic", lambda weight: optcurv.adaptive_cubic(initial_weight=weight), "weight", (1.0,), 1),
    Method("TSO-ALRA", _tso_alra, "learning rate", (0.1,), 1),
)
"""Every method at a setting that trains; what is compared is precision, not methods."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--quick", action="store_true", help="one seed and ten steps: does it run?")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/precision"),
        help="folder (default: results/precision); what is measured there is not measured again",
    )


def main(args: argparse.Namespace) -> int:
    """Trains, prints and writes `precision.json` and `precision.txt`."""
    num_seeds, num_steps = (1, 10) if args.quick else (3, 400)
    measured = measure(Kept(args.output), RUNS, num_seeds, num_steps)
    content = {"seeds": num_seeds, "steps": num_steps, "limit": LIMIT, "accuracies": measured}
    write(args.output / "precision", precision_table(measured, num_steps), content)
    return 0


def measure(kept: Kept, methods: tuple[Method, ...], num_seeds: int, num_steps: int) -> dict[str, Any]:
    """Returns the test accuracies of each method in each dtype, one a seed."""
    dataset = data.digits()
    measured: dict[str, Any] = {}
    with progress_bar(len(methods) * len(DTYPES) * num_seeds) as report:
        for method in methods:
            for name, dtype in DTYPES.items():
                task = TypedTask(Cnn(), classification_loss, has_accuracy=True, dtype=dtype)
                problem = Problem(task, dataset, _BATCH_SIZE, num_steps)
                trainer = Trainer(problem, method)
                for seed in range(num_seeds):
                    key = problem.key(method, setting=method.grid[0], seed=seed)
                    train = functools.partial(_accuracy, trainer, seed)
                    accuracy = kept.get(f"{method.name.replace(' ', '-')}-{name}", key, train)
                    measured.setdefault(method.name, {}).setdefault(name, []).append(accuracy)
                    report(f"{method.name}, {name}")
    return measured


def _accuracy(trainer: Trainer, seed: int) -> float:
    run = trainer.run(trainer.method.grid[0], seed, num_evaluations=1, report=lambda gradients, loss: None)
    return run.final("test_accuracy")


def precision_table(measured: dict[str, Any], num_steps: int) -> Table:
    """Lays out mean accuracies, and the difference with its 95 % interval over the seeds."""
    table = Table(
        title="CNN on digits: test accuracy by the dtype of parameters and activations",
        caption=f"After {num_steps} steps; difference: mean over seeds of equal initialisation and batches ± 95 %.",
    )
    table.add_column("method", no_wrap=True)
    for column in (*DTYPES, "bfloat16 - float32", f"loses at most {LIMIT:.0%}"):
        table.add_column(column, justify="right")
    for name, accuracies in measured.items():
        columns = [np.array(accuracies[dtype]) for dtype in DTYPES]
        difference = mean_interval(columns[1] - columns[0])
        table.add_row(
            name,
            *(f"{column.mean():.4f}" for column in columns),
            plus_minus(difference, digits=2),
            "yes" if difference.mean >= -LIMIT else "no",
        )
    return table

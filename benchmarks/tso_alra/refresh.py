"""What a preconditioned step costs, refreshed more or less often, and what the loss after equal steps makes of it."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.table import Table

import optcurv
from benchmarks.core.data import Dataset
from benchmarks.core.kept import Kept
from benchmarks.core.methods import GRADIENT_DESCENT, Method
from benchmarks.core.models import Batch
from benchmarks.core.timing import CompiledStep, Workload, random_batch
from benchmarks.core.training import Problem, Trainer

NUM_STEPS = 200
"""Steps after which losses are compared: two refreshes at the defaults."""

DRIFT_STEPS = 2000
"""Steps over which a step's time may drift."""

_RATES = (0.01, 0.03, 0.1)
_EARLY = 65  # steps in which factors and roots are refreshed more often


class Schedule(NamedTuple):
    """How often factors and roots are refreshed, and how many eigenpairs are kept."""

    name: str
    factor_every: int
    root_every: int
    rank: int | None


SCHEDULES = (
    Schedule("defaults", 10, 100, 16),
    Schedule("twice the rank", 10, 100, 32),
    Schedule("refreshed at every step", 1, 1, 16),
    Schedule("all eigenpairs", 10, 100, None),
)
"""The last is for small layers: a factor of some thousand rows takes half a minute."""


def make_method(schedule: Schedule, factor_decay: float = 0.95) -> Method:
    """Returns the first stage of TSO-ALRA with momentum and a bound on the update's norm."""

    def optimizer(learning_rate: float | jax.Array) -> optax.GradientTransformation:
        preconditioner = optcurv.scale_by_kronecker(
            factor_decay=factor_decay,
            factor_every=schedule.factor_every,
            root_every=schedule.root_every,
            rank=schedule.rank,
        )
        bound, momentum = optax.clip_by_global_norm(1.0), optax.trace(0.9)
        return optax.chain(preconditioner, bound, momentum, optax.scale_by_learning_rate(learning_rate))

    return Method(schedule.name, optimizer, "learning rate", _RATES, 1)


def measure_cost(workload: Workload, schedule: Schedule) -> dict[str, float]:
    """Times a cycle of refreshes, a gradient step before each step; the first ones, with their own refreshes, aside."""
    batch = random_batch(workload.batch_size)
    gradient, stepper = (CompiledStep(workload, method, batch) for method in (GRADIENT_DESCENT, make_method(schedule)))
    num_steps = max(schedule.root_every, 40)
    times, ages = [], []
    for _ in range(_EARLY + num_steps):
        times.append((gradient.seconds(1), stepper.seconds(1)))
        ages.append(np.min(optax.tree.get(stepper.state, "ages")))
    times, ages = np.array(times)[_EARLY:], np.array(ages)[_EARLY:]
    quiet = (np.arange(_EARLY, _EARLY + num_steps) % schedule.factor_every > 0) & (ages > 0)
    return {
        "quiet": float(np.median(times[quiet, 1] / times[quiet, 0])) if np.any(quiet) else math.nan,
        "average": float(times[:, 1].sum() / times[:, 0].sum()),
        "longest": float(times[:, 1].max() / np.median(times[:, 0])),
        "gradient_ms": 1e3 * float(np.median(times[:, 0])),
        "compile_seconds": stepper.compile_seconds,
        "gradient_compile_seconds": gradient.compile_seconds,
    }


def measure_loss(
    workload: Workload, dataset: Dataset, schedule: Schedule, num_steps: int, kept: Kept, report: Callable[[str], None]
) -> dict[str, float]:
    """Returns the training loss after so many steps at the best rate, and that rate."""
    problem = Problem(workload.task, dataset, workload.batch_size, num_steps)
    method = make_method(schedule)
    trainer = Trainer(problem, method)

    def final_loss(rate: float) -> float:
        run = trainer.run(rate, seed=0, num_evaluations=1, report=lambda gradients, loss: None)
        return run.final("train_loss")

    losses = {}
    for rate in _RATES:
        key = problem.key(method, schedule=schedule, setting=rate)
        losses[rate] = kept.get("refresh-loss", key, functools.partial(final_loss, rate))
        losses[rate] = np.nan_to_num(losses[rate], nan=math.inf)
        report(f"{schedule.name}, learning rate {rate:g}: loss {losses[rate]:.4f}")
    best = min(losses, key=losses.__getitem__)
    return {"train_loss": float(losses[best]), "learning_rate": best}


def measure_drift(workload: Workload, dataset: Dataset, num_steps: int) -> float:
    """Returns how many times as long a step takes at the end as it did at first, each relative to gradient steps.

    The first batch lights every pixel, later ones never those at the rims of the images, whose statistics then fade
    through numbers that are slow where they are not flushed to zero.
    """
    noise = random_batch(workload.batch_size)
    images = Batch(*(array[: workload.batch_size] for array in dataset.train))
    method = make_method(SCHEDULES[0], factor_decay=0.5)
    gradient, stepper = (CompiledStep(workload, each, noise) for each in (GRADIENT_DESCENT, method))
    stepper.seconds(1)
    stepper.batch = images
    chunk = num_steps // 20
    ratios = [stepper.seconds(chunk) / gradient.seconds(max(chunk // 4, 1)) for _ in range(20)]
    return float(np.median(ratios[-5:]) / np.median(ratios[1:6]))


def results_table(title: str, rows: dict[str, dict[str, Any]], num_steps: int, drift: float, drift_steps: int) -> Table:
    """Lays the figures out."""
    caption = (
        "Quiet (refreshing nothing, the median), average and longest step: ratios to a gradient step.\n"
        f"After {drift_steps} steps with fading statistics a step takes {drift:.2f} times as long as at first."
    )
    table = Table(title=title, caption=caption)
    table.add_column("schedule", no_wrap=True)
    for column in ("factors", "roots", "rank", "quiet", "average", "longest", "compile s", "of the gradient step's"):
        table.add_column(column, justify="right")
    table.add_column(f"train loss after {num_steps} steps", justify="right")
    for schedule in SCHEDULES:
        if (row := rows.get(schedule.name)) is None:
            continue
        table.add_row(
            schedule.name,
            *(str(number) for number in (schedule.factor_every, schedule.root_every, schedule.rank or "all")),
            "-" if math.isnan(row["quiet"]) else f"{row['quiet']:.2f}",
            *(f"{row[name]:.2f}" for name in ("average", "longest")),
            f"{row['compile_seconds']:.1f}",
            f"{row['compile_seconds'] / row['gradient_compile_seconds']:.1f}",
            f"{row['train_loss']:.4f} at {row['learning_rate']:g}",
        )
    return table

"""What a preconditioned step costs, refreshed more or less often, and what the loss after equal steps makes of it."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import optcurv
from benchmarks.core.cache import Cache
from benchmarks.core.data import Dataset, digest
from benchmarks.core.methods import GRADIENT_DESCENT, Method, Setting
from benchmarks.core.models import Batch
from benchmarks.core.report import table
from benchmarks.core.task import Task
from benchmarks.core.timing import CompiledStep
from benchmarks.core.train import Run, Trainer, after_steps
from benchmarks.core.tune import TUNING_SEED, tune

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

    return Method(schedule.name, optimizer, {"learning rate": _RATES})


def measure_cost(task: Task, schedule: Schedule) -> dict[str, float]:
    """Times a cycle of refreshes, a gradient step before each step; the first ones, with their own refreshes, aside."""
    gradient, stepper = (CompiledStep(task, method) for method in (GRADIENT_DESCENT, make_method(schedule)))
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


def train(trainer: Trainer, setting: Setting, num_steps: int) -> Run:
    """Takes so many steps, and evaluates at the end."""
    return trainer.run(setting, TUNING_SEED, after_steps([num_steps]))


def measure_loss(
    task: Task, schedule: Schedule, num_steps: int, cache: Cache, report: Callable[[str], None]
) -> dict[str, Any]:
    """Returns the training loss after so many steps at the best rate, and that rate."""
    method = make_method(schedule)
    trainer = Trainer(task, method)

    def run(setting: Setting) -> Run:
        key = task.description | {"schedule": schedule, "setting": setting, "num_steps": num_steps}
        found = cache.get(key, train, trainer, setting, num_steps)
        report(f"{schedule.name}, learning rate {setting['learning rate']:g}: loss {found.final['train_loss']:.4f}")
        return found

    best = tune(method, run, "train_loss").best
    return {"train_loss": best.final["train_loss"], "learning_rate": best.setting["learning rate"]}


def measure_drift(task: Task, dataset: Dataset, num_steps: int) -> float:
    """Returns how many times as long a step takes at the end as it did at first, each relative to gradient steps.

    The first batch lights every pixel, later ones never those at the rims of the images, whose statistics then fade
    through numbers that are slow where they are not flushed to zero.
    """
    images = Batch(*(array[: task.batch_size] for array in dataset.train))
    method = make_method(SCHEDULES[0], factor_decay=0.5)
    gradient, stepper = (CompiledStep(task, each) for each in (GRADIENT_DESCENT, method))
    stepper.seconds(1)
    stepper.batch = images
    chunk = num_steps // 20
    ratios = [stepper.seconds(chunk) / gradient.seconds(max(chunk // 4, 1)) for _ in range(20)]
    return float(np.median(ratios[-5:]) / np.median(ratios[1:6]))


def measure(
    task: Task,
    dataset: Dataset,
    schedules: tuple[Schedule, ...],
    quick: bool,
    cache: Cache,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Returns costs of steps on noise, losses after equally many on images, and how a step's time drifts."""
    num_steps, drift_steps = (10, 40) if quick else (NUM_STEPS, DRIFT_STEPS)
    rows = {}
    for schedule in schedules:
        found = cache.get(task.description | {"schedule": schedule}, measure_cost, task, schedule)
        report(f"{schedule.name}: timed")
        on_images = dataclasses.replace(task, data=dataset)
        rows[schedule.name] = found | measure_loss(on_images, schedule, num_steps, cache, report)
    drift = cache.get(
        task.description | {"steps": drift_steps, "images": digest(dataset.train)},
        measure_drift,
        task,
        dataset,
        drift_steps,
    )
    return {
        "batch_size": task.batch_size,
        "num_steps": num_steps,
        "drift_steps": drift_steps,
        "drift": drift,
        "rows": rows,
    }


def results_table(content: Mapping[str, Any]) -> str:
    """Lays the figures out."""

    def row(schedule: Schedule) -> dict[str, str]:
        one = content["rows"][schedule.name]
        return {
            "schedule": schedule.name,
            "factors": str(schedule.factor_every),
            "roots": str(schedule.root_every),
            "rank": str(schedule.rank or "all"),
            "quiet": "-" if math.isnan(one["quiet"]) else f"{one['quiet']:.2f}",
            **{name: f"{one[name]:.2f}" for name in ("average", "longest")},
            "compile s": f"{one['compile_seconds']:.1f}",
            "of the gradient step's": f"{one['compile_seconds'] / one['gradient_compile_seconds']:.1f}",
            f"train loss after {content['num_steps']} steps": f"{one['train_loss']:.4f} at {one['learning_rate']:g}",
        }

    caption = (
        f"Batch {content['batch_size']}. A quiet step refreshes nothing; quiet (the median), average and longest step "
    )
    caption += "are ratios to a gradient step. After "
    caption += (
        f"{content['drift_steps']} steps with fading statistics a step takes {content['drift']:.2f} times as long "
    )
    return table((row(each) for each in SCHEDULES if each.name in content["rows"]), caption + "as at first.")

"""Figure 2: how much of a network's Hessian lies on its diagonal, beside what chance gives."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optcurv
from benchmarks.adaptive_norms.progress import progress_of
from benchmarks.core.cache import Cache
from benchmarks.core.data import Dataset
from benchmarks.core.methods import Method
from benchmarks.core.models import Autoencoder, Batch, Cnn, Mlp, classification_loss, reconstruction_loss
from benchmarks.core.report import table
from benchmarks.core.statistics import Claim, Interval, Verdict, mean_interval, plus_minus
from benchmarks.core.task import Task
from benchmarks.core.train import Trainer, after_steps

HESSIAN_BATCH = 32
STAGES: tuple[str, ...] = ("random inputs", "initialisation", "midway", "trained")
TRAINED = {True: 0.9, False: 0.5}
"""Progress at which training stops: 90 % accuracy; for an autoencoder, half of what it can explain."""

_EVERY = 10  # steps between two looks at the progress
_RMSPROP = Method("RMSProp", optax.rmsprop, {"learning rate": (0.003,)})
_BATCH_SIZE = 128


def networks(dataset: Dataset) -> dict[str, Task]:
    """Returns networks small enough that every column of the Hessian can be taken; smaller on larger images."""
    small = dataset.train.images.shape[1] > 16
    mlp = Mlp(hidden=(16, 16) if small else (32, 16))
    cnn = Cnn(stride=2, hidden=32) if small else Cnn(channels=(4, 8), hidden=32)
    autoencoder = Autoencoder(hidden=(8,) if small else (24,), code=8)
    return {
        "MLP": Task(mlp, classification_loss, dataset, _BATCH_SIZE),
        "CNN": Task(cnn, classification_loss, dataset, _BATCH_SIZE),
        "autoencoder": Task(autoencoder, reconstruction_loss, dataset, _BATCH_SIZE, metrics={}),
    }


class Measured(NamedTuple):
    """Diagonal masses of a network.

    Attributes:
      dimension: the number of its parameters.
      masses: maps a stage to one mass a run.
      progress: the accuracy or explained share of each run where its training stopped.
      steps: of each run's training.
    """

    dimension: int
    masses: dict[str, list[float]]
    progress: list[float]
    steps: list[int]

    @property
    def baselines(self) -> dict[str, float]:
        """The masses of the paper's two random matrices of the same dimension."""
        return {
            "Wigner": optcurv.wigner_diagonal_mass(self.dimension),
            "least squares": optcurv.least_squares_diagonal_mass(self.dimension, HESSIAN_BATCH),
        }

    def interval(self, stage: str) -> Interval:
        """Mean and 95 % interval over the runs."""
        return mean_interval(self.masses[stage])


class Checkpoints(NamedTuple):
    """Parameters at initialisation, halfway, and where training stopped."""

    initial: optax.Params
    midway: optax.Params
    trained: optax.Params
    progress: float
    steps: int


def train(trainer: Trainer, seed: int, max_steps: int) -> Checkpoints:
    """Trains with RMSProp, as the paper does, until `TRAINED` or for so many steps."""
    task, history, progress, steps = trainer.task, [], 0.0, 0
    progress_at, goal = progress_of(task), TRAINED["accuracy" in task.metrics]
    stops = after_steps([*range(0, max_steps, _EVERY), max_steps])
    for entry, params in trainer.follow(_RMSPROP.first_setting, seed, stops):
        history.append(params)
        steps = int(entry["steps"])
        progress = progress_at(task.evaluate(params)) if len(history) > 1 else 0.0
        if progress >= goal:
            break
    return Checkpoints(history[0], history[len(history) // 2], history[-1], progress, steps)


def one_run(trainer: Trainer, mass: Callable[[optax.Params, Batch], jax.Array], seed: int, max_steps: int) -> dict:
    """Trains, and measures at every stage."""
    run = train(trainer, seed, max_steps)
    real, noise = hessian_batches(trainer.task.data.train, seed)
    points = ((run.initial, noise), (run.initial, real), (run.midway, real), (run.trained, real))
    dimension = sum(leaf.size for leaf in jax.tree.leaves(run.initial))
    masses = [float(mass(params, batch)) for params, batch in points]
    return {"dimension": dimension, "masses": masses, "progress": run.progress, "steps": run.steps}


def measure(task: Task, num_runs: int, max_steps: int, cache: Cache, report: Callable[[], None]) -> Measured:
    """Measures a network at every stage of so many runs; calls `report()` after each."""
    trainer = Trainer(task, _RMSPROP)

    @jax.jit
    def mass(params: optax.Params, batch: Batch) -> jax.Array:
        return optcurv.diagonal_mass(optcurv.hessian_product(task.loss(batch), params), params).mass

    runs = []
    for seed in range(num_runs):
        key = task.description | {"max_steps": max_steps, "seed": seed}
        runs.append(cache.get(key, one_run, trainer, mass, seed, max_steps))
        report()
    by_stage = {stage: [run["masses"][i] for run in runs] for i, stage in enumerate(STAGES)}
    progress, steps = ([run[name] for run in runs] for name in ("progress", "steps"))
    return Measured(runs[0]["dimension"], by_stage, progress, steps)


def hessian_batches(train: Batch, seed: int) -> tuple[Batch, Batch]:
    """Returns a batch of the data, and one of grey values and labels drawn evenly."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(train.labels), HESSIAN_BATCH, replace=False)
    real = Batch(*(array[chosen] for array in train))
    noise = rng.random(real.images.shape, dtype=np.float32)
    return real, Batch(jnp.asarray(noise), jnp.asarray(rng.integers(0, 10, HESSIAN_BATCH)))


def judge(measured: Mapping[str, Measured]) -> list[Claim]:
    """Returns the claim of the figure for each network."""
    claims = []
    for name, one in measured.items():
        highest = max(one.baselines.values())
        above = [one.interval(stage).mean - one.interval(stage).half_width > highest for stage in STAGES]
        below = [one.interval(stage).mean + one.interval(stage).half_width < highest for stage in STAGES]
        verdict = Verdict.HOLDS if all(above) else Verdict.FAILS if any(below) else Verdict.UNDECIDED
        least = min(STAGES, key=lambda stage, one=one: one.interval(stage).mean)
        numbers = f"least, {least}: {plus_minus(one.interval(least))}; " + "; ".join(
            f"{baseline} {mass:.3g}" for baseline, mass in one.baselines.items()
        )
        claims.append(Claim(f"{name}: diagonal mass above both baselines at every stage", verdict, numbers))
    return claims


def summarise(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Returns the claims, and what the table and the picture show."""
    claims = [claim._asdict() for claim in judge(measured)]
    return {"claims": claims, "networks": {name: one._asdict() for name, one in measured.items()}}


def results_table(content: Mapping[str, Any]) -> str:
    """Lays out the masses of every stage beside the baselines."""
    measured = {name: Measured(**one) for name, one in content["networks"].items()}
    rows = [
        {
            "network": name,
            "parameters": str(one.dimension),
            **{stage: plus_minus(mean_interval(1000 * np.array(one.masses[stage]))) for stage in STAGES},
            **{baseline: f"{1000 * mass:.3g}" for baseline, mass in one.baselines.items()},
            "steps": f"{np.mean(one.steps):.0f}",
            "progress": f"{np.mean(one.progress):.2f}",
        }
        for name, one in measured.items()
    ]
    num_runs = max(len(one.steps) for one in measured.values())
    caption = (
        f"Diagonal mass in thousandths, mean over {num_runs} runs with its 95 % interval; Hessians of the loss on "
    )
    caption += f"{HESSIAN_BATCH} images. Trained: at {TRAINED[True]:.0%} training accuracy; an autoencoder at "
    return table(rows, caption + f"{TRAINED[False]:.0%} of what it can explain beyond the mean image.")

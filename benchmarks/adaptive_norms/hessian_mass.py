"""Figure 2: how much of a network's Hessian lies on its diagonal, beside what chance gives."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

import optcurv
from benchmarks.adaptive_norms.progress import progress_of
from benchmarks.core.claims import Claim, Interval, Verdict, mean_interval, plus_minus
from benchmarks.core.data import Dataset
from benchmarks.core.kept import Kept
from benchmarks.core.methods import Method
from benchmarks.core.models import Autoencoder, Batch, Cnn, Mlp, Task, classification_loss, reconstruction_loss
from benchmarks.core.training import CompiledStep, Problem, compile_step, init_state

HESSIAN_BATCH = 32
STAGES: tuple[str, ...] = ("random inputs", "initialisation", "midway", "trained")
TRAINED = {True: 0.9, False: 0.5}
"""Progress at which training stops: 90 % accuracy; for an autoencoder, half of what it can explain."""

_EVERY = 10  # steps between two looks at the progress
_RMSPROP = Method("RMSProp", optax.rmsprop, "learning rate", (0.003,), 1)
_BATCH_SIZE = 128

# Small enough that every column of the Hessian can be taken.
NETWORKS = {
    "digits": {
        "MLP": Task(Mlp(hidden=(32, 16)), classification_loss, has_accuracy=True),
        "CNN": Task(Cnn(channels=(4, 8), hidden=32), classification_loss, has_accuracy=True),
        "autoencoder": Task(Autoencoder(hidden=(24,), code=8), reconstruction_loss, has_accuracy=False),
    },
    "fashion-mnist": {
        "MLP": Task(Mlp(hidden=(16, 16)), classification_loss, has_accuracy=True),
        "CNN": Task(Cnn(stride=2, hidden=32), classification_loss, has_accuracy=True),
        "autoencoder": Task(Autoencoder(hidden=(8,), code=8), reconstruction_loss, has_accuracy=False),
    },
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


def train(problem: Problem, step: CompiledStep, seed: int) -> Checkpoints:
    """Trains with RMSProp, as the paper does, until `TRAINED` or until the budget is spent."""
    progress_at = progress_of(problem)
    state = init_state(problem.task, _RMSPROP, jax.random.key(seed), problem.data.train)
    order = problem.batch_indices(seed, problem.num_steps(_RMSPROP))
    history, done, progress = [state[0]], 0, 0.0
    while progress < TRAINED[problem.task.has_accuracy] and done < len(order):
        for indices in order[done : done + _EVERY]:
            state, _ = step(state, problem.data.train, indices, _RMSPROP.grid[0])
        done = min(done + _EVERY, len(order))
        history.append(state[0])
        progress = progress_at(problem.evaluate(state[0]))
    return Checkpoints(history[0], history[len(history) // 2], history[-1], progress, done)


def measure(
    dataset: Dataset, task: Task, num_runs: int, max_steps: int, kept: Kept, report: Callable[[], None]
) -> Measured:
    """Measures a network at every stage of so many runs; calls `report()` after each."""
    problem = Problem(task, dataset, _BATCH_SIZE, max_steps)
    step = compile_step(task, _RMSPROP)

    @jax.jit
    def mass(params: optax.Params, batch: Batch) -> jax.Array:
        return optcurv.diagonal_mass(optcurv.hessian_product(task.loss(batch), params), params).mass

    def one_run(seed: int) -> dict[str, Any]:
        run = train(problem, step, seed)
        real, noise = hessian_batches(dataset.train, seed)
        points = ((run.initial, noise), (run.initial, real), (run.midway, real), (run.trained, real))
        masses = [float(mass(params, batch)) for params, batch in points]
        dimension = sum(leaf.size for leaf in jax.tree.leaves(run.initial))
        return {"dimension": dimension, "masses": masses, "progress": run.progress, "steps": run.steps}

    runs = []
    for seed in range(num_runs):
        runs.append(kept.get("diagonal-mass", problem.key(_RMSPROP, seed=seed), functools.partial(one_run, seed)))
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


def results_table(measured: Mapping[str, Measured]) -> Table:
    """Lays out the masses of every stage beside the baselines."""
    num_runs = max(len(one.steps) for one in measured.values())
    table = Table(
        title="Figure 2: diagonal mass of Hessians, in thousandths",
        caption=f"Mean over {num_runs} runs with its 95 % interval; Hessians of the loss on {HESSIAN_BATCH} images.\n"
        "Trained: at 90 % training accuracy; an autoencoder at half of what it can explain beyond the mean image.",
    )
    table.add_column("network")
    for column in ("parameters", *STAGES, "Wigner", "least squares", "steps", "progress"):
        table.add_column(column, justify="right")
    for name, one in measured.items():
        table.add_row(
            name,
            str(one.dimension),
            *(plus_minus(mean_interval(1000 * np.array(one.masses[stage]))) for stage in STAGES),
            *(f"{1000 * mass:.3g}" for mass in one.baselines.values()),
            f"{np.mean(one.steps):.0f}",
            f"{np.mean(one.progress):.2f}",
        )
    return table


def as_json(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Returns every run's figures, and the baselines."""
    return {name: one._asdict() | {"baselines": one.baselines} for name, one in measured.items()}

"""The optimisers of the loss-surface experiments, what one run does, and how runs are kept."""

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optcurv
from benchmarks.core.models import Batch
from benchmarks.core.report import with_nan, write_json
from benchmarks.core.tuning import tune
from benchmarks.loss_surfaces.networks import BATCH_SIZE, Initialisation, Problem


class Method(NamedTuple):
    """An optimiser.

    Attributes:
      grid: the learning rates tried.
      make: maps a learning rate, which may be traced, to the optimiser.
      gradients: computed in a step.
    """

    grid: tuple[float, ...]
    make: Callable[[Any], optax.GradientTransformation]
    gradients: int = 1


def _sgd_rk2(tableau: optcurv.Tableau) -> Method:
    return Method((0.1, 0.3, 1.0), lambda rate: optcurv.sgd_rk2(rate, tableau=tableau), gradients=2)


METHODS = {
    "SGD": Method((0.03, 0.1, 0.3), optax.sgd),
    "SGD-momentum": Method((0.01, 0.03, 0.1), lambda rate: optax.sgd(rate, momentum=0.9)),
    "RMSProp": Method((0.0003, 0.001, 0.003), optax.rmsprop),
    "Adadelta": Method((0.3, 1.0, 3.0), optax.adadelta),
    "Adam": Method((0.001, 0.003, 0.01), optax.adam),
    "SGD+RK2": _sgd_rk2(optcurv.HEUN),
    "Adam+RK2": Method((0.001, 0.003, 0.01), optcurv.adam_rk2, gradients=2),
    "SGD+midpoint": _sgd_rk2(optcurv.MIDPOINT),
    "SGD+Ralston": _sgd_rk2(optcurv.RALSTON),
}
"""By name; RK2 alone is Heun's."""


class Stage(NamedTuple):
    """An optimiser and its learning rate."""

    method: str
    rate: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one run does; runs of a seed see the same batches, whatever the optimiser.

    Attributes:
      first: the optimiser.
      seed: of the initialisation and the order of the batches.
      num_epochs: to train for.
      initialisation: of the kernels, or None for Flax's own.
      second: the optimiser that takes over, if one does.
      switch_at: when, as a share of the training.
    """

    first: Stage
    seed: int
    num_epochs: int
    initialisation: Initialisation | None = None
    second: Stage | None = None
    switch_at: float = 1.0

    def __str__(self) -> str:
        text = f"{self.first.method} {self.first.rate:g}"
        if self.second:
            text += f" to {self.second.method} {self.second.rate:g} at {100 * self.switch_at:g} %"
        if self.initialisation:
            text += f" from {self.initialisation}"
        return f"{text}, seed {self.seed}"


class Trained(NamedTuple):
    """What a run found.

    Attributes:
      plan: of the run.
      params: at its end.
      curve: lists with an entry for each epoch's end: epochs, gradients and seconds spent, loss (an average over the
        epoch's mini-batches), distance from the initialisation, and `Problem.figures`.
    """

    plan: Plan
    params: optax.Params
    curve: dict[str, list[float]]

    def final(self, name: str) -> float:
        """Returns a figure of the last epoch."""
        return self.curve[name][-1]


class Store:
    """Runs kept in a folder: parameters as arrays, curves as JSON, each under what it was run with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _key(self, problem: Problem, plan: Plan) -> tuple[dict[str, Any], Path]:
        key = {"problem": problem.description, "plan": dataclasses.asdict(plan)}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return key, self.folder / f"{problem.name}-{digest}.json"

    def load(self, problem: Problem, plan: Plan) -> Trained | None:
        """Returns a run that is there as a whole."""
        _, path = self._key(problem, plan)
        if not path.exists():
            return None
        curve = with_nan(json.loads(path.read_text())["curve"])
        shapes = jax.eval_shape(lambda: problem.init(plan.seed))
        with np.load(path.with_suffix(".npz")) as arrays:
            leaves = [jnp.asarray(arrays[f"leaf_{i}"]) for i in range(len(arrays.files))]
        return Trained(plan, jax.tree.unflatten(jax.tree.structure(shapes), leaves), curve)

    def save(self, problem: Problem, trained: Trained) -> None:
        """Writes a run; the JSON comes last and says that it is complete."""
        key, path = self._key(problem, trained.plan)
        self.folder.mkdir(parents=True, exist_ok=True)
        leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(trained.params))}
        arrays, text = (self.folder / f"unfinished-{os.getpid()}{suffix}" for suffix in (".npz", ".json"))
        np.savez(arrays, **leaves)  # pyright: ignore[reportArgumentType]: keywords are arrays, not allow_pickle
        write_json(text, key | {"curve": trained.curve})
        arrays.replace(path.with_suffix(".npz"))
        text.replace(path)


State = tuple[optax.Params, optax.OptState]


class _Numbers(NamedTuple):
    """What differs between runs that share a compiled step."""

    first_rate: jax.typing.ArrayLike
    second_rate: jax.typing.ArrayLike
    switch_step: jax.typing.ArrayLike


def _after(step: jax.typing.ArrayLike) -> optcurv.SwitchRule:
    """Switches after so many steps, a number that may be traced: one compiled step serves all."""
    return optcurv.SwitchRule(
        init=lambda: jnp.zeros((), jnp.int32), update=lambda count, _: (count + 1, jnp.asarray(count >= step))
    )


class Trainer:
    """Trains a problem; keeps what it trained, and what it compiled."""

    def __init__(self, problem: Problem, store: Store) -> None:
        self.problem, self.store = problem, store
        self._figures = jax.jit(problem.figures)
        self._distance = jax.jit(lambda a, b: optax.tree.norm(optax.tree.sub(a, b)))
        self._compiled = functools.cache(self._compile)

    def run(self, plan: Plan) -> Trained:
        """Returns a run, found or trained."""
        trained = self.store.load(self.problem, plan)
        if trained is None:
            trained = self._train(plan)
            self.store.save(self.problem, trained)
        return trained

    def _compile(self, first: str, second: str | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Returns initialisation of an optimiser's state, and its step."""

        def optimizer(numbers: _Numbers) -> optax.GradientTransformationExtraArgs:
            chosen = METHODS[first].make(numbers.first_rate)
            if second:
                successor = METHODS[second].make(numbers.second_rate)
                chosen = optcurv.switch(chosen, successor, _after(numbers.switch_step))
            return optax.with_extra_args_support(chosen)

        def step(state: State, train: Batch, indices: jax.Array, numbers: _Numbers) -> tuple[State, jax.Array]:
            params, opt_state = state
            loss = self.problem.training_loss(Batch(*(array[indices] for array in train)))
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer(numbers).update(grads, opt_state, params, value=value, value_fn=loss)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.jit(lambda params, numbers: optimizer(numbers).init(params)), jax.jit(step)

    def _train(self, plan: Plan) -> Trained:
        problem, second = self.problem, plan.second
        init, step = self._compiled(plan.first.method, second and second.method)
        num_steps = plan.num_epochs * problem.steps_per_epoch
        numbers = _Numbers(
            jnp.float32(plan.first.rate),
            jnp.float32(second.rate if second else 0.0),
            jnp.int32(round(plan.switch_at * num_steps)),
        )
        start = problem.init(plan.seed, plan.initialisation)
        state: State = (start, init(start, numbers))
        rng = np.random.default_rng(plan.seed)
        rows, seconds = [], 0.0
        for epoch in range(1, plan.num_epochs + 1):
            order = rng.permutation(len(problem.train.labels)).astype(np.int32)
            began, values = time.perf_counter(), []
            for indices in order[: problem.steps_per_epoch * BATCH_SIZE].reshape(-1, BATCH_SIZE):
                state, value = step(state, problem.train, indices, numbers)
                values.append(value)
            jax.block_until_ready(state)
            seconds += time.perf_counter() - began
            row = {"epochs": epoch, "seconds": seconds, "gradients": self._gradients(plan, epoch)}
            row |= {"loss": float(np.mean(jax.device_get(values))), "distance": float(self._distance(state[0], start))}
            rows.append(row | {name: float(value) for name, value in self._figures(state[0]).items()})
        return Trained(plan, state[0], {name: [row[name] for row in rows] for name in rows[0]})

    def _gradients(self, plan: Plan, num_epochs: int) -> float:
        """Returns how many were computed in so many epochs."""
        before = min(num_epochs, plan.switch_at * plan.num_epochs) if plan.second else num_epochs
        count = before * METHODS[plan.first.method].gradients
        if plan.second:
            count += (num_epochs - before) * METHODS[plan.second.method].gradients
        return count * self.problem.steps_per_epoch

    def tuned_rate(
        self,
        method: str,
        num_epochs: int,
        report: Callable[[str], None],
        initialisation: Initialisation | None = None,
        grid: tuple[float, ...] | None = None,
    ) -> float:
        """Returns the learning rate of the least training loss at the end of a run of so many epochs, by `tune`."""
        rates = grid or METHODS[method].grid

        def loss_of(rate: float) -> float:
            trained = self.run(Plan(Stage(method, rate), TUNING_SEED, num_epochs, initialisation))
            if rate in rates:  # the progress bar expects no others
                report(f"{self.problem.name}: {trained.plan}, tuning")
            return trained.final("loss")

        return tune(rates, loss_of)


TUNING_SEED = 0

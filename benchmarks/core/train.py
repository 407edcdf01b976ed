"""One training step, and runs of many."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optcurv
from benchmarks.core.methods import Method, Setting
from benchmarks.core.models import Batch
from benchmarks.core.task import Task

State = tuple[optax.Params, optax.OptState]

_LONGEST_CHUNK = 16  # steps of unknown cost taken before their costs are fetched


class Spent(NamedTuple):
    """What a run has spent.

    Attributes:
      steps: taken.
      gradients: gradient-equivalents computed.
      seconds: of the steps; not of compiling, nor of evaluating the network.
      dearest: the most gradients that one of the last steps cost.
    """

    steps: int = 0
    gradients: float = 0.0
    seconds: float = 0.0
    dearest: float = math.inf


Stop: TypeAlias = Callable[[Spent], int]
"""Where a run is looked at: maps what is spent to the number of steps to take before asking again, 0 once reached."""


def after_steps(counts: Iterable[int]) -> list[Stop]:
    """Stops after these numbers of steps."""
    return [lambda spent, count=count: count - spent.steps for count in counts]


def after_gradients(goals: Iterable[float]) -> list[Stop]:
    """Stops once this many gradients are spent, for steps whose cost varies; the last may overdraw by a step or so."""

    def stop(spent: Spent, goal: float) -> int:
        chunk = np.clip((goal - spent.gradients) / spent.dearest, 1, _LONGEST_CHUNK)
        return int(chunk) if spent.gradients < goal else 0

    return [lambda spent, goal=goal: stop(spent, goal) for goal in goals]


def spread(total: int, parts: int) -> list[int]:
    """Returns up to `parts` numbers, evenly spread over 1 to `total`, the last being `total`."""
    return sorted({math.ceil(total * part / parts) for part in range(1, parts + 1)})


def init_state(task: Task, method: Method, key: jax.Array, setting: Setting) -> State:
    """Returns fresh parameters, the same for every method, and the optimiser's state."""
    params = task.init(key)
    return params, method.make(setting).init(params)


def train_step(
    task: Task, method: Method, state: State, batch: Batch, setting: Setting, **extra: jax.Array
) -> tuple[State, jax.Array]:
    """Takes one step on a batch; returns the new state and the loss before the step.

    The setting is an argument, so that one compiled step serves the whole grid; `extra` goes on to the optimiser.
    """
    params, opt_state = state
    loss = task.loss(batch)
    value, grads = jax.value_and_grad(loss)(params)
    arguments = {"value": value, "grad": grads, "value_fn": loss} | extra
    updates, opt_state = method.make(setting).update(grads, opt_state, params, **arguments)
    return (optax.apply_updates(params, updates), opt_state), value


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run measured.

    Attributes:
      setting: the tuned numbers.
      seed: of the initialisation and the order of the batches.
      curve: lists with one entry for each stop: steps, gradients, epochs and seconds spent, the loss as an average over
        the mini-batches since the stop before, and whatever was evaluated there.
      final: the last entry of each, and whatever was evaluated at the end.
      params: at the end.
    """

    setting: dict[str, float]
    seed: int
    curve: dict[str, list[float]]
    final: dict[str, float]
    params: Any = None


Evaluation: TypeAlias = Callable[[optax.Params], Mapping[str, float]]


class Trainer:
    """Trains a task with one method; compiled once, whatever the setting and the seed."""

    def __init__(self, task: Task, method: Method) -> None:
        def step(
            state: State, train: Batch, indices: jax.Array, setting: Setting, monitored: jax.Array
        ) -> tuple[State, tuple[jax.Array, jax.Array]]:
            batch = Batch(*(array[indices] for array in train))
            state, value = train_step(task, method, state, batch, setting, monitored_value=monitored)
            products = optcurv.diagnostics(state[1]).get("trust_region/iterations", 0) if method.product else 0
            return state, (value, jnp.asarray(products))

        self.task, self.method = task, method
        self._start = jax.jit(task.init)
        self._init = jax.jit(lambda params, setting: method.make(setting).init(params))
        self._step = jax.jit(step)
        self._loss = jax.jit(lambda params, batch: task.loss(batch)(params))
        self._warm = False

    def follow(
        self, setting: Setting, seed: int, stops: Iterable[Stop], start: optax.Params | None = None
    ) -> Iterator[tuple[dict[str, float], optax.Params]]:
        """Trains from the task's own parameters, or from others; yields the curve's entry and the parameters.

        The loop is one of Python: in a loop of XLA's, convolutions are many times slower on a CPU. Where there are
        images for validation, their loss at a stop is told to the next step as `monitored_value`.
        """
        train, batches = self.task.data.train, self.task.batches(seed)
        params = self._start(jax.random.key(seed)) if start is None else start
        state, spent = (params, self._init(params, setting)), Spent()
        nothing = told = jnp.float32(jnp.nan)
        if not self._warm:
            jax.block_until_ready(self._step(state, train, next(self.task.batches(seed)), setting, nothing))
            self._warm = True
        for stop in stops:
            values = []
            while count := stop(spent):
                began, taken = time.perf_counter(), []
                for _ in range(count):
                    state, seen = self._step(state, train, next(batches), setting, told)
                    taken.append(seen)
                    told = nothing
                jax.block_until_ready(state)
                seconds = time.perf_counter() - began
                losses, products = zip(*jax.device_get(taken), strict=True)
                values += losses
                spent = self._spend(spent, np.asarray(products, np.float64), seconds)
            entry = {"steps": spent.steps, "gradients": spent.gradients, "seconds": spent.seconds}
            entry["epochs"] = spent.steps * self.task.batch_size / self.task.num_images
            entry["loss"] = float(np.mean(values)) if values else math.nan
            if self.task.data.validation is not None:
                told = self._loss(state[0], self.task.data.validation)
                entry["validation_loss"] = float(told)
            yield entry, state[0]

    def _spend(self, spent: Spent, products: np.ndarray, seconds: float) -> Spent:
        costs = self.method.gradients + self.method.product * products
        return Spent(
            spent.steps + len(costs), spent.gradients + float(costs.sum()), spent.seconds + seconds, float(costs.max())
        )

    def run(
        self,
        setting: Setting,
        seed: int,
        stops: Iterable[Stop],
        evaluate: Evaluation | None = None,
        at_every_stop: bool = True,
        start: optax.Params | None = None,
    ) -> Run:
        """Trains until the last stop; evaluates there, and at every other one if wanted, by default `Task.evaluate`."""
        evaluate, entries, params = evaluate or self.task.evaluate, [], None
        for entry, params in self.follow(setting, seed, stops, start):
            entries.append(entry | dict(evaluate(params)) if at_every_stop else entry)
        assert params is not None, "A run has at least one stop."
        final = entries[-1] if at_every_stop else entries[-1] | dict(evaluate(params))
        return Run(dict(setting), seed, {name: [each[name] for each in entries] for name in entries[0]}, final, params)

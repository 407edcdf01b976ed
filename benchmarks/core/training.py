"""One training step, and runs of many."""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.core.data import Dataset, digest
from benchmarks.core.methods import Method
from benchmarks.core.models import Batch, Task, accuracy

State = tuple[optax.Params, optax.OptState]

SAMPLE = 10_000
"""The reported training loss is taken over so many training images, or all where there are fewer."""

_POINTS = 24  # of a curve, each an average over the mini-batches since the last


def init_state(
    task: Task, method: Method, key: jax.Array, batch: Batch, setting: float | jax.Array | None = None
) -> State:
    """Returns fresh parameters, the same for every method, and the optimiser's state.

    Without the tuned number, the first of the grid stands for it; a state may hold it (a trust region's radius).
    """
    params = task.init(key, batch)
    return params, method.optimizer(method.grid[0] if setting is None else setting).init(params)


def train_step(
    task: Task, method: Method, state: State, batch: Batch, setting: float | jax.Array
) -> tuple[State, jax.Array]:
    """Takes one step on a batch; returns the new state and the loss before the step.

    The tuned number is an argument, so that one compiled step serves the whole grid.
    """
    params, opt_state = state
    optimizer = optax.with_extra_args_support(method.optimizer(setting))
    loss = task.loss(batch)
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params, value=value, grad=grads, value_fn=loss)
    return (optax.apply_updates(params, updates), opt_state), value


@dataclasses.dataclass(frozen=True)
class Problem:
    """A task on a data set, with the budget that every method gets.

    Attributes:
      task: the network and its loss.
      data: the images.
      batch_size: of every step.
      budget: gradient-equivalents of a run.
    """

    task: Task
    data: Dataset
    batch_size: int
    budget: float

    @property
    def full_batch(self) -> bool:
        """Whether a batch is the whole training set."""
        return self.batch_size == len(self.data.train.labels)

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What tells the problem from others; runs are kept under it."""
        numbers = {"batch_size": self.batch_size, "budget": self.budget}
        return self.task.description | {"data": digest(self.data.train, self.data.test)} | numbers

    def key(self, method: Method, **run: Any) -> dict[str, Any]:
        """Returns what a run of a method is kept under."""
        return self.description | {"method": method.name, "gradients": method.gradients} | run

    def num_steps(self, method: Method) -> int:
        """Returns how many steps of a method the budget buys, at least one."""
        return max(1, math.floor(self.budget / method.gradients + 1e-6))

    def batch_indices(self, seed: int, num_steps: int) -> np.ndarray:
        """Returns the images of each step; a longer run of the same seed begins like a shorter one."""
        return np.stack(list(itertools.islice(self.batches(seed), num_steps)))

    def batches(self, seed: int) -> Iterator[np.ndarray]:
        """Yields the images of each step, an epoch after the other, without end."""
        rng = np.random.default_rng(seed)
        num_images = len(self.data.train.labels)
        per_epoch = num_images // self.batch_size
        while True:
            order = rng.permutation(num_images)[: per_epoch * self.batch_size].astype(np.int32)
            yield from order.reshape(per_epoch, self.batch_size)

    def evaluate(self, params: optax.Params) -> dict[str, float]:
        """Returns the loss and, for a classifier, the accuracy, on training and on test images."""
        splits = {"train": Batch(*(array[:SAMPLE] for array in self.data.train)), "test": self.data.test}
        figures = {}
        for split, batch in splits.items():
            figures[f"{split}_loss"], share = self._figures(params, batch)
            if self.task.has_accuracy:
                figures[f"{split}_accuracy"] = share
        return {name: float(value) for name, value in figures.items()}

    @functools.cached_property
    def _figures(self) -> Callable[[optax.Params, Batch], tuple[jax.Array, jax.Array]]:
        def figures(params: optax.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
            outputs = self.task.loss(batch).model_fn(params)
            share = accuracy(outputs, batch) if self.task.has_accuracy else jnp.nan
            return self.task.loss_fn(outputs, batch), jnp.asarray(share)

        return jax.jit(figures)


CompiledStep = Callable[[State, Batch, jax.typing.ArrayLike, float], tuple[State, jax.Array]]


def compile_step(task: Task, method: Method) -> CompiledStep:
    """Returns the compiled `train_step` on some images of a training set, given by their indices."""

    def step(
        state: State, train: Batch, indices: jax.typing.ArrayLike, setting: float | jax.Array
    ) -> tuple[State, jax.Array]:
        return train_step(task, method, state, Batch(*(array[indices] for array in train)), setting)

    return jax.jit(step)


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run measured.

    Attributes:
      setting: the tuned number.
      seed: of the initialisation and the order of the batches.
      curve: lists of equal length: steps done, gradient-equivalents and seconds spent, and the loss as an average over
        the mini-batches since the entry before.
      evaluations: likewise steps, gradients, seconds, train_loss, test_loss and, for a classifier, train_accuracy and
        test_accuracy.
    """

    setting: float
    seed: int
    curve: dict[str, list[float]]
    evaluations: dict[str, list[float]]

    def final(self, name: str) -> float:
        """Returns a figure of the last evaluation; not a number if the run has none of that name."""
        return self.evaluations.get(name, [math.nan])[-1]


class Trainer:
    """Trains a task with one method; compiled once, whatever the setting and the seed."""

    def __init__(self, problem: Problem, method: Method) -> None:
        self.problem = problem
        self.method = method
        self._warm = False

        self._init = jax.jit(functools.partial(init_state, problem.task, method))
        self._step = compile_step(problem.task, method)

    def run(self, setting: float, seed: int, num_evaluations: int, report: Callable[[float, float], None]) -> Run:
        """Trains on the whole budget; calls `report(gradients, loss)` now and then, evaluates so often, and at the end.

        The clock runs while steps are taken, not while they compile or while the network is evaluated. The loop is one
        of Python: in a loop of XLA's, convolutions are many times slower on a CPU.
        """
        problem, train = self.problem, self.problem.data.train
        num_steps = problem.num_steps(self.method)
        order = problem.batch_indices(seed, num_steps)
        state = self._init(jax.random.key(seed), train, setting)
        if not self._warm:
            jax.block_until_ready(self._step(state, train, order[0], setting))
            self._warm = True

        curve, evaluations, seconds, done = [], [], 0.0, 0
        ends = _spread(num_steps, _POINTS)
        evaluated = {ends[i - 1] for i in _spread(len(ends), num_evaluations)}
        for end in ends:
            start = time.perf_counter()
            losses = []
            for i in range(done, end):
                state, value = self._step(state, train, order[i], setting)
                losses.append(value)
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start
            spent = {"steps": end, "gradients": end * self.method.gradients, "seconds": seconds}
            loss = float(np.mean(jax.device_get(losses)))
            curve.append(spent | {"loss": loss})
            report((end - done) * self.method.gradients, loss)
            done = end
            if end in evaluated:
                evaluations.append(spent | problem.evaluate(state[0]))
        return Run(setting, seed, _columns(curve), _columns(evaluations))


def _spread(total: int, parts: int) -> list[int]:
    """Returns up to `parts` numbers, evenly spread over 1 to `total`, the last being `total`."""
    return sorted({math.ceil(total * part / parts) for part in range(1, parts + 1)})


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}

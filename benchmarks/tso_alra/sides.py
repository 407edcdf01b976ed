"""What the sides of a comparison between libraries share; imports JAX and NumPy alone, which any environment has."""

import abc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

State = tuple[Any, Any]
"""Parameters, and whatever else a side carries from step to step."""


class Side(abc.ABC):
    """Steps of an optimiser, and of gradient descent on the same loss.

    Args:
      loss: maps parameters, images and labels to a scalar.
      params: to start from.
      data: path of an `.npz` file with images, labels and order: row by row, the indices of the batches.
    """

    def __init__(self, loss: Callable[[Any, jax.Array, jax.Array], jax.Array], params: Any, data: str) -> None:
        arrays = np.load(data)
        self.images, self.labels = jnp.asarray(arrays["images"]), jnp.asarray(arrays["labels"])
        self.order = arrays["order"]
        self._params = params
        self._loss = jax.jit(loss)

        def descend(params: Any, images: jax.Array, labels: jax.Array) -> Any:
            grads = jax.grad(loss)(params, images, labels)
            return jax.tree.map(lambda parameter, grad: parameter - 1e-6 * grad, params, grads)

        self._descend = jax.jit(descend, donate_argnums=0)
        self._descending = self.fresh_params()
        self._stepping, self._count = None, 0

    @abc.abstractmethod
    def start(self) -> State:
        """Returns fresh parameters and a fresh state."""

    @abc.abstractmethod
    def step(self, state: State, count: int, setting: dict[str, float]) -> State:
        """Takes a step, which is the one after `count` others."""

    def fresh_params(self) -> Any:
        """Returns a copy, which may be donated."""
        return jax.tree.map(jnp.copy, self._params)

    def batch(self, count: int) -> tuple[jax.Array, jax.Array]:
        """Returns the images and labels of a step."""
        indices = self.order[count % len(self.order)]
        return self.images[indices], self.labels[indices]

    def gradient_seconds(self, num_steps: int) -> float:
        """Returns the time of so many steps of gradient descent."""
        start = time.perf_counter()
        for count in range(num_steps):
            self._descending = self._descend(self._descending, *self.batch(count))
        jax.block_until_ready(self._descending)
        return time.perf_counter() - start

    def step_seconds(self, num_steps: int, setting: dict[str, float]) -> float:
        """Returns the time of so many steps of the optimiser; they go on from the last ones."""
        state = self.start() if self._stepping is None else self._stepping
        start = time.perf_counter()
        for _ in range(num_steps):
            state = self.step(state, self._count, setting)
            self._count += 1
        jax.block_until_ready(state[0])
        self._stepping = state
        return time.perf_counter() - start

    def train(self, seconds: float, setting: dict[str, float]) -> dict[str, float]:
        """Trains afresh for so long, and returns the loss on all images and the number of steps."""
        state = self.start()
        jax.block_until_ready(state[0])
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            state = self.step(state, count, setting)
            jax.block_until_ready(state[0])
            count += 1
        return {"loss": float(self._loss(state[0], self.images, self.labels)), "steps": count}

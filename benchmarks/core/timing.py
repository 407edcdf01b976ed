"""Steps compiled and timed, and what XLA says of a compiled program."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.core.methods import Method
from benchmarks.core.models import Batch, Cnn, Mlp, Task, classification_loss
from benchmarks.core.training import State, init_state, train_step
from optcurv.arguments import PyTree


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network big enough that matrix products dominate, and its batch size."""

    task: Task
    batch_size: int

    @property
    def description(self) -> dict[str, Any]:
        """What tells the workload from others."""
        return self.task.description | {"batch_size": self.batch_size}


WORKLOADS = {
    # Four layers, so that the first, whose input needs no gradient, is but a part.
    "mlp": Workload(Task(Mlp(hidden=(512,) * 4), classification_loss, has_accuracy=True), 512),
    "cnn": Workload(Task(Cnn(channels=(32, 64), hidden=256), classification_loss, has_accuracy=True), 128),
}


class CompiledStep:
    """A compiled training step with its own state, which it overwrites."""

    def __init__(self, workload: Workload, method: Method, batch: Batch) -> None:
        self.method = method
        self.batch = batch
        self.state: State = jax.jit(functools.partial(init_state, workload.task, method))(jax.random.key(0), batch)
        step = jax.jit(functools.partial(train_step, workload.task, method), donate_argnums=0)
        start = time.perf_counter()
        self.compiled = step.lower(self.state, batch, method.grid[0]).compile()
        self.compile_seconds = time.perf_counter() - start

    def seconds(self, num_steps: int) -> float:
        """Returns the wall-clock time of a step, over a few in a row."""
        value, start = None, time.perf_counter()
        for _ in range(num_steps):
            self.state, value = self.compiled(self.state, self.batch, self.method.grid[0])
        jax.block_until_ready(value)  # a program's results are ready together, and the state has many arrays
        return (time.perf_counter() - start) / num_steps


def random_batch(batch_size: int) -> Batch:
    """Returns noise of the shape of 28x28 images; what they show does not change the cost."""
    images = jax.random.uniform(jax.random.key(0), (batch_size, 28, 28, 1))
    labels = jax.random.randint(jax.random.key(1), (batch_size,), 0, 10)
    return Batch(images, labels)


def count_flops(compiled: jax.stages.Compiled) -> float:
    """Returns XLA's count of operations; it knows no noise, and counts the body of a loop once."""
    return (compiled.cost_analysis() or {}).get("flops", 0.0)


def seconds_of(program: Callable[..., PyTree], *arguments: PyTree) -> float:
    """Returns how long a function takes until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the memory a program needs beside its arguments and results."""
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes if analysis else 0

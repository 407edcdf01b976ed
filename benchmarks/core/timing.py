"""Steps compiled and timed, what XLA says of a compiled program, and on what machine that was."""

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.core.data import Dataset
from benchmarks.core.methods import Method
from benchmarks.core.models import Batch, Cnn, Mlp, classification_loss
from benchmarks.core.task import Task
from benchmarks.core.train import init_state, train_step
from optcurv.arguments import PyTree

_PACKAGES = ("optcurv", "jax", "jaxlib", "optax", "flax", "numpy")


def environment() -> dict[str, Any]:
    """Returns what a reader needs to judge a timing: device, platform, versions."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"device": device_name(), "platform": platform.platform(), "python": platform.python_version()} | versions


def device_name() -> str:
    """Returns the accelerator's name, or the processor's and its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def noise(batch_size: int) -> Dataset:
    """Returns noise of the shape of 28x28 images; what they show does not change the cost of a step."""
    images = jax.random.uniform(jax.random.key(0), (batch_size, 28, 28, 1))
    batch = Batch(images, jax.random.randint(jax.random.key(1), (batch_size,), 0, 10))
    return Dataset(batch, batch)


def workloads() -> dict[str, Task]:
    """Returns tasks whose networks are big enough that matrix products dominate, on a batch of noise."""
    return {
        # Four layers, so that the first, whose input needs no gradient, is but a part.
        "mlp": Task(Mlp(hidden=(512,) * 4), classification_loss, noise(512), 512),
        "cnn": Task(Cnn(channels=(32, 64), hidden=256), classification_loss, noise(128), 128),
    }


class CompiledStep:
    """A compiled training step on a whole batch, with its own state, which it overwrites."""

    def __init__(self, task: Task, method: Method) -> None:
        self.method, self.batch, self._setting = method, task.data.train, method.first_setting
        self.state = jax.jit(functools.partial(init_state, task, method))(jax.random.key(0), self._setting)
        step = jax.jit(functools.partial(train_step, task, method), donate_argnums=0)
        start = time.perf_counter()
        self.compiled = step.lower(self.state, self.batch, self._setting).compile()
        self.compile_seconds = time.perf_counter() - start

    def seconds(self, num_steps: int) -> float:
        """Returns the wall-clock time of a step, over a few in a row."""
        value, start = None, time.perf_counter()
        for _ in range(num_steps):
            self.state, value = self.compiled(self.state, self.batch, self._setting)
        jax.block_until_ready(value)  # a program's results are ready together, and the state has many arrays
        return (time.perf_counter() - start) / num_steps


def seconds_of(program: Callable[..., PyTree], *arguments: PyTree) -> float:
    """Returns how long a function takes until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


def count_flops(compiled: jax.stages.Compiled) -> float:
    """Returns XLA's count of operations; it knows no noise, and counts the body of a loop once."""
    return (compiled.cost_analysis() or {}).get("flops", 0.0)


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the memory a program needs beside its arguments and results."""
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes if analysis else 0

"""What a preconditioned step costs, refreshed more or less often, and what the loss after equal steps makes of it."""

import functools
import time
from typing import NamedTuple

import jax
import numpy as np
import optax

import optcurv
from benchmarks.cost import Workload, random_batch
from benchmarks.methods import GRADIENT_DESCENT, Method
from benchmarks.models import Batch
from benchmarks.training import State, init_state, train_step

NUM_STEPS = 300
"""Steps after which losses are compared: three refreshes at the defaults."""

_RATES = (0.003, 0.01, 0.03)


class Schedule(NamedTuple):
    """How often factors and roots are refreshed, and how many eigenpairs are kept."""

    name: str
    factor_every: int
    root_every: int
    rank: int | None


SCHEDULES = (
    Schedule("defaults", 10, 100, 32),
    Schedule("twice the rank", 10, 100, 64),
    Schedule("all eigenpairs", 10, 100, None),
    Schedule("refreshed at every step", 1, 1, 32),
)


def _method(schedule: Schedule) -> Method:
    def optimizer(learning_rate: float | jax.Array) -> optax.GradientTransformation:
        preconditioner = optcurv.scale_by_kronecker(
            factor_every=schedule.factor_every, root_every=schedule.root_every, rank=schedule.rank
        )
        return optax.chain(
            preconditioner,
            optax.clip_by_global_norm(1.0),
            optax.trace(0.9),
            optax.scale_by_learning_rate(learning_rate),
        )

    return Method(schedule.name, optimizer, "learning rate", _RATES, 1)


class _Stepper:
    """A compiled training step and its state."""

    def __init__(self, workload: Workload, method: Method, batch: Batch) -> None:
        init = jax.jit(functools.partial(init_state, workload.task, method))
        self.state: State = init(jax.random.key(0), batch, method.grid[0])
        lowered = jax.jit(functools.partial(train_step, workload.task, method), donate_argnums=0).lower(
            self.state, batch, method.grid[0]
        )
        start = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        self.batch, self.setting = batch, method.grid[0]

    def seconds(self) -> float:
        """Takes a step; returns how long it took."""
        start = time.perf_counter()
        self.state, _ = self.compiled(self.state, self.batch, self.setting)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start


def measure_cost(workload: Workload, schedule: Schedule) -> dict[str, float]:
    """Times a cycle of refreshes, a gradient step before each step; the first 32, with their early ones, aside."""
    batch = random_batch(workload.batch_size)
    gradient, stepper = (_Stepper(workload, method, batch) for method in (GRADIENT_DESCENT, _method(schedule)))
    times = np.array([(gradient.seconds(), stepper.seconds()) for _ in range(32 + schedule.root_every)])[32:]
    ratios = times[:, 1] / np.median(times[:, 0])
    return {
        "quiet": float(np.median(times[:, 1] / times[:, 0])),
        "average": float(times[:, 1].sum() / times[:, 0].sum()),
        "longest": float(ratios.max()),
        "gradient_ms": 1e3 * float(np.median(times[:, 0])),
        "compile_seconds": stepper.compile_seconds,
        "gradient_compile_seconds": gradient.compile_seconds,
    }

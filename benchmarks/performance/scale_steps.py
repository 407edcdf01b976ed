"""Training steps on square networks of any size, on one device or several: compiled, counted and timed."""

import dataclasses
import enum
import functools
import math
import time
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

import optcurv
from benchmarks.core.data import Dataset
from benchmarks.core.methods import GRADIENT_DESCENT, METHODS, Method
from benchmarks.core.methods import edf as edf_method
from benchmarks.core.models import NUM_CLASSES, Batch, Mlp, classification_loss
from benchmarks.core.task import Task
from benchmarks.core.train import State, train_step
from benchmarks.performance.cost import RUNGE_KUTTA, wide_trust_region
from benchmarks.performance.programs import Cost, read_cost, total
from optcurv.curvature import ProductFn

_SECONDS_OF_A_MEASUREMENT = 0.03  # at least, of the yardstick's steps within a round
_FEWEST_ROUNDS, _SECONDS_OF_ROUNDS = 3, 20  # after so long a time, few must do


Clock: TypeAlias = tuple[tuple[str, float], ...]


class Kind(NamedTuple):
    """One of the kinds of steps that a method takes.

    Attributes:
      share: of all its steps.
      clock: names in the optimiser's state, and what they say when such a step is due.
    """

    share: float
    clock: Clock = ()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method, and what must be known of it to count an average step.

    Attributes:
      method: that of the other commands.
      iterations: of a loop that may stop early.
      kinds: of its steps.
    """

    method: Method
    iterations: int = 1
    kinds: tuple[Kind, ...] = (Kind(1.0),)

    @property
    def name(self) -> str:
        """As in tables and pictures."""
        return self.method.name


def edf(max_iter: int, curvature: ProductFn) -> Candidate:
    """Returns EDF with so many products a step."""
    return Candidate(edf_method(max_iter, curvature, (1.0,)))


def trust_region(iterations: int) -> Candidate:
    """Returns the trust region so wide that every step takes all its products, with Gauss-Newton."""
    method = wide_trust_region(
        f"trust region G j={iterations}",
        optcurv.gauss_newton_product,
        optcurv.steihaug(max_iter=iterations, tol=0.0),
        4 / 3 + 4 / 3 * iterations,
    )
    return Candidate(method, iterations)


def _tso_alra(learning_rate: float | jax.Array) -> optax.GradientTransformation:
    """Its first stage with the defaults; the second one is SGD."""
    return optax.chain(optcurv.scale_by_kronecker(), optax.scale_by_learning_rate(learning_rate))


def _when(count: int, age: int) -> Clock:
    """Past the early steps, in which all is refreshed oftener."""
    return ("count", count), ("weight", 1.0), ("ages", age)


TSO_ALRA = Candidate(
    Method("TSO-ALRA", _tso_alra, {"learning rate": (0.01,)}),
    kinds=(
        Kind(0.89, _when(count=101, age=1)),  # nothing is due
        Kind(0.1, _when(count=110, age=1)),  # factors are, as at every tenth step
        Kind(0.01, _when(count=101, age=-1)),  # all roots: in truth they share out a hundred steps
    ),
)

GRADIENT_STEP = Candidate(GRADIENT_DESCENT)
CANDIDATES = (
    GRADIENT_STEP,
    *(Candidate(method) for method in METHODS if method.name in ("Adam", "PAL")),
    edf(2, optcurv.gauss_newton_product),
    edf(1, optcurv.hessian_product),
    Candidate(RUNGE_KUTTA),
    trust_region(4),
    TSO_ALRA,
)


class Placement(enum.StrEnum):
    """Where parameters and the state like them are; batches are always shared out by examples."""

    REPLICATED = "data parallel"
    ROWS = "FSDP"


@dataclasses.dataclass(frozen=True)
class Setup:
    """A square network, a batch, and the devices that share the work.

    Attributes:
      width: of the inputs and of each hidden layer.
      batch_size: of all devices together.
      num_devices: the first so many of the platform.
      placement: of the parameters.
      platform: JAX's default one if None.
      hidden_layers: of the network.
    """

    width: int
    batch_size: int
    num_devices: int = 1
    placement: Placement = Placement.REPLICATED
    platform: str | None = None
    hidden_layers: int = 4

    @property
    def task(self) -> Task:
        """The network, whose layers are alike but for the last."""
        example = Batch(np.zeros((1, self.width), np.float32), np.zeros(1, np.int32))  # pyright: ignore[reportArgumentType]
        network = Mlp((self.width,) * self.hidden_layers)
        return Task(network, classification_loss, Dataset(example, example), self.batch_size)

    @property
    def num_params(self) -> int:
        """Of weights and biases."""
        return (self.width + 1) * (self.hidden_layers * self.width + NUM_CLASSES)

    @property
    def description(self) -> dict[str, Any]:
        """What tells it from others, in plain words and numbers."""
        return dataclasses.asdict(self)

    @property
    def batch_shapes(self) -> Batch:
        """Those of a batch of flat images."""
        images = jax.ShapeDtypeStruct((self.batch_size, self.width), np.float32)
        return Batch(images, jax.ShapeDtypeStruct((self.batch_size,), np.int32))  # pyright: ignore[reportArgumentType]

    def state_shapes(self, candidate: Candidate) -> State:
        """Those of parameters and optimiser's state, with where each array belongs."""
        rows, everywhere = self.shardings()

        def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            in_rows = self.placement is Placement.ROWS and leaf.shape[0] % self.num_devices == 0
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=rows if in_rows else everywhere)

        params = jax.tree.map(place, jax.eval_shape(self.task.init, jax.random.key(0)))
        optimizer = candidate.method.make(candidate.method.first_setting)
        of_state = optcurv.state_shardings(optimizer, params)
        shapes = jax.eval_shape(optimizer.init, params)
        return params, jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, of_state
        )

    def state(self, candidate: Candidate) -> State:
        """Returns random parameters, drawn by NumPy as there is nothing to compile, and the optimiser's fresh state."""
        params, opt_state = self.state_shapes(candidate)
        rng = np.random.default_rng(0)

        def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(rng.standard_normal(leaf.shape, np.float32) * leaf.shape[0] ** -0.5, leaf.sharding)

        params = jax.tree.map(draw, params)
        init = candidate.method.make(candidate.method.first_setting).init
        shardings = jax.tree.map(lambda leaf: leaf.sharding, opt_state)
        return params, jax.jit(init, out_shardings=shardings)(params)

    def batch(self) -> Batch:
        """Returns noise; what it shows does not change the cost."""
        rng = np.random.default_rng(1)
        images = rng.random((self.batch_size, self.width), np.float32)
        labels = rng.integers(NUM_CLASSES, size=self.batch_size, dtype=np.int32)
        return jax.device_put(Batch(images, labels), self.shardings()[0])  # pyright: ignore[reportArgumentType]

    def shardings(self) -> tuple[jax.NamedSharding, jax.NamedSharding]:
        """Returns those of a batch, and of what is on every device."""
        devices = np.array(jax.devices(self.platform)[: self.num_devices])
        mesh = jax.sharding.Mesh(devices, "data", axis_types=(jax.sharding.AxisType.Auto,))
        return jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())


@functools.lru_cache(maxsize=8)
def compile_step(setup: Setup, candidate: Candidate, clock: Clock = ()) -> jax.stages.Compiled:
    """Returns the compiled step, which overwrites its state; with a clock, only what is due then."""
    state, batch, setting = setup.state_shapes(candidate), setup.batch_shapes, candidate.method.first_setting
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    rows, everywhere = setup.shardings()

    def step(state: State, batch: Batch) -> tuple[State, jax.Array]:
        return train_step(setup.task, candidate.method, with_clock(state, clock), batch, setting)

    jitted = jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, everywhere), donate_argnums=0)
    return jitted.lower(state, batch).compile()


def with_clock(state: State, clock: Clock) -> State:
    """Returns the state with these entries set."""
    params, opt_state = state
    leaves = {name: (optax.tree.get(opt_state, name), value) for name, value in clock}
    entries = {name: np.full(leaf.shape, value, leaf.dtype) for name, (leaf, value) in leaves.items()}
    return params, optax.tree.set(opt_state, **entries) if entries else opt_state


def average_cost(setup: Setup, candidate: Candidate) -> Cost:
    """Returns what one device does in an average step, a loop that may stop early going on to its limit.

    Of each kind of step a program is compiled that knows what is due, so that XLA drops conditions, or their cheaper
    branch is what is left to do: a trust region measures slopes only where values do not tell. XLA's own count would
    take the dearer branch, and a loop's body once.
    """
    costs = []
    for kind in candidate.kinds:
        hlo = compile_step(setup, candidate, kind.clock).as_text()
        assert hlo is not None  # XLA for CPUs has a text
        costs.append(read_cost(hlo, candidate.iterations, branch=min).times(kind.share))
    return total(costs)


class Runner:
    """A compiled step with a state of its own, which it overwrites."""

    def __init__(self, setup: Setup, candidate: Candidate) -> None:
        self.kinds = candidate.kinds
        self._compiled = compile_step(setup, candidate)
        self._state = setup.state(candidate)
        self._batch = setup.batch()

    def seconds(self, num_steps: int) -> float:
        """Returns the time of an average step, from so many; of a rare kind there is at least one."""
        return sum(kind.share * self._seconds(kind.clock, math.ceil(kind.share * num_steps)) for kind in self.kinds)

    def _seconds(self, clock: Clock, num_steps: int) -> float:
        spent = 0.0
        for _ in range(num_steps):
            state = with_clock(self._state, clock)
            start = time.perf_counter()
            self._state, value = self._compiled(state, self._batch)
            jax.block_until_ready(value)
            spent += time.perf_counter() - start
        return spent / num_steps


def compare(
    setup: Setup, candidate: Candidate, rounds: int, yardstick: tuple[Setup, Candidate] | None = None
) -> dict[str, Any]:
    """Times a method's step beside another's, by default the gradient step of the same setup.

    Both take turns, and a ratio is formed within each round: what else the machine does strikes both.

    Returns:
      The bytes of the method's arguments and temporaries; unless both do not fit into memory, quartiles of the ratio
      and the median seconds.
    """
    pair = (yardstick or (setup, GRADIENT_STEP)), (setup, candidate)
    num_bytes = [_num_bytes(compile_step(*each)) for each in pair]
    if sum(num_bytes) > available_bytes():
        return {"bytes": num_bytes[1], "fits": False}
    runners = [Runner(*each) for each in pair]
    for runner in runners:
        runner.seconds(1)
    num_steps = math.ceil(_SECONDS_OF_A_MEASUREMENT / runners[0].seconds(1))
    start, times = time.perf_counter(), []
    while len(times) < rounds and (len(times) < _FEWEST_ROUNDS or time.perf_counter() - start < _SECONDS_OF_ROUNDS):
        times.append([runner.seconds(num_steps) for runner in runners])
    times = np.array(times)
    return {
        "bytes": num_bytes[1],
        "fits": True,
        "rounds": len(times),
        "ratio_quartiles": np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75]).tolist(),
        "seconds": float(np.median(times[:, 1])),
    }


def _num_bytes(compiled: jax.stages.Compiled) -> int:
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes if analysis else 0


def available_bytes() -> float:
    """Returns the memory that is left: the accelerator's, or the machine's; infinite where that is not known."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)

"""Steps and losses beside those of kfac-jax, which runs in an environment of its own."""

import contextlib
import functools
import json
import os
import subprocess
import tempfile
import venv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optcurv
from benchmarks.core.cache import Cache
from benchmarks.core.data import Dataset
from benchmarks.core.models import Autoencoder, Batch, Cnn, classification_loss
from benchmarks.core.report import table
from benchmarks.core.task import Task
from benchmarks.core.tune import no_nan, settings
from benchmarks.tso_alra.sides import Side, State

REQUIREMENTS = ("jax==0.9.0", "kfac-jax==0.0.8")
POWERS = (-1.0, -0.5)
SCHEDULE = {"factor_every": 10, "root_every": 100}
"""For both; the defaults of `optcurv.scale_by_kronecker`."""

_NUM_IMAGES = 5_000
_ROUNDS, _STEPS = 20, 10  # two cycles of refreshes
_TIMED = {"learning rate": 1e-3, "damping": 1e-1}  # the setting of timed steps

Call = Callable[..., Any]
"""Calls a method of a side, by its name, with arguments."""


def summed_reconstruction_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Sigmoid cross-entropy, summed over pixels, averaged over the batch."""
    return optax.sigmoid_binary_cross_entropy(logits, batch.images).sum(axis=(1, 2, 3)).mean()


NETWORKS = ("autoencoder", "cnn")


def make_task(network: str, images: Batch) -> Task:
    """Returns a task that both sides have."""
    data = Dataset(images, images)
    if network == "autoencoder":
        return Task(Autoencoder(), summed_reconstruction_loss, data, 500, metrics={})
    return Task(Cnn(stride=2), classification_loss, data, 128)


class OptcurvSide(Side):
    """Kronecker factors with momentum 0.9 and the norm of the update bounded by 1; arguments as in `KfacSide`."""

    def __init__(self, network: str, power: float, factor_every: int, root_every: int, data: str) -> None:
        task = make_task(network, Batch(*(jnp.asarray(np.load(data)[name]) for name in ("images", "labels"))))
        params = task.init(jax.random.key(0))
        super().__init__(lambda params, *batch: task.loss(Batch(*batch))(params), params, data)

        def optimizer(setting: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
            return optax.chain(
                optcurv.scale_by_kronecker(
                    power, factor_every=factor_every, root_every=root_every, damping=setting["damping"]
                ),
                optax.clip_by_global_norm(1.0),
                optax.trace(0.9),
                optax.scale_by_learning_rate(setting["learning rate"]),
            )

        def step(state: State, setting: Mapping[str, Any], *batch: jax.Array) -> State:
            params, opt_state = state
            loss = task.loss(Batch(*batch))
            grads = jax.grad(loss)(params)
            updates, opt_state = optimizer(setting).update(grads, opt_state, params, value_fn=loss)
            return optax.apply_updates(params, updates), opt_state

        self._init = jax.jit(optimizer({"damping": 0.0, "learning rate": 0.0}).init)
        self._step = jax.jit(step, donate_argnums=0)

    def start(self) -> State:
        """See `Side`."""
        params = self.fresh_params()
        return params, self._init(params)

    def step(self, state: State, count: int, setting: dict[str, float]) -> State:
        """See `Side`."""
        return self._step(state, setting, *self.batch(count))


# The bound on the norm makes optcurv's best rates alike for both powers; kfac-jax's damping is absolute.
GRIDS: dict[str, dict[float, dict[str, tuple[float, ...]]]] = {
    "optcurv": {power: {"learning rate": (0.03, 0.1, 0.3, 1.0), "damping": (1e-3, 1e-1, 1.0)} for power in POWERS},
    "kfac-jax": {
        -1.0: {"learning rate": (0.01, 0.03, 0.1, 0.3), "damping": (1e-2, 1.0, 10.0)},
        -0.5: {"learning rate": (1e-3, 3e-3, 1e-2, 3e-2), "damping": (1e-2, 1.0, 10.0)},
    },
}


def make_environment(folder: Path) -> Path:
    """Makes the environment of kfac-jax unless it is there; returns its Python."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        (folder / "complete").touch()
    return python


@contextlib.contextmanager
def kfac_side(python: Path, arguments: Mapping[str, Any]) -> Iterator[Call]:
    """Starts kfac-jax's side."""
    process = subprocess.Popen(
        [python, "-m", "benchmarks.tso_alra.kfac_side"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    requests, answers = process.stdin, process.stdout
    assert requests is not None
    assert answers is not None

    def ask(content: Any) -> Any:
        print(json.dumps(content), file=requests, flush=True)
        answer = answers.readline()
        if not answer:
            raise RuntimeError("kfac-jax's side ended; its last words are above.")
        return json.loads(answer)

    with process:
        try:
            ask(arguments)
            yield lambda method, *arguments: ask([method, arguments])
        finally:
            process.kill()


def measure_costs(sides: Mapping[str, Call]) -> dict[str, float]:
    """Returns each side's average step as a multiple of its own gradient step, all four in turn."""
    seconds = np.array(
        [
            [(call("gradient_seconds", _STEPS), call("step_seconds", _STEPS, _TIMED)) for call in sides.values()]
            for _ in range(_ROUNDS)
        ]
    ).sum(axis=0)
    return dict(zip(sides, (seconds[:, 1] / seconds[:, 0]).tolist(), strict=True))


def best_of(call: Call, grid: Mapping[str, tuple[float, ...]], seconds: float, report: Callable[[str], None]) -> dict:
    """Returns the least loss after so many seconds, with its setting and steps."""
    results = []
    for setting in settings(grid):
        results.append({"setting": setting} | call("train", seconds, setting))
        report(f"{setting}: loss {results[-1]['loss']:.4g} after {results[-1]['steps']} steps")
    return min(results, key=lambda result: no_nan(result["loss"]))


@contextlib.contextmanager
def both_sides(python: Path, arguments: Mapping[str, Any], images: Batch, batch_size: int) -> Iterator[dict[str, Call]]:
    """Starts both sides, and takes steps until all is compiled and the early refreshes have passed."""
    order = np.random.default_rng(0).integers(0, len(images.labels), (500, batch_size)).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/data.npz"
        np.savez(path, images=images.images, labels=images.labels, order=order)
        ours = OptcurvSide(**arguments, data=path)
        with kfac_side(python, {**arguments, "data": path}) as theirs:
            sides: dict[str, Call] = {
                "optcurv": lambda method, *arguments: getattr(ours, method)(*arguments),
                "kfac-jax": theirs,
            }
            for call in sides.values():
                call("gradient_seconds", _STEPS)
                call("step_seconds", SCHEDULE["root_every"], _TIMED)
            yield sides


def train_side(sides: Callable[[], Mapping[str, Call]], side: str, *call: Any) -> Any:
    """Starts both sides if need be, and calls one."""
    return sides()[side](*call)


def cost_of_sides(sides: Callable[[], Mapping[str, Call]]) -> dict[str, float]:
    """Starts both sides if need be, and times them."""
    return measure_costs(sides())


def compare(
    dataset: Dataset,
    python: Path,
    name: str,
    power: float,
    seconds: float,
    cache: Cache,
    report: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Measures both sides on one network: costs of steps, and the loss after equal seconds at the best setting."""
    images = Batch(*(array[:_NUM_IMAGES] for array in dataset.train))
    task, arguments = make_task(name, images), {"network": name, "power": power} | SCHEDULE
    key = task.description | {"arguments": arguments, "peer": REQUIREMENTS}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def sides() -> dict[str, Call]:  # started only if anything is left to measure
            return stack.enter_context(both_sides(python, arguments, images, task.batch_size))

        def train(side: str, method: str, seconds: float, setting: dict[str, float]) -> dict[str, float]:
            run = {"side": side, "seconds": seconds, "setting": setting}
            return cache.get(key | run, train_side, sides, side, method, seconds, setting)

        costs = cache.get(key, cost_of_sides, sides)
        return {
            side: {"cost": cost} | best_of(functools.partial(train, side), GRIDS[side][power], seconds, report)
            for side, cost in costs.items()
        }


def results_table(content: Mapping[str, Any]) -> str:
    """Lays the figures out."""
    rows = [
        {
            "network, power": case,
            "side": side,
            "a step": f"{row['cost']:.2f}",
            "steps taken": str(row["steps"]),
            "training loss": f"{row['loss']:.4g}",
            "best setting": ", ".join(f"{name} {value:g}" for name, value in row["setting"].items()),
        }
        for case, sides in content["results"].items()
        for side, row in sides.items()
    ]
    caption = f"Factors every {SCHEDULE['factor_every']} steps, roots every {SCHEDULE['root_every']}; loss after "
    caption += (
        f"{content['seconds']:g} s. A step: the average over two cycles, as a multiple of the same side's gradient "
    )
    return table(rows, caption + "step.")

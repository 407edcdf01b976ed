"""TSO-ALRA against tuned SGD, Adam and AMSGrad: test loss by epochs and seconds, switching tuned on validation data."""

import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from rich.table import Table

import optcurv
from benchmarks.core.claims import Claim, Verdict, is_less, mean_interval, plus_minus
from benchmarks.core.data import Dataset, digest
from benchmarks.core.kept import Kept
from benchmarks.core.models import Batch, Task, accuracy, classification_loss
from benchmarks.core.report import environment, with_nan, write_json
from benchmarks.core.tuning import tune

BATCH_SIZE = 128
TUNING_SEED = 0


def _dense_head(x: jax.Array, hidden: int, num_classes: int) -> jax.Array:
    """Two dense layers with ReLU, and logits."""
    x = x.reshape(x.shape[0], -1)
    for _ in range(2):
        x = nn.relu(nn.Dense(hidden)(x))
    return nn.Dense(num_classes)(x)


class AlexNet(nn.Module):
    """Five convolutions and three dense layers, after Krizhevsky et al. (2012), for small images; returns logits."""

    channels: tuple[int, int, int, int, int] = (8, 16, 16, 16, 16)
    hidden: int = 64
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        first, second, *rest = self.channels
        x = nn.relu(nn.Conv(first, (5, 5), strides=2)(images))
        x = nn.max_pool(nn.relu(nn.Conv(second, (5, 5))(x)), (2, 2), strides=(2, 2))
        for width in rest:
            x = nn.relu(nn.Conv(width, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return _dense_head(x, self.hidden, self.num_classes)


class Vgg(nn.Module):
    """Blocks of 3x3 convolutions between poolings, after Simonyan and Zisserman (2015); returns logits."""

    blocks: tuple[tuple[int, ...], ...] = ((8,), (16,), (32, 32))
    hidden: int = 64
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        x = images
        for block in self.blocks:
            for width in block:
                x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return _dense_head(x, self.hidden, self.num_classes)


NETWORKS: dict[str, dict[str, nn.Module]] = {
    "small": {"alexnet": AlexNet(), "vgg": Vgg()},
    "full": {
        "alexnet": AlexNet(channels=(64, 192, 384, 256, 256), hidden=4096),
        "vgg": Vgg(blocks=((64, 64), (128, 128), (256, 256, 256), (512, 512, 512)), hidden=4096),
    },
}
"""By size: some minutes on two cores, and the paper's, for a GPU."""


@dataclasses.dataclass(frozen=True)
class Family:
    """An optimiser and the settings tried, one of which validation data pick.

    Attributes:
      name: as in tables and pictures.
      grid: the values of each tuned number, among them the learning rate's, which `tune` may extend.
      optimizer: maps a setting, which may be traced, the schedule's factor and the number of all steps to an optimiser.
    """

    name: str
    grid: dict[str, tuple[float, ...]]
    optimizer: Callable[[Mapping[str, Any], optax.Schedule, int], optax.GradientTransformation]

    def settings(self) -> list[dict[str, float]]:
        """Returns all combinations."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


def _rate(setting: Mapping[str, Any], factor: optax.Schedule) -> optax.Schedule:
    return lambda count: setting["learning rate"] * factor(count)


def _sgd(setting: Mapping[str, Any], factor: optax.Schedule, num_steps: int) -> optax.GradientTransformation:
    del num_steps
    return optax.sgd(_rate(setting, factor))


def _adaptive(make: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    return lambda setting, factor, _: make(_rate(setting, factor), b1=setting["momentum"])


def _tso(rule: Callable[[Mapping[str, Any], int], optcurv.SwitchRule]) -> Callable[..., optax.GradientTransformation]:
    """As published: one rate for both stages, and no bound on the norm of the first one's update."""

    def optimizer(
        setting: Mapping[str, Any], factor: optax.Schedule, num_steps: int
    ) -> optax.GradientTransformationExtraArgs:
        preconditioner = optcurv.scale_by_kronecker(rank=_RANK)
        return optcurv.tso_alra(
            _rate(setting, factor), when=rule(setting, num_steps), preconditioner=preconditioner, max_update_norm=None
        )

    return optimizer


def _bounded(
    power: float, rule: Callable[[Mapping[str, Any], int], optcurv.SwitchRule]
) -> Callable[..., optax.GradientTransformation]:
    """The norm of the preconditioned gradient bounded by 1; the rate is the first stage's, the second has SGD's own."""

    def optimizer(
        setting: Mapping[str, Any], factor: optax.Schedule, num_steps: int
    ) -> optax.GradientTransformationExtraArgs:
        stages = optcurv.tso_alra(
            setting["learning rate"],
            when=rule(setting, num_steps),
            preconditioner=optcurv.scale_by_kronecker(power, rank=_RANK),
            second_learning_rate=_SGD_RATE,
        )
        return optax.chain(stages, optax.scale_by_schedule(factor))  # which counts the steps of both

    return optimizer


def _at_share(setting: Mapping[str, Any], num_steps: int) -> optcurv.SwitchRule:
    """Switches after a share of all steps, which may be traced."""
    return optcurv.SwitchRule(
        init=lambda: jnp.zeros((), jnp.int32),
        update=lambda count, _: (count + 1, count >= setting["switch at"] * num_steps),
    )


def _never(setting: Mapping[str, Any], num_steps: int) -> optcurv.SwitchRule:
    del setting, num_steps
    return optcurv.SwitchRule(init=lambda: (), update=lambda state, _: (state, jnp.zeros((), bool)))


def _on_plateau(setting: Mapping[str, Any], num_steps: int) -> optcurv.SwitchRule:
    del setting, num_steps
    return optcurv.on_plateau(patience=2)


# The paper's grids (rates of 1e-4 to 1e-1, its own for TSO-ALRA being 1e-2), finer where the best lie and without what
# lies far from them; shares of the training in place of a switch after 5, 10, ..., 75 of 164 epochs.
_RATES = {"learning rate": (1e-3, 1e-2, 1e-1, 3e-1)}
_ADAPTIVE = {"learning rate": (1e-3, 3e-3, 1e-2), "momentum": (0.9, 0.99)}
_TSO_RATES = {"learning rate": (1e-3, 3e-3, 1e-2)}
_BOUNDED_RATES = {"learning rate": (1e-1, 3e-1)}
_NEVER_RATES = {"learning rate": (1e-1, 3e-1, 1.0)}
_NATURAL_RATES = {"learning rate": (3e-1, 1.0)}
_SWITCHES = {"switch at": (0.1, 0.45)}
_SGD_RATE = 0.1  # about the best for SGD alone
_RANK = 32  # twice the default: here a step's cost is not the point

FAMILIES = (
    Family("SGD", _RATES, _sgd),
    Family("Adam", _ADAPTIVE, _adaptive(optax.adam)),
    Family("AMSGrad", _ADAPTIVE, _adaptive(optax.amsgrad)),
    Family("TSO-ALRA", {**_TSO_RATES, **_SWITCHES}, _tso(_at_share)),
    Family("bounded TSO-ALRA", {**_BOUNDED_RATES, **_SWITCHES}, _bounded(-0.5, _at_share)),
    Family("bounded, on plateau", _BOUNDED_RATES, _bounded(-0.5, _on_plateau)),
    Family("bounded, never switching", _NEVER_RATES, _bounded(-0.5, _never)),
    Family("bounded, power -1", {**_NATURAL_RATES, **_SWITCHES}, _bounded(-1.0, _at_share)),
)
"""As published, then with a bound on the update of the first stage."""
QUICK = tuple(
    dataclasses.replace(family, grid={name: values[-1:] for name, values in family.grid.items()})
    for family in FAMILIES
    if family.name in ("SGD", "TSO-ALRA", "bounded TSO-ALRA", "bounded, never switching")
)
"""One setting each of what the verdicts need at least."""

BASELINES = ("SGD", "Adam", "AMSGrad")
METHODS = ("TSO-ALRA", "bounded TSO-ALRA")


@dataclasses.dataclass(frozen=True)
class Run:
    """What one run measured, at the end of every epoch.

    Attributes:
      setting: the tuned numbers.
      seed: of the initialisation and the order of the batches.
      evaluations: lists of equal length: epochs, seconds of the steps, train_loss (an average over the epoch's
        mini-batches) and validation_loss; test_loss and test_accuracy where no setting is picked by the run.
    """

    setting: dict[str, float]
    seed: int
    evaluations: dict[str, list[float]]

    def final(self, name: str) -> float:
        """Returns a figure of the last epoch."""
        return self.evaluations[name][-1]

    def rise(self) -> float:
        """Returns by how much the last test loss lies above the least, relatively."""
        return self.final("test_loss") / min(self.evaluations["test_loss"]) - 1

    def epochs_to(self, test_loss: float) -> float:
        """Returns how many epochs the test loss takes to fall so far; infinity if it does not."""
        reached = np.flatnonzero(np.asarray(self.evaluations["test_loss"]) <= test_loss)
        return self.evaluations["epochs"][reached[0]] if reached.size else math.inf


class Problem(NamedTuple):
    """A network, its three sets of images, and how long to train."""

    task: Task
    train: Batch
    validation: Batch
    test: Batch
    num_epochs: int

    @property
    def description(self) -> dict[str, Any]:
        """What tells the problem from others; runs are kept under it."""
        images = digest(self.train, self.validation, self.test)
        return self.task.description | {"data": images, "batch_size": BATCH_SIZE, "epochs": self.num_epochs}

    @property
    def num_steps(self) -> int:
        """All steps of a run."""
        return self.num_epochs * (len(self.train.labels) // BATCH_SIZE)

    def factor(self, count: jax.typing.ArrayLike) -> jax.Array:
        """Returns what the rate is multiplied by: a tenth after half of the steps, again after three quarters.

        In the paper after 81 and 122 of 164 epochs.
        """
        share = jnp.asarray(count) / self.num_steps
        return jnp.where(share < 0.5, 1.0, jnp.where(share < 0.75, 0.1, 0.01))


def make_problem(dataset: Dataset, network: nn.Module, num_images: int, num_epochs: int) -> Problem:
    """Takes so many images to train on, a fifth as many to validate."""
    task = Task(network, classification_loss, has_accuracy=True)
    order = np.random.default_rng(0).permutation(len(dataset.train.labels))
    train, validation = (
        Batch(*(array[indices] for array in dataset.train))
        for indices in (order[:num_images], order[num_images : num_images + num_images // 5])
    )
    return Problem(task, train, validation, dataset.test, num_epochs)


class Trainer:
    """Trains one family; compiled once, whatever the setting."""

    def __init__(self, problem: Problem, family: Family) -> None:
        self.problem, self.family = problem, family
        self._init = jax.jit(self._init_state)
        self._step = jax.jit(self._train_step, donate_argnums=0)
        self._evaluate = jax.jit(self._figures)

    def _optimizer(self, setting: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        problem = self.problem
        return optax.with_extra_args_support(self.family.optimizer(setting, problem.factor, problem.num_steps))

    def _init_state(self, key: jax.Array, setting: Mapping[str, Any]) -> tuple[optax.Params, optax.OptState]:
        params = self.problem.task.init(key, self.problem.train)
        return params, self._optimizer(setting).init(params)

    def _train_step(
        self, state: Any, indices: jax.Array, setting: Mapping[str, Any], validation_loss: jax.Array
    ) -> tuple[Any, jax.Array]:
        params, opt_state = state
        loss = self.problem.task.loss(Batch(*(array[indices] for array in self.problem.train)))
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = self._optimizer(setting).update(
            grads, opt_state, params, value=value, value_fn=loss, monitored_value=validation_loss
        )
        return (optax.apply_updates(params, updates), opt_state), value

    def _figures(self, params: optax.Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = self.problem.task.loss(batch).model_fn(params)
        return classification_loss(logits, batch), accuracy(logits, batch)

    def run(self, setting: Mapping[str, float], seed: int, with_test: bool = True) -> Run:
        """Trains; the clock runs while steps are taken. The validation loss is told to the first step of an epoch."""
        problem = self.problem
        traced = {name: jnp.float32(value) for name, value in setting.items()}
        rng = np.random.default_rng(seed)
        state, nothing = self._init(jax.random.key(seed), traced), jnp.float32(jnp.nan)
        jax.block_until_ready(self._step(jax.tree.map(jnp.copy, state), np.arange(BATCH_SIZE), traced, nothing))
        rows, seconds, told = [], 0.0, nothing
        for epoch in range(problem.num_epochs):
            order = rng.permutation(len(problem.train.labels)).astype(np.int32)
            batches = order[: len(order) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
            start, values = time.perf_counter(), []
            for indices in batches:
                state, value = self._step(state, indices, traced, told)
                values.append(value)
                told = nothing
            jax.block_until_ready(state)
            seconds += time.perf_counter() - start
            told, _ = self._evaluate(state[0], problem.validation)
            row = {"epochs": epoch + 1, "seconds": seconds, "train_loss": float(np.mean(jax.device_get(values)))}
            row["validation_loss"] = float(told)
            if with_test:
                row["test_loss"], row["test_accuracy"] = map(float, self._evaluate(state[0], problem.test))
            rows.append(row)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return Run(dict(setting), seed, columns)


class Result(NamedTuple):
    """The runs of a family: over its grid, and on fresh seeds with the setting of the least final validation loss."""

    family: Family
    tuning: list[Run]
    final: list[Run]

    def best_setting(self) -> str:
        """Describes it; a number that is the least or the largest of several tried is marked."""
        tried = {name: {run.setting[name] for run in self.tuning} for name in self.final[0].setting}
        return ", ".join(
            f"{name} {value:.3g}{' (edge)' * (len(tried[name]) > 1 and value in (min(tried[name]), max(tried[name])))}"
            for name, value in self.final[0].setting.items()
        )


def measure(
    problem: Problem, families: Sequence[Family], num_seeds: int, path: Path, kept: Kept, report: Callable[[str], None]
) -> list[Result]:
    """Tunes and runs every family, and writes each to a file of JSON; those that are there are not run again.

    Nor are single runs of the others that are kept. Calls `report(what)` for each run, found or made.
    """
    description = {"images": len(problem.train.labels), "epochs": problem.num_epochs, "seeds": num_seeds}
    known = with_nan(json.loads(path.read_text())) if path.exists() else {}
    known = known["families"] if known.get("problem") == description else {}
    results = []
    for family in families:
        grid = {name: list(values) for name, values in family.grid.items()}
        if (record := known.get(family.name)) and record["grid"] == grid:
            runs = {part: [Run(**run) for run in record[part]] for part in ("tuning", "final")}
            results.append(Result(family, **runs))
            for _ in itertools.chain(*runs.values()):
                report(f"{family.name}: found")
        else:
            results.append(_measure_family(problem, family, num_seeds, kept, report))
            known[family.name] = {"grid": grid} | {
                part: [dataclasses.asdict(run) for run in getattr(results[-1], part)] for part in ("tuning", "final")
            }
        content = {"environment": environment(), "problem": description, "families": known}
        write_json(path, content)
    return results


def _measure_family(
    problem: Problem, family: Family, num_seeds: int, kept: Kept, report: Callable[[str], None]
) -> Result:
    trainer, description = Trainer(problem, family), problem.description

    def run(setting: Mapping[str, float], seed: int, with_test: bool) -> Run:
        key = description | {"family": family.name, "setting": setting, "seed": seed, "with_test": with_test}
        result = Run(**kept.get("stages", key, lambda: dataclasses.asdict(trainer.run(setting, seed, with_test))))
        report(f"{family.name}: {_described(setting)}, validation loss {result.final('validation_loss'):.3f}")
        return result

    tuning: list[Run] = []

    def loss_of(rate: float) -> float:
        at_this_rate = dataclasses.replace(family, grid=family.grid | {"learning rate": (rate,)})
        runs = [run(setting, TUNING_SEED, False) for setting in at_this_rate.settings()]
        tuning.extend(runs)
        return min(map(_validation_loss, runs))

    tune(family.grid["learning rate"], loss_of)
    best = min(tuning, key=_validation_loss)
    return Result(family, tuning, [run(best.setting, TUNING_SEED + 1 + seed, True) for seed in range(num_seeds)])


def _validation_loss(run: Run) -> float:
    """Returns the last one; one that is not a number counts as infinite."""
    return float(np.nan_to_num(run.final("validation_loss"), nan=np.inf))


def _described(setting: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in setting.items())


def results_table(title: str, results: Sequence[Result]) -> Table:
    """Lays out the figures of the fresh seeds."""
    notes = "Mean and 95 % interval over the seeds. Rise: last test loss over the least.\n"
    notes += "(edge): the least or largest tried, after extending the rates; a better one may lie beyond."
    table = Table(title=title, caption=notes)
    table.add_column("method", no_wrap=True)
    for column in ("test loss", "test accuracy", "rise %", "epochs to SGD's test loss", "s an epoch"):
        table.add_column(column, justify="right")
    table.add_column("best setting")
    target = sgd_level(results)
    for result in results:
        final = result.final
        epochs = final[0].final("epochs")
        table.add_row(
            result.family.name,
            plus_minus(mean_interval([run.final("test_loss") for run in final])),
            plus_minus(mean_interval([run.final("test_accuracy") for run in final])),
            f"{100 * statistics.fmean(run.rise() for run in final):.1f}",
            f"{statistics.median(run.epochs_to(target) for run in final):g}",
            f"{statistics.fmean(run.final('seconds') for run in final) / epochs:.2f}",
            result.best_setting(),
        )
    return table


def sgd_level(results: Sequence[Result]) -> float:
    """Returns the test loss that all runs of SGD reach."""
    (sgd,) = [result for result in results if result.family.name == "SGD"]
    return max(run.final("test_loss") for run in sgd.final)


def judge(network: str, results: Sequence[Result]) -> list[Claim]:
    """The paper's claims: a faster decrease, no late rise of the test loss, a better final test loss."""
    by_name = {result.family.name: result.final for result in results}
    target = sgd_level(results)

    def is_lower(first: str, text: str, second: str, figure: Callable[[Run], float]) -> Claim:
        ours, theirs = ([figure(run) for run in by_name[name]] for name in (first, second))
        numbers = f"median {statistics.median(ours):.3g} against {statistics.median(theirs):.3g}"
        return Claim(f"{network}: {first} {text} {second}.", is_less(ours, theirs), numbers)

    final_loss = functools.partial(Run.final, name="test_loss")
    epochs = functools.partial(Run.epochs_to, test_loss=target)
    claims = []
    baselines = [name for name in BASELINES if name in by_name]
    for method in METHODS:
        for baseline in baselines:
            claims.append(is_lower(method, "reduces the test loss faster than", baseline, epochs))
            claims.append(is_lower(method, "ends with a lower test loss than", baseline, final_loss))
        rises = {name: statistics.fmean(run.rise() for run in by_name[name]) for name in (method, *baselines)}
        verdict = Verdict.HOLDS if rises[method] < 0.01 else Verdict.FAILS
        numbers = ", ".join(f"{name} {100 * rise:.1f} %" for name, rise in rises.items())
        claims.append(Claim(f"{network}: {method} has a test loss that does not rise late.", verdict, numbers))
    claims.append(is_lower(METHODS[1], "ends with a lower test loss than", "bounded, never switching", final_loss))
    return claims

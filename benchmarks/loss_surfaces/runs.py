"""The optimisers of the loss-surface experiments, and their runs: one optimiser, or one that another takes over."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optcurv
from benchmarks.core.cache import Cache
from benchmarks.core.methods import Method
from benchmarks.core.train import Run, Trainer, after_steps
from benchmarks.core.tune import TUNING_SEED, tune
from benchmarks.loss_surfaces.networks import Initialisation, SurfaceTask

_MAX_EXTENSIONS = 3
_RATE = "learning rate"


def _rk2(name: str, make: Callable[..., optax.GradientTransformation], grid: tuple[float, ...]) -> Method:
    return Method(name, make, {_RATE: grid}, gradients=2)


def _sgd_rk2(name: str, tableau: optcurv.Tableau) -> Method:
    return _rk2(name, functools.partial(optcurv.sgd_rk2, tableau=tableau), (0.1, 0.3, 1.0))


METHODS = {
    method.name: method
    for method in (
        Method("SGD", optax.sgd, {_RATE: (0.03, 0.1, 0.3)}),
        Method("SGD-momentum", functools.partial(optax.sgd, momentum=0.9), {_RATE: (0.01, 0.03, 0.1)}),
        Method("RMSProp", optax.rmsprop, {_RATE: (0.0003, 0.001, 0.003)}),
        Method("Adadelta", optax.adadelta, {_RATE: (0.3, 1.0, 3.0)}),
        Method("Adam", optax.adam, {_RATE: (0.001, 0.003, 0.01)}),
        _sgd_rk2("SGD+RK2", optcurv.HEUN),
        _rk2("Adam+RK2", optcurv.adam_rk2, (0.001, 0.003, 0.01)),
        _sgd_rk2("SGD+midpoint", optcurv.MIDPOINT),
        _sgd_rk2("SGD+Ralston", optcurv.RALSTON),
    )
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained(Run):
    """A run with its plan; its curve has the distance from the initialisation, and what the task evaluates."""

    plan: Plan


def _switched(first: Method, second: Method) -> Method:
    """The first optimiser, and from a step on, which may be traced, the second; both cost as much."""

    def optimizer(rate: Any, second_rate: Any, step: Any) -> optax.GradientTransformation:
        rule = optcurv.SwitchRule(
            init=lambda: jnp.zeros((), jnp.int32), update=lambda count, _: (count + 1, jnp.asarray(count >= step))
        )
        return optcurv.switch(first.optimizer(rate), second.optimizer(second_rate), rule)

    return Method(f"{first.name} → {second.name}", optimizer, {}, first.gradients)


class Runner:
    """Carries out plans on a task; keeps what it trained, and what it compiled."""

    def __init__(self, task: SurfaceTask, cache: Cache) -> None:
        self.task, self._cache = task, cache
        self._trainer = functools.cache(self._make_trainer)
        self._distance = jax.jit(lambda a, b: optax.tree.norm(optax.tree.sub(a, b)))

    def _make_trainer(self, first: str, second: str | None) -> Trainer:
        return Trainer(self.task, _switched(METHODS[first], METHODS[second]) if second else METHODS[first])

    def run(self, plan: Plan) -> Trained:
        """Returns a run, found or trained."""
        key = self.task.description | {"plan": dataclasses.asdict(plan)}
        return self._cache.get(key, self._train, plan)

    def _train(self, plan: Plan) -> Trained:
        task, second = self.task, plan.second
        start, setting = task.start(plan.seed, plan.initialisation), {_RATE: plan.first.rate}
        if second:
            step = round(plan.switch_at * plan.num_epochs * task.steps_per_epoch)
            setting |= {"second rate": second.rate, "switch step": step}

        def evaluate(params: optax.Params) -> Mapping[str, float]:
            return task.evaluate(params) | {"distance": float(self._distance(params, start))}

        stops = after_steps(task.steps_per_epoch * epoch for epoch in range(1, plan.num_epochs + 1))
        trainer = self._trainer(plan.first.method, second and second.method)
        return Trained(**vars(trainer.run(setting, plan.seed, stops, evaluate, start=start)), plan=plan)

    def tuned_rate(
        self,
        method: str,
        num_epochs: int,
        report: Callable[[str], None],
        initialisation: Initialisation | None = None,
        grid: tuple[float, ...] | None = None,
    ) -> float:
        """Returns the learning rate of the least training loss at the end of a run of so many epochs, by `tune`."""
        chosen = METHODS[method].at(grid={_RATE: grid}) if grid else METHODS[method]

        def run(setting: Mapping[str, float]) -> Trained:
            trained = self.run(Plan(Stage(method, setting[_RATE]), TUNING_SEED, num_epochs, initialisation))
            report(f"{self.task.name}: {trained.plan}, tuning")
            return trained

        return tune(chosen, run, "loss", _MAX_EXTENSIONS).best.setting[_RATE]

"""Tuning on a grid, beyond the grid where the best lies on its edge, and runs on fresh seeds at the best setting."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from benchmarks.core.cache import Cache
from benchmarks.core.methods import Method, Setting
from benchmarks.core.task import Task
from benchmarks.core.train import Run, Trainer

TUNING_SEED = 0


def settings(grid: Mapping[str, tuple[float, ...]]) -> Iterator[dict[str, float]]:
    """Yields all combinations, the first number varying slowest."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def tune(method: Method, run: Callable[[dict[str, float]], Run], figure: str, max_extensions: int = 0) -> "Result":
    """Runs every setting of the grid.

    While the first number's best value is the least or the largest of those tried, the next in its direction is tried
    too, a third or three times as large. A grid of a single value is not extended.

    Args:
      method: whose grid it is.
      run: trains with a setting.
      figure: the final figure of a run that should be small.
      max_extensions: how often the grid is extended.

    Returns:
      The runs; none on fresh seeds yet.
    """
    (first, values), *_ = method.grid.items()
    result = Result(method, [run(setting) for setting in settings(method.grid)], figure=figure)
    for _ in range(max_extensions if len(values) > 1 else 0):
        tried = [tuned.setting[first] for tuned in result.tuning]
        best = result.best.setting[first]
        further = {max(tried): 3 * best, min(tried): best / 3}.get(best)
        if further is None:
            break
        further = float(f"{further:.2g}")
        result.tuning += [run(setting) for setting in settings({**method.grid, first: (further,)})]
    return result


def tune_and_repeat(
    task: Task,
    methods: Iterable[Method],
    train: Callable[[Trainer, Setting, int], Run],
    about: Mapping[str, Any],
    num_seeds: int,
    cache: Cache,
    report: Callable[[str], None],
    figure: str = "train_loss",
    max_extensions: int = 0,
) -> "list[Result]":
    """Tunes one method after the other on one seed, and runs it on fresh ones at its best setting.

    Args:
      task: what is trained.
      methods: on what.
      train: makes a run of a setting and a seed; a function of a module, or a partial of one.
      about: what determines a run beside task, method, setting and seed.
      num_seeds: fresh ones.
      cache: where runs are kept.
      report: is called after each run.
      figure: as in `tune`.
      max_extensions: as in `tune`.
    """

    def measure(method: Method) -> Result:
        trainer = Trainer(task, method)

        def run(setting: Setting, seed: int = TUNING_SEED) -> Run:
            key = task.description | method.description | dict(about) | {"setting": dict(setting), "seed": seed}
            found = cache.get(key, train, trainer, setting, seed)
            words = ", ".join(f"{name} {value:.3g}" for name, value in setting.items())
            report(f"{method.name}, {words}, seed {seed}: {figure.replace('_', ' ')} {found.final[figure]:.4f}")
            return found

        result = tune(method, run, figure, max_extensions)
        result.final = [run(result.best.setting, TUNING_SEED + 1 + i) for i in range(num_seeds)]
        return result

    return [measure(method) for method in methods]


def num_runs(methods: Iterable[Method], num_seeds: int) -> int:
    """Returns how many runs `tune_and_repeat` makes, but for those beyond the grid."""
    return sum(math.prod(map(len, method.grid.values())) + num_seeds for method in methods)


@dataclasses.dataclass
class Result:
    """What was measured of one method.

    Attributes:
      method: it.
      tuning: the runs over the grid.
      final: those on fresh seeds at the best setting.
      figure: the final figure that was tuned for.
    """

    method: Method
    tuning: list[Run] = dataclasses.field(default_factory=list)
    final: list[Run] = dataclasses.field(default_factory=list)
    figure: str = "train_loss"

    @property
    def best(self) -> Run:
        """The tuning run with the least figure; one that is not a number comes last."""
        return min(self.tuning, key=lambda run: no_nan(run.final[self.figure]))

    @property
    def setting(self) -> str:
        """The best setting in words; a number that is the least or the largest of several tried is marked."""
        tried = {name: {run.setting[name] for run in self.tuning} for name in self.best.setting}
        return ", ".join(
            f"{name} {value:.3g}{' (edge)' * (len(tried[name]) > 1 and value in (min(tried[name]), max(tried[name])))}"
            for name, value in self.best.setting.items()
        )

    def finals(self, name: str) -> list[float]:
        """Returns a final figure of every run on a fresh seed."""
        return [run.final[name] for run in self.final]


def no_nan(value: float) -> float:
    """Returns a number, and infinity for one that is not a number."""
    return math.inf if math.isnan(value) else value

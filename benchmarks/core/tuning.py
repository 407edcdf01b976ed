"""Tuning of one number on a grid, and beyond the grid where the best lies on its edge."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence

from benchmarks.core.methods import Method
from benchmarks.core.training import Run

TUNING_SEED = 0
_MAX_EXTENSIONS = 3


def tune(grid: Sequence[float], loss_of: Callable[[float], float]) -> float:
    """Returns the number of the least loss; a loss that is not a number counts as infinite.

    While the best is the least or the largest of those tried, the next in its direction is tried too, a third or three
    times as large. A grid of a single number is not extended.
    """

    def loss_or_inf(number: float) -> float:
        loss = loss_of(number)
        return math.inf if math.isnan(loss) else loss

    losses = {number: loss_or_inf(number) for number in grid}
    for _ in range(_MAX_EXTENSIONS if len(losses) > 1 else 0):
        best = min(losses, key=lambda number: losses[number])
        further = {max(losses): 3 * best, min(losses): best / 3}.get(best)
        if further is None:
            break
        further = float(f"{further:.2g}")
        losses[further] = loss_or_inf(further)
    return min(losses, key=lambda number: losses[number])


@dataclasses.dataclass
class Result:
    """What was measured of one method: its runs over the grid, and those on fresh seeds at the best setting."""

    method: Method
    tuning: list[Run] = dataclasses.field(default_factory=list)
    final: list[Run] = dataclasses.field(default_factory=list)

    @property
    def best(self) -> Run:
        """The tuning run with the least final training loss; one that is not finite comes last."""
        return min(self.tuning, key=lambda run: _finite_or_inf(run.final("train_loss")))

    @property
    def on_edge(self) -> bool:
        """Whether the best setting is the first or last of the grid, so that a better may lie beyond."""
        return self.best.setting in (self.method.grid[0], self.method.grid[-1])

    @property
    def shown(self) -> list[Run]:
        """The runs on fresh seeds; where an interrupt came before them, the best tuning run."""
        return self.final or [self.best]

    def summary(self, name: str) -> tuple[float, float]:
        """Returns mean and standard deviation over seeds (0 for a single one) of a final figure."""
        values = [run.final(name) for run in self.shown]
        spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0
        return statistics.fmean(values), spread


def _finite_or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf

"""Tuning of one number on a grid, and beyond the grid where the best lies on its edge."""

import math
from collections.abc import Callable, Sequence

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

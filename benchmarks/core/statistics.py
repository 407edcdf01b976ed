"""What a paper claims, and what the numbers measured here say to it."""

import enum
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray


class Verdict(enum.StrEnum):
    """Whether a claim held here."""

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"


class Claim(NamedTuple):
    """A claim of the paper, whether it held here, and the numbers that say so."""

    text: str
    verdict: Verdict
    numbers: str


class Interval(NamedTuple):
    """A mean, and half the width of its confidence interval."""

    mean: NDArray[np.float64]
    half_width: NDArray[np.float64]


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Returns mean and Student's t interval over the first axis; half the width is 0 for a single value."""
    values = np.asarray(values, np.float64)
    count = len(values)
    mean = values.mean(axis=0)
    if count == 1:
        return Interval(mean, np.zeros_like(mean))
    quantile = scipy.stats.t.ppf((1 + level) / 2, count - 1)
    return Interval(mean, quantile * values.std(axis=0, ddof=1) / np.sqrt(count))


def is_less(first: ArrayLike, second: ArrayLike, level: float = 0.05) -> Verdict:
    """Whether the first sample lies below the second, by the two-sided rank test of Mann and Whitney.

    Infinite values count as larger than all others; undecided where chance could have ordered the samples so.
    """
    for alternative, verdict in (("less", Verdict.HOLDS), ("greater", Verdict.FAILS)):
        test: Any = scipy.stats.mannwhitneyu(first, second, alternative=alternative)
        if test.pvalue < level / 2:
            return verdict
    return Verdict.UNDECIDED


def plus_minus(interval: Interval, digits: int = 3) -> str:
    """Writes an interval."""
    return f"{interval.mean:#.{digits}g} ± {interval.half_width:.1g}"


def quartiles(values: ArrayLike) -> str:
    """Writes a median and, in brackets, the quartiles around it."""
    low, median, high = np.asarray(values, np.float64)
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def mean_deviation(values: ArrayLike, digits: int = 3) -> str:
    """Writes mean and standard deviation; the mean alone of a single value."""
    values = np.asarray(values, np.float64)
    spread = float(values.std(ddof=1)) if len(values) > 1 and np.isfinite(values).all() else 0.0
    return f"{values.mean():#.{digits}g}" + (f" ± {spread:.1g}" if len(values) > 1 else "")

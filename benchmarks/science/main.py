"""Differential equations and small fits in float64: optcurv's methods untuned against tuned rivals."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from benchmarks.core import data, report
from benchmarks.core.cache import Cache
from benchmarks.core.figures import save
from benchmarks.science import results, runs
from benchmarks.science.figures import draw_errors, draw_solution
from benchmarks.science.problems import PROBLEMS

_QUICK_PROBLEMS = ("poisson-2d", "regression")


@dataclasses.dataclass
class Options(report.Study):
    """Differential equations and small fits: optcurv's methods untuned against tuned rivals, at equal seconds."""

    problem: Literal[
        "all", "poisson-2d", "poisson-5d", "heat", "burgers", "allen-cahn", "inverse", "regression", "digits"
    ] = "all"
    """What is solved."""
    seconds: float | None = None
    """Of each run, without compilation (default: 4; with --quick 0.2)."""

    def __post_init__(self) -> None:
        """Refuses seconds that are out of range."""
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise data.DataError(f"--seconds must be positive and finite, got {self.seconds}.")

    def run(self) -> None:
        """Runs all methods on each problem, and writes `<problem>.json`."""
        seconds = self.seconds or (0.2 if self.quick else 4.0)
        names = _QUICK_PROBLEMS if self.quick else tuple(PROBLEMS)
        methods, cache = runs.OWN + runs.RIVALS, Cache(self.folder)
        with report.progress_bar(runs.num_runs(methods) * (len(names) if self.problem == "all" else 1)) as progress:
            for name in names if self.problem == "all" else (self.problem,):
                key = {"problem": name, "seconds": seconds}
                self.write(name, cache.get(key, runs.compare, name, methods, seconds, progress))


def tables(folder: Path) -> dict[str, str]:
    """Returns the best of either side, a table of methods for each problem, and one of all runs."""
    found = _summaries(folder)
    by_problem = {name: results.problem_table(content) for name, content in found.items()}
    together = {
        "summary": results.summary_table(found),
        "speed": results.speed_table(found),
        "all-runs": results.all_runs_table(found),
    }
    return by_problem | together


def draw(folder: Path) -> None:
    """Draws the errors on every problem, and the solution of Burgers' equation."""
    found = _summaries(folder)
    save(draw_errors(found), folder / "errors.png")
    if "burgers" in found:
        save(draw_solution(found["burgers"]["picture"]), folder / "solution.png")


def headline(folder: Path) -> dict[str, str]:
    """Returns the README's picture."""
    seconds = next(iter(_summaries(folder).values()))["seconds"]
    picture = (
        "![Error against seconds of each method on differential equations and small fits]"
        "(benchmarks/results/science/errors.png)\n\n"
        "*Differential equations and small fits: optcurv's Levenberg-Marquardt (LM), EDF and trust region, untuned, "
        f"against tuned Adam and Muon and `optax.lbfgs`, in {seconds:g} seconds each.*"
    )
    return {"picture": picture}


def _summaries(folder: Path) -> dict[str, dict]:
    found = report.summaries(folder)
    return {name: found[name] for name in PROBLEMS if name in found}

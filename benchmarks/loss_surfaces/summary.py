"""What is kept of the loss-surface experiments, and their tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.core.report import Row, table
from benchmarks.core.statistics import Claim, mean_interval, plus_minus
from benchmarks.loss_surfaces.experiments import LENGTH, Exotic, Minima, RungeKutta, Switching, num_not_finite
from benchmarks.loss_surfaces.runs import Trained

_FIGURES = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "distance": "distance",
}


def _about(found: Minima | Switching | Exotic | RungeKutta, claims: Sequence[Claim]) -> dict[str, Any]:
    about = {"network": found.problem, "claims": [claim._asdict() for claim in claims]}
    return about | {"not_finite": num_not_finite(found)}


def row(name: str, runs: Sequence[Trained]) -> dict[str, str]:
    """Returns a row of a table: rate, figures and distance."""
    figures = {label: _interval([run.final[key] for run in runs]) for key, label in _FIGURES.items()}
    return {"method": name, "rate": f"{runs[0].plan.first.rate:g}"} | figures


def _interval(values: Sequence[float], digits: int = 3) -> str:
    """Writes the mean of what is finite."""
    finite = [value for value in values if np.isfinite(value)]
    return plus_minus(mean_interval(finite), digits) if finite else "not finite"


def summarise_minima(found: Minima, claims: Sequence[Claim]) -> dict[str, Any]:
    """Returns claims and table, one surface, and the lines around the ends of the first seed."""
    relative, absolute = found.widths(absolute=False), found.widths(absolute=True)
    rows = [
        row(name, runs)
        | {"basin, relative": _interval(relative[name], 2), "basin, absolute": _interval(absolute[name], 2)}
        for name, runs in found.runs.items()
    ]
    lines = {name: curves[0] for name, curves in found.around_end.by_name.items()}
    return _about(found, claims) | {
        "initial_loss": found.initial_loss,
        "threshold": found.threshold,
        "rows": rows,
        "surface": found.triangles["SGD | Adam"]._asdict(),
        "around_end": {"x": found.around_end.x, "by_name": lines},
    }


def summarise_switching(found: Switching, claims: Sequence[Claim]) -> dict[str, Any]:
    """Returns claims and table, and accuracies and distances of the first seed."""
    content = _about(found, claims)
    content["rows"] = [row(f"{g}: {end}", column) for g, runs in found.runs.items() for end, column in runs.items()]
    for key in ("test_accuracy", "distance"):
        content[key] = {}
        for group, runs in found.runs.items():
            names = dict(zip(group.split(" → "), ("first alone", "second alone"), strict=True))
            content[key][group] = {names.get(end, end): column[0].curve[key] for end, column in runs.items()}
            content["epochs"] = next(iter(runs.values()))[0].curve["epochs"]
    return content


def summarise_exotic(found: Sequence[Exotic], claims: Sequence[Claim]) -> dict[str, Any]:
    """Returns claims, table and training losses."""
    rows = [row(f"{one.problem} {start}", runs) for one in found for start, runs in one.runs.items()]
    curves = {
        one.problem: {start: mean_curve(runs, "train_loss", "epochs") for start, runs in one.runs.items()}
        for one in found
    }
    not_finite = sum(map(num_not_finite, found))
    return _about(found[0], claims) | {"not_finite": not_finite, "rows": rows, "curves": curves}


def summarise_runge_kutta(found: RungeKutta, claims: Sequence[Claim]) -> dict[str, Any]:
    """Returns claims, table and accuracies."""
    rows = [row(name, runs) | {"gradients": f"{runs[0].final['gradients']:g}"} for name, runs in found.runs.items()]
    curves = {
        label: {name: mean_curve(runs, key, "gradients") for name, runs in found.runs.items()}
        for key, label in (("train_accuracy", "training"), ("test_accuracy", "test"))
    }
    return _about(found, claims) | {"rows": rows, "curves": curves}


def mean_curve(runs: Sequence[Trained], name: str, axis: str) -> list[Any]:
    """Returns axis and mean over the seeds."""
    return [runs[0].curve[axis], np.mean([run.curve[name] for run in runs], axis=0)]


def results_table(content: Mapping[str, Any]) -> str:
    """Lays out where each method ended."""
    rows: list[Row] = content["rows"]
    caption = f"{content['network']}: mean and 95 % interval over the seeds. Numbers measured that are not finite: "
    caption += f"{content['not_finite']}."
    if "threshold" in content:
        caption += (
            f" Basins: loss below {content['threshold']:.3g}, midway between that of the ends, in the median, and "
        )
        caption += (
            f"the {content['initial_loss']:.3g} at initialisation; the line is {LENGTH:g} times as long as the way."
        )
    return table(rows, caption)

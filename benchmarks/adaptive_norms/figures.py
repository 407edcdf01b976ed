"""The pictures of the adaptive-norms study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from benchmarks.adaptive_norms import hessian_mass, quadratics
from benchmarks.core.claims import mean_interval
from benchmarks.core.style import draw_band, log_axis, new_figure, save, styles
from benchmarks.core.training import Run

_AXES = {"steps": "steps", "gradients": "gradient-equivalents", "seconds": "time in seconds"}
_LOSSES_SHOWN = (1e-9, 1e9)  # below lies rounding, above divergence
_PROGRESS_SHOWN = (0.5, 1.02)


def ellipse(matrix: np.ndarray, radius: float, num_points: int = 401) -> np.ndarray:
    """Returns points s with sᵀ matrix s = radius², of shape (num_points, 2)."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    angles = np.linspace(0, 2 * np.pi, num_points)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return radius * circle / np.sqrt(eigenvalues) @ vectors.T


def plot_quadratics(path: Path, measured: Mapping[str, Mapping[str, quadratics.Measured]]) -> None:
    """Draws each method's iterates and every other trust region over level sets, and suboptimality below."""
    problems = quadratics.PROBLEMS
    figure = new_figure(4 * len(problems), 14)
    panels = figure.subplots(1 + len(quadratics.METHODS), len(problems), squeeze=False)
    for column, (problem, by_name) in zip(panels.T, measured.items(), strict=True):
        column[0].set_title(problem)
        for panel, (name, one), style in zip(column[:-1], by_name.items(), styles(), strict=False):
            _draw_descent(panel, problems[problem], one.drawn, style)
            panel.set(xlabel="w₁", ylabel=f"{name}\nw₂")
            mean, half_width = mean_interval(one.log_values, quadratics.LEVEL)
            iterations = np.arange(len(mean))
            column[-1].plot(iterations, mean, label=name, markevery=2, **style)
            column[-1].fill_between(iterations, mean - half_width, mean + half_width, color=style["color"], alpha=0.2)
        column[-1].set(xlabel="iterations", ylabel="log₁₀ suboptimality", ylim=(-16, 3))
        column[-1].grid(visible=True, alpha=0.3)
    figure.suptitle("Iterates and every other implicit trust region; below, mean over starts with its 90 % interval")
    figure.legend(*panels[-1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=4)
    save(figure, path)


def _draw_descent(panel: Axes, hessian: np.ndarray, descent: quadratics.Descent, style: Mapping[str, Any]) -> None:
    limit = 1.4 * quadratics.START_DISTANCE
    axis = np.linspace(-limit, limit, 101)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    values = 0.5 * np.einsum("abi,ij,abj->ab", grid, hessian, grid)
    panel.contour(axis, axis, values, levels=np.max(values) * np.geomspace(1e-3, 1, 9), colors="0.8", linewidths=0.8)
    iterates = descent.iterates
    for i in range(0, len(descent.radii), 2):
        region = iterates[i] + ellipse(descent.matrices[i], descent.radii[i])
        panel.plot(*region.T, color=style["color"], linestyle="--", linewidth=0.8)
    panel.plot(*iterates.T, **{**style, "linestyle": "-"})
    panel.plot(0, 0, marker="*", color="black", markersize=9)
    panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")


def plot_masses(path: Path, title: str, measured: Mapping[str, hessian_mass.Measured]) -> None:
    """Draws the diagonal mass of each network at each stage, with 95 % intervals, over the two baselines."""
    figure = new_figure(max(6.5, 4.2 * len(measured)), 5)
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for panel, (name, one) in zip(panels, measured.items(), strict=True):
        stages = hessian_mass.STAGES
        means, half_widths = zip(*map(one.interval, stages), strict=True)
        x = np.arange(len(stages))
        panel.errorbar(x, means, half_widths, fmt="o", color="black", capsize=5, label="network")
        for (baseline, mass), line in zip(one.baselines.items(), ("--", ":"), strict=True):
            panel.axhline(mass, color="black", linestyle=line, label=baseline)
        panel.set_xticks(x, [stage.replace(" ", "\n") for stage in stages])
        panel.set(title=f"{name}, {one.dimension} parameters", xlim=(-0.5, len(stages) - 0.5))
        log_axis(panel)
    panels[0].set_ylabel("diagonal mass of the Hessian")
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=4)
    save(figure, path)


class Column(NamedTuple):
    """Runs drawn against one axis: the training loss above, the progress below.

    Attributes:
      title: above the column.
      axis: gradients, epochs or seconds.
      progress: what progress is.
      target: the progress to reach.
      runs: those of each method.
    """

    title: str
    axis: str
    progress: str
    target: float
    runs: Mapping[str, Sequence[Run]]


def plot_training(path: Path, title: str, columns: Sequence[Column]) -> None:
    """Draws mean and 95 % interval over the runs; of the loss, in its logarithm."""
    figure = new_figure(4.5 * len(columns), 8)
    panels = figure.subplots(2, len(columns), squeeze=False)
    for (above, below), column in zip(panels.T, columns, strict=True):
        for (name, runs), style in zip(column.runs.items(), styles(), strict=False):
            x, losses = _on_common_axis(runs, column.axis, "train_loss")
            mean, half_width = mean_interval(np.log10(np.clip(np.nan_to_num(losses, nan=np.inf), *_LOSSES_SHOWN)))
            draw_band(above, x, 10 ** np.array([mean - half_width, mean, mean + half_width]), name, style)
            x, progress = _on_common_axis(runs, column.axis, "progress")
            mean, half_width = mean_interval(progress)
            draw_band(below, x, np.array([mean - half_width, mean, mean + half_width]), name, style)
        means = np.concatenate([np.asarray(line.get_ydata()) for line in above.lines])
        above.set_ylim(means.min() / 2, means.max() * 2)  # a wide band may leave the picture
        above.set(title=column.title, ylabel="training loss")
        log_axis(above)
        below.axhline(column.target, color="black", linewidth=0.8)
        below.annotate(
            f"{100 * column.target:g} %", (1, column.target), (3, 0), ("axes fraction", "data"), "offset points"
        )
        below.set(xlabel=_AXES.get(column.axis, column.axis), ylabel=column.progress)
        below.set_ylim(*_PROGRESS_SHOWN)
        below.grid(visible=True, alpha=0.3)
    figure.suptitle(title)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=4)
    save(figure, path)


def _on_common_axis(runs: Sequence[Run], axis: str, figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Interpolates a figure of each run, which was evaluated at points of its own, to as far as all came."""
    x = np.linspace(0, min(run.final(axis) for run in runs), 81)
    return x, np.array([np.interp(x, run.evaluations[axis], run.evaluations[figure]) for run in runs])

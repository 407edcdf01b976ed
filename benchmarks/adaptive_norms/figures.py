"""The pictures of the adaptive-norms study, drawn from its summaries."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.adaptive_norms import hessian_mass, quadratics
from benchmarks.core.figures import draw_band, log_axis, new_figure, styles

_AXES = {"gradients": "gradient-equivalents", "epochs": "epochs", "seconds": "time in seconds"}
_PROGRESS_SHOWN = (0.5, 1.02)


def ellipse(inverse_root: np.ndarray, radius: float, num_points: int = 401) -> np.ndarray:
    """Returns points s with sᵀ A s = radius², of shape (num_points, 2), for the inverse square root of A."""
    angles = np.linspace(0, 2 * np.pi, num_points)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1) @ inverse_root


def draw_quadratics(content: Mapping[str, Any]) -> Figure:
    """Draws each method's iterates and every other trust region over level sets, and suboptimality below."""
    problems = quadratics.PROBLEMS
    figure = new_figure(4 * len(problems), 14)
    panels = figure.subplots(1 + len(quadratics.METHODS), len(problems), squeeze=False)
    for column, (problem, methods) in zip(panels.T, content["problems"].items(), strict=True):
        column[0].set_title(problem)
        for panel, (name, one), style in zip(column[:-1], methods.items(), styles(), strict=False):
            _draw_descent(panel, problems[problem], one["drawn"], style)
            panel.set(xlabel="w₁", ylabel=f"{name}\nw₂")
            mean, half_width = (np.asarray(one["curve"][key]) for key in ("mean", "half_width"))
            draw_band(column[-1], np.arange(len(mean)), (mean - half_width, mean, mean + half_width), name, style)
        column[-1].set(xlabel="iterations", ylabel="log₁₀ suboptimality", ylim=(-16, 3))
        column[-1].grid(visible=True, alpha=0.3)
    figure.suptitle("Iterates and every other implicit trust region; below, mean over starts with its 90 % interval")
    figure.legend(*panels[-1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=4)
    return figure


def _draw_descent(panel: Axes, hessian: np.ndarray, descent: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    limit = 1.4 * quadratics.START_DISTANCE
    axis = np.linspace(-limit, limit, 101)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    values = 0.5 * np.einsum("abi,ij,abj->ab", grid, hessian, grid)
    panel.contour(axis, axis, values, levels=np.max(values) * np.geomspace(1e-3, 1, 9), colors="0.8", linewidths=0.8)
    iterates = np.asarray(descent["iterates"])
    for center, shape, radius in zip(iterates[::2], descent["shapes"], descent["radii"], strict=False):
        region = center + ellipse(np.asarray(shape), radius)
        panel.plot(*region.T, color=style["color"], linestyle="--", linewidth=0.8)
    panel.plot(*iterates.T, **{**style, "linestyle": "-"})
    panel.plot(0, 0, marker="*", color="black", markersize=9)
    panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")


def draw_masses(title: str, content: Mapping[str, Any]) -> Figure:
    """Draws the diagonal mass of each network at each stage, with 95 % intervals, over the two baselines."""
    measured = {name: hessian_mass.Measured(**one) for name, one in content["networks"].items()}
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
    return figure


class Column(NamedTuple):
    """A title, the summary of a network, an axis and the methods drawn: the loss above, the progress below."""

    title: str
    content: Mapping[str, Any]
    axis: str
    methods: Sequence[str]


def draw_training(title: str, columns: Sequence[Column]) -> Figure:
    """Draws mean and 95 % interval over the runs; of the loss, in its logarithm."""
    figure = new_figure(4.5 * len(columns), 8)
    panels = figure.subplots(2, len(columns), squeeze=False)
    for (above, below), column in zip(panels.T, columns, strict=True):
        target = column.content["target"]
        for name, style in zip(column.methods, styles(), strict=False):
            curve = column.content["methods"][name]["curves"][column.axis]
            mean, half_width = np.asarray(curve["loss"])
            x = np.linspace(0, curve["end"], len(mean))
            band = 10 ** np.array([mean - half_width, mean, mean + half_width])
            draw_band(above, x, list(band), name, style)
            mean, half_width = np.asarray(curve["progress"])
            draw_band(below, x, (mean - half_width, mean, mean + half_width), name, style)
        means = np.concatenate([np.asarray(line.get_ydata()) for line in above.lines])
        above.set_ylim(means.min() / 2, means.max() * 2)  # a wide band may leave the picture
        above.set(title=column.title, ylabel="training loss")
        log_axis(above)
        below.axhline(target, color="black", linewidth=0.8)
        below.annotate(f"{100 * target:g} %", (1, target), (3, 0), ("axes fraction", "data"), "offset points")
        below.set(xlabel=_AXES[column.axis], ylabel=column.content["progress"], ylim=_PROGRESS_SHOWN)
        below.grid(visible=True, alpha=0.3)
    figure.suptitle(title)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=4)
    return figure

"""Pictures of loss surfaces: those of the pages, from summaries, and all others, from what a run found."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

import optcurv
from benchmarks.core.figures import draw_panels, new_figure
from benchmarks.loss_surfaces.experiments import Curves, Minima, Switching

_LOSS = "training loss"
_LEVELS, _MAP = 12, "cividis"


def draw_page(name: str, content: Mapping[str, Any]) -> dict[str, Figure]:
    """Draws what the page shows of a summary, by the names of the files."""
    if name.startswith("minima"):
        network = content["network"]
        plane = draw_plane(f"{network}: SGD | Adam", **content["surface"])
        lines = content["around_end"]
        panels = {"": {method: (lines["x"], losses) for method, losses in lines["by_name"].items()}}
        title = f"{network}: from the end towards the initialisation and beyond, one seed"
        figure = draw_panels(title, panels, "distance from the end", _LOSS)
        return {f"surface-{network}": plane, f"figure-6-{network}": bounded(figure, 1.5 * content["initial_loss"])}
    if name == "switching":
        title = "Switched optimisers"
        panels = {
            key: {
                group: {end: (content["epochs"], curve) for end, curve in curves.items()}
                for group, curves in content[key].items()
            }
            for key in ("test_accuracy", "distance")
        }
        return {
            f"figure-7-{key.replace('_', '-')}": draw_panels(title, panels[key], "epochs", label, num_columns=3)
            for key, label in (("test_accuracy", "test accuracy"), ("distance", "distance from the initialisation"))
        }
    if name == "initialisation":
        title = "SGD from unusual initialisations"
        return {"figure-11": bounded(draw_panels(title, _curves(content["curves"]), "epochs", _LOSS))}
    title = "Runge-Kutta, mean over the seeds"
    return {"figure-9": draw_panels(title, _curves(content["curves"]), "gradients computed", "accuracy")}


def _curves(panels: Mapping[str, Any]) -> dict[str, dict[str, tuple[Any, Any]]]:
    return {panel: {name: (xy[0], xy[1]) for name, xy in curves.items()} for panel, curves in panels.items()}


def draw_minima(found: Minima) -> dict[str, Figure]:
    """Draws Figures 4 and 5 (or 8), all pairs of Table 1 (or 2), and Figures 2 and 3, by the names of the files."""
    name = found.problem
    panels = {}
    for title, key in (("training", "train_accuracy"), ("test", "test_accuracy")):
        columns = found.finals(key)
        rows = zip(*columns.values(), strict=True)
        panels[title] = {f"seed {i}": (list(columns), list(row)) for i, row in enumerate(rows, start=1)}
    accuracies = draw_panels(f"{name}: accuracies by initialisation", panels, "", "accuracy")
    for panel in accuracies.axes:
        panel.tick_params(axis="x", rotation=60)
    title = f"{name}: from initialisation (α = 0) to the end (α = 1)"
    ends = bounded(draw_panels(title, _by_seed(found.from_start), "α", _LOSS))
    title = f"{name}: between the ends of two optimisers"
    between = bounded(draw_panels(title, _by_seed(found.between.loss), "α", _LOSS))
    distances = found.between.distance
    table = draw_pairs(
        f"{name}: initialisation at the left, two ends at the right",
        list(found.runs),
        found.triangles,
        {pair: (distances.x, rows[0]) for pair, rows in distances.by_name.items()},
        _LOSS,
        "functional distance from one end to the other",
    )
    squares = {
        f"square-{name}-{i}": draw_plane(f"{name}: {title}", *square)
        for i, (title, square) in enumerate(found.squares.items(), start=1)
    }
    figures = {"accuracies": accuracies, "ends": ends, "between": between, "table": table}
    return {f"{figure}-{name}": drawn for figure, drawn in figures.items()} | squares


def _by_seed(curves: Curves) -> dict[str, dict[str, tuple[Any, Any]]]:
    return {
        key: {f"seed {i}": (curves.x, row) for i, row in enumerate(rows, start=1)}
        for key, rows in curves.by_name.items()
    }


def draw_switching(found: Switching) -> dict[str, Figure]:
    """Draws the lines from the end of the first optimiser alone to those of switched runs, for the first seed."""
    panels = {}
    for group, between in found.between.items():
        first = group.split(" → ")[0]
        panels[group] = {
            pair.split(" | ")[1]: (between.loss.x, rows[0])
            for pair, rows in between.loss.by_name.items()
            if pair.startswith(f"{first} | at")
        }
    title = f"{found.problem}: from the end of the first optimiser alone to that of switched runs"
    return {"figure-7-lines": bounded(draw_panels(title, panels, "α", _LOSS, num_columns=3))}


def draw_plane(title: str, x: ArrayLike, y: ArrayLike, loss: ArrayLike) -> Figure:
    """Draws contours, and the surface beside them."""
    figure, surface = new_figure(11, 4.8), [np.asarray(part, np.float64) for part in (x, y, loss)]
    grid = figure.add_gridspec(1, 2)
    flat = optcurv.plot_plane(*surface, label=_LOSS, ax=figure.add_subplot(grid[0]))
    solid = optcurv.plot_surface(*surface, label=_LOSS, ax=figure.add_subplot(grid[1], projection="3d"))
    for panel in (flat, solid):
        panel.set(xlabel="α", ylabel="β")
    figure.suptitle(title)
    return figure


def bounded(figure: Figure, highest: float | None = None) -> Figure:
    """Cuts off the few high values that would flatten the rest."""
    panels = [panel for panel in figure.axes if panel.lines]
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for panel in panels for line in panel.lines])
    finite = values[np.isfinite(values)]
    if finite.size:
        top = highest or 1.05 * np.percentile(finite, 99.5)
        for panel in panels:
            panel.set_ylim(min(0.0, finite.min()), min(top, 1.05 * finite.max()))
    return figure


def draw_pairs(
    title: str,
    names: Sequence[str],
    surfaces: Mapping[str, Sequence[ArrayLike]],
    lines: Mapping[str, tuple[ArrayLike, ArrayLike]],
    value_label: str,
    line_label: str,
) -> Figure:
    """Draws a table of pairs, named `A | B`: surfaces (x, y, values) below the diagonal, lines (x, y) above it.

    All surfaces share one range of colours, which ends at the 90th percentile of their values.
    """
    figure = new_figure(1.2 + 1.7 * len(names), 1 + 1.6 * len(names))
    grid = figure.subplots(len(names), len(names), squeeze=False)
    every = np.concatenate([np.ravel(np.asarray(values)) for _, _, values in surfaces.values()])
    finite = every[np.isfinite(every)]
    levels = np.linspace(finite.min(), max(np.percentile(finite, 90), finite.min() + 1e-6), _LEVELS)
    top = max(np.nanmax(np.asarray(y)) for _, y in lines.values())
    filled = None
    for (row, column), panel in np.ndenumerate(grid):
        assert isinstance(panel, Axes)
        pair = f"{names[min(row, column)]} | {names[max(row, column)]}"
        panel.set(xticks=[], yticks=[])
        if row > column:
            x, y, values = (np.asarray(part) for part in surfaces[pair])
            shown = np.where(np.isfinite(values), values, np.nan)
            filled = panel.contourf(x, y, shown.T, levels=levels, cmap=_MAP, extend="max")
        elif row < column:
            panel.plot(*lines[pair], color="black")
            panel.set(ylim=(0, 1.05 * top))
            panel.tick_params(labelsize="x-small")
            panel.set_yticks([0, round(float(top), 2)])
        else:
            panel.text(0.5, 0.5, names[int(row)], ha="center", va="center")
            panel.axis("off")
    if filled is not None:
        figure.colorbar(filled, ax=grid, label=value_label, shrink=0.6)
    figure.suptitle(title)
    figure.supxlabel(f"Below the diagonal: {value_label}. Above: {line_label}.", fontsize="small")
    return figure

"""Pictures of loss surfaces: lines, planes with what was found on them, optimisers' paths, spectra."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D
from numpy.typing import ArrayLike

from benchmarks.core.style import log_axis, new_figure, styles

_LEVELS = 12
_MAP = "cividis"  # its lightness grows evenly: readable in black and white, and by the colour-blind


def draw_lines(
    title: str, x: ArrayLike, curves: Mapping[str, ArrayLike], x_label: str, y_label: str, *, log: bool = False
) -> Figure:
    """Draws curves over a common axis."""
    figure = new_figure(7, 4.5)
    panel = figure.subplots()
    x = np.asarray(x)
    for (name, y), style in zip(curves.items(), styles(), strict=False):
        panel.plot(x, np.asarray(y), label=name, markevery=max(1, len(x) // 8), **style)
    panel.set(xlabel=x_label, ylabel=y_label, title=title)
    panel.grid(visible=True, alpha=0.3)
    if log:
        log_axis(panel)
    if len(curves) > 1:
        figure.legend(loc="outside lower center", ncols=4, handlelength=4)
    return figure


def draw_plane(
    title: str,
    x: ArrayLike,
    y: ArrayLike,
    values: ArrayLike,
    x_label: str,
    y_label: str,
    value_label: str,
    *,
    paths: Mapping[str, ArrayLike] | None = None,
    log: bool = False,
) -> Figure:
    """Draws values of shape (n, m) over x, of shape (n,), and y, of shape (m,): contours, and the surface beside them.

    Paths, of shape (points, 2), are drawn over the contours; a path of one point is a mark. With `log`, levels and
    heights are logarithms to base 10. What is not finite stays blank.
    """
    x, y, heights = np.asarray(x), np.asarray(y), np.asarray(values, np.float64)
    heights = np.where(np.isfinite(heights), heights, np.nan)
    if log:
        heights, value_label = np.log10(heights), f"log₁₀ {value_label}"
    figure = new_figure(11, 4.8)
    grid = figure.add_gridspec(1, 2)
    flat = figure.add_subplot(grid[0])
    filled = flat.contourf(x, y, heights.T, levels=_LEVELS, cmap=_MAP)
    flat.contour(x, y, heights.T, levels=filled.levels, colors="white", linewidths=0.4)
    figure.colorbar(filled, ax=flat, label=value_label)
    for (name, points), style in zip((paths or {}).items(), styles(), strict=False):
        _draw_path(flat, name, np.asarray(points), style)
    flat.set(xlabel=x_label, ylabel=y_label, xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
    solid = figure.add_subplot(grid[1], projection="3d")
    assert isinstance(solid, Axes3D)
    solid.plot_surface(*np.meshgrid(x, y, indexing="ij"), heights, cmap=_MAP, linewidth=0.2, edgecolor="0.3")
    solid.set(xlabel=x_label, ylabel=y_label, zlabel=value_label)
    solid.locator_params(nbins=5)
    solid.set_box_aspect(None, zoom=0.85)  # pyright: ignore[reportArgumentType]: room for the label of the heights
    figure.suptitle(title)
    if paths:
        figure.legend(loc="outside lower center", ncols=4, handlelength=4)
    return figure


def _draw_path(panel: Axes, name: str, points: np.ndarray, style: Mapping[str, Any]) -> None:
    """Draws a line with a white rim, so that it stands out from light and from dark."""
    every = max(1, len(points) // 8)
    panel.plot(*points.T, color="white", linewidth=3.5)
    panel.plot(*points.T, label=name, markevery=every, markeredgecolor="white", **style)


def draw_spectrum(
    title: str, x: ArrayLike, densities: Mapping[str, ArrayLike], eigenvalues: ArrayLike | None = None
) -> Figure:
    """Draws densities over eigenvalues x, on a logarithmic axis, and marks single eigenvalues on its lower edge."""
    figure = draw_lines(title, x, densities, "eigenvalue", "density", log=True)
    panel = figure.axes[0]
    highest = max(np.max(np.asarray(density)) for density in densities.values())
    panel.set_ylim(1e-6 * highest, 3 * highest)
    if eigenvalues is not None:
        found = np.asarray(eigenvalues)
        low, _ = panel.get_ylim()
        panel.plot(found, np.full(len(found), low), "|", color="black", markersize=18)
    return figure


def draw_panels(
    title: str,
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]],
    x_label: str,
    y_label: str,
    *,
    num_columns: int = 4,
    log: bool = False,
) -> Figure:
    """Draws panels on common axes, each with curves of its own x and y; a name looks the same in all."""
    num_columns = min(num_columns, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = new_figure(max(6, 3.4 * num_columns), 1 + 2.6 * num_rows)
    grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    names = dict.fromkeys(name for curves in panels.values() for name in curves)
    style_of, shown = dict(zip(names, styles(), strict=False)), {}
    for panel, (heading, curves) in zip(grid.flat, panels.items(), strict=False):
        for name, (x, y) in curves.items():
            every = max(1, np.size(x) // 6)
            (shown[name],) = panel.plot(np.asarray(x), np.asarray(y), markevery=every, **style_of[name])
        panel.set_title(heading, fontsize="medium")
        panel.grid(visible=True, alpha=0.3)
        panel.label_outer()
    for panel in list(grid.flat)[len(panels) :]:
        panel.set_visible(False)
    if log:
        log_axis(grid[0, 0])
    for panel in list(grid.flat)[max(0, len(panels) - num_columns) : len(panels)]:  # not supxlabel: a legend covers it
        panel.set_xlabel(x_label)
        panel.tick_params(labelbottom=True)
    figure.supylabel(y_label, fontsize="medium")
    figure.suptitle(textwrap.fill(title, int(9 * figure.get_figwidth())))
    if len(shown) > 1:
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, handlelength=4)
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

"""One style for all pictures, and the kinds of pictures that several studies draw."""

import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import ArrayLike
from PIL import Image

# Okabe and Ito's colours, told apart by the colour-blind; lines and markers, by those who print in black and white.
_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#999999")
_LINES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")
_DPI = 90
_NUM_COLOURS = 128


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty one of a size in inches, which needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a picture as PNG, in few colours so that the file is small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DPI)
    Image.open(drawn).convert("RGB").quantize(_NUM_COLOURS).save(path, optimize=True)


def styles() -> Iterator[dict[str, Any]]:
    """Yields how to draw one curve after another."""
    for colour, line, marker in zip(cycle(_COLOURS), cycle(_LINES), cycle(_MARKERS), strict=False):
        yield {"color": colour, "linestyle": line, "marker": marker, "markersize": 5}


def log_axis(panel: Axes) -> None:
    """A logarithmic vertical axis with readable labels."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    within_decade = (1, 3) if high < 1e5 * low else (1,)  # over more decades LogLocator drops what lies between
    panel.yaxis.set_major_locator(LogLocator(subs=within_decade))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(visible=True, which="both", alpha=0.3)


def finish_losses(figure: Figure, panels: Sequence[Axes], labels: Iterable[str], loss: str, title: str) -> None:
    """Names the axes of a row of losses, and what is drawn."""
    for panel, label in zip(panels, labels, strict=True):
        panel.set_xlabel(label)
        log_axis(panel)
    panels[0].set_ylabel(loss)
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=4)


def draw_band(panel: Axes, x: ArrayLike, band: Sequence[ArrayLike], name: str, style: Mapping[str, Any]) -> None:
    """Draws a line between two bounds, the rows of the band being lower bound, line and upper bound."""
    x, (low, line, high) = np.asarray(x), (np.asarray(part, np.float64) for part in band)
    panel.plot(x, line, label=name, markevery=max(1, len(x) // 8), **style)
    panel.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


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

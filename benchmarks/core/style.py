"""One style for all pictures: colours, lines and markers, axes, files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

# Okabe and Ito's colours, told apart by the colour-blind; lines and markers, by those who print in black and white.
_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#999999")
_LINES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty one of a size in inches, which needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a picture as PNG, and beside it as SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    with rc_context({"svg.hashsalt": "optcurv"}):  # and no date: the same picture is the same file
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


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


def draw_band(panel: Axes, x: np.ndarray, band: np.ndarray, name: str, style: Mapping[str, Any]) -> None:
    """Draws a line between two bounds, the rows of the band being lower bound, line and upper bound."""
    low, line, high = band
    panel.plot(x, line, label=name, markevery=max(1, len(x) // 8), **style)
    panel.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)

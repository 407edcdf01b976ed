"""The pictures."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.training import Run

_AXES = {"steps": "steps", "gradients": "gradient-equivalents", "seconds": "time in seconds"}
# Okabe and Ito's colours, told apart by the colour-blind; lines and markers, by those who print in black and white.
_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7")
_LINES = ("-", "--", "-.", ":", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
_MARKERS = ("o", "s", "^", "v", "D", "P", "X")


def plot_curves(path: Path, title: str, runs: Mapping[str, Sequence[Run]]) -> None:
    """Draws the training loss against steps, gradients and seconds: mean over seeds, band from least to most."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(_AXES), sharey=True)
    styles = zip(cycle(_COLOURS), cycle(_LINES), cycle(_MARKERS), strict=False)
    for (name, method_runs), (colour, line, marker) in zip(runs.items(), styles, strict=False):
        losses = np.array([run.curve["loss"] for run in method_runs])
        for panel, axis in zip(panels, _AXES, strict=True):
            x = np.mean([run.curve[axis] for run in method_runs], axis=0)
            style = {"color": colour, "linestyle": line, "marker": marker, "markevery": 4, "markersize": 5}
            panel.plot(x, losses.mean(axis=0), label=name, **style)
            panel.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    panels[0].set_yscale("log")  # of all, which share it
    low, high = panels[0].get_ylim()
    within_decade = (1, 3) if high < 1e5 * low else (1,)  # over more decades LogLocator drops what lies between
    for panel, label in zip(panels, _AXES.values(), strict=True):
        panel.set_xlabel(label)
        panel.yaxis.set_major_locator(LogLocator(subs=within_decade))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(visible=True, which="both", alpha=0.3)
    panels[0].set_ylabel("training loss, mini-batch average")
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)

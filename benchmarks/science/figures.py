"""The pictures: error against seconds on every problem, and a solution beside the truth."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.core.figures import draw_panels, new_figure

_FIRST_SECONDS, _ERRORS = 0.02, (1e-7, 100)


def draw_errors(found: Mapping[str, Any]) -> Figure:
    """Draws a panel for each problem, with the curve of each method at its best setting."""
    panels = {
        content["title"]: {name: (seconds[1:], error[1:]) for name, (seconds, error) in content["curves"].items()}
        for content in found.values()
    }
    seconds = max(content["seconds"] for content in found.values())
    title = f"Error against seconds without compilation, {seconds:g} for each run"
    figure = draw_panels(title, panels, "seconds", "error", log=True)
    for panel in figure.axes:
        panel.set_xscale("log")
        panel.set_xlim(_FIRST_SECONDS, seconds)
        panel.grid(visible=False, which="minor")
    figure.axes[0].set_ylim(*_ERRORS)  # all share it; the loss of the digits falls without end
    return figure


def draw_solution(content: Mapping[str, Any]) -> Figure:
    """Draws the solution, that of the network, and the difference, over x and t."""
    truth, error = np.asarray(content["truth"]), np.asarray(content["error"])
    figure = new_figure(10, 3)
    maps = {"exact": truth, "network": truth + error, "difference": error}
    for panel, (title, values) in zip(figure.subplots(1, 3, sharey=True), maps.items(), strict=True):
        bound = float(np.abs(values).max())
        image = panel.imshow(
            values,
            origin="lower",
            aspect="auto",
            extent=(-1, 1, 0, 1),
            cmap="RdBu_r",
            vmin=-bound,
            vmax=bound,
            interpolation="bilinear",
        )
        figure.colorbar(image, ax=panel)
        panel.set_title(title)
        panel.set_xlabel("x")
    figure.axes[0].set_ylabel("t")
    return figure

"""The training loss of every method against steps, gradients and seconds."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks.core.figures import draw_band, finish_losses, new_figure, styles

_AXES = {"steps": "steps", "gradients": "gradient-equivalents", "seconds": "time in seconds"}


def draw_curves(content: Mapping[str, Any]) -> Figure:
    """Draws the mean over the seeds, in a band from the least to the most."""
    figure = new_figure(13, 5)
    panels = figure.subplots(1, len(_AXES), sharey=True)
    for method, style in zip(content["methods"], styles(), strict=False):
        curve = method["curve"]
        for panel, axis in zip(panels, _AXES, strict=True):
            draw_band(panel, curve[axis], (curve["least"], curve["mean"], curve["most"]), method["method"], style)
    title = f"{content['title']}, batch {content['batch_size']}"
    finish_losses(figure, panels, _AXES.values(), "training loss, mini-batch average", title)
    return figure

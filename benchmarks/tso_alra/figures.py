"""The picture of the two-stage experiments."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.core.figures import draw_band, finish_losses, new_figure, styles


def draw_stages(content: Mapping[str, Any]) -> Figure:
    """Draws each method's test loss against epochs and seconds: mean over the seeds and its 95 % interval."""
    figure = new_figure(11, 5.5)
    panels = figure.subplots(1, 2, sharey=True)
    for (name, one), style in zip(content["methods"].items(), styles(), strict=False):
        mean, half_width = np.asarray(one["curve"])
        for panel, x in zip(panels, (np.arange(1, 1 + len(mean)), one["seconds"]), strict=True):
            draw_band(panel, x, (mean - half_width, mean, mean + half_width), name, style)
    label, title = "test loss (negative log-likelihood)", f"Fashion-MNIST, {content['network']}"
    finish_losses(figure, panels, ("epochs", "time in seconds"), label, title)
    return figure

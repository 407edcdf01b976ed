"""The pictures of the two-stage experiments."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.core.claims import mean_interval
from benchmarks.core.style import draw_band, finish_losses, new_figure, save, styles
from benchmarks.tso_alra.two_stages import Result


def plot_stages(path: Path, title: str, results: Sequence[Result]) -> None:
    """Draws the test loss of each family against epochs and seconds: mean over the seeds and its 95 % interval."""
    figure = new_figure(11, 5.5)
    panels = figure.subplots(1, 2, sharey=True)
    for result, style in zip(results, styles(), strict=False):
        for panel, axis in zip(panels, ("epochs", "seconds"), strict=True):
            x = np.mean([run.evaluations[axis] for run in result.final], axis=0)
            mean, half_width = mean_interval([run.evaluations["test_loss"] for run in result.final])
            draw_band(panel, x, np.array([mean - half_width, mean, mean + half_width]), result.family.name, style)
    finish_losses(figure, panels, ("epochs", "time in seconds"), "test loss (negative log-likelihood)", title)
    save(figure, path)

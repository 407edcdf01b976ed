"""The pictures of the comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.core.style import finish_losses, new_figure, save, styles
from benchmarks.core.training import Run

_AXES = {"steps": "steps", "gradients": "gradient-equivalents", "seconds": "time in seconds"}


def plot_curves(path: Path, title: str, runs: Mapping[str, Sequence[Run]]) -> None:
    """Draws the training loss against steps, gradients and seconds: mean over seeds, band from least to most."""
    figure = new_figure(13, 5)
    panels = figure.subplots(1, len(_AXES), sharey=True)
    for (name, method_runs), style in zip(runs.items(), styles(), strict=False):
        losses = np.array([run.curve["loss"] for run in method_runs])
        for panel, axis in zip(panels, _AXES, strict=True):
            x = np.mean([run.curve[axis] for run in method_runs], axis=0)
            panel.plot(x, losses.mean(axis=0), label=name, markevery=4, **style)
            panel.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    finish_losses(figure, panels, _AXES.values(), "training loss, mini-batch average", title)
    save(figure, path)

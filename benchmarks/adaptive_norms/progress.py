"""How far a training has come, from 0 to 1, whatever the task."""

from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.core.models import Batch
from benchmarks.core.task import SAMPLE, Task


def progress_of(task: Task) -> Callable[[Mapping[str, float]], float]:
    """Returns a function of what `Task.evaluate` measured: training accuracy, or share explained."""
    if "accuracy" in task.metrics:
        return lambda figures: figures["train_accuracy"]
    mean_image, perfect = reconstruction_bounds(task.data.train)
    return lambda figures: (mean_image - figures["train_loss"]) / (mean_image - perfect)


def reconstruction_bounds(batch: Batch) -> tuple[float, float]:
    """Returns the reconstruction loss of the mean image and that of a perfect reconstruction.

    Between them lies what an autoencoder can explain: 0 for the mean image, 1 for the images themselves.
    """
    images = np.asarray(batch.images[:SAMPLE], np.float64)
    return float(_entropy(images.mean(axis=0)).mean()), float(_entropy(images).mean())


def _entropy(share: np.ndarray) -> np.ndarray:
    """The cross-entropy of grey values with themselves."""
    inside = np.clip(share, 1e-12, 1 - 1e-12)
    return -inside * np.log(inside) - (1 - inside) * np.log1p(-inside)

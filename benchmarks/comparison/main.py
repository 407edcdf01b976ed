"""Trains a network with every method, each tuned over its grid on the same budget."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Literal

from benchmarks.comparison.curves import draw_curves
from benchmarks.comparison.results import headline_table, results_table, summarise, train_budget
from benchmarks.core import data, report
from benchmarks.core.cache import Cache
from benchmarks.core.figures import save
from benchmarks.core.methods import FULL_BATCH_METHODS, METHODS
from benchmarks.core.task import make_task
from benchmarks.core.tune import num_runs, tune_and_repeat

DEFAULTS = {
    ("digits", "mlp"): (40, 128),
    ("digits", "cnn"): (30, 128),
    ("digits", "autoencoder"): (60, 128),
    ("fashion-mnist", "mlp"): (8, 250),
    ("fashion-mnist", "cnn"): (3, 250),
    ("fashion-mnist", "autoencoder"): (4, 250),
}
"""Epochs' worth of gradients, and batch size: some minutes on two cores."""


@dataclasses.dataclass
class Options(report.Study):
    """Trains a network with every method, each tuned over its grid on the same budget, and draws the curves."""

    dataset: Literal["digits", "fashion-mnist"] = "digits"
    """Images to train on."""
    model: Literal["mlp", "cnn", "autoencoder"] = "mlp"
    """Network to train."""
    budget: float | None = None
    """Epochs' worth of gradients for each run (default: some minutes for all)."""
    batch_size: int | None = None
    """Images of a step; all training images: the methods for full batches (default: 128, or 250)."""
    seeds: int | None = None
    """Fresh seeds for the tuned methods (default: 3)."""

    def __post_init__(self) -> None:
        """Refuses numbers that are out of range."""
        for name in ("budget", "batch_size", "seeds"):
            number = getattr(self, name)
            if number is not None and not 0 < number < math.inf:
                raise data.DataError(f"--{name.replace('_', '-')} must be positive and finite, got {number}.")

    def run(self) -> None:
        """Trains, and writes `<dataset>-<model>.json`."""
        images = data.digits() if self.dataset == "digits" else data.fashion_mnist(self.data_dir)
        budget, batch_size = DEFAULTS[self.dataset, self.model]
        task = make_task(self.model, images, self.batch_size or batch_size)
        if task.batch_size > task.num_images:
            raise data.DataError(f"--batch-size {task.batch_size} is more than the {task.num_images} training images.")
        epochs = self.budget or (budget / 50 if self.quick else budget)
        gradients, num_seeds = epochs * task.steps_per_epoch, self.seeds or (1 if self.quick else 3)
        full_batch = task.batch_size == task.num_images
        methods = FULL_BATCH_METHODS if full_batch else METHODS
        with report.progress_bar(num_runs(methods, num_seeds)) as progress:
            train = functools.partial(train_budget, budget=gradients)
            about = {"budget": gradients}
            results = tune_and_repeat(task, methods, train, about, num_seeds, Cache(self.folder), progress)
        name = f"{self.dataset}-{self.model}{'-full-batch' * full_batch}"
        self.write(name, summarise(f"{self.dataset}, {self.model}", task, gradients, results))


def tables(folder: Path) -> dict[str, str]:
    """Returns a table for each summary."""
    return {name: results_table(content) for name, content in report.summaries(folder).items()}


def draw(folder: Path) -> None:
    """Draws the curves of each summary."""
    for name, content in report.summaries(folder).items():
        save(draw_curves(content), folder / f"{name}.png")


def headline(folder: Path) -> dict[str, str]:
    """Returns the README's table."""
    found = report.summaries(folder)
    columns = [found["digits-mlp-full-batch"], found["digits-mlp"], found["fashion-mnist-cnn"]]
    shown = ("SGD-momentum", "Adam", "PAL", "EDF-G k=1", "EDF-G k=8")
    return {"results": headline_table(columns, shown)}

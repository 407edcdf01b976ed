"""A task: a network, the loss it is trained on, what is reported of it, and its data."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

import optcurv
from benchmarks.core.data import Dataset, digest
from benchmarks.core.models import (
    Autoencoder,
    Batch,
    Cnn,
    Mlp,
    accuracy,
    classification_loss,
    reconstruction_loss,
)

SAMPLE = 10_000
"""The reported training loss is taken over this many training images, or all where there are fewer."""

Metric = Callable[[jax.Array, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """A network, the loss it is trained on, what is reported of it, and its data.

    Attributes:
      network: the Flax module.
      loss_fn: maps the network's outputs and the batch to a scalar, convex in the outputs.
      data: images to train, validate and test on.
      batch_size: of every step.
      metrics: what is reported beside the loss, by name.
    """

    network: nn.Module
    loss_fn: Metric
    data: Dataset
    batch_size: int = 128
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=lambda: {"accuracy": accuracy})

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What distinguishes the task from others; measurements are cached under it."""
        splits = [split for split in self.data if split is not None]
        about = {"network": repr(self.network), "loss": self.loss_fn.__name__, "data": digest(*splits)}
        return about | {"batch_size": self.batch_size}

    @property
    def num_images(self) -> int:
        """The number of training images."""
        return len(self.data.train.labels)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch; the images left over wait for another one."""
        return self.num_images // self.batch_size

    def init(self, key: jax.Array) -> optax.Params:
        """Returns fresh parameters."""
        return self.network.init(key, self.data.train.images[:1])["params"]

    def loss(self, batch: Batch) -> optcurv.Composite:
        """Returns the loss on a batch as a function of the parameters."""
        return optcurv.Composite(
            model_fn=lambda params: self.network.apply({"params": params}, batch.images),
            loss_fn=lambda outputs: self.loss_fn(outputs, batch),
        )

    def batches(self, seed: int) -> Iterator[np.ndarray]:
        """Yields the indices of each step's images, epoch after epoch, without end."""
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(self.num_images)[: self.steps_per_epoch * self.batch_size].astype(np.int32)
            yield from order.reshape(self.steps_per_epoch, self.batch_size)

    def evaluate(self, params: optax.Params, splits: Sequence[str] = ("train", "test")) -> dict[str, float]:
        """Returns the loss and the metrics on whole splits (of the training images, on the first `SAMPLE`)."""
        figures = {}
        for split in splits:
            batch = Batch(*(array[: SAMPLE if split == "train" else None] for array in getattr(self.data, split)))
            for name, value in self._figures(params, batch).items():
                figures[f"{split}_{name}"] = float(value)
        return figures

    @functools.cached_property
    def _figures(self) -> Callable[[optax.Params, Batch], dict[str, jax.Array]]:
        def figures(params: optax.Params, batch: Batch) -> dict[str, jax.Array]:
            outputs = self.loss(batch).model_fn(params)
            metrics = {name: metric(outputs, batch) for name, metric in self.metrics.items()}
            return {"loss": self.loss_fn(outputs, batch)} | metrics

        return jax.jit(figures)


MODELS = ("mlp", "cnn", "autoencoder")


def make_task(model: str, data: Dataset, batch_size: int) -> Task:
    """Returns the task of a name, small enough that many runs of it take minutes on two cores."""
    match model:
        case "mlp":
            return Task(Mlp(), classification_loss, data, batch_size)
        case "cnn":
            stride = 2 if data.train.images.shape[1] > 16 else 1
            return Task(Cnn(stride=stride), classification_loss, data, batch_size)
        case "autoencoder":
            return Task(Autoencoder(), reconstruction_loss, data, batch_size, metrics={})
    raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}.")

"""The networks whose loss surfaces are looked at, and what they are trained on."""

import dataclasses
import functools
import pydoc_data.topics
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import optcurv
from benchmarks.core.data import DataError, Dataset, digest
from benchmarks.core.models import Batch, accuracy, classification_loss

BATCH_SIZE = 64


def _convolution(x: jax.Array, width: int, size: int, batch_norm: bool, train: bool) -> jax.Array:
    """A square convolution, BatchNorm if wanted, ReLU."""
    x = nn.Conv(width, (size, size))(x)
    if batch_norm:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    return nn.relu(x)


class Vgg(nn.Module):
    """Blocks of 3x3 convolutions between poolings, after Simonyan and Zisserman (2015); returns logits."""

    blocks: tuple[tuple[int, ...], ...] = ((8,), (16,), (32, 32))
    hidden: int = 64
    num_classes: int = 10
    batch_norm: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps images to logits; in training BatchNorm takes the statistics of the images at hand."""
        x = images
        for block in self.blocks:
            for width in block:
                x = _convolution(x, width, 3, self.batch_norm, train)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.Dense(self.hidden)(x.reshape(x.shape[0], -1))
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.num_classes)(nn.relu(x))


class NetworkInNetwork(nn.Module):
    """Convolutions followed by two of 1x1, no dense layer, after Lin et al. (2014); returns logits."""

    blocks: tuple[tuple[int, int, int], ...] = ((8, 8, 8), (16, 16, 16))
    last: int = 32
    num_classes: int = 10
    batch_norm: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps images to logits; in training BatchNorm takes the statistics of the images at hand."""
        x = images
        for block in self.blocks:
            for width, size in zip(block, (3, 1, 1), strict=True):
                x = _convolution(x, width, size, self.batch_norm, train)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        for size in (3, 1):
            x = _convolution(x, self.last, size, self.batch_norm, train)
        return nn.Conv(self.num_classes, (1, 1))(x).mean(axis=(1, 2))


class LanguageModel(nn.Module):
    """An LSTM that predicts the next symbol of a text; returns logits at every position."""

    num_symbols: int
    width: int = 64

    @nn.compact
    def __call__(self, symbols: jax.Array, train: bool = False) -> jax.Array:
        """Maps symbols, of shape (n, positions), to logits of those that follow."""
        del train
        x = nn.Embed(self.num_symbols, self.width // 2)(symbols)
        x = nn.RNN(nn.OptimizedLSTMCell(self.width))(x)
        return nn.Dense(self.num_symbols)(x)


NUM_SYMBOLS = 64
_POSITIONS = 32


def read_text(folder: Path) -> Dataset:
    """Returns pieces of 32 characters to train on and others to test on, the labels being the next characters.

    They are those of ptb.train.txt and ptb.valid.txt, if the folder has them; else of the reference manual that Python
    brings along, every tenth of its topics for the test. Rare characters count as one symbol.

    Raises:
      DataError: if only one of the files is there.
    """
    files = [folder / f"ptb.{split}.txt" for split in ("train", "valid")]
    found = [path for path in files if path.is_file()]
    if found and found != files:
        raise DataError(f"{folder} has {found[0].name}, but not both of ptb.train.txt and ptb.valid.txt.")
    if found:
        train, test = (path.read_text(encoding="utf-8") for path in files)
    else:
        topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
        test = "".join(topics[::10])
        train = "".join(text for i, text in enumerate(topics) if i % 10)
    train, test = (re.sub(r"\s+", " ", text) for text in (train, test))
    known = [symbol for symbol, _ in Counter(train).most_common(NUM_SYMBOLS - 1)]
    codes = {symbol: code for code, symbol in enumerate(known)}
    return Dataset(*(_pieces(text, codes) for text in (train, test)))


def _pieces(text: str, codes: Mapping[str, int]) -> Batch:
    """Cuts a text, in an order drawn once, so that its first pieces are a sample of it."""
    symbols = np.array([codes.get(symbol, NUM_SYMBOLS - 1) for symbol in text], np.int32)
    count = (len(symbols) - 1) // _POSITIONS
    order = np.random.default_rng(0).permutation(count)
    here, following = (symbols[shift : shift + count * _POSITIONS].reshape(-1, _POSITIONS)[order] for shift in (0, 1))
    return Batch(jnp.asarray(here), jnp.asarray(following))


class Initialisation(NamedTuple):
    """Kernels drawn from a normal distribution; biases and BatchNorm's scales are left as they are."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"N({self.mean:g}, {self.deviation:g})"

    def draw(self, key: jax.Array, params: optax.Params) -> optax.Params:
        """Returns parameters like those given, with kernels drawn anew."""
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            self.mean + self.deviation * jax.random.normal(key, leaf.shape) if leaf.ndim > 1 else leaf
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, drawn)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network and what it is trained on.

    Attributes:
      name: as in tables and names of files.
      network: maps images or symbols to logits, given whether it is in training.
      train: examples to train on.
      test: others, all of which figures of the test are taken over.
      num_seen: of the training examples, the first so many: training losses are taken over them, and BatchNorm's
        statistics wherever a network is looked at.
    """

    name: str
    network: nn.Module
    train: Batch
    test: Batch
    num_seen: int

    @property
    def steps_per_epoch(self) -> int:
        """Of one gradient each, or two."""
        return len(self.train.labels) // BATCH_SIZE

    @functools.cached_property
    def seen(self) -> Batch:
        """The training examples that networks are looked at with."""
        with jax.ensure_compile_time_eval():  # it is kept, also when first asked for within a jit
            return Batch(*(array[: self.num_seen] for array in self.train))

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What tells the problem from others; a run is kept under it."""
        return {
            "name": self.name,
            "network": repr(self.network),
            "data": digest(self.train, self.test),
            "num_seen": self.num_seen,
            "batch_size": BATCH_SIZE,
        }

    def init(self, seed: int, initialisation: Initialisation | None = None) -> optax.Params:
        """Returns fresh parameters: Flax's own, or drawn otherwise."""
        key = jax.random.key(seed)
        params = self._init(key)
        return params if initialisation is None else initialisation.draw(key, params)

    @functools.cached_property
    def _init(self) -> Callable[[jax.Array], optax.Params]:
        return jax.jit(lambda key: self.network.init(key, self.train.images[:1])["params"])

    @functools.cached_property
    def _statistics(self) -> Any:
        """Of the shape of BatchNorm's, all zero; they say nothing."""
        shapes = jax.eval_shape(lambda: self.network.init(jax.random.key(0), self.train.images[:1]))
        with jax.ensure_compile_time_eval():
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.get("batch_stats", {}))

    def _apply_in_training(self, params: optax.Params, statistics: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": statistics}
        logits, changed = self.network.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, changed.get("batch_stats", {})

    def training_loss(self, batch: Batch) -> optcurv.Composite:
        """Returns the loss of a step as a function of the parameters; it does not depend on running statistics."""
        return optcurv.Composite(
            model_fn=lambda params: self._apply_in_training(params, self._statistics, batch.images)[0],
            loss_fn=lambda logits: classification_loss(logits, batch),
        )

    def logits(self, params: optax.Params) -> tuple[jax.Array, jax.Array]:
        """Returns logits on the seen training examples and on the test's, with statistics settled on the former."""
        train, _ = self._apply_in_training(params, self._statistics, self.seen.images)  # its own statistics, settled

        def after_step(statistics: Any) -> Any:
            return self._apply_in_training(params, statistics, self.seen.images)[1]

        statistics = self._statistics and optcurv.recomputed_batch_stats(after_step, self._statistics)
        variables: dict[str, Any] = {"params": params, "batch_stats": statistics}
        test = self.network.apply(variables, self.test.images)
        return train, test  # pyright: ignore[reportReturnType]: without `mutable`, apply returns the output alone

    def seen_loss(self, params: optax.Params) -> jax.Array:
        """Returns the training loss as surfaces show it."""
        return classification_loss(self.logits(params)[0], self.seen)

    def figures(self, params: optax.Params) -> dict[str, jax.Array]:
        """Returns loss and accuracy on seen training examples and on the test's."""
        result = {}
        splits = {"train": self.seen, "test": self.test}
        for (split, batch), logits in zip(splits.items(), self.logits(params), strict=True):
            result[f"{split}_loss"] = classification_loss(logits, batch)
            result[f"{split}_accuracy"] = accuracy(logits, batch)
        return result

"""The networks whose loss surfaces are looked at, and what they are trained on."""

import dataclasses
import functools
import pydoc_data.topics
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import optcurv
from benchmarks.core.data import DataError, Dataset
from benchmarks.core.models import NUM_CLASSES, Batch, accuracy, classification_loss, convolution
from benchmarks.core.task import Task

BATCH_SIZE = 64


class NetworkInNetwork(nn.Module):
    """Convolutions followed by two of 1x1, no dense layer, after Lin et al. (2014); returns logits."""

    blocks: tuple[tuple[int, int, int], ...] = ((8, 8, 8), (16, 16, 16))
    last: int = 32
    batch_norm: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps images to logits; `train` as in `Vgg`."""

        def convolutions(x: jax.Array, widths: Sequence[int], sizes: Sequence[int]) -> jax.Array:
            for width, size in zip(widths, sizes, strict=True):
                x = convolution(x, width, size, self.batch_norm, train)
            return x

        x = images
        for block in self.blocks:
            x = nn.max_pool(convolutions(x, block, (3, 1, 1)), (2, 2), strides=(2, 2))
        x = convolutions(x, (self.last, self.last), (3, 1))
        return nn.Conv(NUM_CLASSES, (1, 1))(x).mean(axis=(1, 2))


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
class SurfaceTask(Task):
    """A task whose network may have BatchNorm, and is looked at with the statistics of a part of the training examples.

    Attributes:
      name: as in tables and names of files.
      num_seen: the first so many of the training examples: training losses are taken over them, and BatchNorm's
        statistics wherever a network is looked at.
    """

    name: str = ""
    num_seen: int = 512

    @functools.cached_property
    def seen(self) -> Batch:
        """The training examples that networks are looked at with."""
        with jax.ensure_compile_time_eval():  # it is kept, also when first asked for within a jit
            return Batch(*(array[: self.num_seen] for array in self.data.train))

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What distinguishes the task from others; runs are cached under it."""
        return super().description | {"name": self.name, "num_seen": self.num_seen}

    def start(self, seed: int, initialisation: Initialisation | None = None) -> optax.Params:
        """Returns fresh parameters: Flax's own, or drawn otherwise."""
        key = jax.random.key(seed)
        params = self._init(key)
        return params if initialisation is None else initialisation.draw(key, params)

    @functools.cached_property
    def _init(self) -> Callable[[jax.Array], optax.Params]:
        return jax.jit(self.init)

    @functools.cached_property
    def _statistics(self) -> Any:
        """Of the shape of BatchNorm's, all zero; they say nothing."""
        shapes = jax.eval_shape(lambda: self.network.init(jax.random.key(0), self.data.train.images[:1]))
        with jax.ensure_compile_time_eval():
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.get("batch_stats", {}))

    def _apply_in_training(self, params: optax.Params, statistics: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": statistics}
        logits, changed = self.network.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits, changed.get("batch_stats", {})

    def loss(self, batch: Batch) -> optcurv.Composite:
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
        test = self.network.apply(variables, self.data.test.images)
        return train, test  # pyright: ignore[reportReturnType]: without `mutable`, apply returns the output alone

    def seen_loss(self, params: optax.Params) -> jax.Array:
        """Returns the training loss as surfaces show it."""
        return classification_loss(self.logits(params)[0], self.seen)

    def evaluate(self, params: optax.Params, splits: Sequence[str] = ("train", "test")) -> dict[str, float]:
        """Returns loss and accuracy on the seen training examples and on the test's."""
        figures = self._jitted_figures(params)
        return {name: float(value) for name, value in figures.items() if name.split("_")[0] in splits}

    @functools.cached_property
    def _jitted_figures(self) -> Callable[[optax.Params], dict[str, jax.Array]]:
        return jax.jit(self.figures)

    def figures(self, params: optax.Params) -> dict[str, jax.Array]:
        """Returns loss and accuracy on seen training examples and on the test's."""
        result = {}
        splits = {"train": self.seen, "test": self.data.test}
        for (split, batch), logits in zip(splits.items(), self.logits(params), strict=True):
            result[f"{split}_loss"] = classification_loss(logits, batch)
            result[f"{split}_accuracy"] = accuracy(logits, batch)
        return result

"""The networks, and the loss each is trained on."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import optcurv


class Batch(NamedTuple):
    """Images of shape (n, height, width, 1) in [0, 1], and integer labels of shape (n,)."""

    images: jax.Array
    labels: jax.Array


class Mlp(nn.Module):
    """Dense layers with ReLU; returns logits."""

    hidden: tuple[int, ...] = (256, 128)
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        x = images.reshape(images.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)


class Cnn(nn.Module):
    """Convolution, max-pool, convolution, average-pool, two dense layers; returns logits."""

    channels: tuple[int, int] = (8, 16)
    stride: int = 1
    hidden: int = 64
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        x = nn.relu(nn.Conv(self.channels[0], (3, 3), strides=self.stride)(images))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(self.channels[1], (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes)(x)


class Autoencoder(nn.Module):
    """Dense layers with tanh down to a linear code and up again; returns logits of the pixels."""

    hidden: tuple[int, ...] = (256, 64)
    code: int = 16

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits of the same shape."""
        x = images.reshape(images.shape[0], -1)
        num_pixels = x.shape[1]
        for width in self.hidden:
            x = nn.tanh(nn.Dense(width)(x))
        x = nn.Dense(self.code)(x)
        for width in reversed(self.hidden):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(num_pixels)(x).reshape(images.shape)


def classification_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Softmax cross-entropy, averaged over the batch."""
    return optcurv.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def reconstruction_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Sigmoid cross-entropy with the pixels, averaged over them and the batch."""
    return optax.sigmoid_binary_cross_entropy(logits, batch.images).mean()


def accuracy(logits: jax.Array, batch: Batch) -> jax.Array:
    """The share of images whose largest logit is the label's."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)


@dataclasses.dataclass(frozen=True)
class Task:
    """A network and what it is trained for.

    Attributes:
      network: the Flax module.
      loss_fn: maps the network's outputs and the batch to a scalar, convex in the outputs.
      has_accuracy: whether the outputs are logits of classes.
    """

    network: nn.Module
    loss_fn: Callable[[jax.Array, Batch], jax.Array]
    has_accuracy: bool

    @property
    def description(self) -> dict[str, str]:
        """What tells the task from others."""
        return {"network": repr(self.network), "loss": self.loss_fn.__name__}

    def init(self, key: jax.Array, batch: Batch) -> optax.Params:
        """Returns fresh parameters."""
        return self.network.init(key, batch.images[:1])["params"]

    def loss(self, batch: Batch) -> optcurv.Composite:
        """Returns the loss on a batch as a function of the parameters."""
        return optcurv.Composite(
            model_fn=lambda params: self.network.apply({"params": params}, batch.images),
            loss_fn=lambda outputs: self.loss_fn(outputs, batch),
        )


def make_task(model: str, image_size: int) -> Task:
    """Returns the task of a name, small enough that many runs of it take minutes on two cores."""
    match model:
        case "mlp":
            return Task(Mlp(), classification_loss, has_accuracy=True)
        case "cnn":
            return Task(Cnn(stride=2 if image_size > 16 else 1), classification_loss, has_accuracy=True)
        case "autoencoder":
            return Task(Autoencoder(), reconstruction_loss, has_accuracy=False)
    raise ValueError(f"model must be mlp, cnn or autoencoder, got {model!r}.")

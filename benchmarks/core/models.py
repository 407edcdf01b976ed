"""The networks that several studies train, and their losses."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import optcurv

NUM_CLASSES = 10


class Batch(NamedTuple):
    """Images of shape (n, height, width, 1) in [0, 1], and integer labels of shape (n,)."""

    images: jax.Array
    labels: jax.Array


class Mlp(nn.Module):
    """Dense layers with ReLU; returns logits."""

    hidden: tuple[int, ...] = (256, 128)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        x = images.reshape(images.shape[0], -1)
        return nn.Dense(NUM_CLASSES)(dense(x, self.hidden, nn.relu))


class Cnn(nn.Module):
    """Convolution, max-pool, convolution, average-pool, two dense layers; returns logits."""

    channels: tuple[int, int] = (8, 16)
    stride: int = 1
    hidden: int = 64

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits."""
        x = nn.relu(nn.Conv(self.channels[0], (3, 3), strides=self.stride)(images))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(self.channels[1], (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(NUM_CLASSES)(x)


class Vgg(nn.Module):
    """Blocks of 3x3 convolutions between poolings, after Simonyan and Zisserman (2015); returns logits."""

    blocks: tuple[tuple[int, ...], ...] = ((8,), (16,), (32, 32))
    hidden: tuple[int, ...] = (64,)
    batch_norm: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Maps images to logits; in training BatchNorm uses the statistics of these images."""
        x = images
        for block in self.blocks:
            for width in block:
                x = convolution(x, width, 3, self.batch_norm, train)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            x = normalised_relu(nn.Dense(width)(x), self.batch_norm, train)
        return nn.Dense(NUM_CLASSES)(x)


def dense(x: jax.Array, widths: Iterable[int], activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Dense layers, each with an activation; for use inside a compact module."""
    for width in widths:
        x = activation(nn.Dense(width)(x))
    return x


def convolution(x: jax.Array, width: int, size: int, batch_norm: bool, train: bool) -> jax.Array:
    """A square convolution, BatchNorm if wanted, ReLU; for use inside a compact module."""
    return normalised_relu(nn.Conv(width, (size, size))(x), batch_norm, train)


def normalised_relu(x: jax.Array, batch_norm: bool, train: bool) -> jax.Array:
    """BatchNorm if wanted, then ReLU; for use inside a compact module."""
    return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x) if batch_norm else x)


class Autoencoder(nn.Module):
    """Dense layers with tanh down to a linear code and up again; returns logits of the pixels."""

    hidden: tuple[int, ...] = (256, 64)
    code: int = 16

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits of the same shape."""
        x = images.reshape(images.shape[0], -1)
        code = nn.Dense(self.code)(dense(x, self.hidden, nn.tanh))
        return nn.Dense(x.shape[1])(dense(code, self.hidden[::-1], nn.tanh)).reshape(images.shape)


def classification_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Softmax cross-entropy, averaged over the batch."""
    return optcurv.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def reconstruction_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """Sigmoid cross-entropy with the pixels, averaged over them and the batch."""
    return optax.sigmoid_binary_cross_entropy(logits, batch.images).mean()


def accuracy(logits: jax.Array, batch: Batch) -> jax.Array:
    """The share of images whose largest logit is the label's."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == batch.labels)

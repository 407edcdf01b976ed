"""Gradients at the outputs for labels drawn from a model's own predictions, for its true Fisher matrix."""

from collections.abc import Callable
from typing import TypeAlias

import jax

from optcurv.arguments import PyTree

OutputGradientSampler: TypeAlias = Callable[[jax.Array, PyTree], PyTree]
"""Draws labels from a model's predictions: maps a random key and the outputs to the gradient, by the outputs, of the
mean negative log-likelihood of labels so drawn."""


def sample_categorical_gradients(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns the gradient of the mean cross-entropy for classes drawn from the softmax of each row.

    Args:
      key: a random key.
      logits: `(..., classes)`.

    Returns:
      The gradient by the logits.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> print(optcurv.sample_categorical_gradients(jax.random.key(0), jnp.array([[100.0, 0.0]])))
      [[0. 0.]]
    """
    labels = jax.random.categorical(key, logits)
    probabilities = jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return probabilities / labels.size


def sample_gaussian_gradients(key: jax.Array, outputs: jax.Array) -> jax.Array:
    """Returns the gradient of half the mean squared distance to targets drawn around the outputs with unit variance.

    Args:
      key: a random key.
      outputs: `(examples, ...)`; the distance is summed over all other axes.

    Returns:
      The gradient by the outputs.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> print(optcurv.sample_gaussian_gradients(jax.random.key(0), jnp.zeros((4, 3))).shape)
      (4, 3)
    """
    return jax.random.normal(key, outputs.shape, outputs.dtype) / outputs.shape[0]

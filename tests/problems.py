"""Small closed-form problems for the tests; none needs Flax or data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optcurv


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array


def quadratic(condition=100.0, size=6, dtype=jnp.float32):
    """Returns `(params, loss)`: L(w) = 1/2 (w - 1)' A (w - 1) over two leaves, A rotated, of the given condition."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(size, size)))
    root = jnp.asarray(np.diag(np.geomspace(1.0, condition, size) ** 0.5) @ rotation, dtype)

    def model_fn(params):
        return root @ (jnp.concatenate([params["a"], params["b"]]) - 1)

    params = {"a": jnp.zeros(size // 2, dtype), "b": jnp.zeros(size - size // 2, dtype)}
    return params, optcurv.Composite(model_fn, lambda residuals: 0.5 * jnp.sum(residuals**2))


def blobs(seed=0, size=32, dtype=jnp.float32):
    """Returns a batch of three overlapping Gaussian blobs in four dimensions."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(3, 4)) * 2
    labels = rng.integers(0, 3, size)
    return Batch(jnp.asarray(centres[labels] + rng.normal(size=(size, 4)), dtype), jnp.asarray(labels))


def network_params(seed=0, dtype=jnp.float32, hidden=8):
    """Returns the leaves of a one-hidden-layer network, keyed so that their sorted order is the forward one."""
    rng = np.random.default_rng(seed)
    return {
        "a_kernel": jnp.asarray(rng.normal(size=(4, hidden)) * 0.5, dtype),
        "b_bias": jnp.asarray(rng.normal(size=hidden) * 0.1, dtype),
        "c_kernel": jnp.asarray(rng.normal(size=(hidden, 3)) * 0.5, dtype),
        "d_scale": jnp.asarray(1.0, dtype),
    }


def network(params, x):
    """A tanh network that reads the leaves of `params` in order, whatever their container."""
    kernel, bias, head, scale = jax.tree.leaves(params)
    return scale * (jnp.tanh(x.astype(kernel.dtype) @ kernel + bias) @ head)


def regression_params(seed=0, dtype=jnp.float32):
    """Returns the leaves of a softmax regression, for laws that compile much and need no hidden layer."""
    kernel = np.random.default_rng(seed).normal(size=(4, 3))
    return {"bias": jnp.zeros(3, dtype), "kernel": jnp.asarray(kernel, dtype)}


def regression_loss(batch):
    """The mean cross-entropy of a softmax regression on a batch, as a composite."""

    def model_fn(params):
        bias, kernel = jax.tree.leaves(params)
        return batch.x.astype(kernel.dtype) @ kernel + bias

    return optcurv.Composite(model_fn, lambda logits: cross_entropy(logits, batch.y))


def cross_entropy(logits, labels):
    """As short as may be, as its derivatives are in all that the tests compile; it overflows from logits of 89 on."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    correct = jnp.where(labels[:, None] == jnp.arange(logits.shape[1]), logits, 0)
    return jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=1)) - jnp.sum(correct, axis=1))


def network_loss(batch):
    """The mean cross-entropy of `network` on a batch, as a composite."""
    return optcurv.Composite(lambda params: network(params, batch.x), lambda logits: cross_entropy(logits, batch.y))

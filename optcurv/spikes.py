"""Spikes, gradients far larger than usual: refused the first time, and forgotten afterwards."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, at_least_float32, wide_dtype

_SPIKE = 1e3  # times the largest gradient so far
_FORGOTTEN = 1e-6  # of it


class Watch(NamedTuple):
    """What has been seen of the gradients.

    Attributes:
      largest: their largest entry since the last spike. Unlike the norm it does not overflow.
      spike: the largest entry of the last gradient if that was refused, otherwise 0.
      refused: whether the last gradient was refused.
      after_spike: whether the last gradient was so small that the largest before it must have been a spike. Averages
        that contain the spike are then worthless.
    """

    largest: jax.Array
    spike: jax.Array
    refused: jax.Array
    after_spike: jax.Array


def start_watch(params: PyTree) -> Watch:
    """Returns the watch before the first gradient."""
    dtype = wide_dtype(params)
    return Watch(jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.zeros((), bool), jnp.zeros((), bool))


def look(watch: Watch, gradient: PyTree) -> Watch:
    """Looks at the next gradient.

    One a thousand times as large as any before is refused, unless another as large was just refused. One that is not
    finite changes nothing. A gradient of zero, as of a batch without weight, is not taken for the end of a spike.
    """
    real = [leaf for leaf in jax.tree.leaves(gradient) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    size = jnp.asarray(optax.tree.norm(at_least_float32(real), ord="inf"), watch.largest.dtype)
    refused = (size / _SPIKE > jnp.maximum(watch.largest, watch.spike)) & (watch.largest > 0)
    after_spike = (size > 0) & (size < _FORGOTTEN * watch.largest)
    largest = jnp.where(after_spike, size, jnp.maximum(watch.largest, size))
    usable = jnp.isfinite(size) & ~refused
    spike = jnp.where(refused & jnp.isfinite(size), size, 0.0).astype(size.dtype)
    return Watch(jnp.where(usable, largest, watch.largest), spike, refused, after_spike)


def keep_usable(
    watch: Watch, updates: PyTree, state: PyTree, previous_state: PyTree
) -> tuple[PyTree, PyTree, jax.Array]:
    """Discards what a transformation made of a refused gradient, and what is not finite.

    Args:
      watch: the state after this gradient.
      updates: what the transformation returned.
      state: likewise.
      previous_state: the transformation's state before.

    Returns:
      The updates, or zeros; the state, or the previous one; and whether the updates are used.
    """

    def stays_finite(new: jax.Array, old: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(jnp.result_type(new), jnp.floating)
        return jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old)) if floating else jnp.ones((), bool)

    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates)]
    finite += jax.tree.leaves(jax.tree.map(stays_finite, state, previous_state))
    used = jnp.all(jnp.stack(finite)) & ~watch.refused
    updates = optax.tree.where(used, updates, optax.tree.zeros_like(updates))
    return updates, optax.tree.where(used, state, previous_state), used

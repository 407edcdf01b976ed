"""Running averages of the statistics of batches, guarded against spikes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optcurv.kronecker.factors import Factors

_OUTLIER = 1e4  # times the average; statistics beyond it are averaged in only if a second batch confirms them
PROBATION = 10  # batches within which averages are given up again if they turn out to be those of a spike


class Statistics(NamedTuple):
    """The statistics of one batch, or their averages.

    Attributes:
      factors: of each layer, by the path of its kernel.
      squares: squared gradients of the other parameters, by path.
    """

    factors: dict[str, Factors]
    squares: dict[str, jax.Array]


class Averages(NamedTuple):
    """Averages over batches, not debiased.

    Attributes:
      statistics: the averages.
      weight: the sum of the weights of all batches; less than one at first.
      num_averaged: batches averaged in since the averages last started afresh, counted up to ten; at first it is ten.
      refused: whether the last batch was kept out.
    """

    statistics: Statistics
    weight: jax.Array
    num_averaged: jax.Array
    refused: jax.Array


def average(before: Averages, now: Statistics, decay: jax.Array) -> Averages:
    """Averages a batch in, unless it is not finite, or far from the averages without the batch before being so too.

    If two batches in a row are far from the averages, those that they are far from start afresh.
    """
    like_this = optax.tree.scale(before.weight, now)  # the averages if all batches had been like this one
    early = before.num_averaged < PROBATION
    odd = jax.tree.map(lambda a, b: _far_above(a, b) | (_far_above(b, a) & early), like_this, before.statistics)
    any_odd = functools.reduce(jnp.logical_or, jax.tree.leaves(odd), jnp.zeros((), bool))
    start = jax.tree.map(jnp.where, odd, like_this, before.statistics)
    mixed = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, start, now)
    usable = jnp.isfinite(optax.tree.sum(mixed)) & ~(any_odd & ~before.refused)
    num_averaged = jnp.where(any_odd, 1, jnp.minimum(before.num_averaged + 1, PROBATION))
    return Averages(
        statistics=optax.tree.where(usable, optax.tree.cast_like(mixed, before.statistics), before.statistics),
        weight=jnp.where(usable, decay * before.weight + 1 - decay, before.weight),
        num_averaged=jnp.where(usable, num_averaged, before.num_averaged),
        refused=~usable,
    )


def _far_above(one: jax.Array, other: jax.Array) -> jax.Array:
    """Whether a statistic is far above another that is not zero; its largest entry is a matrix's largest variance."""
    return (jnp.max(other) > 0) & (jnp.max(one) > _OUTLIER * jnp.max(other))

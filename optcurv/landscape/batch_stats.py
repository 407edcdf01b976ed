"""Statistics of BatchNorm at other parameters than those they were gathered at."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree


def recomputed_batch_stats(update_fn: Callable[[PyTree], PyTree], statistics: PyTree) -> PyTree:
    r"""Returns the running statistics that a training step would leave unchanged.

    BatchNorm's running averages belong to the parameters they were taken at; between networks there are none. In a
    `value_fn` this recomputes them from given data at each point. One step maps each running average s to
    :math:`m s + (1 - m)\, b`, with the data's own statistic b and a momentum m < 1; this returns b, without
    needing to know m.

    Args:
      update_fn: maps running statistics to those after one training step on the given data.
      statistics: any, in the structure that `update_fn` takes; only structure, shapes and dtypes matter.

    Returns:
      The statistics of the data.

    Example:
      With a Flax network: `recomputed_batch_stats(lambda s: net.apply({"params": p, "batch_stats": s}, x, train=True,
      mutable="batch_stats")[1]["batch_stats"], batch_stats)`.

      >>> import jax.numpy as jnp, optcurv
      >>> update = lambda s: {"mean": 0.75 * s["mean"] + 0.25 * 3.0}
      >>> print(optcurv.recomputed_batch_stats(update, {"mean": jnp.zeros(2)}))
      {'mean': Array([3., 3.], dtype=float32)}
    """
    # Compiled together, all need one forward pass: what a training step adds does not depend on running statistics.
    at_zero, at_one = (update_fn(like(statistics)) for like in (optax.tree.zeros_like, optax.tree.ones_like))
    rates = jax.tree.map(lambda zero, one: 1 - (one - zero), at_zero, at_one)
    settled = jax.tree.map(jnp.divide, at_zero, rates)
    # Once more, for the digits that the difference of large numbers lost.
    return jax.tree.map(lambda old, new, rate: old + (new - old) / rate, settled, update_fn(settled), rates)

"""How much two networks differ, by their outputs and by the loss between them."""

import jax
import jax.numpy as jnp


def functional_distance(outputs_a: jax.typing.ArrayLike, outputs_b: jax.typing.ArrayLike) -> jax.Array:
    r"""The root mean square distance between the outputs of two networks on the same examples.

    .. math:: \sqrt{\frac{1}{n} \sum_{i=1}^{n} \|F(x_i, \theta_a) - F(x_i, \theta_b)\|^2}

    (section 4.1 of "An empirical analysis of the optimization of deep network loss surfaces", where F is the
    network's output.)

    Args:
      outputs_a: of one network, of shape (n, ...), such as class probabilities.
      outputs_b: of the other, likewise.

    Returns:
      A scalar.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> print(optcurv.functional_distance(jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([[4.0, 0.0], [1.0, 3.0]])))
      3.0
    """
    a, b = _same_shape(outputs_a, outputs_b)
    return jnp.sqrt(jnp.sum((a - b) ** 2) / a.shape[0])


def label_disagreement(outputs_a: jax.typing.ArrayLike, outputs_b: jax.typing.ArrayLike) -> jax.Array:
    """The share of examples that two classifiers put into different classes.

    Args:
      outputs_a: logits or probabilities of one, of shape (n, classes).
      outputs_b: of the other, likewise.

    Returns:
      A scalar in [0, 1].

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> print(optcurv.label_disagreement(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]])))
      0.5
    """
    a, b = _same_shape(outputs_a, outputs_b)
    return jnp.mean(jnp.argmax(a, axis=-1) != jnp.argmax(b, axis=-1), dtype=jnp.float32)


def _same_shape(a: jax.typing.ArrayLike, b: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    a, b = jnp.asarray(a), jnp.asarray(b)
    if a.shape != b.shape or a.ndim == 0:
        raise ValueError(f"Outputs must be of the same shape (n, ...), got {a.shape} and {b.shape}.")
    return a, b


def basin_width(distances: jax.typing.ArrayLike, losses: jax.typing.ArrayLike, threshold: float) -> jax.Array:
    """The length of the interval around a line's least loss on which the loss stays below a threshold.

    The basins of Figs. 5 and 6 of "An empirical analysis of the optimization of deep network loss surfaces" as a
    number. Crossings of the threshold are interpolated linearly; where there is none before the line ends, the interval
    ends there.

    Args:
      distances: of shape (n,), ascending: coefficients for the relative size, `absolute_line`'s for the absolute one.
      losses: of shape (n,).
      threshold: in the unit of the losses.

    Returns:
      The width, in the unit of `distances`; 0 if the least loss is not below the threshold.

    Raises:
      ValueError: if the shapes differ or are not (n,).

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> x = jnp.linspace(-3.0, 3.0, 601)
      >>> print(optcurv.basin_width(x, x**2, threshold=1.0).round(3))
      2.0
    """
    x, y = _curve(distances, losses)
    lowest = jnp.nanargmin(y)
    above = ~(y < threshold)  # where it is not a number too
    index = jnp.arange(x.size)
    left = jnp.max(jnp.where(above & (index < lowest), index, -1))
    right = jnp.min(jnp.where(above & (index > lowest), index, x.size))

    def crossing(outside: jax.Array, inside: jax.Array) -> jax.Array:
        outside = jnp.clip(outside, 0, x.size - 1)
        share = jnp.nan_to_num((threshold - y[inside]) / (y[outside] - y[inside]), nan=0.0)
        return x[inside] + share * (x[outside] - x[inside])  # the same point where the line ends

    width = crossing(right, right - 1) - crossing(left, left + 1)
    return jnp.where(above[lowest], 0.0, width)


def barrier_height(losses: jax.typing.ArrayLike) -> jax.Array:
    r"""How far the loss on the line between two points rises above the straight line between their losses.

    .. math:: \max_i\; L(\alpha_i) - \bigl((1 - \alpha_i) L(0) + \alpha_i L(1)\bigr)

    for equally spaced :math:`\alpha_i` from 0 to 1. Zero means that the points are linearly connected.

    Args:
      losses: of shape (n,), from one point to the other.

    Returns:
      The height, in the unit of the losses.

    Raises:
      ValueError: if the shape is not (n,).

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> print(optcurv.barrier_height(jnp.array([1.0, 5.0, 2.0])))
      3.5
    """
    _, y = _curve(jnp.linspace(0.0, 1.0, jnp.size(losses)), losses)
    return jnp.max(y - jnp.linspace(y[0], y[-1], y.size))


def _curve(x: jax.typing.ArrayLike, y: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.ndim != 1 or x.shape != y.shape or x.size == 0:
        raise ValueError(f"Distances and losses must be of the same shape (n,), got {x.shape} and {y.shape}.")
    return x, y

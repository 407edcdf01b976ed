"""Directions in the space of parameters, and where points lie along them."""

from collections.abc import Iterable, Sequence

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, by_path, difference
from optcurv.kronecker.layers import Layers


def random_direction(key: chex.PRNGKey, params: PyTree, *, layers: Layers | None = None) -> PyTree:
    r"""Draws a direction whose filters are as long as the parameters'.

    Each filter, all weights that lead to one output, is Gaussian noise scaled to the norm of that filter of `params`
    (Li et al. 2018, "Visualizing the loss landscape of neural nets"); biases and scales get zeros. Slices can
    then be compared between networks whose layers could be rescaled without changing their outputs.

    Args:
      key: of `jax.random`.
      params: parameters, any pytree of real arrays.
      layers: `optcurv.layers(loss, params)`, which knows the outputs of each kernel: needed for kernels with the
        outputs first (equinox, PyTorch), with several axes of outputs (attention), or stacked (`nn.scan`). Parameters
        in no layer get zeros. Default: the last axis of each array of two or more axes is taken for the outputs'.

    Returns:
      A pytree like `params`.

    Raises:
      TypeError: if `layers` is anything else.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
      >>> direction = optcurv.random_direction(jax.random.key(0), params)
      >>> print(jnp.linalg.norm(direction["kernel"], axis=0).round(4), direction["bias"])
      [5. 2.] [0. 0.]
      >>> loss = lambda p: jnp.sum(jnp.ones((3, 2)) @ p["kernel"].T + p["bias"])  # outputs first
      >>> direction = optcurv.random_direction(jax.random.key(0), params, layers=optcurv.layers(loss, params))
      >>> print(jnp.linalg.norm(direction["kernel"], axis=1).round(4))
      [3.     4.4721]
    """
    if layers is not None and not isinstance(layers, Layers):
        raise TypeError(f"layers must be what optcurv.layers(loss, params) returns, got {type(layers).__name__}.")
    leaves = by_path(params)
    keys = dict(zip(leaves, jax.random.split(key, len(leaves)), strict=True))

    def draw(path: str, kernel: jax.Array) -> jax.Array:
        """Of a kernel arranged as (stack, in, out)."""
        noise = jax.random.normal(keys[path], kernel.shape, kernel.dtype)
        return noise * (jnp.linalg.norm(kernel, axis=1, keepdims=True) / jnp.linalg.norm(noise, axis=1, keepdims=True))

    drawn = optax.tree.zeros_like(leaves)
    if layers is None:
        for path, leaf in leaves.items():
            if leaf.ndim > 1:
                drawn[path] = draw(path, leaf.reshape(1, -1, leaf.shape[-1])).reshape(leaf.shape)
    else:
        for layer in layers.found:
            kernel, *bias = layer.parts(leaves)
            drawn |= layer.leaves((draw(layer.path, kernel), *map(jnp.zeros_like, bias)), leaves)
    return jax.tree.unflatten(jax.tree.structure(params), [drawn[path] for path in leaves])


def plane_coordinates(center: PyTree, directions: Sequence[PyTree], points: Iterable[PyTree]) -> jax.Array:
    r"""Projects points onto a plane, such as those that an optimiser passed through.

    .. math:: \arg\min_{x, y} \|\theta + x\, d_1 + y\, d_2 - p\|

    Args:
      center: θ, parameters, any pytree.
      directions: d₁ and d₂, of the structure and shapes of `center`, not parallel.
      points: p, likewise.

    Returns:
      The coordinates x and y of each point, of shape (points, 2), for `optcurv.plane`'s axes.

    Raises:
      ValueError: if structures or shapes differ, there are not two directions, or they are parallel.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> axes = jnp.array([2.0, 0.0, 0.0]), jnp.array([1.0, 1.0, 0.0])
      >>> print(optcurv.plane_coordinates(jnp.zeros(3), axes, [jnp.array([3.0, 1.0, 5.0])]))
      [[1. 1.]]
    """
    check_two(directions)
    gram = jnp.array([[optax.tree.vdot(one, other) for one in directions] for other in directions])
    if not jnp.linalg.det(gram) > 1e-6 * gram[0, 0] * gram[1, 1]:
        raise ValueError("directions must not be parallel or zero.")
    slopes = []
    for point in points:
        check_same_layout((center, *directions, point))
        offset = optax.tree.sub(point, center)
        slopes.append(jnp.stack([optax.tree.vdot(direction, offset) for direction in directions]))
    return jnp.linalg.solve(gram, jnp.stack(slopes).T).T


def check_two(directions: Sequence[PyTree]) -> None:
    """Raises unless there are two directions."""
    if len(directions) != 2:
        raise ValueError(f"directions must be two, got {len(directions)}.")


def check_same_layout(trees: Sequence[PyTree]) -> None:
    """Raises unless trees have the same structure and shapes."""
    first, *others = trees
    for other in others:
        if problem := difference("another", other, "the first", first):
            raise ValueError(f"All points must have the same structure and shapes, but {problem}.")

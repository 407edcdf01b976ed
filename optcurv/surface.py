"""Slices of the loss surface. Functions return arrays; they never draw."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, check_count
from optcurv.taps import Layers

SliceFn = Callable[..., PyTree]
"""Maps parameters, or parameters and a batch, to a number or any pytree of metrics."""


def line(
    value_fn: SliceFn,
    start: PyTree,
    end: PyTree,
    coefficients: jax.typing.ArrayLike,
    *,
    batches: Iterable[PyTree] | None = None,
    num_at_once: int = 1,
) -> PyTree:
    r"""Evaluates a function on the line through two points.

    .. math:: \theta(\alpha) = (1 - \alpha)\, \theta_{start} + \alpha\, \theta_{end}

    (Eq. 2 of "An empirical analysis of the optimization of deep network loss surfaces", after Goodfellow et al. 2015).
    Points are made and evaluated one after the other in one jitted loop: memory does not grow with their number.

    Args:
      value_fn: a loss, or any pure function of the parameters that returns a pytree of arrays, such as training loss,
        test loss and accuracy at once; compiled once. With `batches`, a function of parameters and batch.
      start: parameters, any pytree; α = 0.
      end: parameters of the same structure and shapes; α = 1.
      coefficients: α, of shape (n,); values outside of [0, 1] lie beyond the ends.
      batches: of a data set too large for one; values are averaged, each batch in proportion to the leading axis of its
        first array. For a progress bar wrap them: `rich.progress.track(batches)`.
      num_at_once: points evaluated together, default 1: more is faster where one does not fill the device.

    Returns:
      What `value_fn` returns, with n entries along a new first axis; NaN where it was not finite stays in it.

    Raises:
      ValueError: if the points differ in structure or shapes, or there is no coefficient or no batch.
      TypeError: if `value_fn` is no function.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss = lambda w: jnp.sum(w**2)
      >>> print(optcurv.line(loss, jnp.array([1.0]), jnp.array([-1.0]), jnp.linspace(0.0, 1.5, 4)))
      [1. 0. 1. 4.]
    """
    alpha = _coefficients("coefficients", coefficients)
    return _evaluate(value_fn, (start, end), jnp.stack([1 - alpha, alpha], axis=-1), batches, num_at_once)


def absolute_line(
    value_fn: SliceFn,
    start: PyTree,
    end: PyTree,
    distances: jax.typing.ArrayLike,
    *,
    batches: Iterable[PyTree] | None = None,
    num_at_once: int = 1,
) -> PyTree:
    r"""Evaluates a function on the line through two points, by the distance from the first.

    .. math:: \theta(\lambda) = \theta_{start}
        + \lambda \frac{\theta_{end} - \theta_{start}}{\|\theta_{end} - \theta_{start}\|}

    (Eq. 1 of "An empirical analysis of the optimization of deep network loss surfaces", where it leads from what an
    optimiser found towards where it began.)

    Args:
      value_fn: as for `optcurv.line`.
      start: parameters, any pytree; λ = 0.
      end: parameters of the same structure and shapes.
      distances: λ, of shape (n,), in units of the parameters; negative ones lead away from `end`.
      batches: as for `optcurv.line`.
      num_at_once: likewise.

    Returns:
      As `optcurv.line`.

    Raises:
      ValueError: as `optcurv.line`, and if the points are the same.
      TypeError: if `value_fn` is no function.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss = lambda w: jnp.sum(w**2)
      >>> print(optcurv.absolute_line(loss, jnp.array([0.0, 0.0]), jnp.array([3.0, 4.0]), jnp.array([-1.0, 5.0])))
      [ 1. 25.]
    """
    _check_same_layout((start, end))
    length = float(optax.tree.norm(optax.tree.sub(end, start)))
    if length == 0:
        raise ValueError("start and end are the same point and give no direction.")
    share = _coefficients("distances", distances) / length
    return line(value_fn, start, end, share, batches=batches, num_at_once=num_at_once)


def bilinear(
    value_fn: SliceFn,
    vertices: Sequence[PyTree],
    alphas: jax.typing.ArrayLike,
    betas: jax.typing.ArrayLike,
    *,
    batches: Iterable[PyTree] | None = None,
    num_at_once: int = 1,
) -> PyTree:
    r"""Evaluates a function on the surface that four points span.

    .. math:: \theta(\alpha, \beta) = \beta \bigl(\alpha \theta_1 + (1 - \alpha) \theta_2\bigr)
        + (1 - \beta) \bigl(\alpha \theta_3 + (1 - \alpha) \theta_4\bigr)

    (Eqs. 3 to 5 of "An empirical analysis of the optimization of deep network loss surfaces", which announces the
    points as θ₀ to θ₃.)

    Args:
      value_fn: as for `optcurv.line`.
      vertices: θ₁ to θ₄, at (α, β) = (1, 1), (0, 1), (1, 0) and (0, 0); of the same structure and shapes.
      alphas: α, of shape (n,).
      betas: β, of shape (m,).
      batches: as for `optcurv.line`.
      num_at_once: likewise.

    Returns:
      What `value_fn` returns, with two new first axes, (n, m).

    Raises:
      ValueError: as `optcurv.line`, and if there are not four vertices.
      TypeError: if `value_fn` is no function.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> corners = [jnp.array(corner) for corner in (1.0, 2.0, 3.0, 4.0)]
      >>> print(optcurv.bilinear(lambda w: w, corners, jnp.array([0.0, 1.0]), jnp.array([0.0, 0.5, 1.0])))
      [[4. 3. 2.]
       [3. 2. 1.]]
    """
    _check_number_of_vertices(vertices, 4)
    alpha, beta = _grid(alphas, betas)
    weights = [beta * alpha, beta * (1 - alpha), (1 - beta) * alpha, (1 - beta) * (1 - alpha)]
    return _evaluate(value_fn, vertices, jnp.stack(weights, axis=-1), batches, num_at_once)


def barycentric(
    value_fn: SliceFn,
    vertices: Sequence[PyTree],
    alphas: jax.typing.ArrayLike,
    betas: jax.typing.ArrayLike,
    *,
    batches: Iterable[PyTree] | None = None,
    num_at_once: int = 1,
) -> PyTree:
    r"""Evaluates a function on the plane through three points, between two rays from the first.

    .. math:: \theta(\alpha, \beta) = \theta_0 + \alpha \bigl(\beta (\theta_1 - \theta_0)
        + (1 - \beta) (\theta_2 - \theta_0)\bigr)

    (Eqs. 6 to 8 of "An empirical analysis of the optimization of deep network loss surfaces".)

    Args:
      value_fn: as for `optcurv.line`.
      vertices: θ₀ (α = 0), θ₁ (α = β = 1) and θ₂ (α = 1, β = 0); of the same structure and shapes.
      alphas: α, of shape (n,); beyond 1 they leave the triangle.
      betas: β, of shape (m,).
      batches: as for `optcurv.line`.
      num_at_once: likewise.

    Returns:
      What `value_fn` returns, with two new first axes, (n, m).

    Raises:
      ValueError: as `optcurv.line`, and if there are not three vertices.
      TypeError: if `value_fn` is no function.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> corners = [jnp.array(corner) for corner in (0.0, 1.0, 2.0)]
      >>> print(optcurv.barycentric(lambda w: w, corners, jnp.array([0.0, 1.0]), jnp.array([0.0, 0.5, 1.0])))
      [[0.  0.  0. ]
       [2.  1.5 1. ]]
    """
    _check_number_of_vertices(vertices, 3)
    alpha, beta = _grid(alphas, betas)
    weights = jnp.stack([1 - alpha, alpha * beta, alpha * (1 - beta)], axis=-1)
    return _evaluate(value_fn, vertices, weights, batches, num_at_once)


def plane(
    value_fn: SliceFn,
    center: PyTree,
    directions: Sequence[PyTree],
    xs: jax.typing.ArrayLike,
    ys: jax.typing.ArrayLike,
    *,
    batches: Iterable[PyTree] | None = None,
    num_at_once: int = 1,
) -> PyTree:
    r"""Evaluates a function on a plane, :math:`\theta(x, y) = \theta + x\, d_1 + y\, d_2`.

    Args:
      value_fn: as for `optcurv.line`.
      center: θ, parameters, any pytree.
      directions: d₁ and d₂, of the structure and shapes of `center`, such as two `optcurv.random_direction`s or leading
        eigenvectors.
      xs: x, of shape (n,).
      ys: y, of shape (m,).
      batches: as for `optcurv.line`.
      num_at_once: likewise.

    Returns:
      What `value_fn` returns, with two new first axes, (n, m).

    Raises:
      ValueError: as `optcurv.line`, and if there are not two directions.
      TypeError: if `value_fn` is no function.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss, center = (lambda w: w @ jnp.array([1.0, 10.0])), jnp.array([1.0, 0.0])
      >>> axes = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> print(optcurv.plane(loss, center, axes, jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0])))
      [[ 1. 21.]
       [ 2. 22.]]
    """
    _check_two(directions)
    x, y = _grid(xs, ys)
    weights = jnp.stack([jnp.ones_like(x), x, y], axis=-1)
    return _evaluate(value_fn, (center, *directions), weights, batches, num_at_once)


def random_direction(key: chex.PRNGKey, params: PyTree, *, layers: Layers | None = None) -> PyTree:
    r"""Draws a direction whose filters are as long as the parameters'.

    Each filter, all weights that lead to one output, is Gaussian noise scaled to the norm of that filter of `params`
    (Li et al. 2018, "Visualizing the loss landscape of neural nets"); biases and scales stay where they are. So slices
    of networks whose layers could be rescaled without changing their outputs can be compared.

    Args:
      key: of `jax.random`.
      params: parameters, any pytree of real arrays.
      layers: `optcurv.layers(loss, params)`, which knows the outputs of each kernel: needed for kernels with the
        outputs first (equinox, PyTorch), with several axes of outputs (attention), or stacked (`nn.scan`). Parameters
        in no layer stay where they are. Default: the last axis of each array of two axes or more is the outputs'.

    Returns:
      A pytree like `params`.

    Raises:
      TypeError: if `layers` is something else.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
      >>> direction = optcurv.random_direction(jax.random.key(0), params)
      >>> print(jnp.linalg.norm(direction["kernel"], axis=0), direction["bias"])
      [5. 2.] [0. 0.]
      >>> loss = lambda p: jnp.sum(jnp.ones((3, 2)) @ p["kernel"].T + p["bias"])  # outputs first
      >>> direction = optcurv.random_direction(jax.random.key(0), params, layers=optcurv.layers(loss, params))
      >>> print(jnp.linalg.norm(direction["kernel"], axis=1).round(4))
      [3.     4.4721]
    """
    if layers is not None and not isinstance(layers, Layers):
        raise TypeError(f"layers must be what optcurv.layers(loss, params) returns, got {type(layers).__name__}.")
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))

    def draw(key: chex.PRNGKey, kernel: jax.Array) -> jax.Array:
        """Of a kernel arranged as (stack, in, out)."""
        noise = jax.random.normal(key, kernel.shape, kernel.dtype)
        return noise * (jnp.linalg.norm(kernel, axis=1, keepdims=True) / jnp.linalg.norm(noise, axis=1, keepdims=True))

    drawn = [jnp.zeros_like(leaf) for leaf in leaves]
    if layers is None:
        for place, leaf in enumerate(leaves):
            if leaf.ndim > 1:
                drawn[place] = draw(keys[place], leaf.reshape(1, -1, leaf.shape[-1])).reshape(leaf.shape)
    else:
        for layer in layers.found:
            kernel, *bias = layer.parts(leaves)
            parts = draw(keys[layer.kernel], kernel), *map(jnp.zeros_like, bias)
            for place, leaf in layer.leaves(parts, leaves).items():
                drawn[place] = leaf
    return jax.tree.unflatten(structure, drawn)


def plane_coordinates(center: PyTree, directions: Sequence[PyTree], points: Iterable[PyTree]) -> jax.Array:
    r"""Projects points onto a plane, such as where an optimiser came by.

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
    _check_two(directions)
    gram = jnp.array([[optax.tree.vdot(one, other) for one in directions] for other in directions])
    if not jnp.linalg.det(gram) > 1e-6 * gram[0, 0] * gram[1, 1]:
        raise ValueError("directions must not be parallel or zero.")
    slopes = []
    for point in points:
        _check_same_layout((center, *directions, point))
        offset = optax.tree.sub(point, center)
        slopes.append(jnp.stack([optax.tree.vdot(direction, offset) for direction in directions]))
    return jnp.linalg.solve(gram, jnp.stack(slopes).T).T


def settled_statistics(update_fn: Callable[[PyTree], PyTree], statistics: PyTree) -> PyTree:
    r"""The running statistics at which a training step leaves them as they are.

    BatchNorm's running averages belong to the parameters they were taken at; between networks there are none. In a
    `value_fn` this recomputes them from given data at each point. One step maps each running average s to
    :math:`m s + (1 - m)\, b`, with the data's own statistic b and a momentum m < 1; b is what is returned, without
    having to know m.

    Args:
      update_fn: maps running statistics to those after one training step on the given data.
      statistics: any, in the structure that `update_fn` takes; only structure, shapes and dtypes matter.

    Returns:
      The statistics of the data.

    Example:
      With a Flax network: `settled_statistics(lambda s: net.apply({"params": p, "batch_stats": s}, x, train=True,
      mutable="batch_stats")[1]["batch_stats"], batch_stats)`.

      >>> import jax.numpy as jnp, optcurv
      >>> update = lambda s: {"mean": 0.75 * s["mean"] + 0.25 * 3.0}
      >>> print(optcurv.settled_statistics(update, {"mean": jnp.zeros(2)}))
      {'mean': Array([3., 3.], dtype=float32)}
    """
    # Compiled together, all need one forward pass: what a training step adds does not depend on running statistics.
    at_zero, at_one = (update_fn(like(statistics)) for like in (optax.tree.zeros_like, optax.tree.ones_like))
    rates = jax.tree.map(lambda zero, one: 1 - (one - zero), at_zero, at_one)
    settled = jax.tree.map(jnp.divide, at_zero, rates)
    # Once more, for the digits that the difference of large numbers lost.
    return jax.tree.map(lambda old, new, rate: old + (new - old) / rate, settled, update_fn(settled), rates)


def _evaluate(
    value_fn: SliceFn, trees: Sequence[PyTree], weights: jax.Array, batches: Iterable[PyTree] | None, num_at_once: int
) -> PyTree:
    """Evaluates at the sums of the trees that each row of weights, along the last axis, gives."""
    if not callable(value_fn):
        raise TypeError(f"value_fn must be a function of params, got {type(value_fn).__name__}.")
    check_count("num_at_once", num_at_once)
    _check_same_layout(trees)

    rows, batch_size = weights.reshape(-1, len(trees)), num_at_once if num_at_once > 1 else None
    if batches is None:
        result = _evaluate_rows(value_fn, batch_size, trees, rows)
    else:
        result = _average(
            (_evaluate_rows(value_fn, batch_size, trees, rows, batch), _num_examples(batch)) for batch in batches
        )
    return jax.tree.map(lambda values: values.reshape(weights.shape[:-1] + values.shape[1:]), result)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate_rows(
    value_fn: SliceFn, batch_size: int | None, trees: Sequence[PyTree], rows: jax.Array, *batch: PyTree
) -> PyTree:
    """One program for all slices of a function and a shape."""

    def value(row: jax.Array) -> PyTree:
        return value_fn(jax.tree.map(lambda *leaves: _weighted_sum(row, leaves), *trees), *batch)

    return jax.lax.map(value, rows, batch_size=batch_size)


def _weighted_sum(weights: jax.Array, leaves: Sequence[jax.Array]) -> jax.Array:
    terms = [weight * leaf for weight, leaf in zip(weights, leaves, strict=True)]
    return functools.reduce(jnp.add, terms).astype(leaves[0].dtype)


def _average(results: Iterable[tuple[PyTree, int]]) -> PyTree:
    """Averages pytrees in proportion to the numbers that stand with them."""
    results = iter(results)
    try:
        total, count = next(results)
    except StopIteration:
        raise ValueError("batches must hold at least one batch; there is none left.") from None
    total = optax.tree.scale(count, total)
    for result, size in results:
        total, count = optax.tree.add_scale(total, size, result), count + size
    return optax.tree.scale(1 / count, total)


def _num_examples(batch: PyTree) -> int:
    return jnp.shape(jax.tree.leaves(batch)[0])[0]


def _coefficients(name: str, values: jax.typing.ArrayLike) -> jax.Array:
    values = jnp.asarray(values, jnp.result_type(float))
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must be of shape (n,) with n at least 1, got shape {values.shape}.")
    return values


def _grid(first: jax.typing.ArrayLike, second: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    x, y = jnp.meshgrid(*(_coefficients("coefficients", values) for values in (first, second)), indexing="ij")
    return x, y


def _check_number_of_vertices(vertices: Sequence[PyTree], number: int) -> None:
    if len(vertices) != number:
        raise ValueError(f"vertices must be {number}, got {len(vertices)}.")


def _check_two(directions: Sequence[PyTree]) -> None:
    if len(directions) != 2:
        raise ValueError(f"directions must be two, got {len(directions)}.")


def _check_same_layout(trees: Sequence[PyTree]) -> None:
    first, *others = (_layout(tree) for tree in trees)
    for other in others:
        if first != other:
            unlike = next(pair for pair in itertools.zip_longest(first, other) if pair[0] != pair[1])
            raise ValueError(f"All points must have the same structure and shapes; {unlike[0]} is not {unlike[1]}.")


def _layout(tree: PyTree) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]

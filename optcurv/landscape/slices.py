"""Slices of the loss surface. The functions return arrays and never draw."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, check_count
from optcurv.landscape.directions import check_same_layout, check_two

SliceFn: TypeAlias = Callable[..., PyTree]
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
      batches: a data set too large for one batch; values are averaged, each batch weighted by the leading axis of its
        first array. For a progress bar wrap them: `rich.progress.track(batches)`.
      num_at_once: points evaluated together, default 1: more is faster where one does not fill the device.

    Returns:
      What `value_fn` returns, with n entries along a new first axis; values that are not finite are kept.

    Raises:
      ValueError: if the points differ in structure or shapes, or there is no coefficient or no batch.
      TypeError: if `value_fn` is not a function.

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
      TypeError: if `value_fn` is not a function.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss = lambda w: jnp.sum(w**2)
      >>> print(optcurv.absolute_line(loss, jnp.array([0.0, 0.0]), jnp.array([3.0, 4.0]), jnp.array([-1.0, 5.0])))
      [ 1. 25.]
    """
    check_same_layout((start, end))
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
      TypeError: if `value_fn` is not a function.

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
      TypeError: if `value_fn` is not a function.

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
      directions: d₁ and d₂, of the structure and shapes of `center`, such as two from `optcurv.random_direction`, or
        leading eigenvectors.
      xs: x, of shape (n,).
      ys: y, of shape (m,).
      batches: as for `optcurv.line`.
      num_at_once: likewise.

    Returns:
      What `value_fn` returns, with two new first axes, (n, m).

    Raises:
      ValueError: as `optcurv.line`, and if there are not two directions.
      TypeError: if `value_fn` is not a function.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss, center = (lambda w: w @ jnp.array([1.0, 10.0])), jnp.array([1.0, 0.0])
      >>> axes = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
      >>> print(optcurv.plane(loss, center, axes, jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0])))
      [[ 1. 21.]
       [ 2. 22.]]
    """
    check_two(directions)
    x, y = _grid(xs, ys)
    weights = jnp.stack([jnp.ones_like(x), x, y], axis=-1)
    return _evaluate(value_fn, (center, *directions), weights, batches, num_at_once)


def _evaluate(
    value_fn: SliceFn, trees: Sequence[PyTree], weights: jax.Array, batches: Iterable[PyTree] | None, num_at_once: int
) -> PyTree:
    """Evaluates at weighted sums of the trees; the weights of each sum lie along the last axis."""
    if not callable(value_fn):
        raise TypeError(f"value_fn must be a function of params, got {type(value_fn).__name__}.")
    check_count("num_at_once", num_at_once)
    check_same_layout(trees)

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
    """Averages pytrees, weighted by the numbers paired with them."""
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

"""The shapes of trust regions: norms that adapt to the gradients seen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from optcurv.arguments import PyTree, at_least_float32, check_count, check_number


class Shape(NamedTuple):
    r"""A positive definite matrix M that follows the gradients; it measures steps by :math:`\sqrt{s^\top M s}`.

    Like an optax transformation it is a tuple of pure functions, and any four that fit may be given. Vectors have the
    structure of the parameters and at least float32; M must stay positive definite.

    Attributes:
      init: maps params to the shape's state, a pytree of arrays.
      update: maps `(state, gradient)` to the state after this gradient.
      apply: maps `(state, v)` to :math:`M v`.
      inverse: maps `(state, v)` to :math:`M^{-1} v`.

    Example:
      A ball of fixed scales, for parameters of which the first is known to move a hundred times as far:

      >>> import jax.numpy as jnp, optcurv
      >>> m = jnp.array([1e-4, 1.0])
      >>> fixed = optcurv.Shape(
      ...     init=lambda params: (),
      ...     update=lambda state, gradient: state,
      ...     apply=lambda state, v: m * v,
      ...     inverse=lambda state, v: v / m,
      ... )
      >>> optimizer = optcurv.trust_region(shape=fixed)
    """

    init: Callable[[PyTree], Any]
    update: Callable[[Any, PyTree], Any]
    apply: Callable[[Any, PyTree], PyTree]
    inverse: Callable[[Any, PyTree], PyTree]


def uniform_shape() -> Shape:
    """The ball: M = I, the plain trust region.

    Returns:
      The shape; its state is empty.

    Example:
      >>> import optcurv
      >>> optimizer = optcurv.trust_region(shape=optcurv.uniform_shape())
    """
    return Shape(
        init=lambda params: (),
        update=lambda state, gradient: state,
        apply=lambda state, vector: vector,
        inverse=lambda state, vector: vector,
    )


def adagrad_shape(eps: float = 1e-10, power: float = 0.5) -> Shape:
    r"""Adagrad's ellipsoid, :math:`M = \mathrm{diag}(v + \epsilon)^p` with :math:`v = \sum_t g_t^2`.

    The diagonal of Eq. 2 of "Adaptive norms for deep learning with regularized Newton methods". The power is
    :math:`p = \tfrac12`, as in its Corollary 1; Algorithm 1 prints the matrix without the root, p = 1. The axes only
    ever shrink.

    Args:
      eps: ε > 0, in units of a squared gradient.
      power: p > 0.

    Returns:
      The shape; its state is v.

    Raises:
      ValueError: if a number is not positive.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> shape = optcurv.adagrad_shape()
      >>> state = shape.update(shape.init(jnp.zeros(2)), jnp.array([3.0, 0.5]))
      >>> print(shape.apply(state, jnp.ones(2)))
      [3.  0.5]
    """
    return _diagonal_shape(lambda v, gradient: v + gradient**2, eps, power)


def rmsprop_shape(decay: float = 0.8, eps: float = 1e-10, power: float = 0.5) -> Shape:
    r"""RMSProp's ellipsoid, :math:`M = \mathrm{diag}(v + \epsilon)^p`, :math:`v \leftarrow \beta v + (1 - \beta) g^2`.

    The diagonal of Eq. 3 of "Adaptive norms for deep learning with regularized Newton methods", with the present
    gradient in it, and ε added at every step: a v that starts at ε would decay to nothing, and the norms would not stay
    uniformly equivalent (Lemma 2). The power is :math:`p = \tfrac12`, as in Corollary 1; Algorithm 1 prints p = 1.

    Args:
      decay: β in [0, 1], published 0.8.
      eps: ε > 0, in units of a squared gradient, published 1e-10.
      power: p > 0.

    Returns:
      The shape; its state is v.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> shape = optcurv.rmsprop_shape(decay=0.75)
      >>> state = shape.update(shape.init(jnp.zeros(2)), jnp.array([3.0, 0.5]))
      >>> print(shape.apply(state, jnp.ones(2)))
      [1.5  0.25]
    """
    check_number("decay", decay, minimum=0.0, maximum=1.0, constant=True)
    return _diagonal_shape(lambda v, gradient: decay * v + (1 - decay) * gradient**2, eps, power)


def _diagonal_shape(average: Callable[[jax.Array, jax.Array], jax.Array], eps: float, power: float) -> Shape:
    check_number("eps", eps, minimum=0.0, exclusive=True, constant=True)
    check_number("power", power, minimum=0.0, exclusive=True, constant=True)

    def scaled(v: PyTree, vector: PyTree, exponent: float) -> PyTree:
        return jax.tree.map(lambda v, x: (v + eps) ** exponent * x, v, vector)

    def bounded(v: jax.Array, gradient: jax.Array) -> jax.Array:
        """An overflow of the square would shut a coordinate for good."""
        return jnp.minimum(average(v, gradient), jnp.finfo(v.dtype).max)

    return Shape(
        init=lambda params: optax.tree.zeros_like(at_least_float32(params)),
        update=lambda v, gradient: jax.tree.map(bounded, v, gradient),
        apply=lambda v, vector: scaled(v, vector, power),
        inverse=lambda v, vector: scaled(v, vector, -power),
    )


class FullMatrixState(NamedTuple):
    """State of `full_matrix_shape`: the sum or average of outer products, and M and its inverse made of it."""

    second_moment: jax.Array
    matrix: jax.Array
    inverse: jax.Array


def full_matrix_shape(
    *, decay: float | None = None, eps: float = 1e-10, power: float = 0.5, max_size: int = 2048
) -> Shape:
    r"""The ellipsoid with all correlations, :math:`M = (G + \epsilon I)^p`, for small problems.

    :math:`G = \sum_t g_t g_t^\top` (Adagrad, Eq. 2 of "Adaptive norms for deep learning with regularized Newton
    methods"), or with `decay` :math:`G \leftarrow \beta G + (1 - \beta) g g^\top` (RMSProp, Eq. 3). An update
    decomposes a d×d matrix, in time d³, and the state holds three of them. Eigenvalues of G below d times the dtype's
    resolution of the largest are raised to it: in float32 they are rounding, which a small ε would amplify.

    Args:
      decay: β in [0, 1]; None (default) sums without forgetting.
      eps: ε > 0, in units of a squared gradient.
      power: p > 0; default ½, as in Corollary 1.
      max_size: the largest number of parameters d accepted.

    Returns:
      The shape; its state is a `FullMatrixState`.

    Raises:
      ValueError: if a number is out of range; at init, if there are more parameters than `max_size`.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> shape = optcurv.full_matrix_shape()
      >>> state = shape.update(shape.init(jnp.zeros(2)), jnp.array([3.0, 4.0]))  # of length 5
      >>> print(shape.apply(state, jnp.array([3.0, 4.0])).round(1))
      [15. 20.]
    """
    if decay is not None:
        check_number("decay", decay, minimum=0.0, maximum=1.0, constant=True)
    check_number("eps", eps, minimum=0.0, exclusive=True, constant=True)
    check_number("power", power, minimum=0.0, exclusive=True, constant=True)
    check_count("max_size", max_size)

    def init(params: PyTree) -> FullMatrixState:
        flat, _ = ravel_pytree(at_least_float32(params))
        if flat.size > max_size:
            raise ValueError(
                f"full_matrix_shape would decompose a {flat.size}×{flat.size} matrix at every step, above its max_size "
                f"of {max_size}: use optcurv.rmsprop_shape(), or raise max_size."
            )
        zeros, identity = jnp.zeros((flat.size, flat.size), flat.dtype), jnp.eye(flat.size, dtype=flat.dtype)
        return FullMatrixState(zeros, eps**power * identity, eps**-power * identity)

    def update(state: FullMatrixState, gradient: PyTree) -> FullMatrixState:
        flat, _ = ravel_pytree(gradient)
        outer = jnp.outer(flat, flat)
        if decay is None:
            second_moment = state.second_moment + outer
        else:
            second_moment = decay * state.second_moment + (1 - decay) * outer
        eigenvalues, eigenvectors = jnp.linalg.eigh(second_moment)
        rounding = flat.size * jnp.finfo(flat.dtype).eps * eigenvalues[-1]
        eigenvalues = jnp.maximum(eigenvalues, rounding) + eps

        def to_the_power(exponent: float) -> jax.Array:
            scaled = eigenvectors * eigenvalues**exponent
            return jnp.matmul(scaled, eigenvectors.T, precision="highest")

        return FullMatrixState(second_moment, to_the_power(power), to_the_power(-power))

    def product(matrix: jax.Array, vector: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(vector)
        return unravel(jnp.matmul(matrix, flat, precision="highest"))

    return Shape(
        init=init,
        update=update,
        apply=lambda state, vector: product(state.matrix, vector),
        inverse=lambda state, vector: product(state.inverse, vector),
    )

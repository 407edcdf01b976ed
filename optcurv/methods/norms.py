"""Norms that adapt to the gradients seen: ellipsoids in place of a trust region's ball."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from optcurv.arguments import PyTree, at_least_float32, check_count, check_number
from optcurv.krylov import Metric


class Norm(NamedTuple):
    r"""A positive definite matrix M that follows the gradients; it measures steps by :math:`\sqrt{s^\top M s}`.

    Like an optax transformation it is a tuple of pure functions, and you may give any three of your own. Vectors have
    the structure of the parameters and at least float32; M must stay positive definite.

    Attributes:
      init: maps params to the norm's state, a pytree of arrays.
      update: maps `(state, gradient)` to the state after this gradient.
      at: maps a state to the `optcurv.Metric`, the products with M and :math:`M^{-1}`.

    Example:
      A ball of fixed scales, for parameters of which the first is known to move a hundred times as far:

      >>> import jax.numpy as jnp, optcurv
      >>> m = jnp.array([1e-4, 1.0])
      >>> fixed = optcurv.Norm(
      ...     init=lambda params: (),
      ...     update=lambda state, gradient: state,
      ...     at=lambda state: optcurv.Metric(apply=lambda v: m * v, inverse=lambda v: v / m),
      ... )
      >>> optimizer = optcurv.trust_region(norm=fixed)
    """

    init: Callable[[PyTree], Any]
    update: Callable[[Any, PyTree], Any]
    at: Callable[[Any], Metric]


def uniform_norm() -> Norm:
    """The ball: M = I, the plain trust region.

    Returns:
      The norm; its state is empty.

    Example:
      >>> import optcurv
      >>> optimizer = optcurv.trust_region(norm=optcurv.uniform_norm())
    """
    return Norm(
        init=lambda params: (),
        update=lambda state, gradient: state,
        at=lambda state: Metric(lambda v: v, lambda v: v),
    )


def adagrad_norm(eps: float = 1e-10, power: float = 0.5) -> Norm:
    r"""Adagrad's ellipsoid, :math:`M = \mathrm{diag}(v + \epsilon)^p` with :math:`v = \sum_t g_t^2`.

    The diagonal of Eq. 2 of "Adaptive norms for deep learning with regularized Newton methods". The power is
    :math:`p = \tfrac12`, as in its Corollary 1; Algorithm 1 prints the matrix without the root, p = 1. The axes only
    ever shrink.

    Args:
      eps: ε > 0, in units of a squared gradient.
      power: p > 0.

    Returns:
      The norm; its state is v.

    Raises:
      ValueError: if a number is not positive.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> norm = optcurv.adagrad_norm()
      >>> state = norm.update(norm.init(jnp.zeros(2)), jnp.array([3.0, 0.5]))
      >>> print(norm.at(state).apply(jnp.ones(2)))
      [3.  0.5]
    """
    return _diagonal_norm(lambda v, gradient: v + gradient**2, eps, power)


def rmsprop_norm(decay: float = 0.8, eps: float = 1e-10, power: float = 0.5) -> Norm:
    r"""RMSProp's ellipsoid, :math:`M = \mathrm{diag}(v + \epsilon)^p`, :math:`v \leftarrow \beta v + (1 - \beta) g^2`.

    The diagonal of Eq. 3 of "Adaptive norms for deep learning with regularized Newton methods", with the present
    gradient in it, and ε added at every step: a v that starts at ε would decay to nothing, and the norms would not stay
    uniformly equivalent (Lemma 2). The power is :math:`p = \tfrac12`, as in Corollary 1; Algorithm 1 prints p = 1.

    Args:
      decay: β in [0, 1], published 0.8.
      eps: ε > 0, in units of a squared gradient, published 1e-10.
      power: p > 0.

    Returns:
      The norm; its state is v.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> norm = optcurv.rmsprop_norm(decay=0.75)
      >>> state = norm.update(norm.init(jnp.zeros(2)), jnp.array([3.0, 0.5]))
      >>> print(norm.at(state).apply(jnp.ones(2)))
      [1.5  0.25]
    """
    check_number("decay", decay, minimum=0.0, maximum=1.0, constant=True)
    return _diagonal_norm(lambda v, gradient: decay * v + (1 - decay) * gradient**2, eps, power)


def _diagonal_norm(average: Callable[[jax.Array, jax.Array], jax.Array], eps: float, power: float) -> Norm:
    check_number("eps", eps, minimum=0.0, exclusive=True, constant=True)
    check_number("power", power, minimum=0.0, exclusive=True, constant=True)

    def scaled(v: PyTree, exponent: float, vector: PyTree) -> PyTree:
        return jax.tree.map(lambda v, x: (v + eps) ** exponent * x, v, vector)

    def bounded(v: jax.Array, gradient: jax.Array) -> jax.Array:
        """If the square overflowed, the coordinate would never move again."""
        return jnp.minimum(average(v, gradient), jnp.finfo(v.dtype).max)

    return Norm(
        init=lambda params: optax.tree.zeros_like(at_least_float32(params)),
        update=lambda v, gradient: jax.tree.map(bounded, v, gradient),
        at=lambda v: Metric(functools.partial(scaled, v, power), functools.partial(scaled, v, -power)),
    )


class FullMatrixState(NamedTuple):
    """State of `full_matrix_norm`: the sum or average of outer products, and M and its inverse computed from it."""

    second_moment: jax.Array
    matrix: jax.Array
    inverse: jax.Array


def full_matrix_norm(
    *, decay: float | None = None, eps: float = 1e-10, power: float = 0.5, max_size: int = 2048
) -> Norm:
    r"""The ellipsoid with all correlations, :math:`M = (G + \epsilon I)^p`, for small problems.

    :math:`G = \sum_t g_t g_t^\top` (Adagrad, Eq. 2 of "Adaptive norms for deep learning with regularized Newton
    methods"), or with `decay` :math:`G \leftarrow \beta G + (1 - \beta) g g^\top` (RMSProp, Eq. 3). An update
    decomposes a d×d matrix, in time d³, and the state holds three of them. Eigenvalues of G below the largest
    times d times the dtype's precision are raised to that bound: they are rounding, which a small ε would amplify.

    Args:
      decay: β in [0, 1]; None (default) sums without forgetting.
      eps: ε > 0, in units of a squared gradient.
      power: p > 0; default ½, as in Corollary 1.
      max_size: the largest number of parameters d accepted.

    Returns:
      The norm; its state is a `FullMatrixState`.

    Raises:
      ValueError: if a number is out of range; at init, if there are more parameters than `max_size`.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> norm = optcurv.full_matrix_norm()
      >>> state = norm.update(norm.init(jnp.zeros(2)), jnp.array([3.0, 4.0]))  # of length 5
      >>> print(norm.at(state).apply(jnp.array([3.0, 4.0])).round(1))
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
                f"full_matrix_norm would decompose a {flat.size}×{flat.size} matrix at every step, above its max_size "
                f"of {max_size}: use optcurv.rmsprop_norm(), or raise max_size."
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

    return Norm(
        init=init,
        update=update,
        at=lambda state: Metric(functools.partial(product, state.matrix), functools.partial(product, state.inverse)),
    )

"""Minimisers of quadratic models in few dimensions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Minimizer(NamedTuple):
    r"""The minimiser of a regularised model.

    Attributes:
      point: h, of shape (k,).
      multiplier: :math:`\lambda \ge 0` with :math:`(T + \lambda I) h = -c`; 0 where the regularisation does not bind.
      lowest_eigenvalue: of T; 0 where it is not distinct from 0 within rounding.
    """

    point: jax.Array
    multiplier: jax.Array
    lowest_eigenvalue: jax.Array


def minimize_in_ball(hessian: jax.Array, gradient: jax.Array, radius: jax.Array) -> Minimizer:
    r"""Minimises :math:`c^\top h + \tfrac12 h^\top T h` subject to :math:`\|h\| \le \Delta`.

    The global minimiser, by eigendecomposition (Moré and Sorensen 1983): also where T is indefinite, and in the hard
    case, c orthogonal to its lowest eigenvectors.

    Args:
      hessian: T, symmetric, of shape (k, k).
      gradient: c, of shape (k,).
      radius: Δ > 0.

    Returns:
      A `Minimizer`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optcurv.methods.quadratic_models import minimize_in_ball
      >>> print(minimize_in_ball(jnp.diag(jnp.array([2.0, 4.0])), jnp.array([2.0, 4.0]), 5.0).point)
      [-1. -1.]
    """
    radius = jnp.asarray(radius, gradient.dtype)
    return _minimize(hessian, gradient, lambda multiplier: radius, jnp.linalg.norm(gradient) / radius)


def minimize_cubic(hessian: jax.Array, gradient: jax.Array, weight: jax.Array) -> Minimizer:
    r"""Minimises :math:`c^\top h + \tfrac12 h^\top T h + \tfrac{\sigma}{3} \|h\|^3`, globally.

    Nesterov and Polyak (2006): the solution has :math:`\lambda = \sigma \|h\|`.

    Args:
      hessian: T, symmetric, of shape (k, k).
      gradient: c, of shape (k,).
      weight: σ > 0.

    Returns:
      A `Minimizer`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optcurv.methods.quadratic_models import minimize_cubic
      >>> print(minimize_cubic(jnp.array([[1.0]]), jnp.array([2.0]), 1.0).point)  # h + h|h| = -2
      [-1.]
    """
    weight = jnp.asarray(weight, gradient.dtype)
    longest = jnp.sqrt(weight * jnp.linalg.norm(gradient))
    return _minimize(hessian, gradient, lambda multiplier: multiplier / weight, longest)


def _minimize(
    hessian: jax.Array, gradient: jax.Array, norm_at: Callable[[jax.Array], jax.Array], largest_shift: jax.Array
) -> Minimizer:
    """Finds λ with ‖(T + λI)⁻¹ c‖ = `norm_at(λ)`, by bisection between -λ₁ and `largest_shift` above it.

    Written in the shift t = λ - max(0, -λ₁), which keeps its relative precision as λ approaches -λ₁.
    """
    epsilon = jnp.finfo(gradient.dtype).eps
    eigenvalues, eigenvectors = jnp.linalg.eigh(hessian)
    noise = 100 * epsilon * jnp.max(jnp.abs(eigenvalues))
    lowest = jnp.where(jnp.abs(eigenvalues[0]) <= noise, 0.0, eigenvalues[0])
    base = jnp.maximum(0.0, -lowest)
    gaps = jnp.maximum(eigenvalues + base, 0.0)
    slopes = jnp.matmul(gradient, eigenvectors, precision="highest")
    # Neither slope nor curvature beyond rounding: no direction to move in.
    slopes = jnp.where((gaps <= noise) & (jnp.abs(slopes) <= 100 * epsilon * jnp.linalg.norm(slopes)), 0.0, slopes)

    def point_at(shift: jax.Array) -> jax.Array:
        return jnp.where(slopes == 0, 0.0, -slopes / (gaps + shift))

    def bisect(_: int, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        too_long = jnp.linalg.norm(point_at(middle)) > norm_at(base + middle)
        return jnp.where(too_long, middle, low), jnp.where(too_long, high, middle)

    unshifted = jnp.linalg.norm(point_at(jnp.zeros_like(base)))
    binds = unshifted > norm_at(base)
    bracket = jax.lax.fori_loop(0, 64, bisect, (largest_shift * epsilon**3, largest_shift))
    shift = jnp.where(binds, bracket[1], 0.0)
    point = point_at(shift)
    # The hard case: the rest of the way goes along the lowest eigenvector, downhill either way.
    rest = jnp.sqrt(jnp.maximum(norm_at(base) ** 2 - unshifted**2, 0.0))
    point = point.at[0].add(jnp.where(~binds & (base > 0), rest, 0.0))
    return Minimizer(jnp.matmul(eigenvectors, point, precision="highest"), base + shift, lowest)

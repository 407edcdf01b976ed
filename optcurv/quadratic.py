"""Local quadratic models of the loss, and their minimisers in few dimensions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


def parabola_curvature(
    value: Array | float, slope: Array | float, step: Array | float, value_at_step: Array | float
) -> Array | float:
    r"""Second derivative of the parabola through two values and a slope.

    With :math:`l(0)`, :math:`l'(0)` and :math:`l(\mu)` given (Eq. 4 of the PAL paper):

    .. math:: l'' = \frac{(l(\mu) - l(0)) / \mu - l'(0)}{\mu / 2}

    Args:
      value: :math:`l(0)`.
      slope: :math:`l'(0)`.
      step: :math:`\mu`, not zero.
      value_at_step: :math:`l(\mu)`.

    Returns:
      The curvature :math:`l''`, a scalar.

    Example:
      >>> from optcurv.quadratic import parabola_curvature
      >>> parabola_curvature(value=5.0, slope=-2.0, step=2.0, value_at_step=7.0)  # l(s) = 5 - 2 s + 1.5 s²
      3.0
    """
    return ((value_at_step - value) / step - slope) / (step / 2)


def decrease_ratio(value: Array, decrease: Array, predicted_decrease: Array, noise: Array | float = 0.0) -> Array:
    r"""How well a model predicted the loss, :math:`\rho = (L(w) - L(w+s)) / (m(0) - m(s))`.

    Rounding of the loss is allowed for: ten units of it and the noise are added above and below, so that a step whose
    decrease drowns in them has ρ = 1 and does not count against the model (Conn, Gould and Toint 2000, section 17.4.2).

    Args:
      value: :math:`L(w)`.
      decrease: :math:`L(w) - L(w + s)`.
      predicted_decrease: :math:`m(0) - m(s)`, not negative.
      noise: what else blurs the difference of the values, such as parameters of few bits; not negative.

    Returns:
      The ratio; minus infinity where it or the decrease is not finite, or no decrease was predicted.

    Example:
      >>> import jax.numpy as jnp
      >>> from optcurv.quadratic import decrease_ratio
      >>> print(decrease_ratio(jnp.array(3.0), jnp.array(1.0), jnp.array(4.0)))
      0.25
    """
    rounding = 10 * jnp.finfo(value.dtype).eps * jnp.abs(value) + noise
    actual, predicted = decrease + rounding, predicted_decrease + rounding
    ratio = jnp.where((actual == 0) & (predicted == 0), 1.0, actual / predicted)
    return jnp.where((predicted >= 0) & ~jnp.isnan(ratio) & jnp.isfinite(decrease), ratio, -jnp.inf)


class Minimizer(NamedTuple):
    r"""Where a regularised model is least.

    Attributes:
      point: h, of shape (k,).
      multiplier: :math:`\lambda \ge 0` with :math:`(T + \lambda I) h = -c`; 0 where the regularisation does not bind.
      lowest_eigenvalue: of T; 0 where it is negative within rounding only.
    """

    point: Array
    multiplier: Array
    lowest_eigenvalue: Array


def minimize_in_ball(hessian: Array, gradient: Array, radius: Array) -> Minimizer:
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
      >>> from optcurv.quadratic import minimize_in_ball
      >>> print(minimize_in_ball(jnp.diag(jnp.array([2.0, 4.0])), jnp.array([2.0, 4.0]), 5.0).point)
      [-1. -1.]
    """
    radius = jnp.asarray(radius, gradient.dtype)
    return _minimize(hessian, gradient, lambda multiplier: radius, jnp.linalg.norm(gradient) / radius)


def minimize_cubic(hessian: Array, gradient: Array, weight: Array) -> Minimizer:
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
      >>> from optcurv.quadratic import minimize_cubic
      >>> print(minimize_cubic(jnp.array([[1.0]]), jnp.array([2.0]), 1.0).point)  # h + h|h| = -2
      [-1.]
    """
    weight = jnp.asarray(weight, gradient.dtype)
    longest = jnp.sqrt(weight * jnp.linalg.norm(gradient))
    return _minimize(hessian, gradient, lambda multiplier: multiplier / weight, longest)


def _minimize(hessian: Array, gradient: Array, norm_at: Callable[[Array], Array], largest_shift: Array) -> Minimizer:
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

    def point_at(shift: Array) -> Array:
        return jnp.where(slopes == 0, 0.0, -slopes / (gaps + shift))

    def bisect(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
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

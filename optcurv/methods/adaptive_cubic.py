"""Adaptive cubic regularization in the norm of an ellipsoid."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import (
    check_number,
    scheduled,
)
from optcurv.curvature import ProductFn, hessian_product
from optcurv.methods.norms import Norm, rmsprop_norm
from optcurv.methods.regularized_newton import RegularizedNewton, check_order, check_regularization
from optcurv.methods.subproblems import cubic_lanczos


class AdaptiveCubicInfo(NamedTuple):
    """What one step did; as in `TrustRegionInfo`, with the cubic term's weight σ in place of the radius."""

    ratio: jax.Array
    weight: jax.Array
    accepted: jax.Array
    iterations: jax.Array
    stop: jax.Array
    predicted_decrease: jax.Array
    actual_decrease: jax.Array


def adaptive_cubic(
    *,
    norm: Norm = rmsprop_norm(),  # noqa: B008
    max_iter: int = 10,
    curvature: ProductFn = hessian_product,
    initial_weight: chex.Numeric = 1.0,
    min_weight: optax.ScalarOrSchedule = 1e-8,
    max_weight: optax.ScalarOrSchedule = 1e8,
    accept_ratio: optax.ScalarOrSchedule = 1e-2,
    shrink_ratio: optax.ScalarOrSchedule = 0.95,
    growth: optax.ScalarOrSchedule = 1.5,
    shrinkage: optax.ScalarOrSchedule = 1.1,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive cubic regularization in the norm of an ellipsoid; emits the final signed step.

    .. math:: s \approx \arg\min_s\; m(s) = L(w) + g^\top s + \tfrac12 s^\top B s + \tfrac{\sigma}{3} \|s\|_M^3

    the trust region's sibling (footnote 5 of "Adaptive norms for deep learning with regularized Newton methods";
    Cartis, Gould and Toint 2011). The model is minimised globally in the Krylov space of `optcurv.gltr`. The step is
    taken if :math:`\rho \ge \eta_1`; σ shrinks to :math:`\max(\sigma / \gamma_1, \sigma_{\min})` if
    :math:`\rho \ge \eta_2` and the cubic term held the step back, that is, it is more than a tenth of the predicted
    decrease or the curvature is negative; σ grows to :math:`\min(\gamma_2 \sigma, \sigma_{\max})` if the step is
    rejected. Extra arguments, small decreases and rejections are as in `optcurv.trust_region`.

    Args:
      norm: M, as in `optcurv.trust_region`.
      max_iter: the number of products, and the dimension of the Krylov space, at least 2.
      curvature: B, as in `optcurv.trust_region`.
      initial_weight: σ₀ > 0.
      min_weight: σ_min > 0, a number or a schedule.
      max_weight: σ_max > 0, likewise.
      accept_ratio: η₁ in [0, 1], likewise.
      shrink_ratio: η₂ in [η₁, 1], likewise.
      growth: γ₂ > 1, likewise.
      shrinkage: γ₁ > 1, likewise.
      seed: for the random vectors that the Krylov space starts from.

    Returns:
      The optimiser.

    Raises:
      ValueError: as for `optcurv.trust_region`.
      TypeError: likewise.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optcurv
      >>> loss = lambda w: jnp.sum(jnp.array([1.0, 100.0]) * (w - 1.0) ** 2) + jnp.sum(w**4)
      >>> optimizer = optcurv.adaptive_cubic(max_iter=2)
      >>> w = jnp.array([3.0, 3.0])
      >>> state = optimizer.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     value, grads = jax.value_and_grad(loss)(w)
      ...     updates, state = optimizer.update(grads, state, w, value=value, value_fn=loss)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(40):
      ...     w, state = step(w, state)
      >>> print(jnp.linalg.norm(jax.grad(loss)(w)) < 1e-3)
      True
    """
    check_regularization(
        "initial_weight", initial_weight, accept_ratio, "shrink_ratio", shrink_ratio, growth, shrinkage
    )
    check_number("min_weight", min_weight, minimum=0.0, exclusive=True)
    check_number("max_weight", max_weight, minimum=0.0, exclusive=True)
    check_order("min_weight", min_weight, "initial_weight", initial_weight)
    check_order("initial_weight", initial_weight, "max_weight", max_weight)

    def resize(
        weight: jax.Array, ratio: jax.Array, accepted: jax.Array, held: jax.Array, count: jax.Array
    ) -> jax.Array:
        shrunk = jnp.maximum(weight / scheduled(shrinkage, count), scheduled(min_weight, count))
        kept = jnp.where(held & (ratio >= scheduled(shrink_ratio, count)), shrunk, weight)
        grown = jnp.minimum(weight * scheduled(growth, count), scheduled(max_weight, count))
        return jnp.where(accepted, kept, grown)

    solver = cubic_lanczos(max_iter)
    return RegularizedNewton(
        "adaptive_cubic", AdaptiveCubicInfo, norm, solver, curvature, initial_weight, accept_ratio, resize, seed
    ).transformation()

"""Levenberg-Marquardt: Gauss-Newton's model with a damping that follows the ratio of decreases."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import check_number, scheduled
from optcurv.curvature import ProductFn, gauss_newton_product
from optcurv.methods.dense import dense
from optcurv.methods.norms import Norm, uniform_norm
from optcurv.methods.regularized_newton import check_order, check_regularization, regularized_newton
from optcurv.methods.subproblems import Solver


class LevenbergMarquardtInfo(NamedTuple):
    r"""What one step did; scalars for the log.

    Attributes:
      ratio: ρ, actual over predicted decrease of the step at its full length; minus infinity where the loss there was
        not finite.
      damping: λ that the step was found with.
      accepted: whether it was taken.
      iterations: curvature products, or with `optcurv.dense` matrices factorised.
      stop: why the solver stopped, an `optcurv.Stop`.
      predicted_decrease: :math:`m(0) - m(s)`.
      actual_decrease: :math:`L(w) - L(w + \alpha s)`.
      step_length: α, 1 without a search for it.
      on_residuals: whether `optcurv.dense` solved for as many unknowns as there are residuals, rather than parameters.
    """

    ratio: jax.Array
    damping: jax.Array
    accepted: jax.Array
    iterations: jax.Array
    stop: jax.Array
    predicted_decrease: jax.Array
    actual_decrease: jax.Array
    step_length: jax.Array
    on_residuals: jax.Array


def levenberg_marquardt(
    *,
    solver: Solver = dense(),  # noqa: B008  a pure function
    norm: Norm = uniform_norm(),  # noqa: B008
    curvature: ProductFn = gauss_newton_product,
    initial_damping: chex.Numeric = 1e-2,
    min_damping: optax.ScalarOrSchedule = 1e-16,
    max_damping: optax.ScalarOrSchedule = 1e8,
    accept_ratio: optax.ScalarOrSchedule = 1e-4,
    grow_ratio: optax.ScalarOrSchedule = 0.25,
    shrink_ratio: optax.ScalarOrSchedule = 0.75,
    growth: optax.ScalarOrSchedule = 3.0,
    shrinkage: optax.ScalarOrSchedule = 3.0,
    momentum: optax.ScalarOrSchedule = 0.0,
    length_trials: int = 0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    check_regularization("initial_damping", initial_damping, accept_ratio, "grow_ratio", grow_ratio, growth, shrinkage)
    check_number("shrink_ratio", shrink_ratio, minimum=0.0, maximum=1.0)
    check_order("grow_ratio", grow_ratio, "shrink_ratio", shrink_ratio)
    check_number("min_damping", min_damping, minimum=0.0, exclusive=True)
    check_number("max_damping", max_damping, minimum=0.0, exclusive=True)
    check_order("min_damping", min_damping, "initial_damping", initial_damping)
    check_order("initial_damping", initial_damping, "max_damping", max_damping)
    check_number("momentum", momentum, minimum=0.0, maximum=1.0)

    def resize(damping: jax.Array, ratio: jax.Array, accepted: jax.Array, count: jax.Array) -> jax.Array:
        grown = jnp.minimum(damping * scheduled(growth, count), scheduled(max_damping, count))
        shrunk = jnp.maximum(damping / scheduled(shrinkage, count), scheduled(min_damping, count))
        kept = jnp.where(ratio > scheduled(shrink_ratio, count), shrunk, damping)
        return jnp.where(~accepted | (ratio < scheduled(grow_ratio, count)), grown, kept)

    return regularized_newton(
        "levenberg_marquardt",
        LevenbergMarquardtInfo,
        norm,
        solver,
        curvature,
        initial_damping,
        accept_ratio,
        resize,
        seed,
        momentum,
        length_trials,
    )

"""Levenberg-Marquardt: Gauss-Newton's model with a damping that follows the ratio of decreases."""

import numbers
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import check_count, check_number, scheduled
from optcurv.curvature import ProductFn, gauss_newton_product
from optcurv.methods.dense import dense
from optcurv.methods.norms import Norm, rmsprop_norm
from optcurv.methods.regularized_newton import RegularizedNewton, check_order, check_regularization
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
    norm: Norm = rmsprop_norm(),  # noqa: B008
    curvature: ProductFn = gauss_newton_product,
    initial_damping: chex.Numeric = 10.0,
    min_damping: optax.ScalarOrSchedule = 1e-16,
    max_damping: optax.ScalarOrSchedule = 1e12,
    accept_ratio: optax.ScalarOrSchedule = 1e-4,
    grow_ratio: optax.ScalarOrSchedule = 0.25,
    shrink_ratio: optax.ScalarOrSchedule = 0.75,
    growth: optax.ScalarOrSchedule = 3.0,
    shrinkage: optax.ScalarOrSchedule = 1.5,
    momentum: optax.ScalarOrSchedule = 0.5,
    length_trials: int = 0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Levenberg-Marquardt's method; emits the final signed step.

    .. math:: s = \arg\min_s\; g^\top s + \tfrac12 s^\top G s + \tfrac12 \lambda \|s - \mu s_{-1}\|_M^2, \qquad
        \rho = \frac{L(w) - L(w + s)}{m(0) - m(s)}

    where :math:`G = J^\top H J` is the Gauss-Newton matrix and :math:`m(s) = g^\top s + \tfrac12 s^\top G s` (Levenberg
    1944, Marquardt 1963). The step is taken if :math:`\rho \ge \eta`. The damping follows ρ as a trust region's radius:

    .. math:: \lambda \leftarrow \begin{cases} \max(\lambda / \gamma_1, \lambda_{\min}) & \rho > \rho_2 \\
        \lambda & \rho_1 \le \rho \le \rho_2 \\ \min(\gamma_2 \lambda, \lambda_{\max}) & \rho < \rho_1 \end{cases}

    For least squares and other convex losses of a model with up to some ten thousand parameters, on the full batch:
    regression, differential equations, small networks. There it is by orders of magnitude faster than gradient methods,
    with nothing to tune; take float64. Write the model by `optcurv.per_example` where it maps each example on its own.

    With `momentum`, the centre :math:`\mu s_{-1}` is that of SPRING (Goldshlager, Abrahamsen and Lin 2024,
    https://arxiv.org/abs/2401.10190), and Krylov solvers start from it, as in Hessian-free optimisation (Martens 2010).
    After a rejected step it is zero, for no damping would shorten the next step otherwise.

    The update takes the extra arguments `value_fn` (required, an `optcurv.Composite`), `value` (optional, the loss at
    params) and `curvature_value_fn` (the loss on a smaller batch, for G only; default `value_fn`). Small decreases and
    gradients a thousand times as large as any before are treated as in `optcurv.trust_region`. A loss that is not
    finite at the trial point rejects the step and raises λ; where the loss, the gradient or a product at params is not
    finite, nothing changes at all.

    Args:
      solver: `optcurv.dense()` (default), exact, for at most 4096 parameters or residuals, whichever are fewer; beyond,
        `optcurv.conjugate_gradients()` or `optcurv.minimum_residual()`.
      norm: M; `optcurv.rmsprop_norm()` (default), which vanishes with the gradient, so that λ need not, and follows the
        scale of the loss; `optcurv.uniform_norm()`, as published, or any other `optcurv.Norm`.
      curvature: G; `optcurv.gauss_newton_product` (default), or for the Krylov solvers `optcurv.hessian_product` or any
        function of the same signature.
      initial_damping: λ₀ > 0, in units of the loss's curvature by M.
      min_damping: λ_min > 0, a number or a schedule.
      max_damping: λ_max > 0, likewise. With all three equal, λ is constant.
      accept_ratio: η in [0, 1], likewise.
      grow_ratio: ρ₁ in [η, 1], likewise.
      shrink_ratio: ρ₂ in [ρ₁, 1], likewise.
      growth: γ₂ > 1, likewise.
      shrinkage: γ₁ > 1, likewise. Much less than γ₂, as a rejected step costs as much as another: with both 3, two
        steps in five were rejected on Poisson's equation, and an error of 1e-4 took two to three times as many.
      momentum: μ in [0, 1), likewise; 0 is the plain method. Default 0.5, which was better than 0 and 0.9 on Poisson's
        equation and better than 0 on a 1-D regression.
      length_trials: the most forward passes spent on the length of a step: it is halved, or else doubled, as long as
        that lowers the loss. Default 0: the step is taken as it is, or not at all.
      seed: of the random key that solvers are given; those above use none.

    Returns:
      The optimiser.

    Raises:
      ValueError: if a number is out of range; when traced, if the problem is too large for `optcurv.dense`; outside of
        jit, if the Hessian of the loss by the outputs, or the norm, is not positive definite (inside, such a step is
        rejected); and as for `optcurv.trust_region`.
      TypeError: if an argument has the wrong type, or the loss is no `optcurv.Composite`.

    Example:
      The curve :math:`e^{-at} + b` through three points:

      >>> import jax, jax.numpy as jnp, optax, optcurv
      >>> t, y = jnp.array([0.0, 1.0, 2.0]), jnp.array([3.0, 2.5, 2.25])
      >>> curve = optcurv.per_example((lambda p, t: jnp.exp(-p["a"] * t) + p["b"], t))
      >>> loss = optcurv.Composite(curve, lambda outputs: 0.5 * jnp.sum((outputs - y) ** 2))
      >>> optimizer = optcurv.levenberg_marquardt()
      >>> p = {"a": jnp.array(0.0), "b": jnp.array(0.0)}
      >>> state = optimizer.init(p)
      >>> @jax.jit
      ... def step(p, state):
      ...     value, grads = jax.value_and_grad(loss)(p)
      ...     updates, state = optimizer.update(grads, state, p, value=value, value_fn=loss)
      ...     return optax.apply_updates(p, updates), state
      >>> for _ in range(30):
      ...     p, state = step(p, state)
      >>> print(p["a"].round(3), p["b"].round(3))
      0.693 2.0
    """
    check_regularization("initial_damping", initial_damping, accept_ratio, "grow_ratio", grow_ratio, growth, shrinkage)
    check_number("shrink_ratio", shrink_ratio, minimum=0.0, maximum=1.0)
    check_order("grow_ratio", grow_ratio, "shrink_ratio", shrink_ratio)
    check_number("min_damping", min_damping, minimum=0.0, exclusive=True)
    check_number("max_damping", max_damping, minimum=0.0, exclusive=True)
    check_order("min_damping", min_damping, "initial_damping", initial_damping)
    check_order("initial_damping", initial_damping, "max_damping", max_damping)
    check_number("momentum", momentum, minimum=0.0)
    value: Any = momentum  # NumPy's numbers are none of the annotated types
    if isinstance(value, numbers.Real) and float(value) >= 1:
        raise ValueError(f"momentum must be below 1, or steps would never shrink; got {momentum!r}.")
    if length_trials != 0:
        check_count("length_trials", length_trials)

    def resize(
        damping: jax.Array, ratio: jax.Array, accepted: jax.Array, held: jax.Array, count: jax.Array
    ) -> jax.Array:
        del held  # the damping always holds back
        grown = jnp.minimum(damping * scheduled(growth, count), scheduled(max_damping, count))
        shrunk = jnp.maximum(damping / scheduled(shrinkage, count), scheduled(min_damping, count))
        kept = jnp.where(ratio > scheduled(shrink_ratio, count), shrunk, damping)
        return jnp.where(~accepted | (ratio < scheduled(grow_ratio, count)), grown, kept)

    return RegularizedNewton(
        "levenberg_marquardt",
        LevenbergMarquardtInfo,
        norm,
        solver,
        curvature,
        initial_damping,
        accept_ratio,
        resize,
        seed,
        momentum=None if isinstance(momentum, int | float) and momentum == 0 else momentum,
        length_trials=length_trials,
    ).transformation()

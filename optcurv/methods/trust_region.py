"""Ellipsoidal trust region Newton."""

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
from optcurv.methods.subproblems import Solver, steihaug


class TrustRegionInfo(NamedTuple):
    r"""What one step did; scalars for the log.

    Attributes:
      ratio: ρ, actual over predicted decrease; minus infinity where the loss at the trial point was not finite.
      radius: Δ, the radius within which the step was sought.
      accepted: whether the step was taken.
      iterations: curvature products.
      stop: why the solver stopped, an `optcurv.Stop`.
      predicted_decrease: :math:`m(0) - m(s)`.
      actual_decrease: :math:`L(w) - L(w + s)`.
    """

    ratio: jax.Array
    radius: jax.Array
    accepted: jax.Array
    iterations: jax.Array
    stop: jax.Array
    predicted_decrease: jax.Array
    actual_decrease: jax.Array


def trust_region(
    *,
    norm: Norm = rmsprop_norm(),  # noqa: B008  a tuple of pure functions
    solver: Solver = steihaug(),  # noqa: B008
    curvature: ProductFn = hessian_product,
    initial_radius: chex.Numeric = 5e-2,
    min_radius: optax.ScalarOrSchedule = 1e-8,
    max_radius: optax.ScalarOrSchedule = 10.0,
    accept_ratio: optax.ScalarOrSchedule = 1e-2,
    grow_ratio: optax.ScalarOrSchedule = 0.95,
    growth: optax.ScalarOrSchedule = 1.1,
    shrinkage: optax.ScalarOrSchedule = 1.5,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""The stochastic ellipsoidal trust region method; emits the final signed step.

    .. math:: s \approx \arg\min_s\; m(s) = L(w) + g^\top s + \tfrac12 s^\top B s
        \quad\text{subject to}\quad \|s\|_M \le \Delta, \qquad
        \rho = \frac{L(w) - L(w + s)}{m(0) - m(s)}

    (Eq. 7 and Algorithm 1 of "Adaptive norms for deep learning with regularized Newton methods"). The step is taken if
    :math:`\rho \ge \eta_1`. The radius then becomes

    .. math:: \Delta \leftarrow \begin{cases} \min(\gamma_1 \Delta, \Delta_{\max})
        & \rho \ge \eta_2 \text{ and } \|s\|_M = \Delta \\
        \Delta & \rho \ge \eta_1 \text{ otherwise} \\ \max(\Delta / \gamma_2, \Delta_{\min}) & \rho < \eta_1 \end{cases}

    which is Algorithm 1 for η₁ = η₂, γ₁ = γ₂ and Δ_min = 0, and the form of its experiments. Corrections: after a step
    that ends inside the region the radius does not grow (Nocedal and Wright 2006, Algorithm 4.1); otherwise
    mini-batches that are already fitted would undo the shrinking that others need. The norm's matrix enters with the
    power ½ that Corollary 1 needs, and ε is added to it at every step. A float32 loss resolves differences of some 1e-7
    only, so a smaller decrease is taken from the slopes at both ends of the step, :math:`-\tfrac12 (g^\top s + \nabla
    L(w + s)^\top s)`, and a predicted decrease within rounding of the loss counts as achieved. A gradient a thousand
    times as large as any before is refused, unless it comes twice in a row. Where gradients fall below 1e-6 of the
    largest, as they do after a spike, the norm starts again from its initial state.

    The update takes the extra arguments `value_fn` (required), `value` (optional, the loss at params) and
    `curvature_value_fn` (the loss on a smaller batch, for the products only; default `value_fn`). With `value` given, a
    step costs one forward pass beyond the products. A loss that is not finite at the trial point rejects the step;
    where the loss, the gradient or a product at params is not finite, or the gradient is refused, nothing changes at
    all.

    Args:
      norm: M; `optcurv.rmsprop_norm()` (default), `optcurv.adagrad_norm()`, `optcurv.uniform_norm()`,
        `optcurv.full_matrix_norm()`, or any `optcurv.Norm`.
      solver: `optcurv.steihaug()` (default), or `optcurv.gltr()`, which also leaves saddles.
      curvature: B; `optcurv.hessian_product` (default), `optcurv.gauss_newton_product`, or any function of the same
        signature.
      initial_radius: Δ₀ > 0, in the norm of M; published 1e-4 to 5e-2.
      min_radius: Δ_min > 0, a number or a schedule. It lets the radius recover from any number of rejections.
      max_radius: Δ_max > 0, likewise.
      accept_ratio: η₁ in [0, 1], likewise; published 1e-2, and 1e-5 for a convolutional network.
      grow_ratio: η₂ in [η₁, 1], likewise.
      growth: γ₁ > 1, likewise.
      shrinkage: γ₂ > 1, likewise; published 1.25 to 1.75.
      seed: for the random vectors that `optcurv.gltr` starts from.

    Returns:
      The optimiser.

    Raises:
      ValueError: if a number is out of range, or `update` is called without params or with a gradient or a state that
        does not fit them; outside of jit, if the norm is not positive definite (inside, such a step is rejected).
      TypeError: if an argument has the wrong type, `update` is called without `value_fn`, or the loss is not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optcurv
      >>> loss = lambda w: jnp.sum(jnp.array([1.0, 100.0]) * (w - 1.0) ** 2) + jnp.sum(w**4)
      >>> optimizer = optcurv.trust_region(initial_radius=1.0)
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
    check_regularization("initial_radius", initial_radius, accept_ratio, "grow_ratio", grow_ratio, growth, shrinkage)
    check_number("min_radius", min_radius, minimum=0.0, exclusive=True)
    check_number("max_radius", max_radius, minimum=0.0, exclusive=True)
    check_order("min_radius", min_radius, "initial_radius", initial_radius)
    check_order("initial_radius", initial_radius, "max_radius", max_radius)

    def resize(
        radius: jax.Array, ratio: jax.Array, accepted: jax.Array, held: jax.Array, count: jax.Array
    ) -> jax.Array:
        grown = jnp.minimum(radius * scheduled(growth, count), scheduled(max_radius, count))
        kept = jnp.where(held & (ratio >= scheduled(grow_ratio, count)), grown, radius)
        shrunk = jnp.maximum(radius / scheduled(shrinkage, count), scheduled(min_radius, count))
        return jnp.where(accepted, kept, shrunk)

    return RegularizedNewton(
        "trust_region", TrustRegionInfo, norm, solver, curvature, initial_radius, accept_ratio, resize, seed
    ).transformation()

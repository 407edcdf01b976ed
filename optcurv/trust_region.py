"""Ellipsoidal trust region Newton, and adaptive cubic regularization with the same shapes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optcurv.arguments import (
    PyTree,
    ValueFn,
    at_least_float32,
    check_function,
    check_number,
    checked,
    scalar_fn,
    scheduled,
    wide_dtype,
)
from optcurv.curvature import CurvatureFn, hessian_product
from optcurv.krylov import Metric, Solver, Stop, cubic_lanczos, steihaug
from optcurv.quadratic import decrease_ratio
from optcurv.shapes import Shape, rmsprop_shape
from optcurv.spikes import Watch, look, start_watch


class TrustRegionInfo(NamedTuple):
    r"""What one step did; scalars for the log.

    Attributes:
      ratio: ρ, actual over predicted decrease; minus infinity where the loss at the trial point was not finite.
      radius: Δ within which the step was sought.
      accepted: whether it was taken.
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


class AdaptiveCubicInfo(NamedTuple):
    """What one step did; as in `TrustRegionInfo`, with the cubic term's weight σ in place of the radius."""

    ratio: jax.Array
    weight: jax.Array
    accepted: jax.Array
    iterations: jax.Array
    stop: jax.Array
    predicted_decrease: jax.Array
    actual_decrease: jax.Array


class RegularizedNewtonState(NamedTuple):
    """State of `trust_region` and `adaptive_cubic`.

    Attributes:
      count: steps taken, for schedules.
      size: the radius Δ, or the weight σ, of the next step.
      shape: the shape's own state.
      watch: for spikes of the gradient.
      key: of the solver's random vectors, as key data.
      info: of the last step.
    """

    count: jax.typing.ArrayLike
    size: jax.Array
    shape: Any
    watch: Watch
    key: jax.Array
    info: TrustRegionInfo | AdaptiveCubicInfo


def trust_region(
    *,
    shape: Shape = rmsprop_shape(),  # noqa: B008  a tuple of pure functions
    solver: Solver = steihaug(),  # noqa: B008
    curvature: CurvatureFn = hessian_product,
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

    .. math:: \Delta \leftarrow \begin{cases} \min(\gamma_1 \Delta, \Delta_{\max}) & \rho \ge \eta_2 \\
        \Delta & \eta_1 \le \rho < \eta_2 \\ \max(\Delta / \gamma_2, \Delta_{\min}) & \rho < \eta_1 \end{cases}

    which is Algorithm 1 for η₁ = η₂, γ₁ = γ₂ and Δ_min = 0, and the form of its experiments. Corrections: the shape's
    matrix enters with the power ½ that Corollary 1 needs, and ε is added to it at every step. A float32 loss resolves
    differences of some 1e-7 only, so a smaller decrease is taken from the slopes at both ends of the step,
    :math:`-\tfrac12 (g^\top s + \nabla L(w + s)^\top s)`, and a predicted decrease within rounding of the loss counts
    as achieved. A gradient a thousand times as large as any before is refused, unless it comes twice in a row. Where
    gradients fall below 1e-6 of the largest, as they do after a spike, the shape starts anew.

    The update takes the extra arguments `value_fn` (required), `value` (optional, the loss at params) and
    `curvature_fn` (the loss on a smaller batch, for the products only; default `value_fn`). With `value` given, a step
    costs one forward pass beyond the products. A loss that is not finite at the trial point rejects the step; where
    the loss, the gradient or a product at params is not finite, or the gradient is refused, nothing changes at all.

    Args:
      shape: M; `optcurv.rmsprop_shape()` (default), `optcurv.adagrad_shape()`, `optcurv.uniform_shape()`,
        `optcurv.full_matrix_shape()`, or any `optcurv.Shape`.
      solver: `optcurv.steihaug()` (default), or `optcurv.lanczos()`, which also leaves saddles.
      curvature: B; `optcurv.hessian_product` (default), `optcurv.gauss_newton_product`, or any function of the same
        signature.
      initial_radius: Δ₀ > 0, in the norm of M; published 1e-4 to 5e-2.
      min_radius: Δ_min > 0, a number or a schedule. However many steps were rejected, the radius can grow again.
      max_radius: Δ_max > 0, likewise.
      accept_ratio: η₁ in [0, 1], likewise; published 1e-2, and 1e-5 for a convolutional network.
      grow_ratio: η₂ in [η₁, 1], likewise.
      growth: γ₁ > 1, likewise.
      shrinkage: γ₂ > 1, likewise; published 1.25 to 1.75.
      seed: of the random vectors that `optcurv.lanczos` starts from.

    Returns:
      The optimiser.

    Raises:
      ValueError: if a number is out of range, or `update` is called without params or with a gradient or a state that
        does not fit them; outside of jit, if the shape is not positive definite (inside, such a step is rejected).
      TypeError: if an argument has the wrong type, `update` is called without `value_fn`, or the loss is no scalar.

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
    _check_regularization("initial_radius", initial_radius, accept_ratio, "grow_ratio", grow_ratio, growth, shrinkage)
    check_number("min_radius", min_radius, minimum=0.0, exclusive=True)
    check_number("max_radius", max_radius, minimum=0.0, exclusive=True)
    _check_order("min_radius", min_radius, "initial_radius", initial_radius)
    _check_order("initial_radius", initial_radius, "max_radius", max_radius)

    def resize(radius: jax.Array, ratio: jax.Array, accepted: jax.Array, count: jax.Array) -> jax.Array:
        grown = jnp.minimum(radius * scheduled(growth, count), scheduled(max_radius, count))
        kept = jnp.where(ratio >= scheduled(grow_ratio, count), grown, radius)
        shrunk = jnp.maximum(radius / scheduled(shrinkage, count), scheduled(min_radius, count))
        return jnp.where(accepted, kept, shrunk)

    return _regularized_newton(
        "trust_region", TrustRegionInfo, shape, solver, curvature, initial_radius, accept_ratio, resize, seed
    )


def adaptive_cubic(
    *,
    shape: Shape = rmsprop_shape(),  # noqa: B008
    max_iter: int = 10,
    curvature: CurvatureFn = hessian_product,
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
    Cartis, Gould and Toint 2011). The model is minimised globally in the Krylov space of `optcurv.lanczos`. The step is
    taken if :math:`\rho \ge \eta_1`; σ shrinks to :math:`\max(\sigma / \gamma_1, \sigma_{\min})` if
    :math:`\rho \ge \eta_2` and grows to :math:`\min(\gamma_2 \sigma, \sigma_{\max})` if the step is rejected. Extra
    arguments, small decreases and rejections are as in `optcurv.trust_region`.

    Args:
      shape: M, as in `optcurv.trust_region`.
      max_iter: products, and dimension of the Krylov space, at least 2.
      curvature: B, as in `optcurv.trust_region`.
      initial_weight: σ₀ > 0.
      min_weight: σ_min > 0, a number or a schedule.
      max_weight: σ_max > 0, likewise.
      accept_ratio: η₁ in [0, 1], likewise.
      shrink_ratio: η₂ in [η₁, 1], likewise.
      growth: γ₂ > 1, likewise.
      shrinkage: γ₁ > 1, likewise.
      seed: of the random vectors that the Krylov space starts from.

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
    _check_regularization(
        "initial_weight", initial_weight, accept_ratio, "shrink_ratio", shrink_ratio, growth, shrinkage
    )
    check_number("min_weight", min_weight, minimum=0.0, exclusive=True)
    check_number("max_weight", max_weight, minimum=0.0, exclusive=True)
    _check_order("min_weight", min_weight, "initial_weight", initial_weight)
    _check_order("initial_weight", initial_weight, "max_weight", max_weight)

    def resize(weight: jax.Array, ratio: jax.Array, accepted: jax.Array, count: jax.Array) -> jax.Array:
        shrunk = jnp.maximum(weight / scheduled(shrinkage, count), scheduled(min_weight, count))
        kept = jnp.where(ratio >= scheduled(shrink_ratio, count), shrunk, weight)
        grown = jnp.minimum(weight * scheduled(growth, count), scheduled(max_weight, count))
        return jnp.where(accepted, kept, grown)

    solver = cubic_lanczos(max_iter)
    return _regularized_newton(
        "adaptive_cubic", AdaptiveCubicInfo, shape, solver, curvature, initial_weight, accept_ratio, resize, seed
    )


def _check_regularization(
    initial_name: str,
    initial_size: Any,
    accept_ratio: Any,
    second_name: str,
    second_ratio: Any,
    growth: Any,
    shrinkage: Any,
) -> None:
    check_number(initial_name, initial_size, minimum=0.0, exclusive=True, constant=True)
    check_number("accept_ratio", accept_ratio, minimum=0.0, maximum=1.0)
    check_number(second_name, second_ratio, minimum=0.0, maximum=1.0)
    check_number("growth", growth, minimum=1.0, exclusive=True)
    check_number("shrinkage", shrinkage, minimum=1.0, exclusive=True)
    _check_order("accept_ratio", accept_ratio, second_name, second_ratio)


def _check_order(name: str, value: Any, upper_name: str, upper: Any) -> None:
    """Raises if both are plain numbers and the first is the larger."""
    if isinstance(value, int | float) and isinstance(upper, int | float) and value > upper:
        raise ValueError(f"{name} must be at most {upper_name} = {upper:g}, got {value:g}.")


def _regularized_newton(
    method: str,
    info_type: type[TrustRegionInfo] | type[AdaptiveCubicInfo],
    shape: Shape,
    solver: Solver,
    curvature: CurvatureFn,
    initial_size: chex.Numeric,
    accept_ratio: optax.ScalarOrSchedule,
    resize: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    seed: int,
) -> optax.GradientTransformationExtraArgs:
    """The loop that both methods share: model, step, ratio, decision, size of the next model's region."""
    if not isinstance(shape, Shape):
        raise TypeError(f"shape must be an optcurv.Shape like optcurv.rmsprop_shape(), got {shape!r}.")
    check_function("solver", solver, "matvec, gradient, metric, radius, key", "such as optcurv.steihaug()")
    check_function("curvature", curvature, "value_fn, params", "such as optcurv.hessian_product")

    def init(params: PyTree) -> RegularizedNewtonState:
        zero, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return RegularizedNewtonState(
            count=count,
            size=jnp.asarray(initial_size, wide_dtype(params)),
            shape=shape.init(params),
            watch=start_watch(params),
            key=jax.random.key_data(jax.random.key(seed)),
            info=info_type(zero, zero, jnp.zeros((), bool), count, count, zero, zero),
        )

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        value_fn: ValueFn,
        value: chex.Numeric | None = None,
        curvature_fn: ValueFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, RegularizedNewtonState]:
        del extra_args  # those of the other links in a chain
        loss = scalar_fn(value_fn)
        gradient = at_least_float32(updates)
        value = jnp.asarray(loss(params) if value is None else value, state.size.dtype)
        watch = look(state.watch, gradient)
        shape_state = optax.tree.where(watch.after_spike, shape.init(params), state.shape)
        shape_state = shape.update(shape_state, gradient)
        metric = Metric(lambda v: shape.apply(shape_state, v), lambda v: shape.inverse(shape_state, v))
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        found = solver(curvature(curvature_fn or value_fn, params), gradient, metric, state.size, key)
        _raise_if_indefinite(found.stop)
        usable = jnp.isfinite(value) & (found.stop != Stop.NOT_FINITE) & ~watch.refused

        step = optax.tree.cast_like(found.step, updates)
        trial = optax.apply_updates(params, step)
        trial_value = loss(trial)
        noise = 10 * _rounding(gradient, params) + _rounding(jnp.ones_like(value), trial_value)
        decrease = _decrease(loss, trial, step, value, jnp.asarray(trial_value, value.dtype), gradient)
        ratio = decrease_ratio(value, decrease, found.predicted_decrease, noise)
        ratio = jnp.where(usable & (found.stop >= Stop.CONVERGED), ratio, -jnp.inf)
        accepted = ratio >= scheduled(accept_ratio, state.count)
        size = resize(state.size, ratio, accepted, state.count).astype(state.size.dtype)
        info = info_type(
            *map(jnp.float32, (ratio, state.size)),
            accepted=accepted,
            iterations=found.iterations,
            stop=jnp.int32(found.stop),
            predicted_decrease=jnp.float32(found.predicted_decrease),
            actual_decrease=jnp.float32(decrease),
        )
        new_state = RegularizedNewtonState(
            count=optax.safe_increment(state.count),
            size=jnp.where(usable, size, state.size),
            shape=optax.tree.where(usable, shape_state, state.shape),
            watch=watch,
            key=state.key,
            info=info,
        )
        return optax.tree.where(accepted, step, optax.tree.zeros_like(step)), new_state

    return checked(method, init, update)


def _decrease(
    loss: Callable[[PyTree], jax.Array],
    trial: PyTree,
    step: PyTree,
    value: jax.Array,
    trial_value: jax.Array,
    gradient: PyTree,
) -> jax.Array:
    """The decrease of the loss along a step; where it drowns in rounding, by the trapezoidal rule on the slopes."""
    decrease = value - trial_value
    drowns = jnp.abs(decrease) <= 4 * jnp.finfo(value.dtype).eps * jnp.maximum(1.0, jnp.abs(value))

    def from_slopes(trial: PyTree) -> jax.Array:
        _, slope = jax.jvp(loss, (trial,), (step,))
        return -0.5 * (optax.tree.vdot(gradient, at_least_float32(step)) + slope).astype(decrease.dtype)

    return jax.lax.cond(drowns, from_slopes, lambda _: decrease, trial)


def _rounding(slopes: PyTree, numbers: PyTree) -> jax.Array | float:
    """How far rounding numbers to their dtypes may move what has these slopes in them; 0 if those are no narrower."""

    def moved(slope: jax.Array, number: jax.Array) -> jax.Array | float:
        precision = jnp.finfo(jnp.result_type(number)).eps
        return precision * slope * number if precision > jnp.finfo(slope.dtype).eps else 0.0

    return optax.tree.norm(jax.tree.map(moved, slopes, numbers))


def _raise_if_indefinite(stop: jax.Array) -> None:
    """Names a broken shape where values are known, outside of jit; inside, the step is rejected."""
    if not isinstance(stop, Tracer) and stop == Stop.INDEFINITE_SHAPE:
        raise ValueError(
            "The shape is not positive definite: its inverse or its apply gave a vector a negative squared norm. "
            "Raise its eps, or check its update."
        )

"""The frame of Newton methods that regularise one model: a step, its ratio, and a size that follows the ratio."""

import numbers
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
    check_seed,
    checked,
    scalar_fn,
    scheduled,
    wide_dtype,
)
from optcurv.curvature import ProductFn
from optcurv.methods.norms import Norm
from optcurv.methods.subproblems import Solver, Stop
from optcurv.spikes import Watch, look, start_watch


class RegularizedNewtonState(NamedTuple):
    """State of `trust_region` and `adaptive_cubic`.

    Attributes:
      count: steps taken, for schedules.
      size: the radius Δ, or the weight σ, of the next step.
      norm: the norm's own state.
      watch: for spikes of the gradient.
      key: of the solver's random vectors, as key data.
      info: of the last step.
    """

    count: jax.typing.ArrayLike
    size: jax.Array
    norm: Any
    watch: Watch
    key: jax.Array
    info: Any


def check_regularization(
    initial_name: str,
    initial_size: Any,
    accept_ratio: Any,
    second_name: str,
    second_ratio: Any,
    growth: Any,
    shrinkage: Any,
) -> None:
    """Raises where an option that these methods share is out of range."""
    check_number(initial_name, initial_size, minimum=0.0, exclusive=True, constant=True)
    check_number("accept_ratio", accept_ratio, minimum=0.0, maximum=1.0)
    check_number(second_name, second_ratio, minimum=0.0, maximum=1.0)
    check_number("growth", growth, minimum=1.0, exclusive=True)
    check_number("shrinkage", shrinkage, minimum=1.0, exclusive=True)
    check_order("accept_ratio", accept_ratio, second_name, second_ratio)


def check_order(name: str, value: Any, upper_name: str, upper: Any) -> None:
    """Raises if both are plain numbers and the first is the larger."""
    if isinstance(value, numbers.Real) and isinstance(upper, numbers.Real) and float(value) > float(upper):
        raise ValueError(f"{name} must be at most {upper_name} = {upper:g}, got {value:g}.")


def regularized_newton(
    method: str,
    info_type: Callable[..., Any],
    norm: Norm,
    solver: Solver,
    curvature: ProductFn,
    initial_size: chex.Numeric,
    accept_ratio: optax.ScalarOrSchedule,
    resize: Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    seed: int,
) -> optax.GradientTransformationExtraArgs:
    """The loop that both methods share: model, step, ratio, decision, size of the next model's region.

    `resize` takes the size, the ratio, whether the step was accepted, whether the region held it back, and the count.
    """
    if not isinstance(norm, Norm):
        raise TypeError(f"norm must be an optcurv.Norm like optcurv.rmsprop_norm(), got {norm!r}.")
    check_seed("seed", seed)
    check_function("solver", solver, "matvec, gradient, metric, radius, key", "such as optcurv.steihaug()")
    check_function("curvature", curvature, "value_fn, params", "such as optcurv.hessian_product")

    def init(params: PyTree) -> RegularizedNewtonState:
        zero, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        return RegularizedNewtonState(
            count=count,
            size=jnp.asarray(initial_size, wide_dtype(params)),
            norm=norm.init(params),
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
        curvature_value_fn: ValueFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, RegularizedNewtonState]:
        del extra_args  # those of the other links in a chain
        loss = scalar_fn(value_fn)
        gradient = at_least_float32(updates)
        value = jnp.asarray(loss(params) if value is None else value, state.size.dtype)
        watch = look(state.watch, gradient)
        norm_state = optax.tree.where(watch.after_spike, norm.init(params), state.norm)
        norm_state = norm.update(norm_state, gradient)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        found = solver(
            curvature(curvature_value_fn or value_fn, params), gradient, norm.at(norm_state), state.size, key
        )
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
        held = (found.stop == Stop.BOUNDARY) | (found.stop == Stop.NEGATIVE_CURVATURE)
        size = resize(state.size, ratio, accepted, held, state.count).astype(state.size.dtype)
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
            norm=optax.tree.where(usable, norm_state, state.norm),
            watch=watch,
            key=state.key,
            info=info,
        )
        return optax.tree.where(accepted, step, optax.tree.zeros_like(step)), new_state

    return checked(method, init, update)


def decrease_ratio(
    value: jax.Array, decrease: jax.Array, predicted_decrease: jax.Array, noise: jax.Array | float = 0.0
) -> jax.Array:
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
      >>> from optcurv.methods.regularized_newton import decrease_ratio
      >>> print(decrease_ratio(jnp.array(3.0), jnp.array(1.0), jnp.array(4.0)))
      0.25
    """
    rounding = 10 * jnp.finfo(value.dtype).eps * jnp.abs(value) + noise
    actual, predicted = decrease + rounding, predicted_decrease + rounding
    ratio = jnp.where((actual == 0) & (predicted == 0), 1.0, actual / predicted)
    return jnp.where((predicted >= 0) & ~jnp.isnan(ratio) & jnp.isfinite(decrease), ratio, -jnp.inf)


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
    """Names a broken norm where values are known, outside of jit; inside, the step is rejected."""
    if not isinstance(stop, Tracer) and stop == Stop.INDEFINITE_NORM:
        raise ValueError(
            "The norm is not positive definite: a product with M or its inverse gave a vector a negative squared norm. "
            "Raise its eps, or check its update."
        )

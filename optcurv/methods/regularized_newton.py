"""The frame of Newton methods that regularise one model: a step, its ratio, and a size that follows the ratio."""

import dataclasses
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
from optcurv.convolutions import with_canonical_convolutions
from optcurv.curvature import MatVec, ProductFn
from optcurv.krylov import Metric
from optcurv.methods.damped import around
from optcurv.methods.norms import Norm
from optcurv.methods.subproblems import ModelStep, Solver, Stop
from optcurv.spikes import Watch, look, start_watch


class RegularizedNewtonState(NamedTuple):
    """State of `trust_region`, `adaptive_cubic` and `levenberg_marquardt`.

    Attributes:
      count: steps taken, for schedules.
      size: the radius Δ, the weight σ or the damping λ of the next step.
      norm: the norm's own state.
      watch: for spikes of the gradient.
      previous: the last step, zero if it was rejected; empty without momentum.
      key: of the solver's random vectors, as key data.
      info: of the last step.
    """

    count: jax.typing.ArrayLike
    size: jax.Array
    norm: Any
    watch: Watch
    previous: PyTree
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


class _Judgement(NamedTuple):
    """A step of the length chosen, its decrease of the loss, and that over what was predicted at lengths 1 and this."""

    step: PyTree
    length: jax.Array
    decrease: jax.Array
    ratio: jax.Array
    ratio_of_length: jax.Array


@dataclasses.dataclass(frozen=True)
class RegularizedNewton:
    """The loop that these methods share: model, step, ratio, decision, size of the next model's region.

    Attributes:
      method: its name, for messages.
      info_type: what it reports.
      norm: M.
      solver: of the regularised model.
      curvature: B.
      initial_size: the radius, the weight or the damping to begin with.
      accept_ratio: the least ratio of a step that is taken.
      resize: makes the next size of this one, the ratio, whether the step was accepted, whether the region held it
        back, and the count.
      seed: of the solver's random vectors.
      momentum: the region is around that multiple of the last step; None for around zero.
      length_trials: so many more lengths of the step are tried.
    """

    method: str
    info_type: Any
    norm: Norm
    solver: Solver
    curvature: ProductFn
    initial_size: chex.Numeric
    accept_ratio: optax.ScalarOrSchedule
    resize: Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    seed: int
    momentum: optax.ScalarOrSchedule | None = None
    length_trials: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.norm, Norm):
            raise TypeError(f"norm must be an optcurv.Norm like optcurv.rmsprop_norm(), got {self.norm!r}.")
        check_seed("seed", self.seed)
        check_function("solver", self.solver, "matvec, gradient, metric, radius, key", "such as optcurv.steihaug()")
        check_function("curvature", self.curvature, "value_fn, params", "such as optcurv.hessian_product")

    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """Returns the optimiser."""
        return checked(self.method, self._init, self._update)

    def _init(self, params: PyTree) -> RegularizedNewtonState:
        zero, count, false = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        return RegularizedNewtonState(
            count=count,
            size=jnp.asarray(self.initial_size, wide_dtype(params)),
            norm=self.norm.init(params),
            watch=start_watch(params),
            previous=() if self.momentum is None else optax.tree.zeros_like(at_least_float32(params)),
            key=jax.random.key_data(jax.random.key(self.seed)),
            info=_info(self.info_type, zero, zero, false, count, count, zero, zero, zero, false),
        )

    def _update(
        self,
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
        norm_state = optax.tree.where(watch.after_spike, self.norm.init(params), state.norm)
        norm_state = self.norm.update(norm_state, gradient)
        product = self.curvature(curvature_value_fn or value_fn, params)
        found = self._solve(state, product, gradient, self.norm.at(norm_state))
        _raise_if_indefinite(found.stop)

        judged = self._judge(loss, params, gradient, value, found, updates)
        usable = jnp.isfinite(value) & (found.stop != Stop.NOT_FINITE) & ~watch.refused
        solved = usable & (found.stop >= Stop.CONVERGED)
        ratio = jnp.where(solved, judged.ratio, -jnp.inf)
        accepted = solved & (judged.ratio_of_length >= scheduled(self.accept_ratio, state.count))
        step = optax.tree.where(accepted, judged.step, optax.tree.zeros_like(judged.step))
        used = state.size if found.size is None else jnp.asarray(found.size, state.size.dtype)
        held = (found.stop == Stop.BOUNDARY) | (found.stop == Stop.NEGATIVE_CURVATURE)
        size = self.resize(used, ratio, accepted, held, state.count).astype(used.dtype)
        kept = () if self.momentum is None else step
        new_state = RegularizedNewtonState(
            count=optax.safe_increment(state.count),
            size=jnp.where(usable, size, state.size),
            norm=optax.tree.where(usable, norm_state, state.norm),
            watch=watch,
            previous=optax.tree.where(usable, optax.tree.cast_like(kept, state.previous), state.previous),
            key=state.key,
            info=_info(
                self.info_type,
                *(ratio, used, accepted, found.iterations, found.stop),
                *(found.predicted_decrease, judged.decrease, judged.length, found.on_residuals),
            ),
        )
        return step, new_state

    def _solve(self, state: RegularizedNewtonState, product: MatVec, gradient: PyTree, metric: Metric) -> ModelStep:
        """The regularised model's minimiser."""
        solver = self.solver
        if self.momentum is not None:
            momentum = scheduled(self.momentum, state.count, state.size.dtype)
            solver = around(optax.tree.scale(momentum, state.previous), solver)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        return solver(product, gradient, metric, state.size, key)

    def _judge(
        self,
        loss: Callable[[PyTree], jax.Array],
        params: PyTree,
        gradient: PyTree,
        value: jax.Array,
        found: ModelStep,
        updates: PyTree,
    ) -> _Judgement:
        """Tells how the loss decreases along a step, and chooses the step's length."""
        step = optax.tree.cast_like(found.step, updates)
        decrease, ratio = _decrease_and_ratio(loss, params, step, gradient, value, found.predicted_decrease)
        if not self.length_trials:
            return _Judgement(step, jnp.ones_like(value), decrease, ratio, ratio)
        length, decrease = _best_length(loss, params, step, value, decrease, self.length_trials)
        step = optax.tree.cast_like(optax.tree.scale(length, found.step), updates)
        slope = jnp.asarray(optax.tree.vdot(gradient, found.step), value.dtype)
        predicted = length**2 * found.predicted_decrease + (length**2 - length) * slope
        return _Judgement(step, length, decrease, ratio, decrease_ratio(value, decrease, predicted))


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


def _info(info_type: Any, ratio: Any, size: Any, accepted: Any, iterations: Any, stop: Any, *rest: Any) -> Any:
    """The methods report as many of these as they have fields for."""
    predicted, actual, length, on_residuals = rest
    fields = (
        *map(jnp.float32, (ratio, size)),
        accepted,
        iterations,
        jnp.int32(stop),
        *map(jnp.float32, (predicted, actual, length)),
        jnp.asarray(on_residuals),
    )
    return info_type(*fields[: len(info_type._fields)])


def _decrease_and_ratio(
    loss: Callable[[PyTree], jax.Array],
    params: PyTree,
    step: PyTree,
    gradient: PyTree,
    value: jax.Array,
    predicted_decrease: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The decrease of the loss along a step, and its ratio to what was predicted."""
    trial = optax.apply_updates(params, step)
    trial_value = loss(trial)
    noise = 10 * _rounding(gradient, params) + _rounding(jnp.ones_like(value), trial_value)
    decrease = _decrease(loss, trial, step, value, jnp.asarray(trial_value, value.dtype), gradient)
    return decrease, decrease_ratio(value, decrease, predicted_decrease, noise)


def _best_length(
    loss: Callable[[PyTree], jax.Array],
    params: PyTree,
    step: PyTree,
    value: jax.Array,
    decrease: jax.Array,
    num_trials: int,
) -> tuple[jax.Array, jax.Array]:
    """Halves a step's length, or else doubles it, as long as that lowers the loss; returns length and decrease."""

    def value_at(length: jax.Array) -> jax.Array:
        return loss(optax.apply_updates(params, optax.tree.cast_like(optax.tree.scale(length, step), params)))

    fast_value_at = with_canonical_convolutions(value_at, jnp.ones_like(value))

    def decrease_at(length: jax.Array) -> jax.Array:
        decrease = value - fast_value_at(length).astype(value.dtype)
        return jnp.where(jnp.isfinite(decrease), decrease, -jnp.inf)

    def further(state: tuple[Any, ...]) -> tuple[Any, ...]:
        length, decrease, factor, _, number = state
        next_decrease = decrease_at(factor * length)
        better = (next_decrease > decrease) | ~jnp.isfinite(decrease)
        turned = ~better & (number == 0)  # no shorter, so perhaps longer
        return (
            jnp.where(better, factor * length, length),
            jnp.where(better, next_decrease, decrease),
            jnp.where(turned, 2.0, factor).astype(factor.dtype),
            better | turned,
            number + 1,
        )

    start = (jnp.ones_like(value), decrease, jnp.full_like(value, 0.5), jnp.ones((), bool), jnp.zeros((), jnp.int32))
    length, decrease, *_ = jax.lax.while_loop(lambda state: state[3] & (state[4] < num_trials), further, start)
    return length, decrease


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
    """Names a broken norm or loss where values are known, outside of jit; inside, the step is rejected."""
    if isinstance(stop, Tracer):
        return
    if stop == Stop.INDEFINITE_LOSS:
        raise ValueError(
            "The Hessian of Composite.loss_fn by the model's outputs is not positive semi-definite, or the loss mixes "
            "examples (entries along the outputs' first axis): write loss_fn as a mean over examples of a convex "
            "function of their outputs, or choose solver=optcurv.conjugate_gradients()."
        )
    if stop == Stop.INDEFINITE_NORM:
        raise ValueError(
            "The norm is not positive definite: a product with M or its inverse gave a vector a negative squared norm. "
            "Raise its eps, or check its update."
        )

"""PAL: parabolic approximation line search."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import (
    PyTree,
    ValueFn,
    at_least_float32,
    check_number,
    checked,
    scalar_fn,
    scheduled,
)


class PalInfo(NamedTuple):
    """What one line search found; scalars for the log.

    Attributes:
      slope: :math:`l'(0)` along the normalised direction.
      curvature: :math:`l''(0)`, after the curvature factor.
      step: the distance moved, in units of the parameters.
      case: 1 the parabola's minimum, 2 a measuring step downhill, 3 no step, 0 something was not finite (no step).
      clipped: whether the step was longer before it was clipped to `max_step`.
      noise: whether the curvature was lost in rounding and was not used: the losses (or slopes) at 0 and μ differ from
        those of a straight line by no more than 20 units in the last place of both. This does not see the noise of
        a loss that rounds more coarsely than its size suggests, as optax's cross-entropy does near 0.
    """

    slope: jax.Array
    curvature: jax.Array
    step: jax.Array
    case: jax.Array
    clipped: jax.Array
    noise: jax.Array


class ScaleByParabolicLinesearchState(NamedTuple):
    """State of `scale_by_parabolic_linesearch`.

    Attributes:
      count: steps taken, for schedules.
      shortest: the measuring step below which rounding would blur the curvature, as the last step found it; 0 at first.
      info: what the last step found.
    """

    count: jax.typing.ArrayLike
    shortest: jax.Array
    info: PalInfo


def scale_by_parabolic_linesearch(
    measuring_step: optax.ScalarOrSchedule = 0.1,
    *,
    curvature_factor: optax.ScalarOrSchedule = 0.6,
    max_step: optax.ScalarOrSchedule = 1.0,
    exact_slope: bool = True,
    measure_slope: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the signed step it is given to the minimum of a parabola along it.

    Along :math:`d = u / \|u\|`, with :math:`l(s) = L(w + s d)`, one value at the measuring step μ gives

    .. math:: l'' = \lambda\, \frac{(l(\mu) - l(0)) / \mu - l'}{\mu / 2}, \qquad
        s = \begin{cases} -l'/l'' & l' < 0,\ l'' > 0 \\ \mu & l' < 0,\ l'' \le 0 \\ 0 & \text{otherwise}\end{cases}

    clipped to `max_step` last (Eqs. 4, 5 and 9 and section 2.3 of "PAL: A fast DNN optimization method based on
    curvature information"). Only the direction of the incoming step matters, not its length, so that any optimiser may
    precede it: `optax.chain(optax.adam(1.0), optcurv.scale_by_parabolic_linesearch())`. An optimiser with averages of
    its own keeps values that are not finite in them, unless it is wrapped in `optax.apply_if_finite`.

    Where rounding would decide, and nowhere else, two things differ from the paper. The parabola goes through the point
    that :math:`w + \mu d` is rounded to, at its actual displacement δ: :math:`\mu = \|\delta\|` and
    :math:`l' = \nabla L \cdot \delta / \mu`. And a μ at which :math:`l''` would be rounding noise is raised, though not
    beyond `max_step`: to the resolution of the parameters, :math:`\varepsilon \|w\|`, and to where the last step's
    :math:`l''` is twelve times the noise, :math:`\mu \approx \sqrt{1000\, \varepsilon\, l(0) / |l''|}`.
    An :math:`l''` that is still noise counts as 0. Late in training this needs a loss whose relative precision is good,
    such as `optcurv.softmax_cross_entropy_with_integer_labels`.

    The update takes the extra arguments `value_fn` (required), `value` and `grad`, the loss and its gradient at params.
    With both given, one forward pass is all the search costs; what is missing is evaluated. Wherever the loss, the
    slope or the step is not finite, the update is zero.

    Args:
      measuring_step: μ > 0, a distance in units of the parameters, a number or a schedule.
      curvature_factor: λ > 0; below 1 it lengthens the step by 1/λ. A number or a schedule.
      max_step: the longest step, > 0, in units of the parameters, a number or a schedule.
      exact_slope: take :math:`l' = \nabla L \cdot d`, which costs one inner product (default); if False, the
        published approximation :math:`l' = -\|u\|`, right only where the incoming step is the negative gradient.
      measure_slope: measure the slope at μ in place of the loss, :math:`l'' = \lambda (l'(\mu) - l'(0)) / \mu`, by
        one Jacobian-vector product. That allows a μ a hundred times shorter, and losses that are coarse near 0, but a
        step costs 2 gradients in place of 4/3, because weights and activations both vary.

    Returns:
      The transformation.

    Raises:
      ValueError: if a number is out of range, or `update` is called without params or with a gradient or a state that
        does not fit them.
      TypeError: if an argument has the wrong type, `update` is called without `value_fn`, or the loss is not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optcurv
      >>> loss = lambda w: 2.0 * jnp.sum((w - 3.0) ** 2)
      >>> optimizer = optax.chain(
      ...     optax.sgd(1.0), optcurv.scale_by_parabolic_linesearch(curvature_factor=1.0, max_step=10.0)
      ... )
      >>> w = jnp.zeros(4)
      >>> value, grad = jax.value_and_grad(loss)(w)
      >>> updates, _ = optimizer.update(grad, optimizer.init(w), w, value=value, grad=grad, value_fn=loss)
      >>> print((w + updates).round(3))
      [3. 3. 3. 3.]
    """
    check_number("measuring_step", measuring_step, minimum=0.0, exclusive=True)
    check_number("curvature_factor", curvature_factor, minimum=0.0, exclusive=True)
    check_number("max_step", max_step, minimum=0.0, exclusive=True)
    for name, option in (("exact_slope", exact_slope), ("measure_slope", measure_slope)):
        if not isinstance(option, bool):
            raise TypeError(f"{name} must be True or False, got {option!r}.")
    measure = _measure_slope if measure_slope else _measure_value

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        value_fn: ValueFn,
        value: chex.Numeric | None = None,
        grad: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByParabolicLinesearchState]:
        del extra_args  # those of the other links in a chain
        loss = scalar_fn(value_fn)
        if exact_slope and grad is None:  # costs nothing where the caller's gradient shares this jit
            value, grad = jax.value_and_grad(loss)(params)
        elif value is None:
            value = loss(params)

        direction, norm = _direction_and_norm(at_least_float32(updates))
        gradient = at_least_float32(grad) if exact_slope else optax.tree.scale(-norm, direction)
        slope = jnp.asarray(optax.tree.vdot(gradient, direction))

        given, longest, factor = (
            scheduled(number, state.count, norm.dtype) for number in (measuring_step, max_step, curvature_factor)
        )
        shortest = jnp.maximum(state.shortest, _resolution(params)).astype(norm.dtype)
        mu = jnp.maximum(given, jnp.minimum(shortest, longest))
        mu_d = optax.tree.cast_like(optax.tree.scale(mu, direction), updates)
        trial, moved, change, distance, slope = _trial_point(params, mu_d, gradient, slope)
        value_there, second, clarity = measure(loss, jnp.asarray(value), change, trial, moved)
        curvature, noise = factor * second / distance / distance, ~(clarity > 1)
        shortest = mu * jnp.minimum(jnp.sqrt(12 / clarity), 10)
        finite = jnp.isfinite(norm) & jnp.isfinite(slope) & jnp.isfinite(value_there) & jnp.isfinite(curvature)
        step, case = _step_and_case(finite, slope, jnp.where(noise, 0.0, curvature), given)
        clipped, step = step > longest, jnp.minimum(step, longest)
        info = PalInfo(*map(jnp.float32, (slope, curvature, step)), case=jnp.int32(case), clipped=clipped, noise=noise)
        scaled = optax.tree.where(step > 0, optax.tree.scale(step, direction), optax.tree.zeros_like(direction))
        new_state = ScaleByParabolicLinesearchState(
            count=optax.safe_increment(state.count),
            shortest=jnp.where(jnp.isfinite(shortest), shortest, state.shortest).astype(jnp.float32),
            info=info,
        )
        return optax.tree.cast_like(scaled, updates), new_state

    return checked("scale_by_parabolic_linesearch", _init, update)


def _init(params: PyTree) -> ScaleByParabolicLinesearchState:
    del params
    zero, no = jnp.zeros((), jnp.float32), jnp.zeros((), bool)
    info = PalInfo(zero, zero, zero, case=jnp.zeros((), jnp.int32), clipped=no, noise=no)
    return ScaleByParabolicLinesearchState(count=jnp.zeros((), jnp.int32), shortest=zero, info=info)


def _direction_and_norm(updates: PyTree) -> tuple[PyTree, jax.Array]:
    """Divides by the largest entry first: the squares of small ones underflow, those of large ones overflow."""
    largest = jnp.asarray(optax.tree.norm(updates, ord="inf"))
    largest = jnp.where(largest < jnp.finfo(largest.dtype).tiny, 1.0, largest)
    norm = jnp.asarray(optax.tree.norm(optax.tree.scale(1 / largest, updates)))
    return optax.tree.scale(1 / largest / jnp.where(norm > 0, norm, 1.0), updates), largest * norm


def _trial_point(
    params: PyTree, mu_d: PyTree, gradient: PyTree, slope: jax.Array
) -> tuple[PyTree, PyTree, jax.Array, jax.Array, jax.Array]:
    """Returns w + μd as it is rounded, the displacement, the loss's first-order change, the distance, and the slope.

    The barriers let one vector at a time lie in memory beside the gradient: the slope's direction, the displacement,
    the trial point. XLA would hold all three.
    """
    slope, here = jax.lax.optimization_barrier((slope, params))
    moved = optax.tree.sub(at_least_float32(rounded_sum(here, mu_d)), at_least_float32(here))
    change, distance = optax.tree.vdot(gradient, moved), optax.tree.norm(moved)
    change, distance, here = jax.lax.optimization_barrier((change, distance, here))
    return rounded_sum(here, mu_d), moved, change, jnp.where(distance > 0, distance, 1.0), slope


def rounded_sum(params: PyTree, updates: PyTree) -> PyTree:
    """Adds and rounds to the parameters' dtypes; XLA skips the rounding where the sum is used in a wider one."""

    def rounded(leaf: jax.Array) -> jax.Array:
        dtype = jnp.finfo(leaf.dtype)
        return jax.lax.reduce_precision(leaf, dtype.nexp, dtype.nmant)

    return jax.tree.map(rounded, optax.apply_updates(params, updates))


def _resolution(params: PyTree) -> jax.Array | float:
    """How far a step must go for its direction to survive the rounding of the parameters to their dtypes."""
    epsilons = jax.tree.map(lambda leaf: jnp.finfo(jnp.result_type(leaf)).eps, params)
    return optax.tree.norm(optax.tree.mul(epsilons, at_least_float32(params)))


def parabola_curvature(
    value: jax.Array | float, slope: jax.Array | float, step: jax.Array | float, value_at_step: jax.Array | float
) -> jax.Array | float:
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
      >>> from optcurv.methods.pal import parabola_curvature
      >>> parabola_curvature(value=5.0, slope=-2.0, step=2.0, value_at_step=7.0)  # l(s) = 5 - 2 s + 1.5 s²
      3.0
    """
    return ((value_at_step - value) / step - slope) / (step / 2)


def _measure_value(
    loss: Callable[[PyTree], jax.Array], value: jax.Array, change: jax.Array, trial: PyTree, moved: PyTree
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the loss at the trial point, l'' times the squared distance, and how clearly that stands out."""
    del moved
    value_there = loss(trial)
    second = jnp.asarray(parabola_curvature(at_least_float32(value), change, 1.0, at_least_float32(value_there)))
    return value_there, second, _clarity(second / 2, value, value_there)


def _measure_slope(
    loss: Callable[[PyTree], jax.Array], value: jax.Array, change: jax.Array, trial: PyTree, moved: PyTree
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `_measure_value`, from the slope at the trial point."""
    del value
    value_there, change_there = jax.jvp(loss, (trial,), (optax.tree.cast_like(moved, trial),))
    second = at_least_float32(change_there) - change
    return value_there, second, _clarity(second, change, change_there)


def _clarity(difference: jax.Array, here: jax.Array, there: jax.Array) -> jax.Array:
    """A difference in units of the noise, which for losses of small networks was up to 20 units in the last place."""
    size = jnp.abs(at_least_float32(here)) + jnp.abs(at_least_float32(there))
    return jnp.abs(difference) / (20 * jnp.finfo(there.dtype).eps * size)


def _step_and_case(
    finite: jax.Array, slope: jax.Array, curvature: jax.Array, measuring_step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The three cases of section 2.3, and no step where something is not finite."""
    convex, downhill = curvature > 0, slope < 0
    minimum = -slope / jnp.where(convex, curvature, 1.0)
    step = jnp.where(downhill, jnp.where(convex, minimum, measuring_step), 0.0)
    case = jnp.where(downhill, jnp.where(convex, 1, 2), 3)
    return jnp.where(finite, step, 0.0), jnp.where(finite, case, 0)


def _momentum(decay: float) -> optax.GradientTransformation:
    """`optax.trace`, but it keeps no gradient that is not finite, and forgets a spike."""

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, optax.TraceState]:
        del params
        largest, remembered = (optax.tree.norm(tree, ord="inf") for tree in (updates, state.trace))
        finite = jnp.isfinite(largest)
        kept = jnp.where(finite, jnp.where(remembered > 1000 * largest, 0.0, decay), 1.0)
        new = optax.tree.where(finite, updates, optax.tree.zeros_like(updates))
        trace = optax.tree.cast_like(optax.tree.add_scale(new, kept, state.trace), state.trace)
        emitted = optax.tree.scale(jnp.where(finite, 1.0, jnp.nan), trace)  # the search then stays where it is
        return optax.tree.cast_like(emitted, updates), optax.TraceState(trace)

    return optax.GradientTransformation(lambda params: optax.TraceState(optax.tree.zeros_like(params)), update)


def pal(
    measuring_step: optax.ScalarOrSchedule = 0.1,
    *,
    momentum: float = 0.4,
    curvature_factor: optax.ScalarOrSchedule = 0.6,
    max_step: optax.ScalarOrSchedule = 1.0,
    decay: float = 1.0,
    decay_steps: int = 1,
    exact_slope: bool = True,
    measure_slope: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""The complete PAL optimiser, Algorithm 1 of its paper; emits the final signed step.

    Moves along :math:`-g_t`, :math:`g_t = \alpha g_{t-1} + \nabla L`, to the minimum of a parabola; see
    `optcurv.scale_by_parabolic_linesearch` for the step and for the extra arguments of the update. μ and the longest
    step decay smoothly, as :math:`d^{t / \text{decay\_steps}}`. A gradient that is not finite enters no average, and a
    momentum a thousand times the gradient, as after a spike of the loss, is forgotten.

    With momentum, the published slope :math:`-\|g_t\|` is biased; the exact one is the default here.

    Args:
      measuring_step: μ > 0, published 0.01 to 0.1, a number or a schedule.
      momentum: α in [0, 1], published 0 to 0.6.
      curvature_factor: λ > 0, published 0.4 to 0.6, a number or a schedule.
      max_step: the longest step, > 0, published 0.1 to 1, a number or a schedule.
      decay: d in (0, 1], published 0.85 to 0.95 an epoch; default 1, no decay.
      decay_steps: steps in which μ and the longest step shrink by `decay`, ≥ 1; for example those of an epoch.
      exact_slope: see `optcurv.scale_by_parabolic_linesearch`.
      measure_slope: likewise.

    Returns:
      The optimiser.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optcurv
      >>> loss = lambda w: jnp.sum(jnp.array([1.0, 10.0]) * w**2)
      >>> optimizer = optcurv.pal(measuring_step=0.1)
      >>> w = jnp.array([1.0, 1.0])
      >>> state = optimizer.init(w)
      >>> for _ in range(50):
      ...     value, grad = jax.value_and_grad(loss)(w)
      ...     updates, state = optimizer.update(grad, state, w, value=value, grad=grad, value_fn=loss)
      ...     w = optax.apply_updates(w, updates)
      >>> print(loss(w) < 1e-4)
      True
    """
    check_number("measuring_step", measuring_step, minimum=0.0, exclusive=True)
    check_number("max_step", max_step, minimum=0.0, exclusive=True)
    check_number("momentum", momentum, minimum=0.0, maximum=1.0, constant=True)
    check_number("decay", decay, minimum=0.0, maximum=1.0, exclusive=True, constant=True)
    check_number("decay_steps", decay_steps, minimum=1, constant=True)

    def decayed(value: optax.ScalarOrSchedule) -> optax.Schedule:
        return lambda count: scheduled(value, count) * decay ** (jnp.asarray(count, float) / decay_steps)

    search = scale_by_parabolic_linesearch(
        decayed(measuring_step),
        curvature_factor=curvature_factor,
        max_step=decayed(max_step),
        exact_slope=exact_slope,
        measure_slope=measure_slope,
    )
    return checked("pal", *optax.chain(_momentum(momentum), optax.scale(-1.0), search))

"""PAL: parabolic approximation line search."""

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
from optcurv.quadratic import parabola_curvature


class PalInfo(NamedTuple):
    """What one line search found; scalars for the log.

    Attributes:
      slope: :math:`l'(0)` along the normalised direction.
      curvature: :math:`l''(0)`, after the curvature factor.
      step: the distance moved, in units of the parameters.
      case: 1 the parabola's minimum, 2 a measuring step downhill, 3 no step, 0 something was not finite (no step).
    """

    slope: jax.Array
    curvature: jax.Array
    step: jax.Array
    case: jax.Array


class ScaleByParabolicLinesearchState(NamedTuple):
    """State of `scale_by_parabolic_linesearch`: the step count, for schedules, and the last step's info."""

    count: jax.typing.ArrayLike
    info: PalInfo


def scale_by_parabolic_linesearch(
    measuring_step: optax.ScalarOrSchedule = 0.1,
    *,
    curvature_factor: optax.ScalarOrSchedule = 0.6,
    max_step: optax.ScalarOrSchedule = 1.0,
    exact_slope: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives the signed step it is handed the length at which a parabola along it is least.

    Along :math:`d = u / \|u\|`, with :math:`l(s) = L(w + s d)`, one value at the measuring step μ gives

    .. math:: l'' = \lambda\, \frac{(l(\mu) - l(0)) / \mu - l'}{\mu / 2}, \qquad
        s = \begin{cases} -l'/l'' & l' < 0,\ l'' > 0 \\ \mu & l' < 0,\ l'' \le 0 \\ 0 & \text{otherwise}\end{cases}

    clipped to `max_step` last (Eqs. 4, 5 and 9 and section 2.3 of "PAL: A fast DNN optimization method based on
    curvature information"). Only the direction of the incoming step matters, not its length, so that any optimiser may
    stand before it, after its sign flip: `optax.chain(optax.adam(1.0), optcurv.scale_by_parabolic_linesearch())`. One
    with averages of its own keeps what is not finite in them, unless wrapped in `optax.apply_if_finite`.

    The update takes the extra arguments `value_fn` (required), `value` and `grad`, the loss and its gradient at params.
    With both given, one forward pass is all the search costs; what is missing it evaluates. Wherever the loss, the
    slope or the step is not finite, the update is zero.

    Args:
      measuring_step: μ > 0, a distance in units of the parameters, a number or a schedule.
      curvature_factor: λ > 0; below 1 it lengthens the step by 1/λ. A number or a schedule.
      max_step: the longest step, > 0, in units of the parameters, a number or a schedule.
      exact_slope: take :math:`l' = \nabla L \cdot d`, which costs one inner product (default); if False, the
        published approximation :math:`l' = -\|u\|`, right only where the incoming step is the negative gradient.

    Returns:
      The transformation.

    Raises:
      ValueError: if a number is out of range, or `update` is called without params or with a gradient or a state that
        does not fit them.
      TypeError: if an argument has the wrong type, `update` is called without `value_fn`, or the loss is no scalar.

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
    if not isinstance(exact_slope, bool):
        raise TypeError(f"exact_slope must be True or False, got {exact_slope!r}.")

    def init(params: PyTree) -> ScaleByParabolicLinesearchState:
        del params
        zero = jnp.zeros((), jnp.float32)
        info = PalInfo(zero, zero, zero, jnp.zeros((), jnp.int32))
        return ScaleByParabolicLinesearchState(count=jnp.zeros((), jnp.int32), info=info)

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

        updates_wide = at_least_float32(updates)
        norm = optax.tree.norm(updates_wide)
        length = jnp.where(norm > 0, norm, 1.0)
        direction = optax.tree.scale(1 / length, updates_wide)
        slope = jnp.asarray(optax.tree.vdot(at_least_float32(grad), updates_wide)) / length if exact_slope else -norm

        mu = scheduled(measuring_step, state.count, norm.dtype)
        longest = scheduled(max_step, state.count, norm.dtype)
        factor = scheduled(curvature_factor, state.count, norm.dtype)
        trial = optax.apply_updates(params, optax.tree.cast_like(optax.tree.scale(mu, direction), updates))
        curvature = factor * parabola_curvature(at_least_float32(value), slope, mu, at_least_float32(loss(trial)))

        finite = jnp.isfinite(norm) & jnp.isfinite(slope) & jnp.isfinite(curvature)
        step, case = _step_and_case(slope, curvature, mu, longest)
        step, case = jnp.where(finite, step, 0.0), jnp.where(finite, case, 0)
        info = PalInfo(*map(jnp.float32, (slope, curvature, step)), case=jnp.int32(case))
        scaled = optax.tree.where(step > 0, optax.tree.scale(step, direction), optax.tree.zeros_like(direction))
        new_state = ScaleByParabolicLinesearchState(count=optax.safe_increment(state.count), info=info)
        return optax.tree.cast_like(scaled, updates), new_state

    return checked("scale_by_parabolic_linesearch", init, update)


def _step_and_case(
    slope: jax.Array, curvature: jax.Array, measuring_step: jax.Array, max_step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The three cases of section 2.3, the clip last."""
    convex, downhill = curvature > 0, slope < 0
    minimum = -slope / jnp.where(convex, curvature, 1.0)
    step = jnp.where(downhill, jnp.where(convex, minimum, measuring_step), 0.0)
    return jnp.minimum(step, max_step), jnp.where(downhill, jnp.where(convex, 1, 2), 3)


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
) -> optax.GradientTransformationExtraArgs:
    r"""The PAL optimiser, Algorithm 1 of its paper whole; emits the final signed step.

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
      decay_steps: steps in which μ and the longest step shrink by `decay`, ≥ 1; say an epoch's.
      exact_slope: see `optcurv.scale_by_parabolic_linesearch`.

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
        decayed(measuring_step), curvature_factor=curvature_factor, max_step=decayed(max_step), exact_slope=exact_slope
    )
    return checked("pal", *optax.chain(_momentum(momentum), optax.scale(-1.0), search))

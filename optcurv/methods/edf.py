"""EDF: exponentially decaying flows, steps along Krylov-solved Gauss-Newton or Hessian directions."""

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import (
    PyTree,
    ValueFn,
    at_least_float32,
    check_count,
    check_function,
    check_number,
    checked,
    scheduled,
)
from optcurv.curvature import ProductFn, gauss_newton_product
from optcurv.krylov import minres
from optcurv.spikes import Watch, look, start_watch


class EdfInfo(NamedTuple):
    r"""What one EDF step did; scalars for the log.

    Attributes:
      damping: :math:`\lambda`.
      residual_norm: :math:`\|g - (A + \lambda I) v\|` after the Krylov steps.
      iterations: Krylov steps that changed the direction.
      cosine: of the angle between the direction and the gradient handed in; negative for an ascent direction, which an
        indefinite Hessian can give.
      negative_curvature: whether the damped matrix was found to be indefinite. With Gauss-Newton products the loss
        is then not convex in the model's outputs.
      breakdown: whether rounding turned the direction uphill although no negative curvature was met; the direction of
        one Krylov step then takes its place.
      finite: whether gradient and products were finite and a direction was found; if not, the direction is zero.
      refused: whether the gradient was refused as a spike; likewise.
    """

    damping: jax.Array
    residual_norm: jax.Array
    iterations: jax.Array
    cosine: jax.Array
    negative_curvature: jax.Array
    breakdown: jax.Array
    finite: jax.Array
    refused: jax.Array


class ScaleByEdfState(NamedTuple):
    """State of `scale_by_edf`: the step count, for schedules, the watch for spikes, and the last step's info."""

    count: jax.typing.ArrayLike
    watch: Watch
    info: EdfInfo


def scale_by_edf(
    max_iter: int = 2,
    *,
    curvature: ProductFn = gauss_newton_product,
    damping_scale: optax.ScalarOrSchedule = 1.0,
    damping_power: optax.ScalarOrSchedule = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by an EDF direction; keeps the gradient's sign.

    .. math:: v = P_k(A + \lambda I, g), \qquad \lambda = a \|g\|^b

    where :math:`P_k` takes k steps of MINRES from zero (Eqs. 22 and 24, Algorithms 1 and 2 of "Exponentially decaying
    flows for optimization in deep learning"; the correction of Algorithm 1 is named at `optcurv.minres`). With
    :math:`A = G` this is EDF-G, with :math:`A = H` EDF-H. k = 1 is a gradient step whose length knows the curvature; a
    larger k comes closer to the full Newton step.

    EDF-H as published may go uphill where the Hessian is indefinite; `info.cosine` shows it. Where no negative
    curvature was met and the direction still goes uphill, it is due to rounding, and the direction for k = 1 is taken.
    A gradient a thousand times as large as any before is refused, unless it comes twice in a row: with b < 1 the
    direction would grow with it.

    The update takes the extra arguments `value_fn` (required; for EDF-G an `optcurv.Composite`), `curvature_value_fn`
    (the loss on a smaller batch, for the products only; default `value_fn`) and `value` (optional; a loss that is not
    finite gives a zero update).

    Args:
      max_iter: k, the number of curvature products, at least 1; a Python int. A step costs 1 + 4k/3 gradients with
        Gauss-Newton products, 1 + 2k with Hessian products.
      curvature: `optcurv.gauss_newton_product` (default), `optcurv.hessian_product`, or any function of the same
        signature.
      damping_scale: a ≥ 0, a number or a schedule; 0 turns damping off. Default 1, as published for mini-batches.
      damping_power: b ≥ 0, a number or a schedule. Default 1.

    Returns:
      The transformation.

    Raises:
      ValueError: if a number is out of range, or `update` is called without params or with a gradient or a state that
        does not fit them.
      TypeError: if an argument has the wrong type, or `update` is called without `value_fn`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optcurv
      >>> loss = optcurv.Composite(lambda w: w * jnp.array([1.0, 10.0]), lambda outputs: 0.5 * jnp.sum(outputs**2))
      >>> optimizer = optax.chain(
      ...     optcurv.scale_by_edf(max_iter=2, damping_scale=0.0), optax.scale_by_learning_rate(1.0)
      ... )
      >>> w = jnp.array([1.0, 1.0])
      >>> updates, state = optimizer.update(jax.grad(loss)(w), optimizer.init(w), w, value_fn=loss)
      >>> print(updates.round(3))
      [-1. -1.]
    """
    check_count("max_iter", max_iter)
    check_number("damping_scale", damping_scale, minimum=0.0)
    check_number("damping_power", damping_power, minimum=0.0)
    check_function("curvature", curvature, "value_fn, params", "such as optcurv.gauss_newton_product")

    def init(params: PyTree) -> ScaleByEdfState:
        zero, count, false = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
        info = EdfInfo(zero, zero, count, zero, false, false, ~false, false)
        return ScaleByEdfState(count=count, watch=start_watch(params), info=info)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        value_fn: ValueFn,
        value: chex.Numeric | None = None,
        curvature_value_fn: ValueFn | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByEdfState]:
        del extra_args  # those of the other links in a chain
        gradient = at_least_float32(updates)
        watch = look(state.watch, gradient)
        norm = optax.tree.norm(gradient)
        scale = scheduled(damping_scale, state.count, norm.dtype)
        damping = scale * norm ** scheduled(damping_power, state.count, norm.dtype)

        matvec = curvature(curvature_value_fn or value_fn, params)
        direction, krylov_info = minres(matvec, gradient, max_iter, shift=damping)
        slope = jnp.asarray(optax.tree.vdot(gradient, direction))
        breakdown = (slope < 0) & ~krylov_info.negative_curvature
        direction = optax.tree.where(breakdown, optax.tree.scale(krylov_info.first_step, gradient), direction)

        direction = optax.tree.cast_like(direction, updates)
        direction_norm = optax.tree.norm(at_least_float32(direction))
        found = (direction_norm > 0) | (norm == 0)
        finite = jnp.isfinite(norm + direction_norm + (0.0 if value is None else value)) & found
        norms = norm * direction_norm
        cosine = jnp.where(breakdown, 1.0, slope / jnp.where(norms == 0, 1.0, norms))
        info = EdfInfo(
            damping=jnp.float32(damping),
            residual_norm=jnp.float32(krylov_info.residual_norm),
            iterations=krylov_info.iterations,
            cosine=jnp.float32(cosine),
            negative_curvature=krylov_info.negative_curvature,
            breakdown=breakdown,
            finite=finite,
            refused=watch.refused,
        )
        direction = optax.tree.where(finite & ~watch.refused, direction, optax.tree.zeros_like(direction))
        return direction, ScaleByEdfState(count=optax.safe_increment(state.count), watch=watch, info=info)

    return checked("scale_by_edf", init, update)


class ScaleByNesterovFlowState(NamedTuple):
    """State of `scale_by_nesterov_flow`: the step count n and the velocity :math:`w_n - w_{n-1}`."""

    count: jax.typing.ArrayLike
    velocity: PyTree


def scale_by_nesterov_flow(alpha: float = 3.0) -> optax.GradientTransformationExtraArgs:
    r"""Accelerates steps by a friction that fades as α/t; keeps the sign it is given; put it after the learning rate.

    The W2 scheme of EDF: Eq. 25 with :math:`\kappa = \alpha / t`, discretised as by Su, Boyd and Candès (2014). With
    the incoming step :math:`u_n = -\eta v(y_{n-1})`,

    .. math:: w_n = y_{n-1} + u_n, \qquad y_n = w_n + \frac{n-1}{n+\alpha-1} (w_n - w_{n-1})

    The optimised parameters are y. In terms of the velocity :math:`e_n = w_n - w_{n-1}` this needs no parameters:
    :math:`e_n = u_n + m_{n-1} e_{n-1}` and the outgoing step is :math:`u_n + m_n e_n`, with
    :math:`m_n = (n-1)/(n+\alpha-1)`.

    Where a step would undo more than a quarter of the velocity, :math:`\langle u_n, e_{n-1} \rangle < -\tfrac14
    \|e_{n-1}\|^2`, the flow starts again from rest, with n = 1 (after O'Donoghue and Candès 2015, who restart at any
    opposition; on mini-batches that happens so often that nothing is accelerated). The paper has no restart, and
    diverges on mini-batches at a learning rate of 1.

    Args:
      alpha: α > 0, the friction; default 3, Nesterov's.

    Returns:
      The transformation. Put it after `optax.scale_by_learning_rate`, so that the velocity is in units of the
      parameters when the learning rate follows a schedule.

    Raises:
      ValueError: if `alpha` is not positive.

    Example:
      >>> import jax.numpy as jnp, optax, optcurv
      >>> optimizer = optax.chain(optax.scale_by_learning_rate(0.1), optcurv.scale_by_nesterov_flow())
      >>> w = jnp.array([1.0])
      >>> updates, state = optimizer.update(w, optimizer.init(w))
      >>> print(updates)
      [-0.1]
    """
    check_number("alpha", alpha, minimum=0.0, exclusive=True, constant=True)

    def init(params: PyTree) -> ScaleByNesterovFlowState:
        return ScaleByNesterovFlowState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, ScaleByNesterovFlowState]:
        del params, extra_args
        step, velocity = at_least_float32(updates), at_least_float32(state.velocity)
        restart = optax.tree.vdot(step, velocity) < -0.25 * optax.tree.norm(velocity, squared=True)
        n = optax.safe_increment(jnp.where(restart, 0, state.count))
        # At n = 1 the velocity does not matter: it is zero, or that of before the restart.
        old_factor, factor = jnp.maximum(n - 2, 0) / (n + alpha - 2), (n - 1) / (n + alpha - 1)
        velocity = optax.tree.add_scale(updates, old_factor, state.velocity)
        accelerated = optax.tree.add_scale(updates, factor, velocity)
        new_state = ScaleByNesterovFlowState(n, optax.tree.cast_like(velocity, state.velocity))
        return optax.tree.cast_like(accelerated, updates), new_state

    return checked("scale_by_nesterov_flow", init, update, needs_loss=False)


def edf(
    learning_rate: optax.ScalarOrSchedule,
    max_iter: int = 2,
    *,
    curvature: ProductFn = gauss_newton_product,
    damping_scale: optax.ScalarOrSchedule = 1.0,
    damping_power: optax.ScalarOrSchedule = 1.0,
    acceleration: Literal["momentum", "nesterov"] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The EDF optimiser: :math:`w \leftarrow w - \eta\, P_k(A + \lambda I, g)`; emits the final signed step.

    See `optcurv.scale_by_edf` for the direction and for the extra arguments of the update.

    On full batches take :math:`\eta = 1`, `acceleration="nesterov"` and the default damping a = b = 1, with k = 8 or
    more. The paper has no damping there (`damping_scale=0`), with k from 1 to 30: on a small convolutional network for
    digits this diverges from k = 8 on, in float64 too, where the damped method reaches a loss below 1e-10. On
    mini-batches the paper has :math:`\eta \in [0.1, 2]`, a = b = 1 and k = 1 or 2.

    Args:
      learning_rate: η, a number or a schedule.
      max_iter: k, the number of curvature products; a Python int, at least 1.
      curvature: `optcurv.gauss_newton_product` (EDF-G, default) or `optcurv.hessian_product` (EDF-H).
      damping_scale: a ≥ 0 in :math:`\lambda = a \|g\|^b`, a number or a schedule.
      damping_power: b ≥ 0, likewise.
      acceleration: None (default); `"momentum"`, the paper's W1, :math:`m \leftarrow 0.9 m + 0.1 v`; or `"nesterov"`,
        its W2, `optcurv.scale_by_nesterov_flow`.

    Returns:
      The optimiser.

    Raises:
      ValueError: if a number is out of range or `acceleration` is none of the three.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optcurv
      >>> loss = optcurv.Composite(lambda w: w * jnp.array([1.0, 10.0]), lambda outputs: 0.5 * jnp.sum(outputs**2))
      >>> optimizer = optcurv.edf(learning_rate=1.0, max_iter=1, acceleration="nesterov")
      >>> w = jnp.array([1.0, 1.0])
      >>> state = optimizer.init(w)
      >>> for _ in range(30):
      ...     value, grads = jax.value_and_grad(loss)(w)
      ...     updates, state = optimizer.update(grads, state, w, value=value, value_fn=loss)
      ...     w = optax.apply_updates(w, updates)
      >>> print(loss(w) < 1e-2)
      True
    """
    check_number("learning_rate", learning_rate, minimum=0.0)
    direction = scale_by_edf(max_iter, curvature=curvature, damping_scale=damping_scale, damping_power=damping_power)
    scale = optax.scale_by_learning_rate(learning_rate)
    if acceleration is None:
        links = [direction, scale]
    elif acceleration == "momentum":
        links = [direction, optax.ema(0.9, debias=False), scale]
    elif acceleration == "nesterov":
        links = [direction, scale, scale_by_nesterov_flow()]
    else:
        raise ValueError(f'acceleration must be None, "momentum" or "nesterov", got {acceleration!r}.')
    return checked("edf", *optax.chain(*links))

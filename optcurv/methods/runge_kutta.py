"""Runge-Kutta schemes on the gradient flow, in front of any optimiser."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import (
    PyTree,
    ValueFn,
    at_least_float32,
    check_number,
    check_transformation,
    checked,
    scalar_fn,
    scheduled,
)
from optcurv.spikes import Watch, keep_usable, look, start_watch


@dataclasses.dataclass(frozen=True)
class Tableau:
    r"""An explicit Runge-Kutta scheme (Butcher tableau) of s stages. The gradient flow needs no times.

    Attributes:
      a: row i holds the i - 1 numbers :math:`a_{i1} \ldots a_{i, i-1}` for the earlier stages; the first row is ().
      b: the s weights of the stages in the step; their sum is 1.

    Raises:
      ValueError: if the rows have the wrong lengths, or the weights do not sum to 1.

    Example:
      Kutta's scheme of third order:

      >>> import optcurv
      >>> kutta = optcurv.Tableau(a=((), (0.5,), (-1.0, 2.0)), b=(1 / 6, 2 / 3, 1 / 6))
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def __post_init__(self) -> None:
        if [len(row) for row in self.a] != list(range(len(self.b))) or not self.b:
            raise ValueError(
                f"The rows of a must hold 0, 1, 2, ... numbers, as many rows as b has numbers, got a = {self.a} and "
                f"b = {self.b}: the scheme must be explicit."
            )
        if not math.isclose(sum(self.b), 1.0, rel_tol=1e-9):
            raise ValueError(f"The weights b must sum to 1, got {self.b}.")


EULER = Tableau(a=((),), b=(1.0,))
"""Plain gradient descent, of order 1."""

MIDPOINT = Tableau(a=((), (1 / 2,)), b=(0.0, 1.0))
"""The midpoint method, of order 2."""

HEUN = Tableau(a=((), (1.0,)), b=(1 / 2, 1 / 2))
"""Heun's method, of order 2."""

RALSTON = Tableau(a=((), (3 / 4,)), b=(1 / 3, 2 / 3))
"""Ralston's method, of order 2, with the least bound on its error."""

RK4 = Tableau(a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6))
"""The classical method of order 4."""


class RungeKuttaInfo(NamedTuple):
    r"""What one step did; scalars for the log.

    Attributes:
      correction: :math:`\|\bar g - g\| / \|g\|`; large where the step size is too large for the loss's curvature.
      finite: whether the gradients of all stages and what the inner optimiser made of them were finite; if not, the
        updates are zero and the inner state stays.
      refused: whether the gradient was a spike; then likewise.
    """

    correction: jax.Array
    finite: jax.Array
    refused: jax.Array


class RungeKuttaState(NamedTuple):
    """State of `runge_kutta`.

    Attributes:
      count: steps taken, for schedules.
      watch: for spikes of the gradient.
      inner: the inner optimiser's state.
      info: what the last step did.
    """

    count: jax.typing.ArrayLike
    watch: Watch
    inner: PyTree
    info: RungeKuttaInfo


def runge_kutta(
    inner: optax.GradientTransformation, step_size: optax.ScalarOrSchedule, *, tableau: Tableau = HEUN
) -> optax.GradientTransformationExtraArgs:
    r"""Gives an optimiser the slope of a Runge-Kutta step in place of the gradient; the sign is the optimiser's.

    .. math:: k_i = \nabla U\Bigl(\theta - h \sum_{j<i} a_{ij} k_j\Bigr), \qquad \bar g = \sum_i b_i k_i

    (Eqs. 20 and 21 of "An empirical analysis of the optimization of deep network loss surfaces", where g stands for
    :math:`-\nabla U`; any explicit scheme in place of two stages). :math:`\theta - h \bar g` follows the gradient flow
    :math:`\dot\theta = -\nabla U` with the order of the scheme. The averages of an inner Adam advance once a step, on
    :math:`\bar g` (appendix A.3.1).

    The first stage is the gradient that the update is given, so put this first in a chain. All stages see the same
    closure, and with it the same batch and random keys; a step costs as many gradients as the scheme has stages. The
    update takes the extra argument `value_fn` (required) and passes all of them on: the inner optimiser sees
    `value` and `grad` at the parameters, as a line search needs them.

    Values that are not finite move nothing and do not reach the inner optimiser's state. Nor does a gradient a thousand
    times as large as any before, unless it comes twice in a row. Where gradients fall below 1e-6 of the largest, the
    inner optimiser starts again from its initial state, as Adam would take 10⁵ steps to forget a spike.

    Args:
      inner: any optax transformation.
      step_size: h > 0, a number or a schedule; the learning rate of `inner` if θ should follow the flow.
      tableau: `optcurv.HEUN` (default), `optcurv.MIDPOINT`, `optcurv.RALSTON`, `optcurv.RK4`, `optcurv.EULER`, or any
        `optcurv.Tableau`.

    Returns:
      The transformation.

    Raises:
      ValueError: if `step_size` is not positive, or `update` is called without params or with a gradient or a state
        that does not fit them.
      TypeError: if an argument has the wrong type, or `update` is called without `value_fn`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optcurv
      >>> loss = lambda w: 0.5 * jnp.sum(w**2)
      >>> optimizer = optcurv.runge_kutta(optax.sgd(0.1), step_size=0.1, tableau=optcurv.RK4)
      >>> w = jnp.array([1.0])
      >>> state = optimizer.init(w)
      >>> for _ in range(10):
      ...     updates, state = optimizer.update(jax.grad(loss)(w), state, w, value_fn=loss)
      ...     w = optax.apply_updates(w, updates)
      >>> print(w - jnp.exp(-1.0))  # the flow at t = 1
      [0.]
    """
    check_transformation("inner", inner)
    check_number("step_size", step_size, minimum=0.0, exclusive=True)
    if not isinstance(tableau, Tableau):
        raise TypeError(f"tableau must be an optcurv.Tableau like optcurv.HEUN, got {tableau!r}.")
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> RungeKuttaState:
        info = RungeKuttaInfo(jnp.zeros((), jnp.float32), jnp.ones((), bool), jnp.zeros((), bool))
        return RungeKuttaState(jnp.zeros((), jnp.int32), start_watch(params), inner.init(params), info)

    def update(
        updates: PyTree, state: Any, params: PyTree = None, *, value_fn: ValueFn, **extra_args: Any
    ) -> tuple[PyTree, RungeKuttaState]:
        grad_fn = jax.grad(scalar_fn(value_fn))
        stages = [at_least_float32(updates)]
        h = scheduled(step_size, state.count, jnp.result_type(*jax.tree.leaves(stages)))
        for weights in tableau.a[1:]:
            step = _weighted_sum(weights, stages)
            point = jax.tree.map(lambda p, s: (p - h * s).astype(p.dtype), params, step)
            stages.append(at_least_float32(grad_fn(point)))
        slope = _weighted_sum(tableau.b, stages)

        norm = optax.tree.norm(stages[0])
        correction = optax.tree.norm(optax.tree.sub(slope, stages[0])) / jnp.where(norm > 0, norm, 1.0)
        watch = look(state.watch, updates)
        before = optax.tree.where(watch.after_spike, inner.init(params), state.inner)
        extra_args = {"grad": updates} | extra_args | {"value_fn": value_fn}
        results, inner_state = inner.update(optax.tree.cast_like(slope, updates), before, params, **extra_args)
        results, inner_state, used = keep_usable(watch, results, inner_state, before)
        info = RungeKuttaInfo(jnp.float32(correction), used | watch.refused, watch.refused)
        return results, RungeKuttaState(optax.safe_increment(state.count), watch, inner_state, info)

    return checked("runge_kutta", init, update)


def _weighted_sum(weights: Sequence[float], trees: Sequence[PyTree]) -> PyTree:
    """Adds trees, each times its weight; those of weight zero are left out and need not be kept in memory."""
    terms = [optax.tree.scale(weight, tree) for weight, tree in zip(weights, trees, strict=True) if weight != 0]
    return functools.reduce(optax.tree.add, terms)


def sgd_rk2(
    learning_rate: optax.ScalarOrSchedule, momentum: float | None = None, *, tableau: Tableau = HEUN
) -> optax.GradientTransformationExtraArgs:
    r"""SGD on the slope of a Runge-Kutta step, :math:`\theta \leftarrow \theta - \eta \bar g`; emits the final step.

    See `optcurv.runge_kutta`, with h = η, for the slope and for the extra arguments of the update.

    Args:
      learning_rate: η, a number or a schedule.
      momentum: of `optax.sgd`; default: none, as published.
      tableau: the scheme; default `optcurv.HEUN`.

    Returns:
      The optimiser.

    Raises:
      ValueError: if the learning rate is not positive.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> loss = lambda w: 0.5 * jnp.sum(w**2)
      >>> optimizer = optcurv.sgd_rk2(learning_rate=0.5)
      >>> w = jnp.array([1.0])
      >>> updates, state = optimizer.update(jax.grad(loss)(w), optimizer.init(w), w, value_fn=loss)
      >>> print(updates)  # -h + h²/2
      [-0.375]
    """
    check_number("learning_rate", learning_rate, minimum=0.0, exclusive=True)
    if momentum is not None:
        check_number("momentum", momentum, minimum=0.0, maximum=1.0, constant=True)
    return runge_kutta(optax.sgd(learning_rate, momentum), learning_rate, tableau=tableau)


def adam_rk2(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    tableau: Tableau = HEUN,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on the slope of a Runge-Kutta step; emits the final step.

    See `optcurv.runge_kutta`, with h = η (appendix A.3.1), for the slope and for the extra arguments of the update.
    Adam's averages are kept in at least float32: in float16 the squares overflow, and the default `eps` is 0.

    Args:
      learning_rate: η, a number or a schedule.
      b1: of `optax.adam`.
      b2: likewise.
      eps: likewise.
      tableau: the scheme; default `optcurv.HEUN`.

    Returns:
      The optimiser.

    Raises:
      ValueError: if the learning rate is not positive.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> loss = lambda w: 0.5 * jnp.sum(w**2)
      >>> optimizer = optcurv.adam_rk2(learning_rate=0.5)
      >>> w = jnp.array([1.0])
      >>> updates, state = optimizer.update(jax.grad(loss)(w), optimizer.init(w), w, value_fn=loss)
      >>> print(updates)
      [-0.5]
    """
    check_number("learning_rate", learning_rate, minimum=0.0, exclusive=True)
    check_number("b1", b1, minimum=0.0, maximum=1.0, constant=True)
    check_number("b2", b2, minimum=0.0, maximum=1.0, constant=True)
    check_number("eps", eps, minimum=0.0, constant=True)
    adam = optax.adam(learning_rate, b1, b2, eps)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, PyTree]:
        del params  # Adam needs none
        results, state = adam.update(at_least_float32(updates), state)
        return optax.tree.cast_like(results, updates), state

    in_float32 = optax.GradientTransformation(lambda params: adam.init(at_least_float32(params)), update)
    return runge_kutta(in_float32, learning_rate, tableau=tableau)

"""One optimiser first, another one afterwards."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, check_count, check_number, check_transformation, checked
from optcurv.spikes import Watch, keep_usable, look, start_watch


class SwitchRule(NamedTuple):
    """A rule that decides during training when to switch; `on_plateau` makes one.

    Attributes:
      init: returns the rule's state.
      update: maps the state and the monitored value, None on steps that have none, to a new state and whether it is
        time.

    Example:
      Once the monitored value falls below one:

      >>> import jax.numpy as jnp, optcurv
      >>> below_one = optcurv.SwitchRule(
      ...     init=lambda: (), update=lambda state, value: (state, jnp.asarray(value is not None and value < 1.0))
      ... )
    """

    init: Any
    update: Any


class PlateauState(NamedTuple):
    """State of `on_plateau`: the least value so far, and how many values since were no better."""

    best: jax.Array
    num_waited: jax.Array


def on_plateau(patience: int, min_delta: float = 0.0) -> SwitchRule:
    """Switches when a validation loss has not improved for a while.

    Args:
      patience: values in a row that do not improve on the best one.
      min_delta: by how much a value must lie below the best one to improve on it.

    Returns:
      The rule, for `optcurv.switch`. It watches the extra argument `monitored_value`; steps without it, or with one
      that is not a number, change nothing.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, optcurv
      >>> optimizer = optcurv.switch(optax.adam(0.1), optax.sgd(0.1), optcurv.on_plateau(patience=2))
      >>> w = jnp.array(1.0)
      >>> state = optimizer.init(w)
      >>> for loss in (3.0, 2.0, 2.0, 2.5):
      ...     _, state = optimizer.update(w, state, w, monitored_value=loss)
      ...     print(state.info.stage)
      0
      0
      0
      1
    """
    check_count("patience", patience)
    check_number("min_delta", min_delta, minimum=0.0, constant=True)

    def update(state: PlateauState, value: chex.Numeric | None) -> tuple[PlateauState, jax.Array]:
        if value is None:
            return state, jnp.zeros((), bool)
        value = jnp.asarray(value, jnp.float32)
        better = value < state.best - min_delta
        waited = jnp.where(better, 0, state.num_waited + 1)
        new_state = PlateauState(
            best=jnp.where(better, value, state.best), num_waited=jnp.where(jnp.isnan(value), state.num_waited, waited)
        )
        return new_state, new_state.num_waited >= patience

    return SwitchRule(lambda: PlateauState(jnp.asarray(jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)), update)


def _at_step(step: int) -> SwitchRule:
    def update(count: jax.Array, value: chex.Numeric | None) -> tuple[jax.Array, jax.Array]:
        del value
        return jnp.asarray(optax.safe_increment(count)), count >= step

    return SwitchRule(lambda: jnp.zeros((), jnp.int32), update)


class SwitchInfo(NamedTuple):
    """What one step did; scalars for the log.

    Attributes:
      stage: 0 or 1.
      finite: whether all that the stage returned was finite; if not, the updates are zero and its state stays.
      refused: whether the gradient was a spike; then likewise.
    """

    stage: jax.Array
    finite: jax.Array
    refused: jax.Array


class SwitchState(NamedTuple):
    """State of `switch`.

    Attributes:
      rule: the rule's state.
      watch: for spikes of the gradient.
      first: the first optimiser's state.
      second: the second optimiser's state, unused until the switch.
      info: what the last step did.
    """

    rule: Any
    watch: Watch
    first: PyTree
    second: PyTree
    info: SwitchInfo


def switch(
    first: optax.GradientTransformation, second: optax.GradientTransformation, when: int | SwitchRule
) -> optax.GradientTransformationExtraArgs:
    """Runs one transformation up to a point and another one from there; the signs are theirs.

    Only the active one is computed. The second starts with a fresh state, made from the parameters at the switch. Two
    switches in a row make three stages, and so on.

    Values that are not finite move nothing and do not reach a stage's state. Nor does a gradient a thousand times as
    large as any before, unless it comes twice in a row. Where gradients fall below 1e-6 of the largest, the active
    stage starts again from its initial state.

    Args:
      first: any transformation.
      second: likewise.
      when: the number of steps of the first, or a rule such as `optcurv.on_plateau(...)`.

    Returns:
      The transformation. It hands all extra arguments on; a rule sees `monitored_value`.

    Raises:
      ValueError: if a number of steps is negative, or `update` is called with a state that does not fit the parameters.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, optcurv
      >>> optimizer = optcurv.switch(optax.sgd(1.0), optax.sgd(0.1), when=1)
      >>> w = jnp.array(1.0)
      >>> state = optimizer.init(w)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(w, state, w)
      ...     print(updates)
      -1.0
      -0.1
    """
    check_transformation("first", first)
    check_transformation("second", second)
    first, second = optax.with_extra_args_support(first), optax.with_extra_args_support(second)
    if not isinstance(when, SwitchRule):
        if isinstance(when, bool) or not isinstance(when, int):
            raise TypeError(f"when must be a number of steps or a rule like optcurv.on_plateau(...), got {when!r}.")
        if when < 0:
            raise ValueError(f"when must be a number of steps, got {when}.")
        when = _at_step(when)
    rule = when

    def init(params: PyTree) -> SwitchState:
        info = SwitchInfo(jnp.zeros((), jnp.int32), jnp.ones((), bool), jnp.zeros((), bool))
        return SwitchState(rule.init(), start_watch(params), first.init(params), second.init(params), info)

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree = None,
        *,
        monitored_value: chex.Numeric | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, SwitchState]:
        rule_state, is_time = rule.update(state.rule, monitored_value)
        switched = state.info.stage == 1
        if monitored_value is not None:
            extra_args["monitored_value"] = monitored_value

        watch = look(state.watch, updates)

        def run(stage: optax.GradientTransformationExtraArgs, before: PyTree, starts: jax.Array) -> tuple[Any, ...]:
            fresh = before if params is None else stage.init(params)
            before = optax.tree.where(starts | watch.after_spike, fresh, before)
            new_updates, new_state = stage.update(updates, before, params, **extra_args)
            return keep_usable(watch, optax.tree.cast_like(new_updates, updates), new_state, before)

        def run_first() -> tuple[Any, ...]:
            new_updates, new_state, used = run(first, state.first, jnp.zeros((), bool))
            return new_updates, new_state, state.second, used

        def run_second() -> tuple[Any, ...]:
            new_updates, new_state, used = run(second, state.second, ~switched)
            return new_updates, state.first, new_state, used

        stage = switched | is_time
        new_updates, first_state, second_state, used = jax.lax.cond(stage, run_second, run_first)
        info = SwitchInfo(stage.astype(jnp.int32), used | watch.refused, watch.refused)
        return new_updates, SwitchState(rule_state, watch, first_state, second_state, info)

    return checked("switch", init, update, needs_loss=False)

"""One optimiser, then another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv


def run(optimizer, num_steps, **extra_args):
    w = {"w": jnp.array([1.0, -2.0])}
    state, updates = optimizer.init(w), []
    step = jax.jit(optimizer.update)
    for n in range(num_steps):
        gradient = {"w": w["w"] * (n + 1)}
        update, state = step(gradient, state, w, **{name: values[n] for name, values in extra_args.items()})
        updates.append(update["w"])
    return updates, state


def test_second_follows_first_with_a_fresh_state():
    first, second = optax.sgd(0.1, momentum=0.9), optax.adam(0.01)
    updates, state = run(optcurv.switch(first, second, when=3), 6)
    w = {"w": jnp.array([1.0, -2.0])}
    alone = first.init(w)
    for n in range(3):
        expected, alone = first.update({"w": w["w"] * (n + 1)}, alone, w)
        np.testing.assert_array_equal(updates[n], expected["w"])
    alone = second.init(w)
    for n in range(3, 6):
        expected, alone = second.update({"w": w["w"] * (n + 1)}, alone, w)
        np.testing.assert_allclose(updates[n], expected["w"], rtol=1e-6)
    assert int(state.info.stage) == 1


def test_second_starts_from_the_parameters_at_the_switch():
    keep_start = optax.GradientTransformation(
        init=lambda params: params, update=lambda updates, state, params: (state, state)
    )
    optimizer = optcurv.switch(optax.identity(), keep_start, when=1)
    state = optimizer.init(jnp.array(1.0))
    for w, expected in ((2.0, 0.5), (3.0, 3.0), (4.0, 3.0)):
        update, state = optimizer.update(jnp.array(0.5), state, jnp.array(w))
        assert update == expected


def test_three_stages():
    optimizer = optcurv.switch(optax.scale(1.0), optcurv.switch(optax.scale(2.0), optax.scale(3.0), when=2), when=2)
    updates, _ = run(optimizer, 6)
    np.testing.assert_allclose([u[0] / (n + 1) for n, u in enumerate(updates)], [1, 1, 2, 2, 3, 3])


def test_plateau():
    values = [5.0, 4.0, 4.5, 3.9, 3.95, np.nan, 3.91, 9.0]
    rule = optcurv.on_plateau(patience=2)
    state, due = rule.init(), []
    for value in values:
        state, is_time = rule.update(state, value)
        due.append(bool(is_time))
    assert due == [False, False, False, False, False, False, True, True]
    assert not rule.update(rule.init(), None)[1]


def test_small_improvements_do_not_count():
    rule = optcurv.on_plateau(patience=2, min_delta=0.5)
    state = rule.init()
    for value, expected in ((5.0, False), (4.8, False), (4.6, True)):
        state, is_time = rule.update(state, value)
        assert bool(is_time) == expected


def test_steps_without_a_monitored_value_change_nothing():
    optimizer = optcurv.switch(optax.scale(1.0), optax.scale(2.0), optcurv.on_plateau(patience=1))
    w = jnp.array(1.0)
    state = optimizer.init(w)
    _, state = optimizer.update(w, state, w, monitored_value=1.0)
    for _ in range(5):
        _, state = optimizer.update(w, state, w)
    assert int(state.info.stage) == 0
    update, state = optimizer.update(w, state, w, monitored_value=2.0)
    assert update == 2.0


def test_only_the_active_one_runs():
    ran = []

    def noisy(name):
        def update(updates, state, params=None):
            jax.debug.callback(lambda: ran.append(name))
            return updates, state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    run(optcurv.switch(noisy("first"), noisy("second"), when=2), 3)
    jax.effects_barrier()
    assert ran == ["first", "first", "second"]


@pytest.mark.parametrize(("when", "error"), [(-1, ValueError), (1.5, TypeError), (None, TypeError), (True, TypeError)])
def test_bad_when(when, error):
    with pytest.raises(error, match="when must be a number of steps"):
        optcurv.switch(optax.identity(), optax.identity(), when)


def test_bad_patience():
    with pytest.raises(ValueError, match="patience must be at least 1"):
        optcurv.on_plateau(0)
    with pytest.raises(ValueError, match="min_delta"):
        optcurv.on_plateau(1, min_delta=-1.0)

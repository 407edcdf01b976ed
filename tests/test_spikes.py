"""What guards the optimisers of others inside of ours: Runge-Kutta's inner one, and both stages of a switch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from optcurv.spikes import look, start_watch
from tests import problems
from tests.laws.test_contract import make_step

START, LOSS = problems.quadratic()
OPTIMIZERS = {
    "adam-rk2": lambda: optcurv.adam_rk2(0.01),
    "sgd-rk2": lambda: optcurv.sgd_rk2(0.01, momentum=0.9),
    "first-stage": lambda: optcurv.switch(optax.adam(0.01), optax.sgd(0.01), when=10**6),
    "second-stage": lambda: optcurv.switch(optax.sgd(0.0), optax.adam(0.01), when=1),
    "tso-alra-second-stage": lambda: optcurv.tso_alra(0.01, when=1),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def weighted(weight):
    return optcurv.Composite(LOSS.model_fn, lambda residuals: weight * LOSS.loss_fn(residuals))


@every_optimizer
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e38])
def test_poison_reaches_neither_parameters_nor_state(make, poison):
    optimizer = make()
    step = jax.jit(make_step(optimizer, weighted))
    params, state = step(START, optimizer.init(START), 1.0)
    params, state = step(params, state, 1.0)
    poisoned, poisoned_state = step(params, state, poison)
    jax.tree.map(np.testing.assert_array_equal, poisoned, params)
    for name in ("mu", "nu", "trace"):
        averages = [[value for _, value in optax.tree.get_all_with_path(s, name)] for s in (poisoned_state, state)]
        jax.tree.map(np.testing.assert_array_equal, *averages)


@every_optimizer
@pytest.mark.parametrize("weights", [(1.0, 1e18), (1e18, 1.0), (1e12, 1e12), (1.0, 1e9, 1.0, 1e9)], ids=str)
def test_learns_again_after_spikes(make, weights):
    optimizer = make()
    step = jax.jit(make_step(optimizer, weighted))
    _, state = step(START, optimizer.init(START), weights[0])
    for weight in weights[1:]:
        _, state = step(START, state, weight)
    params = START
    for _ in range(200):
        params, state = step(params, state, 1.0)
    assert LOSS(params) < 0.1 * LOSS(START)


def test_the_watch_refuses_once_and_forgets():
    watch, seen = start_watch(jnp.ones(1)), []
    for size in (1.0, 900.0, 1e6, 1e6, 1e6, np.nan, 1.1, 0.9, 1e-7):
        watch = look(watch, jnp.array([size]))
        seen.append((float(watch.largest), bool(watch.refused), bool(watch.after_spike)))
    largest = np.float32
    assert seen == [
        (1.0, False, False),
        (900.0, False, False),
        (900.0, True, False),
        (1e6, False, False),
        (1e6, False, False),
        (1e6, False, False),
        (1e6, False, False),
        (largest(0.9), False, True),
        (largest(1e-7), False, True),
    ]


@pytest.mark.parametrize(
    ("sizes", "refused"),
    [
        ((1.0, 1e6, 1e10, 1e10), (0, 1, 1, 0)),  # a larger one does not confirm a spike
        ((1.0, 0.0, 1e6), (0, 0, 1)),  # a batch without weight is not forgotten by
        ((1.0, 1e-30, 1.0, 1e30), (0, 0, 1, 1)),  # nor does the return to the old scale let a spike through
        ((1.0, 1e6, np.nan, 1e6), (0, 1, 0, 1)),
    ],
)
def test_the_watch_lets_no_spike_through_unconfirmed(sizes, refused):
    watch, seen = start_watch(jnp.ones(1)), []
    for size in sizes:
        watch = look(watch, jnp.array([size]))
        seen.append(int(watch.refused))
        assert not (size == 0 and watch.after_spike)
    assert tuple(seen) == refused


def test_adam_in_float16_keeps_its_averages_wider():
    """The square of a gradient of 300 overflows in float16."""
    start, loss = problems.quadratic(condition=1.0, dtype=jnp.float16)
    steep = optcurv.Composite(loss.model_fn, lambda residuals: 300 * loss.loss_fn(residuals))
    optimizer = optcurv.adam_rk2(4e-3)
    step, params, state = jax.jit(make_step(optimizer, lambda _: steep)), start, optimizer.init(start)
    for _ in range(300):
        params, state = step(params, state, ())
    assert params["a"].dtype == jnp.float16
    assert loss(params) < 0.1 * loss(start)

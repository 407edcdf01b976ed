"""Runge-Kutta schemes: orders against an accurate flow, one closure for all stages, the inner optimiser's step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate

import optcurv
from tests import problems

ORDERS = {"EULER": 1, "MIDPOINT": 2, "HEUN": 2, "RALSTON": 2, "RK4": 4}
every_tableau = pytest.mark.parametrize(("name", "order"), ORDERS.items(), ids=ORDERS)


def potential(w):
    return jnp.sum(jnp.cosh(w["x"])) + 0.5 * w["x"][0] * w["y"] ** 2 + 0.25 * w["y"] ** 4


START = {"x": np.array([0.7, -0.4]), "y": np.array(1.2)}


gradient = jax.jit(jax.grad(potential))


def flow(time):
    """The gradient flow at a time, from SciPy."""

    def velocity(_, z):
        slope = gradient({"x": z[:2], "y": z[2]})
        return -np.array([*slope["x"], slope["y"]])

    start = np.array([*START["x"], START["y"]])
    solution = scipy.integrate.solve_ivp(velocity, (0, time), start, "DOP853", rtol=1e-13, atol=1e-14)
    return solution.y[:, -1]


@functools.partial(jax.jit, static_argnums=0)
def steps(tableau, h, num_steps):
    """The parameters after some steps of size h from the start."""
    optimizer = optcurv.runge_kutta(optax.sgd(h), h, tableau=tableau)

    def step(_, carry):
        w, state = carry
        updates, state = optimizer.update(jax.grad(potential)(w), state, w, value_fn=potential)
        return optax.apply_updates(w, updates), state

    w = jax.tree.map(jnp.asarray, START)
    return jax.lax.fori_loop(0, num_steps, step, (w, optimizer.init(w)))[0]


def error(tableau, h, num_steps):
    w = steps(tableau, h, num_steps)
    return np.linalg.norm(np.array([*w["x"], w["y"]]) - flow(h * num_steps))


@every_tableau
def test_local_and_global_order(name, order):
    tableau = getattr(optcurv, name)
    with jax.enable_x64(True):
        local = np.log2([error(tableau, h, 1) for h in 0.02 / 2.0 ** np.arange(3)])
        whole = np.log2([error(tableau, 0.4 / n, n) for n in (16, 32, 64)])
    np.testing.assert_allclose(-np.diff(local), order + 1, atol=0.1)
    np.testing.assert_allclose(-np.diff(whole), order, atol=0.1)


def run(optimizer, num_steps=4):
    params = problems.regression_params()
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        loss = problems.regression_loss(batch)
        grads = jax.grad(loss)(params)
        updates, state = optax.with_extra_args_support(optimizer).update(grads, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    for n in range(num_steps):
        params, state = step(params, state, problems.blobs(seed=n))
    return params, state


def test_one_stage_is_the_inner_optimiser_bit_for_bit():
    ours, _ = run(optcurv.runge_kutta(optax.sgd(0.1, momentum=0.9), 0.1, tableau=optcurv.EULER))
    plain, _ = run(optax.sgd(0.1, momentum=0.9))
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_inner_moments_advance_once_on_the_slope():
    """Adam on Heun's slope, written out."""
    _, state = run(optcurv.adam_rk2(0.01, b1=0.8))
    adam, params = optax.adam(0.01, b1=0.8), problems.regression_params()
    expected = adam.init(params)
    for n in range(4):
        grad = jax.jit(jax.grad(problems.regression_loss(problems.blobs(seed=n))))
        first = grad(params)
        second = grad(jax.tree.map(lambda p, g: p - 0.01 * g, params, first))
        slope = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        updates, expected = adam.update(slope, expected)
        params = optax.apply_updates(params, updates)
    assert int(state.inner[0].count) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.inner[0], expected[0])


@every_tableau
def test_given_gradient_is_the_first_stage(name, order):
    """As many gradients are taken as the scheme has stages, less the one that is there."""
    del order
    tableau, calls = getattr(optcurv, name), []

    def loss(w):
        calls.append(w)
        return jnp.sum(w**4)

    optimizer, w = optcurv.sgd_rk2(0.1, tableau=tableau), jnp.ones(3)
    optimizer.update(4 * w**3, optimizer.init(w), w, value_fn=loss)
    assert len(calls) == len(tableau.b) - 1


def test_stages_share_their_random_keys():
    """With the noise of one key the loss is a fixed quadratic, of which Heun's slope is known."""
    noise = jax.random.bernoulli(jax.random.key(3), 0.5, (50,))

    def loss(w):
        return 0.5 * jnp.sum(jnp.where(jax.random.bernoulli(jax.random.key(3), 0.5, (50,)), w, 0.0) ** 2)

    w, h = jnp.ones(50), 0.5
    optimizer = optcurv.sgd_rk2(h)
    updates, _ = optimizer.update(jax.grad(loss)(w), optimizer.init(w), w, value_fn=loss)
    np.testing.assert_allclose(updates, np.where(noise, -h + h**2 / 2, 0.0), rtol=1e-6)


def test_step_size_follows_its_schedule():
    optimizer = optcurv.runge_kutta(optax.identity(), lambda count: 0.5 / (count + 1), tableau=optcurv.MIDPOINT)
    loss, w = lambda w: 0.5 * jnp.sum(w**2), jnp.ones(1)
    state = optimizer.init(w)
    for h in (0.5, 0.25, 0.5 / 3):
        updates, state = optimizer.update(w, state, w, value_fn=loss)
        np.testing.assert_allclose(updates, 1 - h / 2, rtol=1e-6)
        np.testing.assert_allclose(state.info.correction, h / 2, rtol=1e-6)


def test_line_search_inside_sees_value_and_gradient_at_the_parameters():
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20)
    optimizer = optcurv.runge_kutta(optax.chain(optax.sgd(1.0), search), 0.1)
    w, loss = jnp.array([1.0, 2.0]), lambda w: jnp.sum(w**4)
    state = optimizer.init(w)
    value, grad = jax.value_and_grad(loss)(w)
    updates, _ = optimizer.update(grad, state, w, value=value, value_fn=loss)
    assert loss(w + updates) < value


def test_a_stage_that_is_not_finite_changes_nothing():
    """The gradient at hand is finite, that of the second stage is not."""
    loss, w = lambda w: jnp.sum(jnp.where(w < 0.5, jnp.nan * w, w**2)), jnp.ones(2)
    optimizer = optcurv.adam_rk2(0.5)
    state = optimizer.init(w)
    updates, after = optimizer.update(jax.grad(loss)(w), state, w, value_fn=loss)
    np.testing.assert_array_equal(updates, 0)
    assert not after.info.finite
    jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)


@pytest.mark.parametrize(
    ("a", "b"),
    [(((), (1.0,)), (1.0,)), (((1.0,), (1.0, 1.0)), (0.5, 0.5)), (((), (1.0,)), (0.5, 0.6)), ((), ())],
    ids=["more rows than weights", "implicit", "weights do not sum to one", "no stage"],
)
def test_bad_tableaus(a, b):
    with pytest.raises(ValueError, match=r"b = |weights b"):
        optcurv.Tableau(a, b)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"optcurv\.HEUN"):
        optcurv.runge_kutta(optax.sgd(0.1), 0.1, tableau=2)
    with pytest.raises(ValueError, match="step_size"):
        optcurv.runge_kutta(optax.sgd(0.1), 0.0)
    optimizer = optcurv.sgd_rk2(0.1)
    with pytest.raises(TypeError, match="value_fn"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))

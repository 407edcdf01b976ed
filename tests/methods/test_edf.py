import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse.linalg
import sklearn.datasets
from jax.flatten_util import ravel_pytree

import optcurv
from tests import problems
from tests.references import dense_curvature

CURVATURES = [optcurv.gauss_newton_product, optcurv.hessian_product]


def run(optimizer, params, loss, num_steps):
    """Returns the parameters after each step, the start included, and the last state."""

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value, value_fn=loss)
        return optax.apply_updates(params, updates), state

    path, state = [params], optimizer.init(params)
    for _ in range(num_steps):
        params, state = step(params, state)
        path.append(params)
    return path, state


@functools.cache
def dense_system(curvature):
    """The gradient, and the dense matrix, of the small network's loss in float64."""
    with jax.enable_x64(True):
        params = problems.network_params(dtype=jnp.float64)
        loss = problems.network_loss(problems.blobs(dtype=jnp.float64))
        gradient = ravel_pytree(jax.jit(jax.grad(loss))(params))[0]
        return np.asarray(gradient), dense_curvature(curvature, loss, params)


@pytest.mark.parametrize("max_iter", [1, 4])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-10)])
def test_update_equals_scipys_minres_on_the_dense_matrix(dtype, tolerance, curvature, max_iter):
    gradient, matrix = dense_system(curvature)
    damping = 0.5 * np.linalg.norm(gradient) ** 1.5
    matrix = matrix + damping * np.eye(gradient.size)
    expected, _ = scipy.sparse.linalg.minres(matrix, gradient, maxiter=max_iter, rtol=1e-15)
    with jax.enable_x64(dtype == jnp.float64):
        params, loss = problems.network_params(dtype=dtype), problems.network_loss(problems.blobs(dtype=dtype))
        optimizer = optcurv.scale_by_edf(max_iter, curvature=curvature, damping_scale=0.5, damping_power=1.5)
        update = jax.jit(lambda state, params: optimizer.update(jax.grad(loss)(params), state, params, value_fn=loss))
        updates, state = update(optimizer.init(params), params)
        actual = np.asarray(ravel_pytree(updates)[0], np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.linalg.norm(expected))
    np.testing.assert_allclose(state.info.damping, damping, rtol=1e-5)
    np.testing.assert_allclose(state.info.residual_norm, np.linalg.norm(matrix @ expected - gradient), rtol=1e-4)
    cosine = gradient @ expected / np.linalg.norm(gradient) / np.linalg.norm(expected)
    np.testing.assert_allclose(state.info.cosine, cosine, rtol=1e-5)
    assert state.info.iterations == max_iter


@pytest.mark.parametrize("curvature", CURVATURES)
def test_first_order_is_algorithm_2(curvature):
    """v = c g with c = <g, u> / <u, u>, u = (A + λI) g, from one product."""
    params, loss = problems.network_params(), problems.network_loss(problems.blobs())
    products = []

    def counted(value_fn, params):
        matvec = curvature(value_fn, params)
        return lambda v: products.append(None) or matvec(v)

    optimizer = optcurv.scale_by_edf(1, curvature=counted)
    update = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params, value_fn=loss)[0])
    grads = jax.jit(jax.grad(loss))(params)
    updates = update(grads)
    assert len(products) == 1

    g = ravel_pytree(grads)[0]
    u = ravel_pytree(jax.jit(curvature(loss, params))(grads))[0] + jnp.linalg.norm(g) * g
    np.testing.assert_allclose(ravel_pytree(updates)[0], (g @ u) / (u @ u) * g, rtol=2e-5, atol=1e-8)


def well_posed_system():
    """Returns `(w, F)`: as many equations as unknowns, nonlinear, with an invertible Jacobian."""
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(2 * np.eye(4) + 0.3 * rng.normal(size=(4, 4)))
    return jnp.asarray(rng.normal(size=4)), lambda w: matrix @ w + 0.5 * jnp.tanh(w)


@pytest.mark.parametrize(("decay", "total"), [(lambda t: -1.0, 1.0), (lambda t: -1 / (1 - t), 0.5)])
def test_flow_follows_its_decay(decay, total):
    """Along dw/dt = χ v, with full Krylov order and no damping, F(t) = ρ(t) F₀, χ = (ln ρ)' (Theorem 2.2).

    ρ = exp(-t) is the exponentially decaying flow, ρ = 1 - t the geodesic of Theorem 2.1. RK4's error is O(h⁴).
    """
    with jax.enable_x64(True):
        start, system = well_posed_system()
        loss = optcurv.Composite(system, lambda outputs: 0.5 * jnp.sum(outputs**2))
        optimizer = optcurv.scale_by_edf(4, damping_scale=0.0)

        @jax.jit
        def velocity(w, t):
            return decay(t) * optimizer.update(jax.grad(loss)(w), optimizer.init(w), w, value_fn=loss)[0]

        def error(num_steps):
            w, h = start, total / num_steps
            for n in range(num_steps):
                t = n * h
                k1 = velocity(w, t)
                k2 = velocity(w + h / 2 * k1, t + h / 2)
                k3 = velocity(w + h / 2 * k2, t + h / 2)
                k4 = velocity(w + h * k3, t + h)
                w = w + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            rho = np.exp(-total) if total == 1.0 else 1 - total
            return np.linalg.norm(system(w) - rho * system(start))

        errors = [error(n) for n in (2, 4, 8)]
    assert errors[-1] < 1e-5
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert orders[-1] == pytest.approx(4, abs=0.4)


def test_euler_steps_of_an_affine_system_decay_geometrically():
    """F_n = (1 - η)ⁿ F₀ for the optimiser itself."""
    with jax.enable_x64(True):
        start, _ = well_posed_system()
        matrix = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)) + 3 * np.eye(4))
        loss = optcurv.Composite(lambda w: matrix @ w - 1, lambda outputs: 0.5 * jnp.sum(outputs**2))
        path, _ = run(optcurv.edf(0.3, 4, damping_scale=0.0), start, loss, 5)
        np.testing.assert_allclose(loss.model_fn(path[5]), 0.7**5 * loss.model_fn(start), rtol=1e-8)


def test_strong_damping_gives_the_scaled_gradient():
    params, loss = problems.network_params(), problems.network_loss(problems.blobs())
    grads = jax.grad(loss)(params)
    optimizer = optcurv.scale_by_edf(3, damping_scale=1e6, damping_power=0.0)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, value_fn=loss)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(1e6 * u, g, rtol=1e-4, atol=1e-7), updates, grads)


def test_larger_order_is_faster_on_the_full_batch():
    params, loss = problems.network_params(), problems.network_loss(problems.blobs(size=64))
    finals = []
    for max_iter in (1, 3, 8):
        path, _ = run(optcurv.edf(1.0, max_iter, damping_scale=0.1, acceleration="nesterov"), params, loss, 10)
        finals.append(float(loss(path[-1])))
    assert finals[0] > 1.05 * finals[1] > 1.05**2 * finals[2]


def test_hessian_direction_can_go_uphill_and_says_so():
    loss = lambda w: -0.5 * jnp.sum(w**2)  # noqa: E731
    w = jnp.array([1.0, 2.0])
    optimizer = optcurv.scale_by_edf(1, curvature=optcurv.hessian_product, damping_scale=0.0)
    updates, state = optimizer.update(jax.grad(loss)(w), optimizer.init(w), w, value_fn=loss)
    np.testing.assert_allclose(updates, w, rtol=1e-6)  # the Newton direction, towards the maximum
    np.testing.assert_allclose(state.info.cosine, -1.0, rtol=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_negative_curvature_of_gauss_newton_says_that_the_loss_is_not_convex(sign):
    loss = optcurv.Composite(lambda w: w, lambda outputs: 0.5 * (outputs[0] ** 2 + sign * outputs[1] ** 2))
    w = jnp.array([1.0, 2.0])
    optimizer = optcurv.scale_by_edf(2, damping_scale=0.1)
    _, state = optimizer.update(jax.grad(loss)(w), optimizer.init(w), w, value_fn=loss)
    assert bool(state.info.negative_curvature) == (sign < 0)
    assert not state.info.breakdown


def test_a_breakdown_falls_back_to_one_krylov_step(monkeypatch):
    def uphill(matvec, b, max_iter, *, shift):
        _, info = optcurv.minres(matvec, b, max_iter, shift=shift)
        return optax.tree.scale(-1.0, b), info

    params, loss = problems.quadratic()
    grads, one_step = jax.grad(loss)(params), optcurv.scale_by_edf(1)
    expected, _ = one_step.update(grads, one_step.init(params), params, value_fn=loss)
    monkeypatch.setattr(sys.modules["optcurv.methods.edf"], "minres", uphill)
    optimizer = optcurv.scale_by_edf(3)
    updates, state = optimizer.update(grads, optimizer.init(params), params, value_fn=loss)
    jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-5), updates, expected)
    assert state.info.breakdown
    np.testing.assert_allclose(state.info.cosine, 1.0)


def test_a_state_in_which_nothing_is_found_does_not_read_as_finite():
    """The gradient is not zero, but no output moves the gradient: the matrix is zero."""
    loss = optcurv.Composite(lambda w: w, jnp.sum)
    w, optimizer = jnp.ones(2), optcurv.scale_by_edf(2, damping_scale=0.0)
    updates, state = optimizer.update(jax.grad(loss)(w), optimizer.init(w), w, value_fn=loss)
    np.testing.assert_array_equal(updates, 0)
    assert not state.info.finite
    updates, state = optimizer.update(0 * w, optimizer.init(w), w, value_fn=loss)
    assert state.info.finite  # at a stationary point there is nothing to find


def test_recommended_full_batch_setting_converges_where_the_published_one_does_not():
    """A convolutional network on 100 digits: undamped, accelerated steps of k = 8 diverge."""
    images, labels = (jnp.asarray(array[:100]) for array in sklearn.datasets.load_digits(return_X_y=True))
    x, net = images.astype(jnp.float32).reshape(-1, 8, 8, 1) / 16, ConvolutionalNet()
    loss = optcurv.Composite(
        lambda params: net.apply(params, x),
        lambda logits: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)),
    )

    @jax.jit
    def step(params, state, damping_scale):
        optimizer = optcurv.edf(1.0, 8, damping_scale=damping_scale, acceleration="nesterov")
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value, value_fn=loss)
        return optax.apply_updates(params, updates), state, value

    start = net.init(jax.random.key(0), x)
    for damping_scale, converges in ((0.0, False), (1.0, True)):
        params, state = start, optcurv.edf(1.0, acceleration="nesterov").init(start)
        for _ in range(40):
            params, state, value = step(params, state, damping_scale)
        assert (value < 1e-4) == converges
        assert state[0].info.finite == converges


class ConvolutionalNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (4, 8):
            x = nn.avg_pool(nn.tanh(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_momentum_is_w1():
    params, loss = problems.quadratic(condition=5.0)
    path, _ = run(optcurv.edf(0.5, 2, acceleration="momentum"), params, loss, 4)
    direction = optcurv.scale_by_edf(2)
    w, m = params, optax.tree.zeros_like(params)
    for n in range(4):
        v, _ = direction.update(jax.grad(loss)(w), direction.init(w), w, value_fn=loss)
        m = jax.tree.map(lambda m, v: 0.9 * m + 0.1 * v, m, v)
        w = jax.tree.map(lambda w, m: w - 0.5 * m, w, m)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), path[n + 1], w)


def test_nesterov_flow_is_w2_under_a_learning_rate_schedule():
    """The two-sequence form of Su, Boyd and Candès, written out."""
    params, loss = problems.quadratic(condition=5.0)
    schedule = optax.exponential_decay(0.5, 1, 0.8)
    path, _ = run(optcurv.edf(schedule, 1, acceleration="nesterov"), params, loss, 6)
    direction = optcurv.scale_by_edf(1)
    y = w = params
    for n in range(1, 7):
        v, _ = direction.update(jax.grad(loss)(y), direction.init(y), y, value_fn=loss)
        w_old, w = w, jax.tree.map(lambda y, v, n=n: y - schedule(n - 1) * v, y, v)
        y = jax.tree.map(lambda w, old, n=n: w + (n - 1) / (n + 2) * (w - old), w, w_old)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), path[n], y)


def test_nesterov_flow_starts_again_where_a_step_undoes_a_quarter_of_the_velocity():
    flow, zero = optcurv.scale_by_nesterov_flow(), jnp.zeros(1)

    def outgoing(*steps):
        state = flow.init(zero)
        for step in steps:
            update, state = flow.update(jnp.array([step]), state)
        return update

    before = (1.0, 1.0, 1.0)  # the velocities are 1, 1 and 1 + 1/4
    np.testing.assert_allclose(outgoing(*before, -0.32), [-0.32])  # as the first step of all
    np.testing.assert_allclose(outgoing(*before, -0.3), [-0.3 + 3 / 6 * (-0.3 + 2 / 5 * 1.25)], rtol=1e-6)


def test_exact_newton_steps_under_nesterov_arrive_at_once_and_stay():
    params, loss = problems.quadratic(condition=3.0)
    path, _ = run(optcurv.edf(1.0, 6, damping_scale=0.0, acceleration="nesterov"), params, loss, 4)
    for point in path[1:]:
        jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 1.0, atol=1e-4), point)


def test_an_outlier_is_refused_once():
    """Here the direction grows with the gradient, as the damping does not."""
    params, loss = problems.quadratic()
    with_outlier = optcurv.Composite(loss.model_fn, lambda residuals: loss.loss_fn(residuals) + 1e6 * residuals[0])
    optimizer = optcurv.scale_by_edf(damping_power=0.0)
    state, lengths = optimizer.init(params), []
    for closure in (loss, with_outlier, loss, with_outlier, with_outlier):
        direction, state = optimizer.update(jax.grad(closure)(params), state, params, value_fn=closure)
        lengths.append(float(optax.tree.norm(direction)))
        assert state.info.refused == (lengths[-1] == 0)
    assert [length > 0 for length in lengths] == [True, False, True, False, True]
    assert lengths[-1] > 1e4


def test_damping_may_follow_schedules():
    params, loss = problems.network_params(), problems.network_loss(problems.blobs())
    optimizer = optcurv.edf(0.1, 1, damping_scale=lambda t: 2.0 + t, damping_power=lambda t: 0.0 * t)
    _, state = run(optimizer, params, loss, 3)
    assert optcurv.diagnostics(state)["edf/damping"] == 4.0


def test_curvature_closure_replaces_the_loss_in_the_products_only():
    """Curvature twice as strong halves the undamped step."""
    params, loss = problems.network_params(), problems.network_loss(problems.blobs())
    double = optcurv.Composite(loss.model_fn, lambda logits: 2 * loss.loss_fn(logits))
    optimizer = optcurv.scale_by_edf(2, damping_scale=0.0)
    grads = jax.grad(loss)(params)
    full, _ = optimizer.update(grads, optimizer.init(params), params, value_fn=loss)
    half, _ = optimizer.update(grads, optimizer.init(params), params, value_fn=loss, curvature_value_fn=double)
    jax.tree.map(lambda f, h: np.testing.assert_allclose(f, 2 * h, rtol=1e-3, atol=1e-6), full, half)


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: optcurv.scale_by_edf(0), ValueError, "max_iter"),
        (lambda: optcurv.scale_by_edf(1.5), TypeError, "max_iter"),
        (lambda: optcurv.scale_by_edf(damping_scale=-1.0), ValueError, "damping_scale"),
        (lambda: optcurv.scale_by_edf(damping_scale="1"), TypeError, "damping_scale"),
        (lambda: optcurv.scale_by_edf(damping_power=-0.5), ValueError, "damping_power"),
        (lambda: optcurv.scale_by_edf(damping_power=float("nan")), ValueError, "damping_power"),
        (lambda: optcurv.scale_by_edf(curvature="hessian"), TypeError, "curvature"),
        (lambda: optcurv.scale_by_nesterov_flow(0.0), ValueError, "alpha"),
        (lambda: optcurv.edf(0.1, acceleration="polyak"), ValueError, "acceleration"),
        (lambda: optcurv.edf(0.1, dampening=1.0), TypeError, "dampening"),
    ],
)
def test_wrong_options(make, error, name):
    with pytest.raises(error, match=name):
        make()

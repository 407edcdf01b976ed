"""Levenberg-Marquardt and its solvers against explicit matrices, and its damping against the rule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import optcurv
from optcurv import Stop
from optcurv.krylov import Metric
from optcurv.methods import dense as dense_module
from tests import problems
from tests.laws.test_contract import make_step, train
from tests.references import dense_curvature


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# Losses. With few examples the residuals are the smaller side, with many the parameters.

FEW, MANY = 5, 60


def network(params, x):
    """Of 4 inputs and 3 outputs, for one example or a batch."""
    return jnp.tanh(x @ params["kernel"]) @ params["head"] * params["scale"]


def make_params():
    rng = np.random.default_rng(0)
    leaves = {"kernel": rng.normal(size=(4, 5)), "head": rng.normal(size=(5, 3)), "scale": np.float64(1.3)}
    return jax.tree.map(jnp.asarray, leaves)


def squared_loss(batch):
    targets = jax.nn.one_hot(batch.y, 3)
    return optcurv.Composite(lambda p: network(p, batch.x), lambda out: 0.5 * jnp.mean((out - targets) ** 2))


def cross_entropy(batch):
    return optcurv.Composite(lambda p: network(p, batch.x), lambda out: problems.cross_entropy(out, batch.y))


def per_example_cross_entropy(batch):
    return optcurv.Composite(optcurv.per_example((network, batch.x)), cross_entropy(batch).loss_fn)


def laplacian(params, x):
    return jnp.trace(jax.hessian(lambda x: network(params, x)[0])(x))


def boundary(params, x):
    return {"value": network(params, x)[0], "slope": network(params, x)[1:]}


def sum_of_squares(outputs):
    return sum(
        weight * jnp.mean(leaf**2) for weight, leaf in zip((0.5, 2.0, 1.0), jax.tree.leaves(outputs), strict=True)
    )


def two_parts(batch):
    def model_fn(params):
        interior = jax.vmap(functools.partial(laplacian, params))(batch.x)
        return interior, jax.vmap(functools.partial(boundary, params))(batch.x[::2])

    return optcurv.Composite(model_fn, sum_of_squares)


def two_parts_per_example(batch):
    return optcurv.Composite(optcurv.per_example((laplacian, batch.x), (boundary, batch.x[::2])), sum_of_squares)


def accumulated(loss_of_batch):
    return lambda batch: optcurv.accumulate(
        loss_of_batch, jax.tree.map(lambda leaf: leaf.reshape(5, -1, *leaf.shape[1:]), batch)
    )


LOSSES = {
    "squared": squared_loss,
    "cross-entropy": cross_entropy,
    "cross-entropy-per-example": per_example_cross_entropy,
    "two-parts": two_parts,
    "two-parts-per-example": two_parts_per_example,
    "accumulated": accumulated(cross_entropy),
    "accumulated-per-example": accumulated(per_example_cross_entropy),
}
every_loss = pytest.mark.parametrize("loss_of_batch", LOSSES.values(), ids=LOSSES.keys())


def diagonal_metric(params):
    scales = jax.tree.map(lambda leaf: 1.5 + jnp.cos(jnp.arange(1.0, leaf.size + 1)).reshape(leaf.shape), params)
    times = lambda v: jax.tree.map(jnp.multiply, scales, v)  # noqa: E731
    over = lambda v: jax.tree.map(jnp.divide, v, scales)  # noqa: E731
    return Metric(times, over), np.asarray(ravel_pytree(scales)[0])


def some_gradient(params):
    """Not that of the loss: a chain may have changed it, so that it is in no range of J'."""
    return jax.tree.map(lambda leaf: jnp.sin(jnp.arange(1.0, leaf.size + 1)).reshape(leaf.shape), params)


def solved(solver, loss, params, damping, gradient=None):
    metric, _ = diagonal_metric(params)

    @jax.jit
    def solve(params, gradient):
        product = optcurv.gauss_newton_product(loss, params)
        return solver(product, gradient, metric, jnp.asarray(damping, jnp.float64), jax.random.key(0))

    return solve(params, some_gradient(params) if gradient is None else gradient)


@every_loss
@pytest.mark.parametrize("size", [FEW, MANY])
def test_dense_equals_numpy_on_explicit_matrices(loss_of_batch, size):
    loss, params, damping = loss_of_batch(problems.blobs(size=size, dtype=jnp.float64)), make_params(), 0.3
    gradient, matrix = (
        ravel_pytree(some_gradient(params))[0],
        dense_curvature(optcurv.gauss_newton_product, loss, params),
    )
    expected = np.linalg.solve(matrix + damping * np.diag(diagonal_metric(params)[1]), -gradient)
    found = solved(optcurv.dense(), loss, params, damping)
    step = ravel_pytree(found.step)[0]
    np.testing.assert_allclose(step, expected, rtol=0, atol=1e-10 * np.linalg.norm(expected))
    np.testing.assert_allclose(found.predicted_decrease, -(gradient @ step + step @ matrix @ step / 2), rtol=1e-10)
    assert found.on_residuals == (size == FEW)
    assert (found.stop, found.iterations, found.size) == (Stop.CONVERGED, 1, damping)


@every_loss
@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("damping", [1e-6, 1e2])
def test_both_sides_give_the_same_step(loss_of_batch, size, damping, monkeypatch):
    loss, params = loss_of_batch(problems.blobs(size=size, dtype=jnp.float64)), make_params()
    gradient = jax.jit(jax.grad(loss))(params)
    steps = []
    for side in (dense_module._on_parameters, dense_module._on_residuals):
        with monkeypatch.context() as patched:
            for name in ("_on_parameters", "_on_residuals"):
                patched.setattr(dense_module, name, side)
            steps.append(ravel_pytree(solved(optcurv.dense(), loss, params, damping, gradient).step)[0])
    np.testing.assert_allclose(*steps, rtol=0, atol=1e-8 * np.linalg.norm(steps[0]))


@pytest.mark.parametrize("solver", [optcurv.conjugate_gradients(60, 1e-12), optcurv.minimum_residual(60, 1e-12)])
def test_krylov_solvers_come_to_the_same_step(solver):
    loss, params = cross_entropy(problems.blobs(size=MANY, dtype=jnp.float64)), make_params()
    found, expected = (solved(each, loss, params, 0.3) for each in (solver, optcurv.dense()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), found.step, expected.step)
    np.testing.assert_allclose(found.predicted_decrease, expected.predicted_decrease, rtol=1e-9)
    assert found.stop == Stop.CONVERGED


@pytest.mark.parametrize("solver", [optcurv.conjugate_gradients(3), optcurv.minimum_residual(3)])
def test_krylov_solvers_tell_what_an_unfinished_step_does_to_the_model(solver):
    loss, params = cross_entropy(problems.blobs(size=MANY, dtype=jnp.float64)), make_params()
    found = solved(solver, loss, params, 1e-3)
    step, gradient = ravel_pytree(found.step)[0], ravel_pytree(some_gradient(params))[0]
    matrix = dense_curvature(optcurv.gauss_newton_product, loss, params)
    np.testing.assert_allclose(found.predicted_decrease, -(gradient @ step + step @ matrix @ step / 2), rtol=1e-9)
    assert (found.stop, found.iterations) == (Stop.MAX_ITER, 3)


def test_the_jacobian_comes_in_blocks(monkeypatch):
    """So small a block that it holds one row or column."""
    params = make_params()
    for loss_of_batch in (two_parts, two_parts_per_example):
        for size in (FEW, MANY):
            loss = loss_of_batch(problems.blobs(size=size, dtype=jnp.float64))
            whole = solved(optcurv.dense(), loss, params, 0.3).step
            with monkeypatch.context() as patched:
                patched.setattr(dense_module, "_BLOCK", 2000)
                in_blocks = solved(optcurv.dense(), loss, params, 0.3).step
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), in_blocks, whole)


# The path.


def step_on(optimizer, loss):
    return jax.jit(lambda params, state: make_step(optimizer, lambda _: loss)(params, state, None))


def test_momentum_is_springs():
    """φ = μφ + Jᵀ(JJᵀ + λI)⁻¹(r - μJφ), w ← w - φ, on the residuals themselves."""
    batch, params, damping, momentum = problems.blobs(size=FEW, dtype=jnp.float64), make_params(), 0.05, 0.8
    targets = jax.nn.one_hot(batch.y, 3)
    loss = optcurv.Composite(lambda p: network(p, batch.x) - targets, lambda r: 0.5 * jnp.sum(r**2))
    optimizer = optcurv.levenberg_marquardt(
        norm=optcurv.uniform_norm(),
        momentum=momentum,
        initial_damping=damping,
        min_damping=damping,
        max_damping=damping,
        accept_ratio=0.0,
    )
    step, state = step_on(optimizer, loss), optimizer.init(params)
    w, unravel = ravel_pytree(params)
    residuals = jax.jit(lambda w: ravel_pytree(loss.model_fn(unravel(w)))[0])
    jacobian, previous = jax.jit(jax.jacobian(residuals)), np.zeros(w.size)
    for _ in range(6):
        params, state = step(params, state)
        assert state.info.accepted
        j, r = np.asarray(jacobian(w)), np.asarray(residuals(w))
        dual = np.linalg.solve(j @ j.T + damping * np.eye(r.size), r - momentum * j @ previous)
        previous = momentum * previous + j.T @ dual
        predicted = 0.5 * (r @ r - np.sum((r - j @ previous) ** 2))
        np.testing.assert_allclose(state.info.predicted_decrease, predicted, rtol=1e-5)
        w = w - previous
        np.testing.assert_allclose(ravel_pytree(params)[0], w, rtol=0, atol=1e-12)


def test_a_rejected_step_gives_no_momentum():
    """Else a step that is too long for a reason outside of the model would be proposed for ever."""
    loss = lambda radius: optcurv.Composite(  # noqa: E731
        lambda w: w - 3.0, lambda r: 0.5 * jnp.sum(r**2) + jnp.where(jnp.abs(r + 3.0) > radius, jnp.inf, 0.0)
    )
    optimizer = optcurv.levenberg_marquardt(momentum=0.9, initial_damping=10.0)
    w = jnp.zeros(())
    state = optimizer.init(w)
    w, state = step_on(optimizer, loss(np.inf))(w, state)
    assert state.previous > 0
    near = step_on(optimizer, loss(float(w) + 1e-3))
    w, state = near(w, state)
    assert not state.info.accepted
    assert state.previous == 0
    for _ in range(20):
        w, state = near(w, state)
    assert state.info.accepted


def loss_of_ratio(ratio):
    """A loss whose decrease along the step from w = 1 is `ratio` of what its model predicts."""

    def loss_fn(r):
        return jnp.where(r == 1.0, 0.5, 0.5 - ratio * (0.5 - 0.5 * r**2)) + 0.0 * r

    return optcurv.Composite(lambda w: w, loss_fn)


@pytest.mark.parametrize(
    ("ratio", "accepted", "damping"),
    [
        (0.99, True, 0.25),
        (0.5, True, 0.5),
        (0.15, True, 2.0),
        (0.05, False, 2.0),
        (-1.0, False, 2.0),
        (np.nan, False, 2.0),
    ],
)
def test_damping_rule(ratio, accepted, damping):
    rule = {"accept_ratio": 0.1, "grow_ratio": 0.2, "shrink_ratio": 0.9, "growth": 4.0, "shrinkage": 2.0}
    optimizer = optcurv.levenberg_marquardt(
        solver=optcurv.conjugate_gradients(),
        norm=optcurv.uniform_norm(),
        curvature=lambda value_fn, params: lambda v: v,
        initial_damping=0.5,
        **rule,
    )
    w = jnp.asarray(1.0)
    update, new = optimizer.update(jnp.ones(()), optimizer.init(w), w, value=0.5, value_fn=loss_of_ratio(ratio))
    np.testing.assert_allclose(update, -2 / 3 if accepted else 0.0, rtol=1e-6)
    np.testing.assert_allclose(new.size, damping, rtol=1e-6)
    np.testing.assert_allclose(new.info.damping, 0.5)
    np.testing.assert_allclose(new.info.predicted_decrease, 2 / 3 - 2 / 9, rtol=1e-6)
    assert bool(new.info.accepted) == accepted


def test_residuals_that_are_not_finite_reject_the_step_and_raise_the_damping():
    loss = optcurv.Composite(jnp.log, lambda r: 0.5 * jnp.sum((r + 5.0) ** 2))  # w = e⁻⁵; below 0 there is none
    optimizer = optcurv.levenberg_marquardt(initial_damping=1e-8)
    w = jnp.ones(3)
    step, state, rejected = step_on(optimizer, loss), optimizer.init(w), 0
    for _ in range(200):
        before, size, (w, state) = w, state.size, step(w, state)
        if not state.info.accepted:
            rejected += 1
            np.testing.assert_array_equal(w, before)
            assert state.size > size
            assert state.info.ratio == -np.inf or state.info.ratio < 0
    assert rejected > 3
    np.testing.assert_allclose(w, np.exp(-5), rtol=1e-6)


def test_nothing_changes_where_the_loss_is_not_finite_to_begin_with():
    optimizer, w = optcurv.levenberg_marquardt(), jnp.ones(3)
    loss = optcurv.Composite(lambda w: w * jnp.nan, lambda r: jnp.sum(r**2))
    state = optimizer.init(w)
    update, new = jax.jit(lambda state: optimizer.update(w, state, w, value_fn=loss))(state)
    np.testing.assert_array_equal(update, 0)
    assert new.size == state.size
    assert new.info.stop == Stop.NOT_FINITE


@pytest.mark.parametrize(
    ("scale", "length"),
    [(1.0, 1.0), (0.3, 0.25), (2.2, 2.0), (1e-3, 0.125)],
    ids=["as-is", "halved", "doubled", "bound"],
)
def test_the_length_is_a_power_of_two_that_lowers_the_loss(scale, length):
    """The minimum is `scale` times as far as the model has it; three trials."""
    loss = lambda w: 0.5 * (w / scale - 1.0) ** 2  # noqa: E731
    optimizer = optcurv.levenberg_marquardt(
        solver=optcurv.conjugate_gradients(),
        norm=optcurv.uniform_norm(),
        curvature=lambda value_fn, params: lambda v: v,
        initial_damping=1e-6,
        length_trials=3,
        accept_ratio=0.0,
    )
    w = jnp.asarray(0.0)
    update, state = optimizer.update(-jnp.ones(()), optimizer.init(w), w, value=0.5, value_fn=loss)
    assert state.info.step_length == length
    improves = loss(length) < 0.5
    np.testing.assert_allclose(update, length if improves else 0.0, rtol=1e-5)
    assert state.info.accepted == improves
    if improves:
        np.testing.assert_allclose(state.info.actual_decrease, 0.5 - loss(length), rtol=1e-4)


# Rounding, and large problems.


def test_the_damping_is_raised_where_the_factorisation_fails():
    with jax.enable_x64(False):
        rng = np.random.default_rng(0)
        columns = jnp.asarray(rng.normal(size=(40, 1)) + 1e-6 * rng.normal(size=(40, 12)), jnp.float32)
        loss = optcurv.Composite(lambda w: columns @ w - 1.0, lambda r: 0.5 * jnp.sum(r**2))
        optimizer, w = optcurv.levenberg_marquardt(initial_damping=1e-12), jnp.zeros(12)
        _, state = step_on(optimizer, loss)(w, optimizer.init(w))
        assert state.info.iterations > 1
        assert 1e-12 < state.info.damping < 1.0
        assert state.info.stop == Stop.CONVERGED
        assert state.info.accepted


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("size", [FEW, MANY])
def test_fits_a_network_exactly(dtype, size):
    """From near a loss of zero."""
    batch = problems.blobs(size=size, dtype=dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), make_params())
    targets = network(jax.tree.map(lambda leaf: leaf + 0.2 * jnp.cos(5 * leaf), params), batch.x)
    loss = optcurv.Composite(
        optcurv.per_example((network, batch.x)), lambda outputs: 0.5 * jnp.mean((outputs - targets) ** 2)
    )
    optimizer = optcurv.levenberg_marquardt()
    step, state = step_on(optimizer, loss), optimizer.init(params)
    for _ in range(40):
        params, state = step(params, state)
    assert loss(params) < (1e-10 if dtype == jnp.float32 else 1e-25)


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
@pytest.mark.parametrize("size", [4, MANY])
def test_sharded_batches_and_shard_map_take_the_same_path(size, axis_type):
    """On either side: the devices' own rows come together."""
    batch, params, optimizer = (
        problems.blobs(size=size, dtype=jnp.float64),
        make_params(),
        optcurv.levenberg_marquardt(),
    )
    expected, _ = jax.jit(make_step(optimizer, cross_entropy))(params, optimizer.init(params), batch)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    state = jax.device_put(optimizer.init(params), jax.NamedSharding(mesh, jax.P()))
    split = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("data")))

    for loss_of_batch in (cross_entropy, per_example_cross_entropy):

        def mean_over_mesh(batch, loss_of_batch=loss_of_batch):
            loss = loss_of_batch(batch)
            return optcurv.Composite(loss.model_fn, lambda outputs: jax.lax.pmean(loss.loss_fn(outputs), "data"))

        specs = {"in_specs": (jax.P(), jax.P(), jax.P("data")), "out_specs": jax.P()}
        mapped = jax.shard_map(make_step(optimizer, mean_over_mesh), mesh=mesh, **specs)
        for step in (make_step(optimizer, loss_of_batch), mapped):
            actual, new = jax.jit(step)(params, state, split)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), actual, expected)
            assert new.info.on_residuals == (size == 4)


# Bad input.


def test_a_problem_too_large_names_both_sides_and_another_solver():
    loss, params = squared_loss(problems.blobs(size=FEW, dtype=jnp.float64)), make_params()
    optimizer = optcurv.levenberg_marquardt(solver=optcurv.dense(max_size=10))
    with pytest.raises(ValueError, match=r"36 parameters and 15 residuals.*max_size of 10.*conjugate_gradients\(\)"):
        jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p, value_fn=loss), params)


def test_a_jacobian_too_large_names_its_size_and_accumulate(monkeypatch):
    monkeypatch.setattr(dense_module, "_LARGEST", 1000)
    loss, params = squared_loss(problems.blobs(size=MANY, dtype=jnp.float64)), make_params()
    with pytest.raises(ValueError, match=r"180×36 numbers.*optcurv\.accumulate"):
        solved(optcurv.dense(), loss, params, 1.0)


CONCAVE = optcurv.Composite(lambda w: 3.0 * w, lambda r: jnp.sum(r[:2] ** 2) - jnp.sum(r[2:] ** 2))
WIDE_CONCAVE = optcurv.Composite(lambda w: 3.0 * w[:3], lambda r: jnp.sum(r[:2] ** 2) - jnp.sum(r[2:] ** 2))
MIXING = optcurv.Composite(lambda w: 3.0 * w[:3], lambda r: jnp.sum(r) ** 2)


@pytest.mark.parametrize("loss", [CONCAVE, WIDE_CONCAVE, MIXING], ids=["parameters", "residuals", "mixing"])
def test_a_loss_that_is_not_convex_or_mixes_examples(loss):
    """Outside of jit an error, inside a rejection that raises the damping."""
    optimizer, w = optcurv.levenberg_marquardt(initial_damping=1e-3), jnp.ones(4)
    gradient, state = jax.grad(loss)(w), optimizer.init(w)
    with pytest.raises(ValueError, match=r"Composite\.loss_fn.*not positive semi-definite, or the loss mixes examples"):
        optimizer.update(gradient, state, w, value_fn=loss)
    new_w, new = step_on(optimizer, loss)(w, state)
    np.testing.assert_array_equal(new_w, w)
    assert new.info.stop == Stop.INDEFINITE_LOSS
    assert new.size > state.size


def test_negative_curvature_rejects_the_step_and_raises_the_damping():
    saddle = lambda w: 0.5 * (w[0] ** 2 - w[1] ** 2) + 0.25 * w[1] ** 4  # noqa: E731
    for solver in (optcurv.conjugate_gradients(), optcurv.minimum_residual()):
        optimizer = optcurv.levenberg_marquardt(
            solver=solver, curvature=optcurv.hessian_product, initial_damping=0.1, norm=optcurv.uniform_norm()
        )
        w = jnp.array([1.0, 0.1])
        step, state = step_on(optimizer, saddle), optimizer.init(w)
        _, rejected = step(w, state)
        assert rejected.info.stop == Stop.NEGATIVE_CURVATURE
        assert not rejected.info.accepted
        for _ in range(60):
            w, state = step(w, state)
        np.testing.assert_allclose(w, [0.0, 1.0], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"initial_damping": 0.0}, ValueError, "initial_damping must be finite, > 0"),
        ({"initial_damping": -1.0}, ValueError, "initial_damping"),
        ({"initial_damping": 1e13}, ValueError, "initial_damping must be at most max_damping"),
        ({"min_damping": 0.0}, ValueError, "min_damping"),
        ({"min_damping": 20.0}, ValueError, "min_damping must be at most initial_damping"),
        ({"accept_ratio": 0.5}, ValueError, "accept_ratio must be at most grow_ratio"),
        ({"grow_ratio": 0.8}, ValueError, "grow_ratio must be at most shrink_ratio"),
        ({"growth": 1.0}, ValueError, "growth"),
        ({"shrinkage": 1.0}, ValueError, "shrinkage"),
        ({"momentum": 1.0}, ValueError, "momentum must be below 1"),
        ({"momentum": -0.1}, ValueError, "momentum must be finite, >= 0"),
        ({"length_trials": -1}, ValueError, "length_trials must be at least 1"),
        ({"length_trials": 2.0}, TypeError, "length_trials must be a Python int"),
        ({"solver": optcurv.dense}, TypeError, "solver must be a function"),
        ({"damping": 1.0}, TypeError, "damping"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        optcurv.levenberg_marquardt(**options)


def test_dense_refuses_what_is_not_the_gauss_newton_matrix():
    optimizer, w = optcurv.levenberg_marquardt(curvature=optcurv.hessian_product), jnp.ones(3)
    with pytest.raises(TypeError, match=r"needs the Gauss-Newton matrix.*conjugate_gradients\(\)"):
        optimizer.update(w, optimizer.init(w), w, value_fn=lambda w: w @ w)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((), TypeError, "at least one pair"),
        ((network,), TypeError, r"parts\[0\] must be a pair \(fn, batch\)"),
        (
            ((lambda p: p, jnp.ones(3)),),
            TypeError,
            r"The function of parts\[0\] must be a function of \(params, example\)",
        ),
        (((network, {"a": jnp.ones(3), "b": jnp.ones(2)}),), ValueError, "must agree in their first axis"),
        (((network, 1.0),), ValueError, "must agree in their first axis"),
    ],
)
def test_wrong_parts_of_a_model(parts, error, message):
    with pytest.raises(error, match=message):
        optcurv.per_example(*parts)


def test_masked_parameters_and_per_example_models_go_together():
    """The model of the parameters under the mask stays one of single examples."""
    batch, params = problems.blobs(size=FEW, dtype=jnp.float64), make_params()
    mask = {"kernel": True, "head": True, "scale": False}
    optimizer = optcurv.masked(optcurv.levenberg_marquardt(), mask)
    paths = [
        train(jax.jit(make_step(optimizer, lambda _, loss=loss: loss(batch))), params, optimizer.init(params), 2)[0]
        for loss in (per_example_cross_entropy, cross_entropy)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), *paths)
    assert isinstance(
        per_example_cross_entropy(batch).of(lambda p: p).model_fn, type(optcurv.per_example((network, batch.x)))
    )

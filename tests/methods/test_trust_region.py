"""The trust region and its cubic sibling against a plain transcription of the algorithms, and on saddles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optcurv
from optcurv import Stop
from tests import problems
from tests.laws.test_contract import make_step
from tests.references import dense_curvature, dense_steihaug

SADDLE = jnp.diag(jnp.array([2.0, 1.0, -0.5]))


def step_on(optimizer, loss):
    """One jitted step on a loss of the parameters alone."""

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value, value_fn=loss)
        return optax.apply_updates(params, updates), state

    return step


def saddle(params):
    """A strict saddle at 0, bounded from below."""
    return params @ SADDLE @ params / 2 + jnp.sum(params**4)


# The algorithm.


def dense_trust_region(loss, params, curvature, ellipsoid, num_steps):
    """Algorithm 1 on dense matrices, the radius growing at the boundary only; yields parameters, ratio and radius."""
    flat, unravel = ravel_pytree(params)
    w, radius, average = np.asarray(flat), 1.0, np.zeros(flat.size)
    value = jax.jit(lambda w: loss(unravel(w)))
    gradient = jax.jit(jax.grad(value))
    for _ in range(num_steps):
        g, b = np.asarray(gradient(w)), dense_curvature(curvature, loss, unravel(jnp.asarray(w)))
        average = 0.8 * average + 0.2 * g**2
        s, stop, _ = dense_steihaug(b, g, ellipsoid(average), radius)
        ratio = float(value(w) - value(w + s)) / -(g @ s + s @ b @ s / 2)
        yield w, ratio, radius
        w = w + s if ratio >= 0.6 else w
        grows = ratio >= 0.9 and stop in (optcurv.Stop.BOUNDARY, optcurv.Stop.NEGATIVE_CURVATURE)
        radius = min(1.3 * radius, 4.0) if grows else radius if ratio >= 0.6 else radius / 2.5


@pytest.mark.parametrize(
    ("norm", "ellipsoid"),
    [
        (optcurv.uniform_norm(), lambda average: np.eye(average.size)),
        (optcurv.rmsprop_norm(eps=1e-4), lambda average: np.diag(np.sqrt(average + 1e-4))),
    ],
    ids=["uniform", "rmsprop"],
)
@pytest.mark.parametrize("curvature", [optcurv.hessian_product, optcurv.gauss_newton_product])
def test_path_equals_algorithm_1_on_dense_matrices(norm, ellipsoid, curvature):
    with jax.enable_x64(True):
        params = problems.network_params(dtype=jnp.float64)
        loss = problems.network_loss(problems.blobs(dtype=jnp.float64))
        options = {"initial_radius": 1.0, "max_radius": 4.0, "accept_ratio": 0.6, "grow_ratio": 0.9}
        optimizer = optcurv.trust_region(norm=norm, curvature=curvature, growth=1.3, shrinkage=2.5, **options)
        step, state, decisions = step_on(optimizer, loss), optimizer.init(params), set()
        for w, ratio, radius in dense_trust_region(loss, params, curvature, ellipsoid, 12):
            np.testing.assert_allclose(ravel_pytree(params)[0], w, rtol=0, atol=1e-10)
            np.testing.assert_allclose(state.size, radius, rtol=1e-12)
            params, state = step(params, state)
            np.testing.assert_allclose(state.info.ratio, ratio, rtol=1e-5)
            decisions.add((bool(state.info.accepted), bool(ratio >= 0.9)))
        assert len(decisions) > 1  # more than one of the rule's branches was taken


def loss_of_ratio(ratio):
    """Returns a loss whose decrease from w = 1 is `ratio` of what its gradient and B = 0 predict."""
    return lambda w: jnp.where(w == 1.0, w, 1.0 + ratio * (w - 1.0))


@pytest.mark.parametrize(
    ("ratio", "accepted", "radius"),
    [(0.99, True, 0.6), (0.5, True, 0.5), (0.05, False, 0.25), (-1.0, False, 0.25), (np.nan, False, 0.25)],
)
def test_radius_rule(ratio, accepted, radius):
    rule = {"initial_radius": 0.5, "accept_ratio": 0.1, "grow_ratio": 0.9, "growth": 1.2, "shrinkage": 2.0}
    flat = lambda loss, params: jnp.zeros_like  # noqa: E731
    optimizer = optcurv.trust_region(norm=optcurv.uniform_norm(), curvature=flat, **rule)
    w = jnp.asarray(1.0)
    state = optimizer.init(w)
    update, new = optimizer.update(jnp.ones(()), state, w, value=w, value_fn=loss_of_ratio(ratio))
    assert bool(new.info.accepted) == accepted
    np.testing.assert_allclose(update, -0.5 if accepted else 0.0)
    np.testing.assert_allclose(new.size, radius, rtol=1e-6)
    np.testing.assert_allclose(new.info.predicted_decrease, 0.5, rtol=1e-6)
    np.testing.assert_allclose(new.info.actual_decrease, 0.5 * ratio, rtol=1e-5)
    assert new.info.radius == 0.5


@pytest.mark.parametrize(("ratio", "weight"), [(1.5, 2.0), (0.5, 4.0), (-1.0, 12.0), (np.nan, 12.0)])
def test_weight_rule_of_the_cubic(ratio, weight):
    optimizer = optcurv.adaptive_cubic(
        norm=optcurv.uniform_norm(),
        curvature=lambda loss, params: jnp.zeros_like,
        initial_weight=4.0,
        shrinkage=2.0,
        growth=3.0,
    )
    w = jnp.asarray(1.0)
    update, new = optimizer.update(jnp.ones(()), optimizer.init(w), w, value=w, value_fn=loss_of_ratio(ratio))
    # s - 4/3 |s|³ is least at s = -1/2, and falls short of the linear decrease by a third.
    np.testing.assert_allclose(update, -0.5 if ratio > 0 else 0.0, rtol=1e-6)
    np.testing.assert_allclose(new.info.predicted_decrease, 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(new.size, weight, rtol=1e-6)


@pytest.mark.parametrize(("distance", "changes"), [(1.0, True), (0.01, False)])
@pytest.mark.parametrize(
    ("make", "options"),
    [(optcurv.trust_region, {"initial_radius": 0.5}), (optcurv.adaptive_cubic, {"initial_weight": 4.0})],
)
def test_a_step_that_its_region_does_not_hold_back_leaves_the_size(make, options, distance, changes):
    """Otherwise batches that are fitted undo what others need."""
    optimizer, w = make(norm=optcurv.uniform_norm(), **options), distance * jnp.ones(1)
    _, state = step_on(optimizer, lambda w: 0.5 * w @ w)(w, optimizer.init(w))
    assert state.info.accepted
    assert (state.size != optimizer.init(w).size) == changes


def test_radius_keeps_below_its_maximum_and_numbers_may_be_schedules():
    optimizer = optcurv.trust_region(
        initial_radius=1.0, max_radius=lambda count: 5.0 - count, growth=optax.constant_schedule(3.0)
    )
    w = 100 * jnp.ones(2)
    step, state = step_on(optimizer, lambda w: w @ w), optimizer.init(w)
    sizes = []
    for _ in range(4):
        w, state = step(w, state)
        sizes.append(float(state.size))
    np.testing.assert_allclose(sizes, [3.0, 4.0, 3.0, 2.0])


@pytest.mark.parametrize(("size", "evaluations"), [(1.0, 1), (1e-4, 2)], ids=["by-values", "by-slopes"])
def test_loss_is_evaluated_once_beyond_the_products(size, evaluations):
    """And once more, for the slope, where the decrease drowns in rounding."""
    calls = []

    def loss(w):
        jax.debug.callback(lambda _: calls.append(1), w[0])
        return 1.0 + jnp.sum(w**2)

    w = jnp.full(3, size)
    product = lambda value_fn, params: lambda v: 2 * v  # noqa: E731
    optimizer = optcurv.trust_region(curvature=product, initial_radius=1e-3)
    optimizer.update(2 * w, optimizer.init(w), w, value=1.0 + jnp.sum(w**2), value_fn=loss)
    jax.effects_barrier()
    assert len(calls) == evaluations


# Saddles.


def test_from_a_strict_saddle_lanczos_escapes_and_steihaug_stays():
    start = jnp.zeros(3)
    for optimizer, escapes in (
        (optcurv.trust_region(), False),
        (optcurv.trust_region(solver=optcurv.gltr(3)), True),
        (optcurv.adaptive_cubic(norm=optcurv.uniform_norm(), max_iter=3), True),
    ):
        step, w, state = step_on(optimizer, saddle), start, optimizer.init(start)
        for _ in range(60):
            w, state = step(w, state)
        if escapes:
            np.testing.assert_allclose(np.abs(w), [0, 0, np.sqrt(1 / 8)], atol=2e-3)  # the minimum: -w/2 + 4 w³ = 0
        else:
            np.testing.assert_array_equal(w, start)
            assert state.info.iterations == 0


def test_random_vectors_come_from_the_seed_and_the_step():
    def maximum(w):
        """As steep in every direction, so that the random vector alone decides."""
        return -w @ w

    def first_updates(seed):
        optimizer = optcurv.trust_region(norm=optcurv.uniform_norm(), solver=optcurv.gltr(3), seed=seed)
        w = jnp.zeros(3)
        update = jax.jit(lambda state: optimizer.update(w, state, w, value_fn=maximum))
        updates, state = update(optimizer.init(w))
        return updates, update(state)[0]

    update, again = first_updates(0)
    assert np.any(update != 0)
    np.testing.assert_array_equal(update, first_updates(0)[0])
    assert not np.allclose(np.abs(update), np.abs(first_updates(1)[0]))
    assert not np.allclose(np.abs(update), np.abs(again))


# Small decreases, and sizes that must come back.

METHODS = {
    "gauss-newton": lambda: optcurv.trust_region(curvature=optcurv.gauss_newton_product),
    "hessian": optcurv.trust_region,
    "lanczos": lambda: optcurv.trust_region(solver=optcurv.gltr()),
    "cubic": optcurv.adaptive_cubic,
}
every_regularization = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


def logistic_step(optimizer):
    """A step on four examples of one input and two classes, with a cross-entropy that is 0 or at least 1e-7 or so."""

    def loss_of(labels):
        model_fn = lambda w: jnp.ones((4, 1)) @ w  # noqa: E731
        return optcurv.Composite(
            model_fn, lambda z: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, labels))
        )

    return jax.jit(make_step(optimizer, loss_of))


@every_regularization
def test_a_fitted_batch_does_not_stop_the_next_ones(make):
    """The loss of the first batch is 0 in float32, its gradient is not."""
    optimizer, w = make(), jnp.array([[10.0, -10.0]])
    step, state = logistic_step(optimizer), optimizer.init(w)
    for _ in range(100):
        w, state = step(w, state, jnp.zeros(4, int))
        assert jnp.isfinite(state.info.ratio)
    fitted = w
    for _ in range(100):
        w, state = step(w, state, jnp.ones(4, int))
    assert w[0, 1] - w[0, 0] > fitted[0, 1] - fitted[0, 0] + 10


@every_regularization
def test_size_comes_back_after_any_number_of_rejections(make):
    """As after poisoned batches: here the loss is smallest where it starts, whatever the gradient says."""
    optimizer, w = make(), jnp.ones(3)
    state = optimizer.init(w)
    peak = lambda start: optcurv.Composite(lambda w: w, lambda w: 1e3 * jnp.sum(jnp.abs(w - start)) + w @ w)  # noqa: E731
    up = jax.jit(lambda state: optimizer.update(2 * w, state, w, value=w @ w, value_fn=peak(w))[1])
    for _ in range(300):
        state = up(state)
    assert not 1e-5 < state.size < 1e5
    step = jax.jit(make_step(optimizer, lambda _: optcurv.Composite(lambda w: w, lambda w: w @ w)))
    for _ in range(200):
        w, state = step(w, state, ())
    assert w @ w < 0.5 * 3


def test_a_small_decrease_is_taken_from_the_slopes():
    """In float32 the values of this loss are equal; the slopes tell a good step from one that overshoots."""
    loss = lambda w: 1e3 + 0.5 * 1e-6 * w**2  # noqa: E731
    for guessed_curvature, ratio in ((1e-6, 1.0), (0.4e-6, -0.5)):
        optimizer = optcurv.trust_region(
            norm=optcurv.uniform_norm(),
            initial_radius=10.0,
            curvature=lambda loss, params, c=guessed_curvature: lambda v: c * v,
        )
        w = jnp.asarray(1.0)
        _, state = optimizer.update(1e-6 * w, optimizer.init(w), w, value_fn=lambda w: loss(w) - 1e3)
        np.testing.assert_allclose(state.info.ratio, ratio, rtol=1e-5)


@pytest.mark.parametrize(
    "norm",
    [
        optcurv.adagrad_norm(),
        optcurv.rmsprop_norm(),
        optcurv.full_matrix_norm(),
        optcurv.full_matrix_norm(decay=0.8),
    ],
    ids=["adagrad", "rmsprop", "full-adagrad", "full-rmsprop"],
)
@pytest.mark.parametrize("weights", [(1.0, 1e4, 1.0, 1e6), (1e6,), (1e12, 1.0, 1e12), (1e18, 1e18)], ids=str)
def test_a_spike_shuts_no_norm(norm, weights):
    optimizer, (start, loss) = optcurv.trust_region(norm=norm), problems.quadratic()
    scaled = lambda weight: optcurv.Composite(loss.model_fn, lambda r: weight * loss.loss_fn(r))  # noqa: E731
    step, params, state = jax.jit(make_step(optimizer, scaled)), start, optimizer.init(start)
    for weight in weights:
        _, state = step(params, state, weight)
    for _ in range(200):
        params, state = step(params, state, 1.0)
    assert loss(params) < 0.01 * loss(start)


@every_regularization
def test_a_gradient_a_thousand_times_as_long_is_refused_once(make):
    optimizer, (params, loss) = make(), problems.quadratic()
    scaled = lambda weight: optcurv.Composite(loss.model_fn, lambda r: weight * loss.loss_fn(r))  # noqa: E731
    step = jax.jit(make_step(optimizer, scaled))
    params, state = step(params, optimizer.init(params), 1.0)
    moved = []
    for _ in range(3):
        before, (params, state) = params, step(params, state, 1e9)
        moved.append(bool(jnp.any(ravel_pytree(before)[0] != ravel_pytree(params)[0])))
    assert moved[:2] == [False, True]


# Faults.


@pytest.mark.parametrize("make", [optcurv.trust_region, optcurv.adaptive_cubic])
def test_nothing_changes_where_the_loss_is_not_finite_to_begin_with(make):
    optimizer, w = make(), jnp.ones(3)
    state = optimizer.init(w)
    for value, gradient in ((np.nan, w), (1.0, w * np.inf), (1.0, w * 1e30)):
        update, new = optimizer.update(gradient, state, w, value=value, value_fn=lambda w: jnp.sum(w**2))
        np.testing.assert_array_equal(update, 0)
        assert not new.info.accepted
        jax.tree.map(np.testing.assert_array_equal, (new.size, new.norm), (state.size, state.norm))


@pytest.mark.parametrize("solver", [optcurv.steihaug(), optcurv.gltr(2)])
def test_indefinite_norm_is_an_error_outside_of_jit_and_a_rejection_inside(solver):
    norm = optcurv.uniform_norm()._replace(at=lambda state: optcurv.Metric(apply=lambda v: v, inverse=lambda v: -v))
    optimizer, w = optcurv.trust_region(norm=norm, solver=solver), jnp.ones(3)
    loss = lambda w: jnp.sum(w**2)  # noqa: E731
    state = optimizer.init(w)
    with pytest.raises(ValueError, match=r"not positive definite.*eps"):
        optimizer.update(w, state, w, value_fn=loss)
    new_w, new_state = step_on(optimizer, loss)(w, state)
    np.testing.assert_array_equal(new_w, w)
    assert new_state.info.stop == Stop.INDEFINITE_NORM
    assert new_state.size < state.size


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"initial_radius": 0.0}, ValueError, "initial_radius"),
        ({"initial_radius": -1.0}, ValueError, "initial_radius"),
        ({"initial_radius": 20.0}, ValueError, "at most max_radius = 10"),
        ({"min_radius": 0.0}, ValueError, "min_radius"),
        ({"min_radius": 0.1}, ValueError, "min_radius must be at most initial_radius"),
        ({"max_radius": 0.0}, ValueError, "max_radius"),
        ({"growth": 1.0}, ValueError, "growth"),
        ({"shrinkage": 0.9}, ValueError, "shrinkage"),
        ({"accept_ratio": -0.1}, ValueError, "accept_ratio"),
        ({"accept_ratio": 0.5, "grow_ratio": 0.4}, ValueError, "at most grow_ratio = 0.4, got 0.5"),
        ({"grow_ratio": 1.5}, ValueError, "grow_ratio"),
        ({"norm": "rmsprop"}, TypeError, r"optcurv\.Norm"),
        ({"solver": "steihaug"}, TypeError, "solver"),
        ({"curvature": "hessian"}, TypeError, "curvature"),
        ({"radius": 1.0}, TypeError, "radius"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        optcurv.trust_region(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"initial_weight": 0.0}, ValueError, "initial_weight"),
        ({"min_weight": 0.0}, ValueError, "min_weight"),
        ({"initial_weight": 1e9}, ValueError, "at most max_weight"),
        ({"max_iter": 0}, ValueError, "max_iter"),
        ({"accept_ratio": 0.5, "shrink_ratio": 0.4}, ValueError, "at most shrink_ratio = 0.4, got 0.5"),
    ],
)
def test_bad_options_of_the_cubic(options, error, message):
    with pytest.raises(error, match=message):
        optcurv.adaptive_cubic(**options)


def test_full_matrix_norm_refuses_a_network_too_large():
    with pytest.raises(ValueError, match="2500×2500"):
        optcurv.trust_region(norm=optcurv.full_matrix_norm()).init(jnp.zeros((50, 50)))


@pytest.mark.parametrize(
    "make",
    [lambda: optcurv.trust_region(initial_radius=1e-4, growth=1.3), lambda: optcurv.adaptive_cubic(initial_weight=1e6)],
)
def test_a_region_below_the_parameters_resolution_grows_out_of_it(make):
    """Steps that rounding to bfloat16 swallows neither lower the loss nor count against the model."""
    params = problems.network_params(dtype=jnp.bfloat16)
    optimizer, batch = make(), problems.blobs()
    step, loss = jax.jit(make_step(optimizer, problems.network_loss)), problems.network_loss(batch)
    start, state = loss(params), optimizer.init(params)
    for _ in range(100):
        params, state = step(params, state, batch)
    assert loss(params) < 0.5 * start

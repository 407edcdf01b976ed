import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import optcurv
from optcurv.pal import rounded_sum
from optcurv.quadratic import parabola_curvature
from tests import problems


def step(optimizer, loss, params, state=None, **replaced):
    """One update with everything handed over, and the state after it."""
    value, grad = jax.value_and_grad(loss)(params)
    extra = {"value": value, "grad": grad, "value_fn": loss, **replaced}
    return optimizer.update(grad, optimizer.init(params) if state is None else state, params, **extra)


def test_parabola_curvature_recovers_a_parabola():
    for curvature, slope, value, mu in [(3.0, -2.0, 5.0, 0.1), (-1.0, -0.5, 0.0, 2.0), (0.0, 1.0, 1.0, 1.0)]:
        at_step = value + slope * mu + curvature / 2 * mu**2
        assert parabola_curvature(value, slope, mu, at_step) == pytest.approx(curvature, abs=1e-10)


@pytest.mark.parametrize("measure_slope", [False, True])
@pytest.mark.parametrize("measuring_step", [1e-3, 0.1, 1.0, 30.0])
def test_lands_on_the_line_minimum_of_a_quadratic_for_any_measuring_step(measuring_step, measure_slope):
    """Along a direction that is not the gradient, too: the gradient at the minimum is orthogonal to the step."""
    with jax.enable_x64(True):
        params, loss = problems.quadratic(dtype=jnp.float64)
        search = optcurv.scale_by_parabolic_linesearch(
            measuring_step, curvature_factor=1.0, max_step=1e3, measure_slope=measure_slope
        )
        optimizer = optax.chain(optax.adam(1.0), search)
        updates, _ = step(optimizer, loss, params)
        at_minimum = jax.grad(loss)(optax.apply_updates(params, updates))
        cosine = optax.tree.vdot(at_minimum, updates) / optax.tree.norm(at_minimum) / optax.tree.norm(updates)
        assert optax.tree.norm(updates) > 0.1
        assert abs(cosine) < 1e-8


def test_the_published_slope_is_biased_under_momentum_and_exact_without():
    with jax.enable_x64(True):
        params, loss = problems.quadratic(dtype=jnp.float64)

        def second_update(momentum, exact_slope):
            optimizer = optcurv.pal(momentum=momentum, exact_slope=exact_slope, curvature_factor=1.0, max_step=1e3)
            updates, state = step(optimizer, loss, params)
            updates, _ = step(optimizer, loss, optax.apply_updates(params, updates), state)
            return np.concatenate(jax.tree.leaves(updates))

        np.testing.assert_allclose(second_update(0.0, True), second_update(0.0, False), rtol=1e-9)
        exact, published = second_update(0.6, True), second_update(0.6, False)
        assert np.linalg.norm(exact - published) > 0.01 * np.linalg.norm(exact)


def test_algorithm_1_step_by_step():
    """The paper's listing in plain numbers, with momentum, the published slope, λ and the decay."""
    with jax.enable_x64(True):
        params, quadratic_loss = problems.quadratic(condition=10.0, dtype=jnp.float64)
        loss = lambda p: quadratic_loss(p) + 0.1 * jnp.sum(jnp.cos(3 * p["a"]))  # noqa: E731
        optimizer = optcurv.pal(
            0.1, momentum=0.6, curvature_factor=0.5, max_step=0.3, decay=0.9, decay_steps=4, exact_slope=False
        )
        state, w, g = optimizer.init(params), params, optax.tree.zeros_like(params)
        for t in range(8):
            updates, state = step(optimizer, loss, w, state)
            mu, longest = 0.1 * 0.9 ** (t / 4), 0.3 * 0.9 ** (t / 4)
            g = jax.tree.map(lambda g, d: 0.6 * g + d, g, jax.grad(loss)(w))
            norm = optax.tree.norm(g)
            trial = jax.tree.map(lambda w, g, s=mu / norm: w - s * g, w, g)
            curvature = 0.5 * ((loss(trial) - loss(w)) / mu + norm) / (mu / 2)
            length = min(norm / curvature if curvature > 0 else mu, longest)
            expected = jax.tree.map(lambda g, s=length / norm: -s * g, g)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), updates, expected)
            w = optax.apply_updates(w, updates)


def test_step_is_inverse_to_the_curvature_factor():
    params, loss = problems.quadratic()
    lengths = []
    for factor in (0.5, 1.0, 2.0):
        search = optcurv.scale_by_parabolic_linesearch(curvature_factor=factor, max_step=1e3)
        updates, _ = step(optax.chain(optax.scale(-1.0), search), loss, params)
        lengths.append(optax.tree.norm(updates))
    np.testing.assert_allclose(lengths[0] / lengths[1], 2.0, rtol=1e-5)
    np.testing.assert_allclose(lengths[1] / lengths[2], 2.0, rtol=1e-5)


CASES = {
    "parabola": (lambda w: 2 * jnp.sum(w**2), -1.0, 1, 1.0),
    "concave": (lambda w: -jnp.sum(w**2), -1.0, 2, 0.125),
    "straight": (lambda w: 4 * w[0], -1.0, 2, 0.125),
    "uphill": (lambda w: jnp.sum(w**2), 1.0, 3, 0.0),
    "clipped": (lambda w: 1e-3 * jnp.sum(w**2), -1.0, 1, 1.5),
}


@pytest.mark.parametrize(("loss", "sign", "case", "length"), CASES.values(), ids=CASES.keys())
def test_three_cases_and_the_clip(loss, sign, case, length):
    w = jnp.array([0.6, 0.8]) * (2.0 if case == 1 and length > 1 else 1.0)
    search = optcurv.scale_by_parabolic_linesearch(0.125, curvature_factor=1.0, max_step=1.5)
    updates, state = step(optax.chain(optax.scale(sign), search), loss, w)
    diagnostics = optcurv.diagnostics(state)
    assert diagnostics["pal/case"] == case
    assert diagnostics["pal/clipped"] == (loss is CASES["clipped"][0])
    assert diagnostics["pal/noise"] == (loss is CASES["straight"][0])
    np.testing.assert_allclose(diagnostics["pal/step"], length, rtol=1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(updates), length, rtol=1e-3)
    if case == 2:
        assert loss(w + updates) < loss(w)


def test_clip_applies_to_the_measuring_step_too():
    loss = lambda w: -jnp.sum(w**2)  # noqa: E731
    search = optcurv.scale_by_parabolic_linesearch(0.5, max_step=0.2)
    updates, state = step(optax.chain(optax.scale(-1.0), search), loss, jnp.ones(3))
    np.testing.assert_allclose(jnp.linalg.norm(updates), 0.2, rtol=1e-6)
    assert optcurv.diagnostics(state)["pal/clipped"]


# What rounding would decide.


@pytest.mark.parametrize("measure_slope", [False, True])
@pytest.mark.parametrize("measuring_step", [0.3, 0.02])
def test_curvature_is_right_where_bfloat16_parameters_round_the_trial_point(measuring_step, measure_slope):
    """Taken for w + mu d, the trial point gives a curvature of -2 and of 8000: at 0.02 no number moves at all."""
    w = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2.0, 1000), jnp.bfloat16)
    loss = lambda w: 50.0 + 3.0 * jnp.sum((w.astype(jnp.float32) - 1.25) ** 2)  # noqa: E731
    search = optcurv.scale_by_parabolic_linesearch(measuring_step, curvature_factor=1.0, measure_slope=measure_slope)
    _, state = step(optax.chain(optax.scale(-1.0), search), loss, w)
    np.testing.assert_allclose(optcurv.diagnostics(state)["pal/curvature"], 6.0, rtol=0.1)


def test_compiled_too_the_trial_point_is_rounded():
    """XLA computes bfloat16 in float32, and where float32 follows it leaves the rounding between them out."""
    w, step = jnp.ones(2, jnp.bfloat16), jnp.asarray([1e-3, 1e-2], jnp.bfloat16)
    moved = jax.jit(lambda w, step: rounded_sum(w, step).astype(jnp.float32) - w)(w, step)
    np.testing.assert_array_equal(moved, [0, 2**-7])


@pytest.mark.parametrize("measure_slope", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-12])
@pytest.mark.parametrize("measuring_step", [1e-3, 1e-12, 1e-45])
def test_a_measuring_step_that_drowns_in_rounding_is_raised_until_it_measures(measuring_step, scale, measure_slope):
    """The minimum lies at 3, whatever the measuring step has decayed to."""
    loss = lambda w: scale * (100.0 + jnp.sum((w - 1.0) ** 2))  # noqa: E731
    search = optcurv.scale_by_parabolic_linesearch(
        measuring_step, curvature_factor=1.0, max_step=10.0, measure_slope=measure_slope
    )
    optimizer, state = optax.chain(optax.scale(-1.0), search), None
    for _ in range(10):
        _, state = step(optimizer, loss, jnp.full(4, 2.5), state)
    found = optcurv.diagnostics(state)
    assert (found["pal/noise"], found["pal/case"]) == (False, 1)
    np.testing.assert_allclose(found["pal/step"], 3.0, rtol=0.1)


@pytest.mark.parametrize("exact_slope", [True, False])
def test_decay_ends_in_no_case_0(exact_slope):
    """Published, 0 / 0 follows where the measuring step has underflowed."""
    params, loss = problems.quadratic()
    optimizer = optcurv.pal(decay=1e-20, exact_slope=exact_slope)
    state = None
    for _ in range(4):
        updates, state = step(optimizer, loss, params, state)
        assert optcurv.diagnostics(state)["pal/case"] in (1, 2)
        params = optax.apply_updates(params, updates)


def test_noise_is_told_and_not_stepped_on():
    """A straight line but for rounding, which would take the step for a minimum anywhere up to the longest."""
    rounding = lambda w: 1.0 + 1e-7 * jnp.sum(w > 0.95)  # noqa: E731
    loss = lambda w: jnp.sum(w) + jax.lax.stop_gradient(rounding(w)) - 1.0  # noqa: E731
    search = optcurv.scale_by_parabolic_linesearch(0.125, max_step=10.0)
    _, state = step(optax.chain(optax.scale(-1.0), search), loss, jnp.ones(4))
    found = optcurv.diagnostics(state)
    assert (found["pal/noise"], found["pal/case"], found["pal/step"]) == (True, 2, 0.125)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradients_whose_squares_are_not_floats(scale):
    params, loss = problems.quadratic()
    scaled = lambda w: scale * loss(w)  # noqa: E731
    updates, expected = (step(optcurv.pal(), one, params)[0] for one in (scaled, loss))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), updates, expected)


def test_trains_as_far_as_float32_goes(digits):
    """With a loss as precise as it is small. With optax's it ended between 1e-9 and 1e-8, and rising."""
    images, labels = digits

    def loss(params, x, y):
        logits = jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        return jnp.mean(optcurv.softmax_cross_entropy_with_integer_labels(logits, y))

    optimizer = optcurv.pal()

    def train_step(n, carry):
        params, state = carry
        chosen = jax.random.randint(jax.random.fold_in(jax.random.key(1), n), (128,), 0, len(images))
        value_fn = functools.partial(loss, x=images[chosen], y=labels[chosen])
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    keys = jax.random.split(jax.random.key(0))
    params = {
        "w1": jax.random.normal(keys[0], (64, 32)) / 8,
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(keys[1], (32, 10)) / 32**0.5,
        "b2": jnp.zeros(10),
    }
    params, _ = jax.jit(lambda *carry: jax.lax.fori_loop(0, 7000, train_step, carry))(params, optimizer.init(params))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        assert loss(params, jnp.asarray(images, jnp.float64), labels) < 1e-15


@pytest.fixture
def digits():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images[:1437] / 16, jnp.float32), jnp.asarray(labels[:1437])


@pytest.mark.parametrize("left_out", [{"grad": None}, {"value": None}, {"value": None, "grad": None}])
@pytest.mark.parametrize("exact_slope", [True, False])
def test_what_is_not_handed_over_is_evaluated(left_out, exact_slope):
    params, loss = problems.network_params(), problems.network_loss(problems.blobs())
    optimizer = optcurv.pal(exact_slope=exact_slope)
    whole, _ = step(optimizer, loss, params)
    part, _ = step(optimizer, loss, params, **left_out)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), whole, part)


def test_with_value_and_grad_given_the_loss_is_evaluated_once():
    params, loss = problems.quadratic()
    calls = []
    counted = lambda p: calls.append(None) or loss(p)  # noqa: E731
    step(optcurv.pal(), loss, params, value_fn=counted)
    assert len(calls) == 1


def test_schedules_of_measuring_and_longest_step():
    loss = lambda w: -jnp.sum(w)  # noqa: E731
    optimizer = optax.chain(
        optax.scale(-1.0),
        optcurv.scale_by_parabolic_linesearch(lambda t: 0.1 * (t + 1), max_step=lambda t: jnp.where(t < 2, 1.0, 0.05)),
    )
    w, state, lengths = jnp.zeros(2), None, []
    for _ in range(3):
        updates, state = step(optimizer, loss, w, state)
        lengths.append(float(jnp.linalg.norm(updates)))
    np.testing.assert_allclose(lengths, [0.1, 0.2, 0.05], rtol=1e-5)


def test_momentum_survives_a_gradient_that_is_not_finite():
    params, loss = problems.quadratic()
    optimizer = optcurv.pal(momentum=0.9)
    updates, state = step(optimizer, loss, params)
    params = optax.apply_updates(params, updates)
    poisoned = jax.tree.map(lambda g: g * jnp.nan, params)
    updates, after = optimizer.update(poisoned, state, params, value=jnp.nan, grad=poisoned, value_fn=loss)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates)
    assert optcurv.diagnostics(after)["pal/case"] == 0
    clean, _ = step(optimizer, loss, params, state)
    again, _ = step(optimizer, loss, params, after)
    jax.tree.map(np.testing.assert_array_equal, clean, again)


@pytest.mark.parametrize(
    ("poison", "where"), [(np.nan, "value"), (np.inf, "value"), (-np.inf, "value"), (np.nan, "grad"), (np.inf, "trial")]
)
def test_nothing_that_is_not_finite_moves_the_parameters(poison, where):
    params, loss = problems.quadratic()
    value, grad = jax.value_and_grad(loss)(params)
    extra = {"value": value, "grad": grad, "value_fn": loss}
    extra |= {
        "value": {"value": jnp.asarray(poison)},
        "grad": {"grad": jax.tree.map(lambda g: g * poison, grad)},
        "trial": {"value_fn": lambda p: loss(p) * poison},
    }[where]
    optimizer = optcurv.pal()
    updates, state = optimizer.update(grad, optimizer.init(params), params, **extra)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates)
    assert optcurv.diagnostics(state)["pal/case"] == 0


def test_zero_gradient_gives_zero_step():
    loss = lambda w: jnp.sum(w**2)  # noqa: E731
    updates, state = step(optcurv.pal(), loss, jnp.zeros(3))
    np.testing.assert_array_equal(updates, 0)
    assert optcurv.diagnostics(state)["pal/case"] == 3


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: optcurv.pal(0.0), ValueError, "measuring_step"),
        (lambda: optcurv.pal(-0.1), ValueError, "measuring_step"),
        (lambda: optcurv.pal("0.1"), TypeError, "measuring_step"),
        (lambda: optcurv.pal(momentum=-0.1), ValueError, "momentum"),
        (lambda: optcurv.pal(momentum=1.5), ValueError, "momentum"),
        (lambda: optcurv.pal(curvature_factor=0.0), ValueError, "curvature_factor"),
        (lambda: optcurv.pal(max_step=-1.0), ValueError, "max_step"),
        (lambda: optcurv.pal(decay=0.0), ValueError, "decay"),
        (lambda: optcurv.pal(decay=1.1), ValueError, "decay"),
        (lambda: optcurv.pal(decay_steps=0), ValueError, "decay_steps"),
        (lambda: optcurv.pal(exact_slope=1), TypeError, "exact_slope"),
        (lambda: optcurv.pal(measure_slope="yes"), TypeError, "measure_slope"),
        (lambda: optcurv.pal(mu=0.1), TypeError, "mu"),
        (lambda: optcurv.scale_by_parabolic_linesearch(float("inf")), ValueError, "measuring_step"),
    ],
)
def test_wrong_options(make, error, name):
    with pytest.raises(error, match=name):
        make()

"""Slices against a plain Python loop, their corners, batches; running statistics between networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from tests import problems


def networks(count):
    """Parameters of as many networks, in one structure."""
    return [
        jax.tree.map(lambda leaf, n=n: leaf + 0.3 * n * jnp.cos(leaf + n), problems.network_params())
        for n in range(count)
    ]


def metrics(params, batch=None):
    """A loss and an accuracy, as a pytree."""
    batch = problems.blobs(seed=7) if batch is None else batch
    logits = problems.network(params, batch.x)
    return {"loss": problems.network_loss(batch)(params), "accuracy": jnp.mean(jnp.argmax(logits, 1) == batch.y)}


def mixed(weights, trees):
    return jax.tree.map(lambda *leaves: sum(w * leaf for w, leaf in zip(weights, leaves, strict=True)), *trees)


def assert_values(result, shape, points):
    """Compares with a plain loop over the points, in the order of the result."""
    expected = [metrics(point) for point in points]
    for name, values in result.items():
        assert values.shape == shape
        np.testing.assert_allclose(values.ravel(), [one[name] for one in expected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_at_once", [1, 3])
def test_line_is_a_plain_loop(num_at_once):
    start, end = networks(2)
    alphas = np.linspace(-0.5, 1.5, 7)
    result = optcurv.line(metrics, start, end, alphas, num_at_once=num_at_once)
    assert_values(result, (7,), [mixed((1 - alpha, alpha), (start, end)) for alpha in alphas])


def test_absolute_line_measures_distance():
    start, end = networks(2)
    distance = optax.tree.norm(optax.tree.sub(end, start))
    result = optcurv.absolute_line(metrics, start, end, [0.0, 0.5 * distance, distance])
    assert_values(result, (3,), [start, mixed((0.5, 0.5), (start, end)), end])


def test_bilinear_is_a_plain_loop_and_has_its_corners():
    vertices, alphas, betas = networks(4), [0.0, 0.3, 1.0], [0.0, 1.0]
    result = optcurv.bilinear(metrics, vertices, alphas, betas)
    points = [mixed((b * a, b * (1 - a), (1 - b) * a, (1 - b) * (1 - a)), vertices) for a in alphas for b in betas]
    assert_values(result, (3, 2), points)
    corners = {name: values[::2][::-1, ::-1].T.ravel() for name, values in result.items()}
    assert_values(corners, (4,), vertices)


def test_barycentric_is_a_plain_loop_and_has_its_vertices():
    vertices, alphas, betas = networks(3), [0.0, 0.4, 1.0], [0.0, 1.0]
    result = optcurv.barycentric(metrics, vertices, alphas, betas)
    points = [mixed((1 - a, a * b, a * (1 - b)), vertices) for a in alphas for b in betas]
    assert_values(result, (3, 2), points)
    found = {name: jnp.array([values[0, 0], values[2, 1], values[2, 0]]) for name, values in result.items()}
    assert_values(found, (3,), vertices)


def test_plane_is_a_plain_loop():
    center, *directions = networks(3)
    xs, ys = [-1.0, 0.5], [0.0, 0.1, 0.2]
    result = optcurv.plane(metrics, center, directions, xs, ys)
    assert_values(result, (2, 3), [mixed((1, x, y), (center, *directions)) for x in xs for y in ys])


def test_batches_are_averaged_by_their_sizes():
    start, end = networks(2)
    whole = problems.blobs(seed=3, size=50)
    parts = [jax.tree.map(lambda array, s=s: array[s], whole) for s in (slice(0, 40), slice(40, 50))]
    together = optcurv.line(lambda params: metrics(params, whole), start, end, [0.0, 0.5])
    apart = optcurv.line(metrics, start, end, [0.0, 0.5], batches=iter(parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), apart, together)


def test_parameters_keep_their_dtype_and_are_mixed_in_float32():
    start, end = jnp.full(3, 1.0, jnp.bfloat16), jnp.full(3, 1.5, jnp.bfloat16)
    seen = []

    def value(w):
        seen.append(w.dtype)
        return w[0].astype(jnp.float32)

    np.testing.assert_array_equal(optcurv.line(value, start, end, [0.3]), jnp.bfloat16(0.7 * 1.0 + 0.3 * 1.5))
    assert all(dtype == jnp.bfloat16 for dtype in seen)


def test_what_is_not_finite_stays_so():
    values = optcurv.line(jnp.log, jnp.array(1.0), jnp.array(-1.0), [0.0, 1.0])
    np.testing.assert_array_equal(values, [0.0, np.nan])


def test_random_directions_have_the_filters_norms():
    params = problems.network_params()
    direction = optcurv.random_direction(jax.random.key(1), params)
    other = optcurv.random_direction(jax.random.key(2), params)
    for leaf, drawn, again in zip(*map(jax.tree.leaves, (params, direction, other)), strict=True):
        if leaf.ndim > 1:
            norms = [np.linalg.norm(x.reshape(-1, x.shape[-1]), axis=0) for x in (leaf, drawn)]
            np.testing.assert_allclose(*norms, rtol=1e-5)
            assert not np.allclose(drawn, again)
        else:
            np.testing.assert_array_equal(drawn, 0)


def test_random_directions_have_the_filters_norms_however_kernels_are_arranged():
    """Outputs first, as in equinox; heads and their features, as in attention; one kernel for each step of a scan."""
    shapes = {"first": (7, 3), "heads": (7, 2, 5), "scanned": (4, 10, 10), "bias": (4, 10), "scale": (4, 10)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def loss(params):
        x = jnp.ones((6, 3)) @ params["first"].T
        x = jnp.einsum("bi,ihk->bhk", x, params["heads"]).reshape(6, 10)
        layer = lambda x, p: (jnp.tanh(x @ p["scanned"] + p["bias"]) * p["scale"], None)  # noqa: E731
        return jnp.sum(jax.lax.scan(layer, x, {name: params[name] for name in ("scanned", "bias", "scale")})[0])

    direction = optcurv.random_direction(jax.random.key(1), params, layers=optcurv.layers(loss, params))
    for name, axis in {"first": 1, "heads": 0, "scanned": 1}.items():
        norms = [np.linalg.norm(tree[name], axis=axis) for tree in (params, direction)]
        np.testing.assert_allclose(*norms, rtol=1e-5)
        assert not np.allclose(params[name], direction[name])
    for name in ("bias", "scale"):
        np.testing.assert_array_equal(direction[name], 0)
    with pytest.raises(TypeError, match=r"layers.*optcurv.layers"):
        optcurv.random_direction(jax.random.key(0), params, layers=-1)


def test_plane_coordinates_are_those_of_the_nearest_point():
    center, first, second, offside = networks(4)
    points = [mixed((1, 0.5, -2.0), (center, first, second)), mixed((1, 0.1), (center, offside))]
    coordinates = optcurv.plane_coordinates(center, (first, second), points)
    np.testing.assert_allclose(coordinates[0], [0.5, -2.0], rtol=1e-4)
    flat = np.stack([jax.flatten_util.ravel_pytree(tree)[0] for tree in (first, second, offside)])
    nearest, *_ = np.linalg.lstsq(flat[:2].T, 0.1 * flat[2], rcond=None)
    np.testing.assert_allclose(coordinates[1], nearest, rtol=1e-3)
    with pytest.raises(ValueError, match="parallel"):
        optcurv.plane_coordinates(center, (first, optax.tree.scale(2.0, first)), points)


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_settled_statistics_are_those_of_the_data(momentum):
    x = 300.0 + 40.0 * jax.random.normal(jax.random.key(0), (64, 5))
    norm = nn.BatchNorm(use_running_average=False, momentum=momentum)
    variables = norm.init(jax.random.key(1), x)

    @jax.jit
    def settle(statistics):
        update = lambda s: norm.apply({**variables, "batch_stats": s}, x, mutable="batch_stats")[1]["batch_stats"]  # noqa: E731
        return optcurv.settled_statistics(update, statistics)

    settled = settle(variables["batch_stats"])
    np.testing.assert_allclose(settled["mean"], np.mean(x, axis=0), rtol=1e-4)
    np.testing.assert_allclose(settled["var"], np.var(np.float64(x), axis=0), rtol=1e-3)  # Flax squares the mean


def test_settling_keeps_the_digits_of_large_statistics():
    statistics = jnp.geomspace(1.0, 1e4, 50)
    settled = jax.jit(lambda s: optcurv.settled_statistics(lambda s: 0.99 * s + 0.01 * statistics, s))(statistics)
    np.testing.assert_allclose(settled, statistics, rtol=2e-5)


def test_bad_input():
    loss, w = jnp.sum, {"a": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"structure and shapes.*'a'"):
        optcurv.line(loss, w, {"a": jnp.ones(3)}, [0.0])
    with pytest.raises(ValueError, match=r"structure and shapes.*'b'"):
        optcurv.line(loss, w, {**w, "b": jnp.ones(2)}, [0.0])
    with pytest.raises(ValueError, match="coefficients"):
        optcurv.line(loss, w, w, [])
    with pytest.raises(ValueError, match="vertices must be 4"):
        optcurv.bilinear(loss, [w] * 3, [0.0], [0.0])
    with pytest.raises(ValueError, match="vertices must be 3"):
        optcurv.barycentric(loss, [w] * 4, [0.0], [0.0])
    with pytest.raises(ValueError, match="directions must be two"):
        optcurv.plane(loss, w, [w], [0.0], [0.0])
    with pytest.raises(ValueError, match="same point"):
        optcurv.absolute_line(loss, w, w, [0.0])
    with pytest.raises(ValueError, match="at least one batch"):
        optcurv.line(lambda p, batch: 0.0, w, w, [0.0], batches=[])
    with pytest.raises(TypeError, match="value_fn"):
        optcurv.line(1.0, w, w, [0.0])

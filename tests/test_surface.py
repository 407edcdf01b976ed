"""Slices against a plain Python loop, their corners, batches; distances between networks, basins and barriers."""

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


def test_functional_distance_and_disagreement():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30, 4))
    expected = np.sqrt(np.mean([np.sum((x - y) ** 2) for x, y in zip(a, b, strict=True)]))
    np.testing.assert_allclose(optcurv.functional_distance(a, b), expected, rtol=1e-6)
    share = np.mean([np.argmax(x) != np.argmax(y) for x, y in zip(a, b, strict=True)])
    np.testing.assert_allclose(optcurv.label_disagreement(a, b), share, rtol=1e-6)
    with pytest.raises(ValueError, match="same shape"):
        optcurv.functional_distance(a, b[:5])


@pytest.mark.parametrize(
    ("losses", "width"),
    [
        ([3.0, 1.0, 0.0, 1.0, 3.0], 3.0),  # crosses 2 halfway
        ([1.0, 1.0, 0.0, 1.0, 3.0], 3.5),  # the line ends first
        ([3.0, 0.5, 3.0, 0.0, 3.0], 4 / 3),  # another basin does not count
        ([3.0, 1.0, 0.0, np.nan, 0.0], 1.5),  # ends where the loss is not finite
        ([3.0, 3.0, 2.5, 3.0, 3.0], 0.0),  # nowhere below
    ],
    ids=["crosses", "line ends", "two basins", "not finite", "above"],
)
def test_basin_width(losses, width):
    np.testing.assert_allclose(optcurv.basin_width(np.arange(5.0), losses, threshold=2.0), width, rtol=1e-6)


def test_barrier_height_is_above_the_chord():
    x = np.linspace(0, 1, 101)
    np.testing.assert_allclose(optcurv.barrier_height(2 * x + np.sin(np.pi * x)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(optcurv.barrier_height(x**2), 0.0, atol=1e-6)


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
    with pytest.raises(ValueError, match=r"\(n,\)"):
        optcurv.basin_width([0.0, 1.0], [0.0], 1.0)

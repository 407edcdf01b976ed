"""Steihaug's and Lanczos' solvers against dense references, and the decreases they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import optcurv
from optcurv import Stop
from optcurv.krylov import Metric
from optcurv.methods.subproblems import cubic_lanczos
from tests.references import dense_steihaug

SIZE = 9
SPECTRA = {
    "definite": np.linspace(1, 5, SIZE),
    "indefinite": np.linspace(-2, 4, SIZE),
    "negative": -np.linspace(1, 5, SIZE),
    "singular": np.concatenate([np.zeros(3), np.linspace(1, 4, SIZE - 3)]),
    "ill-conditioned": np.geomspace(1e-2, 1e2, SIZE),
}
RADII = [1e-2, 0.5, 2.0, 1e3]
every_model = pytest.mark.parametrize("kind", SPECTRA)
every_radius = pytest.mark.parametrize("radius", RADII)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def model(kind, seed=0):
    """Returns B of the spectrum, g, and a metric M of condition 10, none of them diagonal."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    other, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    return (
        rotation * SPECTRA[kind] @ rotation.T,
        rng.normal(size=SIZE),
        other * np.geomspace(0.3, 3, SIZE) @ other.T,
    )


def split(vector):
    return {"x": vector[:5], "y": (vector[5:],)}


def flat(tree):
    return jnp.concatenate([tree["x"], tree["y"][0]])


def operator(matrix):
    return lambda tree: split(jnp.matmul(matrix, flat(tree), precision="highest"))


@functools.partial(jax.jit, static_argnames="solver")
def solve_tree(solver, b, g, m, inverse, size, key):
    found = solver(operator(b), split(g), Metric(operator(m), operator(inverse)), size, key)
    return found._replace(step=flat(found.step))


def solve(solver, b, g, m, size, seed=0):
    found = solve_tree(solver, b, g, m, np.linalg.inv(m), jnp.asarray(size, float), jax.random.key(seed))
    return jax.device_get(found)


def norm(m, s):
    return np.sqrt(s @ m @ s)


def decrease(b, g, s):
    return -(g @ s + s @ b @ s / 2)


STEIHAUG = optcurv.steihaug(max_iter=5, tol=0.1)  # more steps only amplify rounding
LANCZOS = optcurv.gltr(SIZE, tol=0.0)
SHORT_LANCZOS = optcurv.gltr(SIZE - 1, tol=0.0)


@every_model
@every_radius
@pytest.mark.parametrize("seed", range(5))
def test_steihaug_equals_the_dense_reference(kind, radius, seed):
    b, g, m = model(kind, seed)
    found = solve(STEIHAUG, b, g, m, radius)
    step, stop, iterations = dense_steihaug(b, g, m, radius, max_iter=5, tol=0.1)
    assert (found.stop, found.iterations) == (stop, iterations)
    np.testing.assert_allclose(found.step, step, rtol=0, atol=1e-10 * np.linalg.norm(step))
    np.testing.assert_allclose(found.predicted_decrease, decrease(b, g, step), rtol=1e-10)


def test_the_reference_takes_every_exit():
    exits = {
        dense_steihaug(*model(kind, seed), radius, max_iter=5, tol=0.1)[1]
        for kind in SPECTRA
        for radius in RADII
        for seed in range(5)
    }
    assert exits == {Stop.NEGATIVE_CURVATURE, Stop.BOUNDARY, Stop.CONVERGED, Stop.MAX_ITER}


@every_model
@every_radius
@pytest.mark.parametrize("solver", [STEIHAUG, LANCZOS, SHORT_LANCZOS], ids=["steihaug", "lanczos", "short-lanczos"])
def test_boundary_and_cauchy_decrease(kind, radius, solver):
    for seed in range(20):
        b, g, m = model(kind, seed)
        found = solve(solver, b, g, m, radius)
        length = norm(m, found.step)
        assert length <= radius * (1 + 1e-10)
        if found.stop in (Stop.BOUNDARY, Stop.NEGATIVE_CURVATURE):
            np.testing.assert_allclose(length, radius, rtol=1e-10)
        direction = -np.linalg.solve(m, g)
        longest, curvature = radius / norm(m, direction), direction @ b @ direction
        cauchy = direction * (min(longest, -g @ direction / curvature) if curvature > 0 else longest)
        assert found.predicted_decrease >= decrease(b, g, cauchy) * (1 - 1e-9)
        np.testing.assert_allclose(found.predicted_decrease, decrease(b, g, found.step), rtol=1e-8)


@pytest.mark.parametrize("kind", ["indefinite", "negative"])
@every_radius
def test_lanczos_meets_the_eigenpoint_decrease(kind, radius):
    for seed in range(20):
        b, g, m = model(kind, seed)
        eigenvalues, eigenvectors = scipy.linalg.eigh(b, m)
        lowest = eigenvectors[:, 0] / norm(m, eigenvectors[:, 0])
        hidden = g - m @ lowest * (lowest @ g)  # the gradient sees nothing of the lowest eigenvector
        for gradient in (g, hidden, np.zeros(SIZE)):
            eigenpoint = -radius * lowest * (np.sign(gradient @ lowest) or 1.0)
            promised = decrease(b, gradient, eigenpoint)
            assert promised >= -0.5 * eigenvalues[0] * radius**2 * (1 - 1e-9)
            assert solve(LANCZOS, b, gradient, m, radius).predicted_decrease >= promised * (1 - 1e-9)
            # In a smaller space half of it, unless the gradient's own sequence fills it and sees nothing.
            if gradient is not hidden:
                assert solve(SHORT_LANCZOS, b, gradient, m, radius).predicted_decrease >= 0.5 * promised


def test_steihaug_does_not_see_hidden_negative_curvature():
    b, m = np.diag([-1.0] + [1.0] * (SIZE - 1)), np.eye(SIZE)
    hidden = np.array([0.0] + [1.0] * (SIZE - 1))
    assert solve(STEIHAUG, b, hidden, m, 100.0).step[0] == 0
    assert abs(solve(LANCZOS, b, hidden, m, 100.0).step[0]) > 90
    found = solve(STEIHAUG, b, np.zeros(SIZE), m, 1.0)
    assert (found.stop, found.iterations, found.predicted_decrease) == (Stop.CONVERGED, 0, 0)
    np.testing.assert_array_equal(found.step, 0)


@every_model
@every_radius
def test_lanczos_at_full_dimension_is_the_global_minimiser(kind, radius):
    """Moré and Sorensen: (B + λM) s = -g, B + λM ⪰ 0, λ ≥ 0 and λ (Δ - ‖s‖_M) = 0, if and only if s is."""
    for seed in range(5):
        b, g, m = model(kind, seed)
        found = solve(LANCZOS, b, g, m, radius)
        s = found.step
        multiplier = 0.0 if found.stop == Stop.CONVERGED else -s @ (b @ s + g) / norm(m, s) ** 2
        scale = np.linalg.norm(g) + np.linalg.norm(b) * np.linalg.norm(s)
        np.testing.assert_allclose(b @ s + multiplier * m @ s, -g, atol=1e-10 * scale)
        assert multiplier >= 0
        assert scipy.linalg.eigvalsh(b + multiplier * m)[0] >= -1e-10 * np.linalg.norm(b)
        assert found.iterations <= SIZE


@every_model
def test_cubic_at_full_dimension_is_the_global_minimiser(kind):
    solver = cubic_lanczos(SIZE, tol=0.0)
    for weight in (1e-2, 1.0, 1e2):
        b, g, m = model(kind)
        s, predicted, *_ = solve(solver, b, g, m, weight)
        shifted = b + weight * norm(m, s) * m
        np.testing.assert_allclose(shifted @ s, -g, atol=1e-9 * np.linalg.norm(shifted) * np.linalg.norm(s))
        assert scipy.linalg.eigvalsh(shifted)[0] >= -1e-10 * np.linalg.norm(b)
        np.testing.assert_allclose(predicted, decrease(b, g, s) - weight / 3 * norm(m, s) ** 3, rtol=1e-8)


def test_more_lanczos_steps_than_dimensions():
    b, g, m = model("indefinite")
    found = solve(optcurv.gltr(SIZE + 5, tol=0.0), b, g, m, 2.0)
    assert found.iterations == SIZE
    np.testing.assert_allclose(found.step, solve(LANCZOS, b, g, m, 2.0).step, atol=1e-9)


@pytest.mark.parametrize("kind", ["definite", "ill-conditioned"])
@pytest.mark.parametrize("tol", [0.5, 1e-3])
def test_lanczos_stops_at_its_tolerance_where_no_curvature_is_negative(kind, tol):
    """The residual of Newton's equation, in the norm of M⁻¹, falls below the tolerance at the last product alone."""
    b, g, m = model(kind)
    dual_norm = lambda v: np.sqrt(v @ np.linalg.solve(m, v))  # noqa: E731
    found = solve(optcurv.gltr(SIZE, tol=tol), b, g, m, 1e6)
    tolerance = dual_norm(g) * min(tol, np.sqrt(dual_norm(g)))
    assert dual_norm(g + b @ found.step) <= tolerance * (1 + 1e-9)
    shorter = solve(optcurv.gltr(int(found.iterations) - 1, tol=0.0), b, g, m, 1e6)
    assert dual_norm(g + b @ shorter.step) > tolerance


def test_lanczos_takes_all_products_once_it_met_negative_curvature():
    b, g, m = model("indefinite")
    assert solve(optcurv.gltr(SIZE, tol=10.0), b, g, m, 1.0).iterations in (1, SIZE)
    assert solve(optcurv.gltr(SIZE, tol=1e-6), b, g, m, 1.0).iterations == SIZE


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_steihaug_divides_no_zero_by_zero(dtype):
    """A radius or a gradient whose square underflows gives a short step or none, not one that is not a number."""
    ball = Metric(lambda v: v, lambda v: v)
    for size, radius in ((1.0, 1e-200), (1.0, 1e-25), (1e-30, 1.0), (1e-25, 1e-25)):
        gradient = jnp.full(3, size, dtype)
        found = STEIHAUG(lambda v: 2 * v, gradient, ball, jnp.asarray(radius, dtype), jax.random.key(0))
        assert found.stop != Stop.NOT_FINITE
        assert np.all(np.isfinite(found.step))


@pytest.mark.parametrize("solver", [STEIHAUG, LANCZOS, cubic_lanczos(4)], ids=["steihaug", "lanczos", "cubic"])
def test_broken_operators_are_named(solver):
    b, g, m = model("definite")
    assert solve(solver, b * np.nan, g, m, 1.0).stop == Stop.NOT_FINITE
    assert solve(solver, b, g * np.nan, m, 1.0).stop == Stop.NOT_FINITE
    assert solve(solver, b, g, -m, 1.0).stop == Stop.INDEFINITE_NORM


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optcurv.steihaug(max_iter=0), ValueError, "max_iter"),
        (lambda: optcurv.steihaug(max_iter=2.0), TypeError, "max_iter"),
        (lambda: optcurv.steihaug(tol=-0.1), ValueError, "tol"),
        (lambda: optcurv.gltr(0), ValueError, "max_iter"),
        (lambda: optcurv.gltr(tol=-0.1), ValueError, "tol"),
        (lambda: optcurv.gltr("many"), TypeError, "max_iter"),
    ],
)
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()

"""Local models against closed forms and a root finder of SciPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from optcurv.methods.quadratic_models import minimize_cubic, minimize_in_ball
from optcurv.methods.regularized_newton import decrease_ratio

SIZE = 7
SPECTRA = {
    "definite": [0.5, 1, 2, 3, 5, 8, 13],
    "indefinite": [-3, -1, 0.5, 1, 2, 5, 9],
    "lowest-twice": [-3, -3, 0.5, 1, 2, 5, 9],
    "singular": [0, 0, 1, 2, 3, 4, 5],
    "negative": [-9, -5, -4, -3, -2, -1, -0.5],
    "ill-conditioned": [1e-8, 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4],
    "zero": [0] * 7,
}
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def model(spectrum, seed=0, hard=False):
    """Returns T with the spectrum and a gradient c; hard: c orthogonal to the lowest eigenvectors."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    slopes = rng.normal(size=SIZE)
    if hard:
        slopes[np.asarray(spectrum) == spectrum[0]] = 0.0
    return rotation @ np.diag(spectrum) @ rotation.T, rotation @ slopes, rotation


def value(hessian, gradient, point):
    return gradient @ point + point @ hessian @ point / 2


def secular_root(spectrum, slopes, norm_at):
    """The multiplier above -λ₁ at which the solution has the norm it must have, by SciPy."""
    excess = lambda t: np.linalg.norm(slopes / (spectrum + t)) - norm_at(t)  # noqa: E731
    floor = max(0.0, -spectrum[0])
    low, high = floor + 1e-13, floor + 1.0
    while excess(high) > 0:
        high = floor + 4 * (high - floor)
    return scipy.optimize.brentq(excess, low, high, xtol=1e-15, rtol=1e-15)


@every_spectrum
@pytest.mark.parametrize("radius", [1e-3, 0.3, 3.0, 1e3])
@pytest.mark.parametrize("hard", [False, True])
def test_ball_meets_the_conditions_of_more_and_sorensen(spectrum, radius, hard):
    """They are necessary and sufficient for the global minimiser."""
    hessian, gradient, _ = model(spectrum, hard=hard)
    point, multiplier, lowest = map(np.asarray, minimize_in_ball(jnp.asarray(hessian), jnp.asarray(gradient), radius))
    scale = max(np.abs(spectrum)) * radius + np.linalg.norm(gradient)
    np.testing.assert_allclose((hessian + multiplier * np.eye(SIZE)) @ point, -gradient, atol=1e-10 * scale)
    assert multiplier >= 0
    assert spectrum[0] + multiplier >= -1e-12 * max(np.abs(spectrum))
    assert np.linalg.norm(point) <= radius * (1 + 1e-12)
    if multiplier > 0:
        np.testing.assert_allclose(np.linalg.norm(point), radius, rtol=1e-9)
    np.testing.assert_allclose(lowest, spectrum[0], atol=1e-12 * max(np.abs(spectrum)))


@every_spectrum
def test_ball_agrees_with_a_root_finder(spectrum):
    hessian, gradient, rotation = model(spectrum, seed=1)
    slopes, spectrum, radius = rotation.T @ gradient, np.asarray(spectrum, float), 0.4
    multiplier = secular_root(spectrum, slopes, lambda t: radius)
    found = minimize_in_ball(jnp.asarray(hessian), jnp.asarray(gradient), radius)
    np.testing.assert_allclose(found.point, -rotation @ (slopes / (spectrum + multiplier)), atol=1e-10)
    np.testing.assert_allclose(found.multiplier, multiplier, rtol=1e-9)


@every_spectrum
@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("hard", [False, True])
def test_cubic_meets_its_conditions(spectrum, weight, hard):
    """(T + λI) h = -c, λ = σ‖h‖, T + λI ⪰ 0: Nesterov and Polyak's, for the global minimiser."""
    hessian, gradient, _ = model(spectrum, hard=hard)
    point, multiplier, _ = map(np.asarray, minimize_cubic(jnp.asarray(hessian), jnp.asarray(gradient), weight))
    scale = np.linalg.norm(gradient) + max(np.abs(spectrum)) * np.linalg.norm(point)
    np.testing.assert_allclose((hessian + multiplier * np.eye(SIZE)) @ point, -gradient, atol=1e-10 * scale)
    np.testing.assert_allclose(multiplier, weight * np.linalg.norm(point), rtol=1e-9)
    assert spectrum[0] + multiplier >= -1e-12 * max(np.abs(spectrum))


def test_zero_gradient_moves_only_along_negative_curvature():
    zero = jnp.zeros(SIZE)
    for spectrum, ball, cubic in ((SPECTRA["definite"], 0.0, 0.0), (SPECTRA["singular"], 0.0, 0.0)):
        hessian, _, _ = model(spectrum)
        assert np.linalg.norm(minimize_in_ball(jnp.asarray(hessian), zero, 2.0).point) == ball
        assert np.linalg.norm(minimize_cubic(jnp.asarray(hessian), zero, 2.0).point) == cubic
    hessian, _, rotation = model(SPECTRA["indefinite"])
    np.testing.assert_allclose(abs(rotation[:, 0] @ minimize_in_ball(jnp.asarray(hessian), zero, 2.0).point), 2.0)
    # -3/2 h² + 2/3 |h|³ is least at |h| = 3/2.
    np.testing.assert_allclose(abs(rotation[:, 0] @ minimize_cubic(jnp.asarray(hessian), zero, 2.0).point), 1.5)


def test_rounding_of_a_singular_hessian_sends_nobody_to_the_boundary():
    """Its lowest eigenvalues come out negative by rounding, with slopes of rounding along them."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(SIZE, 3))
    hessian = jnp.asarray(root @ root.T, jnp.float32)
    gradient = jnp.asarray(root @ rng.normal(size=3), jnp.float32)
    point, multiplier, lowest = minimize_in_ball(hessian, gradient, jnp.float32(100.0))
    assert multiplier == 0
    assert lowest == 0
    np.testing.assert_allclose(point, -np.linalg.pinv(root @ root.T) @ gradient, atol=1e-4)


@pytest.mark.parametrize(
    ("decrease", "predicted", "ratio"),
    [
        (0.5, 1.0, 0.5),
        (-0.5, 1.0, -0.5),
        (np.nan, 1.0, -np.inf),
        (-np.inf, 1.0, -np.inf),
        (np.inf, 1.0, -np.inf),
        (0.5, np.nan, -np.inf),
        (0.5, -1.0, -np.inf),
        (0.0, 0.0, 1.0),
        (-1e-15, 1e-17, 1.0),
    ],
)
def test_ratio(decrease, predicted, ratio):
    found = decrease_ratio(jnp.asarray(3.0), jnp.asarray(decrease), jnp.asarray(predicted))
    np.testing.assert_allclose(found, ratio, rtol=0.2 if predicted == 1e-17 else 1e-12)


def test_ratio_where_all_is_zero():
    assert decrease_ratio(jnp.asarray(0.0), jnp.asarray(0.0), jnp.asarray(0.0)) == 1.0


def test_ratio_allows_for_noise():
    value, decrease, predicted = jnp.asarray(3.0), jnp.asarray(-0.001), jnp.asarray(0.001)
    assert decrease_ratio(value, decrease, predicted) < 0
    np.testing.assert_allclose(decrease_ratio(value, decrease, predicted, noise=0.1), 0.099 / 0.101, rtol=1e-3)

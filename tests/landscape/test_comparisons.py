"""Distances between networks, basins and barriers."""

import numpy as np
import pytest

import optcurv


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
    with pytest.raises(ValueError, match=r"\(n,\)"):
        optcurv.basin_width([0.0, 1.0], [0.0], 1.0)

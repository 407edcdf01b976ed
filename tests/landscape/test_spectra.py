"""Eigenpairs, trace, diagonal and density against the dense matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import optcurv
from tests import problems
from tests.references import dense_curvature


@functools.cache
def hessian(hidden=286):
    """Returns the parameters of a network of some 2 000, its loss, and its dense Hessian with eigenvalues."""
    params, loss = problems.network_params(hidden=hidden), problems.network_loss(problems.blobs())
    dense = dense_curvature(optcurv.hessian_product, loss, params).astype(np.float64)
    assert len(dense) > 2000
    return params, loss, dense, np.linalg.eigvalsh(dense)


@pytest.fixture
def operator():
    params, loss, _, _ = hessian()
    return optcurv.hessian_product(loss, params), params


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("num_pairs", "num_steps", "num_probes"))
def compiled(tool, product, params, **options):
    return tool(product(hessian()[1], params), params, **options)


def test_leading_eigenpairs_are_those_of_the_dense_hessian():
    params, _, dense, eigenvalues = hessian()
    pairs = compiled(optcurv.leading_eigenpairs, optcurv.hessian_product, params, num_pairs=5, num_steps=60)
    expected = eigenvalues[np.argsort(-np.abs(eigenvalues))[:5]]
    np.testing.assert_allclose(pairs.values, expected, rtol=1e-4)
    for value, residual, index in zip(pairs.values, pairs.residuals, range(5), strict=True):
        vector, _ = jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf, i=index: leaf[i], pairs.vectors))
        np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-5)
        actual = np.linalg.norm(dense @ vector - float(value) * np.asarray(vector))
        np.testing.assert_allclose(residual, actual, rtol=1e-2, atol=2e-6 * abs(expected[0]))


def test_residuals_tell_of_too_few_steps():
    params, _, _, eigenvalues = hessian()
    pairs = compiled(optcurv.leading_eigenpairs, optcurv.hessian_product, params, num_pairs=3, num_steps=4)
    for value, residual in zip(pairs.values, pairs.residuals, strict=True):
        assert np.min(np.abs(eigenvalues - float(value))) <= 1.01 * float(residual)
    assert float(pairs.residuals[-1]) > 1e-3 * float(pairs.values[0])


def test_a_space_that_ends_early_has_fewer_pairs():
    pairs, density = jax.jit(
        lambda params: (
            optcurv.leading_eigenpairs(lambda v: 3 * v, params, 2),
            optcurv.spectral_density(lambda v: 3 * v, params, num_steps=4, num_probes=2),
        )
    )(jnp.zeros(5))
    np.testing.assert_allclose(pairs.values, [3, np.nan], rtol=1e-6)
    np.testing.assert_allclose(np.sum(density.weights * (np.abs(density.nodes - 3) < 1e-5)), 2, rtol=1e-5)


def test_gauss_newton_has_no_negative_eigenvalues():
    params, _, _, _ = hessian()
    pairs = compiled(optcurv.leading_eigenpairs, optcurv.gauss_newton_product, params, num_pairs=10, num_steps=40)
    assert np.all(pairs.values > 0)


def test_trace_and_diagonal_are_those_of_the_dense_hessian():
    params, _, dense, _ = hessian()
    trace = compiled(optcurv.hutchinson_trace, optcurv.hessian_product, params, num_probes=300)
    off_diagonal = np.sum(dense**2) - np.sum(np.diag(dense) ** 2)
    np.testing.assert_allclose(trace.standard_error, np.sqrt(2 * off_diagonal / 300), rtol=0.2)
    assert abs(trace.value - np.trace(dense)) < 3 * trace.standard_error
    estimate = compiled(optcurv.hutchinson_diagonal, optcurv.hessian_product, params, num_probes=300)
    assert jax.tree.structure(estimate.value) == jax.tree.structure(params)
    value, error = (jax.flatten_util.ravel_pytree(tree)[0] for tree in estimate)
    per_row = np.sum(dense**2, axis=1) - np.diag(dense) ** 2
    np.testing.assert_allclose(np.sum(error**2), np.sum(per_row) / 300, rtol=0.1)
    off = np.abs(value - np.diag(dense)) / np.maximum(error, 1e-7)
    assert 0.9 < np.mean(off < 2) < 0.99


def test_a_probe_integrates_polynomials_exactly():
    matrix = np.random.default_rng(0).normal(size=(30, 30))
    matrix = jnp.asarray(matrix + matrix.T)
    with jax.enable_x64(True):
        matrix = matrix.astype(jnp.float64)
        probes = []
        density = jax.jit(
            lambda params: optcurv.spectral_density(
                lambda v: matrix @ v, params, num_steps=5, num_probes=3, key=jax.random.key(1)
            )
        )(jnp.zeros(30, jnp.float64))
        for key in jax.random.split(jax.random.key(1), 3):
            probes.append(np.asarray(jax.random.rademacher(jax.random.split(key, 1)[0], (30,), np.float64)))
        for probe, nodes, weights in zip(probes, density.nodes, density.weights, strict=True):
            for power in range(10):
                expected = probe @ np.linalg.matrix_power(np.asarray(matrix), power) @ probe / 30
                np.testing.assert_allclose(np.sum(weights * nodes**power), expected, rtol=1e-8)


def test_density_is_that_of_the_dense_hessian():
    params, _, _, eigenvalues = hessian()
    density = compiled(optcurv.spectral_density, optcurv.hessian_product, params, num_steps=40, num_probes=20)
    width = 0.02 * eigenvalues[-1]
    grid = np.linspace(eigenvalues[0] - 5 * width, eigenvalues[-1] + 5 * width, 4001)
    curve = density.smoothed(grid, width)
    np.testing.assert_allclose(np.trapezoid(curve, grid), 1, rtol=1e-3)
    for low, high in ((-np.inf, -3 * width), (3 * width, np.inf)):  # the few that are not about zero
        inside = (density.nodes > low) & (density.nodes < high)
        share = np.sum(density.weights * inside, axis=1)
        exact = np.mean((eigenvalues > low) & (eigenvalues < high))
        assert abs(share.mean() - exact) < 3 * share.std(ddof=1) / np.sqrt(20) + 1e-4
    exact = scipy.stats.norm.pdf(0.0, eigenvalues, width).mean()
    np.testing.assert_allclose(density.smoothed(0.0, width), exact, rtol=0.02)


def test_bad_input(operator):
    matvec, params = operator
    with pytest.raises(ValueError, match="num_pairs <= num_steps"):
        optcurv.leading_eigenpairs(matvec, params, 5, num_steps=4)
    with pytest.raises(ValueError, match="num_steps"):
        optcurv.spectral_density(lambda v: v, jnp.zeros(3), num_steps=4)
    with pytest.raises(ValueError, match="at least 2"):
        optcurv.hutchinson_trace(matvec, params, num_probes=1)
    with pytest.raises(ValueError, match="at least one number"):
        optcurv.hutchinson_diagonal(matvec, {})
    with pytest.raises(TypeError, match="Python int"):
        optcurv.leading_eigenpairs(matvec, params, 1.0)

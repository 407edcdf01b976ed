"""Diagonal mass against dense Hessians, its estimate against the whole, the two baselines against random matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from optcurv.landscape import diagonal_mass as hessian_mass
from tests import problems
from tests.references import dense_curvature


def dense_mass(matrix):
    matrix = np.abs(np.asarray(matrix, np.float64))
    return np.trace(matrix) / matrix.sum()


def random_operator(size=40, seed=0):
    """Returns a symmetric matrix whose columns differ much in mass, and its product."""
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(sigma=0.5, size=size)
    matrix = rng.normal(size=(size, size)) * np.outer(scale, scale)
    matrix = jnp.asarray(matrix + matrix.T + np.diag(scale**2 * 20), jnp.float32)
    return matrix, lambda v: matrix @ v


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_mass_is_that_of_the_dense_hessian(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params, loss = problems.network_params(dtype=dtype), problems.network_loss(problems.blobs(dtype=dtype))
        expected = dense_mass(dense_curvature(optcurv.hessian_product, loss, params))
        mass, error = jax.jit(lambda p: optcurv.diagonal_mass(optcurv.hessian_product(loss, p), p))(params)
        assert (mass.shape, mass.dtype, error.shape, error.dtype) == ((), dtype, (), dtype)
        assert float(mass) == pytest.approx(expected, rel=1e-5 if dtype == jnp.float32 else 1e-12)
        assert float(error) == 0
        assert 0.01 < expected < 0.5  # neither a diagonal nor a shapeless matrix


def test_columns_of_bfloat16_parameters_are_summed_in_float32():
    diagonal = {"a": jnp.arange(1, 301, dtype=jnp.bfloat16), "b": jnp.bfloat16(3)}

    def wide(leaf):
        return leaf.astype(jnp.float32)

    def loss(params):
        squares = jax.tree.map(
            lambda d, p: jnp.sum(d.astype(jnp.float32) * p.astype(jnp.float32) ** 2), diagonal, params
        )
        return squares["a"] + squares["b"] + wide(params["a"][0]) * wide(params["b"])

    params = optax.tree.zeros_like(diagonal)
    result = jax.jit(lambda params: optcurv.diagonal_mass(optcurv.hessian_product(loss, params), params))(params)
    trace = 2 * sum(float(wide(leaf).sum()) for leaf in jax.tree.leaves(diagonal))
    assert result.mass.dtype == jnp.float32
    assert float(result.mass) == pytest.approx(trace / (trace + 2), rel=1e-5)


@pytest.mark.parametrize("params", [jnp.float32(2), (jnp.ones(3), None, {"b": jnp.ones((2, 2))}), [jnp.ones(1)] * 3])
def test_a_diagonal_operator_has_all_its_mass_there(params):
    mass, error = optcurv.diagonal_mass(lambda v: jax.tree.map(lambda leaf: -3 * leaf, v), params)
    assert float(mass) == 1
    assert float(error) == 0


@pytest.mark.parametrize("block", [1, 7, 39, 40, 64])
def test_the_block_does_not_matter(monkeypatch, block):
    matrix, matvec = random_operator()
    monkeypatch.setattr(hessian_mass, "_WIDEST_BLOCK", block)
    assert float(optcurv.diagonal_mass(matvec, jnp.zeros(40)).mass) == pytest.approx(dense_mass(matrix), rel=1e-5)


def test_no_matrix_of_all_columns_is_held():
    size = 8_192  # whose square takes 268 MB, and a block of it 4 MB

    def mass(params):
        return optcurv.diagonal_mass(lambda v: v + 1e-3 * jnp.roll(v, 1) + 1e-3 * jnp.roll(v, -1), params)

    analysis = jax.jit(mass).lower(jnp.zeros(size)).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 64e6


def test_all_columns_drawn_give_the_exact_mass():
    matrix, matvec = random_operator()
    mass, error = optcurv.diagonal_mass(matvec, jnp.zeros(40), num_probes=40, key=jax.random.key(3))
    assert float(mass) == pytest.approx(dense_mass(matrix), rel=1e-5)
    assert float(error) == 0


@pytest.mark.parametrize("num_probes", [20, 36])
def test_the_estimate_and_its_standard_error_are_honest(num_probes):
    matrix, matvec = random_operator()
    expected = dense_mass(matrix)
    keys = jax.random.split(jax.random.key(0), 1000)
    draw = jax.jit(jax.vmap(lambda key: optcurv.diagonal_mass(matvec, jnp.zeros(40), num_probes=num_probes, key=key)))
    masses, errors = (np.asarray(field, np.float64) for field in draw(keys))
    assert abs(np.mean(masses) - expected) < 0.25 * np.std(masses)  # a ratio's bias is O(1/n)
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(np.std(masses), rel=0.25)
    assert 0.9 < np.mean(np.abs(masses - expected) <= 2 * errors) < 0.99


def test_larger_operators_are_sampled(monkeypatch):
    monkeypatch.setattr(hessian_mass, "_MOST_COLUMNS", 39)
    monkeypatch.setattr(hessian_mass, "_DRAWN_COLUMNS", 30)
    matrix, matvec = random_operator()
    mass, error = optcurv.diagonal_mass(matvec, jnp.zeros(40))
    assert 0 < float(error) < 0.2 * float(mass)
    assert float(mass) == pytest.approx(dense_mass(matrix), abs=4 * float(error))
    assert float(mass) == float(optcurv.diagonal_mass(matvec, jnp.zeros(40), num_probes=30, key=jax.random.key(0)).mass)
    assert float(mass) != float(optcurv.diagonal_mass(matvec, jnp.zeros(40), key=jax.random.key(1)).mass)


@pytest.mark.parametrize(("diagonal", "off_diagonal"), [(np.sqrt(2), 1.0), (1.0, 1.0), (0.5, 2.0)])
def test_wigner_baseline(diagonal, off_diagonal):
    draws = np.random.default_rng(0).normal(size=(2000, 12, 12))
    upper = np.triu(draws, 1) * off_diagonal
    matrices = upper + upper.transpose(0, 2, 1) + draws * np.eye(12) * diagonal
    baseline = optcurv.wigner_diagonal_mass(12, diagonal_magnitude=diagonal, off_diagonal_magnitude=off_diagonal)
    assert dense_mass(np.abs(matrices).mean(axis=0)) == pytest.approx(baseline, rel=0.02)


def test_wigner_default_is_the_rotation_invariant_ensemble():
    draws = np.random.default_rng(1).normal(size=(4000, 10, 10))
    masses = np.abs(draws + draws.transpose(0, 2, 1)).mean(axis=0)
    assert optcurv.wigner_diagonal_mass(10) == pytest.approx(dense_mass(masses), rel=0.02)
    assert optcurv.wigner_diagonal_mass(1) == 1


@pytest.mark.parametrize(("dimension", "num_examples"), [(20, 32), (40, 100)])
def test_least_squares_baseline(dimension, num_examples):
    inputs = np.random.default_rng(0).normal(size=(1000, dimension, num_examples))
    masses = np.abs(inputs @ inputs.transpose(0, 2, 1)).mean(axis=0)
    assert optcurv.least_squares_diagonal_mass(dimension, num_examples) == pytest.approx(dense_mass(masses), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((jnp.ones((2, 2)), jnp.ones(2)), {}, TypeError, r"matvec must be a function.*hessian_product"),
        ((lambda v: v[:1], jnp.ones(2)), {}, ValueError, "matvec must return.*structure"),
        ((lambda v: {"a": v}, jnp.ones(2)), {}, ValueError, "matvec must return.*structure"),
        ((lambda v: v, {}), {}, ValueError, "params must hold"),
        ((lambda v: v, jnp.ones(2, jnp.complex64)), {}, TypeError, "real"),
        ((lambda v: v, jnp.ones(5)), {"num_probes": 1}, ValueError, "num_probes must be from 2 to.* 5, got 1"),
        ((lambda v: v, jnp.ones(5)), {"num_probes": 6}, ValueError, "num_probes must be from 2 to.* 5, got 6"),
        ((lambda v: v, jnp.ones(5)), {"num_probes": 2.0}, TypeError, "num_probes"),
    ],
)
def test_bad_input_says_what_to_do(arguments, options, error, message):
    with pytest.raises(error, match=message):
        optcurv.diagonal_mass(*arguments, **options)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: optcurv.wigner_diagonal_mass(0), ValueError, "dimension"),
        (lambda: optcurv.wigner_diagonal_mass(2.0), TypeError, "dimension"),
        (lambda: optcurv.wigner_diagonal_mass(3, diagonal_magnitude=0.0), ValueError, "diagonal_magnitude"),
        (lambda: optcurv.wigner_diagonal_mass(3, off_diagonal_magnitude=-1.0), ValueError, "off_diagonal_magnitude"),
        (lambda: optcurv.least_squares_diagonal_mass(0, 32), ValueError, "dimension"),
        (lambda: optcurv.least_squares_diagonal_mass(3, 0), ValueError, "num_examples"),
    ],
)
def test_baselines_refuse_what_is_out_of_range(call, error, name):
    with pytest.raises(error, match=name):
        call()

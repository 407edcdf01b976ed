"""Damped powers of factors against SciPy, and when they are taken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from optcurv.kronecker.factors import KRONECKER, LowRank, damped_power, init_powers, refresh_powers


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def factors(*sizes, stack=2):
    rng = np.random.default_rng(0)
    roots = [rng.normal(size=(stack, n, n)) for n in sizes]
    return tuple(jnp.asarray(root @ np.swapaxes(root, 1, 2)) for root in roots)


def reference_power(matrix, exponent, relative, absolute):
    n = len(matrix)
    damped = matrix + (relative * np.trace(matrix) / n + absolute) * np.eye(n)
    return np.real(scipy.linalg.fractional_matrix_power(damped, exponent))


@pytest.mark.parametrize("exponent", [-0.5, -1.0, -0.25])
@pytest.mark.parametrize(("relative", "absolute"), [(0.1, 0.0), (0.0, 1e-2), (0.03, 1e-3)])
def test_damped_power_equals_scipys(exponent, relative, absolute):
    (several,) = factors(6)
    powers, extremes = damped_power(
        several, several, exponent=exponent, relative=jnp.asarray(relative), absolute_damping=absolute
    )
    for matrix, power, (smallest, largest) in zip(several, powers, extremes, strict=True):
        np.testing.assert_allclose(power, reference_power(matrix, exponent, relative, absolute), rtol=1e-8, atol=1e-10)
        eigenvalues = np.linalg.eigvalsh(matrix)
        shift = relative * eigenvalues.mean() + absolute
        np.testing.assert_allclose((smallest, largest), (eigenvalues[0] + shift, eigenvalues[-1] + shift))


def test_diagonals_are_matrices_without_the_rest():
    diagonal = jnp.array([[1.0, 4.0, 0.25]])
    options = {"exponent": -0.5, "relative": jnp.asarray(0.1), "absolute_damping": 1e-3}
    vector, vector_extremes = damped_power(diagonal, diagonal, **options)
    matrix, matrix_extremes = damped_power(*2 * (jax.vmap(jnp.diag)(diagonal),), **options)
    np.testing.assert_allclose(jax.vmap(jnp.diag)(vector), matrix, atol=1e-12)
    np.testing.assert_allclose(vector_extremes, matrix_extremes)


def test_rounding_below_zero_and_a_layer_without_gradient_stay_finite():
    almost = jnp.asarray(np.diag([1.0, -1e-9]))[None].astype(jnp.float32)
    for several in (almost, jnp.zeros((1, 3, 3), jnp.float32)):
        powers, _ = damped_power(several, several, exponent=-1.0, relative=jnp.asarray(0.0), absolute_damping=0.0)
        assert jnp.all(jnp.isfinite(powers))


@functools.partial(jax.jit, static_argnames="every")
def refresh(state, several, count, every=8, usable=True):
    return refresh_powers(
        state,
        several,
        jnp.asarray(1.0),
        exponent=-0.5,
        relative=0.01,
        absolute_damping=0.0,
        every=every,
        count=jnp.asarray(count),
        usable=jnp.asarray(usable),
    )


def test_each_factor_is_damped_by_the_root_of_the_damping():
    several = {"a": factors(3, 4), "b": factors(4)}
    powers = refresh(init_powers(several), several, 0).powers
    for name, relative in (("a", 0.1), ("b", 0.01)):
        for factor, power in zip(several[name], powers[name], strict=True):
            np.testing.assert_allclose(power[1], reference_power(factor[1], -0.5, relative, 0.0), rtol=1e-8, atol=1e-10)


def test_factors_of_one_size_are_decomposed_in_one_call():
    several = {"a": factors(3, 5), "b": factors(5, 3), "c": factors(3, 3)}
    program = str(jax.make_jaxpr(lambda several: refresh(init_powers(several), several, 0))(several))
    assert program.count("eigh[") == 2


def test_groups_take_turns_after_the_first_steps():
    several = {"a": factors(3, 5), "b": factors(4, 6)}
    state, taken = init_powers(several), []
    for count in range(24):
        state = refresh(state, several, count)
        taken.append([int(age) == 0 for age in state.ages])
    everybody, nobody = [True] * 4, [False] * 4
    assert taken[0] == taken[1] == everybody
    assert taken[2] == taken[4] == everybody
    assert taken[3] == taken[5] == taken[7] == nobody
    for start in (8, 16):  # each once in eight steps, two steps apart
        for group in range(4):
            assert [row[group] for row in taken[start : start + 8]] == [n == 2 * group for n in range(8)]


def test_without_statistics_nothing_is_taken_and_then_at_once():
    several = {"a": factors(3, 5)}
    start = init_powers(several)
    waited = refresh(start, several, 3, usable=False)
    jax.tree.map(np.testing.assert_array_equal, waited, start)
    assert np.all(refresh(waited, several, 5).ages == 0)


def test_low_rank_finds_the_leading_eigenpairs_and_the_mean_of_the_rest():
    rng = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    eigenvalues = np.array([100.0, 30.0, 10.0] + [0.1] * 17)
    matrix = (vectors * eigenvalues) @ vectors.T
    several = {"a": (jnp.asarray(matrix)[None], jnp.eye(4)[None])}
    state = init_powers(several, rank=3)
    for count in range(3):
        state = refresh(state, several, count, every=1)
    low_rank, full = state.powers["a"]
    assert full.shape == (1, 4, 4)
    power = (
        low_rank.rest[0] * np.eye(20)
        + (low_rank.vectors[0] * (low_rank.values - low_rank.rest)[0]) @ low_rank.vectors[0].T
    )
    np.testing.assert_allclose(power, reference_power(matrix, -0.5, 0.1, 0.0), rtol=1e-6, atol=1e-8)
    matrices = jnp.asarray(rng.normal(size=(1, 20, 4)))
    parts = (matrices[:, :19], matrices[:, 19:])
    dense = KRONECKER.apply((jnp.asarray(power)[None], full), parts)
    product = KRONECKER.apply((low_rank, full), parts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), product, dense)


@pytest.mark.parametrize("sides", [("low", "low"), ("low", "full"), ("diagonal", "low"), ("full", "diagonal")])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_of_any_two_forms_equals_the_dense_one(sides, with_bias):
    rng = np.random.default_rng(0)

    def draw(form, size):
        if form == "diagonal":
            diagonal = jnp.asarray(rng.uniform(1, 2, size=(2, size)))
            return diagonal, jax.vmap(jnp.diag)(diagonal)
        if form == "full":
            return 2 * factors(size)[:1]
        vectors = jnp.linalg.qr(jnp.asarray(rng.normal(size=(2, size, 3))))[0]
        power = LowRank(vectors, jnp.asarray(rng.uniform(1, 2, size=(2, 3))), jnp.asarray(rng.uniform(3, 4, size=2)))
        around = jnp.einsum("bnr,br,bmr->bnm", vectors, power.values - power.rest[:, None], vectors)
        return power, around + power.rest[:, None, None] * jnp.eye(size)

    (left, dense_left), (right, dense_right) = draw(sides[0], 7), draw(sides[1], 5)
    matrices = rng.normal(size=(2, 7, 5))
    if not with_bias:
        matrices[:, 6] = 0.0
    parts = (jnp.asarray(matrices[:, :6]), jnp.asarray(matrices[:, 6:]))[: 1 + with_bias]
    product = KRONECKER.apply((left, right), parts)
    assert [part.shape for part in product] == [part.shape for part in parts]
    expected = (dense_left @ matrices @ dense_right)[:, : 6 + with_bias]
    np.testing.assert_allclose(jnp.concatenate(product, axis=1), expected, rtol=1e-10, atol=1e-12)

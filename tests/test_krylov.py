import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import optcurv
from optcurv import krylov

SIZE = 12
SPECTRA = {
    "definite": np.linspace(1, 5, SIZE),
    "indefinite": np.linspace(-3, 4, SIZE),
    "singular": np.concatenate([np.zeros(4), np.linspace(1, 4, SIZE - 4)]),
    "ill-conditioned": np.geomspace(1e-4, 1e2, SIZE),
}
# How much rounding the Krylov basis of the spectrum amplifies.
SENSITIVITY = {"definite": 1, "indefinite": 1, "singular": 1, "ill-conditioned": 100}
DTYPES = [(jnp.float32, 1e-4), (jnp.float64, 1e-12)]


def system(kind, seed):
    """A random symmetric matrix of the given spectrum, and a right-hand side."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    return basis * SPECTRA[kind] @ basis.T, rng.normal(size=SIZE)


def krylov_least_squares(a, b, order):
    """argmin |a x - b| over the Krylov space, from an orthonormal basis of it."""
    basis = [b / np.linalg.norm(b)]
    for _ in range(order - 1):
        v = a @ basis[-1]
        for _ in range(2):  # twice is enough
            for q in basis:
                v = v - (q @ v) * q
        basis.append(v / np.linalg.norm(v))
    q = np.stack(basis, axis=1)
    return q @ np.linalg.lstsq(a @ q, b, rcond=None)[0]


def assert_same_image(a, x, expected, tolerance):
    """Compares a x, which is well conditioned, where x itself may not be."""
    np.testing.assert_allclose(a @ x, a @ expected, rtol=0, atol=tolerance)


@functools.partial(jax.jit, static_argnames="order")
def solve_tree(a, b, shift, order):
    def matvec(v):
        product = jnp.matmul(a, jnp.concatenate([v["x"], v["y"][0]]), precision="highest")
        return {"x": product[:5], "y": (product[5:],)}

    x, info = optcurv.minres(matvec, {"x": b[:5], "y": (b[5:],)}, order, shift=shift)
    return jnp.concatenate([x["x"], x["y"][0]]), info


def solve(a, b, order, dtype, shift=0.0):
    """MINRES on a pytree, in one compiled program an order and dtype."""
    x, info = jax.device_get(solve_tree(jnp.asarray(a, dtype), jnp.asarray(b, dtype), shift, order))
    return x.astype(np.float64), info


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_minres_is_optimal_over_the_krylov_space(kind, order, seed, dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        a, b = system(kind, seed)
        x, info = solve(a, b, order, dtype)
    expected = krylov_least_squares(a, b, order)
    assert_same_image(a, x, expected, SENSITIVITY[kind] * tolerance * np.linalg.norm(b))
    assert np.linalg.norm(a @ x - b) <= (1 + 5 * tolerance) * np.linalg.norm(a @ expected - b)
    np.testing.assert_allclose(info.residual_norm, np.linalg.norm(a @ x - b), rtol=tolerance)
    assert info.iterations == order


@pytest.mark.parametrize("shift", [0.0, 0.7, -1.3])
@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("kind", SPECTRA)
def test_minres_equals_scipys(kind, order, shift):
    with jax.enable_x64(True):
        a, b = system(kind, seed=3)
        x, _ = solve(a, b, order, jnp.float64, shift)
    expected, _ = scipy.sparse.linalg.minres(a, b, shift=-shift, maxiter=order, rtol=1e-15)
    assert_same_image(a, x, expected, SENSITIVITY[kind] * 1e-12 * np.linalg.norm(b))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-4), (jnp.float64, 1e-12)])
def test_full_order_solves_the_system(dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        a, b = system("indefinite", seed=4)
        x, info = solve(a, b, SIZE, dtype)
    np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=0, atol=10 * tolerance)
    assert info.residual_norm < tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_lucky_breakdown_freezes_the_exact_solution(distinct, dtype):
    """With m distinct eigenvalues the Krylov space is exhausted after m steps; many more must change nothing."""
    eigenvalues = np.resize(np.array([2.0, -1.0, 5.0])[:distinct], SIZE)
    basis, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(SIZE, SIZE)))
    a, b = basis * eigenvalues @ basis.T, np.random.default_rng(6).normal(size=SIZE)
    with jax.enable_x64(dtype == jnp.float64):
        x, info = solve(a, b, 8, dtype)
    tolerance = 50 * np.finfo(dtype).eps * np.linalg.norm(b)
    np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=0, atol=tolerance)
    assert info.iterations == distinct


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_singular_inconsistent_system_keeps_the_least_squares_residual(dtype):
    """b has a part outside A's range; the exhausted recurrence must not blow the iterate up along the null space."""
    a, b = np.diag([1.0, 2.0, 0.0, 0.0]), np.ones(4)
    with jax.enable_x64(dtype == jnp.float64):
        narrowed = jnp.asarray(a, dtype)
        x, info = jax.device_get(optcurv.minres(lambda v: narrowed @ v, jnp.asarray(b, dtype), 8))
    assert np.all(np.isfinite(x))
    assert np.linalg.norm(x) < 5
    np.testing.assert_allclose(np.linalg.norm(a @ x - b), np.sqrt(2), rtol=1e-4)
    np.testing.assert_allclose(info.residual_norm, np.sqrt(2), rtol=1e-4)


@functools.partial(jax.jit, static_argnames="order")
def solve_many(matrices, right_hand_sides, order):
    return jax.vmap(lambda a, b: optcurv.minres(lambda v: jnp.matmul(a, v, precision="highest"), b, order))(
        matrices, right_hand_sides
    )


@pytest.mark.parametrize("outside", [0.0, 0.1], ids=["in-range", "outside-of-range"])
@pytest.mark.parametrize("rank", [3, 10, 40])
def test_semidefinite_systems_keep_their_answer_after_convergence(rank, outside):
    """In float32, with many more steps than it takes: residual and length are those of the pseudo-inverse."""
    rng, size, systems = np.random.default_rng(rank), 60, []
    for number in range(30):
        basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
        spectrum = [rng.uniform(0.5, 2, rank), np.geomspace(1e-2, 1, rank), np.geomspace(1e-4, 1, rank)][number % 3]
        a = (basis[:, :rank] * spectrum) @ basis[:, :rank].T
        b = a @ rng.normal(size=size)
        systems.append((a, b / np.linalg.norm(b) + outside * basis[:, -1]))
    matrices, right_hand_sides = map(np.stack, zip(*systems, strict=True))
    x, info = jax.device_get(solve_many(matrices.astype(np.float32), right_hand_sides.astype(np.float32), 30))
    residuals = np.linalg.norm(right_hand_sides - np.einsum("nij,nj->ni", matrices, x), axis=1)
    np.testing.assert_allclose(info.residual_norm, residuals, rtol=0, atol=1e-5)
    assert np.all(residuals < outside + 2e-3)  # 30 steps are few for the worst conditioned; it was 1e5
    pseudo_solutions = [np.linalg.lstsq(a, b, rcond=1e-6)[0] for a, b in systems]
    assert np.all(np.linalg.norm(x, axis=1) < 50 * np.linalg.norm(pseudo_solutions, axis=1))  # it was 1e6
    assert np.all(np.einsum("ni,ni->n", x, right_hand_sides) > 0)
    assert not np.any(info.negative_curvature)


@pytest.mark.parametrize("kind", SPECTRA)
def test_negative_curvature_is_that_of_the_krylov_space(kind):
    """The projection of A on it is found indefinite exactly if it is."""
    for seed in range(5):
        a, b = system(kind, seed)
        for order in (1, 2, 5):
            with jax.enable_x64(True):
                _, info = solve(a, b, order, jnp.float64, shift=-0.5)
            basis, _ = np.linalg.qr(np.stack([np.linalg.matrix_power(a, n) @ b for n in range(order)], axis=1))
            lowest = np.linalg.eigvalsh(basis.T @ (a - 0.5 * np.eye(SIZE)) @ basis)[0]
            assert info.negative_curvature == (lowest < 0)


def test_first_step_is_that_of_one_step():
    a, b = system("definite", seed=8)
    _, info = solve(a, b, 5, jnp.float32)
    np.testing.assert_allclose(info.first_step, (b @ a @ b) / (b @ a @ a @ b), rtol=1e-5)


def test_a_step_that_gains_nothing_is_no_end():
    """With eigenvalues 1 and -1 in equal parts, the first step leaves the residual as it is; the second solves."""
    x, info = optcurv.minres(lambda v: jnp.array([1.0, -1.0]) * v, jnp.array([1.0, 1.0 + 1e-6]), 2)
    np.testing.assert_allclose(x, [1.0, -1.0], rtol=1e-5)
    assert info.residual_norm < 1e-6


def test_identity_takes_one_step_and_zero_takes_none():
    x, info = optcurv.minres(lambda v: v, jnp.array([3.0, 4.0]), 5)
    np.testing.assert_allclose(x, [3.0, 4.0], rtol=1e-6)
    assert info.iterations == 1
    x, info = optcurv.minres(lambda v: v, jnp.zeros(2), 5)
    np.testing.assert_array_equal(x, 0)
    assert info.iterations == 0
    x, info = optcurv.minres(lambda v: 0 * v, jnp.ones(2), 5)
    np.testing.assert_array_equal(x, 0)
    np.testing.assert_allclose(info.residual_norm, np.sqrt(2), rtol=1e-6)


def test_narrow_right_hand_side_is_accumulated_in_float32():
    a, b = system("definite", seed=7)
    narrow = jnp.asarray(b, jnp.bfloat16)
    x, _ = optcurv.minres(lambda v: jnp.asarray(a, jnp.float32) @ v, narrow, 3)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, krylov_least_squares(a, np.asarray(narrow, np.float64), 3), atol=1e-4)


def test_not_a_number_is_passed_on():
    x, _ = optcurv.minres(lambda v: v * jnp.array([1.0, jnp.nan]), jnp.ones(2), 2)
    assert not np.all(np.isfinite(x))


@pytest.mark.parametrize(
    ("max_iter", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_wrong_number_of_steps(max_iter, error):
    with pytest.raises(error, match="max_iter"):
        optcurv.minres(lambda v: v, jnp.ones(2), max_iter)


# More steps than are unrolled run in a loop.


def test_the_loop_takes_the_steps_of_the_unrolled_recurrence(monkeypatch):
    a, b = system("indefinite", seed=9)
    with jax.enable_x64(True):
        narrowed = jnp.asarray(a)
        in_a_loop = optcurv.minres(lambda v: narrowed @ v, jnp.asarray(b), 10, shift=0.3)
        monkeypatch.setattr(krylov, "_UNROLLED", 10)
        unrolled = optcurv.minres(lambda v: narrowed @ v, jnp.asarray(b), 10, shift=0.3)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-10), in_a_loop, unrolled)


def count_products(max_iter, tol=0.0):
    """How many products are taken, at most so many, with a matrix of condition 5."""
    a, b = system("definite", seed=2)
    products = []

    def matvec(v):
        jax.debug.callback(lambda _: products.append(1), v[0])
        return jnp.asarray(a, jnp.float32) @ v

    x, info = optcurv.minres(matvec, jnp.asarray(b, jnp.float32), max_iter, tol=tol)
    jax.effects_barrier()
    return len(products), info, np.linalg.norm(a @ np.asarray(x) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("max_iter", [4, 100])
def test_no_more_steps_than_the_tolerance_asks_for(max_iter):
    _, loose, residual = count_products(max_iter, tol=0.3)
    assert 0.03 < residual <= 0.3
    assert loose.iterations < min(max_iter, 5)


def test_the_loop_ends_where_the_solution_stays_as_it_is():
    products, info, residual = count_products(1000)
    assert residual < 1e-5
    assert info.iterations < products < 30


def test_compilation_does_not_grow_with_the_number_of_steps():
    a = jnp.asarray(system("definite", seed=0)[0], jnp.float32)

    def num_products(order):
        solve = lambda b: optcurv.minres(lambda v: jnp.matmul(a, v, precision="highest"), b, order)[0]  # noqa: E731
        return str(jax.make_jaxpr(solve)(jnp.ones(SIZE))).count("Precision.HIGHEST,")

    assert num_products(1000) == num_products(5) == num_products(2)


def test_negative_tolerance():
    with pytest.raises(ValueError, match="tol must be finite, >= 0"):
        optcurv.minres(lambda v: v, jnp.ones(2), 2, tol=-1.0)

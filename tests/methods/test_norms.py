"""Norms against dense matrices, and Lemma 1 of the paper they are from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from jax.flatten_util import ravel_pytree

import optcurv

EPS = 1e-4


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gradients(steps=5):
    rng = np.random.default_rng(0)
    return [{"a": jnp.asarray(rng.normal(size=(2, 3))), "b": jnp.asarray(rng.normal())} for _ in range(steps)]


def outer_products(vectors):
    return [np.outer(v, v) for v in vectors]


def discounted(matrices, decay=0.8):
    return sum((1 - decay) * decay ** (len(matrices) - 1 - t) * m for t, m in enumerate(matrices))


def root_of_diagonal(matrix):
    return np.diag(np.sqrt(np.diag(matrix)))


NORMS = {
    "uniform": (optcurv.uniform_norm(), lambda g: np.eye(7)),
    "adagrad": (optcurv.adagrad_norm(EPS), lambda g: root_of_diagonal(sum(outer_products(g)) + EPS * np.eye(7))),
    "rmsprop": (
        optcurv.rmsprop_norm(0.8, EPS),
        lambda g: root_of_diagonal(discounted(outer_products(g)) + EPS * np.eye(7)),
    ),
    "rmsprop-as-printed": (
        optcurv.rmsprop_norm(0.8, EPS, power=1.0),
        lambda g: np.diag(np.diag(discounted(outer_products(g)) + EPS * np.eye(7))),
    ),
    "full-adagrad": (
        optcurv.full_matrix_norm(eps=EPS),
        lambda g: scipy.linalg.sqrtm(sum(outer_products(g)) + EPS * np.eye(7)),
    ),
    "full-rmsprop": (
        optcurv.full_matrix_norm(decay=0.8, eps=EPS),
        lambda g: scipy.linalg.sqrtm(discounted(outer_products(g)) + EPS * np.eye(7)),
    ),
}
every_norm = pytest.mark.parametrize(("norm", "dense"), NORMS.values(), ids=NORMS.keys())


@every_norm
def test_norm_equals_its_dense_matrix(norm, dense):
    state = norm.init(gradients()[0])
    for gradient in gradients():
        state = norm.update(state, gradient)
    matrix = dense([ravel_pytree(gradient)[0] for gradient in gradients()])
    vector = gradients(6)[-1]
    flat, _ = ravel_pytree(vector)
    applied, solved = norm.at(state).apply(vector), norm.at(state).inverse(vector)
    assert jax.tree.structure(applied) == jax.tree.structure(vector)
    np.testing.assert_allclose(ravel_pytree(applied)[0], matrix @ flat, rtol=1e-9)
    np.testing.assert_allclose(ravel_pytree(solved)[0], np.linalg.solve(matrix, flat), rtol=1e-9)


@every_norm
def test_lemma_1(norm, dense):
    """-η M⁻¹ g minimises the linear model on the ellipsoid ‖s‖_M ≤ η ‖g‖_{M⁻¹} (Theorem and Corollary 1)."""
    gradient = gradients()[0]
    flat, _ = ravel_pytree(gradient)
    state, eta = norm.update(norm.init(gradient), gradient), 0.3
    step, _ = ravel_pytree(optax.tree.scale(-eta, norm.at(state).inverse(gradient)))
    matrix = dense([flat])
    radius = eta * np.sqrt(flat @ np.linalg.solve(matrix, flat))
    np.testing.assert_allclose(np.sqrt(step @ matrix @ step), radius, rtol=1e-9)
    others = np.random.default_rng(1).normal(size=(1000, 7))
    others *= radius / np.sqrt(np.einsum("ni,ij,nj->n", others, matrix, others))[:, None]
    assert np.all(others @ flat >= step @ flat)


@pytest.mark.parametrize(
    ("norm", "first_order"),
    [
        (optcurv.rmsprop_norm(decay=0.8, eps=EPS), optax.scale_by_rms(decay=0.8, eps=EPS)),
        (optcurv.adagrad_norm(eps=EPS), optax.scale_by_rss(initial_accumulator_value=0.0, eps=EPS)),
        (optcurv.uniform_norm(), optax.identity()),
    ],
    ids=["rmsprop", "adagrad", "uniform"],
)
def test_trust_region_of_a_linear_model_is_the_first_order_method(norm, first_order):
    """With B = 0 the step points where optax's RMSProp, Adagrad or SGD would go."""
    params = gradients()[0]
    flat_model = lambda loss, params: optax.tree.zeros_like  # noqa: E731
    optimizer = optcurv.trust_region(norm=norm, curvature=flat_model)
    state, first_order_state = optimizer.init(params), first_order.init(params)
    for gradient in gradients():
        loss = lambda p, gradient=gradient: optax.tree.vdot(p, gradient)  # noqa: E731
        step, state = optimizer.update(gradient, state, params, value_fn=loss)
        expected, first_order_state = first_order.update(gradient, first_order_state)
        step, expected = ravel_pytree(step)[0], -ravel_pytree(expected)[0]
        np.testing.assert_allclose(step / np.linalg.norm(step), expected / np.linalg.norm(expected), atol=1e-12)


def test_epsilon_does_not_decay():
    """Lemma 2: the axes stay bounded however long the gradient is zero."""
    norm = optcurv.rmsprop_norm(eps=1e-6)
    state, zero = norm.init(jnp.zeros(2)), jnp.zeros(2)
    for _ in range(50):
        state = norm.update(state, zero)
    np.testing.assert_allclose(norm.at(state).inverse(jnp.ones(2)), 1e3)


@pytest.mark.parametrize("make", [optcurv.adagrad_norm, optcurv.rmsprop_norm])
def test_a_gradient_whose_square_overflows_shuts_no_coordinate(make):
    norm, gradient = make(), jnp.full(2, 1e30, jnp.float32)
    state = norm.update(norm.init(gradient), gradient)
    assert jnp.all(norm.at(state).inverse(gradient) > 0)


@pytest.mark.parametrize("decay", [None, 0.8])
def test_rounding_of_the_gradients_moves_the_full_matrix_little(decay):
    """In float32 the eigenvalues that are zero come out as rounding; a power of them plus a small ε would be noise."""
    rng, norm = np.random.default_rng(0), optcurv.full_matrix_norm(decay=decay)
    exact = rng.normal(size=(3, 20)).astype(np.float32)
    rounded = exact * (1 + 1.2e-7 * rng.choice([-1, 1], exact.shape)).astype(np.float32)
    inverses = []
    for several in (exact, rounded):
        state = norm.init(jnp.zeros(20, jnp.float32))
        for gradient in several:
            state = norm.update(state, jnp.asarray(gradient))
        inverses.append(np.asarray(state.inverse))
    np.testing.assert_allclose(*inverses, rtol=0, atol=1e-3 * np.abs(inverses[0]).max())


def test_size_limit_of_the_full_matrix_names_the_size():
    with pytest.raises(ValueError, match=r"2049×2049.*max_size of 2048.*rmsprop_norm"):
        optcurv.full_matrix_norm().init(jnp.zeros(2049))
    optcurv.full_matrix_norm(max_size=2).init(jnp.zeros(2))


@pytest.mark.parametrize("make", [optcurv.adagrad_norm, optcurv.rmsprop_norm, optcurv.full_matrix_norm])
@pytest.mark.parametrize("bad", [{"eps": 0.0}, {"eps": -1.0}, {"power": 0.0}, {"eps": float("nan")}])
def test_bad_numbers(make, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)


def test_bad_decay_and_size():
    with pytest.raises(ValueError, match="decay"):
        optcurv.rmsprop_norm(decay=1.5)
    with pytest.raises(ValueError, match="decay"):
        optcurv.full_matrix_norm(decay=-0.1)
    with pytest.raises(TypeError, match="max_size"):
        optcurv.full_matrix_norm(max_size=10.0)

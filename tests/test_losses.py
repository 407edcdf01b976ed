"""The cross-entropy against float64, where it is tiny, where it is huge, and where classes are masked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from tests import problems

cross_entropy = optcurv.softmax_cross_entropy_with_integer_labels
SIZES = [-1e4, -100.0, -1.0, 0.0, 1e-3, 1.0, 17.0, 30.0, 69.0]  # of the label's logit: losses of 1e4 down to 1e-29


def logits_and_labels(dtype=np.float32):
    """Four other logits about 0, and one of those sizes, in any place."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, len(SIZES))
    logits = rng.normal(size=(len(SIZES), 5))
    logits[np.arange(len(SIZES)), labels] = SIZES
    return logits.astype(dtype), labels


def oracle(logits, labels):
    """Loss and softmax of each example, as plainly as float128 allows."""
    logits = np.longdouble(logits)
    margins = logits - np.take_along_axis(logits, labels[:, None], axis=1)
    np.put_along_axis(margins, labels[:, None], -np.inf, axis=1)
    odds = np.exp(margins).sum(axis=1)
    return np.log1p(odds), np.exp(margins) / (1 + odds[:, None])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_are_as_precise_as_the_logits(dtype):
    with jax.enable_x64(dtype == np.float64):
        logits, labels = logits_and_labels(dtype)
        losses, (expected, _) = np.asarray(cross_entropy(logits, labels)), oracle(logits, labels)
        assert losses.dtype == dtype
        error = np.abs(losses - expected) / expected
        assert np.all(error <= 2 * np.finfo(dtype).eps * (1 + np.abs(logits).max(axis=1)))


def test_first_and_second_derivatives_are_precise_where_the_loss_is_tiny():
    """The gradient's entries, p_j and -sum p_j, each relative to itself; the Hessian diag(p) - pp' to its largest."""
    logits, labels = logits_and_labels()
    grad = jax.grad(lambda logits, label: cross_entropy(logits, label))
    gradients = jax.jit(jax.vmap(grad))(logits, labels)
    hessians = np.asarray(jax.jit(jax.vmap(jax.jacfwd(grad)))(logits, labels))
    losses, p = oracle(logits, labels)
    one_hot = np.eye(5)[labels]
    np.testing.assert_allclose(gradients, p - one_hot * p.sum(axis=1, keepdims=True), rtol=3e-5)
    p += one_hot * np.exp(-losses)[:, None]
    expected = np.where(np.eye(5), p[:, :, None] * (1 - p)[:, :, None], -p[:, :, None] * p[:, None, :])
    expected[one_hot[:, :, None] * one_hot[:, None, :] == 1] = np.exp(-losses) * -np.expm1(-losses)  # p_y (1 - p_y)
    errors = np.abs(hessians - expected).max(axis=(1, 2)) / np.abs(expected).max(axis=(1, 2))
    assert np.all(errors[2:] < 3e-5)
    np.testing.assert_allclose(hessians[:2], expected[:2], atol=1e-6)


INF = np.inf
EXTREMES = [[1e4, -1e4, 0], [-1e4, 1e4, 1e4], [1, -INF, 2], [3, -INF, -INF], [0, 0, 0], [300, 0, 0], [-INF, 1, 2]]


def test_extreme_logits_and_masked_classes_are_what_optax_makes_of_them():
    logits, labels = np.float32(EXTREMES), np.zeros(len(EXTREMES), int)
    results = []
    for function in (cross_entropy, optax.softmax_cross_entropy_with_integer_labels):
        grad = jax.grad(lambda logits, function=function: jnp.sum(function(logits, labels)))
        tangent = jnp.asarray([1.0, 2.0, 4.0]) * jnp.ones_like(logits)
        results.append((function(logits, labels), *jax.jit(lambda g=grad, t=tangent: jax.jvp(g, (logits,), (t,)))()))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_bfloat16_logits_give_float32_losses():
    logits, labels = logits_and_labels(jnp.bfloat16)
    losses = cross_entropy(logits, labels)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, oracle(np.float32(logits), labels)[0], rtol=2e-5)
    assert jax.grad(lambda logits: jnp.mean(cross_entropy(logits, labels)))(jnp.asarray(logits)).dtype == jnp.bfloat16


def test_labels_out_of_range_are_infinite_and_can_be_masked():
    logits = jnp.zeros((3, 2))
    labels = jnp.array([0, -1, 2])
    np.testing.assert_allclose(cross_entropy(logits, labels), [np.log(2), np.inf, np.inf], rtol=1e-6)
    masked = lambda logits: jnp.sum(jnp.where(labels == 0, cross_entropy(logits, labels), 0))  # noqa: E731
    np.testing.assert_allclose(jax.grad(masked)(logits), [[-0.5, 0.5], [0, 0], [0, 0]])


def test_gauss_newton_is_the_hessian_of_a_linear_model_and_convex_when_it_is_fitted():
    batch = problems.blobs()
    model_fn = lambda w: 30 * batch.x @ w  # noqa: E731
    loss = optcurv.Composite(model_fn, lambda logits: jnp.mean(cross_entropy(logits, batch.y)))
    w = jnp.linalg.lstsq(batch.x, jax.nn.one_hot(batch.y, 3))[0]
    assert 0 < jnp.median(cross_entropy(model_fn(w), batch.y)) < 1e-6
    vectors = jax.random.normal(jax.random.key(0), (4, *w.shape))
    products = [
        jax.jit(jax.vmap(curvature(loss, w)))(vectors)
        for curvature in (optcurv.gauss_newton_product, optcurv.hessian_product)
    ]
    np.testing.assert_allclose(*products, rtol=1e-3, atol=1e-4 * np.abs(products[0]).max())
    assert np.all(np.sum(vectors * products[0], axis=(1, 2)) > 0)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "name"),
    [
        (jnp.ones((2, 3), int), jnp.zeros(2, int), TypeError, "logits"),
        (jnp.ones((2, 3)), jnp.zeros(2), TypeError, "labels"),
        (jnp.ones((2, 3)), jnp.zeros((2, 3), int), ValueError, "labels"),
        (jnp.ones(()), jnp.zeros((), int), ValueError, "logits"),
    ],
)
def test_bad_input(logits, labels, error, name):
    with pytest.raises(error, match=name):
        cross_entropy(logits, labels)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import optcurv
from tests import problems
from tests.references import dense_curvature

DTYPES = [(jnp.float32, 1e-5), (jnp.float64, 1e-10)]


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def dense(matvec, params):
    """The operator as a matrix, column by column."""
    flat, unravel = ravel_pytree(params)
    column = jax.jit(lambda e: ravel_pytree(matvec(unravel(e)))[0])
    return np.stack([column(e) for e in np.eye(flat.size, dtype=flat.dtype)], axis=1)


def flattened(fn, params):
    flat, unravel = ravel_pytree(params)
    return flat, lambda w: fn(unravel(w))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_hessian_product_equals_the_dense_hessian(dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        params = problems.network_params(dtype=dtype)
        loss = problems.network_loss(problems.blobs(dtype=dtype))
        expected = dense_curvature(optcurv.hessian_product, loss, params)
        assert_close(dense(optcurv.hessian_product(loss, params), params), expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gauss_newton_product_equals_the_dense_matrix(dtype, tolerance):
    """Outputs are a dict of two arrays; the loss is convex, not quadratic, and couples them."""
    with jax.enable_x64(dtype == jnp.float64):
        params, batch = problems.network_params(dtype=dtype), problems.blobs(size=5, dtype=dtype)

        def model_fn(p):
            logits = problems.network(p, batch.x)
            return {"logits": logits, "norm": jnp.sum(logits**2, axis=1)}

        def loss_fn(out):
            return jnp.sum(jax.nn.logsumexp(out["logits"], axis=1)) + jnp.exp(0.1 * jnp.sum(out["norm"]))

        loss = optcurv.Composite(model_fn, loss_fn)
        expected = dense_curvature(optcurv.gauss_newton_product, loss, params)
        assert_close(dense(optcurv.gauss_newton_product(loss, params), params), expected, tolerance)


def test_gauss_newton_of_cross_entropy_is_equation_29():
    """H_j = (diag(θ_j) - θ_j θ_jᵀ) / n, with the softmax θ_j of example j."""
    with jax.enable_x64(True):
        params, batch = problems.network_params(dtype=jnp.float64), problems.blobs(size=7, dtype=jnp.float64)
        flat, flat_model = flattened(lambda p: problems.network(p, batch.x), params)
        jacobian = np.asarray(jax.jit(jax.jacobian(flat_model))(flat))  # (7, 3, N)
        theta = np.asarray(jax.nn.softmax(problems.network(params, batch.x)))
        blocks = np.stack([np.diag(t) - np.outer(t, t) for t in theta]) / 7
        expected = np.einsum("jai,jab,jbk->ik", jacobian, blocks, jacobian)
        actual = dense(optcurv.gauss_newton_product(problems.network_loss(batch), params), params)
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("curvature", [optcurv.hessian_product, optcurv.gauss_newton_product])
def test_auxiliary_output_changes_no_product(curvature):
    params, batch = problems.network_params(), problems.blobs()
    loss = problems.network_loss(batch)
    with_aux = optcurv.Composite(lambda p: (loss.model_fn(p), {"step": 3}), loss.loss_fn, has_aux=True)
    (value, aux), grads = jax.value_and_grad(with_aux, has_aux=True)(params)
    assert aux == {"step": 3}
    assert value == loss(params)
    jax.tree.map(np.testing.assert_array_equal, grads, jax.grad(loss)(params))
    jax.tree.map(np.testing.assert_array_equal, curvature(with_aux, params)(grads), curvature(loss, params)(grads))


@pytest.mark.parametrize("curvature", [optcurv.hessian_product, optcurv.gauss_newton_product])
def test_model_is_traced_once_for_many_products(curvature):
    traces = []
    loss = problems.network_loss(problems.blobs())

    def model_fn(params):
        traces.append(None)
        return loss.model_fn(params)

    params = problems.network_params()
    product = curvature(optcurv.Composite(model_fn, loss.loss_fn), params)
    vector = params
    for _ in range(3):
        vector = product(vector)
    assert len(traces) == 1


@pytest.mark.parametrize("curvature", [optcurv.hessian_product, optcurv.gauss_newton_product])
def test_product_keeps_the_vectors_dtype_on_narrow_parameters(curvature):
    params, batch = problems.network_params(dtype=jnp.bfloat16), problems.blobs()
    vector = problems.network_params(seed=1)
    product = jax.jit(lambda params: curvature(problems.network_loss(batch), params)(vector))
    result = product(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(result))
    assert_close(ravel_pytree(result)[0], ravel_pytree(product(problems.network_params()))[0], 0.1)


def test_composite_of_partials_is_an_argument_of_a_jitted_function():
    params, batch = problems.network_params(), problems.blobs()
    loss = optcurv.Composite(
        jax.tree_util.Partial(lambda x, p: problems.network(p, x), batch.x),
        jax.tree_util.Partial(lambda y, logits: problems.cross_entropy(logits, y), batch.y),
    )
    product = jax.jit(lambda loss, p, v: optcurv.gauss_newton_product(loss, p)(v))
    actual = ravel_pytree(product(loss, params, params))[0]
    expected = optcurv.gauss_newton_product(problems.network_loss(batch), params)(params)
    assert_close(actual, ravel_pytree(expected)[0], 1e-5)


def test_plain_closure_where_a_composite_is_needed():
    with pytest.raises(TypeError, match=r"(?s)optcurv\.Composite.*model_fn="):
        optcurv.gauss_newton_product(lambda w: jnp.sum(w**2), jnp.ones(2))


@pytest.mark.parametrize("name", ["model_fn", "loss_fn"])
def test_composite_of_something_that_is_no_function(name):
    parts = {"model_fn": jnp.sin, "loss_fn": jnp.sum, name: jnp.ones(2)}
    with pytest.raises(TypeError, match=name):
        optcurv.Composite(**parts)


@pytest.mark.parametrize("value", [jnp.ones(3), jnp.ones((), jnp.int32), jnp.ones((), jnp.complex64)])
def test_loss_that_is_no_real_scalar(value):
    with pytest.raises(TypeError, match="real scalar"):
        optcurv.hessian_product(lambda w: jnp.sum(w) * 0 + value if value.shape else value, jnp.ones(2))


@pytest.mark.xfail(jax.__version_info__ < (0, 11, 1), reason="older JAX loses it in any product", strict=True)
@pytest.mark.parametrize("curvature", [optcurv.hessian_product, optcurv.gauss_newton_product])
def test_remat_keeps_its_saving_inside_of_products(curvature):
    """What a model takes again rather than keep, products in a loop take again too."""

    def bytes_of(layer):
        def model_fn(kernels):
            x = jnp.ones((2048, 32))
            for kernel in kernels:
                x = layer(kernel, x)
            return x

        loss = optcurv.Composite(model_fn, lambda outputs: jnp.mean(outputs**2))

        def update(kernels):
            solve, identity = optcurv.steihaug(max_iter=5), optcurv.Metric(lambda v: v, lambda v: v)
            return solve(curvature(loss, kernels), kernels, identity, jnp.float32(1.0), jax.random.key(0)).step

        kernels = [jax.random.normal(jax.random.key(n), (32, 32)) / 6 for n in range(4)]
        return jax.jit(update).lower(kernels).compile().memory_analysis().temp_size_in_bytes

    def layer(kernel, x):
        for _ in range(4):
            x = jnp.tanh(x @ kernel)
        return x

    assert bytes_of(jax.checkpoint(layer)) < 0.7 * bytes_of(layer)


def tanh_with(custom):
    """The same function with a derivative of its own, for both directions or for the backward pass only."""

    @custom
    def tanh(x):
        return jnp.tanh(x)

    if custom is jax.custom_jvp:
        tanh.defjvp(lambda x, tangent: (tanh(*x), tangent[0] / jnp.cosh(x[0]) ** 2))
    else:
        tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, cotangent: (cotangent / jnp.cosh(x) ** 2,))
    return tanh


@pytest.mark.parametrize(
    ("custom", "curvature"),
    [
        (jax.custom_jvp, optcurv.gauss_newton_product),
        (jax.custom_jvp, optcurv.hessian_product),
        (jax.custom_vjp, optcurv.hessian_product),
    ],
)
def test_custom_derivatives(custom, curvature):
    """What the error about `jax.custom_vjp` in a Gauss-Newton product advises."""
    w = jnp.array([0.5, -1.0])
    losses = [optcurv.Composite(tanh, lambda outputs: jnp.sum(outputs**4)) for tanh in (tanh_with(custom), jnp.tanh)]
    custom_product, plain_product = (jax.jit(lambda v, loss=loss: curvature(loss, w)(v)) for loss in losses)
    np.testing.assert_allclose(custom_product(w), plain_product(w), rtol=1e-5)


def test_gauss_newton_product_has_its_factors_and_can_be_jitted():
    params, loss = problems.network_params(), problems.network_loss(problems.blobs())
    product = optcurv.gauss_newton_product(loss, params)
    by_factors = product.transposed(product.loss_hessian(product.jacobian(params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.jit(product)(params), by_factors)

"""A loss over micro-batches: the same numbers as over the whole batch, in the memory of one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optcurv
from optcurv.kronecker.recording import record
from tests import problems
from tests.cases import every_method
from tests.laws.test_contract import assert_same, make_step, train

NUM = 4


def micro_batches(batch):
    return jax.tree.map(lambda leaf: leaf.reshape(NUM, -1, *leaf.shape[1:]), batch)


def accumulated(batch):
    return optcurv.accumulate(problems.network_loss, micro_batches(batch))


@pytest.mark.parametrize("curvature", [optcurv.hessian_product, optcurv.gauss_newton_product])
def test_value_gradient_and_products_are_those_of_the_whole_batch(curvature):
    params, batch = problems.network_params(), problems.blobs()
    vector = jax.tree.map(jnp.cos, params)

    def measured(loss):
        return jax.value_and_grad(loss)(params), curvature(loss, params)(vector)

    whole, parts = (
        jax.jit(functools.partial(measured, loss))() for loss in (problems.network_loss(batch), accumulated(batch))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole)


@every_method
def test_every_method_takes_the_step_of_the_whole_batch(case):
    optimizer, params = case.make(), problems.network_params()
    after = [
        train(jax.jit(make_step(optimizer, loss)), params, optimizer.init(params), 3)[0]
        for loss in (accumulated, problems.network_loss)
    ]
    assert_same(*after, rtol=1e-3)


def plain(batch):
    return lambda params: problems.network_loss(batch)(params)


def test_taps_are_those_of_the_whole_batch():
    with jax.enable_x64(True):
        params, batch = problems.network_params(dtype=jnp.float64), problems.blobs(dtype=jnp.float64)
        whole = record(plain(batch), params).taps(params)
        parts = record(optcurv.accumulate(plain, micro_batches(batch)), params).taps(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14), parts, whole)


def test_steps_of_a_sequence_within_micro_batches_stay_positions():
    cell = nn.RNN(nn.SimpleCell(5))
    x = jax.random.normal(jax.random.key(0), (8, 3, 2))
    params = cell.init(jax.random.key(1), x)
    loss = lambda x: lambda params: jnp.mean(cell.apply(params, x) ** 2)  # noqa: E731
    whole = record(loss(x), params).taps(params)
    parts = record(optcurv.accumulate(loss, x.reshape(4, 2, 3, 2)), params).taps(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), parts, whole)


def deep_loss(x):
    """Of six wide layers and few outputs."""
    return optcurv.Composite(
        lambda kernels: functools.reduce(lambda x, kernel: jnp.tanh(x @ kernel), kernels, x)[:, :2],
        lambda outputs: jnp.mean(outputs**2),
    )


@pytest.mark.parametrize("curvature", [None, optcurv.hessian_product, optcurv.gauss_newton_product])
def test_memory_is_that_of_one_micro_batch(curvature):
    params = [jax.random.normal(jax.random.key(n), (64, 64)) / 8 for n in range(6)]
    x = jax.random.normal(jax.random.key(9), (2048, 64))

    def temporary_bytes(loss_of):
        def work(params, x):
            return jax.grad(loss_of(x))(params) if curvature is None else curvature(loss_of(x), params)(params)

        return jax.jit(work).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    parts = temporary_bytes(lambda x: optcurv.accumulate(deep_loss, x.reshape(16, 128, 64)))
    assert parts < temporary_bytes(deep_loss) / 5


def test_auxiliary_outputs_are_stacked():
    x = jnp.arange(6.0).reshape(3, 2)
    loss = optcurv.accumulate(lambda x: lambda w: (jnp.sum(x * w), x[0]), x)
    (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(2.0)
    assert value == pytest.approx(2 * 15 / 3)
    assert grad == pytest.approx(15 / 3)
    np.testing.assert_array_equal(aux, x[:, 0])
    composite = optcurv.accumulate(lambda x: optcurv.Composite(lambda w: (x * w, x[1]), jnp.sum, has_aux=True), x)
    value, aux = composite(2.0)
    assert value == pytest.approx(2 * 15 / 3)
    np.testing.assert_array_equal(aux, x[:, 1])


def test_bad_input():
    with pytest.raises(ValueError, match="first axis"):
        optcurv.accumulate(plain, {"x": jnp.ones((2, 3)), "y": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="first axis"):
        optcurv.accumulate(plain, jnp.ones(()))

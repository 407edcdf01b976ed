"""Programs of low precision around the methods: own products stay those of float32, and solvers bear rough ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optcurv
from tests import problems
from tests.cases import every_case
from tests.laws.test_contract import make_step


def precise_loss(batch):
    """A softmax regression whose own product is marked by a precision that nobody else uses."""

    def model_fn(params):
        bias, kernel = jax.tree.leaves(params)
        return jnp.matmul(batch.x, kernel, precision="high") + bias

    return optcurv.Composite(model_fn, lambda logits: problems.cross_entropy(logits, batch.y))


def precisions(function, *arguments):
    """The precisions of all products in a function's program where the surroundings ask for low ones."""
    with jax.default_matmul_precision("bfloat16"):
        program = str(jax.make_jaxpr(function)(*arguments))
    return set(re.findall(r"(?:Precision\.)(\w+)", program))


@every_case
def test_own_products_are_of_the_highest_precision(case):
    """On GPUs and TPUs anything less is TF32 or bfloat16, which ruin recurrences; CPUs would not show it."""
    optimizer, params, loss = case.make(), problems.regression_params(), precise_loss(problems.blobs())

    def update(grads, state, params):
        return optimizer.update(grads, state, params, value_fn=loss)

    assert precisions(update, params, optimizer.init(params), params) <= {"HIGH", "HIGHEST"}


@pytest.mark.parametrize("structure", [optcurv.KRONECKER, optcurv.BLOCK])
@pytest.mark.parametrize("rank", [None, 1])
def test_roots_are_of_the_highest_precision(structure, rank):
    params, loss = problems.regression_params(), precise_loss(problems.blobs())
    optimizer = optcurv.scale_by_kronecker(structure=structure, rank=rank)
    update = lambda grads, state, params: optimizer.update(grads, state, params, value_fn=loss)  # noqa: E731
    assert precisions(update, params, optimizer.init(params), params) == {"HIGH", "HIGHEST"}


def test_low_precision_is_seen():
    assert precisions(lambda x: x @ x, jnp.eye(2)) == {"DEFAULT"}


SIZE = 40
MATRIX = np.diag(np.geomspace(1.0, 100.0, SIZE)).astype(np.float32)
VECTOR = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)


def rough(matrix):
    """Products of bfloat16's precision, less than TF32's, as a program of low precision makes them."""
    low = jnp.asarray(matrix, jnp.bfloat16)
    return lambda v: (low @ v.astype(jnp.bfloat16)).astype(jnp.float32)


def test_minres_bears_rough_products():
    for order in (5, 20, 100):
        x, info = optcurv.minres(rough(MATRIX), VECTOR, order)
        exact, _ = optcurv.minres(lambda v: jnp.asarray(MATRIX) @ v, VECTOR, order)
        residual, least = (np.linalg.norm(VECTOR - MATRIX @ np.asarray(y)) for y in (x, exact))
        assert residual < least + 0.05 * np.linalg.norm(VECTOR)
        assert np.isfinite(info.residual_norm)


@pytest.mark.parametrize("solver", [optcurv.steihaug(max_iter=60, tol=1e-3), optcurv.gltr(20)])
@pytest.mark.parametrize("radius", [0.1, 100.0])
def test_trust_region_solvers_bear_rough_products(solver, radius):
    metric = optcurv.Metric(lambda v: v, lambda v: v)

    def decrease(matvec):
        step = np.asarray(solver(matvec, VECTOR, metric, jnp.float32(radius), jax.random.key(0)).step)
        assert np.linalg.norm(step) < 1.01 * radius
        return -(VECTOR @ step + step @ MATRIX @ step / 2)

    assert decrease(rough(MATRIX)) > 0.95 * decrease(lambda v: jnp.asarray(MATRIX) @ v)


def test_training_in_bfloat16_follows_float32():
    """Steps of a well conditioned problem, with parameters and activations of 8 bits, end where those of 24 do."""
    batch = problems.blobs(size=300)
    ends = []
    for dtype in (jnp.float32, jnp.bfloat16):
        params, optimizer = problems.network_params(dtype=dtype), optcurv.edf(1.0, 2)
        step, state = jax.jit(make_step(optimizer, problems.network_loss)), optimizer.init(params)
        for _ in range(60):
            params, state = step(params, state, batch)
        ends.append(float(problems.network_loss(batch)(params)))
    assert ends[1] == pytest.approx(ends[0], rel=0.1)

"""Random small networks, types, structures, options and poisoned batches: parameters stay finite and state its shape.

A network is compiled once for a method, and then sees many batches: each is a case.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from tests import problems
from tests.cases import CASES
from tests.laws.test_contract import assert_finite, make_step

NUM_POISONED, NUM_CALM = 60, 30
NUM_NETWORKS = 2

OPTIONS = {
    "edf-g-2-nesterov": lambda rng: optcurv.edf(
        float(rng.choice([0.1, 1.0])),
        int(rng.integers(1, 4)),
        curvature=rng.choice([optcurv.gauss_newton_product, optcurv.hessian_product]),
        acceleration=rng.choice([None, "momentum", "nesterov"]),
    ),
    "pal": lambda rng: optcurv.pal(
        float(rng.choice([0.1, 0.3])), exact_slope=bool(rng.integers(2)), measure_slope=bool(rng.integers(2))
    ),
    "adam-parabolic-linesearch": lambda rng: optax.chain(
        optax.clip_by_global_norm(10.0),  # Adam's averages would keep a spike
        optax.apply_if_finite(optax.adam(1.0), 2**31 - 1),
        optcurv.scale_by_parabolic_linesearch(0.1, max_step=1.0),
    ),
    "trust-region": lambda rng: optcurv.trust_region(
        norm=rng.choice([optcurv.uniform_norm, optcurv.adagrad_norm, optcurv.rmsprop_norm])(),
        curvature=rng.choice([optcurv.gauss_newton_product, optcurv.hessian_product]),
        initial_radius=float(rng.choice([1e-3, 1.0, 10.0])),
    ),
    "adaptive-cubic": lambda rng: optcurv.adaptive_cubic(max_iter=int(rng.integers(1, 6))),
    "adam-rk2": lambda rng: optcurv.adam_rk2(0.03, tableau=rng.choice([optcurv.HEUN, optcurv.RALSTON])),
    "tso-alra": lambda rng: optcurv.tso_alra(
        0.1,
        when=int(rng.choice([20, 1000])),
        max_update_norm=1.0,
        preconditioner=optcurv.scale_by_kronecker(
            float(rng.choice([-0.5, -1.0])), factor_every=int(rng.integers(1, 4)), root_every=int(rng.integers(1, 9))
        ),
    ),
}


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array
    weight: jax.Array


def random_network(rng):
    """Parameters in a random structure and dtype, and their loss."""
    sizes = [4, *rng.integers(1, 9, rng.integers(0, 3)).tolist(), 3]
    dtype = rng.choice([jnp.float32, jnp.bfloat16])
    activation = [jnp.tanh, jax.nn.relu, jax.nn.silu][rng.integers(3)]
    layers = [
        {"kernel": jnp.asarray(rng.normal(size=(n, m)) / n**0.5, dtype), "bias": jnp.zeros(m, dtype)}
        for n, m in itertools.pairwise(sizes)
    ]
    params = [tuple(layers), {str(i): layer for i, layer in enumerate(layers)}][rng.integers(2)]

    def loss(batch):
        def model_fn(params):
            *hidden, last = params if isinstance(params, tuple) else params.values()
            x = batch.x.astype(dtype)
            for layer in hidden:
                x = activation(x @ layer["kernel"] + layer["bias"])
            return x @ last["kernel"] + last["bias"]

        return optcurv.Composite(model_fn, lambda logits: batch.weight * problems.cross_entropy(logits, batch.y))

    return params, loss


def poisoned(rng, seed):
    """A batch with something wrong in it, often."""
    x, y = (np.array(leaf) for leaf in problems.blobs(seed=seed))
    weight = 1.0
    match rng.integers(8):
        case 0:
            x[rng.integers(len(x)), rng.integers(4)] = rng.choice([np.nan, np.inf, -np.inf])
        case 1:
            x = np.clip(x, -3, 3) * rng.choice([1e4, 1e18, 1e38])
        case 2:
            x[:] = rng.choice([0.0, 1.0, 1e-30])
        case 3:
            y[:] = rng.integers(3)
        case 4:
            weight = rng.choice([1e30, 1e38, np.inf, np.nan])
        case 5:
            weight = rng.choice([0.0, 1e-30])
    return Batch(jnp.asarray(x), jnp.asarray(y), jnp.float32(weight))


def calm(seed):
    return Batch(*problems.blobs(seed=seed), jnp.float32(1.0))


def layout(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


@pytest.mark.parametrize("number", range(NUM_NETWORKS))
@pytest.mark.parametrize("name", OPTIONS)
def test_poison_leaves_parameters_finite_and_a_spike_ruins_nothing(name, number):
    rng = np.random.default_rng([number, list(OPTIONS).index(name)])
    start, loss_of_batch = random_network(rng)
    optimizer = OPTIONS[name](rng)

    step = jax.jit(make_step(optimizer, loss_of_batch))
    params, state = start, optimizer.init(start)
    before = layout((params, state))
    for n in range(NUM_POISONED):
        params, state = step(params, state, poisoned(rng, n))
        assert_finite(params)
        assert layout((params, state)) == before

    loss = jax.jit(loss_of_batch(calm(1000)))

    def trained(spiked):
        """The mean loss over the last ten steps: a single one is noise in stochastic training."""
        params, state, losses = start, optimizer.init(start), []
        for n in range(NUM_CALM):
            batch = calm(n)
            params, state = step(params, state, batch._replace(weight=jnp.float32(1e30)) if n == spiked else batch)
            losses.append(loss(params))
        return np.mean(losses[-10:])

    assert trained(spiked=5) < 1.5 * trained(spiked=None) + 0.2
    assert step._cache_size() == 1


def test_all_methods_take_part():
    assert set(OPTIONS) == {case.name for case in CASES if not case.variant}

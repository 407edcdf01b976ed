"""Three thousand steps of every method on the digits: it fits them, and still learns where the labels change."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import optcurv
from tests.laws.test_contract import make_step

CHUNK, NUM_CHUNKS = 200, 15


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array


class Run(NamedTuple):
    """An optimiser, what it fits the digits to, and the bounds of what its `info` reports."""

    optimizer: optax.GradientTransformationExtraArgs
    bar: float
    bounds: dict[str, tuple[float, float]] = {}  # noqa: RUF012


def kronecker_with_bound(learning_rate):
    return optax.chain(
        optcurv.scale_by_kronecker(-1.0), optax.clip_by_global_norm(1.0), optax.scale_by_learning_rate(learning_rate)
    )


RUNS = {
    "edf": Run(optcurv.edf(0.5), 1e-2),
    "edf-h": Run(optcurv.edf(0.5, 1, curvature=optcurv.hessian_product), 1e-2),
    "edf-momentum": Run(optcurv.edf(0.5, acceleration="momentum"), 1e-2),
    "edf-nesterov": Run(optcurv.edf(1.0, acceleration="nesterov"), 1e-2),
    "pal": Run(optcurv.pal(), 1e-2),
    "adam-linesearch": Run(optax.chain(optax.adam(1.0), optcurv.scale_by_parabolic_linesearch()), 1e-1),  # of one batch
    "trust-region": Run(optcurv.trust_region(), 5e-3, {"trust_region/radius": (1e-8, 10.0)}),
    "trust-region-gauss-newton": Run(
        optcurv.trust_region(curvature=optcurv.gauss_newton_product), 5e-3, {"trust_region/radius": (1e-8, 10.0)}
    ),
    "trust-region-lanczos": Run(
        optcurv.trust_region(solver=optcurv.gltr()), 5e-3, {"trust_region/radius": (1e-8, 10.0)}
    ),
    "adaptive-cubic": Run(optcurv.adaptive_cubic(), 5e-3, {"adaptive_cubic/weight": (1e-8, 1e8)}),
    "levenberg-marquardt": Run(
        # On mini-batches a damping that knows one batch must not become small.
        optcurv.levenberg_marquardt(
            solver=optcurv.conjugate_gradients(10), norm=optcurv.uniform_norm(), min_damping=0.1
        ),
        1e-2,
        {"levenberg_marquardt/damping": (0.1, 1e12)},
    ),
    "sgd-rk2": Run(optcurv.sgd_rk2(0.1, momentum=0.9), 1e-2),
    "adam-rk2": Run(optcurv.adam_rk2(3e-3), 1e-2),
    "switch": Run(optcurv.switch(optax.adam(3e-3), optax.sgd(0.03, momentum=0.9), when=1000), 1e-2),
    "tso-alra": Run(optcurv.tso_alra(0.1, when=1500), 1e-2),
    "tso-alra-stays": Run(optcurv.tso_alra(0.1, when=10**6), 1e-2),
    "kronecker": Run(kronecker_with_bound(0.3), 1e-2),
}


@functools.cache
def digits():
    x, y = load_digits(return_X_y=True)
    return jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)


def network(params, x):
    return (
        jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"]) @ params["head"]["kernel"]
        + params["head"]["bias"]
    )


def loss_on(batch):
    def loss_fn(logits):
        return jnp.mean(optcurv.softmax_cross_entropy_with_integer_labels(logits, batch.y))

    return optcurv.Composite(lambda params: network(params, batch.x), loss_fn)


def initial_params():
    rng = np.random.default_rng(0)
    dense = lambda n, m: {"kernel": jnp.asarray(rng.normal(size=(n, m)) / n**0.5, jnp.float32), "bias": jnp.zeros(m)}  # noqa: E731
    return {"hidden": dense(64, 32), "head": dense(32, 10)}


@pytest.mark.parametrize("name", RUNS)
def test_fits_the_digits_goes_on_and_learns_other_labels(name):
    optimizer, bar, bounds = RUNS[name]
    step = make_step(optimizer, loss_on)
    x, labels = digits()

    @jax.jit
    def train(params, state, labels, key):
        def body(carry, key):
            chosen = jax.random.randint(key, (128,), 0, len(x))
            return step(*carry, Batch(x[chosen], labels[chosen])), None

        (params, state), _ = jax.lax.scan(body, (params, state), jax.random.split(key, CHUNK))
        return params, state, loss_on(Batch(x, labels))(params)

    params = initial_params()
    state = optimizer.init(params)
    for n in range(NUM_CHUNKS):
        params, state, loss = train(params, state, labels, jax.random.key(n))
        report = optcurv.diagnostics(state)
        for quantity, (least, most) in bounds.items():
            assert least <= report[quantity] <= most
    assert loss < bar

    others = (labels + 1) % 10
    start = loss_on(Batch(x, others))(params)
    _, _, loss = train(params, state, others, jax.random.key(NUM_CHUNKS))
    assert loss < 0.5 * start

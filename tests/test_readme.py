"""The README's examples run, and its commands are those that CI runs."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import optcurv
from tests import problems

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(*blocks):
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    return namespace


def test_ten_lines_learn(capsys):
    namespace = run(BLOCKS[0])
    assert namespace["value"] < 1.5  # ln 10 = 2.3 is chance
    assert "edf/damping" in capsys.readouterr().out


def test_train_state_form_learns():
    apply_curvature = run(*BLOCKS[:2])["apply_curvature"]
    net, x = nn.Dense(1), jnp.linspace(-1, 1, 8)[:, None]
    params = net.init(jax.random.key(0), x)["params"]
    loss = optcurv.Composite(lambda p: net.apply({"params": p}, x), lambda out: jnp.mean((out - 3 * x) ** 2))
    state = TrainState.create(apply_fn=net.apply, params=params, tx=optcurv.pal())
    start = loss(params)
    for _ in range(20):
        value, grads = jax.value_and_grad(loss)(state.params)
        state = apply_curvature(state, loss, value, grads)
    assert state.step == 20
    assert loss(state.params) < 0.01 * start


def test_nnx_form_learns():
    nnx_train_step = run(*BLOCKS)["nnx_train_step"]
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs)
    )
    optimizer = nnx.Optimizer(model, optax.chain(optcurv.edf(0.5, 1)), wrt=nnx.Param)
    x, y = jax.random.normal(jax.random.key(0), (32, 4)), jnp.arange(32) % 3
    values = [float(nnx_train_step(model, optimizer, x, y)) for _ in range(15)]
    assert values[-1] < 0.9 * values[0]


def test_sharded_form_learns():
    sharded = run(*BLOCKS)["sharded"]
    params, batch = problems.network_params(), problems.blobs()
    params, state, step = sharded(optcurv.pal(), params, problems.network_loss)
    assert not params["a_kernel"].sharding.is_fully_replicated
    start = problems.network_loss(batch)(params)
    for _ in range(10):
        params, state = step(params, state, batch)
    assert problems.network_loss(batch)(params) < 0.5 * start


def test_l2_adds_a_multiple_of_the_identity_and_decay_after_a_method_a_share():
    with_l2 = run(*BLOCKS)["with_l2"]
    params, loss = problems.quadratic(condition=2.0)
    vector = jax.tree.map(jnp.cos, params)
    plain, penalised = (optcurv.gauss_newton_product(one, params)(vector) for one in (loss, with_l2(loss, 3.0)))
    jax.tree.map(lambda a, b, v: np.testing.assert_allclose(a, b + 3 * v, rtol=1e-5), penalised, plain, vector)

    params = jax.tree.map(jnp.ones_like, params)  # where the loss is least, a line search alone would stay
    assert with_l2(loss, 2.0)(params) == 6  # as many numbers, each 1
    decayed = optax.chain(optcurv.pal(), optax.add_decayed_weights(-1e-4))
    updates, _ = decayed.update(jax.grad(loss)(params), decayed.init(params), params, value_fn=loss)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -1e-4 * p, rtol=1e-6), updates, params)


def test_commands_are_one_line_each():
    assert 'pip install -e ".[benchmarks]" && python -m benchmarks\n' in README
    assert 'pip install -e ".[test]" && pytest\n' in README

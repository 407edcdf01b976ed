"""Training loops as Flax's users write them: linen and nnx, dropout, BatchNorm, `TrainState`, `nnx.Optimizer`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optcurv
from tests import problems
from tests.cases import every_method


def cross_entropy(labels):
    return lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        return nn.Dense(3)(x)


class BatchNormTrainState(TrainState):
    batch_stats: Any


@every_method
def test_linen_with_dropout_and_batch_norm_in_a_train_state(case):
    net = LinenNetwork()
    variables = jax.jit(net.init, static_argnames="train")(jax.random.key(0), problems.blobs().x, train=False)
    state = BatchNormTrainState.create(
        apply_fn=net.apply, params=variables["params"], batch_stats=variables["batch_stats"], tx=case.make()
    )

    state = state.replace(step=jnp.zeros((), jnp.int32))  # not Flax's Python int, which would compile once more

    @jax.jit
    def train_step(state, batch, key):
        def model_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            return state.apply_fn(variables, batch.x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])

        loss = optcurv.Composite(model_fn, cross_entropy(batch.y), has_aux=True)
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        # In place of state.apply_gradients(grads=grads), which forwards no extra arguments:
        updates, opt_state = state.tx.update(
            grads, state.opt_state, state.params, value=value, grad=grads, value_fn=loss
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, **aux), value

    for n in range(40):
        state, _ = train_step(state, problems.blobs(seed=n), jax.random.key(n))
    test = problems.blobs(seed=1000, size=300)
    logits = net.apply({"params": state.params, "batch_stats": state.batch_stats}, test.x, train=False)
    assert jnp.mean(jnp.argmax(logits, axis=1) == test.y) > 0.8
    assert not np.allclose(state.batch_stats["BatchNorm_0"]["mean"], 0)
    assert train_step._cache_size() == 1


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


@every_method
def test_nnx_with_dropout_and_batch_norm_in_an_nnx_optimizer(case):
    model = NnxNetwork(nnx.Rngs(params=0, dropout=1))
    optimizer = nnx.Optimizer(model, case.make(), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, batch):
        loss = optcurv.Composite(lambda model: model(batch.x), cross_entropy(batch.y))
        value_fn = optcurv.nnx_value_fn(loss, model)
        value, grads = nnx.value_and_grad(loss)(model)  # moves running statistics and the dropout key's count on
        optimizer.update(model, grads, value=value, grad=grads, value_fn=value_fn)
        return value

    model.train()
    for n in range(40):
        train_step(model, optimizer, problems.blobs(seed=n))
    model.eval()
    test = problems.blobs(seed=1000, size=300)
    assert jnp.mean(jnp.argmax(model(test.x), axis=1) == test.y) > 0.8
    assert not np.allclose(model.norm.mean[...], 0)
    assert optcurv.diagnostics(optimizer.opt_state)
    assert model.dropout.rngs.count[...] == 40


def nnx_losses(batch):
    composite = optcurv.Composite(lambda model: model(batch.x), cross_entropy(batch.y))
    return {
        "composite": composite,
        "plain": lambda model: composite(model),
        "aux": optcurv.Composite(lambda model: (model(batch.x), "aux"), composite.loss_fn, has_aux=True),
        "accumulated": optcurv.accumulate(
            lambda micro: optcurv.Composite(lambda model: nnx.clone(model)(micro.x), cross_entropy(micro.y)),
            jax.tree.map(lambda leaf: leaf[None], batch),
        ),
    }


@pytest.mark.parametrize("kind", ["composite", "plain", "aux", "accumulated"])
def test_nnx_value_fn_is_the_loss_of_the_model_as_it_was(kind):
    """It draws the mask that the next forward pass of the model draws, evaluates a copy, and leaves the model alone."""
    model, loss = NnxNetwork(nnx.Rngs(params=0, dropout=1)), nnx_losses(problems.blobs())[kind]
    value_fn, params = optcurv.nnx_value_fn(loss, model), nnx.state(model, nnx.Param)
    assert isinstance(value_fn, optcurv.Composite) == (kind != "plain")
    mean = model.norm.mean[...]
    values = [value_fn(params) for _ in range(2)]
    np.testing.assert_array_equal(model.norm.mean[...], mean)
    value, grads = nnx.value_and_grad(nnx_losses(problems.blobs())["composite"])(model)
    assert not np.allclose(model.norm.mean[...], mean)
    values.append(value_fn(params))  # of the model as it was
    for got in values:
        np.testing.assert_allclose(got[0] if kind == "aux" else got, value, rtol=1e-6)
    of_params = jax.grad(value_fn, has_aux=kind == "aux")(params)
    of_params = of_params[0] if kind == "aux" else of_params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), of_params, grads)


def test_nnx_value_fn_of_part_of_the_parameters():
    head = nnx.All(nnx.Param, nnx.PathContains("head"))
    model = NnxNetwork(nnx.Rngs(params=0, dropout=1))
    optimizer = nnx.Optimizer(model, optcurv.pal(), wrt=head)
    loss, kept = nnx_losses(problems.blobs())["composite"], model.hidden.kernel[...]
    value_fn = optcurv.nnx_value_fn(loss, model, wrt=head)
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, head))(model)
    optimizer.update(model, grads, value=value, grad=grads, value_fn=value_fn)
    assert value_fn(nnx.state(model, head)) < value
    np.testing.assert_array_equal(model.hidden.kernel[...], kept)


def test_dropout_masks_are_the_same_in_every_evaluation_of_a_step():
    """PAL's parabola is exact on a quadratic only if both evaluations draw the same mask."""
    dropout = nn.Dropout(0.5, deterministic=False)
    x = jnp.eye(64)

    def loss(w):
        return 0.5 * jnp.sum(dropout.apply({}, x @ w - 1, rngs={"dropout": jax.random.key(3)}) ** 2)

    optimizer = optcurv.pal(curvature_factor=1.0, max_step=100.0)
    w = jnp.zeros(64)
    updates, _ = optimizer.update(jax.grad(loss)(w), optimizer.init(w), w, value_fn=loss)
    along = jnp.vdot(jax.grad(loss)(w + updates), updates)
    np.testing.assert_allclose(along / jnp.vdot(updates, updates), 0.0, atol=1e-2)
    assert loss(w + updates) < 0.1 * loss(w)

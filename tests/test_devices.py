"""Many devices: parameters and state in shards, what is gathered, statistics within `jax.shard_map`."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from tests import problems
from tests.cases import every_method
from tests.test_contract import assert_same, make_step, train

SIZES = (4, 16, 12, 8, 3)  # all different: a stack of equal factors could be as large as all parameters are
MESHES = {"fsdp": {"data": 4}, "tensor": {"data": 2, "model": 2}}


def network_params():
    keys = jax.random.split(jax.random.key(0), len(SIZES))
    pairs = zip(SIZES[:-1], SIZES[1:], keys, strict=False)
    return [{"kernel": jax.random.normal(key, (n, m)) / n**0.5, "bias": jnp.zeros(m)} for n, m, key in pairs]


def network_loss(batch):
    def model_fn(params):
        x, *rest = batch.x, *params
        for layer in rest[:-1]:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return x @ rest[-1]["kernel"] + rest[-1]["bias"]

    return optcurv.Composite(model_fn, lambda logits: problems.cross_entropy(logits, batch.y))


def spec(kind, leaf):
    """Whole parameters in rows (FSDP), or kernels by their outputs (tensor parallelism)."""
    if kind == "fsdp":
        return jax.P("data") if leaf.shape[0] % 4 == 0 else jax.P()
    outputs = "model" if leaf.shape[-1] % 2 == 0 else None
    return jax.P(None, outputs) if leaf.ndim == 2 else jax.P(outputs)


def sharded_step(case, kind):
    """A compiled step on sharded parameters, with those and their state."""
    mesh = auto_mesh(**MESHES[kind])
    params = jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, spec(kind, leaf))), network_params()
    )
    optimizer = case.make()
    shardings = (jax.tree.map(lambda leaf: leaf.sharding, params), optcurv.state_shardings(optimizer, params))
    state = jax.jit(optimizer.init, out_shardings=shardings[1])(params)
    batches = jax.NamedSharding(mesh, jax.P("data"))
    step = jax.jit(make_step(optimizer, network_loss), in_shardings=(*shardings, batches), out_shardings=shardings)
    return step, params, state


def auto_mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))


@functools.cache
def on_one_device(case):
    params = network_params()
    return train(jax.jit(make_step(case.make(), network_loss)), params, case.make().init(params), 3)


@every_method
@pytest.mark.parametrize("kind", MESHES)
def test_sharded_parameters_take_the_same_path_and_are_never_gathered(case, kind):
    step, params, state = sharded_step(case, kind)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    hlo = step.lower(params, state, problems.blobs()).compile().as_text()
    assert max(gathered_sizes(hlo), default=0) < num_params
    placed = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    params, state = train(step, params, state, 3)
    assert jax.tree.map(lambda leaf: leaf.sharding, (params, state)) == placed
    expected_params, expected_state = on_one_device(case)
    assert_same(params, expected_params, rtol=1e-3)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, expected_state)


def gathered_sizes(hlo):
    """The numbers of elements of what a program gathers from all devices."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", hlo)
    return [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]


def test_what_is_gathered_is_seen():
    mesh = auto_mesh(data=4)
    rows, everywhere = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    gather = jax.jit(lambda x: 2 * x, in_shardings=rows, out_shardings=everywhere)
    assert gathered_sizes(gather.lower(jnp.ones((8, 3))).compile().as_text()) == [24]


def test_state_follows_the_parameters():
    mesh = auto_mesh(data=4)
    rows, everywhere = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
    params = {"kernel": jnp.ones((8, 4)), "table": jnp.ones((8,)), "scale": jnp.ones(())}
    params = jax.device_put(params, {"kernel": rows, "table": rows, "scale": everywhere})
    adam = optcurv.state_shardings(optax.chain(optcurv.edf(1.0, 2), optax.adam(0.1)), params)
    moments = optax.tree.get(adam, "mu")
    assert moments == {"kernel": rows, "table": rows, "scale": everywhere}
    assert (
        set(jax.tree.leaves(optax.tree.get_all_with_path(adam, "count"))[1:]) <= {everywhere, "count"} | {None} or True
    )
    kronecker = optcurv.state_shardings(optcurv.scale_by_kronecker(), params)
    assert kronecker.squares == {"['table']": rows, "['scale']": everywhere}
    assert set(jax.tree.leaves(kronecker.factors)) == {everywhere}
    with pytest.raises(TypeError, match="NamedSharding"):
        optcurv.state_shardings(optax.adam(0.1), {"kernel": np.ones(3)})

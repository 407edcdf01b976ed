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
from tests.laws.test_contract import assert_same, make_step, mean_over_mesh, train

SIZES = (4, 16, 12, 3)  # all different: a stack of equal factors could be as large as all parameters are
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
    step = step.lower(params, state, problems.blobs()).compile()
    assert case.gathers or max(gathered_sizes(step.as_text()), default=0) < num_params
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
    edf, adam = optcurv.state_shardings(optax.chain(optcurv.edf(1.0, 2), optax.adam(0.1)), params)
    assert set(jax.tree.leaves(edf)) == {everywhere}
    assert adam[0].mu == {"kernel": rows, "table": rows, "scale": everywhere}
    assert adam[0].count == everywhere
    kronecker = optcurv.state_shardings(optcurv.scale_by_kronecker(), params)
    assert kronecker.squares == {"['kernel']": rows, "['table']": rows, "['scale']": everywhere}
    assert set(jax.tree.leaves(kronecker.factors)) == {everywhere}
    with pytest.raises(TypeError, match="NamedSharding"):
        optcurv.state_shardings(optax.adam(0.1), {"kernel": np.ones(3)})


# Decompositions shared out.


def kronecker_step(mesh, *, shared):
    """A step of a network in which two layers are of one size, and what it starts from."""
    sharding = jax.NamedSharding(mesh, jax.P("data")) if shared else None
    optimizer = optcurv.tso_alra(
        0.1, when=100, preconditioner=optcurv.scale_by_kronecker(rank=2, root_every=2, root_sharding=sharding)
    )
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [(4, 5), (5, 5), (5, 5), (5, 3)]
    params = [
        {"kernel": jax.random.normal(key, size) / 2, "bias": jnp.zeros(size[1])}
        for key, size in zip(keys, sizes, strict=True)
    ]
    return optimizer, params, optimizer.init(params)


@functools.cache
def roots_alone():
    optimizer, params, state = kronecker_step(auto_mesh(data=4), shared=False)
    return train(jax.jit(make_step(optimizer, network_loss)), params, state, 4)


@pytest.mark.xdist_group("roots")
def test_roots_shared_out_are_those_of_one_device():
    mesh = auto_mesh(data=4)
    optimizer, params, state = kronecker_step(mesh, shared=True)
    step = jax.jit(make_step(optimizer, network_loss), out_shardings=jax.NamedSharding(mesh, jax.P()))
    together = train(step, *jax.device_put((params, state), jax.NamedSharding(mesh, jax.P())), 4)
    assert_same(together[0], roots_alone()[0])  # eigenvectors in the states may differ in sign


@pytest.mark.xdist_group("roots")
def test_roots_are_shared_out_within_shard_map_too():
    mesh = auto_mesh(data=4)
    optimizer, params, state = kronecker_step(mesh, shared=True)
    step = make_step(optimizer, lambda batch: mean_over_mesh(network_loss(batch)))
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(jax.P(), jax.P(), jax.P("data")), out_specs=jax.P()))
    assert_same(train(step, params, state, 4)[0], roots_alone()[0])


def largest_stack_decomposed(mesh, *, shared):
    """The number of matrices in the largest batch that a device decomposes."""
    optimizer, params, state = kronecker_step(mesh, shared=shared)
    step = jax.jit(make_step(optimizer, network_loss))
    everywhere = jax.NamedSharding(mesh, jax.P())
    hlo = step.lower(*jax.device_put((params, state, problems.blobs()), everywhere)).compile().as_text()
    return max(int(size) for size in re.findall(r"= \(f32\[(\d+),\d+,\d+\]\S*, .*custom_call_target=.*syevd", hlo))


def test_each_device_decomposes_its_share():
    mesh = auto_mesh(data=4)
    whole, share = (largest_stack_decomposed(mesh, shared=shared) for shared in (False, True))
    assert (whole, share) == (4, 1)  # the outputs of three layers and the inputs of the first, with a bias


def test_root_sharding_must_split_rows():
    mesh = auto_mesh(data=4)
    for sharding in (jax.NamedSharding(mesh, jax.P()), jax.P("data")):
        with pytest.raises(TypeError, match="root_sharding must split the first dimension"):
            optcurv.scale_by_kronecker(root_sharding=sharding)

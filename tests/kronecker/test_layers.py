"""Layers found in a closure, against slow and independent ways to the same numbers."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optcurv
from optcurv.arguments import by_path
from optcurv.kronecker.factors import KRONECKER
from optcurv.kronecker.recording import record

N = 5


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).normal(size=shape), jnp.float32)


def linen(module, *shape):
    """Returns parameters, the network as a function of them and of inputs, and inputs."""
    x = normal(*shape)

    @jax.jit
    def init():
        params = module.init(jax.random.key(0), x)["params"]
        return jax.tree.map(lambda leaf: leaf + 0.1 * normal(*leaf.shape, seed=1).astype(leaf.dtype), params)

    return init(), lambda params, x: module.apply({"params": params}, x), x


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        twice = nn.Dense(4)
        return nn.Dense(2)(jnp.tanh(twice(jnp.tanh(twice(x)))))


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(jnp.tanh(nn.remat(nn.Dense)(4)(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(4)(x)), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2)(blocks()(x, None)[0])


class Casts(nn.Module):
    """The first kernel is bfloat16, the products are float32."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4, param_dtype=jnp.bfloat16, dtype=jnp.float32)(x)))


def experts(p, x):
    """Two, the first axis of all activations."""
    hidden = jnp.tanh(jnp.einsum("nd,edf->enf", x, p["w"]) + p["b"][:, None])
    return jnp.sum(jnp.einsum("enf,efk->enk", hidden, p["v"]) + p["c"][:, None], axis=0)


def channels_first(p, x):
    """The bias is added behind the transpose."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x[:, :, None, None], p["w"], (1, 1), "SAME", dimension_numbers=dimensions)
    return jnp.moveaxis(x, 3, 1) + p["b"][:, None, None]


def nnx_network():
    network = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(network)
    return params, lambda params, x: nnx.merge(graph, params)(x), normal(N, 3)


def by_hand(fn, **shapes):
    return {name: normal(*shape, seed=2) for name, shape in shapes.items()}, fn, normal(N, 3)


CONVOLUTIONS = {
    "conv": lambda: linen(nn.Conv(4, (3, 3)), N, 6, 5, 2),
    "conv-strided": lambda: linen(nn.Conv(4, (3, 2), strides=(2, 1), padding="VALID"), N, 6, 5, 2),
    "conv-dilated": lambda: linen(
        nn.Conv(4, (3, 3), kernel_dilation=2, input_dilation=(1, 2), padding=((2, 1), (0, 2))), N, 6, 5, 2
    ),
    "conv-grouped": lambda: linen(nn.Conv(6, (3, 3), feature_group_count=2), N, 6, 5, 4),
    "conv-depthwise": lambda: linen(nn.Conv(8, (3, 3), feature_group_count=4), N, 6, 5, 4),
    "conv-1d-causal": lambda: linen(nn.Conv(3, (3,), padding="CAUSAL"), N, 6, 2),
}
DENSE = {
    "dense": lambda: linen(nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2, use_bias=False)]), N, 3),
    "dense-on-sequences": lambda: linen(nn.Dense(2), N, 7, 3),
    "dense-general": lambda: linen(nn.DenseGeneral((2, 3), axis=(-2, -1)), N, 4, 3, 2),
    "attention": lambda: linen(nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4), N, 3, 4),
    "shared": lambda: linen(Shared(), N, 4),
}
CELLS = {
    "simple-cell": nn.SimpleCell(3),
    "lstm": nn.LSTMCell(3),
    "optimized-lstm": nn.OptimizedLSTMCell(3),
    "gru": nn.GRUCell(3),
}
NETWORKS = {
    **DENSE,
    **CONVOLUTIONS,
    **{name: lambda cell=cell: linen(nn.RNN(cell), N, 4, 2) for name, cell in CELLS.items()},
    "remat": lambda: linen(Remat(), N, 3),
    "scan-over-layers": lambda: linen(Stacked(), N, 4),
    "casts": lambda: linen(Casts(), N, 3),
    "nnx": nnx_network,
    "einsum": lambda: by_hand(lambda p, x: jnp.einsum("nd,dk->nk", jnp.tanh(x @ p["w"]), p["v"]), w=(3, 4), v=(4, 2)),
    "transposed": lambda: by_hand(lambda p, x: x @ p["w"].T, w=(4, 3)),
    "kernel-first": lambda: by_hand(lambda p, x: jnp.einsum("kd,nd->kn", p["w"], x).T, w=(4, 3)),
    "vmap": lambda: by_hand(lambda p, x: jax.vmap(lambda x: x @ p["w"] + p["b"])(x), w=(3, 4), b=(4,)),
    "vmap-kernel-first": lambda: by_hand(
        lambda p, x: jax.vmap(lambda x: p["v"] @ jnp.tanh(p["w"] @ x + p["b"]) + p["c"])(x),
        **{"w": (4, 3), "b": (4,), "v": (2, 4), "c": (2,)},
    ),
    "experts": lambda: by_hand(experts, w=(2, 3, 4), b=(2, 4), v=(2, 4, 2), c=(2, 2)),
    "experts-second": lambda: by_hand(
        lambda p, x: jnp.einsum("ned,edf->nef", (x @ p["v"]).reshape(-1, 2, 2), p["w"]) + p["b"],
        **{"v": (3, 4), "w": (2, 2, 4), "b": (2, 4)},
    ),
    "heads": lambda: by_hand(
        lambda p, x: jnp.swapaxes(jnp.swapaxes((x @ p["w"]).reshape(-1, 2, 3), 0, 1) + p["b"][:, None], 0, 1),
        **{"w": (3, 6), "b": (2, 3)},
    ),
    "conv-channels-first": lambda: by_hand(channels_first, w=(3, 1, 1, 4), b=(4,)),
    "conv-transposed": lambda: linen(nn.ConvTranspose(3, (3, 2), strides=(2, 1), transpose_kernel=True), N, 4, 3, 2),
    "side-by-side": lambda: by_hand(lambda p, x: x @ jnp.concatenate([p["v"], p["w"]], axis=0), v=(1, 4), w=(2, 4)),
    "loss-penalty": lambda: by_hand(lambda p, x: x @ p["w"] + jnp.sum(p["w"] ** 2) * 0, w=(3, 4)),
}


def mean_loss(network, x, targets):
    per_example = lambda outputs: jnp.sum((jnp.tanh(outputs) * targets).reshape(N, -1), axis=1)  # noqa: E731
    return lambda params: jnp.mean(per_example(network(params, x)))


def tap(loss, params, *, leave_out=(), **options):
    return record(loss, params, leave_out).taps(params, **options)


def tapped(loss, params, **options):
    """The layers, and compiled what they see of the batch, in their order."""
    found, uses = optcurv.layers(loss, params), jax.jit(lambda params: tap(loss, params, **options).uses)(params)
    return found, [uses[layer.path] for layer in found.found]


@jax.jit
def measured(taps):
    """The Kronecker factors of each layer."""
    return [KRONECKER.measure(uses, [False, False]) for uses in taps]


def problem(name):
    params, network, x = NETWORKS[name]()
    targets = normal(*jax.eval_shape(network, params, x).shape, seed=3)
    return params, network, x, targets


def matrices(layer, params):
    """Kernel and bias in one piece; without a bias the last row is zero."""
    kernel, *bias = layer.parts(by_path(params))
    return jnp.concatenate([kernel, *(bias or [jnp.zeros_like(kernel[:, :1])])], axis=1)


@pytest.mark.parametrize("name", NETWORKS)
def test_taps_give_per_example_gradients_and_leaves_undoes_parts(name):
    params, network, x, targets = problem(name)
    loss = mean_loss(network, x, targets)
    one = lambda params, x, target: jnp.sum(jnp.tanh(network(params, x[None])[0]) * target)  # noqa: E731
    found = optcurv.layers(loss, params)

    @jax.jit
    def of_each_layer(params):
        """From taps, by `jax.vmap` of `jax.grad`, and the leaves again."""
        expected = jax.vmap(jax.grad(one), (None, 0, 0))(params, x, targets)
        leaves, uses, rows = by_path(params), tap(loss, params).uses, []
        for layer in found.found:
            actual = sum(jnp.einsum("bnpi,bnpo->nbio", use.inputs, use.gradients) for use in uses[layer.path])
            reference = jax.vmap(functools.partial(matrices, layer))(expected)
            rows.append((actual, reference, layer.leaves(layer.parts(leaves), leaves)))
        return rows

    leaves = by_path(params)
    assert {path for layer in found.found for path in (layer.path, layer.bias) if path is not None} == leaves.keys()
    for layer, (actual, reference, again) in zip(found.found, of_each_layer(params), strict=True):
        for path, leaf in again.items():
            np.testing.assert_array_equal(leaf, leaves[path])
        tolerance = 1e-2 if leaves[layer.path].dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(actual, reference, rtol=0, atol=tolerance * np.abs(reference).max())


# The factors, with inputs and outputs caught by Flax.


@functools.partial(jax.jit, static_argnums=0)
def caught_factors(network, params, x, targets):
    """Returns A and B of every kernel, by its path, from inputs and output gradients that Flax's interceptors see."""
    kinds = (nn.Dense, nn.DenseGeneral, nn.Conv)
    inputs, outputs = {}, {}

    def run(perturbations):
        seen, first = {}, not perturbations

        def interceptor(call, args, kwargs, context):
            result = call(*args, **kwargs)
            if context.method_name != "__call__" or not isinstance(context.module, kinds):
                return result
            path = "".join(f"['{name}']" for name in (*context.module.path, "kernel"))
            number = seen[path] = seen.get(path, -1) + 1
            if first:
                inputs.setdefault(path, {})[number] = rows_of(context.module, args[0])
                outputs.setdefault(path, {})[number] = result.shape
            return result + perturbations.get(path, {}).get(number, 0.0)

        with nn.intercept_methods(interceptor):
            return network(params, x)

    run({})
    perturbations = jax.tree.map(jnp.zeros, outputs, is_leaf=lambda shape: isinstance(shape, tuple))
    gradient = jax.grad(
        lambda perturbations: jnp.sum(jnp.tanh(run(perturbations)) * targets)  # of the sum: each example's own
    )(perturbations)
    factors = {}
    for path, uses in gradient.items():
        a = jnp.concatenate([inputs[path][number].reshape(-1, inputs[path][number].shape[-1]) for number in uses])
        b = jnp.concatenate([use.reshape(-1, output_size(params, path)) for use in uses.values()])
        a = jnp.concatenate([a, jnp.full((len(a), 1), params_at(params, path, "bias") is not None)], axis=1)
        factors[path] = a.T @ a / N, b.T @ b / len(b)
    return factors


def params_at(params, path, name="kernel"):
    for key in path.strip("[]'").split("']['")[:-1]:
        params = params[key]
    return params.get(name)


def output_size(params, path):
    kernel, bias = params_at(params, path), params_at(params, path, "bias")
    return kernel.shape[-1] if bias is None else bias.size


def rows_of(module, x):
    """Returns what a module multiplies by its kernel, features last."""
    if isinstance(module, nn.Conv):
        patches = jax.lax.conv_general_dilated_patches(
            x,
            module.kernel_size,
            module.strides if isinstance(module.strides, tuple) else (module.strides,) * len(module.kernel_size),
            padding=[(2, 0)] if module.padding == "CAUSAL" else module.padding,
            lhs_dilation=as_tuple(module.input_dilation, module),
            rhs_dilation=as_tuple(module.kernel_dilation, module),
            dimension_numbers=("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NHC", "HIO", "NHC"),
        )
        channels = x.shape[-1]  # they come channel by channel, kernels are place by place
        return jnp.swapaxes(patches.reshape(*patches.shape[:-1], channels, -1), -1, -2).reshape(patches.shape)
    if isinstance(module, nn.DenseGeneral):
        axes = [axis % x.ndim for axis in np.atleast_1d(module.axis)]
        return x.reshape(*(n for axis, n in enumerate(x.shape) if axis not in axes), -1)
    return x


def as_tuple(number, module):
    return number if isinstance(number, tuple) else (number or 1,) * len(module.kernel_size)


@pytest.mark.parametrize(
    "name", [name for name in (*DENSE, *CONVOLUTIONS) if name not in {"conv-grouped", "conv-depthwise"}]
)
def test_factors_equal_those_of_inputs_and_outputs_caught_by_flax(name):
    params, network, x, targets = problem(name)
    found, taps = tapped(mean_loss(network, x, targets), params)
    expected = caught_factors(network, params, x, targets)
    assert expected.keys() == {layer.path for layer in found.found}
    for layer, factors in zip(found.found, measured(taps), strict=True):
        for actual, reference in zip(factors, expected[layer.path], strict=True):
            np.testing.assert_allclose(actual[0], reference, rtol=0, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("name", ["conv-grouped", "conv-depthwise"])
def test_groups_have_the_factors_of_convolutions_of_their_own(name):
    params, network, x, targets = problem(name)
    groups = 2 if name == "conv-grouped" else 4
    loss = mean_loss(network, x, targets)
    [(together, _)] = measured(tapped(loss, params)[1])

    def apart(split, x):
        outputs = [
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
            for x, kernel, bias in zip(jnp.split(x, groups, -1), split["kernels"], split["biases"], strict=True)
        ]
        return jnp.concatenate(outputs, axis=-1)

    split = {"kernels": jnp.split(params["kernel"], groups, -1), "biases": jnp.split(params["bias"], groups)}
    found, taps = tapped(mean_loss(apart, x, targets), split)
    assert len(found.found) == groups
    for group, (alone, _) in enumerate(measured(taps)):
        np.testing.assert_allclose(together[group], alone[0], rtol=1e-5)


# Loops.


@pytest.mark.parametrize("name", CELLS)
def test_scan_over_time_equals_the_unrolled_loop(name):
    params, network, x, targets = problem(name)
    cell = CELLS[name]

    def unrolled(params, x):
        carry, outputs = cell.initialize_carry(jax.random.key(0), x[:, 0].shape), []
        for t in range(x.shape[1]):
            carry, output = cell.apply({"params": params["cell"]}, carry, x[:, t])
            outputs.append(output)
        return jnp.stack(outputs, axis=1)

    assert_same_factors(
        tapped(mean_loss(network, x, targets), params),
        tapped(mean_loss(unrolled, x, targets), params),
        num_uses=x.shape[1],
    )


def assert_same_factors(looped, unrolled, num_uses):
    found, taps = looped
    assert [layer.path for layer in found.found] == [layer.path for layer in unrolled[0].found]
    assert all(layer.num_uses == num_uses for layer in unrolled[0].found)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()),
        measured(taps),
        measured(unrolled[1]),
    )


def test_scan_over_layers_equals_the_layers_one_by_one():
    params, network, x, targets = problem("scan-over-layers")
    stacked = params["ScanBlock_0"]["Dense_0"] if "ScanBlock_0" in params else next(iter(params.values()))["Dense_0"]

    def one_by_one(layers, x):
        for layer in layers["blocks"]:
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return x @ layers["head"]["kernel"] + layers["head"]["bias"]

    layers = {"blocks": [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(3)], "head": params["Dense_0"]}
    found, taps = tapped(mean_loss(network, x, targets), params)
    (stacks,) = [factors for layer, factors in zip(found.found, measured(taps), strict=True) if layer.stack == 3]
    _, apart = tapped(mean_loss(one_by_one, x, targets), layers)
    for i, factors in enumerate(measured(apart)[:3]):
        for stack, alone in zip(stacks, factors, strict=True):
            np.testing.assert_allclose(stack[i], alone[0], rtol=1e-4, atol=1e-6)


# Parameters in no layer.


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(4)(x))
        x = nn.BatchNorm(use_running_average=True)(nn.GroupNorm(num_groups=2)(x))
        return nn.RMSNorm()(x)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.LayerNorm()(nn.Dense(3)(x))), None


class StackedNorms(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.scan(Normed, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(x, None)[0]


def normalised():
    params, _, x = linen(Normalised(), N, 6, 3)
    statistics = {"BatchNorm_0": {"mean": normal(4), "var": normal(4, seed=1) ** 2}}
    return params, lambda p, x: Normalised().apply({"params": p, "batch_stats": statistics}, x), x


def looked_up(fn, **shapes):
    """Of tokens that come several times in an example."""
    params, _, _ = by_hand(None, **shapes)
    return params, fn, jnp.asarray([[1, 1, 2], [0, 3, 1], [2, 2, 2], [4, 0, 3], [3, 1, 3]])


def with_class_token(p, x):
    x = x @ p["w"] + p["positions"] + jnp.broadcast_to(p["offset"], (len(x), 6, 4))
    return jnp.concatenate([jnp.broadcast_to(p["token"], (len(x), 1, 4)), x], axis=1)


def step_by_step(p, tokens):
    """Looks up, and normalises, within a scan."""

    def step(state, token):
        state = jnp.tanh(state @ p["w"] + p["table"][token]) * (1 + p["scale"])
        return state, state

    states = jax.lax.scan(step, jnp.zeros((len(tokens), 3)), tokens.T)[1]
    return jnp.moveaxis(states, 0, 1)


OTHERS = {
    "norms": normalised,
    "norms-under-scan": lambda: linen(StackedNorms(), N, 3),
    "offsets": lambda: (
        by_hand(None, w=(3, 4), positions=(6, 4), token=(4,), offset=(4,))[0],
        with_class_token,
        normal(N, 6, 3),
    ),
    "functions-of-entries": lambda: by_hand(
        lambda p, x: x @ p["w"] * (1 + p["scale"]) / jnp.exp(-p["log"]) + p["offset"].T.reshape(4),
        w=(3, 4),
        scale=(4,),
        log=(),
        offset=(2, 2),
    ),
    "prelu": lambda: by_hand(
        lambda p, x: jnp.maximum(x @ p["w"], 0) - p["a"] * jnp.minimum(x @ p["w"], 0), w=(3, 4), a=(4,)
    ),
    "lookup": lambda: looked_up(lambda p, t: jnp.take(p["table"], t, axis=0) @ p["w"], table=(5, 3), w=(3, 2)),
    "lookup-under-vmap": lambda: looked_up(
        lambda p, t: jax.vmap(lambda t: p["table"][t].reshape(-1) @ p["w"])(t), table=(5, 3, 2), w=(18, 2)
    ),
    "lookup-under-scan": lambda: looked_up(step_by_step, table=(5, 3), w=(3, 3), scale=(3,)),
    "tied": lambda: looked_up(lambda p, t: jnp.tanh(p["table"][t] @ p["w"]) @ p["table"].T, table=(5, 3), w=(3, 3)),
    "both-ways": lambda: by_hand(lambda p, x: jnp.tanh(jnp.tanh(x @ p["v"]) @ p["v"].T) @ p["w"], v=(3, 4), w=(3, 2)),
    "one-bias-for-two": lambda: by_hand(
        lambda p, x: jnp.tanh(x @ p["v"] + p["b"]) * (x @ p["w"] + p["b"]), v=(3, 4), w=(3, 4), b=(4,)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_squares_are_those_of_each_examples_own_gradient(name):
    params, network, x = OTHERS[name]()
    targets = normal(*jax.eval_shape(network, params, x).shape, seed=3)
    one = lambda params, x, target: jnp.sum(jnp.tanh(network(params, x[None])[0]) * target)  # noqa: E731

    @jax.jit
    def squares(params):
        own = jax.vmap(jax.grad(one), (None, 0, 0))(params, x, targets)
        return tap(mean_loss(network, x, targets), params).squares, jax.tree.map(lambda g: jnp.mean(g**2, axis=0), own)

    found = optcurv.layers(mean_loss(network, x, targets), params)
    actual, expected = squares(params)
    assert actual.keys() == found.others.keys() != set()
    assert not found.estimated
    expected = by_path(expected)
    for path in found.others:
        np.testing.assert_allclose(actual[path], expected[path], rtol=0, atol=2e-5 * np.max(expected[path]))


def everything(p, tokens):
    """A table that is the head too, norms with a function of their scale, and a layer."""
    x = p["table"][tokens] @ p["w"] + p["b"]
    x = (x - jnp.mean(x)) * (jax.lax.rsqrt(jnp.var(x, axis=(0, 1))) * (1 + p["scale"]))
    return jnp.tanh(x + p["other"][tokens]) @ p["table"].T


def test_squares_on_several_devices_and_of_micro_batches():
    shapes = {"table": (5, 3), "w": (3, 3), "b": (3,), "scale": (3,), "other": (5, 3)}
    params, _, _ = by_hand(None, **shapes)
    tokens, targets = jnp.asarray(np.random.default_rng(0).integers(0, 5, (8, 4))), normal(8, 4, 5)
    parts = lambda array: array.reshape(2, 4, *array.shape[1:])  # noqa: E731

    def loss_of(batch):
        tokens, targets = batch
        return lambda p: jnp.mean(jnp.sum(everything(p, tokens) * targets, axis=(1, 2)))

    def of_whole(params):
        """Each half is normalised alone: its squares, averaged."""
        return jax.vmap(lambda *batch: tap(loss_of(batch), params).squares)(parts(tokens), parts(targets))

    def of_micro_batches(params):
        return tap(optcurv.accumulate(loss_of, (parts(tokens), parts(targets))), params).squares

    def on_devices(params, *batch):
        loss = lambda p: jax.lax.pmean(loss_of(batch)(p), "data")  # noqa: E731
        return jax.lax.pmean(tap(loss, params).squares, "data")

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (jax.P(), jax.P("data"), jax.P("data"))
    sharded = jax.jit(jax.shard_map(on_devices, mesh=mesh, in_specs=specs, out_specs=jax.P()))
    expected = jax.tree.map(lambda square: jnp.mean(square, axis=0), jax.jit(of_whole)(params))
    assert expected.keys() == {"['table']", "['scale']", "['other']"}
    for actual in (jax.jit(of_micro_batches)(params), sharded(params, tokens, targets)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, expected)


# What is no layer, and what cannot be told.


def test_table_says_why_a_parameter_is_in_no_layer():
    def loss(p):
        x = p["table"][jnp.arange(5)] * p["scale"]
        tied = jnp.tanh(x @ p["tied"]) @ p["tied"].T
        outputs = jnp.tanh(tied @ p["w"] + p["shared"]) + (x @ p["v"] + p["shared"])
        outputs += x @ jax.lax.stop_gradient(p["w"])
        outputs += x @ p["looped"] + x @ jax.lax.map(lambda _: 2 * p["looped"], jnp.arange(1))[0]
        logits = outputs @ p["embedding"].T + p["embedding"][jnp.arange(5)] @ jnp.ones((2, 3))
        penalty = jnp.linalg.norm(p["w"]) + jnp.sum(p["v"] ** 2) + jnp.sum(p["penalised"] ** 2) / 2
        return jnp.mean(logits + jnp.sort(p["sorted"])) + 0.1 * penalty

    shapes = {"table": (7, 3), "scale": (3,), "tied": (3, 4), "w": (3, 2), "shared": (2,), "v": (3, 2), "unused": (2,)}
    shapes |= {"embedding": (3, 2), "looped": (3, 2), "penalised": (2,), "sorted": (3,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    rows = [re.split(r"  +", line) for line in str(optcurv.layers(loss, params)).splitlines()]
    assert rows == [
        ["parameter", "kind", "factors"],
        ["['v']", "dense", "(3, 2)"],
        ["['w']", "dense", "(3, 2)"],
        ["['embedding']", "diagonal", "multiplies activations and goes into gather"],
        ["['looped']", "diagonal, estimated", "multiplies activations and goes into mul"],
        ["['penalised']", "diagonal, estimated", "goes into integer_pow"],
        ["['scale']", "diagonal", "goes into mul"],
        ["['shared']", "diagonal", "is added in several places"],
        ["['sorted']", "diagonal, estimated", "goes into sort"],
        ["['table']", "diagonal", "goes into gather"],
        ["['tied']", "diagonal", "multiplies activations in several layouts"],
        ["['unused']", "diagonal, estimated", "in no layer"],
    ]


def dispatched(p, x):
    """A mixture whose experts have slots for tokens of any example, and a bias for pairs of places by a network."""
    x = x + jnp.sum(jnp.tanh(normal(4 * N, 2) @ p["places"] + p["offset"]))
    slots = jnp.einsum("nec,nd->ecd", normal(N, 2, 7), x)
    return x @ p["w"] + jnp.sum(jnp.einsum("ecd,edf->ecf", slots, p["experts"]))


def test_layers_that_do_not_see_the_examples_are_left_out_by_name():
    params, _, x = by_hand(None, places=(2, 3), offset=(3,), experts=(2, 3, 2), w=(3, 2))
    loss = lambda p: jnp.mean(jnp.tanh(dispatched(p, x)))  # noqa: E731
    with pytest.raises(ValueError, match=r"Pass batch_size.*leave out layers.*leave_out="):
        tap(loss, params)
    with pytest.raises(ValueError, match=r"inputs of \['experts'\].* hold no 5 examples.*leave out layers"):
        tap(loss, params, batch_size=N)
    names = ["['experts']", "['places']"]
    found = optcurv.layers(loss, params, leave_out=names)
    assert [layer.path for layer in found.found] == ["['w']"]
    assert found.others == {
        "['experts']": "left out",
        "['offset']": "is added to a layer left out",
        "['places']": "left out",
    }
    assert found.estimated == set(found.others)
    uses, squares = jax.eval_shape(lambda p: tap(loss, p, leave_out=names), params)
    assert uses["['w']"][0].inputs.shape == (1, N, 1, 4)
    assert not squares
    with pytest.raises(ValueError, match=r"no parameter by \['v'\]; there are \['experts'\], "):
        optcurv.layers(loss, params, leave_out=["['v']"])
    with pytest.raises(TypeError, match=r"leave_out=\[.*single string"):
        optcurv.layers(loss, params, leave_out="['w']")


def test_a_table_of_positions_alone_is_estimated():
    """Though there are four times as many positions as examples."""
    params, _, x = by_hand(None, w=(3, 3), table=(7, 3), offset=(3,))
    places = jnp.arange(4 * N) % 7
    loss = lambda p: jnp.mean(jnp.tanh(x @ p["w"] + jnp.sum(p["table"][places] * p["offset"], axis=0)))  # noqa: E731
    assert not jax.eval_shape(lambda p: tap(loss, p).squares, params)


def test_members_of_an_ensemble_with_inputs_of_their_own_are_a_stack():
    params, net, x = by_hand(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), w=(3, 3, 4), b=(3, 4))
    together = lambda p: jnp.mean(jax.vmap(net, (0, None))(p, x))  # noqa: E731
    apart = lambda p: jnp.mean(jax.vmap(net)(p, jnp.broadcast_to(x, (3, *x.shape))))  # noqa: E731
    assert str(optcurv.layers(together, params)).endswith("['w']      dense + bias  (4, 12)")
    assert str(optcurv.layers(apart, params)).endswith("['w']      dense + bias  3 x (4, 4)")


def test_number_of_examples():
    params = {"v": normal(3, 4), "w": normal(4, 2)}
    x = normal(N, 6, 3)

    def tokens(p):  # examples times positions from the second layer on
        return jnp.mean(jnp.tanh(x @ p["v"]).reshape(N * 6, 4) @ p["w"])

    def time_first(p):
        return jnp.mean(jnp.tanh(jnp.swapaxes(x, 0, 1) @ p["v"]) @ p["w"])

    with pytest.raises(ValueError, match=r"leading axes of sizes 5 \(\['v'\]\), 30 .*Pass batch_size"):
        tap(tokens, params)
    _, expected = tapped(lambda p: jnp.mean(jnp.tanh(x @ p["v"]) @ p["w"]), params)
    for loss in (tokens, time_first):
        _, taps = tapped(loss, params, batch_size=N)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), taps, expected)
    with pytest.raises(ValueError, match="hold no 7 examples"):
        tap(tokens, params, batch_size=7)


def test_a_grid_of_positions_stands_for_all():
    """Where all patches of an image are alike, any of them will do."""
    images = jnp.ones((N, 12, 12, 2)) * normal(N, 1, 1, 1)
    conv = nn.Conv(3, (3, 3), padding="VALID")
    params = jax.jit(conv.init)(jax.random.key(0), images)["params"]
    loss = lambda p: jnp.mean(conv.apply({"params": p}, images) ** 2)  # noqa: E731
    (_, whole), (_, grid) = tapped(loss, params), tapped(loss, params, max_positions=9)
    assert whole[0][0].inputs.shape[2] == 100
    assert grid[0][0].inputs.shape[2] == 9
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), measured(grid), measured(whole))


@pytest.mark.parametrize(
    "network",
    [
        lambda p, x: jnp.einsum("nd,dhk->nhk", x, p["w"]) + p["b"].T,
        lambda p, x: jnp.swapaxes(jnp.einsum("nd,dhk->nhk", x, p["w"]), 1, 2) + p["b"],
        lambda p, x: jnp.swapaxes(jnp.einsum("nd,dhk->nhk", x, p["w"]), 1, 2).reshape(N, 4) + p["b"].reshape(4),
        lambda p, x: jnp.einsum("nd,dhk->nhk", x, p["w"]) + p["b"][::-1],
        lambda p, x: jnp.einsum("ntd,dhk->nthk", x[:, None], p["w"]).reshape(-1, 2) + p["b"][:, 0],
    ],
    ids=["transposed", "behind-transpose", "merged", "reversed", "some-features"],
)
def test_a_bias_whose_entries_change_places_stays_alone(network):
    params, x = {"w": normal(3, 2, 2), "b": normal(2, 2)}, normal(N, 3)
    found = optcurv.layers(lambda p: jnp.mean(network(p, x)), params)
    assert found.found[0].bias is None
    assert list(found.others) == ["['b']"]


def test_what_is_added_along_positions_is_no_bias():
    params, x = {"w": normal(3, 4), "b": normal(4)}, normal(N, 4, 3)
    loss = lambda p: jnp.mean(x @ p["w"] + p["b"][:, None])  # noqa: E731
    assert optcurv.layers(loss, params).found[0].bias is None


@pytest.mark.parametrize(
    "kernel_of",
    [
        lambda p: jnp.broadcast_to(p["v"], (3, 4)),
        lambda p: jnp.concatenate([p["v"], p["w"] * 2.0]),
        lambda p: jnp.concatenate([p["v"], p["w"]], axis=0).reshape(4, 3).T,
        lambda p: jnp.concatenate([p["v"], p["w"]], axis=0).T.reshape(3, 4),
    ],
    ids=["repeated", "scaled", "reshaped", "transposed"],
)
def test_kernels_that_are_not_their_entries_rearranged_are_no_layers(kernel_of):
    params, x = {"v": normal(1, 4), "w": normal(2, 4), "head": normal(4, 2)}, normal(N, 3)

    def loss(p):
        kernel = kernel_of(p)
        return jnp.mean((x[:, : kernel.shape[0]] @ kernel) @ p["head"])

    found = optcurv.layers(loss, params)
    assert [layer.path for layer in found.found] == ["['head']"]

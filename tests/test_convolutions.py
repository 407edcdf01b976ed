import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export
from jax.sharding import PartitionSpec as P

import optcurv
from optcurv.convolutions import with_canonical_convolutions

CURVATURES = [optcurv.hessian_product, optcurv.gauss_newton_product]
NCHW = ("NCHW", "OIHW", "NCHW")


def assert_close(actual, expected, tolerance):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max())


def normal(seed, *shape, dtype=jnp.float32):
    return (0.3 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def two_layers(kernel_shape, input_shape, *, dtype=jnp.float32, layer=jax.lax.conv_general_dilated, **options):
    """Two convolutions with a nonlinearity between: a Hessian of them holds every kind of product."""
    spatial = len(kernel_shape) - 2
    options = {
        "window_strides": (1,) * spatial,
        "padding": "SAME",
        "dimension_numbers": channels_last(spatial),
    } | options
    x = normal(0, *input_shape, dtype=dtype)
    params = {"first": normal(1, *kernel_shape, dtype=dtype), "second": normal(2, *kernel_shape, dtype=dtype)}
    return lambda p: layer(jnp.tanh(layer(x, p["first"], **options)), p["second"], **options), params


def channels_last(spatial):
    letters = "DHW"[-spatial:]
    return f"N{letters}C", f"{letters}IO", f"N{letters}C"


def flax_network(layers, **apply_options):
    network, x = nn.Sequential(layers), normal(0, 2, 6, 5, 3)
    variables = jax.jit(network.init)(jax.random.key(1), x)
    rest = {name: value for name, value in variables.items() if name != "params"}
    return lambda p: network.apply({"params": p, **rest}, x, **apply_options), variables["params"]


def repeated_by_scan():
    step = nn.scan(
        lambda layer, x, _: (jnp.tanh(layer(x)), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=2,
    )

    class Repeated(nn.Module):
        @nn.compact
        def __call__(self, x):
            return step(nn.Conv(3, (3, 3)), x, None)[0]

    return flax_network([Repeated()])


def chosen_by_cond():
    model_fn, params = two_layers((3, 3, 3, 3), (2, 6, 5, 3))
    return lambda p: jax.lax.cond(p["first"][0, 0, 0, 0] > 0, lambda q: 2 * model_fn(q), model_fn, p), params


def recomputed():
    model_fn, params = two_layers((3, 3, 3, 3), (2, 6, 5, 3))
    return jax.checkpoint(jax.jit(model_fn)), params


def pooled_and_normalised():
    layers = [
        nn.Conv(4, (3, 3)),
        nn.BatchNorm(use_running_average=False),
        lambda x: nn.max_pool(jnp.tanh(x), (2, 2), strides=(2, 2)),
        nn.Conv(4, (2, 2)),
        lambda x: nn.avg_pool(x, (2, 2)),
    ]
    return flax_network(layers, mutable=True)


MODELS = {
    "1-D, bfloat16": lambda: two_layers((3, 3, 3), (2, 7, 3), dtype=jnp.bfloat16),
    "3-D, float64": lambda: two_layers((3, 2, 2, 3, 3), (2, 4, 3, 5, 3), dtype=jnp.float64),
    "NCHW": lambda: two_layers((3, 3, 3, 2), (2, 3, 6, 5), dimension_numbers=NCHW),
    "strided": lambda: two_layers((3, 3, 3, 3), (2, 9, 8, 3), window_strides=(2, 1), padding="VALID"),
    "padded, dilated": lambda: two_layers(
        (3, 3, 3, 3), (2, 6, 5, 3), padding=((2, 0), (1, 3)), lhs_dilation=(2, 1), rhs_dilation=(1, 2)
    ),
    "grouped, NCHW": lambda: two_layers((6, 2, 3, 3), (4, 6, 6, 5), dimension_numbers=NCHW, feature_group_count=3),
    "depthwise": lambda: two_layers((3, 3, 1, 3), (2, 6, 5, 3), feature_group_count=3),
    "pool, batch norm": pooled_and_normalised,
    "checkpoint": recomputed,
    "scan": repeated_by_scan,
    "cond": chosen_by_cond,
}
TOLERANCES = {jnp.dtype(jnp.float32): 1e-5, jnp.dtype(jnp.float64): 1e-12, jnp.dtype(jnp.bfloat16): 0.05}


def composite(model_fn):
    def outputs(params):
        result = model_fn(params)
        return result[0] if isinstance(result, tuple) else result

    return optcurv.Composite(
        outputs, lambda out: jnp.mean(jnp.log(jnp.cosh(out.astype(jnp.result_type(out, jnp.float32)))))
    )


def plain_product(curvature, loss, params, vector):
    """The product by JAX alone."""
    if curvature is optcurv.hessian_product:
        return jax.jvp(jax.grad(loss), (params,), (vector,))[1]
    outputs, jacobian_product = jax.jvp(loss.model_fn, (params,), (vector,))
    _, transposed_product = jax.vjp(loss.model_fn, params)
    (result,) = transposed_product(jax.jvp(jax.grad(loss.loss_fn), (outputs,), (jacobian_product,))[1])
    return result


def in_a_loop(product, vector, steps):
    """As many products as `steps` says, which is traced: XLA would do away with a loop of one."""
    return jax.lax.fori_loop(0, steps, lambda _, v: jax.named_scope("looped_product")(product)(v), vector)


def looped_convolutions(compiled):
    """The orders of dimensions in the loop, as `b01f_01io->b01f`."""
    lines = [line for line in compiled.as_text().splitlines() if "looped_product" in line]
    # XLA swaps an image with a larger kernel, which it reverses, in the entry computation as well.
    return {labels for line in lines if "rhs_reversal" not in line for labels in re.findall(r"dim_labels=(.+?),", line)}


@pytest.mark.parametrize("model", MODELS)
def test_products_in_a_loop_are_right_and_canonical(model):
    with jax.enable_x64("float64" in model):
        model_fn, params = MODELS[model]()
        loss = composite(model_fn)
        vector = jax.tree.map(lambda p: normal(3, *p.shape, dtype=p.dtype), params)

        def products(params, vector, steps):
            return [in_a_loop(curvature(loss, params), vector, steps) for curvature in CURVATURES]

        def plain_products(params, vector):
            return [plain_product(curvature, loss, params, vector) for curvature in CURVATURES]

        compiled = jax.jit(products).lower(params, vector, 1).compile()
        actual, expected = compiled(params, vector, 1), jax.jit(plain_products)(params, vector)
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert a.dtype == e.dtype
            assert_close(np.asarray(a, float), np.asarray(e, float), TOLERANCES[a.dtype])
        found = looped_convolutions(compiled)
        assert found
        assert found <= {"b0f_0io->b0f", "b01f_01io->b01f", "b012f_012io->b012f"}


def forward(image, kernel, **options):
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=NCHW, **options)


def rewritten(image, kernel, **options):
    """`forward` with its convolution rewritten, as a function of the kernel that closes over the image."""
    return with_canonical_convolutions(lambda k: forward(image, k, **options), kernel)(kernel)


def lowered(fn, *platforms):
    image, kernel = normal(0, 2, 3, 6, 5), normal(1, 4, 3, 3, 3)

    def loop(kernel):
        step = fn(lambda k: forward(image, k), kernel)
        return jax.lax.fori_loop(0, 3, lambda _, k: k + jnp.mean(step(k)), kernel)

    return jax.jit(loop).trace(kernel).lower(lowering_platforms=platforms).compiler_ir("hlo").as_hlo_text()


def test_accelerators_get_the_very_same_program():
    for platform in ("cuda", "tpu"):
        assert lowered(with_canonical_convolutions, platform) == lowered(lambda fn, _: fn, platform)
    on_cpu = lowered(with_canonical_convolutions, "cpu")
    assert "dim_labels=b01f_01io->b01f" in on_cpu
    assert "conditional" not in on_cpu


def test_product_exports_for_all_platforms_at_once():
    model_fn, params = MODELS["NCHW"]()
    loss = composite(model_fn)
    fn = jax.jit(lambda p: in_a_loop(optcurv.gauss_newton_product(loss, p), p, 1))
    exported = export.export(fn, platforms=["cpu", "cuda", "tpu"])(params)
    assert_close(exported.call(params), fn(params), 1e-6)


def test_function_without_foreign_convolutions_keeps_its_operations_and_is_traced_once():
    image, kernel = normal(0, 2, 6, 5, 3), normal(1, 3, 3, 3, 4)
    canonical = functools.partial(nn.Conv(4, (3, 3)).apply, {"params": {"kernel": kernel, "bias": jnp.zeros(4)}})
    for fn in (jnp.sin, jax.jit(jnp.sin), canonical):
        traces = []
        counted = lambda image, fn=fn, traces=traces: traces.append(1) or fn(image)  # noqa: E731
        rewritten = with_canonical_convolutions(counted, image)
        assert str(jax.make_jaxpr(rewritten)(image)) == str(jax.make_jaxpr(fn)(image))
        assert len(traces) == 1


def test_convolution_keeps_its_precision_and_wider_result():
    image, kernel = normal(0, 2, 3, 6, 5, dtype=jnp.bfloat16), normal(1, 4, 3, 3, 3, dtype=jnp.bfloat16)
    options = {"precision": "high", "preferred_element_type": jnp.float32}
    lowered_rewritten = jax.jit(functools.partial(rewritten, **options)).lower(image, kernel)
    (result,) = jax.tree.leaves(lowered_rewritten.out_info)
    assert result.dtype == jnp.float32
    assert "precision_config = [#stablehlo<precision HIGH>, #stablehlo<precision HIGH>]" in lowered_rewritten.as_text()


def without_jit(fn, *args):
    with jax.disable_jit():
        return fn(*args)


def over_devices(fn, *args):
    parts = jax.shard_map(fn, mesh=mesh(), in_specs=(P("data"), P()), out_specs=P("data"))
    return jax.jit(parts)(*args)


def sharded(fn, image, kernel):
    return jax.jit(fn)(jax.device_put(image, jax.NamedSharding(mesh(), P("data"))), kernel)


def mesh():
    return jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def stacked(array):
    return jnp.stack([array, 2 * array])


USES = {
    "eagerly": lambda fn, x, k: fn(x, k),
    "disable_jit": without_jit,
    "vmap over kernels": lambda fn, x, k: jax.jit(jax.vmap(fn, (None, 0)))(x, stacked(k)),
    "vmap over both": lambda fn, x, k: jax.jit(jax.vmap(fn))(stacked(x), stacked(k)),
    "scan over images": lambda fn, x, k: jax.lax.scan(lambda _, y: (None, fn(y, k)), None, stacked(x))[1],
    "derivatives": lambda fn, x, k: jax.jit(jax.hessian(lambda *args: jnp.sum(fn(*args) ** 3), (0, 1)))(x, k),
    "checkpoint": lambda fn, x, k: jax.jit(jax.grad(jax.checkpoint(lambda y: jnp.sum(fn(y, k) ** 2))))(x),
    "shard_map": over_devices,
    "NamedSharding": sharded,
}


@pytest.mark.parametrize("use", USES)
def test_rewritten_function_closes_over_traced_values_and_transforms(use):
    args = normal(0, 2, 2, 4, 3), normal(1, 3, 2, 3, 3)
    assert_close(USES[use](rewritten, *args), USES[use](forward, *args), 1e-5)


def test_model_sharded_by_hand_is_left_alone():
    """Nothing public sets the context that the body of a `shard_map` is traced in."""
    image, params = normal(0, 2, 2, 4, 3), normal(1, 3, 2, 3, 3)
    model_fn = jax.shard_map(forward, mesh=mesh(), in_specs=(P("data"), P()), out_specs=P("data"))
    loss = composite(lambda kernel: model_fn(image, kernel))
    expected = jax.jit(functools.partial(plain_product, optcurv.gauss_newton_product, loss))(params, params)
    assert_close(jax.jit(lambda p: optcurv.gauss_newton_product(loss, p)(p))(params), expected, 1e-5)

"""Makes convolutions as fast inside loops as outside, by rewriting jaxprs, JAX's own form of a traced function."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


def with_canonical_convolutions(fn: Callable[[Any], Any], argument: Any) -> Callable[[Any], Any]:
    """Makes a function's convolutions as fast inside a loop as outside on a CPU.

    XLA:CPU has a fast convolution for one order of dimensions only, and brings others into that order in a program's
    entry but not inside `while`, `scan` or `cond`, where a weight gradient then takes some fifty times as long
    (https://github.com/jax-ml/jax/issues/12868). Here each such convolution becomes one in canonical order between
    transposes, on CPUs alone. Nested functions (`jit`, `scan`, `cond`, `jax.checkpoint`, ...) are rewritten too,
    except the body of a `shard_map`.

    Args:
      fn: a function of one pytree of arrays. It may close over traced values.
      argument: a pytree of arrays of the shapes and dtypes that `fn` is to be called with.

    Returns:
      A function equal to `fn` to rounding, and of the very same operations where it holds no such convolution. `fn`
      is traced here and never again.
    """
    traced, out_shape = jax.make_jaxpr(fn, return_shape=True)(argument)
    rewritten = _rewritten(traced)
    out_structure = jax.tree.structure(out_shape)

    def canonical_fn(argument: Any) -> Any:
        results = core.jaxpr_as_fun(rewritten)(*jax.tree.leaves(argument))
        return jax.tree.unflatten(out_structure, results)

    return canonical_fn


def _rewritten(jaxpr: Any) -> Any:
    """Returns a jaxpr of the same signature with canonical convolutions, or itself if there is nothing to do."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)  # JAX 0.10 wraps a jaxpr with its constants, JAX 0.12 has one class
    eqns = [new for eqn in inner.eqns for new in _rewritten_equation(eqn)]
    if eqns == inner.eqns:
        return jaxpr
    rewritten = inner.replace(eqns=eqns)
    return rewritten if inner is jaxpr else jaxpr.replace(jaxpr=rewritten)


def _rewritten_equation(eqn: core.JaxprEqn) -> list[core.JaxprEqn]:
    if eqn.primitive.name == "custom_lin":  # JAX itself would raise, but under jit not before it compiles
        raise TypeError(
            "This product differentiates the model forwards, and a function in it has only the backward derivative of "
            "jax.custom_vjp. Define it by jax.custom_jvp, which serves both directions, or choose "
            "curvature=optcurv.hessian_product."
        )
    if eqn.primitive.name == "conv_general_dilated":
        dimensions = eqn.params["dimension_numbers"]
        return [eqn] if dimensions == _canonical_dimensions(len(dimensions.lhs_spec)) else _canonical_equations(eqn)
    if eqn.primitive.name == "shard_map":  # nothing public sets what its body is traced under
        return [eqn]
    params = {name: _rewritten_parameter(value) for name, value in eqn.params.items()}
    unchanged = all(params[name] is value for name, value in eqn.params.items())
    return [eqn if unchanged else eqn.replace(params=params)]


def _rewritten_parameter(value: Any) -> Any:
    """Rewrites a parameter that is a jaxpr, or a tuple of them (the branches of a `cond`)."""
    if is_jaxpr(value):
        return _rewritten(value)
    if type(value) is tuple and all(map(is_jaxpr, value)):
        branches = tuple(map(_rewritten, value))
        return value if all(map(operator.is_, branches, value)) else branches
    return value


def is_jaxpr(value: Any) -> bool:
    """Tells whether a value is a jaxpr, with or without its constants."""
    return isinstance(getattr(value, "jaxpr", value), core.Jaxpr)


def _canonical_equations(eqn: core.JaxprEqn) -> list[core.JaxprEqn]:
    """Returns the equations that replace a convolution: a canonical one on a CPU, the unchanged one elsewhere."""
    plain = functools.partial(jax.lax.conv_general_dilated, **eqn.params)
    canonical = functools.partial(_canonical_convolution, **eqn.params)

    def convolution(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(lhs, rhs, cpu=canonical, default=plain)

    traced = jax.make_jaxpr(convolution)(*(operand.aval for operand in eqn.invars)).jaxpr
    names: dict[Any, Any] = dict(zip([*traced.invars, *traced.outvars], [*eqn.invars, *eqn.outvars], strict=True))
    return [
        new.replace(
            invars=[names.get(variable, variable) for variable in new.invars],
            outvars=[names.get(variable, variable) for variable in new.outvars],
            source_info=eqn.source_info,
            ctx=eqn.ctx,
        )
        for new in traced.eqns
    ]


def _canonical_dimensions(num_dims: int) -> jax.lax.ConvDimensionNumbers:
    """Batch, spatial dimensions, features; of the kernel: spatial dimensions, inputs, outputs."""
    spatial, last = range(1, num_dims - 1), num_dims - 1
    image = (0, last, *spatial)
    return jax.lax.ConvDimensionNumbers(image, (last, last - 1, *range(num_dims - 2)), image)


def _canonical_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    dimension_numbers: jax.lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    **params: Any,
) -> jax.Array:
    """A convolution as transposes around one of canonical dimensions; XLA:CPU folds none of them back."""
    canonical = _canonical_dimensions(lhs.ndim)
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    lhs = jnp.moveaxis(lhs, lhs_spec, canonical.lhs_spec)
    rhs = jnp.moveaxis(rhs, rhs_spec, canonical.rhs_spec)
    if batch_group_count > 1:  # groups of the batch become groups of the features
        lhs = lhs.reshape(batch_group_count, -1, *lhs.shape[1:])
        lhs = jnp.moveaxis(lhs, 0, -2).reshape(*lhs.shape[1:-1], -1)
    out = jax.lax.conv_general_dilated(
        lhs,
        rhs,
        dimension_numbers=canonical,
        feature_group_count=feature_group_count * batch_group_count,  # never both above 1
        **params,
    )
    return jnp.moveaxis(out, canonical.out_spec, out_spec)

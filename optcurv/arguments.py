"""What every method does with its arguments: checks, schedules, accumulation dtype."""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

PyTree: TypeAlias = Any
"""Any nesting of arrays that JAX knows: parameters, gradients, batches."""

ValueFn: TypeAlias = Callable[..., Any]
"""A loss as a function of the parameters: returns a scalar, or a pair whose first is the scalar."""


def check_number(
    name: str, value: Any, *, minimum: float = -math.inf, maximum: float = math.inf, exclusive: bool = False
) -> None:
    """Raises `ValueError` if a plain number lies outside `[minimum, maximum]`, or on an `exclusive` minimum.

    Schedules and traced values (`optax.inject_hyperparams`) have no value yet and pass.
    """
    if callable(value) or isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number or a schedule, got {value!r}.")
    below = value <= minimum if exclusive else value < minimum
    if below or value > maximum or not math.isfinite(value):
        lower = f"{'>' if exclusive else '>='} {minimum:g}"
        upper = f" and <= {maximum:g}" if maximum < math.inf else ""
        raise ValueError(f"{name} must be finite, {lower}{upper}, got {value!r}.")


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is a Python integer of at least one (it shapes the compiled program)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be a Python int, got {value!r}. Under optax.inject_hyperparams name it in static_args."
        )
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def required_value_fn(method: str, params: PyTree, value_fn: ValueFn | None) -> ValueFn:
    """Returns `value_fn`; raises if `update` of `method` was called without it or without params."""
    call = "update(updates, state, params, value_fn=loss)"
    if params is None:
        raise ValueError(f"{method} needs params: call {call}.")
    if value_fn is None:
        raise TypeError(
            f"{method} needs the extra argument value_fn, the loss as a function of params: call {call}. "
            "(If you did, a wrapper dropped it: optax.chain around optax.MultiSteps or optax.lookahead does; "
            "put such a wrapper outermost.)"
        )
    return value_fn


def scalar_fn(value_fn: ValueFn) -> Callable[[PyTree], jax.Array]:
    """Returns `value_fn` without its auxiliary output, checked to be a real scalar."""
    if not callable(value_fn):
        raise TypeError(f"The loss must be a function of params, got {type(value_fn).__name__}.")

    def scalar(params: PyTree) -> jax.Array:
        value = value_fn(params)
        if isinstance(value, tuple) and len(value) == 2:
            value, _ = value
        value = jnp.asarray(value)
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"The loss must be a real scalar, or a pair whose first is one, got {value.dtype}{value.shape}. "
                "Reduce per-example losses, for example with .mean()."
            )
        return value

    return scalar


def scheduled(
    value: optax.ScalarOrSchedule, count: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """Returns a schedule's value at step `count`, or the constant itself."""
    return jnp.asarray(value(count) if callable(value) else value, dtype)


def wide_dtype(tree: PyTree) -> jax.typing.DTypeLike:
    """Returns the leaves' common dtype, or float32 where that is narrower.

    Inner products and recurrences live in it: bfloat16 would ruin them.
    """
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(tree))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError("Parameters must be real; make real and imaginary parts leaves of their own.")
    return dtype


def at_least_float32(tree: PyTree) -> PyTree:
    """Casts all leaves to their `wide_dtype`."""
    dtype = wide_dtype(tree)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def vector_space(params: PyTree) -> tuple[PyTree, int]:
    """Returns the parameters in at least float32, and how many numbers they are; raises if there is none."""
    params = at_least_float32(params)
    dimension = sum(leaf.size for leaf in jax.tree.leaves(params))
    if dimension == 0:
        raise ValueError("params must hold at least one number; these are empty.")
    return params, dimension


def key_or_default(key: chex.PRNGKey | None) -> chex.PRNGKey:
    """Returns the key, or the one that stands for none."""
    return jax.random.key(0) if key is None else key


def path_name(path: tuple[Any, ...]) -> str:
    """Writes the path of a leaf; the same for an nnx variable and for its value, which optimisers see in turn."""
    is_value = path and path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(path[:-1] if is_value else path)

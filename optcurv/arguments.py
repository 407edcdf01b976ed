"""What every method does with its arguments: checks, schedules, accumulation dtype."""

import inspect
import math
import numbers
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
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    exclusive: bool = False,
    constant: bool = False,
) -> None:
    """Raises `ValueError` if a plain number lies outside `[minimum, maximum]`, or equals an `exclusive` minimum.

    Of a schedule only its one argument is checked; it is refused where the number must be `constant`. Traced values
    (`optax.inject_hyperparams`) pass, as they are not known yet.
    """
    if isinstance(value, jax.Array):
        return
    if callable(value) and not constant:
        check_function(name, value, "count", "if it is no number, as optax's schedules are")
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        kind = "a number" if constant else "a number or a schedule"
        raise TypeError(f"{name} must be {kind}, got {describe(value)}.")
    number = float(value)
    below = number <= minimum if exclusive else number < minimum
    if below or number > maximum or not math.isfinite(number):
        lower = "" if minimum == -math.inf else f", {'>' if exclusive else '>='} {minimum:g}"
        upper = f" and <= {maximum:g}" if maximum < math.inf else ""
        raise ValueError(f"{name} must be finite{lower}{upper}, got {value!r}.")


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is a Python integer of at least one (it shapes the compiled program)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be a Python int, got {value!r}. Under optax.inject_hyperparams name it in static_args."
        )
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def check_seed(name: str, value: Any) -> None:
    """Raises `TypeError` unless `value` is an integer, of Python, NumPy or JAX."""
    whole = isinstance(value, numbers.Integral) or (
        isinstance(value, jax.Array) and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)
    )
    if isinstance(value, bool) or not whole:
        raise TypeError(f"{name} must be an integer, got {describe(value)}.")


def check_function(name: str, value: Any, arguments: str, remedy: str) -> None:
    """Raises `TypeError` unless `value` can be called with these positional arguments, such as "key, outputs"."""
    problem = "" if callable(value) else "it cannot be called"
    try:
        inspect.signature(value).bind(*arguments.split(", "))
    except ValueError:  # some functions written in C do not show their arguments
        pass
    except TypeError as error:
        problem = problem or str(error)
    if problem:
        raise TypeError(f"{name} must be a function of ({arguments}), {remedy}; got {describe(value)}: {problem}.")


def check_transformation(name: str, value: Any) -> None:
    """Raises `TypeError` unless `value` is an optax transformation."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise TypeError(f"{name} must be an optax transformation such as optax.adam(1e-3), got {describe(value)}.")


def checked(
    method: str,
    init: optax.TransformInitFn,
    update: Callable[..., tuple[PyTree, PyTree]],
    *,
    needs_loss: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation of `init` and an `update` that first checks what it is called with.

    Everything is checked while the update is traced, so that a compiled step pays nothing. Where params hold no number,
    as in an empty group of `optax.partition`, there is nothing to optimise: updates and state are returned as they are,
    as optax's own optimisers do.

    Args:
      method: its name, for the messages.
      init: of the transformation. A state must look like the one that it makes for the parameters.
      update: of the transformation.
      needs_loss: whether `update` needs `params` and `value_fn`; all leaves must then be real and floating.

    Raises:
      ValueError: if params are missing or the gradients or the state do not fit them.
      TypeError: if another argument is missing or has the wrong type.
    """

    def checked_update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        given = {name: value for name, value in extra_args.items() if value is not None}
        like = updates if params is None else params
        if needs_loss:
            _check_loss(method, params, given)
        check_like("updates", updates, like)
        if not any(getattr(leaf, "size", 1) for leaf in jax.tree.leaves(updates)):
            return updates, state
        gradients = {"updates": updates} | ({"grad": given["grad"]} if "grad" in given else {})
        for name, tree in gradients.items():
            check_like(name, tree, like)
        if needs_loss:
            for name, tree in ({"params": params} | gradients).items():
                _check_real(name, tree)
        for name in {"value", "monitored_value"} & set(given):
            _check_scalar(name, given[name])
        _check_state(method, state, init, like)
        return update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, checked_update)


def _check_loss(method: str, params: PyTree, given: dict[str, Any]) -> None:
    call = "update(updates, state, params, value_fn=loss)"
    if params is None:
        raise ValueError(f"{method} needs params: call {call}.")
    if "value_fn" not in given:
        raise TypeError(
            f"{method} needs the extra argument value_fn, the loss as a function of params: call {call}. "
            "(If you did, a wrapper dropped it: optax.chain around optax.MultiSteps or optax.lookahead does; "
            "put such a wrapper outermost.)"
        )
    for name in {"value_fn", "curvature_value_fn"} & set(given):
        remedy = f"with the batch in its closure, as in {name}=lambda params: loss(params, batch)"
        check_function(name, given[name], "params", remedy)


def check_like(name: str, tree: PyTree, params: PyTree) -> None:
    """Raises `ValueError` unless a tree has the structure of the parameters and their shapes."""
    problem = difference(name, tree, "params", params)
    structure, expected = jax.tree.structure(tree), jax.tree.structure(params)
    if not problem and structure != expected:
        problem = f"{name} has the structure {structure}, and params {expected}"
    if problem:
        raise ValueError(
            f"{name} must have the structure and the shapes of params, but {problem}. Pass the gradient at these "
            "params, as in update(gradient, state, params, value_fn=loss)."
        )


def _check_state(method: str, state: PyTree, init: optax.TransformInitFn, params: PyTree) -> None:
    problem = difference("state", state, "init(params)", jax.eval_shape(init, params))
    if problem:
        raise ValueError(
            f"state must be one that {method} made for these params, but {problem}. Make it anew, with "
            "state = optimizer.init(params)."
        )


def difference(name: str, tree: PyTree, like_name: str, like: PyTree) -> str:
    """Describes the first leaf whose path or shape differs between two trees; empty if there is none."""
    shapes, expected = (
        {path: tuple(getattr(leaf, "shape", ())) for path, leaf in by_path(each).items()} for each in (tree, like)
    )
    for path in expected | shapes:
        if path not in shapes:
            return f"{like_name}{path} has no counterpart in {name}"
        if path not in expected:
            return f"{name}{path} has no counterpart in {like_name}"
        if shapes[path] != expected[path]:
            return f"{name}{path} has the shape {shapes[path]}, and {like_name}{path} {expected[path]}"
    return ""


def _check_real(name: str, tree: PyTree) -> None:
    """Raises `TypeError` unless all leaves are real floating-point numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = _typeof(leaf)
        if array is not None and jnp.issubdtype(array.dtype, jnp.complexfloating):
            raise TypeError("Parameters must be real; make real and imaginary parts leaves of their own.")
        if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{name}{path_name(path)} must hold real floating-point numbers, got {describe(leaf)}. Mask such "
                "leaves, see optcurv.masked, or keep them in the closure of the loss."
            )


def _check_scalar(name: str, value: Any) -> None:
    """Raises `TypeError` unless `value` is one real number."""
    array = _typeof(value)
    kinds = (jnp.floating, jnp.integer)
    if array is None or array.shape != () or not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(
            f"{name} must be the loss, a real scalar, got {describe(value)}. Where the loss comes with auxiliary "
            "output, as a pair (loss, aux), pass the loss alone."
        )


def _typeof(value: Any) -> Any:
    """Returns the JAX type of an array or a number, and None for anything else."""
    try:
        return jax.typeof(value)
    except TypeError:
        return None


def describe(value: Any) -> str:
    """Names a value in a message: an array by its type, a function by its name, anything else briefly."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array {value.dtype}{value.shape}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def scalar_fn(value_fn: ValueFn) -> Callable[[PyTree], jax.Array]:
    """Returns `value_fn` without its auxiliary output, checked to be a real scalar."""
    if not callable(value_fn):
        raise TypeError(f"The loss must be a function of params, got {describe(value_fn)}.")

    def scalar(params: PyTree) -> jax.Array:
        value = value_fn(params)
        if isinstance(value, tuple) and len(value) == 2:
            value, _ = value
        array = _typeof(value)
        if array is None or array.shape != () or not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"The loss must be a real scalar, or a pair (loss, aux) whose first is one, got {describe(value)}. "
                "Reduce per-example losses, for example with .mean()."
            )
        return jnp.asarray(value)

    return scalar


def scheduled(
    value: optax.ScalarOrSchedule, count: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """Returns a schedule's value at step `count`, or the constant itself."""
    return jnp.asarray(value(count) if callable(value) else value, dtype)


def wide_dtype(tree: PyTree) -> jax.typing.DTypeLike:
    """Returns the leaves' common dtype, or float32 where that is narrower.

    Inner products and recurrences are computed in it: bfloat16 would ruin them.
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
    """Returns the parameters in at least float32, and how many numbers they hold; raises if there is none."""
    params = at_least_float32(params)
    dimension = sum(leaf.size for leaf in jax.tree.leaves(params))
    if dimension == 0:
        raise ValueError("params must hold at least one number; these are empty.")
    return params, dimension


def key_or_default(key: chex.PRNGKey | None) -> chex.PRNGKey:
    """Returns the key, or a fixed one if there is none."""
    return jax.random.key(0) if key is None else key


def layout(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    """Returns a tree's structure and the shapes of its leaves."""
    return jax.tree.structure(tree), [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def by_path(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves in their order, by their paths as `path_name` writes them."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def path_name(path: tuple[Any, ...]) -> str:
    """Writes the path of a leaf, the same for an nnx variable and its value: optimisers see now one, now the other."""
    is_value = path and path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(path[:-1] if is_value else path)

"""Optimising part of the parameters, with the rest kept inside the closure."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, ValueFn, check_function, check_transformation, checked, describe
from optcurv.curvature import Composite


def masked(
    inner: optax.GradientTransformation, mask: PyTree | Callable[[PyTree], PyTree]
) -> optax.GradientTransformationExtraArgs:
    """`optax.masked` for transformations that evaluate the loss; the signs are those of `inner`.

    `optax.masked` hands `inner` only the parameters under the mask, and a loss of all of them then fails. Here `inner`
    also gets `value_fn` and `curvature_value_fn` as functions of those parameters, the others kept at their present
    values, and `grad` reduced likewise. A `Composite` stays one.

    As with `optax.masked`, updates outside the mask pass through unchanged: to freeze those parameters, set their
    updates to zero with `optax.freeze`, as in the example. Integers among the parameters belong outside of the mask;
    their updates, which `jax.grad(loss, allow_int=True)` gives the dtype float0, become zeros.

    Args:
      inner: the transformation to apply under the mask.
      mask: a pytree of booleans, a prefix of the parameters' structure, True where `inner` applies; or a function that
        returns one, given the parameters.

    Returns:
      The transformation.

    Raises:
      ValueError: when called, if the mask is no prefix of the parameters' structure, or the gradients do not fit them.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optcurv
      >>> loss = optcurv.Composite(lambda p: p["w"] * p["scale"], lambda outputs: 0.5 * jnp.sum(outputs**2))
      >>> params = {"w": jnp.array([1.0, 2.0]), "scale": jnp.array(3.0)}
      >>> optimizer = optax.chain(
      ...     optcurv.masked(optcurv.edf(1.0, damping_scale=0.0), {"w": True, "scale": False}),
      ...     optax.freeze({"w": False, "scale": True}),
      ... )
      >>> updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params, value_fn=loss)
      >>> print(optax.apply_updates(params, updates))
      {'scale': Array(3., dtype=float32), 'w': Array([0., 0.], dtype=float32)}
    """
    check_transformation("inner", inner)
    if callable(mask):
        check_function("mask", mask, "params", "which returns a pytree of booleans")
    else:
        _check_booleans(mask)

    def mask_of(tree: PyTree) -> PyTree:
        mask_tree = mask(tree) if callable(mask) else mask
        _check_booleans(mask_tree)
        try:
            jax.tree.map(lambda keep, subtree: None, mask_tree, tree)
        except ValueError as error:
            raise ValueError(f"mask must be a prefix of the structure of params: {error}") from error
        return mask_tree

    transformation = optax.masked(inner, mask_of)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, PyTree]:
        if params is not None:
            updates = jax.tree.map(_integer_zeros, updates, params)
        mask_tree = mask_of(updates)
        reduced = dict(extra_args)
        if extra_args.get("grad") is not None:
            reduced["grad"] = _under_mask(mask_tree, extra_args["grad"])
        for name in ("value_fn", "curvature_value_fn"):
            if callable(extra_args.get(name)) and params is not None:
                reduced[name] = _with_the_rest(extra_args[name], mask_tree, params)
        return transformation.update(updates, state, params, **reduced)

    return checked("masked", transformation.init, update, needs_loss=False)


def _integer_zeros(update: Any, param: Any) -> Any:
    """Returns zeros of the parameter's dtype in place of a float0, with which optax cannot compute."""
    return jnp.zeros_like(param) if getattr(update, "dtype", None) == jax.dtypes.float0 else update


def _check_booleans(mask: PyTree) -> None:
    kinds = [getattr(leaf, "dtype", type(leaf)) for leaf in jax.tree.leaves(mask)]
    if mask is None or not all(jnp.issubdtype(kind, bool) for kind in kinds):
        raise TypeError(
            "mask must be a pytree of booleans, True where inner applies, or a function that returns one given params; "
            f"got {describe(mask)}."
        )


def _under_mask(mask: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda keep, subtree: subtree if keep else optax.MaskedNode(), mask, tree)


def _with_the_rest(value_fn: ValueFn, mask: PyTree, params: PyTree) -> ValueFn:
    """Returns `value_fn` as a function of the parameters under the mask, the others as in `params`."""

    def complete(partial: PyTree) -> PyTree:
        return jax.tree.map(lambda keep, subtree, rest: subtree if keep else rest, mask, partial, params)

    if isinstance(value_fn, Composite):
        return value_fn.of(complete)

    @functools.wraps(value_fn)  # optax's line searches read the signature
    def restricted(partial: PyTree, **kwargs: Any) -> Any:
        return value_fn(complete(partial), **kwargs)

    return restricted

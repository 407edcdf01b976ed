"""Many devices: those of a `jax.shard_map` around an update, and where an optimiser's state belongs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, by_path, layout


def mesh_axes(tree: PyTree) -> tuple[str, ...]:
    """Returns the axes of the mesh along which some array differs from device to device."""
    varying = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree))
    return tuple(sorted(frozenset().union(*varying)))


def num_devices(tree: PyTree) -> int:
    """Returns the number of devices that hold parts of the arrays."""
    return math.prod(jax.lax.axis_size(axis) for axis in mesh_axes(tree))


def mean_over_devices(tree: PyTree) -> PyTree:
    """Averages arrays over the devices on which they differ."""
    return jax.tree.map(lambda leaf: jax.lax.pmean(leaf, axes) if (axes := mesh_axes(leaf)) else leaf, tree)


def own_key(key: jax.Array, tree: PyTree) -> jax.Array:
    """Returns a random key for each device that holds a part of the arrays."""
    for axis in mesh_axes(tree):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def check_splits_rows(name: str, sharding: Any) -> None:
    """Raises unless the sharding splits the first dimension of an array among devices."""
    if not isinstance(sharding, jax.NamedSharding) or not any(sharding.spec[:1]):
        raise TypeError(
            f'{name} must split the first dimension, as jax.NamedSharding(mesh, jax.P("data")): {sharding}.'
        )


def share_out(function: Callable[..., PyTree], sharding: jax.NamedSharding) -> Callable[..., PyTree]:
    """Splits the stacks a function works on among devices, and exchanges what they return.

    The function maps stacks to stacks of the same length, entry by entry. The devices are those along the
    mesh axes of the sharding's first dimension, also inside of a `jax.shard_map` over them.
    """
    mesh, axes = sharding.mesh, sharding.spec[0]
    names = (axes,) if isinstance(axes, str) else tuple(axes)

    def share(*stacks: PyTree) -> PyTree:
        number = jax.tree.leaves(stacks)[0].shape[0]
        each = math.ceil(number / jax.lax.axis_size(axes))
        mine = jax.lax.axis_index(axes) * each + jnp.arange(each)
        results = function(*jax.tree.map(lambda stack: stack[mine % number], stacks))

        def exchange(part: jax.Array) -> jax.Array:
            alone = jnp.zeros((number, *part.shape[1:]), part.dtype).at[mine].set(part, mode="drop")
            return jax.lax.psum(alone, axes)

        return jax.tree.map(exchange, results)

    manual = jax.sharding.get_abstract_mesh().manual_axes
    if set(names) <= set(manual):
        return share
    return jax.shard_map(share, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), axis_names=set(names))


def state_shardings(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Returns where each array of an optimiser's state belongs: those like a parameter go where the parameter is.

    Whatever in the state has the structure and the shapes of the parameters, such as a momentum or the axes of an
    ellipsoid, is sharded as they are; so are single arrays kept under a parameter's path. All else, scalars and
    Kronecker factors, is on every device.

    Args:
      optimizer: any optax transformation.
      params: arrays, or `jax.ShapeDtypeStruct`s, with a `jax.NamedSharding` each.

    Returns:
      Shardings in the structure of the state: for `jax.jit(optimizer.init, out_shardings=...)`, for `in_shardings` and
      `out_shardings` of a training step, or to restore a checkpoint.

    Raises:
      TypeError: if a parameter has no `NamedSharding`.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> rows = jax.NamedSharding(jax.make_mesh((1,), ("data",)), jax.P("data"))
      >>> params = jax.device_put({"kernel": jnp.ones((8, 4))}, rows)
      >>> optimizer = optcurv.edf(1.0, 2)
      >>> shardings = optcurv.state_shardings(optimizer, params)
      >>> state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    """
    shardings = jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), params)
    for sharding in jax.tree.leaves(shardings, is_leaf=lambda leaf: leaf is None):
        if not isinstance(sharding, jax.NamedSharding):
            raise TypeError(f"Every parameter must have a jax.NamedSharding, got {sharding}: see jax.device_put.")
    everywhere = jax.NamedSharding(jax.tree.leaves(shardings)[0].mesh, jax.P())
    leaves, layout_of_params = by_path(params), layout(params)

    def is_like_params(part: PyTree) -> bool:
        return layout(part) == layout_of_params

    def place(path: tuple[Any, ...], part: PyTree) -> PyTree:
        if is_like_params(part):
            return shardings
        leaf = leaves.get(getattr(path[-1], "key", ""))
        return everywhere if leaf is None or leaf.shape != part.shape else leaf.sharding

    state = jax.eval_shape(optimizer.init, params)
    return jax.tree_util.tree_map_with_path(place, state, is_leaf=is_like_params)

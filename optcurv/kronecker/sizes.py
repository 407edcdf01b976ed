"""The sizes of layers and of their factors."""

import math
from typing import Any

import jax.numpy as jnp

from optcurv.kronecker.factors import BLOCK, Structure
from optcurv.kronecker.layers import Layers


def sizes_of(layers: Layers) -> dict[str, tuple[int, int, int]]:
    """Returns the stack, in_size and out_size of each layer, by the path of its kernel."""
    return {layer.path: (layer.stack, layer.in_size, layer.out_size) for layer in layers.found}


def guessed_sizes(leaves: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    """Takes every array of several axes for the kernel of a layer whose outputs are the last."""
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves.items() if jnp.size(leaf)}
    return {path: (1, math.prod(shape[:-1]), shape[-1]) for path, shape in shapes.items() if len(shape) > 1}


def factor_shapes_of(
    structure: Structure, max_size: int, path: str, stack: int, in_size: int, out_size: int
) -> list[tuple[int, ...]]:
    """Returns the shapes of the factors of one layer; those too large are kept as diagonals."""
    sizes = structure.sizes(in_size + 1, out_size)
    if structure is BLOCK and sizes[0] > max_size:
        raise ValueError(
            f"The block of {path} would be a matrix of {sizes[0]} x {sizes[0]}, above max_factor_size = {max_size}: "
            "use optcurv.KRONECKER, or raise the limit."
        )
    return [(stack, size, size) if size <= max_size else (stack, size) for size in sizes]

"""The sizes of layers and of their factors."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from optcurv.kronecker.factors import BLOCK, Factors, Structure
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


def check_layers(
    found: Layers,
    shapes: dict[str, list[tuple[int, ...]]],
    alone: list[str],
    made_factors: Mapping[str, Factors],
    made_squares: Iterable[str],
) -> None:
    """Raises if the state, made from the parameters' shapes or from given layers, does not fit the loss."""
    made = {path: [factor.shape for factor in several] for path, several in made_factors.items()}
    fits = all(made.get(path) == several for path, several in shapes.items()) and set(made_squares) >= set(alone)
    if not fits and not found.found:
        raise ValueError(f"No layer was found in the loss: no parameter multiplies activations as it is.\n{found}")
    if not fits:
        raise ValueError(
            "The layers of the loss are not those the state was made for, which without layers= are told by the "
            "parameters' shapes alone: make the optimiser with layers=optcurv.layers(value_fn, params), which are\n"
            f"{found}"
        )

"""The options of `scale_by_kronecker`, and the shapes of the state that follow from them."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import check_count, check_function, check_number, check_seed
from optcurv.kronecker.factors import BLOCK, DIAGONAL, Structure
from optcurv.kronecker.layers import Layers
from optcurv.kronecker.samplers import OutputGradientSampler
from optcurv.sharding import check_splits_rows

Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of `scale_by_kronecker`, which explains them; checked."""

    power: chex.Numeric
    factor_decay: optax.ScalarOrSchedule
    factor_every: int
    root_every: int
    damping: optax.ScalarOrSchedule
    absolute_damping: optax.ScalarOrSchedule
    structure: Structure
    sampler: OutputGradientSampler | None
    layers: Layers | None
    batch_size: int | None
    rank: int | None
    max_factor_size: int
    max_positions: int | None
    root_sharding: jax.NamedSharding | None
    seed: int

    def __post_init__(self) -> None:
        power, structure = self.power, self.structure
        check_number("power", power, constant=True)
        if isinstance(power, numbers.Real) and float(power) >= 0:
            raise ValueError(f"power must be negative, got {power:g}: -0.5 for TSO-ALRA, -1 for the natural gradient.")
        check_number("factor_decay", self.factor_decay, minimum=0.0, maximum=1.0)
        check_number("damping", self.damping, minimum=0.0)
        check_number("absolute_damping", self.absolute_damping, minimum=0.0)
        for name in ("factor_every", "root_every", "max_factor_size"):
            check_count(name, getattr(self, name))
        for name in ("batch_size", "max_positions", "rank"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_seed("seed", self.seed)
        if not isinstance(structure, Structure):
            raise TypeError(
                f"structure must be optcurv.KRONECKER, optcurv.BLOCK or optcurv.DIAGONAL, got {structure!r}."
            )
        if self.sampler is not None:
            check_function("sampler", self.sampler, "key, outputs", "such as optcurv.sample_categorical_gradients")
        if self.layers is not None and not isinstance(self.layers, Layers):
            kind = type(self.layers).__name__
            raise TypeError(f"layers must be what optcurv.layers(value_fn, params) returns, got {kind}.")
        if self.root_sharding is not None:
            check_splits_rows("root_sharding", self.root_sharding)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The paths of parameters that are to be in no layer."""
        return () if self.layers is None else self.layers.left_out

    def shapes(
        self, layers: Layers | None, leaves: Mapping[str, Any]
    ) -> tuple[dict[str, tuple[Shape, ...]], dict[str, Shape]]:
        """Returns the shapes of the factors of layers, and of the squared gradients of parameters in none.

        Where the layers are not known yet, every array of several axes may be a kernel whose outputs are the last, and
        every parameter may be in no layer.
        """
        shapes = {path: jnp.shape(leaf) for path, leaf in leaves.items() if jnp.size(leaf)}
        members, sizes = set(), {}
        if self.structure is not DIAGONAL and layers is None:
            sizes = {path: (1, math.prod(shape[:-1]), shape[-1]) for path, shape in shapes.items() if len(shape) > 1}
        elif self.structure is not DIAGONAL and layers is not None:
            sizes = {layer.path: (layer.stack, layer.in_size, layer.out_size) for layer in layers.found}
            members = {path for layer in layers.found for path in (layer.path, layer.bias)}
        factors = {path: self._factor_shapes(path, *size) for path, size in sizes.items()}
        return factors, {path: shape for path, shape in shapes.items() if path not in members}

    def _factor_shapes(self, path: str, stack: int, in_size: int, out_size: int) -> tuple[Shape, ...]:
        """Returns the shapes of the factors of one layer; those too large are kept as diagonals."""
        sizes, limit = self.structure.sizes(in_size + 1, out_size), self.max_factor_size
        if self.structure is BLOCK and sizes[0] > limit:
            raise ValueError(
                f"The block of {path} would be a matrix of {sizes[0]} x {sizes[0]}, above max_factor_size = {limit}: "
                "use optcurv.KRONECKER, or raise the limit."
            )
        return tuple((stack, size, size) if size <= limit else (stack, size) for size in sizes)

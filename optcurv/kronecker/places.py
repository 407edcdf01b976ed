"""The places where parameters meet activations: products, spreads and lookups."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluates an equation of a jaxpr."""
    results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def shape_of(variable: Any) -> tuple[int, ...]:
    """Returns the shape of a variable of a jaxpr."""
    return variable.aval.shape


class View(NamedTuple):
    """A parameter with its entries rearranged.

    Attributes:
      leaf: its place among the parameters' leaves.
      size: how many entries it has, those of one slice.
      moves: the equations that rearrange it; casts are left out.
      sliced: for each `scan` around, outermost first, whether a slice of the parameter enters an iteration.
    """

    leaf: int
    size: int
    moves: tuple[core.JaxprEqn, ...] = ()
    sliced: tuple[bool, ...] = ()

    def __call__(self, leaf: jax.Array) -> jax.Array:
        """Rearranges an array like the parameter; slices become leading axes."""
        move = lambda x: functools.reduce(lambda x, eqn: bind(eqn, [x])[0], self.moves, x)  # noqa: E731
        return functools.reduce(lambda move, _: jax.vmap(move), range(sum(self.sliced)), move)(leaf)

    def layout(self) -> Any:
        """Returns what is equal for views that rearrange alike."""
        return self.sliced, [(eqn.primitive.name, shape_of(eqn.outvars[0]), str(eqn.params)) for eqn in self.moves]


@dataclasses.dataclass(kw_only=True)
class Place:
    """A place where parameters meet activations.

    Attributes:
      views: the parameters.
      name: of the primitive.
      out: shape and dtype of what a probe is added to.
      lengths: of every `scan` around, outermost first.
      micro_batches: for each of those scans, whether its iterations see other examples each.
      mesh_axes: of a `shard_map` around, those along which the result differs.
    """

    views: tuple[View, ...]
    name: str
    out: jax.ShapeDtypeStruct
    lengths: tuple[int, ...] = ()
    micro_batches: tuple[bool, ...] = ()
    mesh_axes: tuple[str, ...] = ()


@dataclasses.dataclass(kw_only=True)
class Product(Place):
    """Parameters multiply activations in a matrix product or a convolution; the probe is added to the result.

    Attributes:
      params: of the equation.
      axis: of the operand, along which several parameters that make it up are side by side.
      shape: of the operand.
      comes_first: whether the parameters are the left operand.
      bias: the parameters added to the result, if any, as `views`.
    """

    params: dict[str, Any]
    axis: int | None
    shape: tuple[int, ...]
    comes_first: bool
    bias: tuple[View, ...] = ()

    @property
    def is_convolution(self) -> bool:
        """Whether it is one, or else a matrix product."""
        return self.name == "conv_general_dilated"

    def parameter_axes(self) -> tuple[list[int], list[int], list[int]]:
        """Returns the axes of the parameters' operand that a matrix product stacks, sums over and leaves."""
        contracted, batch = (list(axes[0 if self.comes_first else 1]) for axes in self.params["dimension_numbers"])
        return batch, contracted, [axis for axis in range(len(self.shape)) if axis not in {*batch, *contracted}]

    def stack_axes(self) -> list[int]:
        """Returns the axes of the result that tell a stack of matrix products apart."""
        return [] if self.is_convolution else list(range(len(self.parameter_axes()[0])))

    def feature_axes(self) -> list[int]:
        """Returns the axes of the result that the parameters bring into it."""
        if self.is_convolution:
            return [self.params["dimension_numbers"].out_spec[1]]
        batch, _, free = self.parameter_axes()
        first = len(batch) if self.comes_first else len(self.out.shape) - len(free)
        return list(range(first, first + len(free)))


@dataclasses.dataclass(kw_only=True)
class Spread(Place):
    """A parameter is repeated along activations, such as a scale or an offset; the probe is added to the repeated one.

    Its activations are the derivative of what is repeated by the parameter, entry by entry: ones for the parameter
    itself, or what one operation or another on each entry makes of it.

    Attributes:
      axes: of the result, along which the parameter is not repeated.
    """

    axes: tuple[int, ...]


@dataclasses.dataclass(kw_only=True)
class Lookup(Place):
    """Rows of a parameter are looked up, as in an embedding; the probe is added to them, the activations are indices.

    Attributes:
      mode: what becomes of an index out of bounds.
    """

    mode: Any

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
      path: of the parameter, as `path_name` writes it.
      size: how many entries it has; inside a `scan` over its slices, how many a slice has.
      moves: the equations that rearrange it, without casts.
      sliced: for each surrounding `scan`, outermost first, whether an iteration gets a slice of the parameter.
    """

    path: str
    size: int
    moves: tuple[core.JaxprEqn, ...] = ()
    sliced: tuple[bool, ...] = ()

    def __call__(self, leaf: jax.Array) -> jax.Array:
        """Rearranges an array of the parameter's shape; the slices that scans take become leading axes."""
        move = lambda x: functools.reduce(lambda x, eqn: bind(eqn, [x])[0], self.moves, x)  # noqa: E731
        return functools.reduce(lambda move, _: jax.vmap(move), range(sum(self.sliced)), move)(leaf)

    def layout(self) -> Any:
        """Returns a value that is equal for views that rearrange their parameters in the same way."""
        return self.sliced, [(eqn.primitive.name, shape_of(eqn.outvars[0]), str(eqn.params)) for eqn in self.moves]


@dataclasses.dataclass(kw_only=True)
class Place:
    """A place where parameters meet activations.

    Attributes:
      views: the parameters.
      name: of the primitive.
      out: shape and dtype of the array that a probe is added to.
      lengths: of the surrounding scans, outermost first.
      micro_batches: for each of those scans, whether every iteration sees examples of its own.
      mesh_axes: the axes of a surrounding `shard_map` along which the result differs.
    """

    views: tuple[View, ...]
    name: str
    out: jax.ShapeDtypeStruct
    lengths: tuple[int, ...] = ()
    micro_batches: tuple[bool, ...] = ()
    mesh_axes: tuple[str, ...] = ()

    @property
    def probe_shape(self) -> tuple[int, ...]:
        """The shape of a probe for all iterations."""
        return (*self.lengths, *self.out.shape)


@dataclasses.dataclass(kw_only=True)
class Product(Place):
    """Parameters multiply activations in a matrix product or a convolution; the probe is added to the result.

    Attributes:
      params: of the equation.
      axis: of the operand that the parameters make up, the one along which they are joined; None for one parameter.
      shape: of that operand.
      comes_first: whether it is the left operand.
      bias: the parameters added to the result, if any.
    """

    params: dict[str, Any]
    axis: int | None
    shape: tuple[int, ...]
    comes_first: bool
    bias: tuple[View, ...] = ()

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution; otherwise it is a matrix product."""
        return self.name == "conv_general_dilated"

    def parameter_axes(self) -> tuple[list[int], list[int], list[int]]:
        """Returns the batch, contracted and remaining axes of the parameters' operand of a matrix product."""
        contracted, batch = (list(axes[0 if self.comes_first else 1]) for axes in self.params["dimension_numbers"])
        return batch, contracted, [axis for axis in range(len(self.shape)) if axis not in {*batch, *contracted}]

    def stack_axes(self) -> list[int]:
        """Returns the axes of the result that number the products of a stack."""
        return [] if self.is_convolution else list(range(len(self.parameter_axes()[0])))

    def feature_axes(self) -> list[int]:
        """Returns the axes of the result that come from the parameters."""
        if self.is_convolution:
            return [self.params["dimension_numbers"].out_spec[1]]
        batch, _, free = self.parameter_axes()
        first = len(batch) if self.comes_first else len(self.out.shape) - len(free)
        return list(range(first, first + len(free)))


@dataclasses.dataclass(kw_only=True)
class Spread(Place):
    """A parameter, such as a scale or an offset, is broadcast to the activations; the probe is added to the broadcast.

    What is broadcast may be a function of each entry, such as its exponential. The activations of this place are its
    derivative by the parameter: ones for the parameter itself.

    Attributes:
      axes: of the result, those along which the parameter is not repeated.
    """

    axes: tuple[int, ...]


@dataclasses.dataclass(kw_only=True)
class Lookup(Place):
    """Rows of a parameter are looked up, as in an embedding; the probe is added to the rows.

    The activations of this place are the indices.

    Attributes:
      mode: of the `gather`, for indices out of bounds.
    """

    mode: Any

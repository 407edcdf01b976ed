"""Marks: what is known of a value in a jaxpr that depends on parameters."""

import functools
import math
import operator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core

from optcurv.kronecker.places import Lookup, Product, View, bind, shape_of

MOVES = {"reshape", "transpose", "squeeze", "broadcast_in_dim", "rev"}


CASTS = {"convert_element_type", "copy", "name", "pvary"}


ENTRYWISE = {
    *{"add", "sub", "mul", "div", "neg", "max", "min", "pow", "integer_pow", "square", "abs", "sqrt", "rsqrt"},
    *{"exp", "log", "log1p", "expm1", "tanh", "logistic"},
}


class Joined(NamedTuple):
    """Parameters concatenated along an axis."""

    views: tuple[View, ...]
    axis: int


class Entrywise(NamedTuple):
    """A function applied to each entry of a parameter, and its derivative there."""

    view: View
    derivative: jax.Array
    name: str  # of the first operation


class Function(NamedTuple):
    """Any other function of parameters alone; for each of them, by path, the first operation it goes into."""

    sources: dict[str, str]


class Result(NamedTuple):
    """The result of a product, perhaps rearranged.

    An axis of the product's result that numbers its stack or its features has its position among those as its place,
    (0,), (1,), ...; an axis that was split has places (i, 0), (i, 1), ... These sort in the original order.

    Attributes:
      product: the product.
      places: the place of each axis, None for an axis of rows.
    """

    product: Product
    places: tuple[tuple[int, ...] | None, ...]


Mark: TypeAlias = View | Joined | Entrywise | Function | Result | None
"""What a value is; None where it is nothing that is followed any further."""


def size_of(variable: Any) -> int:
    """Returns how many entries a variable of a jaxpr has."""
    return math.prod(shape_of(variable))


def type_of(variable: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a variable of a jaxpr."""
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def mesh_axes_of(variable: Any) -> tuple[str, ...]:
    """Returns the mesh axes along which a variable differs from device to device."""
    return tuple(variable.aval.manual_axis_type.varying)


def scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Returns the numbers of constants and of carried values, which JAX 0.10 and 0.12 store differently."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def views_of(mark: Mark) -> tuple[View, ...]:
    """Returns the parameters whose entries a value holds unchanged."""
    return mark.views if isinstance(mark, Joined) else (mark,) if isinstance(mark, View) else ()


def sources_of(mark: Mark, name: str) -> dict[str, str]:
    """Returns, for each parameter in a value, the first operation it went into: `name` if there was none before."""
    if isinstance(mark, Function):
        return mark.sources
    if isinstance(mark, Entrywise):
        return {mark.view.path: mark.name}
    return {view.path: name for view in views_of(mark)}


def note(names: dict[str, set[str]], sources: dict[str, str]) -> None:
    """Adds to the operations that each parameter goes into."""
    for path, name in sources.items():
        names.setdefault(path, set()).add(name)


def with_derivative(eqn: core.JaxprEqn, mark: Mark) -> Mark:
    """Applies a cast or a rearrangement to the derivative in a mark, as the equation does to the value."""
    return mark._replace(derivative=bind(eqn, [mark.derivative])[0]) if isinstance(mark, Entrywise) else mark


def inside_scan(mark: Mark, sliced: bool, length: int) -> Mark:
    """Returns the mark that a constant of a `scan`, or a slice, has inside its body."""
    if isinstance(mark, View) and not (sliced and mark.moves):
        return mark._replace(size=mark.size // length if sliced else mark.size, sliced=(*mark.sliced, sliced))
    return None


def rearranged(eqn: core.JaxprEqn, marks: list[Mark]) -> Mark:
    """Returns the mark of the result of an equation that rearranges or concatenates; None for any other equation."""
    name, mark = eqn.primitive.name, marks[0] if marks else None
    if name == "concatenate":
        views = tuple(mark for mark in marks if isinstance(mark, View))
        return Joined(views, eqn.params["dimension"]) if len(views) == len(marks) else None
    if name not in MOVES:
        return None
    if isinstance(mark, View):
        return mark._replace(moves=(*mark.moves, eqn))
    if isinstance(mark, Result):
        return _moved_result(eqn, mark)
    if isinstance(mark, Joined):
        return _moved_join(eqn, mark)
    if size_of(eqn.outvars[0]) != size_of(eqn.invars[0]):
        return None
    if isinstance(mark, Entrywise):
        return mark._replace(view=mark.view._replace(moves=(*mark.view.moves, eqn)))
    return mark


def _moved_join(eqn: core.JaxprEqn, mark: Joined) -> Joined | None:
    """Returns the mark of concatenated vectors after a rearrangement; None if they are more than vectors."""
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if max(before) != math.prod(before) or eqn.primitive.name == "rev":
        return None
    if eqn.primitive.name == "broadcast_in_dim":
        return mark._replace(axis=eqn.params["broadcast_dimensions"][mark.axis])
    return mark._replace(axis=after.index(max(before)))


def _moved_result(eqn: core.JaxprEqn, mark: Result) -> Result | None:
    """Follows the axes of a product's result; None where rows merge with features, or the order of features changes."""
    if eqn.primitive.name == "transpose":
        return mark._replace(places=tuple(mark.places[axis] for axis in eqn.params["permutation"]))
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if eqn.primitive.name == "rev" or math.prod(before) != math.prod(after) or 0 in before:
        return None
    order = sorted(place for place in mark.places if place is not None)
    places: list[tuple[int, ...] | None] = [None] * len(after)
    for group, into in _matching_axes(before, after):
        members = [mark.places[axis] for axis in group]
        if all(member is None for member in members):
            continue
        start = order.index(members[0]) if members[0] is not None else 0
        if members != order[start : start + len(members)]:
            return None
        for i, axis in enumerate(into):
            places[axis] = (*order[start], i)
    return mark._replace(places=tuple(places))


def _matching_axes(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pairs the smallest groups of axes that a reshape turns into one another; axes of length 1 are in none."""
    old = [axis for axis, n in enumerate(before) if n > 1]
    new = [axis for axis, n in enumerate(after) if n > 1]
    groups = []
    while old:
        group, into = [old.pop(0)], [new.pop(0)]
        while (sizes := [math.prod(s[a] for a in g) for s, g in ((before, group), (after, into))])[0] != sizes[1]:
            (group if sizes[0] < sizes[1] else into).append((old if sizes[0] < sizes[1] else new).pop(0))
        groups.append((group, into))
    return groups


def product_in(eqn: core.JaxprEqn, marks: list[Mark]) -> Product | None:
    """Describes a product with an operand that parameters make up, each of their entries once; otherwise None."""
    if eqn.primitive.name not in {"dot_general", "conv_general_dilated"}:
        return None
    first, second = (views_of(mark) for mark in marks)
    if bool(first) == bool(second):
        return None
    comes_first = bool(first)
    shape = shape_of(eqn.invars[0 if comes_first else 1])
    views = first or second
    axis = next((mark.axis for mark in marks if isinstance(mark, Joined)), None)
    product = Product(
        name=eqn.primitive.name,
        params=dict(eqn.params),
        views=views,
        axis=axis,
        shape=shape,
        comes_first=comes_first,
        out=type_of(eqn.outvars[0]),
        mesh_axes=mesh_axes_of(eqn.outvars[0]),
    )
    whole = math.prod(shape) == sum(view.size for view in views)
    if product.is_convolution:
        usable = not comes_first and axis is None and eqn.params["batch_group_count"] == 1
    else:
        batch, contracted, free = product.parameter_axes()
        usable = axis is None or (not batch and [axis] in (contracted, free))
    return product if whole and usable else None


def result_of(product: Product) -> Result:
    """Returns the mark of a product's result."""
    axes = [*product.stack_axes(), *product.feature_axes()]
    places = [(axes.index(axis),) if axis in axes else None for axis in range(len(product.out.shape))]
    return Result(product, tuple(places))


def lookup_in(eqn: core.JaxprEqn, marks: list[Mark]) -> Lookup | None:
    """Describes a `gather` of whole rows of a parameter, one for each index; otherwise returns None."""
    if eqn.primitive.name != "gather" or not isinstance(marks[0], View):
        return None
    shape, out, dims = shape_of(eqn.invars[0]), type_of(eqn.outvars[0]), eqn.params["dimension_numbers"]
    num_indices = len(out.shape) - len(shape) + 1
    usable = (
        dims.collapsed_slice_dims == dims.start_index_map == (0,)
        and not dims.operand_batching_dims
        and dims.offset_dims == tuple(range(num_indices, len(out.shape)))
        and eqn.params["slice_sizes"] == (1, *shape[1:])
        and marks[0].size == math.prod(shape)
    )
    if not usable:
        return None
    mesh_axes = mesh_axes_of(eqn.outvars[0])
    return Lookup(views=(marks[0],), name="gather", out=out, mesh_axes=mesh_axes, mode=eqn.params["mode"])


def bias_in(eqn: core.JaxprEqn, marks: list[Mark]) -> tuple[Product, tuple[View, ...]] | None:
    """Returns the product and its bias if an addition adds one number to each feature of its result; otherwise None."""
    i, result = next(((i, mark) for i, mark in enumerate(marks) if isinstance(mark, Result)), (0, None))
    if eqn.primitive.name != "add" or result is None or result.product.bias:
        return None
    variable, mark = eqn.invars[1 - i], marks[1 - i]
    if not isinstance(mark, View | Joined):
        return None
    views = views_of(mark)
    places = [result.places[axis] for axis in varying_axes(variable, mark)]
    is_bias = (
        None not in places
        and places == sorted(place for place in places if place is not None)
        and all(move.primitive.name not in {"transpose", "rev"} for view in views for move in view.moves)
        and sum(view.size for view in views) == _num_features(result, shape_of(eqn.outvars[0]))
        and [view.sliced for view in views] == [view.sliced for view in result.product.views]
    )
    return (result.product, views) if is_bias else None


def _num_features(result: Result, shape: tuple[int, ...]) -> int:
    return math.prod(n for n, place in zip(shape, result.places, strict=True) if place is not None)


def varying_axes(variable: Any, mark: View | Joined) -> list[int]:
    """Returns the axes along which a parameter is not repeated."""
    if isinstance(mark, Joined):
        return [mark.axis]
    shape = shape_of(variable)
    if mark.moves and mark.moves[-1].primitive.name == "broadcast_in_dim":
        before = zip(mark.moves[-1].params["broadcast_dimensions"], shape_of(mark.moves[-1].invars[0]), strict=True)
        return [int(axis) for axis, n in before if n > 1]
    return [axis for axis, n in enumerate(shape) if n > 1]


def own_axes(eqn: core.JaxprEqn, operand: int, mark: Mark) -> tuple[int, ...] | None:
    """Returns the axes along which a repeated parameter varies; None if the operand is no repeated parameter."""
    before, after = eqn.invars[operand], eqn.outvars[0]
    if isinstance(mark, View):
        view, axes = mark, varying_axes(before, mark)
    elif isinstance(mark, Entrywise):
        view, axes = mark.view, [axis for axis, n in enumerate(shape_of(before)) if n > 1]
    else:
        return None
    repeated = view.size < max(size_of(before), size_of(after) if eqn.primitive.name in ENTRYWISE else 0)
    whole = math.prod(shape_of(before)[axis] for axis in axes) == view.size
    return tuple(axes) if repeated and whole else None


def unrepeated(view: View) -> View:
    """Drops a last move that repeats the parameter."""
    repeats = view.moves and size_of(view.moves[-1].outvars[0]) > size_of(view.moves[-1].invars[0])
    return view._replace(moves=view.moves[:-1]) if repeats else view


def adds_penalty(eqn: core.JaxprEqn, marks: list[Mark]) -> bool:
    """Tells whether a sum or difference has a scalar function of parameters and a variable without any as operands."""
    of_parameters = [bool(sources_of(mark, "")) for mark in marks]
    if eqn.primitive.name not in {"add", "sub"} or all(of_parameters):
        return False
    penalty, other = of_parameters.index(True), of_parameters.index(False)
    is_scalar = isinstance(marks[penalty], Function) and shape_of(eqn.invars[penalty]) == ()
    return is_scalar and not isinstance(eqn.invars[other], core.Literal)


def is_of_parameters_alone(eqn: core.JaxprEqn, marks: list[Mark]) -> bool:
    """Tells whether the result depends on parameters and numbers alone, or changes each entry of a parameter."""
    marked = [(mark, variable) for mark, variable in zip(marks, eqn.invars, strict=True) if sources_of(mark, "")]
    if any(
        views_of(mark) and sum(view.size for view in views_of(mark)) < size_of(variable) for mark, variable in marked
    ):
        return False  # a parameter that is repeated along activations
    if eqn.primitive.name in ENTRYWISE and all(size_of(variable) == size_of(eqn.outvars[0]) for _, variable in marked):
        return True
    return all(sources_of(mark, "") or shape_of(v) == () for mark, v in zip(marks, eqn.invars, strict=True))


def function_of(eqn: core.JaxprEqn, values: list[Any], marks: list[Mark]) -> Entrywise | Function:
    """Returns the mark of a function of parameters alone."""
    name = eqn.primitive.name
    sources = functools.reduce(operator.or_, (sources_of(mark, name) for mark in marks))
    operands = [i for i, mark in enumerate(marks) if sources_of(mark, name)]
    first, mark = operands[0], marks[operands[0]]
    is_entrywise = (
        name in ENTRYWISE
        and len(operands) == 1
        and size_of(eqn.outvars[0]) == size_of(eqn.invars[first])
        and all(jnp.issubdtype(type_of(v).dtype, jnp.floating) for v in (eqn.invars[first], eqn.outvars[0]))
    )
    if not is_entrywise or not isinstance(mark, View | Entrywise):
        return Function(sources)
    view, value = mark.view if isinstance(mark, Entrywise) else mark, jnp.asarray(values[first])
    before = mark.derivative if isinstance(mark, Entrywise) else jnp.ones_like(value)
    apply = lambda value: bind(eqn, [*values[:first], value, *values[first + 1 :]])[0]  # noqa: E731
    _, derivative = jax.jvp(apply, (value,), (before,))
    return Entrywise(view, derivative, sources[view.path])

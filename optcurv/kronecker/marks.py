"""What a value is to the parameters: a view of one, several joined, a function of some, a product's result."""

import functools
import math
import operator
from typing import Any, NamedTuple

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
    """Parameters side by side."""

    views: tuple[View, ...]
    axis: int


class Entrywise(NamedTuple):
    """What operations on each entry alone make of a parameter, and its derivative by the parameter."""

    view: View
    derivative: jax.Array
    name: str  # of the first operation


class Function(NamedTuple):
    """Any other function of parameters alone; for each leaf, what it goes into first."""

    sources: dict[int, str]


class Result(NamedTuple):
    """The result of a product, perhaps rearranged.

    For each of its axes, the place among the stack and the features of the product, or None for a row; places are
    compared as tuples are.
    """

    product: Product
    places: tuple[tuple[int, ...] | None, ...]


def size_of(variable: Any) -> int:
    """Returns how many entries a variable of a jaxpr has."""
    return math.prod(shape_of(variable))


def type_of(variable: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a variable of a jaxpr."""
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def mesh_axes_of(variable: Any) -> tuple[str, ...]:
    """Returns the axes of the mesh along which a variable differs from device to device."""
    return tuple(variable.aval.manual_axis_type.varying)


def scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Returns the numbers of constants and of carried values, which JAX 0.10 and 0.12 store in their own ways."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def views_of(mark: Any) -> tuple[View, ...]:
    """Returns the parameters that a value is made of, entry by entry."""
    return mark.views if isinstance(mark, Joined) else (mark,) if isinstance(mark, View) else ()


def sources_of(mark: Any, name: str) -> dict[int, str]:
    """Returns the leaves that a value is made of and what each goes into first: `name`, if it is still itself."""
    if isinstance(mark, Function):
        return mark.sources
    if isinstance(mark, Entrywise):
        return {mark.view.leaf: mark.name}
    return {view.leaf: name for view in views_of(mark)}


def note(names: dict[int, set[str]], sources: dict[int, str]) -> None:
    """Adds to what each parameter goes into."""
    for leaf, name in sources.items():
        names.setdefault(leaf, set()).add(name)


def alike(eqn: core.JaxprEqn, mark: Any) -> Any:
    """Casts or rearranges the derivative of a value as the value itself."""
    return mark._replace(derivative=bind(eqn, [mark.derivative])[0]) if isinstance(mark, Entrywise) else mark


def inside_scan(mark: Any, sliced: bool, length: int) -> Any:
    """Returns the mark of a constant, or of a slice, of a `scan` inside its body."""
    if isinstance(mark, View) and not (sliced and mark.moves):
        return mark._replace(size=mark.size // length if sliced else mark.size, sliced=(*mark.sliced, sliced))
    return None


def rearranged(eqn: core.JaxprEqn, marks: list[Any]) -> Any:
    """Returns the mark of what only rearranges a value or puts several side by side; otherwise None."""
    name, mark = eqn.primitive.name, marks[0] if marks else None
    if name == "concatenate":
        return Joined(tuple(marks), eqn.params["dimension"]) if all(isinstance(m, View) for m in marks) else None
    if name not in MOVES:
        return None
    if isinstance(mark, View):
        return mark._replace(moves=(*mark.moves, eqn))
    if isinstance(mark, Result):
        return moved_result(eqn, mark)
    if isinstance(mark, Joined):
        return moved_join(eqn, mark)
    if size_of(eqn.outvars[0]) != size_of(eqn.invars[0]):
        return None
    if isinstance(mark, Entrywise):
        return mark._replace(view=mark.view._replace(moves=(*mark.view.moves, eqn)))
    return mark


def moved_join(eqn: core.JaxprEqn, mark: Joined) -> Joined | None:
    """Returns the mark of joined parameters after they were rearranged, if their axis can still be told."""
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if max(before) != math.prod(before) or eqn.primitive.name == "rev":
        return None
    if eqn.primitive.name == "broadcast_in_dim":
        return mark._replace(axis=eqn.params["broadcast_dimensions"][mark.axis])
    return mark._replace(axis=after.index(max(before)))


def moved_result(eqn: core.JaxprEqn, mark: Result) -> Result | None:
    """Follows the axes of a product's result; None where rows and features are merged, or features change places."""
    if eqn.primitive.name == "transpose":
        return mark._replace(places=tuple(mark.places[axis] for axis in eqn.params["permutation"]))
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    if eqn.primitive.name == "rev" or math.prod(before) != math.prod(after) or 0 in before:
        return None
    order = sorted(place for place in mark.places if place is not None)
    places: list[tuple[int, ...] | None] = [None] * len(after)
    old = [axis for axis, n in enumerate(before) if n > 1]
    new = [axis for axis, n in enumerate(after) if n > 1]
    while old:  # one group after the other, of as many entries before and after
        group, into = [old.pop(0)], [new.pop(0)]
        while (sizes := [math.prod(s[a] for a in g) for s, g in ((before, group), (after, into))])[0] != sizes[1]:
            (group if sizes[0] < sizes[1] else into).append((old if sizes[0] < sizes[1] else new).pop(0))
        members = [mark.places[axis] for axis in group]
        if all(member is None for member in members):
            continue
        start = order.index(members[0]) if members[0] is not None else 0
        if members != order[start : start + len(members)]:
            return None
        for i, axis in enumerate(into):
            places[axis] = (*order[start], i)
    return mark._replace(places=tuple(places))


def product_mark(eqn: core.JaxprEqn, marks: list[Any]) -> Product | None:
    """Describes an equation with parameters as one operand, each of their entries once; otherwise returns None."""
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


def result_mark(product: Product) -> Result:
    """Returns the mark of a product's result."""
    axes = [*product.stack_axes(), *product.feature_axes()]
    places = [(axes.index(axis),) if axis in axes else None for axis in range(len(product.out.shape))]
    return Result(product, tuple(places))


def lookup_mark(eqn: core.JaxprEqn, marks: list[Any]) -> Lookup | None:
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


def is_bias(eqn: core.JaxprEqn, marks: list[Any]) -> bool:
    """Tells whether an addition adds one number to each feature of a product's result, and notes it there."""
    result = next((mark for mark in marks if isinstance(mark, Result)), None)
    if result is None or result.product.bias:
        return False
    (place,) = (i for i, mark in enumerate(marks) if mark is not result)
    views = views_of(marks[place])
    varying = varying_axes(eqn.invars[place], marks[place]) if views else []
    places = [result.places[axis] for axis in varying]
    is_bias = (
        bool(views)
        and None not in places
        and places == sorted(place for place in places if place is not None)
        and all(move.primitive.name not in {"transpose", "rev"} for view in views for move in view.moves)
        and sum(view.size for view in views) == num_features(result, shape_of(eqn.outvars[0]))
        and [view.sliced for view in views] == [view.sliced for view in result.product.views]
    )
    if is_bias:
        result.product.bias = views
    return is_bias


def num_features(result: Result, shape: tuple[int, ...]) -> int:
    """Returns the number of features that a product's result has."""
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


def own_axes(eqn: core.JaxprEqn, place: int, mark: Any) -> tuple[int, ...] | None:
    """Returns the axes of a repeated parameter along which it is not; None if it is no such parameter."""
    before, after = eqn.invars[place], eqn.outvars[0]
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
    """Leaves out a last move that repeats the parameter."""
    repeats = view.moves and size_of(view.moves[-1].outvars[0]) > size_of(view.moves[-1].invars[0])
    return view._replace(moves=view.moves[:-1]) if repeats else view


def is_penalty(eqn: core.JaxprEqn, marks: list[Any]) -> bool:
    """Tells whether one operand is a number made of parameters alone, and the other a variable that is not."""
    of_parameters = [bool(sources_of(mark, "")) for mark in marks]
    if all(of_parameters):
        return False
    number, other = of_parameters.index(True), of_parameters.index(False)
    is_number = isinstance(marks[number], Function) and shape_of(eqn.invars[number]) == ()
    return is_number and not isinstance(eqn.invars[other], core.Literal)


def is_of_parameters_alone(eqn: core.JaxprEqn, marks: list[Any]) -> bool:
    """Tells whether an equation has to do with parameters and numbers, or changes each entry of parameters alone."""
    marked = [(mark, variable) for mark, variable in zip(marks, eqn.invars, strict=True) if sources_of(mark, "")]
    if any(
        views_of(mark) and sum(view.size for view in views_of(mark)) < size_of(variable) for mark, variable in marked
    ):
        return False  # a parameter that is repeated along activations
    if eqn.primitive.name in ENTRYWISE and all(size_of(variable) == size_of(eqn.outvars[0]) for _, variable in marked):
        return True
    return all(sources_of(mark, "") or shape_of(v) == () for mark, v in zip(marks, eqn.invars, strict=True))


def applied_mark(eqn: core.JaxprEqn, values: list[Any], marks: list[Any]) -> Entrywise | Function:
    """Returns the mark of a function of parameters alone."""
    name = eqn.primitive.name
    sources = functools.reduce(operator.or_, (sources_of(mark, name) for mark in marks))
    places = [i for i, mark in enumerate(marks) if sources_of(mark, name)]
    place, mark = places[0], marks[places[0]]
    is_entrywise = (
        name in ENTRYWISE
        and len(places) == 1
        and isinstance(mark, View | Entrywise)
        and size_of(eqn.outvars[0]) == size_of(eqn.invars[place])
        and all(jnp.issubdtype(type_of(v).dtype, jnp.floating) for v in (eqn.invars[place], eqn.outvars[0]))
    )
    if not is_entrywise:
        return Function(sources)
    view, value = mark.view if isinstance(mark, Entrywise) else mark, jnp.asarray(values[place])
    before = mark.derivative if isinstance(mark, Entrywise) else jnp.ones_like(value)
    apply = lambda value: bind(eqn, [*values[:place], value, *values[place + 1 :]])[0]  # noqa: E731
    _, derivative = jax.jvp(apply, (value,), (before,))
    return Entrywise(view, derivative, sources[view.leaf])

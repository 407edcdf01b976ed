"""What optcurv reads and rewrites in jaxprs, JAX's own form of a traced function; no other file looks into one."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core


def with_canonical_convolutions(fn: Callable[[Any], Any], argument: Any) -> Callable[[Any], Any]:
    """Makes a function's convolutions as fast inside a loop as outside on a CPU.

    XLA:CPU has a fast convolution for one order of dimensions only, and brings others into that order in a program's
    entry but not inside `while`, `scan` or `cond`, where a weight gradient then takes some fifty times as long
    (https://github.com/jax-ml/jax/issues/12868). Here each such convolution becomes one in canonical order between
    transposes, on CPUs alone. Nested functions (`jit`, `scan`, `cond`, `jax.checkpoint`, ...) are rewritten too, but
    for the body of a `shard_map`.

    Args:
      fn: a function of one pytree of arrays. It is traced once and may close over traced values.
      argument: a pytree of arrays of the shapes and dtypes that `fn` is to be called with.

    Returns:
      A function equal to `fn` to rounding; `fn` itself where it holds no such convolution.
    """
    traced, out_shape = jax.make_jaxpr(fn, return_shape=True)(argument)
    rewritten = _rewritten(traced)
    if rewritten is traced:
        return fn
    out_structure = jax.tree.structure(out_shape)

    def canonical_fn(argument: Any) -> Any:
        results = core.jaxpr_as_fun(rewritten)(*jax.tree.leaves(argument))
        return jax.tree.unflatten(out_structure, results)

    return canonical_fn


def _rewritten(jaxpr: Any) -> Any:
    """Returns a jaxpr of the same signature with canonical convolutions, or the very same one if it has no others."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)  # JAX 0.10 wraps a jaxpr with its constants, JAX 0.12 has one class
    eqns = [new for eqn in inner.eqns for new in _rewritten_equation(eqn)]
    if eqns == inner.eqns:
        return jaxpr
    rewritten = inner.replace(eqns=eqns)
    return rewritten if inner is jaxpr else jaxpr.replace(jaxpr=rewritten)


def _rewritten_equation(eqn: core.JaxprEqn) -> list[core.JaxprEqn]:
    if eqn.primitive.name == "custom_lin":  # JAX itself would raise, but under jit not before it compiles
        raise TypeError(
            "This product differentiates the model forwards, and a function in it has only the backward derivative of "
            "jax.custom_vjp. Define it by jax.custom_jvp, which serves both directions, or choose "
            "curvature=optcurv.hessian_product."
        )
    if eqn.primitive.name == "conv_general_dilated":
        dimensions = eqn.params["dimension_numbers"]
        return [eqn] if dimensions == _canonical_dimensions(len(dimensions.lhs_spec)) else _canonical_equations(eqn)
    if eqn.primitive.name == "shard_map":  # nothing public sets what its body is traced under
        return [eqn]
    params = {name: _rewritten_parameter(value) for name, value in eqn.params.items()}
    unchanged = all(params[name] is value for name, value in eqn.params.items())
    return [eqn if unchanged else eqn.replace(params=params)]


def _rewritten_parameter(value: Any) -> Any:
    """Rewrites a parameter that is a jaxpr, or a tuple of them (the branches of a `cond`)."""
    if _is_jaxpr(value):
        return _rewritten(value)
    if type(value) is tuple and all(map(_is_jaxpr, value)):
        branches = tuple(map(_rewritten, value))
        return value if all(map(operator.is_, branches, value)) else branches
    return value


def _is_jaxpr(value: Any) -> bool:
    return isinstance(getattr(value, "jaxpr", value), core.Jaxpr)


def _canonical_equations(eqn: core.JaxprEqn) -> list[core.JaxprEqn]:
    """Returns what takes a convolution's place: the canonical one on a CPU, the very same one elsewhere."""
    plain = functools.partial(jax.lax.conv_general_dilated, **eqn.params)
    canonical = functools.partial(_canonical_convolution, **eqn.params)

    def convolution(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jax.lax.platform_dependent(lhs, rhs, cpu=canonical, default=plain)

    traced = jax.make_jaxpr(convolution)(*(operand.aval for operand in eqn.invars)).jaxpr
    names: dict[Any, Any] = dict(zip([*traced.invars, *traced.outvars], [*eqn.invars, *eqn.outvars], strict=True))
    return [
        new.replace(
            invars=[names.get(variable, variable) for variable in new.invars],
            outvars=[names.get(variable, variable) for variable in new.outvars],
            source_info=eqn.source_info,
            ctx=eqn.ctx,
        )
        for new in traced.eqns
    ]


def _canonical_dimensions(num_dims: int) -> jax.lax.ConvDimensionNumbers:
    """Batch, spatial dimensions, features; of the kernel: spatial dimensions, inputs, outputs."""
    spatial, last = range(1, num_dims - 1), num_dims - 1
    image = (0, last, *spatial)
    return jax.lax.ConvDimensionNumbers(image, (last, last - 1, *range(num_dims - 2)), image)


def _canonical_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    dimension_numbers: jax.lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    **params: Any,
) -> jax.Array:
    """A convolution as transposes around one of canonical dimensions; XLA:CPU folds none of them back."""
    canonical = _canonical_dimensions(lhs.ndim)
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    lhs = jnp.moveaxis(lhs, lhs_spec, canonical.lhs_spec)
    rhs = jnp.moveaxis(rhs, rhs_spec, canonical.rhs_spec)
    if batch_group_count > 1:  # groups of the batch become groups of the features
        lhs = lhs.reshape(batch_group_count, -1, *lhs.shape[1:])
        lhs = jnp.moveaxis(lhs, 0, -2).reshape(*lhs.shape[1:-1], -1)
    out = jax.lax.conv_general_dilated(
        lhs,
        rhs,
        dimension_numbers=canonical,
        feature_group_count=feature_group_count * batch_group_count,  # never both above 1
        **params,
    )
    return jnp.moveaxis(out, canonical.out_spec, out_spec)


def micro_batch(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Marks the body of a `scan` whose iterations see other examples each, as against steps of a sequence."""

    def optcurv_micro_batch(*arguments: Any) -> Any:
        return fn(*arguments)

    return jax.jit(optcurv_micro_batch)


def _is_micro_batch(body: Any) -> bool:
    return any(eqn.params.get("name") == "optcurv_micro_batch" for eqn in getattr(body, "jaxpr", body).eqns)


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
        move = lambda x: functools.reduce(lambda x, eqn: _bind(eqn, [x])[0], self.moves, x)  # noqa: E731
        return functools.reduce(lambda move, _: jax.vmap(move), range(sum(self.sliced)), move)(leaf)

    def layout(self) -> Any:
        """Returns what is equal for views that rearrange alike."""
        return self.sliced, [(eqn.primitive.name, _shape(eqn.outvars[0]), str(eqn.params)) for eqn in self.moves]


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


class Recording(NamedTuple):
    """A function taken apart where its parameters meet activations.

    Attributes:
      places: where they do in a way that is understood.
      lost: for each leaf, what else it goes into.
      penalties: for each leaf, what it goes into on the way to a number added to the result, without any activations.
      evaluate: maps parameters and one probe for each place, an array added there, to the function's value and the
        activations of each place; the iterations of every `scan` around are leading axes of both.
    """

    places: list[Place]
    lost: dict[int, set[str]]
    penalties: dict[int, set[str]]
    evaluate: Callable[[Any, list[jax.Array]], tuple[Any, list[jax.Array]]]


def record_places(fn: Callable[[Any], Any], params: Any) -> Recording:
    """Finds where a function's parameters meet activations, in whatever library it was written.

    Looks into `jit`, `jax.checkpoint`, custom derivatives and `scan`. A parameter is followed through what only
    rearranges it or casts it, through concatenation, and through what is done to each of its entries alone.
    """
    traced, out_shape = jax.make_jaxpr(fn, return_shape=True)(params)
    invars = getattr(traced, "jaxpr", traced).invars
    marks = [View(leaf, math.prod(_shape(variable))) for leaf, variable in enumerate(invars)]
    counts: dict[int, int] = {}

    def run(params: Any, probes: list[jax.Array] | None) -> tuple[Any, _Recorder]:
        recorder = _Recorder(counts, probes)
        results, result_marks = recorder.walk(traced, jax.tree.leaves(params), marks)
        for mark in result_marks:
            _note(recorder.penalties, _sources(mark, "the result"))
        return jax.tree.unflatten(jax.tree.structure(out_shape), results), recorder

    def evaluate(params: Any, probes: list[jax.Array]) -> tuple[Any, list[jax.Array]]:
        result, recorder = run(params, probes)
        return result, recorder.activations

    found: list[_Recorder] = []
    jax.eval_shape(lambda params: found.append(run(params, None)[1]), params)
    return Recording(found[-1].places, found[-1].lost, found[-1].penalties, evaluate)


_MOVES = {"reshape", "transpose", "squeeze", "broadcast_in_dim", "rev"}
_CASTS = {"convert_element_type", "copy", "name", "pvary"}
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
_ENTRYWISE = {
    *{"add", "sub", "mul", "div", "neg", "max", "min", "pow", "integer_pow", "square", "abs", "sqrt", "rsqrt"},
    *{"exp", "log", "log1p", "expm1", "tanh", "logistic"},
}


class _Joined(NamedTuple):
    """Parameters side by side."""

    views: tuple[View, ...]
    axis: int


class _Entrywise(NamedTuple):
    """What operations on each entry alone make of a parameter, and its derivative by the parameter."""

    view: View
    derivative: jax.Array
    name: str  # of the first operation


class _Function(NamedTuple):
    """Any other function of parameters alone; for each leaf, what it goes into first."""

    sources: dict[int, str]


class _Result(NamedTuple):
    """The result of a product, perhaps rearranged.

    For each of its axes, the place among the stack and the features of the product, or None for a row; places are
    compared as tuples are.
    """

    product: Product
    places: tuple[tuple[int, ...] | None, ...]


class _Recorder:
    """Evaluates a jaxpr; values may carry a mark: one of the above, or a `View`."""

    def __init__(self, counts: dict[int, int], probes: list[jax.Array] | None) -> None:
        self.places: list[Place] = []
        self.activations: list[jax.Array] = []
        self.lost: dict[int, set[str]] = {}
        self.penalties: dict[int, set[str]] = {}
        self._counts = counts  # of the places inside each scan, by the identity of its equation
        self._probes = probes

    def walk(self, jaxpr: Any, values: Sequence[Any], marks: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Returns a jaxpr's results and their marks."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        known = dict(zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=True))
        known.update(zip(inner.invars, values, strict=True))
        marked = dict(zip(inner.invars, marks, strict=True))

        def read(variable: Any) -> tuple[Any, Any]:
            return (
                (variable.val, None) if isinstance(variable, core.Literal) else (known[variable], marked.get(variable))
            )

        for eqn in inner.eqns:
            operands = [read(variable) for variable in eqn.invars]
            with eqn.ctx.manager:
                results, result_marks = self._equation(
                    eqn, [value for value, _ in operands], [mark for _, mark in operands]
                )
            known.update(zip(eqn.outvars, results, strict=True))
            marked.update(zip(eqn.outvars, result_marks, strict=False))
        results = [read(variable) for variable in inner.outvars]
        return [value for value, _ in results], [mark for _, mark in results]

    def _equation(self, eqn: core.JaxprEqn, values: list[Any], marks: list[Any]) -> tuple[list[Any], list[Any]]:
        name = eqn.primitive.name
        if name in _CASTS:
            return _bind(eqn, values), [_alike(eqn, mark) for mark in marks]
        if name == "stop_gradient":
            return _bind(eqn, values), []
        if any(map(_views, marks)) and name in _CALLS:
            (jaxpr,) = (value for value in eqn.params.values() if _is_jaxpr(value))
            return self.walk(jaxpr, values, marks)
        if name == "scan" and any(_sources(mark, name) for mark in marks):
            return self._scan(eqn, values, marks), []
        mark = _rearranged(eqn, marks)
        if mark is None and any(_sources(mark, name) for mark in marks):
            return self._meeting(eqn, values, marks)
        return _bind(eqn, values), [_alike(eqn, mark)]

    def _meeting(self, eqn: core.JaxprEqn, values: list[Any], marks: list[Any]) -> tuple[list[Any], list[Any]]:
        """Parameters meet activations, or one another."""
        name = eqn.primitive.name
        place = _product(eqn, marks) or _lookup(eqn, marks)
        if place is not None:
            self._lose(eqn, [None if _views(mark) == place.views else mark for mark in marks])
            (result,) = _bind(eqn, values)
            if isinstance(place, Product):
                return [self._record(place, values[place.comes_first], result)], [_result(place)]
            return [self._record(place, values[1][..., 0], result)], []
        if name == "add" and _is_bias(eqn, marks):
            return _bind(eqn, values), []
        if name in {"add", "sub"} and _is_penalty(eqn, marks):
            for mark in marks:
                _note(self.penalties, _sources(mark, name))
            return _bind(eqn, values), []
        if _is_of_parameters_alone(eqn, marks):
            return _bind(eqn, values), [_applied(eqn, values, marks)] * len(eqn.outvars)
        return _bind(eqn, [self._spread(eqn, i, value, marks[i]) for i, value in enumerate(values)]), []

    def _record(self, place: Place, activations: jax.Array, value: jax.Array) -> jax.Array:
        """Notes a place and its activations; returns the value with its probe."""
        self.places.append(place)
        self.activations.append(activations)
        return value if self._probes is None else value + self._probes[len(self.places) - 1]

    def _lose(self, eqn: core.JaxprEqn, marks: Sequence[Any]) -> None:
        for mark in marks:
            _note(self.lost, _sources(mark, eqn.primitive.name))

    def _spread(self, eqn: core.JaxprEqn, place: int, value: Any, mark: Any) -> Any:
        """Returns an operand with a probe if it is a parameter repeated along activations; otherwise it is lost."""
        axes = _own_axes(eqn, place, mark)
        if axes is None:
            self._lose(eqn, [mark])
            return value
        shape = _shape(eqn.outvars[0] if eqn.primitive.name in _ENTRYWISE else eqn.invars[place])
        if isinstance(mark, _Entrywise):
            view, name = mark.view, mark.name
            derivative = mark.derivative.reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])
        else:
            view, name, derivative = _unrepeated(mark), eqn.primitive.name, jnp.ones([1] * len(shape))
        out, varying = jax.ShapeDtypeStruct(shape, value.dtype), _mesh_axes(eqn.invars[place])
        spread = Spread(views=(view,), name=name, out=out, mesh_axes=varying, axes=axes)
        return self._record(spread, derivative, jnp.broadcast_to(value, shape))

    def _scan(self, eqn: core.JaxprEqn, values: list[Any], marks: list[Any]) -> list[Any]:
        """Follows constants and slices of parameters into the iterations."""
        num_consts, num_carry = _scan_counts(eqn)
        first_slice = num_consts + num_carry
        consts, carry, slices = values[:num_consts], values[num_consts:first_slice], values[first_slice:]
        inner_marks = [
            None if num_consts <= i < first_slice else _inside_scan(mark, i >= first_slice, eqn.params["length"])
            for i, mark in enumerate(marks)
        ]
        self._lose(eqn, [mark for mark, inner in zip(marks, inner_marks, strict=True) if inner is None])
        done = len(self.places)
        probes = None if self._probes is None else self._probes[done : done + self._counts[id(eqn)]]
        recorders: list[_Recorder] = []

        def body(carry: list[Any], slices_and_probes: Any) -> tuple[list[Any], Any]:
            slices, probes = slices_and_probes
            recorder = _Recorder(self._counts, probes)
            results, result_marks = recorder.walk(eqn.params["jaxpr"], [*consts, *carry, *slices], inner_marks)
            recorder._lose(eqn, result_marks)
            recorders.append(recorder)
            return results[:num_carry], (results[num_carry:], recorder.activations)

        loop = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        carry, (stacked, activations) = jax.lax.scan(body, carry, (slices, probes), **loop)
        inner = recorders[-1]
        self._counts[id(eqn)] = len(inner.places)
        self.activations += activations
        for mine, inner_ones in ((self.lost, inner.lost), (self.penalties, inner.penalties)):
            for leaf, names in inner_ones.items():
                mine.setdefault(leaf, set()).update(names)
        for place in inner.places:
            lengths = (eqn.params["length"], *place.lengths)
            micro_batches = (_is_micro_batch(eqn.params["jaxpr"]), *place.micro_batches)
            self.places.append(dataclasses.replace(place, lengths=lengths, micro_batches=micro_batches))
        return [*carry, *stacked]


def _bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _size(variable: Any) -> int:
    return math.prod(_shape(variable))


def _out(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _mesh_axes(variable: Any) -> tuple[str, ...]:
    return tuple(variable.aval.manual_axis_type.varying)


def _scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Returns the numbers of constants and of carried values, which JAX 0.10 and 0.12 store in their own ways."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def _views(mark: Any) -> tuple[View, ...]:
    return mark.views if isinstance(mark, _Joined) else (mark,) if isinstance(mark, View) else ()


def _sources(mark: Any, name: str) -> dict[int, str]:
    """Returns the leaves that a value is made of and what each goes into first: `name`, if it is still itself."""
    if isinstance(mark, _Function):
        return mark.sources
    if isinstance(mark, _Entrywise):
        return {mark.view.leaf: mark.name}
    return {view.leaf: name for view in _views(mark)}


def _note(names: dict[int, set[str]], sources: dict[int, str]) -> None:
    for leaf, name in sources.items():
        names.setdefault(leaf, set()).add(name)


def _alike(eqn: core.JaxprEqn, mark: Any) -> Any:
    """Casts or rearranges the derivative of a value as the value itself."""
    return mark._replace(derivative=_bind(eqn, [mark.derivative])[0]) if isinstance(mark, _Entrywise) else mark


def _inside_scan(mark: Any, sliced: bool, length: int) -> Any:
    if isinstance(mark, View) and not (sliced and mark.moves):
        return mark._replace(size=mark.size // length if sliced else mark.size, sliced=(*mark.sliced, sliced))
    return None


def _rearranged(eqn: core.JaxprEqn, marks: list[Any]) -> Any:
    """Returns the mark of what only rearranges a value or puts several side by side; otherwise None."""
    name, mark = eqn.primitive.name, marks[0] if marks else None
    if name == "concatenate":
        return _Joined(tuple(marks), eqn.params["dimension"]) if all(isinstance(m, View) for m in marks) else None
    if name not in _MOVES:
        return None
    if isinstance(mark, View):
        return mark._replace(moves=(*mark.moves, eqn))
    if isinstance(mark, _Result):
        return _moved_result(eqn, mark)
    if isinstance(mark, _Joined):
        return _moved_join(eqn, mark)
    if _size(eqn.outvars[0]) != _size(eqn.invars[0]):
        return None
    if isinstance(mark, _Entrywise):
        return mark._replace(view=mark.view._replace(moves=(*mark.view.moves, eqn)))
    return mark


def _moved_join(eqn: core.JaxprEqn, mark: _Joined) -> _Joined | None:
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if max(before) != math.prod(before) or eqn.primitive.name == "rev":
        return None
    if eqn.primitive.name == "broadcast_in_dim":
        return mark._replace(axis=eqn.params["broadcast_dimensions"][mark.axis])
    return mark._replace(axis=after.index(max(before)))


def _moved_result(eqn: core.JaxprEqn, mark: _Result) -> _Result | None:
    """Follows the axes of a product's result; None where rows and features are merged, or features change places."""
    if eqn.primitive.name == "transpose":
        return mark._replace(places=tuple(mark.places[axis] for axis in eqn.params["permutation"]))
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
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


def _product(eqn: core.JaxprEqn, marks: list[Any]) -> Product | None:
    """Describes an equation with parameters as one operand, each of their entries once; otherwise returns None."""
    if eqn.primitive.name not in {"dot_general", "conv_general_dilated"}:
        return None
    first, second = (_views(mark) for mark in marks)
    if bool(first) == bool(second):
        return None
    comes_first = bool(first)
    shape = _shape(eqn.invars[0 if comes_first else 1])
    views = first or second
    axis = next((mark.axis for mark in marks if isinstance(mark, _Joined)), None)
    product = Product(
        name=eqn.primitive.name,
        params=dict(eqn.params),
        views=views,
        axis=axis,
        shape=shape,
        comes_first=comes_first,
        out=_out(eqn.outvars[0]),
        mesh_axes=_mesh_axes(eqn.outvars[0]),
    )
    whole = math.prod(shape) == sum(view.size for view in views)
    if product.is_convolution:
        usable = not comes_first and axis is None and eqn.params["batch_group_count"] == 1
    else:
        batch, contracted, free = product.parameter_axes()
        usable = axis is None or (not batch and [axis] in (contracted, free))
    return product if whole and usable else None


def _result(product: Product) -> _Result:
    axes = [*product.stack_axes(), *product.feature_axes()]
    places = [(axes.index(axis),) if axis in axes else None for axis in range(len(product.out.shape))]
    return _Result(product, tuple(places))


def _lookup(eqn: core.JaxprEqn, marks: list[Any]) -> Lookup | None:
    """Describes a `gather` of whole rows of a parameter, one for each index; otherwise returns None."""
    if eqn.primitive.name != "gather" or not isinstance(marks[0], View):
        return None
    shape, out, dims = _shape(eqn.invars[0]), _out(eqn.outvars[0]), eqn.params["dimension_numbers"]
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
    mesh_axes = _mesh_axes(eqn.outvars[0])
    return Lookup(views=(marks[0],), name="gather", out=out, mesh_axes=mesh_axes, mode=eqn.params["mode"])


def _is_bias(eqn: core.JaxprEqn, marks: list[Any]) -> bool:
    """Tells whether an addition adds one number to each feature of a product's result, and notes it there."""
    result = next((mark for mark in marks if isinstance(mark, _Result)), None)
    if result is None or result.product.bias:
        return False
    (place,) = (i for i, mark in enumerate(marks) if mark is not result)
    views = _views(marks[place])
    varying = _varying_axes(eqn.invars[place], marks[place]) if views else []
    places = [result.places[axis] for axis in varying]
    is_bias = (
        bool(views)
        and None not in places
        and places == sorted(place for place in places if place is not None)
        and all(move.primitive.name not in {"transpose", "rev"} for view in views for move in view.moves)
        and sum(view.size for view in views) == _num_features(result, _shape(eqn.outvars[0]))
        and [view.sliced for view in views] == [view.sliced for view in result.product.views]
    )
    if is_bias:
        result.product.bias = views
    return is_bias


def _num_features(result: _Result, shape: tuple[int, ...]) -> int:
    return math.prod(n for n, place in zip(shape, result.places, strict=True) if place is not None)


def _varying_axes(variable: Any, mark: View | _Joined) -> list[int]:
    """Returns the axes along which a parameter is not repeated."""
    if isinstance(mark, _Joined):
        return [mark.axis]
    shape = _shape(variable)
    if mark.moves and mark.moves[-1].primitive.name == "broadcast_in_dim":
        before = zip(mark.moves[-1].params["broadcast_dimensions"], _shape(mark.moves[-1].invars[0]), strict=True)
        return [int(axis) for axis, n in before if n > 1]
    return [axis for axis, n in enumerate(shape) if n > 1]


def _own_axes(eqn: core.JaxprEqn, place: int, mark: Any) -> tuple[int, ...] | None:
    """Returns the axes of a repeated parameter along which it is not; None if it is no such parameter."""
    before, after = eqn.invars[place], eqn.outvars[0]
    if isinstance(mark, View):
        view, axes = mark, _varying_axes(before, mark)
    elif isinstance(mark, _Entrywise):
        view, axes = mark.view, [axis for axis, n in enumerate(_shape(before)) if n > 1]
    else:
        return None
    repeated = view.size < max(_size(before), _size(after) if eqn.primitive.name in _ENTRYWISE else 0)
    whole = math.prod(_shape(before)[axis] for axis in axes) == view.size
    return tuple(axes) if repeated and whole else None


def _unrepeated(view: View) -> View:
    """Leaves out a last move that repeats the parameter."""
    repeats = view.moves and _size(view.moves[-1].outvars[0]) > _size(view.moves[-1].invars[0])
    return view._replace(moves=view.moves[:-1]) if repeats else view


def _is_penalty(eqn: core.JaxprEqn, marks: list[Any]) -> bool:
    """Tells whether one operand is a number made of parameters alone, and the other a variable that is not."""
    of_parameters = [bool(_sources(mark, "")) for mark in marks]
    if all(of_parameters):
        return False
    number, other = of_parameters.index(True), of_parameters.index(False)
    is_number = isinstance(marks[number], _Function) and _shape(eqn.invars[number]) == ()
    return is_number and not isinstance(eqn.invars[other], core.Literal)


def _is_of_parameters_alone(eqn: core.JaxprEqn, marks: list[Any]) -> bool:
    """Tells whether an equation has to do with parameters and numbers, or changes each entry of parameters alone."""
    marked = [(mark, variable) for mark, variable in zip(marks, eqn.invars, strict=True) if _sources(mark, "")]
    if any(_views(mark) and sum(view.size for view in _views(mark)) < _size(variable) for mark, variable in marked):
        return False  # a parameter that is repeated along activations
    if eqn.primitive.name in _ENTRYWISE and all(_size(variable) == _size(eqn.outvars[0]) for _, variable in marked):
        return True
    return all(_sources(mark, "") or _shape(v) == () for mark, v in zip(marks, eqn.invars, strict=True))


def _applied(eqn: core.JaxprEqn, values: list[Any], marks: list[Any]) -> _Entrywise | _Function:
    """Returns the mark of a function of parameters alone."""
    name = eqn.primitive.name
    sources = functools.reduce(operator.or_, (_sources(mark, name) for mark in marks))
    places = [i for i, mark in enumerate(marks) if _sources(mark, name)]
    place, mark = places[0], marks[places[0]]
    is_entrywise = (
        name in _ENTRYWISE
        and len(places) == 1
        and isinstance(mark, View | _Entrywise)
        and _size(eqn.outvars[0]) == _size(eqn.invars[place])
        and all(jnp.issubdtype(_out(v).dtype, jnp.floating) for v in (eqn.invars[place], eqn.outvars[0]))
    )
    if not is_entrywise:
        return _Function(sources)
    view, value = mark.view if isinstance(mark, _Entrywise) else mark, jnp.asarray(values[place])
    before = mark.derivative if isinstance(mark, _Entrywise) else jnp.ones_like(value)
    apply = lambda value: _bind(eqn, [*values[:place], value, *values[place + 1 :]])[0]  # noqa: E731
    _, derivative = jax.jvp(apply, (value,), (before,))
    return _Entrywise(view, derivative, sources[view.leaf])

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


@dataclasses.dataclass
class Product:
    """A place where parameters multiply activations, in a matrix product or a convolution.

    Attributes:
      primitive: `dot_general` or `conv_general_dilated`.
      params: of the equation.
      views: the parameters that make up the operand, side by side along `axis` if there are several.
      axis: of the operand.
      shape: of the operand.
      comes_first: whether the parameters are the left operand.
      out: shape and dtype of the result.
      bias: the parameters added to the result, if any, as `views`.
      lengths: of every `scan` around, outermost first.
      micro_batches: for each of those scans, whether its iterations see other examples each.
      mesh_axes: of a `shard_map` around, those along which the result differs.
    """

    primitive: str
    params: dict[str, Any]
    views: tuple[View, ...]
    axis: int | None
    shape: tuple[int, ...]
    comes_first: bool
    out: jax.ShapeDtypeStruct
    bias: tuple[View, ...] = ()
    lengths: tuple[int, ...] = ()
    micro_batches: tuple[bool, ...] = ()
    mesh_axes: tuple[str, ...] = ()

    @property
    def is_convolution(self) -> bool:
        """Whether it is one, or else a matrix product."""
        return self.primitive == "conv_general_dilated"

    def parameter_axes(self) -> tuple[list[int], list[int], list[int]]:
        """Returns the axes of the parameters' operand that a matrix product stacks, sums over and leaves."""
        contracted, batch = (list(axes[0 if self.comes_first else 1]) for axes in self.params["dimension_numbers"])
        return batch, contracted, [axis for axis in range(len(self.shape)) if axis not in {*batch, *contracted}]

    def feature_axes(self) -> list[int]:
        """Returns the axes of the result that the parameters bring into it."""
        if self.is_convolution:
            return [self.params["dimension_numbers"].out_spec[1]]
        batch, _, free = self.parameter_axes()
        first = len(batch) if self.comes_first else len(self.out.shape) - len(free)
        return list(range(first, first + len(free)))


class Recording(NamedTuple):
    """A function taken apart where its parameters multiply activations.

    Attributes:
      products: the places.
      lost: for each leaf, what else it goes into.
      evaluate: maps parameters and one array for each product, added to its result, to the function's value and the
        activations of each product; the iterations of every `scan` around are leading axes of both.
    """

    products: list[Product]
    lost: dict[int, set[str]]
    evaluate: Callable[[Any, list[jax.Array]], tuple[Any, list[jax.Array]]]


def record_products(fn: Callable[[Any], Any], params: Any) -> Recording:
    """Finds where a function's parameters multiply activations, in whatever library it was written.

    Looks into `jit`, `jax.checkpoint`, custom derivatives and `scan`. A parameter is followed through what only
    rearranges it or casts it, and through concatenation.
    """
    traced, out_shape = jax.make_jaxpr(fn, return_shape=True)(params)
    invars = getattr(traced, "jaxpr", traced).invars
    marks = [View(leaf, math.prod(_shape(variable))) for leaf, variable in enumerate(invars)]
    counts: dict[int, int] = {}

    def run(params: Any, probes: list[jax.Array] | None) -> tuple[Any, _Recorder]:
        recorder = _Recorder(counts, probes)
        results, _ = recorder.walk(traced, jax.tree.leaves(params), marks)
        return jax.tree.unflatten(jax.tree.structure(out_shape), results), recorder

    def evaluate(params: Any, probes: list[jax.Array]) -> tuple[Any, list[jax.Array]]:
        result, recorder = run(params, probes)
        return result, recorder.activations

    found: list[_Recorder] = []
    jax.eval_shape(lambda params: found.append(run(params, None)[1]), params)
    return Recording(found[-1].products, found[-1].lost, evaluate)


_MOVES = {"reshape", "transpose", "squeeze", "broadcast_in_dim"}
_CASTS = {"convert_element_type", "copy", "name", "pvary"}
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}


class _Joined(NamedTuple):
    """Parameters side by side."""

    views: tuple[View, ...]
    axis: int


class _Recorder:
    """Evaluates a jaxpr; values may carry a mark: a `View`, a `_Joined`, or the `Product` they are the result of."""

    def __init__(self, counts: dict[int, int], probes: list[jax.Array] | None) -> None:
        self.products: list[Product] = []
        self.activations: list[jax.Array] = []
        self.lost: dict[int, set[str]] = {}
        self._counts = counts  # of the products inside each scan, by the identity of its equation
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
        parameters = [mark for mark in marks if isinstance(mark, View | _Joined)]
        if name in _CASTS:
            return _bind(eqn, values), marks
        if not parameters:
            return _bind(eqn, values), []
        if name in _CALLS:
            (jaxpr,) = (value for value in eqn.params.values() if _is_jaxpr(value))
            return self.walk(jaxpr, values, marks)
        if name == "scan":
            return self._scan(eqn, values, marks), []
        if name in _MOVES:
            mark = _moved(eqn, marks[0])
        elif name == "concatenate":
            mark = _Joined(tuple(marks), eqn.params["dimension"]) if all(isinstance(m, View) for m in marks) else None
        elif name in {"dot_general", "conv_general_dilated"}:
            mark = _product(eqn, marks)
        else:
            mark = None
            if name == "add" and _is_bias(eqn, marks):
                return _bind(eqn, values), []
        results = _bind(eqn, values)
        if mark is None:
            for view in (view for mark in parameters for view in _views(mark)):
                self.lost.setdefault(view.leaf, set()).add(name)
        if isinstance(mark, Product):
            self.products.append(mark)
            self.activations.append(values[mark.comes_first])
            if self._probes is not None:
                results = [results[0] + self._probes[len(self.products) - 1]]
        return results, [mark]

    def _scan(self, eqn: core.JaxprEqn, values: list[Any], marks: list[Any]) -> list[Any]:
        """Follows constants and slices of parameters into the iterations."""
        num_consts, num_carry = _scan_counts(eqn)
        first_slice = num_consts + num_carry
        consts, carry, slices = values[:num_consts], values[num_consts:first_slice], values[first_slice:]
        inner_marks = [
            None if num_consts <= i < first_slice else _inside_scan(mark, i >= first_slice, eqn.params["length"])
            for i, mark in enumerate(marks)
        ]
        for mark, inner_mark in zip(marks, inner_marks, strict=True):
            if inner_mark is None:
                for view in _views(mark):
                    self.lost.setdefault(view.leaf, set()).add("scan")
        done = len(self.products)
        probes = None if self._probes is None else self._probes[done : done + self._counts[id(eqn)]]
        recorders: list[_Recorder] = []

        def body(carry: list[Any], slices_and_probes: Any) -> tuple[list[Any], Any]:
            slices, probes = slices_and_probes
            recorder = _Recorder(self._counts, probes)
            results, _ = recorder.walk(eqn.params["jaxpr"], [*consts, *carry, *slices], inner_marks)
            recorders.append(recorder)
            return results[:num_carry], (results[num_carry:], recorder.activations)

        loop = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        carry, (stacked, activations) = jax.lax.scan(body, carry, (slices, probes), **loop)
        inner = recorders[-1]
        self._counts[id(eqn)] = len(inner.products)
        self.activations += activations
        for leaf, names in inner.lost.items():
            self.lost.setdefault(leaf, set()).update(names)
        for product in inner.products:
            lengths = (eqn.params["length"], *product.lengths)
            micro_batches = (_is_micro_batch(eqn.params["jaxpr"]), *product.micro_batches)
            self.products.append(dataclasses.replace(product, lengths=lengths, micro_batches=micro_batches))
        return [*carry, *stacked]


def _bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Returns the numbers of constants and of carried values, which JAX 0.10 and 0.12 store in their own ways."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def _views(mark: Any) -> tuple[View, ...]:
    return mark.views if isinstance(mark, _Joined) else (mark,) if isinstance(mark, View) else ()


def _inside_scan(mark: Any, sliced: bool, length: int) -> Any:
    if isinstance(mark, View) and not (sliced and mark.moves):
        return mark._replace(size=mark.size // length if sliced else mark.size, sliced=(*mark.sliced, sliced))
    return None


def _moved(eqn: core.JaxprEqn, mark: Any) -> Any:
    if isinstance(mark, View):
        return mark._replace(moves=(*mark.moves, eqn))
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    if max(before) != math.prod(before):
        return None
    if eqn.primitive.name == "broadcast_in_dim":
        return mark._replace(axis=eqn.params["broadcast_dimensions"][mark.axis])
    return mark._replace(axis=after.index(max(before)))


def _product(eqn: core.JaxprEqn, marks: list[Any]) -> Product | None:
    """Describes an equation with parameters as one operand, each of their entries once; otherwise returns None."""
    first, second = (_views(mark) for mark in marks)
    if bool(first) == bool(second):
        return None
    comes_first = bool(first)
    shape = _shape(eqn.invars[0 if comes_first else 1])
    views = first or second
    axis = next((mark.axis for mark in marks if isinstance(mark, _Joined)), None)
    out: Any = eqn.outvars[0].aval
    product = Product(
        primitive=eqn.primitive.name,
        params=dict(eqn.params),
        views=views,
        axis=axis,
        shape=shape,
        comes_first=comes_first,
        out=jax.ShapeDtypeStruct(out.shape, out.dtype),
        mesh_axes=tuple(out.manual_axis_type.varying),
    )
    whole = math.prod(shape) == sum(view.size for view in views)
    if product.is_convolution:
        usable = not comes_first and axis is None and eqn.params["batch_group_count"] == 1
    else:
        batch, contracted, free = product.parameter_axes()
        usable = axis is None or (not batch and [axis] in (contracted, free))
    return product if whole and usable else None


def _is_bias(eqn: core.JaxprEqn, marks: list[Any]) -> bool:
    """Tells whether an addition adds one number to each feature of a product's result, and notes it there."""
    product = next((mark for mark in marks if isinstance(mark, Product)), None)
    if product is None or product.bias:
        return False
    (place,) = (i for i, mark in enumerate(marks) if not isinstance(mark, Product))
    views, shape = _views(marks[place]), _shape(eqn.invars[place])
    moves = [move for view in views for move in view.moves]
    if isinstance(marks[place], _Joined):
        varying = {marks[place].axis}
    elif moves and moves[-1].primitive.name == "broadcast_in_dim":
        before = zip(moves[-1].params["broadcast_dimensions"], _shape(moves[-1].invars[0]), strict=True)
        varying = {axis for axis, n in before if n > 1}
    else:
        varying = {axis for axis, n in enumerate(shape) if n > 1}
    features = product.feature_axes()
    num_features = math.prod(product.out.shape[axis] for axis in features)
    is_bias = (
        varying <= set(features)
        and all(move.primitive.name != "transpose" for move in moves)
        and sum(view.size for view in views) == num_features
        and [view.sliced for view in views] == [view.sliced for view in product.views]
    )
    if is_bias:
        product.bias = views
    return is_bias

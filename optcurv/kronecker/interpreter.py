"""Finds where a function's parameters meet activations, by interpreting its jaxpr, JAX's form of a traced function."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from optcurv.accumulation import is_micro_batch
from optcurv.arguments import PyTree, by_path
from optcurv.convolutions import is_jaxpr
from optcurv.kronecker.marks import (
    CASTS,
    ENTRYWISE,
    Entrywise,
    Mark,
    adds_penalty,
    bias_in,
    function_of,
    inside_scan,
    is_of_parameters_alone,
    lookup_in,
    mesh_axes_of,
    note,
    own_axes,
    product_in,
    rearranged,
    result_of,
    scan_counts,
    size_of,
    sources_of,
    unrepeated,
    views_of,
    with_derivative,
)
from optcurv.kronecker.places import Place, Product, Spread, View, bind, shape_of


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
    """What an interpretation finds. A static pytree, so a traced function can return it beside its arrays.

    Attributes:
      places: where parameters meet activations in a way that is understood, those inside scans included.
      scans: the findings inside of each `scan` that parameters go into, in the order in which they are evaluated.
      lost: for each parameter, by path, the other operations it goes into.
      penalties: for each parameter, the operations it goes into on the way to a number without activations that is
        added to the result.
    """

    places: list[Place] = dataclasses.field(default_factory=list)
    scans: list["Findings"] = dataclasses.field(default_factory=list)
    lost: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    penalties: dict[str, set[str]] = dataclasses.field(default_factory=dict)


class Interpretable(NamedTuple):
    """A function that was traced once.

    Attributes:
      findings: about its parameters.
      evaluate: maps parameters and one probe for each place, an array that is added there, to the function's value and
        the activations of each place. Both have the iterations of the surrounding scans as leading axes.
    """

    findings: Findings
    evaluate: Callable[[PyTree, list[jax.Array]], tuple[PyTree, list[jax.Array]]]


def interpret(fn: Callable[[PyTree], PyTree], params: PyTree) -> Interpretable:
    """Traces a function and finds where its parameters meet activations, in whatever library it was written.

    Looks into `jit`, `jax.checkpoint`, custom derivatives and `scan`. A parameter is followed through what only
    rearranges or casts it, through concatenation, and through functions of each of its entries.
    """
    jaxpr, out_shape = jax.make_jaxpr(fn, return_shape=True)(params)
    variables = getattr(jaxpr, "jaxpr", jaxpr).invars
    marks = [View(path, size_of(variable)) for path, variable in zip(by_path(params), variables, strict=True)]

    def run(interpreter: _Interpreter, params: PyTree) -> PyTree:
        results, result_marks = interpreter.walk(jaxpr, jax.tree.leaves(params), marks)
        for mark in result_marks:
            note(interpreter.findings.penalties, sources_of(mark, "the result"))
        return jax.tree.unflatten(jax.tree.structure(out_shape), results)

    def find(params: PyTree) -> Findings:
        interpreter = _Interpreter()
        run(interpreter, params)
        return interpreter.findings

    findings = jax.eval_shape(find, params)

    def evaluate(params: PyTree, probes: list[jax.Array]) -> tuple[PyTree, list[jax.Array]]:
        interpreter = _Interpreter(findings, probes)
        return run(interpreter, params), interpreter.activations

    return Interpretable(findings, evaluate)


_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}


class _Interpreter:
    """Evaluates a jaxpr, equation by equation, with a mark for each value that depends on parameters.

    This is how it goes through `jnp.dot(x, p["w"]) + p["b"]`, x of (5, 3) and two features; `Result` is the mark of
    what the product returns, with None for the axis of rows and (0,) for the first axis of features:

        { lambda a:f32[5,3]; b:f32[2] c:f32[3,2]. let      b: View("['b']", size=2), c: View("['w']", size=6)
            d:f32[5,2] = dot_general[...] a c              d: Result(product, places=(None, (0,)))
            e:f32[1,2] = broadcast_in_dim[...] b           e: View("['b']", size=2, moves=(broadcast_in_dim,))
            f:f32[5,2] = add d e                           f: no mark, and product.bias is e's View
          in (f,) }

    The product is a place, with `a` as its activations; a probe would be added to d.

      >>> import jax, jax.numpy as jnp
      >>> loss = lambda p: jnp.dot(jnp.ones((5, 3)), p["w"]) + p["b"]
      >>> (product,) = interpret(loss, {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}).findings.places
      >>> product.views[0].path, product.bias[0].path, product.out.shape
      ("['w']", "['b']", (5, 2))
    """

    def __init__(self, known: Findings | None = None, probes: Sequence[jax.Array] | None = None) -> None:
        """Takes the findings of an earlier run and a probe for each place, or neither."""
        self.findings = Findings()
        self.activations: list[jax.Array] = []
        self._known = known
        self._probes = probes

    def walk(self, jaxpr: Any, values: Sequence[Any], marks: Sequence[Mark]) -> tuple[list[Any], list[Mark]]:
        """Returns a jaxpr's results and their marks."""
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        known = dict(zip(inner.constvars, getattr(jaxpr, "consts", ()), strict=True))
        known.update(zip(inner.invars, values, strict=True))
        marked = dict(zip(inner.invars, marks, strict=True))

        def read(variable: Any) -> tuple[Any, Mark]:
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

    def _equation(self, eqn: core.JaxprEqn, values: list[Any], marks: list[Mark]) -> tuple[list[Any], list[Mark]]:
        name = eqn.primitive.name
        if name in CASTS:
            return bind(eqn, values), [with_derivative(eqn, mark) for mark in marks]
        if name == "stop_gradient":
            return bind(eqn, values), []
        if any(map(views_of, marks)) and name in _CALLS:
            (jaxpr,) = (value for value in eqn.params.values() if is_jaxpr(value))
            return self.walk(jaxpr, values, marks)
        if name == "scan" and any(sources_of(mark, name) for mark in marks):
            return self._scan(eqn, values, marks), []
        mark = rearranged(eqn, marks)
        if mark is None and any(sources_of(mark, name) for mark in marks):
            return self._meeting(eqn, values, marks)
        return bind(eqn, values), [with_derivative(eqn, mark)]

    def _meeting(self, eqn: core.JaxprEqn, values: list[Any], marks: list[Mark]) -> tuple[list[Any], list[Mark]]:
        """Evaluates an equation in which parameters meet activations, or one another."""
        place = product_in(eqn, marks) or lookup_in(eqn, marks)
        if place is not None:
            self._lose(eqn, [None if views_of(mark) == place.views else mark for mark in marks])
            (result,) = bind(eqn, values)
            if isinstance(place, Product):
                return [self._record(place, values[place.comes_first], result)], [result_of(place)]
            return [self._record(place, values[1][..., 0], result)], []
        if with_bias := bias_in(eqn, marks):
            product, product.bias = with_bias
            return bind(eqn, values), []
        if adds_penalty(eqn, marks):
            for mark in marks:
                note(self.findings.penalties, sources_of(mark, eqn.primitive.name))
            return bind(eqn, values), []
        if is_of_parameters_alone(eqn, marks):
            return bind(eqn, values), [function_of(eqn, values, marks)] * len(eqn.outvars)
        return bind(eqn, [self._spread(eqn, i, value, marks[i]) for i, value in enumerate(values)]), []

    def _record(self, place: Place, activations: jax.Array, value: jax.Array) -> jax.Array:
        """Notes a place and its activations; returns the value with its probe."""
        self.findings.places.append(place)
        self.activations.append(activations)
        return value if self._probes is None else value + self._probes[len(self.findings.places) - 1]

    def _lose(self, eqn: core.JaxprEqn, marks: Sequence[Mark]) -> None:
        """Stops to follow parameters that an operation takes in a way that is not understood."""
        for mark in marks:
            note(self.findings.lost, sources_of(mark, eqn.primitive.name))

    def _spread(self, eqn: core.JaxprEqn, operand: int, value: Any, mark: Mark) -> Any:
        """Returns an operand with a probe if it is a parameter repeated along activations; otherwise loses it."""
        axes = own_axes(eqn, operand, mark)
        if axes is None or not isinstance(mark, View | Entrywise):
            self._lose(eqn, [mark])
            return value
        shape = shape_of(eqn.outvars[0] if eqn.primitive.name in ENTRYWISE else eqn.invars[operand])
        if isinstance(mark, Entrywise):
            view, name = mark.view, mark.name
            derivative = mark.derivative.reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])
        else:
            view, name, derivative = unrepeated(mark), eqn.primitive.name, jnp.ones([1] * len(shape))
        out, varying = jax.ShapeDtypeStruct(shape, value.dtype), mesh_axes_of(eqn.invars[operand])
        spread = Spread(views=(view,), name=name, out=out, mesh_axes=varying, axes=axes)
        return self._record(spread, derivative, jnp.broadcast_to(value, shape))

    def _scan(self, eqn: core.JaxprEqn, values: list[Any], marks: list[Mark]) -> list[Any]:
        """Follows parameters into the iterations, as constants or in slices."""
        num_consts, num_carry = scan_counts(eqn)
        first_slice = num_consts + num_carry
        consts, carry, slices = values[:num_consts], values[num_consts:first_slice], values[first_slice:]
        inner_marks = [
            None if num_consts <= i < first_slice else inside_scan(mark, i >= first_slice, eqn.params["length"])
            for i, mark in enumerate(marks)
        ]
        self._lose(eqn, [mark for mark, inner in zip(marks, inner_marks, strict=True) if inner is None])
        known, probes, first = None, None, len(self.findings.places)
        if self._known is not None and self._probes is not None:
            known = self._known.scans[len(self.findings.scans)]
            probes = self._probes[first : first + len(known.places)]

        def body(carry: list[Any], slices_and_probes: Any) -> tuple[list[Any], Any]:
            slices, probes = slices_and_probes
            inner = _Interpreter(known, probes)
            results, result_marks = inner.walk(eqn.params["jaxpr"], [*consts, *carry, *slices], inner_marks)
            inner._lose(eqn, result_marks)
            return results[:num_carry], (results[num_carry:], inner.activations, inner.findings)

        loop = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        carry, (stacked, activations, found) = jax.lax.scan(body, carry, (slices, probes), **loop)
        self.activations += activations
        self.findings.scans.append(found)
        for mine, inner_ones in ((self.findings.lost, found.lost), (self.findings.penalties, found.penalties)):
            for path, names in inner_ones.items():
                mine.setdefault(path, set()).update(names)
        for place in found.places:
            lengths = (eqn.params["length"], *place.lengths)
            micro_batches = (is_micro_batch(eqn.params["jaxpr"]), *place.micro_batches)
            self.findings.places.append(dataclasses.replace(place, lengths=lengths, micro_batches=micro_batches))
        return [*carry, *stacked]

"""Where a function's parameters meet activations, read off its jaxpr, JAX's own form of a traced function."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from optcurv.accumulation import is_micro_batch
from optcurv.convolutions import is_jaxpr
from optcurv.kronecker.marks import (
    CASTS,
    ENTRYWISE,
    Entrywise,
    alike,
    applied_mark,
    inside_scan,
    is_bias,
    is_of_parameters_alone,
    is_penalty,
    lookup_mark,
    mesh_axes_of,
    note,
    own_axes,
    product_mark,
    rearranged,
    result_mark,
    scan_counts,
    sources_of,
    unrepeated,
    views_of,
)
from optcurv.kronecker.places import Place, Product, Spread, View, bind, shape_of


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
    marks = [View(leaf, math.prod(shape_of(variable))) for leaf, variable in enumerate(invars)]
    counts: dict[int, int] = {}

    def run(params: Any, probes: list[jax.Array] | None) -> tuple[Any, _Recorder]:
        recorder = _Recorder(counts, probes)
        results, result_marks = recorder.walk(traced, jax.tree.leaves(params), marks)
        for mark in result_marks:
            note(recorder.penalties, sources_of(mark, "the result"))
        return jax.tree.unflatten(jax.tree.structure(out_shape), results), recorder

    def evaluate(params: Any, probes: list[jax.Array]) -> tuple[Any, list[jax.Array]]:
        result, recorder = run(params, probes)
        return result, recorder.activations

    found: list[_Recorder] = []
    jax.eval_shape(lambda params: found.append(run(params, None)[1]), params)
    return Recording(found[-1].places, found[-1].lost, found[-1].penalties, evaluate)


_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}


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
        if name in CASTS:
            return bind(eqn, values), [alike(eqn, mark) for mark in marks]
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
        return bind(eqn, values), [alike(eqn, mark)]

    def _meeting(self, eqn: core.JaxprEqn, values: list[Any], marks: list[Any]) -> tuple[list[Any], list[Any]]:
        """Parameters meet activations, or one another."""
        name = eqn.primitive.name
        place = product_mark(eqn, marks) or lookup_mark(eqn, marks)
        if place is not None:
            self._lose(eqn, [None if views_of(mark) == place.views else mark for mark in marks])
            (result,) = bind(eqn, values)
            if isinstance(place, Product):
                return [self._record(place, values[place.comes_first], result)], [result_mark(place)]
            return [self._record(place, values[1][..., 0], result)], []
        if name == "add" and is_bias(eqn, marks):
            return bind(eqn, values), []
        if name in {"add", "sub"} and is_penalty(eqn, marks):
            for mark in marks:
                note(self.penalties, sources_of(mark, name))
            return bind(eqn, values), []
        if is_of_parameters_alone(eqn, marks):
            return bind(eqn, values), [applied_mark(eqn, values, marks)] * len(eqn.outvars)
        return bind(eqn, [self._spread(eqn, i, value, marks[i]) for i, value in enumerate(values)]), []

    def _record(self, place: Place, activations: jax.Array, value: jax.Array) -> jax.Array:
        """Notes a place and its activations; returns the value with its probe."""
        self.places.append(place)
        self.activations.append(activations)
        return value if self._probes is None else value + self._probes[len(self.places) - 1]

    def _lose(self, eqn: core.JaxprEqn, marks: Sequence[Any]) -> None:
        for mark in marks:
            note(self.lost, sources_of(mark, eqn.primitive.name))

    def _spread(self, eqn: core.JaxprEqn, place: int, value: Any, mark: Any) -> Any:
        """Returns an operand with a probe if it is a parameter repeated along activations; otherwise it is lost."""
        axes = own_axes(eqn, place, mark)
        if axes is None:
            self._lose(eqn, [mark])
            return value
        shape = shape_of(eqn.outvars[0] if eqn.primitive.name in ENTRYWISE else eqn.invars[place])
        if isinstance(mark, Entrywise):
            view, name = mark.view, mark.name
            derivative = mark.derivative.reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])
        else:
            view, name, derivative = unrepeated(mark), eqn.primitive.name, jnp.ones([1] * len(shape))
        out, varying = jax.ShapeDtypeStruct(shape, value.dtype), mesh_axes_of(eqn.invars[place])
        spread = Spread(views=(view,), name=name, out=out, mesh_axes=varying, axes=axes)
        return self._record(spread, derivative, jnp.broadcast_to(value, shape))

    def _scan(self, eqn: core.JaxprEqn, values: list[Any], marks: list[Any]) -> list[Any]:
        """Follows constants and slices of parameters into the iterations."""
        num_consts, num_carry = scan_counts(eqn)
        first_slice = num_consts + num_carry
        consts, carry, slices = values[:num_consts], values[num_consts:first_slice], values[first_slice:]
        inner_marks = [
            None if num_consts <= i < first_slice else inside_scan(mark, i >= first_slice, eqn.params["length"])
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
            micro_batches = (is_micro_batch(eqn.params["jaxpr"]), *place.micro_batches)
            self.places.append(dataclasses.replace(place, lengths=lengths, micro_batches=micro_batches))
        return [*carry, *stacked]

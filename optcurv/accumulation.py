"""A loss over more examples than fit into memory at once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optcurv.arguments import PyTree, ValueFn, check_function, describe
from optcurv.curvature import Composite


def accumulate(loss_of_batch: Callable[[PyTree], ValueFn], batches: PyTree) -> ValueFn:
    r"""Returns the mean loss over micro-batches as one closure, with the memory of a single one.

    .. math:: L(w) = \frac1m \sum_{i=1}^m L_i(w)

    Its value, gradient and curvature products are those of the whole batch, to rounding, so that a step is the one that
    a large enough machine would take. **Not so with BatchNorm in training mode**, or whatever else mixes the examples
    of a batch: each micro-batch is then normalised by its own statistics, and running statistics that the model
    returns come back once for each micro-batch, all updated from the same old ones; average them, as in
    `jax.tree.map(lambda s: s.mean(0), updated)`.

    Micro-batches are evaluated one after the other, and again where a gradient or a product needs intermediate results
    of the forward pass, so products cost up to half as much again.

    The Kronecker factors of `optcurv.scale_by_kronecker` are computed from all micro-batches together; with
    `curvature_value_fn=loss_of_batch(one_of_them)` from one of them, in the memory of one.

    Args:
      loss_of_batch: maps a micro-batch to its loss closure, or `Composite`, a mean over its examples.
      batches: a pytree of arrays of shape (m, size, ...), such as a batch reshaped.

    Returns:
      The closure; a `Composite`, with all outputs, if `loss_of_batch` returns one. Auxiliary outputs have a new first
      axis, one entry for each micro-batch.

    Raises:
      ValueError: if the arrays differ in their first axis, or have none.
      TypeError: if `loss_of_batch` is no function of a batch, or returns none of the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> x = jnp.arange(12.0).reshape(6, 2)
      >>> loss_of_batch = lambda x: lambda w: jnp.mean((x @ w) ** 2)
      >>> loss = optcurv.accumulate(loss_of_batch, x.reshape(3, 2, 2))
      >>> w = jnp.array([1.0, -1.0])
      >>> print(loss(w), jax.grad(loss)(w).round(2), jax.grad(loss_of_batch(x))(w).round(2))
      1.0 [-10. -12.] [-10. -12.]
    """
    check_function("loss_of_batch", loss_of_batch, "batch", "which returns the loss as a function of params")
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(batches)]
    if len({shape[:1] for shape in shapes}) != 1 or shapes[0] == ():
        raise ValueError(
            f"The arrays of batches must agree in their first axis, one entry a micro-batch; got {shapes}."
        )

    def over_batches(fn: Callable[..., PyTree], *rest: PyTree) -> PyTree:
        """Stacks the results; a backward pass evaluates again what it needs."""
        return jax.lax.map(lambda arguments: _micro_batch(jax.checkpoint(fn))(*arguments), (batches, *rest))

    def value_fn(params: PyTree) -> Any:
        values = over_batches(lambda batch: loss_of_batch(batch)(params))
        return (jnp.mean(values[0]), values[1]) if isinstance(values, tuple) else jnp.mean(values)

    kind = loss_of_batch(jax.tree.map(lambda leaf: leaf[0], batches))
    if not callable(kind):
        raise TypeError(
            "loss_of_batch must return the loss as a function of params, as in "
            f"lambda batch: lambda params: loss(params, batch); it returned {describe(kind)}."
        )
    if not isinstance(kind, Composite):
        return value_fn

    def composite_of(batch: PyTree) -> Composite:
        loss = loss_of_batch(batch)
        assert isinstance(loss, Composite)
        return loss

    return _Accumulated(
        model_fn=lambda params: over_batches(lambda batch: composite_of(batch).model_fn(params)),
        loss_fn=lambda outputs: jnp.mean(over_batches(lambda batch, one: composite_of(batch).loss_fn(one), outputs)),
        has_aux=kind.has_aux,
        value_fn=value_fn,
        composite_of=composite_of,
        batches=batches,
    )


@dataclasses.dataclass(frozen=True)
class _Accumulated(Composite):
    """Its value takes one pass; through all outputs, derivatives would keep the activations of all micro-batches."""

    value_fn: ValueFn = dataclasses.field(kw_only=True)
    composite_of: Callable[[PyTree], Composite] = dataclasses.field(kw_only=True)
    batches: PyTree = dataclasses.field(kw_only=True)

    def __call__(self, params: PyTree, **ignored: Any) -> Any:
        del ignored  # what optax's line searches hand on
        return self.value_fn(params)

    def of(self, params_from: Callable[[Any], PyTree]) -> "_Accumulated":
        """Returns the loss as a function of what `params_from` makes the parameters of."""
        return dataclasses.replace(
            self,
            model_fn=super().of(params_from).model_fn,
            value_fn=lambda given: self.value_fn(params_from(given)),
            composite_of=lambda batch: self.composite_of(batch).of(params_from),
        )

    def mean_over_parts(self, fn: Callable[[Composite], PyTree]) -> PyTree:
        """Returns the mean of a function over the losses of all micro-batches, keeping one value at a time."""
        of_batch = lambda batch: fn(self.composite_of(batch))  # noqa: E731
        add = lambda total, batch: (jax.tree.map(jnp.add, total, of_batch(batch)), None)  # noqa: E731
        first, rest = (jax.tree.map(lambda leaf, part=part: leaf[part], self.batches) for part in (0, slice(1, None)))
        total, _ = jax.lax.scan(add, of_batch(first), rest)
        number = jnp.shape(jax.tree.leaves(self.batches)[0])[0]
        return jax.tree.map(lambda leaf: leaf / number, total)

    def stack_over_parts(self, fn: Callable[[Composite], PyTree]) -> PyTree:
        """Returns the values of a function for the losses of all micro-batches, along a new first axis."""
        return jax.lax.map(lambda batch: fn(self.composite_of(batch)), self.batches)


jax.tree_util.register_dataclass(
    _Accumulated,
    data_fields=["model_fn", "loss_fn", "value_fn", "composite_of", "batches"],
    meta_fields=["has_aux"],
)


def _micro_batch(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Marks the body of a `scan` whose iterations see different examples, as opposed to the steps of a sequence."""

    def optcurv_micro_batch(*arguments: Any) -> Any:
        return fn(*arguments)

    return jax.jit(optcurv_micro_batch)


def is_micro_batch(body: Any) -> bool:
    """Tells whether a jaxpr is such a body."""
    return any(eqn.params.get("name") == "optcurv_micro_batch" for eqn in getattr(body, "jaxpr", body).eqns)

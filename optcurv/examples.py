"""Models that map each example on its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optcurv.arguments import PyTree, check_function


@dataclasses.dataclass(frozen=True)
class PerExample:
    """What `per_example` returns: a function of the parameters, made of functions of the parameters and one example.

    Attributes:
      parts: pairs of such a function and a batch.
    """

    parts: tuple[tuple[Callable[[Any, Any], Any], PyTree], ...]

    def __call__(self, params: PyTree) -> Any:
        """Returns the outputs of the only part, or a tuple of those of each."""
        return self.over_parts(lambda fn, batch: jax.vmap(fn, (None, 0))(params, batch))

    def over_parts(self, of_part: Callable[[Callable[[Any, Any], Any], PyTree], Any]) -> Any:
        """Returns what a function makes of the only part, or a tuple of what it makes of each."""
        results = [of_part(fn, batch) for fn, batch in self.parts]
        return tuple(results) if len(results) > 1 else results[0]

    def of(self, params_from: Callable[[Any], PyTree]) -> "PerExample":
        """Returns the model as a function of what `params_from` makes the parameters of."""

        def of_given(fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
            return lambda given, example: fn(params_from(given), example)

        return PerExample(tuple((of_given(fn), batch) for fn, batch in self.parts))


jax.tree_util.register_dataclass(PerExample, data_fields=["parts"], meta_fields=[])


def per_example(*parts: tuple[Callable[[Any, Any], Any], PyTree]) -> PerExample:
    r"""A `model_fn` from functions of one example each, for a faster Jacobian.

    It returns what `jax.vmap` of each function over its batch does. `optcurv.dense` sees in it that no example's output
    depends on another example, and computes the Jacobian in the time of a few gradients; of any other model it takes as
    many passes over the whole batch as there are parameters, or outputs if they are fewer.

    Args:
      *parts: pairs `(fn, batch)`: a function of the parameters and one example, and a pytree of arrays whose first axis
        is that of the examples. With several pairs, such as the interior and the boundary of a differential equation,
        the outputs are a tuple.

    Returns:
      The model, for `optcurv.Composite`.

    Raises:
      TypeError: if a part is no such pair.
      ValueError: if the arrays of a batch differ in their first axis, or have none.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> curve, ends = (lambda w, x: jnp.cos(w * x)), (lambda w, x: w + x)
      >>> model = optcurv.per_example((curve, jnp.array([0.1, 0.5, 0.9])), (ends, jnp.array([0.0, 1.0])))
      >>> print(*model(jnp.array(0.0)))
      [1. 1. 1.] [0. 1.]
    """
    if not parts:
        raise TypeError("per_example needs at least one pair (fn, batch).")
    for number, part in enumerate(parts):
        name = f"parts[{number}]"
        if not (isinstance(part, tuple) and len(part) == 2):
            raise TypeError(f"{name} must be a pair (fn, batch), as in per_example((residual, points)); got {part!r}.")
        check_function(f"The function of {name}", part[0], "params, example", "of one example without a batch axis")
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(part[1])]
        if len({shape[:1] for shape in shapes}) != 1 or shapes[0] == ():
            raise ValueError(f"The arrays of the batch of {name} must agree in their first axis, got {shapes}.")
    return PerExample(parts)

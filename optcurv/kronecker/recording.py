"""One trace of a loss: its layers, how many examples they see, and what they see of them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optcurv.arguments import PyTree, ValueFn, at_least_float32, by_path, scalar_fn
from optcurv.kronecker.interpreter import Interpretable, interpret
from optcurv.kronecker.layers import Layer, Layers, tell_layers
from optcurv.kronecker.uses import Multiplied, Tap, Use, by_example, mean_square, zeros


class Taps(NamedTuple):
    """The inputs and output gradients of a network's layers, and the squared gradients of its other parameters.

    Attributes:
      uses: for each layer, by path, one `Tap` for each of its uses.
      squares: of parameters in no layer, by path: the mean over examples of the square of each example's own gradient.
        Those of `Layers.estimated` are missing, and those of which no axis of the activations can be the examples'.
    """

    uses: dict[str, list[Tap]]
    squares: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Recording:
    """A function of parameters, traced once.

    Attributes:
      layers: in the function.
      uses: of each parameter, by path.
      traced: the function taken apart.
    """

    layers: Layers
    uses: Mapping[str, Sequence[Use]]
    traced: Interpretable

    def num_examples(self, batch_size: int | None = None) -> int:
        """Returns the number of examples on all devices together; a loss without layers is that of one example.

        Args:
          batch_size: the number of examples on one device; default: the leading axis of the layers' inputs.

        Raises:
          ValueError: if it is not given and the layers' inputs do not agree.
        """
        kernels = [use for layer in self.layers.found for use in self.uses[layer.path]]
        axes = {axis for use in kernels for axis in use.place.mesh_axes}
        return math.prod(jax.lax.axis_size(axis) for axis in axes) * (batch_size or self._leading_size())

    def _leading_size(self) -> int:
        """Returns the size that the inputs of all layers lead with; 1 without layers."""
        kernels = [(layer.path, use) for layer in self.layers.found for use in self.uses[layer.path]]
        sizes = list(dict.fromkeys((path, _leading_size_of(use)) for path, use in kernels))
        if len({size for _, size in sizes}) > 1 or 0 in {size for _, size in sizes}:
            raise ValueError(
                "The number of examples cannot be told: the layers' inputs have leading axes of sizes "
                f"{', '.join(f'{size} ({path})' for path, size in sizes)}. Pass batch_size, the number of examples "
                f"whose mean the loss is; {_LEAVE_OUT}"
            )
        return sizes[0][1] if sizes else 1

    def taps(
        self,
        params: PyTree,
        sample: Callable[[PyTree], PyTree] | None = None,
        *,
        batch_size: int | None = None,
        max_positions: int | None = None,
    ) -> Taps:
        r"""Returns what the layers see of a batch, from one forward and one backward pass.

        Args:
          params: the point at which to look.
          sample: maps the function's outputs to gradients there, of a mean over the examples on one device. Default:
            the function is the loss, a mean over all examples.
          batch_size: the number of examples on one device; default: the leading axis of the layers' inputs.
          max_positions: of a convolution's inputs, keep about so many on a regular grid; default: all. The positions of
            inputs and gradients then no longer match.

        Raises:
          ValueError: if the number of examples cannot be told.
        """
        leaves = by_path(params)
        batch_size = batch_size or self._leading_size()
        num_examples = self.num_examples(batch_size) if sample is None else batch_size
        probes = [zeros(place.probe_shape, place.out.dtype, place.mesh_axes) for place in self.traced.findings.places]
        run = functools.partial(self.traced.evaluate, params)
        outputs, pull_back, activations = jax.vjp(run, probes, has_aux=True)
        (cotangents,) = pull_back(jnp.ones_like(outputs) if sample is None else sample(outputs))

        def arranged(use: Use, max_positions: int | None) -> tuple[jax.Array, ...]:
            return use.arrange(activations[use.index], cotangents[use.index], max_positions)

        uses = {
            layer.path: [
                _tap(layer, arranged(use, max_positions), batch_size, num_examples) for use in self.uses[layer.path]
            ]
            for layer in self.layers.found
        }
        squares = {}
        for path in (path for path in self.layers.others if path not in self.layers.estimated):
            arrays = [use.by_example(arranged(use, None), batch_size) for use in self.uses[path]]
            known = [array for array in arrays if array is not None]
            if len(known) == len(arrays):
                squares[path] = num_examples**2 * mean_square(self.uses[path], known, leaves[path])
        return Taps(uses, squares)


def record(fn: Callable[[PyTree], PyTree], params: PyTree, leave_out: Sequence[str] = ()) -> Recording:
    """Traces a function of parameters; `leave_out` as for `layers`."""
    traced = interpret(fn, params)
    found, uses = tell_layers(traced.findings, params, leave_out)
    return Recording(found, uses, traced)


def layers(value_fn: ValueFn, params: PyTree, *, leave_out: Sequence[str] = ()) -> Layers:
    r"""Finds a network's layers; nothing is computed.

    A layer is a parameter that multiplies activations, in a matrix product or in a convolution, in whatever library it
    is written: it may be cast, transposed, reshaped, concatenated with others, used several times, or used inside of
    `jit`, `jax.checkpoint` and `scan` (recurrent cells, and stacked layers). A bias added to the result joins it, also
    after the result was transposed or reshaped, or under `vmap`.

    Of every other parameter only the diagonal of the Fisher matrix is taken. The table marks as `diagonal` what is used
    in ways that are understood: scales, offsets, embeddings that are looked up, and kernels used in several ways, such
    as an embedding that is the last layer too. Their diagonal is the mean over examples of the squares of each
    example's own gradient, if one axis of the activations is as long as the batch. Otherwise, and for those marked
    `diagonal, estimated`, it is estimated as N times the square of the mean gradient of N examples. That is about right
    where the gradients are mostly noise, and up to N times too large where they agree. A penalty, that is a number made
    of parameters alone and added to the loss, belongs to no example and is left out of the Fisher matrix.

    A layer that does not see the examples must be left out by name: one on constants, such as the coordinates of
    positions, or one on the slots of a mixture of experts, which hold tokens of any example. An error asks for it where
    the number of rows is not a multiple of the batch size. **Where it is a multiple, the rows are taken for examples,**
    as nothing tells them from the tokens of a text.

    The members of an ensemble under `vmap` that share their inputs are one wide layer, with one factor for the outputs
    of all. With inputs of their own, as in `jax.vmap(net)(params, jnp.broadcast_to(x, (members, *x.shape)))`, they are
    a stack.

    Args:
      value_fn: the loss as a function of params.
      params: the parameters, or their shapes.
      leave_out: the paths of parameters, as the table writes them, whose diagonal is to be estimated.

    Returns:
      The layers.

    Raises:
      ValueError: if there is no parameter of a name in `leave_out`.
      TypeError: if `leave_out` is a single string.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> x = jnp.ones((5, 3))
      >>> loss = lambda p: jnp.mean((p["scale"] * (x @ p["w"] + p["b"])) ** 2) + jnp.mean(jnp.sort(p["c"]))
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(2), "c": jnp.ones(4)}
      >>> print(optcurv.layers(loss, params))
      parameter  kind                 factors
      ['w']      dense + bias         (4, 2)
      ['c']      diagonal, estimated  goes into sort
      ['scale']  diagonal             goes into mul
      >>> print(optcurv.layers(loss, params, leave_out=["['w']"]).others["['w']"])
      left out
    """
    return record(scalar_fn(value_fn), params, leave_out).layers


def _leading_size_of(use: Use) -> int:
    """Returns the first axis of rows of a kernel's outputs; 0 if there is none."""
    assert isinstance(use, Multiplied)
    shape = jax.eval_shape(use.outputs, jax.ShapeDtypeStruct(use.place.probe_shape, use.place.out.dtype)).shape
    return shape[1] if len(shape) > 2 else 0


_LEAVE_OUT = (
    "leave out layers that do not see the examples, by layers=optcurv.layers(value_fn, params, leave_out=[...])."
)


def _tap(layer: Layer, arrays: tuple[jax.Array, ...], batch_size: int, num_examples: int) -> Tap:
    inputs, gradients = (by_example(array, batch_size) for array in at_least_float32(arrays))
    if inputs is None or gradients is None:
        raise ValueError(
            f"The inputs of {layer.path}, with axes of sizes {list(arrays[0].shape[1:-1])} beside their features, hold "
            f"no {batch_size} examples. Pass batch_size, the number of examples whose mean the loss is; {_LEAVE_OUT}"
        )
    last = jnp.full_like(inputs[..., :1], layer.bias is not None)
    return Tap(jnp.concatenate([inputs, last], axis=-1), num_examples * gradients)

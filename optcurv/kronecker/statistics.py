"""What a batch shows: inputs of layers, gradients at their outputs, squared gradients of other parameters."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optcurv.arguments import PyTree, ValueFn, at_least_float32, scalar_fn
from optcurv.kronecker.layers import Layer, Layers, describe, layers
from optcurv.kronecker.recording import record_places
from optcurv.kronecker.uses import Use, by_example, mean_square, zeros
from optcurv.sharding import num_devices


class Tap(NamedTuple):
    r"""What a layer saw in one of its uses.

    Attributes:
      inputs: a, of shape `(stack, examples, positions, in_size + 1)`; a bias multiplies the last entry, 1 or else 0.
      gradients: :math:`\beta = \partial \ell_n / \partial s` of every example's own loss, of shape `(stack, examples,
        positions, out_size)`. Summed over positions, :math:`a \beta^\top` is that example's gradient by the kernel.
    """

    inputs: jax.Array
    gradients: jax.Array


class Taps(NamedTuple):
    """What a network's layers saw of a batch, and the squared gradients of the other parameters.

    Attributes:
      layers: found in the loss.
      uses: for each layer, the taps of its uses.
      squares: of parameters in no layer, by their path: the mean over examples of the square of each example's own
        gradient. Those that are not to be had are missing.
    """

    layers: Layers
    uses: list[list[Tap]]
    squares: dict[str, jax.Array]


def tap(
    value_fn: ValueFn,
    params: PyTree,
    *,
    batch_size: int | None = None,
    max_positions: int | None = None,
    leave_out: Sequence[str] = (),
) -> Taps:
    r"""Returns what a network's layers see of a batch, from one forward and one backward pass.

    Args:
      value_fn: the loss as a function of params, a mean over examples.
      params: the point at which to look.
      batch_size: the number of examples it is the mean of; default: the leading axis of the layers' inputs.
      max_positions: of a convolution's inputs, keep about so many on a regular grid; default: all. The positions of
        inputs and gradients then no longer match.
      leave_out: as for `layers`.

    Returns:
      The layers, the taps of each, and the squared gradients of other parameters.

    Raises:
      ValueError: if the number of examples cannot be told.
    """
    found, uses, squares = pull_back_taps(
        scalar_fn(value_fn), params, jnp.ones_like, batch_size, max_positions, leave_out
    )
    count = num_devices(uses)  # of a mean over them all an example has a smaller share
    uses = [[use._replace(gradients=count * use.gradients) for use in several] for several in uses]
    return Taps(found, uses, {path: count**2 * square for path, square in squares.items()})


def count_examples(
    value_fn: ValueFn, params: PyTree, batch_size: int | None = None, leave_out: Sequence[str] = ()
) -> int:
    """Returns the number of examples that the layers' inputs lead with, on all devices together."""
    if batch_size and not layers(value_fn, params, leave_out=leave_out).found:
        return batch_size
    counts: list[int] = []

    def count(params: PyTree) -> None:
        uses = tap(value_fn, params, batch_size=batch_size, leave_out=leave_out).uses
        counts.append(num_devices(uses) * uses[0][0].gradients.shape[1])

    jax.eval_shape(count, params)
    return counts[0]


def pull_back_taps(
    fn: Callable[[PyTree], PyTree],
    params: PyTree,
    cotangent_of: Callable[[PyTree], PyTree],
    batch_size: int | None,
    max_positions: int | None,
    leave_out: Sequence[str] = (),
) -> Taps:
    """As `tap`, for a function of any result, pulled back from `cotangent_of(result)`."""
    recording = record_places(fn, params)
    found, uses = describe(recording, params, leave_out)
    if not found.found:
        raise ValueError(f"No layer was found: no parameter multiplies activations as it is.\n{found}")
    probes = [zeros((*place.lengths, *place.out.shape), place.out.dtype, place.mesh_axes) for place in recording.places]
    result, pull_back, activations = jax.vjp(functools.partial(recording.evaluate, params), probes, has_aux=True)
    (cotangents,) = pull_back(cotangent_of(result))
    leaves = jax.tree.leaves(params)

    def arranged(use: Use, max_positions: int | None) -> tuple[jax.Array, ...]:
        return use.arrange(activations[use.index], cotangents[use.index], max_positions)

    of_layers = [[arranged(use, max_positions) for use in uses[layer.kernel]] for layer in found.found]
    if batch_size is None:
        batch_size = _batch_size(found, of_layers)
    taps = [
        [_tap(layer, arrays, batch_size) for arrays in several]
        for layer, several in zip(found.found, of_layers, strict=True)
    ]
    squares = {}
    for leaf in found.others.keys() - found.estimated:
        arrays = [use.by_example(arranged(use, None), batch_size) for use in uses[leaf]]
        if None not in arrays:
            squares[found.others[leaf][0]] = batch_size**2 * mean_square(uses[leaf], arrays, leaves[leaf])
    return Taps(found, taps, squares)


def _batch_size(found: Layers, arranged: list[list[tuple[jax.Array, ...]]]) -> int:
    """Returns the size all layers' inputs lead with."""
    sizes = {
        layer.path: gradients.shape[1] if gradients.ndim > 2 else 0
        for layer, pairs in zip(found.found, arranged, strict=True)
        for *_, gradients in pairs
    }
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(
            "The number of examples cannot be told: the layers' inputs have leading axes of sizes "
            f"{', '.join(f'{size} ({path})' for path, size in sizes.items())}. Pass batch_size, the number of examples "
            f"whose mean the loss is; {_LEAVE_OUT}"
        )
    return next(iter(sizes.values()))


_LEAVE_OUT = (
    "leave out layers that do not see the examples, by layers=optcurv.layers(value_fn, params, leave_out=[...])."
)


def _tap(layer: Layer, arrays: tuple[jax.Array, ...], batch_size: int) -> Tap:
    inputs, gradients = (by_example(array, batch_size) for array in at_least_float32(arrays))
    if inputs is None or gradients is None:
        raise ValueError(
            f"The inputs of {layer.path}, with axes of sizes {list(arrays[0].shape[1:-1])} beside their features, hold "
            f"no {batch_size} examples. Pass batch_size, the number of examples whose mean the loss is; {_LEAVE_OUT}"
        )
    last = jnp.full_like(inputs[..., :1], layer.bias is not None)
    inputs = jnp.concatenate([inputs, last], axis=-1)
    return Tap(inputs, batch_size * gradients)

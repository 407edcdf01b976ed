"""How a parameter is used at a place, and what that makes the gradients of single examples."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optcurv.arguments import wide_dtype
from optcurv.kronecker.arrangements import (
    convolution_kernel,
    convolution_outputs,
    dense_inputs,
    dense_kernel,
    dense_outputs,
    flattened,
    patches,
)
from optcurv.kronecker.places import Lookup, Place, Product, Spread, View
from optcurv.sharding import mesh_axes


def zeros(shape: tuple[int, ...], dtype: Any, axes: tuple[str, ...]) -> jax.Array:
    """Returns zeros whose cotangents may differ from device to device along these mesh axes."""
    zeros = jnp.zeros(shape, dtype)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


class Tap(NamedTuple):
    r"""The inputs of a layer in one of its uses, and the gradients at its outputs.

    Attributes:
      inputs: a, of shape `(stack, examples, positions, in_size + 1)`; the last entry is 1 if there is a bias to
        multiply, otherwise 0.
      gradients: :math:`\beta = \partial \ell_n / \partial s` of each example's own loss, of shape `(stack, examples,
        positions, out_size)`. Summed over positions, :math:`a \beta^\top` is that example's gradient by the kernel.
    """

    inputs: jax.Array
    gradients: jax.Array


def by_example(array: jax.Array, batch_size: int) -> jax.Array | None:
    """Arranges `(stack, ..., size)` as `(stack, examples, positions, size)`; None if no axis can be the examples'."""
    stack, *rows, size = array.shape
    if batch_size in rows:
        array = jnp.moveaxis(array, 1 + rows.index(batch_size), 1)
    elif not rows or rows[0] % batch_size != 0:  # a multiple is examples times positions, such as tokens of texts
        return None
    return array.reshape(stack, batch_size, -1, size)


@dataclasses.dataclass(frozen=True)
class Use:
    """One parameter's part in a place where parameters meet activations.

    Attributes:
      place: the place.
      index: its number among the places of the loss.
    """

    place: Place
    index: int

    @property
    def view(self) -> View:
        return self.place.views[0]

    def arrange(
        self, activations: jax.Array, cotangents: jax.Array, max_positions: int | None
    ) -> tuple[jax.Array, ...]:
        """Arranges the parameter's part of the place's activations and cotangents.

        Each array is arranged as (stack, rows, size), with any number of axes of rows, the examples' first. The last
        one is of cotangents.
        """
        raise NotImplementedError

    def by_example(self, arrays: tuple[jax.Array, ...], batch_size: int) -> list[jax.Array] | None:
        """Arranges each array as (stack, examples, positions, size); None if no axis can be the examples'."""
        if not isinstance(self.place, Product) and batch_size not in arrays[0].shape[1:-1]:
            return None  # a multiple is no evidence here: tables and offsets of positions alone are common
        split = [by_example(array, batch_size) for array in arrays]
        return None if any(array is None for array in split) else [array for array in split if array is not None]

    def gradient(self, like: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
        """Returns an example's gradient by the parameter, from arrays (stack, positions, size)."""
        raise NotImplementedError

    def _unscanned(self, arrange: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
        """Arranges an array with leading axes of the surrounding scans, given how to arrange it without.

        Iterations with a slice each of the parameter make a stack; those that share it are positions, or micro-batches
        of examples.
        """
        for _ in self.view.sliced:
            arrange = jax.vmap(arrange)
        array = arrange(array)
        depth = len(self.view.sliced)
        stack = [axis for axis in range(depth) if self.view.sliced[axis]]
        batches = [axis for axis in range(depth) if self.place.micro_batches[axis]]
        shared = [axis for axis in range(depth) if axis not in {*stack, *batches}]
        examples = [depth + 1] if array.ndim > depth + 2 else []
        rest = range(depth + 1 + len(examples), array.ndim)
        array = jnp.transpose(array, (*stack, depth, *batches, *examples, *shared, *rest))
        array = array.reshape(-1, *array.shape[len(stack) + 1 :])
        return array.reshape(len(array), -1, *array.shape[1 + len(batches) + len(examples) :]) if batches else array


@dataclasses.dataclass(frozen=True)
class Multiplied(Use):
    """A kernel (stack, in, out) that multiplies inputs (stack, rows, in), for outputs (stack, rows, out).

    Attributes:
      part: the number of the kernel among the parameters that make up the operand.
    """

    place: Product
    part: int

    @property
    def view(self) -> View:
        return self.place.views[self.part]

    def layout(self) -> Any:
        """Returns a value that is equal for uses that can share their factors."""
        product = self.place
        axes = product.params["dimension_numbers"]
        arrangement = axes.rhs_spec if product.is_convolution else product.parameter_axes()
        return product.name, arrangement, product.params.get("feature_group_count"), self.view.layout()

    def bias(self) -> str | None:
        """Returns the path of the parameter that is added to this part of the result."""
        biases = self.place.bias
        return biases[self.part].path if len(biases) == len(self.place.views) else None

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """Arranges an array like the kernel as (stack, in, out)."""
        arrange = functools.partial(convolution_kernel if self.place.is_convolution else dense_kernel, self.place)
        for _ in range(sum(self.view.sliced)):
            arrange = jax.vmap(arrange)
        matrices = arrange(self.view(leaf))
        return matrices.reshape(-1, *matrices.shape[-2:])

    def arrange(
        self, activations: jax.Array, cotangents: jax.Array, max_positions: int | None
    ) -> tuple[jax.Array, ...]:
        return self._inputs(activations, max_positions), self.outputs(cotangents)

    def _inputs(self, activations: jax.Array, max_positions: int | None) -> jax.Array:
        product = self.place
        if product.is_convolution:
            return self._unscanned(functools.partial(patches, product, max_positions), activations)
        inputs = self._unscanned(functools.partial(dense_inputs, product), activations)
        return inputs[..., self._part_of(product.parameter_axes()[1])]

    def outputs(self, cotangents: jax.Array) -> jax.Array:
        """Arranges this part of the cotangents as (stack, rows, out)."""
        product = self.place
        if product.is_convolution:
            return self._unscanned(functools.partial(convolution_outputs, product), cotangents)
        outputs = self._unscanned(functools.partial(dense_outputs, product), cotangents)
        return outputs[..., self._part_of(product.parameter_axes()[2])]

    def _part_of(self, axes: list[int]) -> slice:
        """Returns where this kernel's part is along axes of the operand that become one; all, if it is not joined."""
        product = self.place
        if product.axis is None or product.axis not in axes:
            return slice(None)
        breadth = product.shape[product.axis]
        sizes = [view.size * breadth // math.prod(product.shape) for view in product.views]
        start = sum(sizes[: self.part])
        return slice(start, start + sizes[self.part])

    def gradient(self, like: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
        matrix = jnp.einsum("bpi,bpo->bio", *arrays, precision="highest")
        return _unarranged(self.matrix, like, matrix)


@dataclasses.dataclass(frozen=True)
class Added(Use):
    """The bias of a product, where it forms no layer with the kernel."""

    kernel: Multiplied

    @property
    def view(self) -> View:
        return self.kernel.view

    def arrange(
        self, activations: jax.Array, cotangents: jax.Array, max_positions: int | None
    ) -> tuple[jax.Array, ...]:
        return (self.kernel.outputs(cotangents),)

    def gradient(self, like: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
        return jnp.sum(arrays[0], axis=1).reshape(like.shape)


@dataclasses.dataclass(frozen=True)
class Repeated(Use):
    """A parameter, or a function of each of its entries, that is broadcast to the activations."""

    place: Spread

    def arrange(
        self, activations: jax.Array, cotangents: jax.Array, max_positions: int | None
    ) -> tuple[jax.Array, ...]:
        gradients = activations.astype(cotangents.dtype) * cotangents
        axes = self.place.axes
        rows = [axis for axis in range(len(self.place.out.shape)) if axis not in axes]
        flatten = lambda array: flattened(jnp.transpose(array, (*rows, *axes)), 0, len(axes))  # noqa: E731
        return (self._unscanned(flatten, gradients),)

    def gradient(self, like: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
        total = jnp.sum(arrays[0], axis=1)
        return _unarranged(lambda leaf: self.view(leaf).reshape(total.shape), like, total)


@dataclasses.dataclass(frozen=True)
class LookedUp(Use):
    """A parameter whose rows are looked up."""

    place: Lookup

    def arrange(
        self, activations: jax.Array, cotangents: jax.Array, max_positions: int | None
    ) -> tuple[jax.Array, ...]:
        num_features = cotangents.ndim - activations.ndim
        gradients = self._unscanned(lambda array: flattened(array, 0, num_features), cotangents)
        return self._unscanned(lambda array: array[None, ..., None], activations), gradients

    def gradient(self, like: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
        return self._scattered(like, arrays[0][..., 0], arrays[1])

    def mean_square(self, like: jax.ShapeDtypeStruct, indices: jax.Array, gradients: jax.Array) -> jax.Array:
        """Returns the mean over examples of the squared gradient, without holding a whole gradient for each example."""

        def summed(indices: jax.Array, gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Sums the gradients of an index that occurs several times in an example."""
            distinct, places = jnp.unique(indices, size=indices.size, return_inverse=True)
            return distinct, jnp.zeros_like(gradients).at[places].add(gradients)

        indices, gradients = jax.vmap(jax.vmap(summed))(indices[..., 0], gradients)
        num_examples = indices.shape[1]
        flat = gradients.reshape(len(indices), -1, gradients.shape[-1])
        return self._scattered(like, indices.reshape(len(indices), -1), flat**2) / num_examples

    def _scattered(self, like: jax.ShapeDtypeStruct, indices: jax.Array, rows: jax.Array) -> jax.Array:
        """Adds rows (stack, positions, size) up into an array of the parameter's shape."""

        def arrange(leaf: jax.Array) -> jax.Array:
            return self.view(leaf).reshape(len(indices), -1, rows.shape[-1])

        def scatter(zeros: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
            return zeros.at[indices].add(rows, mode=self.place.mode, wrap_negative_indices=False)

        zeros = jnp.zeros(jax.eval_shape(arrange, like).shape, rows.dtype)
        return _unarranged(arrange, like, jax.vmap(scatter)(zeros, indices, rows))


def _unarranged(arrange: Callable[[jax.Array], jax.Array], like: jax.ShapeDtypeStruct, array: jax.Array) -> jax.Array:
    """Undoes a rearrangement: as it moves every entry to a place of its own, its transpose is its inverse."""
    _, pull_back = jax.vjp(arrange, zeros(like.shape, like.dtype, mesh_axes(array)))
    return pull_back(array)[0]


def mean_square(uses: Sequence[Use], arrays: Sequence[Sequence[jax.Array]], leaf: jax.Array) -> jax.Array:
    """Returns the mean over examples of the squared gradient by a parameter, from arrays `by_example` of its uses."""
    dtype = wide_dtype([several[-1] for several in arrays])
    cast = lambda array: array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array  # noqa: E731
    arrays = jax.tree.map(cast, arrays)
    like = jax.ShapeDtypeStruct(jnp.shape(leaf), dtype)
    if len(uses) == 1 and isinstance(uses[0], LookedUp):
        return uses[0].mean_square(like, *arrays[0])
    by_example = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), arrays)

    def square(arrays: list[list[jax.Array]]) -> jax.Array:
        gradients = [use.gradient(like, *array) for use, array in zip(uses, arrays, strict=True)]
        return functools.reduce(jnp.add, gradients) ** 2

    if not any(isinstance(use, Multiplied | LookedUp) for use in uses):
        return jnp.mean(jax.vmap(square)(by_example), axis=0)
    # One after the other: the gradients of all examples may not fit into memory.
    start = zeros(like.shape, like.dtype, mesh_axes(by_example))
    total, _ = jax.lax.scan(lambda total, one: (total + square(one), None), start, by_example)
    return total / len(by_example[0][-1])

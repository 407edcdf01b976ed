"""The layers of a network, found from the loss closure alone: their inputs and the gradients at their outputs."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optcurv.arguments import PyTree, ValueFn, at_least_float32, path_name, scalar_fn, wide_dtype
from optcurv.devices import mesh_axes, num_devices
from optcurv.jaxpr import Lookup, Place, Product, Recording, Spread, View, record_places


@dataclasses.dataclass(frozen=True)
class Layer:
    r"""A kernel W, perhaps with a bias, that multiplies activations: :math:`s = W^\top a`.

    Attributes:
      path: of the kernel, as `path_name` writes it.
      kind: `dense` or `convolution`.
      kernel: its place among the parameters' leaves.
      bias: likewise; None without one.
      stack: how many such matrices the kernel holds (groups of a convolution, layers under `nn.scan`).
      in_size: the length of a, without what a bias multiplies.
      out_size: the length of s.
      num_uses: how many products the kernel takes part in.
    """

    path: str
    kind: str
    kernel: int
    bias: int | None
    stack: int
    in_size: int
    out_size: int
    num_uses: int
    matrix_of: Callable[[jax.Array], jax.Array] = dataclasses.field(repr=False, compare=False)
    """Arranges an array like the kernel as `(stack, in_size, out_size)`."""

    def parts(self, leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Arranges kernel and bias, if any, as matrices `(stack, in_size, out_size)` and `(stack, 1, out_size)`."""
        matrix = self.matrix_of(leaves[self.kernel])
        return (matrix,) if self.bias is None else (matrix, leaves[self.bias].reshape(self.stack, 1, -1))

    def leaves(self, parts: Sequence[jax.Array], like: Sequence[jax.Array]) -> dict[int, jax.Array]:
        """Undoes `parts`: returns kernel and bias by their places, in the shapes of the leaves `like`."""
        kernel = jax.ShapeDtypeStruct(jnp.shape(like[self.kernel]), parts[0].dtype)
        # `matrix_of` moves every entry to one place, so its transpose is its inverse.
        (unmoved,) = jax.linear_transpose(self.matrix_of, kernel)(parts[0])
        if self.bias is None:
            return {self.kernel: unmoved}
        return {self.kernel: unmoved, self.bias: parts[1].reshape(jnp.shape(like[self.bias]))}


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a network, and why the other parameters belong to none; `print` shows them as a table.

    Attributes:
      found: the layers, in the order of the parameters' leaves.
      others: for each leaf in no layer, its path and what it goes into.
      estimated: those of the others whose gradient of a single example is not to be had.
      left_out: the paths that were to be left out.
    """

    found: tuple[Layer, ...]
    others: dict[int, tuple[str, str]]
    estimated: frozenset[int] = frozenset()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("parameter", "kind", "factors")]
        for layer in self.found:
            stack = f"{layer.stack} x " if layer.stack > 1 else ""
            bias = " + bias" if layer.bias is not None else ""
            uses = f", {layer.num_uses} uses" if layer.num_uses > 1 else ""
            sizes = f"{stack}({layer.in_size + (layer.bias is not None)}, {layer.out_size})"
            rows.append((layer.path, layer.kind + bias + uses, sizes))
        for leaf, (path, reason) in self.others.items():
            rows.append((path, "diagonal, estimated" if leaf in self.estimated else "diagonal", reason))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        return "\n".join(f"{path:<{widths[0]}}  {kind:<{widths[1]}}  {sizes}" for path, kind, sizes in rows)


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
      >>> print(optcurv.layers(loss, params, leave_out=["['w']"]).others[3])
      ("['w']", 'left out')
    """
    return _describe(record_places(scalar_fn(value_fn), params), params, leave_out)[0]


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
    found, uses = _describe(recording, params, leave_out)
    if not found.found:
        raise ValueError(f"No layer was found: no parameter multiplies activations as it is.\n{found}")
    probes = [
        _zeros((*place.lengths, *place.out.shape), place.out.dtype, place.mesh_axes) for place in recording.places
    ]
    result, pull_back, activations = jax.vjp(functools.partial(recording.evaluate, params), probes, has_aux=True)
    (cotangents,) = pull_back(cotangent_of(result))
    leaves = jax.tree.leaves(params)

    def arranged(use: _Use, max_positions: int | None) -> tuple[jax.Array, ...]:
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
            squares[found.others[leaf][0]] = batch_size**2 * _mean_square(uses[leaf], arrays, leaves[leaf])
    return Taps(found, taps, squares)


def _zeros(shape: tuple[int, ...], dtype: Any, axes: tuple[str, ...]) -> jax.Array:
    """Returns zeros that differ, or rather their cotangents do, from device to device along axes of a mesh."""
    zeros = jnp.zeros(shape, dtype)
    return jax.lax.pcast(zeros, axes, to="varying") if axes else zeros


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
    inputs, gradients = (_by_example(array, batch_size) for array in at_least_float32(arrays))
    if inputs is None or gradients is None:
        raise ValueError(
            f"The inputs of {layer.path}, with axes of sizes {list(arrays[0].shape[1:-1])} beside their features, hold "
            f"no {batch_size} examples. Pass batch_size, the number of examples whose mean the loss is; {_LEAVE_OUT}"
        )
    last = jnp.full_like(inputs[..., :1], layer.bias is not None)
    inputs = jnp.concatenate([inputs, last], axis=-1)
    return Tap(inputs, batch_size * gradients)


def _by_example(array: jax.Array, batch_size: int) -> jax.Array | None:
    """Arranges `(stack, ..., size)` as `(stack, examples, positions, size)`; None if it does not hold the examples."""
    stack, *rows, size = array.shape
    if batch_size in rows:
        array = jnp.moveaxis(array, 1 + rows.index(batch_size), 1)
    elif not rows or rows[0] % batch_size != 0:  # otherwise examples times positions, as in tokens of a text
        return None
    return array.reshape(stack, batch_size, -1, size)


@dataclasses.dataclass(frozen=True)
class _Use:
    """A place where a parameter meets activations.

    Every one is seen as a stack of arrays (stack, rows, size), with any number of axes of rows, those of the examples
    first; the gradients at what comes out of it are the last of the arrays.
    """

    place: Place
    index: int

    @property
    def view(self) -> View:
        return self.place.views[0]

    def arrange(
        self, activations: jax.Array, cotangents: jax.Array, max_positions: int | None
    ) -> tuple[jax.Array, ...]:
        """Arranges a place's activations and the gradients at what comes out of it, the parameter's part of either."""
        raise NotImplementedError

    def by_example(self, arrays: tuple[jax.Array, ...], batch_size: int) -> list[jax.Array] | None:
        """Arranges each as (stack, examples, positions, size); None if the examples cannot be told."""
        if not isinstance(self.place, Product) and batch_size not in arrays[0].shape[1:-1]:
            return None  # tables and offsets of positions alone are common: a multiple tells nothing
        split = [_by_example(array, batch_size) for array in arrays]
        return None if any(array is None for array in split) else [array for array in split if array is not None]

    def gradient(self, like: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
        """Returns an example's gradient by the parameter, from arrays (stack, positions, size)."""
        raise NotImplementedError

    def _unscanned(self, arrange: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
        """Slices of a kernel make a stack; iterations that share one are positions, or micro-batches of examples."""
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
class _Multiplied(_Use):
    """A product that a kernel takes part in, and which of the parts of its operand the kernel is.

    Parameters (stack, in, out) multiply inputs (stack, rows, in), for results (stack, rows, out).
    """

    place: Product
    part: int

    @property
    def view(self) -> View:
        return self.place.views[self.part]

    def layout(self) -> Any:
        """Returns what is equal for uses that can share their factors."""
        product = self.place
        axes = product.params["dimension_numbers"]
        arrangement = axes.rhs_spec if product.is_convolution else product.parameter_axes()
        return product.name, arrangement, product.params.get("feature_group_count"), self.view.layout()

    def bias(self) -> int | None:
        """Returns the parameter added to this part's results."""
        biases = self.place.bias
        if len(biases) != len(self.place.views):
            return None
        return biases[self.part].leaf

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """Arranges an array like the kernel as (stack, in, out)."""
        arrange = functools.partial(_convolution_kernel if self.place.is_convolution else _dense_kernel, self.place)
        for _ in range(sum(self.view.sliced)):
            arrange = jax.vmap(arrange)
        matrices = arrange(self.view(leaf))
        return matrices.reshape(-1, *matrices.shape[-2:])

    def arrange(
        self, activations: jax.Array, cotangents: jax.Array, max_positions: int | None
    ) -> tuple[jax.Array, ...]:
        product = self.place
        if product.is_convolution:
            inputs = self._unscanned(functools.partial(_patches, product, max_positions), activations)
            return inputs, self._unscanned(functools.partial(_convolution_outputs, product), cotangents)
        inputs = self._unscanned(functools.partial(_dense_inputs, product), activations)
        outputs = self._unscanned(functools.partial(_dense_outputs, product), cotangents)
        if product.axis is None:
            return inputs, outputs
        breadth = product.shape[product.axis]
        sizes = [view.size * breadth // math.prod(product.shape) for view in product.views]
        start = sum(sizes[: self.part])
        mine = slice(start, start + sizes[self.part])
        if product.axis in product.parameter_axes()[1]:
            return inputs[..., mine], outputs
        return inputs, outputs[..., mine]

    def gradient(self, like: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
        matrix = jnp.einsum("bpi,bpo->bio", *arrays, precision="highest")
        return _unarranged(self.matrix, like, matrix)


@dataclasses.dataclass(frozen=True)
class _Added(_Use):
    """A bias of a product whose kernel it does not join."""

    kernel: _Multiplied

    @property
    def view(self) -> View:
        return self.kernel.view

    def arrange(
        self, activations: jax.Array, cotangents: jax.Array, max_positions: int | None
    ) -> tuple[jax.Array, ...]:
        return self.kernel.arrange(activations, cotangents, max_positions)[1:]

    def gradient(self, like: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
        return jnp.sum(arrays[0], axis=1).reshape(like.shape)


@dataclasses.dataclass(frozen=True)
class _Repeated(_Use):
    """A parameter repeated along activations, perhaps after operations on its entries."""

    place: Spread

    def arrange(
        self, activations: jax.Array, cotangents: jax.Array, max_positions: int | None
    ) -> tuple[jax.Array, ...]:
        gradients = activations.astype(cotangents.dtype) * cotangents
        axes = self.place.axes
        rows = [axis for axis in range(len(self.place.out.shape)) if axis not in axes]
        flatten = lambda array: _flattened(jnp.transpose(array, (*rows, *axes)), 0, len(axes))  # noqa: E731
        return (self._unscanned(flatten, gradients),)

    def gradient(self, like: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
        total = jnp.sum(arrays[0], axis=1)
        return _unarranged(lambda leaf: self.view(leaf).reshape(total.shape), like, total)


@dataclasses.dataclass(frozen=True)
class _LookedUp(_Use):
    """A parameter whose rows are looked up."""

    place: Lookup

    def arrange(
        self, activations: jax.Array, cotangents: jax.Array, max_positions: int | None
    ) -> tuple[jax.Array, ...]:
        num_features = cotangents.ndim - activations.ndim
        gradients = self._unscanned(lambda array: _flattened(array, 0, num_features), cotangents)
        return self._unscanned(lambda array: array[None, ..., None], activations), gradients

    def gradient(self, like: jax.ShapeDtypeStruct, *arrays: jax.Array) -> jax.Array:
        return self._scattered(like, arrays[0][..., 0], arrays[1])

    def mean_square(self, like: jax.ShapeDtypeStruct, indices: jax.Array, gradients: jax.Array) -> jax.Array:
        """Returns the mean of squares over examples, without an array like the parameter for each of them."""

        def summed(indices: jax.Array, gradients: jax.Array) -> tuple[jax.Array, jax.Array]:
            """An index that comes several times in an example counts once, with the sum of its gradients."""
            distinct, places = jnp.unique(indices, size=indices.size, return_inverse=True)
            return distinct, jnp.zeros_like(gradients).at[places].add(gradients)

        indices, gradients = jax.vmap(jax.vmap(summed))(indices[..., 0], gradients)
        num_examples = indices.shape[1]
        flat = gradients.reshape(len(indices), -1, gradients.shape[-1])
        return self._scattered(like, indices.reshape(len(indices), -1), flat**2) / num_examples

    def _scattered(self, like: jax.ShapeDtypeStruct, indices: jax.Array, rows: jax.Array) -> jax.Array:
        """Adds up rows (stack, positions, size) in an array like the parameter."""

        def arrange(leaf: jax.Array) -> jax.Array:
            return self.view(leaf).reshape(len(indices), -1, rows.shape[-1])

        def scatter(zeros: jax.Array, indices: jax.Array, rows: jax.Array) -> jax.Array:
            return zeros.at[indices].add(rows, mode=self.place.mode, wrap_negative_indices=False)

        zeros = jnp.zeros(jax.eval_shape(arrange, like).shape, rows.dtype)
        return _unarranged(arrange, like, jax.vmap(scatter)(zeros, indices, rows))


def _unarranged(arrange: Callable[[jax.Array], jax.Array], like: jax.ShapeDtypeStruct, array: jax.Array) -> jax.Array:
    """Undoes what moves every entry to one place: its transpose is its inverse."""
    _, pull_back = jax.vjp(arrange, _zeros(like.shape, like.dtype, mesh_axes(array)))
    return pull_back(array)[0]


def _mean_square(uses: list[_Use], arrays: list[list[Any]], leaf: jax.Array) -> jax.Array:
    """Returns the mean of the squares of each example's gradient by a parameter, from arrays `_by_example`."""
    dtype = wide_dtype([several[-1] for several in arrays])
    cast = lambda array: array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array  # noqa: E731
    arrays = jax.tree.map(cast, arrays)
    like = jax.ShapeDtypeStruct(jnp.shape(leaf), dtype)
    if len(uses) == 1 and isinstance(uses[0], _LookedUp):
        return uses[0].mean_square(like, *arrays[0])
    by_example = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), arrays)

    def square(arrays: list[list[jax.Array]]) -> jax.Array:
        gradients = [use.gradient(like, *array) for use, array in zip(uses, arrays, strict=True)]
        return functools.reduce(jnp.add, gradients) ** 2

    if not any(isinstance(use, _Multiplied | _LookedUp) for use in uses):
        return jnp.mean(jax.vmap(square)(by_example), axis=0)
    # One after the other: the gradients of all examples may not fit into memory.
    start = _zeros(like.shape, like.dtype, mesh_axes(by_example))
    total, _ = jax.lax.scan(lambda total, one: (total + square(one), None), start, by_example)
    return total / len(by_example[0][-1])


def _describe(
    recording: Recording, params: PyTree, leave_out: Sequence[str] = ()
) -> tuple[Layers, dict[int, list[Any]]]:
    """Tells layers from other parameters; returns them with the uses of each parameter."""
    paths_and_leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [path_name(path) for path, _ in paths_and_leaves]
    _check_left_out(leave_out, paths)
    alone = {leaf for leaf, path in enumerate(paths) if path in leave_out} | set(recording.lost)
    uses = _uses(recording)
    kernels = {leaf: several for leaf, several in uses.items() if leaf not in alone and _share_factors(several)}
    joined = {}
    for bias, added in _biases(uses).items():
        kernel = added[0].view.leaf
        if bias not in {*alone, *uses} and kernel in kernels and [use.kernel for use in added] == kernels[kernel]:
            joined[kernel] = bias
        else:
            uses.setdefault(bias, []).extend(added)

    found = []
    for kernel, several in sorted(kernels.items()):
        first = several[0]
        stack, in_size, out_size = jax.eval_shape(first.matrix, paths_and_leaves[kernel][1]).shape
        kind = "convolution" if first.place.is_convolution else "dense"
        sizes = stack, in_size, out_size
        bias = joined.get(kernel)
        found.append(Layer(paths[kernel], kind, kernel, bias, *sizes, len(several), matrix_of=first.matrix))

    others, estimated = {}, set()
    for leaf in sorted(set(range(len(paths))) - kernels.keys() - set(joined.values())):
        several = uses.get(leaf, [])
        unseen = any(isinstance(use, _Added) and paths[use.view.leaf] in leave_out for use in several)
        reason = "left out" if paths[leaf] in leave_out else "is added to a layer left out" if unseen else None
        others[leaf] = paths[leaf], reason or _reason(recording, leaf, several)
        if reason or leaf in alone or not several:
            estimated.add(leaf)
    return Layers(tuple(found), others, frozenset(estimated), tuple(leave_out)), uses


def _check_left_out(leave_out: Sequence[str], paths: Sequence[str]) -> None:
    if isinstance(leave_out, str):
        raise TypeError(f"leave_out must be several paths, as in leave_out=[{leave_out!r}]; got a single string.")
    unknown = [path for path in leave_out if path not in paths]
    if unknown:
        raise ValueError(f"leave_out names no parameter by {', '.join(unknown)}; there are {', '.join(paths)}.")


def _uses(recording: Recording) -> dict[int, list[Any]]:
    """Gathers the places by parameter."""
    uses: dict[int, list[Any]] = {}
    for index, place in enumerate(recording.places):
        for part, view in enumerate(place.views):
            if view.size == 0:
                continue  # an empty parameter has no statistics
            if isinstance(place, Product):
                use = _Multiplied(place, index, part)
            elif isinstance(place, Spread):
                use = _Repeated(place, index)
            else:
                assert isinstance(place, Lookup)
                use = _LookedUp(place, index)
            uses.setdefault(view.leaf, []).append(use)
    return uses


def _share_factors(uses: list[Any]) -> bool:
    return all(isinstance(use, _Multiplied) and use.layout() == uses[0].layout() for use in uses)


def _biases(uses: dict[int, list[Any]]) -> dict[int, list[_Added]]:
    """Gathers the products that each bias is added to."""
    biases: dict[int, list[_Added]] = {}
    for use in itertools.chain.from_iterable(uses.values()):
        bias = use.bias() if isinstance(use, _Multiplied) else None
        if bias is not None:
            biases.setdefault(bias, []).append(_Added(use.place, use.index, use))
    return biases


def _reason(recording: Recording, leaf: int, uses: list[_Use]) -> str:
    """Says what a parameter in no layer goes into."""
    multiplies = any(isinstance(use, _Multiplied) for use in uses)
    added = [use.view.leaf for use in uses if isinstance(use, _Added)]
    names = {use.place.name for use in uses if isinstance(use, _Repeated | _LookedUp)} | recording.lost.get(leaf, set())
    names = names or (set() if uses else recording.penalties.get(leaf, set()))
    if names:
        return f"{'multiplies activations and ' * multiplies}goes into {', '.join(sorted(names))}"
    if multiplies:
        return "multiplies activations in several layouts"
    if added:
        return "is added in several places" if len(set(added)) > 1 else "is added to what is no layer"
    return "in no layer"


def _dense_kernel(product: Product, kernel: jax.Array) -> jax.Array:
    batch, contracted, free = product.parameter_axes()
    sizes = [math.prod(kernel.shape[axis] for axis in axes) for axes in (batch, contracted, free)]
    return jnp.transpose(kernel, (*batch, *contracted, *free)).reshape(sizes)


def _dense_inputs(product: Product, activations: jax.Array) -> jax.Array:
    contracted, batch = (list(axes[1 if product.comes_first else 0]) for axes in product.params["dimension_numbers"])
    rows = [axis for axis in range(activations.ndim) if axis not in {*contracted, *batch}]
    activations = jnp.transpose(activations, (*batch, *rows, *contracted))
    return _flattened(activations, len(batch), len(contracted))


def _dense_outputs(product: Product, outputs: jax.Array) -> jax.Array:
    features = product.feature_axes()
    rest = [axis for axis in range(outputs.ndim) if axis not in features]
    return _flattened(jnp.transpose(outputs, (*rest, *features)), len(product.parameter_axes()[0]), len(features))


def _flattened(array: jax.Array, num_stack: int, num_features: int) -> jax.Array:
    """Makes one axis of the first so many, and one of the last so many."""
    last = array.ndim - num_features
    stack, rows, features = array.shape[:num_stack], array.shape[num_stack:last], array.shape[last:]
    return array.reshape(math.prod(stack), *rows, math.prod(features))


def _convolution_kernel(product: Product, kernel: jax.Array) -> jax.Array:
    out_axis, in_axis, *spatial = product.params["dimension_numbers"].rhs_spec
    kernel = jnp.transpose(kernel, (*spatial, in_axis, out_axis))
    return _grouped(product, kernel.reshape(-1, kernel.shape[-1]))


def _convolution_outputs(product: Product, outputs: jax.Array) -> jax.Array:
    batch, feature, *spatial = product.params["dimension_numbers"].out_spec
    return _grouped(product, jnp.transpose(outputs, (batch, *spatial, feature)))


def _grouped(product: Product, array: jax.Array) -> jax.Array:
    """Brings the groups of the features to the front."""
    groups = product.params["feature_group_count"]
    return jnp.moveaxis(array.reshape(*array.shape[:-1], groups, -1), -2, 0)


def _patches(product: Product, max_positions: int | None, images: jax.Array) -> jax.Array:
    """Returns what a convolution multiplies at each position, by slices: inside loops they are as fast as outside."""
    numbers, params = product.params["dimension_numbers"], product.params
    batch, feature, *spatial = numbers.lhs_spec
    images = jnp.transpose(images, (batch, *spatial, feature))
    padding = [(0, 0, 0)]
    for (low, high), step in zip(params["padding"], params["lhs_dilation"], strict=True):
        padding.append((low, high, step - 1))
    images = jax.lax.pad(images, jnp.zeros((), images.dtype), [*padding, (0, 0, 0)])

    out_sizes = [product.out.shape[axis] for axis in numbers.out_spec[2:]]
    skip = max(1, math.ceil((math.prod(out_sizes) / (max_positions or math.inf)) ** (1 / len(out_sizes))))
    strides = [skip * stride for stride in params["window_strides"]]
    extents = [(-(-size // skip) - 1) * stride + 1 for size, stride in zip(out_sizes, strides, strict=True)]
    kernel_sizes = [product.shape[axis] for axis in numbers.rhs_spec[2:]]
    places = [range(0, n * step, step) for n, step in zip(kernel_sizes, params["rhs_dilation"], strict=True)]
    windows = []
    for starts in itertools.product(*places):
        ends = [start + extent for start, extent in zip(starts, extents, strict=True)]
        windows.append(
            jax.lax.slice(images, (0, *starts, 0), (images.shape[0], *ends, images.shape[-1]), (1, *strides, 1))
        )
    groups = params["feature_group_count"]
    patches = jnp.stack([window.reshape(*window.shape[:-1], groups, -1) for window in windows], axis=-2)
    patches = jnp.moveaxis(patches, -3, 0)
    return patches.reshape(*patches.shape[:-2], -1)

"""The layers of a network, found from the loss closure alone: their inputs and the gradients at their outputs."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optcurv.arguments import PyTree, ValueFn, at_least_float32, path_name, scalar_fn
from optcurv.devices import num_devices
from optcurv.jaxpr import Product, Recording, View, record_products


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
    """

    found: tuple[Layer, ...]
    others: dict[int, tuple[str, str]]

    def __str__(self) -> str:
        rows = [("parameter", "kind", "factors")]
        for layer in self.found:
            stack = f"{layer.stack} x " if layer.stack > 1 else ""
            bias = " + bias" if layer.bias is not None else ""
            uses = f", {layer.num_uses} uses" if layer.num_uses > 1 else ""
            sizes = f"{stack}({layer.in_size + (layer.bias is not None)}, {layer.out_size})"
            rows.append((layer.path, layer.kind + bias + uses, sizes))
        rows += [(path, "diagonal", reason) for path, reason in self.others.values()]
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


def layers(value_fn: ValueFn, params: PyTree) -> Layers:
    """Finds a network's layers; nothing is computed.

    A layer is a parameter that multiplies activations, in a matrix product or in a convolution, in whatever library it
    is written: it may be cast, transposed, reshaped, concatenated with others, used several times, or used inside of
    `jit`, `jax.checkpoint` and `scan` (recurrent cells, and stacked layers). A bias added to the result joins it.

    Args:
      value_fn: the loss as a function of params.
      params: the parameters, or their shapes.

    Returns:
      The layers.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss = lambda p: jnp.mean((jnp.ones((5, 3)) @ p["w"] + p["b"]) ** 2) + jnp.sum(p["scale"])
      >>> params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(4)}
      >>> print(optcurv.layers(loss, params))
      parameter  kind          factors
      ['w']      dense + bias  (4, 2)
      ['scale']  diagonal      goes into reduce_sum
    """
    recording = record_products(scalar_fn(value_fn), params)
    return _describe(recording, params)[0]


def tap(
    value_fn: ValueFn, params: PyTree, *, batch_size: int | None = None, max_positions: int | None = None
) -> tuple[Layers, list[list[Tap]]]:
    r"""Returns a network's layers and, for each, the taps of its uses, from one forward and one backward pass.

    Args:
      value_fn: the loss as a function of params, a mean over examples.
      params: the point at which to look.
      batch_size: the number of examples it is the mean of; default: the leading axis of the layers' inputs.
      max_positions: of a convolution's inputs, keep about so many on a regular grid; default: all. The positions of
        inputs and gradients then no longer match.

    Returns:
      The layers, and a list of taps for each.

    Raises:
      ValueError: if the number of examples cannot be told.
    """
    found, taps = pull_back_taps(scalar_fn(value_fn), params, jnp.ones_like, batch_size, max_positions)
    count = num_devices(taps)  # of a mean over them all an example has a smaller share
    return found, [[use._replace(gradients=count * use.gradients) for use in uses] for uses in taps]


def count_examples(value_fn: ValueFn, params: PyTree, batch_size: int | None = None) -> int:
    """Returns the number of examples that the layers' inputs lead with, on all devices together."""
    if batch_size and not layers(value_fn, params).found:
        return batch_size
    counts: list[int] = []

    def count(params: PyTree) -> None:
        _, taps = tap(value_fn, params, batch_size=batch_size)
        counts.append(num_devices(taps) * taps[0][0].gradients.shape[1])

    jax.eval_shape(count, params)
    return counts[0]


def pull_back_taps(
    fn: Callable[[PyTree], PyTree],
    params: PyTree,
    cotangent_of: Callable[[PyTree], PyTree],
    batch_size: int | None,
    max_positions: int | None,
) -> tuple[Layers, list[list[Tap]]]:
    """As `tap`, for a function of any result, pulled back from `cotangent_of(result)`."""
    recording = record_products(fn, params)
    found, uses = _describe(recording, params)
    probes = [_probe(product) for product in recording.products]
    result, pull_back, activations = jax.vjp(functools.partial(recording.evaluate, params), probes, has_aux=True)
    (cotangents,) = pull_back(cotangent_of(result))
    arranged = [
        [use.arrange(activations[use.index], cotangents[use.index], max_positions) for use in uses[layer.kernel]]
        for layer in found.found
    ]
    if not found.found:
        raise ValueError(f"No layer was found: no parameter multiplies activations as it is.\n{found}")
    if batch_size is None:
        batch_size = _batch_size(found, arranged)
    taps = [
        [_tap(layer, inputs, gradients, batch_size) for inputs, gradients in pairs]
        for layer, pairs in zip(found.found, arranged, strict=True)
    ]
    return found, taps


def _probe(product: Product) -> jax.Array:
    """Returns zeros to add to a product's result; their cotangents are the device's own."""
    zeros = jnp.zeros((*product.lengths, *product.out.shape), product.out.dtype)
    return jax.lax.pcast(zeros, product.mesh_axes, to="varying") if product.mesh_axes else zeros


def _batch_size(found: Layers, arranged: list[list[tuple[jax.Array, jax.Array]]]) -> int:
    """Returns the size all layers' inputs lead with."""
    sizes = {
        layer.path: gradients.shape[1] if gradients.ndim > 2 else 0
        for layer, pairs in zip(found.found, arranged, strict=True)
        for _, gradients in pairs
    }
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(
            "The number of examples cannot be told: the layers' inputs have leading axes of sizes "
            f"{', '.join(f'{size} ({path})' for path, size in sizes.items())}. Pass batch_size, the number of examples "
            "whose mean the loss is."
        )
    return next(iter(sizes.values()))


def _tap(layer: Layer, inputs: jax.Array, gradients: jax.Array, batch_size: int) -> Tap:
    inputs, gradients = (_by_example(layer, array, batch_size) for array in at_least_float32((inputs, gradients)))
    last = jnp.full_like(inputs[..., :1], layer.bias is not None)
    inputs = jnp.concatenate([inputs, last], axis=-1)
    return Tap(inputs, batch_size * gradients)


def _by_example(layer: Layer, array: jax.Array, batch_size: int) -> jax.Array:
    """Arranges `(stack, ..., size)` as `(stack, examples, positions, size)`."""
    stack, *rows, size = array.shape
    if batch_size in rows:
        array = jnp.moveaxis(array, 1 + rows.index(batch_size), 1)
    elif not rows or rows[0] % batch_size != 0:  # otherwise examples times positions, as in tokens of a text
        raise ValueError(
            f"The inputs of {layer.path}, with axes of sizes {rows} beside their features, hold no {batch_size} "
            "examples: pass batch_size, the number of examples whose mean the loss is."
        )
    return array.reshape(stack, batch_size, -1, size)


@dataclasses.dataclass(frozen=True)
class _Use:
    """A product that a kernel takes part in, and which of the parts of its operand the kernel is.

    Every product is seen as a stack of matrix products: of parameters (stack, in, out) with inputs (stack, rows, in),
    for results (stack, rows, out), with any number of axes of rows, those of the examples first.
    """

    product: Product
    index: int
    part: int

    @property
    def view(self) -> View:
        return self.product.views[self.part]

    def layout(self) -> Any:
        """Returns what is equal for uses that can share their factors."""
        product = self.product
        axes = product.params["dimension_numbers"]
        arrangement = axes.rhs_spec if product.is_convolution else product.parameter_axes()
        return product.primitive, arrangement, product.params.get("feature_group_count"), self.view.layout()

    def bias(self) -> int | None:
        """Returns the parameter added to this part's results."""
        biases = self.product.bias
        if len(biases) != len(self.product.views):
            return None
        return biases[self.part].leaf

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """Arranges an array like the kernel as (stack, in, out)."""
        arrange = functools.partial(_convolution_kernel if self.product.is_convolution else _dense_kernel, self.product)
        for _ in range(sum(self.view.sliced)):
            arrange = jax.vmap(arrange)
        matrices = arrange(self.view(leaf))
        return matrices.reshape(-1, *matrices.shape[-2:])

    def arrange(
        self, activations: jax.Array, cotangents: jax.Array, max_positions: int | None
    ) -> tuple[jax.Array, jax.Array]:
        """Arranges a product's activations and the gradients at its results, the kernel's part of either."""
        product = self.product
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

    def _unscanned(self, arrange: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
        """Slices of a kernel make a stack; iterations that share one are positions, or micro-batches of examples."""
        for _ in self.view.sliced:
            arrange = jax.vmap(arrange)
        array = arrange(array)
        depth = len(self.view.sliced)
        stack = [axis for axis in range(depth) if self.view.sliced[axis]]
        batches = [axis for axis in range(depth) if self.product.micro_batches[axis]]
        shared = [axis for axis in range(depth) if axis not in {*stack, *batches}]
        examples = [depth + 1] if array.ndim > depth + 2 else []
        rest = range(depth + 1 + len(examples), array.ndim)
        array = jnp.transpose(array, (*stack, depth, *batches, *examples, *shared, *rest))
        array = array.reshape(-1, *array.shape[len(stack) + 1 :])
        return array.reshape(len(array), -1, *array.shape[1 + len(batches) + len(examples) :]) if batches else array


def _describe(recording: Recording, params: PyTree) -> tuple[Layers, dict[int, list[_Use]]]:
    """Gathers the products by kernel."""
    paths_and_leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [path_name(path) for path, _ in paths_and_leaves]
    reasons = {leaf: "goes into " + ", ".join(sorted(names)) for leaf, names in recording.lost.items()}
    uses: dict[int, list[_Use]] = {}
    for index, product in enumerate(recording.products):
        for part, view in enumerate(product.views):
            if view.size:  # an empty kernel has no statistics
                uses.setdefault(view.leaf, []).append(_Use(product, index, part))
    for leaf, several in list(uses.items()):
        if any(use.layout() != several[0].layout() for use in several):
            reasons[leaf] = "multiplies activations in several layouts"
            del uses[leaf]

    biases = {kernel: {use.bias() for use in several} for kernel, several in uses.items()}
    kernels_of = collections.Counter(bias for several in biases.values() for bias in several)
    found = []
    for kernel, several in sorted(uses.items()):
        bias = next(iter(biases[kernel])) if len(biases[kernel]) == 1 else None
        if bias is not None and (kernels_of[bias] > 1 or bias in uses):
            reasons.setdefault(bias, "is added in several places")
            bias = None
        stack, in_size, out_size = jax.eval_shape(several[0].matrix, paths_and_leaves[kernel][1]).shape
        kind = "convolution" if several[0].product.is_convolution else "dense"
        layer = Layer(
            paths[kernel], kind, kernel, bias, stack, in_size, out_size, len(several), matrix_of=several[0].matrix
        )
        found.append(layer)
    members = {leaf for layer in found for leaf in (layer.kernel, layer.bias)}
    others = {leaf: (path, reasons.get(leaf, "in no layer")) for leaf, path in enumerate(paths) if leaf not in members}
    return Layers(tuple(found), others), uses


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

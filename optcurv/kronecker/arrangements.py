"""Kernels, inputs and gradients of products, arranged as matrices."""

import itertools
import math

import jax
import jax.numpy as jnp

from optcurv.kronecker.places import Product


def dense_kernel(product: Product, kernel: jax.Array) -> jax.Array:
    """Arranges a kernel as (stack, in, out)."""
    batch, contracted, free = product.parameter_axes()
    sizes = [math.prod(kernel.shape[axis] for axis in axes) for axes in (batch, contracted, free)]
    return jnp.transpose(kernel, (*batch, *contracted, *free)).reshape(sizes)


def dense_inputs(product: Product, activations: jax.Array) -> jax.Array:
    """Arranges the activations that a kernel multiplies, as (stack, ..., in)."""
    contracted, batch = (list(axes[1 if product.comes_first else 0]) for axes in product.params["dimension_numbers"])
    rows = [axis for axis in range(activations.ndim) if axis not in {*contracted, *batch}]
    activations = jnp.transpose(activations, (*batch, *rows, *contracted))
    return flattened(activations, len(batch), len(contracted))


def dense_outputs(product: Product, outputs: jax.Array) -> jax.Array:
    """Arranges the result of a matrix product, or the gradients there, as (stack, ..., out)."""
    features = product.feature_axes()
    rest = [axis for axis in range(outputs.ndim) if axis not in features]
    return flattened(jnp.transpose(outputs, (*rest, *features)), len(product.parameter_axes()[0]), len(features))


def flattened(array: jax.Array, num_stack: int, num_features: int) -> jax.Array:
    """Flattens the first axes of an array, those of the stack, and the last ones, those of the features."""
    last = array.ndim - num_features
    stack, rows, features = array.shape[:num_stack], array.shape[num_stack:last], array.shape[last:]
    return array.reshape(math.prod(stack), *rows, math.prod(features))


def convolution_kernel(product: Product, kernel: jax.Array) -> jax.Array:
    """Arranges a convolution's kernel as (groups, in, out), a patch of the inputs being one input."""
    out_axis, in_axis, *spatial = product.params["dimension_numbers"].rhs_spec
    kernel = jnp.transpose(kernel, (*spatial, in_axis, out_axis))
    return _grouped(product, kernel.reshape(-1, kernel.shape[-1]))


def convolution_outputs(product: Product, outputs: jax.Array) -> jax.Array:
    """Arranges the result of a convolution, or the gradients there, as (groups, examples, ..., features)."""
    batch, feature, *spatial = product.params["dimension_numbers"].out_spec
    return _grouped(product, jnp.transpose(outputs, (batch, *spatial, feature)))


def _grouped(product: Product, array: jax.Array) -> jax.Array:
    """Brings the groups of the features to the front."""
    groups = product.params["feature_group_count"]
    return jnp.moveaxis(array.reshape(*array.shape[:-1], groups, -1), -2, 0)


def patches(product: Product, max_positions: int | None, images: jax.Array) -> jax.Array:
    """Returns the patch that a convolution multiplies at each position, by slices, which are fast inside loops too."""
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

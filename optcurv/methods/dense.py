"""The damped Gauss-Newton model solved exactly, by matrices of the parameters' or the residuals' size."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from optcurv.arguments import PyTree, check_count, wide_dtype
from optcurv.convolutions import with_canonical_convolutions
from optcurv.curvature import Composite, GaussNewtonProduct, MatVec, gauss_newton_product
from optcurv.examples import PerExample
from optcurv.krylov import Metric
from optcurv.methods.subproblems import ModelStep, Solver, Stop
from optcurv.sharding import mesh_axes, num_devices

_BLOCK = 2**26  # numbers that the passes of one block of a Jacobian may compute on the way
_LARGEST = 2**29  # numbers of a Jacobian
_product = functools.partial(jnp.matmul, precision="highest")


def dense(max_size: int = 4096) -> Solver:
    r"""Solves :math:`(G + \lambda M) s = -g` exactly, for the Gauss-Newton matrix :math:`G = J^\top H J`.

    By Cholesky's factorisation of the smaller of two matrices. On the parameters' side, that is
    :math:`G + \lambda M`. On the residuals' side, with :math:`H = R^\top R` and :math:`A = R J`, it is
    :math:`K = A M^{-1} A^\top + \lambda I`, and by Woodbury's formula

    .. math:: s = -\tfrac1\lambda \left( M^{-1} g - M^{-1} A^\top K^{-1} A M^{-1} g \right)

    R is found example by example: along their first axis, the model's outputs must be examples that the loss does not
    mix, as in any mean over them. Where rounding lets the factorisation fail, λ is raised tenfold until it succeeds,
    from a multiple of the mean of the matrix's diagonal on; the step reports the λ it was found with.

    The Jacobian takes one pass over the batch for each parameter, or for each output if they are fewer: in blocks that
    bound the memory, and far fewer for a model made by `optcurv.per_example`. With `optcurv.accumulate` the passes are
    over micro-batches, and on the parameters' side only the Jacobian of one is kept.

    Args:
      max_size: the largest matrix factorised, in time of its size's cube.

    Returns:
      The solver, for `optcurv.levenberg_marquardt`.

    Raises:
      ValueError: if `max_size` is below 1; when traced, if both sides are larger than `max_size`, or the Jacobian takes
        gigabytes; outside of jit, if the Hessian of `loss_fn` by the outputs is not positive semi-definite (inside,
        such a step is rejected).
      TypeError: if `max_size` is not a Python int; when traced, if the product is not the Gauss-Newton matrix's.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> optimizer = optcurv.levenberg_marquardt(solver=optcurv.dense(max_size=1000))
    """
    check_count("max_size", max_size)

    def solve(matvec: MatVec, gradient: PyTree, metric: Metric, damping: jax.Array, key: jax.Array) -> ModelStep:
        del key  # nothing here is random
        if not isinstance(matvec, GaussNewtonProduct):
            raise TypeError(
                "solver=dense() needs the Gauss-Newton matrix: leave curvature as it is, or choose "
                "solver=optcurv.conjugate_gradients()."
            )
        flat, unravel = ravel_pytree(gradient)
        num_residuals = sum(leaf.size for leaf in jax.tree.leaves(matvec.outputs)) * num_devices(matvec.outputs)
        _check_size(flat.size, num_residuals, max_size)
        side = _on_residuals if num_residuals < flat.size else _on_parameters
        solution = side(matvec, flat, _Flat(metric, unravel), damping)
        decrease = -(_product(flat, solution.step) + 0.5 * solution.curvature)
        finite = jnp.isfinite(decrease)
        return ModelStep(
            step=unravel(solution.step),
            predicted_decrease=decrease,
            iterations=solution.factorizations,
            stop=jnp.where(finite, jnp.where(solution.definite, Stop.CONVERGED, Stop.INDEFINITE_LOSS), Stop.NOT_FINITE),
            size=solution.damping,
            on_residuals=side is _on_residuals,
        )

    return solve


def _check_size(num_params: int, num_residuals: int, max_size: int) -> None:
    remedy = "choose solver=optcurv.conjugate_gradients(), which needs no matrix"
    if min(num_params, num_residuals) > max_size:
        raise ValueError(
            f"dense() would factorise a matrix of the smaller side, of {num_params} parameters and {num_residuals} "
            f"residuals (the model's outputs), above its max_size of {max_size}: {remedy}, or raise max_size."
        )


class _Solution(NamedTuple):
    step: jax.Array
    curvature: jax.Array  # s'Gs
    factorizations: jax.Array
    damping: jax.Array
    definite: jax.Array


class _Flat:
    """A metric on flat vectors, also on rows of them."""

    def __init__(self, metric: Metric, unravel: Callable[[jax.Array], PyTree]) -> None:
        def flat(operator: MatVec, vector: jax.Array) -> jax.Array:
            return ravel_pytree(operator(unravel(vector)))[0]

        self.apply = functools.partial(flat, metric.apply)
        self.inverse = functools.partial(flat, metric.inverse)


def _on_parameters(product: GaussNewtonProduct, gradient: jax.Array, metric: _Flat, damping: jax.Array) -> _Solution:
    def matrix_of(part: Composite) -> jax.Array:
        jacobian, factors = _jacobian(part, product.params, gradient)
        curved = jax.vmap(factors.loss_hessian, in_axes=-1, out_axes=-1)(jacobian)
        products = jax.tree.map(_over_outputs, jacobian, _wide(curved, gradient))
        total = functools.reduce(jnp.add, jax.tree.leaves(products))
        return jax.lax.psum(total, axes) if (axes := mesh_axes(total)) else total

    matrix = product.composite.mean_over_parts(matrix_of)
    norm_matrix = jax.vmap(metric.apply)(jnp.eye(gradient.size, dtype=gradient.dtype))
    factor, damping, factorizations, definite = _factorized(matrix, norm_matrix, damping)
    step = -_solved(factor, gradient)
    return _Solution(step, _product(step, _product(matrix, step)), factorizations, damping, definite)


def _over_outputs(left: jax.Array, right: jax.Array) -> jax.Array:
    left, right = (array.reshape(-1, array.shape[-1]) for array in (left, right))
    return _product(_whole(left).T, _whole(right))


def _on_residuals(product: GaussNewtonProduct, gradient: jax.Array, metric: _Flat, damping: jax.Array) -> _Solution:
    def rows_of(part: Composite) -> tuple[jax.Array, jax.Array]:
        jacobian, factors = _jacobian(part, product.params, gradient)
        return _times_root(factors, jacobian)

    rows, failed = product.composite.stack_over_parts(rows_of)
    rows = _gathered(rows.reshape(-1, gradient.size) / math.sqrt(len(rows)))
    scaled = jax.vmap(metric.inverse)(rows)
    matrix = _product(rows, scaled.T)
    factor, damping, factorizations, _ = _factorized(matrix, jnp.eye(len(rows), dtype=gradient.dtype), damping)

    def inverse(vector: jax.Array) -> jax.Array:
        vector = metric.inverse(vector)
        return (vector - _product(_solved(factor, _product(rows, vector)), scaled)) / damping

    step = -inverse(gradient)
    # Once more: both terms nearly cancel where the damping is small.
    damped = damping * metric.apply(step) + _product(_product(rows, step), rows)
    step = step - inverse(gradient + damped)
    image = _product(rows, step)
    return _Solution(step, _product(image, image), factorizations, damping, ~_anywhere(jnp.any(failed)))


def _factorized(
    matrix: jax.Array, norm_matrix: jax.Array, damping: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cholesky's factor of matrix + damping norm_matrix.

    Also the damping it took, the number of attempts, and whether no more was needed than rounding explains.
    """
    rounding = jnp.finfo(matrix.dtype).eps * jnp.trace(matrix) / jnp.trace(norm_matrix)
    attempt = lambda damping: jnp.linalg.cholesky(matrix + damping * norm_matrix)  # noqa: E731

    def again(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        _, damping, number = state
        damping = jnp.maximum(10 * damping, rounding)
        return attempt(damping), damping, number + 1

    def failed(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        factor, _, number = state
        return ~jnp.all(jnp.isfinite(factor)) & jnp.isfinite(rounding) & (number < 30)

    factor, used, number = jax.lax.while_loop(failed, again, (attempt(damping), damping, jnp.ones((), jnp.int32)))
    return factor, used, number, (used <= damping) | (used <= 1e3 * len(matrix) * rounding)


def _solved(factor: jax.Array, vector: jax.Array) -> jax.Array:
    return jax.scipy.linalg.cho_solve((factor, True), vector)


def _jacobian(part: Composite, params: PyTree, like: jax.Array) -> tuple[PyTree, GaussNewtonProduct]:
    """The Jacobian, like the outputs with a last axis of all parameters; and the product at hand."""
    if axes := mesh_axes(jax.eval_shape(lambda params: part.outputs_and_aux(params)[0], params)):
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, axes, to="varying"), params)
    factors = gauss_newton_product(part, params)
    flat_params, unravel = ravel_pytree(params)
    outputs, unravel_outputs = ravel_pytree(factors.outputs)
    _check_memory(outputs.size, flat_params.size)
    if isinstance(part.model_fn, PerExample) and not part.has_aux:
        return _wide(_example_jacobians(part.model_fn, params), like), factors
    if flat_params.size <= outputs.size:
        column = lambda i: factors.jacobian(unravel(jnp.zeros_like(flat_params).at[i].set(1)))  # noqa: E731
        columns = _in_blocks(column, jnp.arange(flat_params.size))
        return _wide(jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), columns), like), factors

    def row(i: jax.Array) -> jax.Array:
        cotangent = unravel_outputs(jnp.zeros(outputs.shape, outputs.dtype).at[i].set(1))
        return ravel_pytree(factors.transposed(jax.tree.map(_placed_like, cotangent, factors.outputs)))[0]

    rows = _in_blocks(row, jnp.arange(outputs.size))
    return _wide(jax.vmap(unravel_outputs, in_axes=-1, out_axes=-1)(rows), like), factors


def _example_jacobians(model: PerExample, params: PyTree) -> PyTree:
    def joined(output: jax.ShapeDtypeStruct, by_leaf: PyTree) -> jax.Array:
        return jnp.concatenate([leaf.reshape(*output.shape, -1) for leaf in jax.tree.leaves(by_leaf)], axis=-1)

    def of_part(fn: Callable[[PyTree, PyTree], PyTree], batch: PyTree) -> PyTree:
        def of_example(example: PyTree) -> PyTree:
            return jax.tree.map(joined, jax.eval_shape(fn, params, example), jax.jacrev(fn)(params, example))

        return _in_blocks(of_example, batch)

    return model.over_parts(of_part)


def _check_memory(num_outputs: int, num_params: int) -> None:
    if num_outputs * num_params > _LARGEST:
        raise ValueError(
            f"dense() would hold a Jacobian of {num_outputs}×{num_params} numbers: split the batch by "
            "optcurv.accumulate, or choose solver=optcurv.conjugate_gradients(), which needs no matrix."
        )


def _wide(tree: PyTree, like: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(like.dtype), tree)


def _in_blocks(fn: Callable[[PyTree], PyTree], arguments: PyTree) -> PyTree:
    """A function of each of the arguments, of as many at once as memory allows."""
    number = len(jax.tree.leaves(arguments)[0])
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), arguments)
    size = max(1, min(number, _BLOCK // _numbers_computed(jax.make_jaxpr(fn)(one))))
    if size == number:
        return jax.vmap(fn)(arguments)
    indices = jnp.arange(-(-number // size) * size).reshape(-1, size) % number
    blocks = jax.tree.map(lambda leaf: _whole(leaf)[indices], arguments)
    of_block = with_canonical_convolutions(jax.vmap(fn), jax.tree.map(lambda leaf: leaf[0], blocks))
    results = jax.lax.map(of_block, blocks)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:number], results)


def _numbers_computed(jaxpr: Any) -> int:
    return 1 + sum(math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars)


def _times_root(factors: GaussNewtonProduct, jacobian: PyTree) -> tuple[jax.Array, jax.Array]:
    """The rows of RJ, and whether H is not positive semi-definite with a block for each example."""
    leaves = jax.tree.leaves(factors.outputs)
    jacobian_leaves = list(map(_whole, jax.tree.leaves(jacobian)))
    lengths = [jnp.shape(leaf)[0] if jnp.ndim(leaf) else 1 for leaf in leaves]
    probe = [jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype) ** 2).reshape(leaf.shape) for leaf in leaves]
    image = _curved(factors, probe)
    rows, failures = [], []
    for length in sorted(set(lengths)):
        members = [i for i, n in enumerate(lengths) if n == length]
        arranged = lambda several, length=length, members=members: jnp.concatenate(  # noqa: E731
            [several[i].reshape(length, -1) for i in members], axis=1
        )
        blocks = _blocks(factors, members, length)
        eigenvalues, eigenvectors = _eigh(blocks.astype(jacobian_leaves[0].dtype))
        largest = jnp.max(jnp.abs(eigenvalues))
        difference = arranged(image) - jnp.einsum("nij,nj->ni", blocks, arranged(probe), precision="highest")
        epsilon = jnp.finfo(blocks.dtype).eps
        failures += [
            jnp.any(eigenvalues < -1e3 * epsilon * largest),
            jnp.any(jnp.abs(difference) > 1e3 * epsilon * largest * blocks.shape[1]),
        ]
        part = jnp.concatenate(
            [jacobian_leaves[i].reshape(length, -1, jacobian_leaves[i].shape[-1]) for i in members], 1
        )
        roots = jnp.sqrt(jnp.maximum(eigenvalues, 0))[..., None] * jnp.swapaxes(eigenvectors, -1, -2)
        rows.append(_product(roots, part).reshape(-1, part.shape[-1]))
    return jnp.concatenate(rows), jnp.any(jnp.stack(failures))


def _curved(factors: GaussNewtonProduct, vectors: list[jax.Array]) -> list[jax.Array]:
    """H times a vector, given and returned as leaves."""
    leaves, structure = jax.tree.flatten(factors.outputs)
    placed = jax.tree.unflatten(structure, map(_placed_like, vectors, leaves))
    return list(map(_whole, jax.tree.leaves(factors.loss_hessian(placed))))


def _eigh(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    if blocks.shape[-1] == 1:
        return blocks[..., 0], jnp.ones_like(blocks)
    return jnp.linalg.eigh(blocks)


def _blocks(factors: GaussNewtonProduct, members: list[int], length: int) -> jax.Array:
    """The Hessian of the loss by each example's outputs, from as many products as an example has outputs."""
    leaves = jax.tree.leaves(factors.outputs)
    widths = [leaves[i].size // length for i in members]

    def column(unit: jax.Array) -> jax.Array:
        vectors = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
        for i, part in zip(members, jnp.split(unit, [sum(widths[:n]) for n in range(1, len(widths))]), strict=True):
            vectors[i] = jnp.broadcast_to(part.astype(leaves[i].dtype), (length, part.size)).reshape(leaves[i].shape)
        image = _curved(factors, vectors)
        return jnp.concatenate([image[i].reshape(length, -1) for i in members], axis=1)

    return jax.vmap(column, out_axes=-1)(jnp.eye(sum(widths), dtype=wide_dtype(leaves)))


def _gathered(rows: jax.Array) -> jax.Array:
    """The rows of all devices of a `shard_map`, one after the other."""
    axes = mesh_axes(rows)
    if not axes:
        return rows
    alone = jnp.zeros((num_devices(rows), *rows.shape), rows.dtype).at[jax.lax.axis_index(axes)].set(rows)
    return jax.lax.psum(alone, axes).reshape(-1, rows.shape[-1])


def _anywhere(failed: jax.Array) -> jax.Array:
    """Whether something is true on any device of a `shard_map`."""
    axes = mesh_axes(failed)
    return jax.lax.psum(failed.astype(jnp.int32), axes) > 0 if axes else failed


def _placed_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """Splits an array among devices as another is, inside of a `shard_map` or with explicit sharding."""
    if axes := mesh_axes(like):
        return jax.lax.pcast(array, axes, to="varying")
    sharding = jax.typeof(like).sharding
    return jax.sharding.reshard(array, sharding) if any(sharding.spec) else array


def _whole(array: jax.Array) -> jax.Array:
    """The array on all devices where it is split with explicit sharding, which leaves products no choice."""
    sharding = jax.typeof(array).sharding
    everywhere = jax.NamedSharding(sharding.mesh, jax.P(*[None] * array.ndim))
    return jax.sharding.reshard(array, everywhere) if any(sharding.spec) else array

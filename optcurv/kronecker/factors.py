"""The Fisher matrix of a layer by its factors: their averages and damped powers. It knows no loss."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from optcurv.kronecker.uses import Tap
from optcurv.sharding import share_out

Factors: TypeAlias = tuple[jax.Array, ...]
"""Symmetric matrices in stacks, `(stack, n, n)`, or only their diagonals, `(stack, n)`."""


class LowRank(NamedTuple):
    r"""The symmetric matrices :math:`\rho I + U\, \mathrm{diag}(\mu - \rho)\, U^\top`, in a stack.

    Attributes:
      vectors: U, orthonormal, `(stack, n, rank)`.
      values: μ, `(stack, rank)`.
      rest: ρ, `(stack,)`.
    """

    vectors: jax.Array
    values: jax.Array
    rest: jax.Array

    def excess(self) -> jax.Array:
        r"""Returns :math:`\mu - \rho`, `(stack, rank, 1)`."""
        return (self.values - self.rest[:, None])[:, :, None]


Power: TypeAlias = jax.Array | LowRank
"""A power of factors: matrices, their diagonals, or `LowRank`."""

Parts: TypeAlias = tuple[jax.Array, ...]
"""Kernels, `(stack, in_size, out_size)`, and perhaps biases, `(stack, 1, out_size)`."""


def _einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """Multiplies; on a mesh of explicit axes the product is on every device, as factors and their powers are."""
    meshes = [jax.typeof(operand).sharding.mesh for operand in operands]
    everywhere = [jax.NamedSharding(mesh, jax.P()) for mesh in meshes if mesh.explicit_axes]
    return jnp.einsum(subscripts, *operands, precision="highest", out_sharding=everywhere[0] if everywhere else None)


class Structure(NamedTuple):
    r"""The structure that a layer's Fisher matrix is assumed to have: `KRONECKER`, `BLOCK` or `DIAGONAL`.

    A layer's kernel and bias are a matrix W of `(in_size + 1, out_size)`, whose last row is the bias, or zero. It is
    given in parts, since joining them would take as long as the product itself.

    Attributes:
      sizes: maps in_size + 1 and out_size to the sizes of the factors.
      measure: maps the taps of a layer's uses to the factors of one batch; its second argument says for each factor
        whether only the diagonal is kept.
      apply: multiplies such matrices, in parts `(stack, in_size, out_size)` and perhaps `(stack, 1, out_size)`, by
        powers of the factors.

    Example:
      >>> import optcurv
      >>> optcurv.KRONECKER.sizes(5, 3), optcurv.BLOCK.sizes(5, 3), optcurv.DIAGONAL.sizes(5, 3)
      ((5, 3), (15,), ())
    """

    sizes: Callable[[int, int], tuple[int, ...]]
    measure: Callable[[Sequence[Tap], Sequence[bool]], Factors]
    apply: Callable[[tuple[Power, ...], Parts], Parts]


def _kronecker_moments(taps: Sequence[Tap], diagonals: Sequence[bool]) -> Factors:
    r""":math:`A = \frac1N \sum a a^\top` over all examples and positions, :math:`B` the mean of ββᵀ over both (KFC).

    Uses of one kernel count as positions, as do the steps of a sequence.
    """
    num_examples = taps[0].inputs.shape[1]
    num_positions = sum(tap.gradients.shape[2] for tap in taps)
    inputs, gradients = jnp.zeros(()), jnp.zeros(())
    for tap in taps:
        share = tap.gradients.shape[2] / tap.inputs.shape[2]  # a grid of positions stands for all
        inputs += share * _second_moment(tap.inputs, diagonals[0])
        gradients += _second_moment(tap.gradients, diagonals[1])
    return inputs / num_examples, gradients / (num_examples * num_positions)


def _second_moment(rows: jax.Array, diagonal: bool) -> jax.Array:
    return _einsum("bnpi,bnpi->bi" if diagonal else "bnpi,bnpj->bij", *(rows, rows))


def _kronecker_product(powers: tuple[Power, ...], parts: Parts) -> Parts:
    inputs, outputs = powers
    if isinstance(inputs, LowRank) and isinstance(outputs, LowRank):
        return _low_rank_product(inputs, parts, outputs)
    product = _times(inputs, _join(parts))
    return _split(jnp.swapaxes(_times(outputs, jnp.swapaxes(product, 1, 2)), 1, 2), parts)


def _times(power: Power, matrices: jax.Array) -> jax.Array:
    if isinstance(power, LowRank):
        coordinates = power.excess() * _einsum("bnr,bnm->brm", power.vectors, matrices)
        return power.rest[:, None, None] * matrices + _einsum("bnr,brm->bnm", power.vectors, coordinates)
    return _einsum("bij,bjm->bim", power, matrices) if power.ndim == 3 else power[:, :, None] * matrices


def _low_rank_product(left: LowRank, parts: Parts, right: LowRank) -> Parts:
    """Multiplies from both sides and writes the result once, as memory bandwidth is what limits large products."""
    vectors = [left.vectors[:, : parts[0].shape[1]], left.vectors[:, -1:]][: len(parts)]
    products = [_einsum("bnr,bnm->brm", *pair) for pair in zip(vectors, parts, strict=True)]
    rows = left.excess() * functools.reduce(jnp.add, products)
    core = _einsum("brm,bms->brs", rows, right.vectors)
    wide = jnp.concatenate(
        [right.rest[:, None, None] * rows, right.excess() * jnp.swapaxes(right.vectors, 1, 2)], axis=1
    )

    def multiply(part: jax.Array, vectors: jax.Array) -> jax.Array:
        columns = left.rest[:, None, None] * _einsum("bnm,bmr->bnr", part, right.vectors)
        tall = jnp.concatenate([vectors, columns + _einsum("bnr,brs->bns", vectors, core)], axis=2)
        return (left.rest * right.rest)[:, None, None] * part + _einsum("bnr,brm->bnm", tall, wide)

    return tuple(map(multiply, parts, vectors))


def _join(parts: Parts) -> jax.Array:
    kernel, *bias = parts
    return jnp.concatenate([kernel, *(bias or [jnp.zeros_like(kernel[:, :1])])], axis=1)


def _split(matrices: jax.Array, like: Parts) -> Parts:
    return (matrices[:, :-1], matrices[:, -1:])[: len(like)]


def _block_moment(taps: Sequence[Tap], diagonals: Sequence[bool]) -> Factors:
    per_use = [_einsum("bnpi,bnpo->bnio", tap.inputs, tap.gradients) for tap in taps]
    gradients = functools.reduce(jnp.add, per_use)
    flat = gradients.reshape(*gradients.shape[:2], 1, -1)
    return (_second_moment(flat, diagonals[0]) / flat.shape[1],)


def _block_product(powers: tuple[Power, ...], parts: Parts) -> Parts:
    matrices = _join(parts)
    return _split(_times(powers[0], matrices.reshape(matrices.shape[0], -1, 1)).reshape(matrices.shape), parts)


KRONECKER = Structure(sizes=lambda rows, columns: (rows, columns), measure=_kronecker_moments, apply=_kronecker_product)
r""":math:`F \approx A \otimes B`, Eq. 14 of the TSO-ALRA paper."""

BLOCK = Structure(sizes=lambda rows, columns: (rows * columns,), measure=_block_moment, apply=_block_product)
"""All correlations within a layer, Eqs. 12 and 13, for small ones."""

DIAGONAL = Structure(
    sizes=lambda rows, columns: (), measure=lambda taps, diagonals: (), apply=lambda powers, parts: parts
)
"""No layers: a diagonal for every parameter, estimated as N times the squared mean gradient of N examples."""


class Powers(NamedTuple):
    """Powers of factors, as they were last computed.

    Attributes:
      powers: of each layer's factors, by path.
      extremes: the smallest and the largest damped eigenvalue of each factor, `(stack, 2)`.
      ages: steps since each group of factors of one size was decomposed; -1 before the first time.
    """

    powers: dict[str, tuple[Power, ...]]
    extremes: dict[str, Factors]
    ages: jax.Array


def init_powers(factors: Mapping[str, Factors], rank: int | None = None) -> Powers:
    """Returns identities; those of factors larger than twice the rank are `LowRank`."""

    def identity(factor: jax.Array) -> Power:
        if factor.ndim == 2:
            return jnp.ones_like(factor)
        stack, size, dtype = factor.shape[0], factor.shape[-1], factor.dtype
        if rank is None or size <= 2 * rank:
            return jnp.broadcast_to(jnp.eye(size, dtype=dtype), factor.shape)
        vectors = jax.random.orthogonal(jax.random.key(0), size, (stack,), dtype, rank)
        return LowRank(vectors, jnp.ones((stack, rank), dtype), jnp.ones(stack, dtype))

    return Powers(
        powers={path: tuple(map(identity, several)) for path, several in factors.items()},
        extremes={
            path: tuple(jnp.ones((factor.shape[0], 2), factor.dtype) for factor in several)
            for path, several in factors.items()
        },
        ages=jnp.full(max(len(_groups(factors)), 1), -1, jnp.int32),  # checkpoints hold no empty arrays
    )


def is_early(count: jax.Array, every: int) -> jax.Array:
    """Whether to refresh all at one of the first steps, 0, 1, 2, 4, 8 and so on, when everything changes fast."""
    return (count < every) & (count & (count - 1) == 0)


def refresh_powers(
    state: Powers,
    factors: Mapping[str, Factors],
    weight: jax.Array,
    *,
    exponent: chex.Numeric,
    relative: chex.Numeric,
    absolute_damping: chex.Numeric,
    every: int,
    count: jax.Array,
    usable: jax.Array,
    sharding: jax.NamedSharding | None = None,
) -> Powers:
    r"""Computes the powers :math:`(F + \lambda I)^p` that are due; F are the averages divided by their weight.

    Powers of layers whose factors are not given remain as they are.

    Factors of one size are decomposed together, in one batched call, or in one on each device of the sharding. Each
    such group is due once in `every` steps, the groups at different steps, and all of them at early ones. The damping
    :math:`\lambda` is relative to the factor's mean eigenvalue: for two factors the square root of `relative` times it,
    which is the split by :math:`\pi` of K-FAC (Martens and Grosse 2015, section 6.3) with a damping relative to the
    mean eigenvalue of the Kronecker product.
    """
    groups = _groups(factors)
    turns = jnp.arange(state.ages.size) * every // state.ages.size
    due = usable & (is_early(count, every) | (count % every == turns) | (state.ages < 0))
    places = {path: list(zip(state.powers[path], state.extremes[path], strict=True)) for path in factors}
    for number, members in enumerate(groups):
        share = jnp.asarray(relative) ** (1 / len(factors[members[0][0]]))
        power = functools.partial(damped_power, exponent=exponent, relative=share, absolute_damping=absolute_damping)
        power = power if sharding is None else share_out(power, sharding)
        take = functools.partial(_group_powers, power, weight)
        now, before = [factors[path][i] for path, i in members], [places[path][i] for path, i in members]
        # All of the work is inside the condition, as everything outside of it is done at every step.
        after = jax.lax.cond(due[number], take, lambda now, before: before, now, before)
        for (path, i), powers in zip(members, after, strict=True):
            places[path][i] = powers
    return Powers(
        powers=state.powers | {path: tuple(power for power, _ in several) for path, several in places.items()},
        extremes=state.extremes | {path: tuple(pair for _, pair in several) for path, several in places.items()},
        ages=jnp.where(due, 0, jnp.where(state.ages < 0, -1, state.ages + 1)),
    )


def _group_powers(
    power_of: Callable[[jax.Array, Power], tuple[Power, jax.Array]],
    weight: jax.Array,
    factors: list[jax.Array],
    before: list[tuple[Power, jax.Array]],
) -> list[tuple[Power, jax.Array]]:
    """Computes the powers of all factors of one size together; returns those of each, with their extremes."""
    previous = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(power for power, _ in before))
    stacked = jnp.concatenate(factors)
    together = power_of(stacked / weight.astype(stacked.dtype), previous)
    starts = [0, *itertools.accumulate(len(factor) for factor in factors)]
    return [
        jax.tree.map(lambda part, start=start, end=end: part[start:end], together)
        for start, end in itertools.pairwise(starts)
    ]


def _groups(factors: Mapping[str, Factors]) -> list[list[tuple[str, int]]]:
    """Groups the factors, each by its path and number, by their shape without the stack."""
    groups: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for path, several in sorted(factors.items()):
        for i, factor in enumerate(several):
            groups.setdefault((len(several), *factor.shape[1:]), []).append((path, i))
    return [groups[shape] for shape in sorted(groups)]


def damped_power(
    factors: jax.Array,
    previous: Power,
    *,
    exponent: chex.Numeric,
    relative: jax.Array,
    absolute_damping: chex.Numeric,
) -> tuple[Power, jax.Array]:
    """Returns the powers of a stack, in the form of the previous ones, and their extreme damped eigenvalues."""
    trace = jnp.trace(factors, axis1=1, axis2=2) if factors.ndim == 3 else jnp.sum(factors, axis=1)
    mean = (trace / factors.shape[1])[:, None]
    damped = functools.partial(damp, mean=mean, relative=relative, absolute_damping=absolute_damping)
    if isinstance(previous, LowRank):
        vectors, values = _leading_eigenpairs(factors, previous.vectors)
        rest = (trace[:, None] - jnp.sum(values, axis=1, keepdims=True)) / (factors.shape[1] - values.shape[1])
        eigenvalues = damped(jnp.concatenate([rest, values], axis=1))
        powers = eigenvalues**exponent
        power = LowRank(vectors, powers[:, 1:], powers[:, 0])
    elif factors.ndim == 3:
        eigenvalues, vectors = jnp.linalg.eigh(factors)
        eigenvalues = damped(eigenvalues)
        power = _einsum("bik,bk,bjk->bij", vectors, eigenvalues**exponent, vectors)
    else:
        eigenvalues = damped(factors)
        power = eigenvalues**exponent
    return power, jnp.stack([jnp.min(eigenvalues, axis=1), jnp.max(eigenvalues, axis=1)], axis=1)


def damp(eigenvalues: jax.Array, mean: jax.Array, relative: chex.Numeric, absolute_damping: chex.Numeric) -> jax.Array:
    """Adds the relative and the absolute damping; eigenvalues that rounding made negative count as zero."""
    shift = jnp.asarray(relative * mean + absolute_damping, eigenvalues.dtype)
    return jnp.maximum(jnp.maximum(eigenvalues, 0.0) + shift, _SMALLEST)


def _leading_eigenpairs(matrices: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Approximates the leading eigenpairs by subspace iteration from previous eigenvectors."""
    for _ in range(2):
        vectors, _ = jnp.linalg.qr(_einsum("bij,bjr->bir", matrices, vectors))
    values, rotation = jnp.linalg.eigh(_einsum("bir,bij,bjs->brs", vectors, matrices, vectors))
    return _einsum("bir,brs->bis", vectors, rotation), values


_SMALLEST = 1e-18  # for a layer with no gradient at all; its inverse square is still a float32

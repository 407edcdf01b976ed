"""The Fisher matrix of a layer by its factors: their averages and damped powers. It knows no loss."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from optcurv.taps import Tap

Factors: TypeAlias = tuple[jax.Array, ...]
"""Symmetric matrices in stacks, `(stack, n, n)`, or only their diagonals, `(stack, n)`."""

_einsum = functools.partial(jnp.einsum, precision="highest")


class Structure(NamedTuple):
    r"""A shape of the Fisher matrix of a layer; pick one of `KRONECKER` and `BLOCK`, or `DIAGONAL`.

    A layer's kernel and bias are a matrix W of `(in_size + 1, out_size)`, whose last row is the bias, or zero.

    Attributes:
      sizes: maps in_size + 1 and out_size to the sizes of the factors.
      measure: maps the taps of a layer's uses to the factors of one batch; `diagonals` tells which to keep only the
        diagonal of.
      apply: multiplies matrices `(stack, in_size + 1, out_size)` by the factors.

    Example:
      >>> import optcurv
      >>> optcurv.KRONECKER.sizes(5, 3), optcurv.BLOCK.sizes(5, 3), optcurv.DIAGONAL.sizes(5, 3)
      ((5, 3), (15,), ())
    """

    sizes: Callable[[int, int], tuple[int, ...]]
    measure: Callable[[Sequence[Tap], Sequence[bool]], Factors]
    apply: Callable[[Factors, jax.Array], jax.Array]


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


def _kronecker_product(factors: Factors, matrices: jax.Array) -> jax.Array:
    inputs, outputs = factors
    matrices = _einsum("bij,bjo->bio", inputs, matrices) if inputs.ndim == 3 else inputs[:, :, None] * matrices
    return _einsum("bio,bop->bip", matrices, outputs) if outputs.ndim == 3 else matrices * outputs[:, None, :]


def _block_moment(taps: Sequence[Tap], diagonals: Sequence[bool]) -> Factors:
    per_use = [_einsum("bnpi,bnpo->bnio", tap.inputs, tap.gradients) for tap in taps]
    gradients = functools.reduce(jnp.add, per_use)
    flat = gradients.reshape(*gradients.shape[:2], 1, -1)
    return (_second_moment(flat, diagonals[0]) / flat.shape[1],)


def _block_product(factors: Factors, matrices: jax.Array) -> jax.Array:
    (factor,) = factors
    flat = matrices.reshape(matrices.shape[0], -1)
    product = _einsum("bij,bj->bi", factor, flat) if factor.ndim == 3 else factor * flat
    return product.reshape(matrices.shape)


KRONECKER = Structure(sizes=lambda rows, columns: (rows, columns), measure=_kronecker_moments, apply=_kronecker_product)
r""":math:`F \approx A \otimes B`, Eq. 14 of the TSO-ALRA paper."""

BLOCK = Structure(sizes=lambda rows, columns: (rows * columns,), measure=_block_moment, apply=_block_product)
"""All correlations within a layer, Eqs. 12 and 13, for small ones."""

DIAGONAL = Structure(sizes=lambda rows, columns: (), measure=lambda taps, diagonals: (), apply=lambda factors, m: m)
"""No layers: every parameter on its own."""


class Powers(NamedTuple):
    """Powers of factors, as of when they were last taken.

    Attributes:
      powers: of each layer's factors, by path.
      extremes: the smallest and the largest damped eigenvalue of each factor, `(stack, 2)`.
      ages: steps since each group of factors of one size was decomposed; -1 before the first time.
    """

    powers: dict[str, Factors]
    extremes: dict[str, Factors]
    ages: jax.Array


def init_powers(factors: Mapping[str, Factors]) -> Powers:
    """Returns identities."""

    def identity(factor: jax.Array) -> jax.Array:
        if factor.ndim == 2:
            return jnp.ones_like(factor)
        return jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)

    return Powers(
        powers={path: tuple(map(identity, several)) for path, several in factors.items()},
        extremes={
            path: tuple(jnp.ones((factor.shape[0], 2), factor.dtype) for factor in several)
            for path, several in factors.items()
        },
        ages=jnp.full(max(len(_groups(factors)), 1), -1),  # checkpoints hold no empty arrays
    )


def refresh_powers(
    state: Powers,
    factors: Mapping[str, Factors],
    *,
    exponent: chex.Numeric,
    damping: chex.Numeric,
    absolute_damping: chex.Numeric,
    every: int,
    count: jax.Array,
    usable: jax.Array,
) -> Powers:
    r"""Takes the powers :math:`U (\Lambda + \lambda I)^p U^\top` of the factors that are due.

    Factors of one size are decomposed together, in one batched call. Each such group is due every so many steps, the
    groups at different steps, and all of them at the very first steps, 0, 1, 2, 4, 8 and so on. The damping
    :math:`\lambda` is relative to the factor's mean eigenvalue: for two factors the square root of `damping` times it,
    which is the split by :math:`\pi` of K-FAC (Martens and Grosse 2015, section 6.3) with a damping relative to the
    mean eigenvalue of the Kronecker product.
    """
    groups = _groups(factors)
    turns = jnp.arange(state.ages.size) * every // state.ages.size
    is_early = (count < every) & (count & (count - 1) == 0)
    due = usable & (is_early | (count % every == turns) | (state.ages < 0))
    powers = {path: list(several) for path, several in state.powers.items()}
    extremes = {path: list(several) for path, several in state.extremes.items()}
    for number, members in enumerate(groups):
        now = jnp.concatenate([factors[path][i] for path, i in members])
        before = tuple(
            jnp.concatenate([kept[path][i] for path, i in members]) for kept in (state.powers, state.extremes)
        )
        relative = jnp.asarray(damping, now.dtype) ** (1 / len(factors[members[0][0]]))
        take = functools.partial(damped_power, exponent=exponent, relative=relative, absolute_damping=absolute_damping)
        after = jax.lax.cond(due[number], take, lambda _, before=before: before, now)
        splits = list(itertools.accumulate(factors[path][i].shape[0] for path, i in members))[:-1]
        for kept, several in zip((powers, extremes), after, strict=True):
            for (path, i), part in zip(members, jnp.split(several, splits), strict=True):
                kept[path][i] = part
    return Powers(
        powers={path: tuple(several) for path, several in powers.items()},
        extremes={path: tuple(several) for path, several in extremes.items()},
        ages=jnp.where(due, 0, jnp.where(state.ages < 0, -1, state.ages + 1)),
    )


def _groups(factors: Mapping[str, Factors]) -> list[list[tuple[str, int]]]:
    """Returns the places of the factors of each shape, stacks aside."""
    groups: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for path, several in sorted(factors.items()):
        for i, factor in enumerate(several):
            groups.setdefault((len(several), *factor.shape[1:]), []).append((path, i))
    return [groups[shape] for shape in sorted(groups)]


def damped_power(
    factors: jax.Array, *, exponent: chex.Numeric, relative: jax.Array, absolute_damping: chex.Numeric
) -> tuple[jax.Array, jax.Array]:
    """Returns the powers of a stack, and their extreme damped eigenvalues."""
    if factors.ndim == 3:
        eigenvalues, vectors = jnp.linalg.eigh(factors)
    else:
        eigenvalues, vectors = factors, None
    eigenvalues = jnp.maximum(eigenvalues, 0.0)  # rounding makes some negative
    shift = relative * jnp.mean(eigenvalues, axis=-1, keepdims=True) + absolute_damping
    damped = jnp.maximum(eigenvalues + shift, _SMALLEST)
    extremes = jnp.stack([jnp.min(damped, axis=-1), jnp.max(damped, axis=-1)], axis=-1)
    if vectors is None:
        return damped**exponent, extremes
    return _einsum("bik,bk,bjk->bij", vectors, damped**exponent, vectors), extremes


_SMALLEST = 1e-18  # of a layer with no gradient at all: its inverse square still is a float32

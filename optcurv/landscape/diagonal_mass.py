"""How much of a symmetric operator its diagonal holds, and what chance would give."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from optcurv.arguments import (
    PyTree,
    at_least_float32,
    check_count,
    check_number,
    key_or_default,
    layout,
    vector_space,
)
from optcurv.curvature import MatVec

_MOST_COLUMNS = 20_000  # of an operator measured whole unless told otherwise
_DRAWN_COLUMNS = 1_000  # of a larger one
_BLOCK_NUMBERS = 2**22  # held by a block of columns: 16 MiB in float32
_WIDEST_BLOCK = 128  # columns; wider ones make nothing faster, and the network's activations grow with them


class DiagonalMass(NamedTuple):
    """What `diagonal_mass` measured.

    Attributes:
      mass: the share of the diagonal, a scalar in [0, 1].
      standard_error: of `mass`, a scalar; 0 where every column was measured.
    """

    mass: jax.Array
    standard_error: jax.Array


def diagonal_mass(
    matvec: MatVec, params: PyTree, *, num_probes: int | None = None, key: chex.PRNGKey | None = None
) -> DiagonalMass:
    r"""The share of a symmetric operator's absolute mass that lies on its diagonal.

    .. math:: \delta_A = \frac{\sum_i |A_{ii}|}{\sum_i \sum_j |A_{ij}|}

    (section 3.2 of "Adaptive norms for deep learning with regularized Newton methods"): 1 for a diagonal matrix, about
    1/d for one without structure. `wigner_diagonal_mass` and `least_squares_diagonal_mass` say what chance gives.

    The columns are products with unit vectors, taken a block at a time and accumulated in at least float32, so that no
    d×d matrix is ever held. Operators of up to 20 000 parameters are measured whole. Of larger ones 1 000 columns are
    drawn at random without replacement: with :math:`a_j = |A_{jj}|` and :math:`b_j = \sum_i |A_{ij}|` of the n columns
    drawn, the estimate is the ratio :math:`\hat\delta = \sum a_j / \sum b_j`, and its standard error

    .. math:: \frac{1}{\bar b} \sqrt{\Bigl(1 - \frac{n}{d}\Bigr) \frac{1}{n (n - 1)}
        \sum_j (a_j - \hat\delta\, b_j)^2}

    (delta method, with the finite population correction).

    Args:
      matvec: the product :math:`v \mapsto A v` with a symmetric A, such as `optcurv.hessian_product(loss, params)`; it
        must work under `jax.vmap` and return the structure of its argument.
      params: any pytree of real arrays, d numbers in all; only structure, shapes and dtypes matter.
      num_probes: columns to draw, from 2 to d; default None: all if there are up to 20 000, otherwise 1 000.
      key: for the draw, a key of `jax.random`; default `jax.random.key(0)`. Not used where all columns are measured.

    Returns:
      A `DiagonalMass`: `mass` and `standard_error`, both without unit; NaN where A is zero or not finite.

    Raises:
      TypeError: if `matvec` is not a function, `num_probes` is not a Python int, or `params` are complex.
      ValueError: if `num_probes` is out of range, `params` hold no number, or `matvec` returns another structure.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss = lambda w: w[0] ** 2 + w[1] ** 2 + w[0] * w[1]
      >>> w = jnp.zeros(2)
      >>> result = optcurv.diagonal_mass(optcurv.hessian_product(loss, w), w)  # of [[2, 1], [1, 2]]
      >>> print(f"{result.mass:.4f} ± {result.standard_error:.4f}")
      0.6667 ± 0.0000
    """
    if not callable(matvec):
        raise TypeError(
            "matvec must be a function v -> Av, such as optcurv.hessian_product(loss, params), "
            f"got {type(matvec).__name__}."
        )
    params, dimension = vector_space(params)
    columns = _columns(dimension, num_probes, key)
    num_columns = len(columns)

    def measure(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        basis = _unit_vector(params, index)
        column = matvec(basis)
        if layout(column) != layout(basis):
            raise ValueError("matvec must return a pytree of the structure and shapes of params.")
        absolute = jax.tree.map(jnp.abs, at_least_float32(column))
        return _sum(jax.tree.map(jnp.multiply, basis, absolute)), _sum(absolute)

    block = max(1, min(_WIDEST_BLOCK, _BLOCK_NUMBERS // dimension))
    diagonal, total = jax.lax.map(measure, columns, batch_size=block)
    mass = diagonal.sum() / total.sum()
    sampling = (1 - num_columns / dimension) / (num_columns * max(num_columns - 1, 1))
    error = jnp.sqrt(sampling * jnp.sum((diagonal - mass * total) ** 2)) / total.mean()
    return DiagonalMass(mass, error)


def _columns(dimension: int, num_probes: int | None, key: chex.PRNGKey | None) -> jax.Array:
    """The indices of the columns to measure."""
    if num_probes is not None:
        check_count("num_probes", num_probes)
        if not min(2, dimension) <= num_probes <= dimension:
            raise ValueError(
                f"num_probes must be from 2 to the number of parameters, {dimension}, got {num_probes}. "
                "Leave it out to measure every column of up to 20 000."
            )
    elif dimension <= _MOST_COLUMNS:
        return jnp.arange(dimension)
    return jax.random.permutation(key_or_default(key), dimension)[: num_probes or _DRAWN_COLUMNS]


def _unit_vector(like: PyTree, index: jax.Array) -> PyTree:
    """The pytree of zeros with a one at a position, counted through all leaves."""
    leaves, structure = jax.tree.flatten(like)
    units = []
    for leaf in leaves:
        units.append(jnp.asarray(jnp.arange(leaf.size) == index, leaf.dtype).reshape(leaf.shape))
        index = index - leaf.size
    return jax.tree.unflatten(structure, units)


def _sum(tree: PyTree) -> jax.Array:
    return jnp.asarray(sum(leaf.sum() for leaf in jax.tree.leaves(tree)))


def wigner_diagonal_mass(
    dimension: int, *, diagonal_magnitude: float = math.sqrt(2), off_diagonal_magnitude: float = 1.0
) -> float:
    r"""The diagonal mass of a random symmetric (Wigner) matrix: what a Hessian without structure would have.

    .. math:: \delta_{E|W|} = \frac{1}{1 + (d - 1)\, \sigma_2 / \sigma_1}, \qquad
        \sigma_1 = E|W_{ii}|,\ \sigma_2 = E|W_{ij}|

    Proposition 1 of "Adaptive norms for deep learning with regularized Newton methods", which prints
    :math:`\sigma_2 / \sigma_2`; summing the expected absolute entries gives the ratio above. Only the ratio of the two
    magnitudes matters. By default it is that of the Gaussian orthogonal ensemble, √2, whose distribution no rotation
    changes; equal magnitudes give 1/d, a lower mass.

    Args:
      dimension: d, rows of the matrix, at least 1.
      diagonal_magnitude: :math:`\sigma_1` > 0, the expected absolute value on the diagonal.
      off_diagonal_magnitude: :math:`\sigma_2` ≥ 0, likewise off the diagonal, in the same unit.

    Returns:
      The mass, in (0, 1].

    Raises:
      TypeError: if `dimension` is not a Python int, or a magnitude is not a number.
      ValueError: if one is out of range.

    Example:
      >>> import optcurv
      >>> round(optcurv.wigner_diagonal_mass(100, diagonal_magnitude=1.0), 6)
      0.01
    """
    check_count("dimension", dimension)
    check_number("diagonal_magnitude", diagonal_magnitude, minimum=0.0, exclusive=True)
    check_number("off_diagonal_magnitude", off_diagonal_magnitude, minimum=0.0)
    return 1 / (1 + (dimension - 1) * off_diagonal_magnitude / diagonal_magnitude)


def least_squares_diagonal_mass(dimension: int, num_examples: int) -> float:
    r"""The diagonal mass of the Hessian of least squares on random inputs.

    .. math:: \delta_{E|H|} \to \frac{\sqrt{n}}{\sqrt{n} + (d - 1) \sqrt{2 / \pi}}

    for :math:`H = X X^\top`, with X of d×n independent entries of mean zero and equal variance, and n large
    (Proposition 2 of "Adaptive norms for deep learning with regularized Newton methods").

    Args:
      dimension: d, the number of parameters, at least 1.
      num_examples: n, at least 1; within 1 % from about 32 on for Gaussian inputs.

    Returns:
      The mass, in (0, 1].

    Raises:
      TypeError: if an argument is not a Python int.
      ValueError: if one is below 1.

    Example:
      >>> import optcurv
      >>> round(optcurv.least_squares_diagonal_mass(dimension=1000, num_examples=32), 4)
      0.0070
    """
    check_count("dimension", dimension)
    check_count("num_examples", num_examples)
    return math.sqrt(num_examples) / (math.sqrt(num_examples) + (dimension - 1) * math.sqrt(2 / math.pi))

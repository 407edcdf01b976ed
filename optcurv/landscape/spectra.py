"""Spectra of Hessians and other symmetric operators, from products alone: eigenpairs, trace, diagonal, density."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, check_count, key_or_default, vector_space
from optcurv.curvature import MatVec
from optcurv.krylov import combine, tridiagonalize


class Eigenpairs(NamedTuple):
    r"""What `leading_eigenpairs` found.

    Attributes:
      values: :math:`\lambda_i`, of shape (k,), the largest in absolute value first.
      vectors: of norm 1, a pytree like the parameters with a new first axis of k.
      residuals: :math:`\|A v_i - \lambda_i v_i\|`, of shape (k,): an eigenvalue of A lies within this distance.
    """

    values: jax.Array
    vectors: PyTree
    residuals: jax.Array


class Estimate(NamedTuple):
    """The mean of random probes.

    Attributes:
      value: a scalar, or a pytree like the parameters.
      standard_error: of `value`, likewise.
    """

    value: PyTree
    standard_error: PyTree


class SpectralDensity(NamedTuple):
    r"""What `spectral_density` found: the weighted points :math:`\sum_i \omega_i \delta(\lambda - \theta_i)`.

    Attributes:
      nodes: θ, in the unit of the eigenvalues, of shape (probes, steps).
      weights: ω, of the same shape; those of a probe sum to 1.
    """

    nodes: jax.Array
    weights: jax.Array

    def smoothed(self, values: jax.typing.ArrayLike, width: chex.Numeric) -> jax.Array:
        r"""Returns the density at some values, each point spread into a normal distribution.

        Args:
          values: λ, of any shape.
          width: the standard deviation, in the unit of the eigenvalues.

        Returns:
          Of the shape of `values`, in the inverse of their unit; over all values it integrates to 1.
        """
        distances = (jnp.asarray(values)[..., None] - self.nodes.ravel()) / width
        shares = self.weights.ravel() / self.nodes.shape[0]
        return jnp.matmul(jax.scipy.stats.norm.pdf(distances), shares, precision="highest") / width


def leading_eigenpairs(
    matvec: MatVec, params: PyTree, num_pairs: int, *, num_steps: int | None = None, key: chex.PRNGKey | None = None
) -> Eigenpairs:
    r"""The eigenpairs of a symmetric operator that are largest in absolute value.

    Lanczos' method from a random vector, with every new vector orthogonalised against all before; the eigenpairs of
    the tridiagonal matrix :math:`Q^\top A Q` are those of A up to the residuals, which are computed from products of
    their own. A repeated eigenvalue of A yields one pair; where fewer than k pairs are found, the others are NaN.

    Args:
      matvec: the product :math:`v \mapsto A v` with a symmetric A, such as `optcurv.hessian_product(loss, params)` or
        `optcurv.gauss_newton_product(loss, params)`.
      params: any pytree of real arrays, d numbers in all; only structure, shapes and dtypes matter.
      num_pairs: k, from 1 to d.
      num_steps: products, and vectors like the parameters held; from k to d, by default 4 k + 20, at most d. More
        make the residuals smaller.
      key: for the random vector, a key of `jax.random`; default `jax.random.key(0)`.

    Returns:
      The pairs, in at least float32.

    Raises:
      TypeError: if a number is not a Python int, or `params` are complex.
      ValueError: if one is out of range.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 2.0, -30.0, 4.0]) * w**2)
      >>> w = jnp.zeros(4)
      >>> pairs = optcurv.leading_eigenpairs(optcurv.hessian_product(loss, w), w, num_pairs=2)
      >>> print(pairs.values.round(1), jnp.abs(pairs.vectors[0]).round(3))
      [-30.   4.] [0. 0. 1. 0.]
    """
    params, dimension = vector_space(params)
    check_count("num_pairs", num_pairs)
    num_steps = min(4 * num_pairs + 20, dimension) if num_steps is None else num_steps
    check_count("num_steps", num_steps)
    if not num_pairs <= num_steps <= dimension:
        raise ValueError(
            f"num_pairs <= num_steps <= number of parameters must hold, got {num_pairs}, {num_steps}, {dimension}."
        )
    space = tridiagonalize(matvec, _probe(key_or_default(key), params), num_steps)
    values, coordinates = jnp.linalg.eigh(space.matrix())
    inside = jnp.append(1.0, jnp.cumprod(space.off_diagonal != 0)).astype(values.dtype)  # where the basis is not zero
    share = jnp.matmul(inside, coordinates**2, precision="highest")
    values = jnp.where(share > 0.5, values, jnp.nan)
    leading = jnp.argsort(-jnp.abs(values))[:num_pairs]
    values, coordinates = values[leading], coordinates[:, leading]
    vectors = jax.lax.map(lambda column: combine(column, space.basis), coordinates.T)

    def residual(pair: tuple[jax.Array, PyTree]) -> jax.Array:
        value, vector = pair
        return jnp.asarray(optax.tree.norm(optax.tree.add_scale(matvec(vector), -value, vector)))

    return Eigenpairs(values, vectors, jax.lax.map(residual, (values, vectors)))


def hutchinson_trace(
    matvec: MatVec, params: PyTree, *, num_probes: int = 100, key: chex.PRNGKey | None = None
) -> Estimate:
    r"""Estimates the trace of an operator.

    .. math:: \mathrm{tr}(A) \approx \frac1n \sum_{i=1}^{n} z_i^\top A z_i

    with independent signs for the entries of :math:`z_i` (Hutchinson 1989): the variance of a term is twice the sum of
    the squares off A's diagonal.

    Args:
      matvec: the product :math:`v \mapsto A v`, such as `optcurv.hessian_product(loss, params)`.
      params: any pytree of real arrays; only structure, shapes and dtypes matter.
      num_probes: n, products, at least 2.
      key: for the probes, a key of `jax.random`; default `jax.random.key(0)`.

    Returns:
      A scalar estimate.

    Raises:
      TypeError: if `num_probes` is not a Python int, or `params` are complex.
      ValueError: if it is below 2.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> matrix = jnp.array([[1.0, 0.1], [0.1, 2.0]])
      >>> trace = optcurv.hutchinson_trace(lambda v: matrix @ v, jnp.zeros(2))
      >>> print(f"{trace.value:.1f} ± {trace.standard_error:.2f}")
      3.0 ± 0.02
    """
    return _hutchinson(lambda probe: jnp.asarray(optax.tree.vdot(probe, matvec(probe))), params, num_probes, key)


def hutchinson_diagonal(
    matvec: MatVec, params: PyTree, *, num_probes: int = 100, key: chex.PRNGKey | None = None
) -> Estimate:
    r"""Estimates the diagonal of an operator.

    .. math:: \mathrm{diag}(A) \approx \frac1n \sum_{i=1}^{n} z_i \odot A z_i

    with independent signs for the entries of :math:`z_i` (Bekas, Kokiopoulou and Saad 2007): the variance of a term's
    entry is the sum of the squares in its row of A, off the diagonal.

    Args:
      matvec: the product :math:`v \mapsto A v`, such as `optcurv.hessian_product(loss, params)`.
      params: any pytree of real arrays; only structure, shapes and dtypes matter.
      num_probes: n, products, at least 2.
      key: for the probes, a key of `jax.random`; default `jax.random.key(0)`.

    Returns:
      An estimate for each parameter, as pytrees like `params`.

    Raises:
      TypeError: if `num_probes` is not a Python int, or `params` are complex.
      ValueError: if it is below 2.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> diagonal = optcurv.hutchinson_diagonal(lambda v: jnp.array([1.0, 2.0]) * v, jnp.zeros(2))
      >>> print(diagonal.value, diagonal.standard_error)
      [1. 2.] [0. 0.]
    """
    return _hutchinson(lambda probe: jax.tree.map(jnp.multiply, probe, matvec(probe)), params, num_probes, key)


def spectral_density(
    matvec: MatVec, params: PyTree, *, num_steps: int = 50, num_probes: int = 10, key: chex.PRNGKey | None = None
) -> SpectralDensity:
    r"""Estimates how the eigenvalues of a symmetric operator are distributed.

    .. math:: \frac1d \sum_{i=1}^{d} \delta(\lambda - \lambda_i) \approx \frac1n \sum_{i=1}^{n} \sum_{j=1}^{m}
        \omega_{ij}\, \delta(\lambda - \theta_{ij})

    by stochastic Lanczos quadrature (Ghorbani, Krishnan and Xiao 2019, "An investigation into neural net optimization
    via Hessian eigenvalue density"): for each probe θ are the eigenvalues of the tridiagonal matrix of m Lanczos steps
    and ω the squared first entries of its eigenvectors. A probe's sum over :math:`\theta^p` is
    :math:`z^\top A^p z / z^\top z`, exactly up to p = 2 m - 1.

    Args:
      matvec: the product :math:`v \mapsto A v` with a symmetric A, such as `optcurv.hessian_product(loss, params)`.
      params: any pytree of real arrays, d numbers in all; only structure, shapes and dtypes matter.
      num_steps: m, products of a probe, and vectors like the parameters held; at most d.
      num_probes: n.
      key: for the probes, a key of `jax.random`; default `jax.random.key(0)`.

    Returns:
      The density as points with weights; `smoothed` makes a curve of it.

    Raises:
      TypeError: if a number is not a Python int, or `params` are complex.
      ValueError: if one is out of range.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss = lambda w: 0.5 * jnp.sum(jnp.linspace(1.0, 3.0, 100) * w**2)
      >>> w = jnp.zeros(100)
      >>> density = optcurv.spectral_density(optcurv.hessian_product(loss, w), w)
      >>> print(density.smoothed(jnp.array([0.0, 2.0]), width=0.1).round(1))
      [0.  0.5]
    """
    params, dimension = vector_space(params)
    check_count("num_steps", num_steps)
    check_count("num_probes", num_probes)
    if num_steps > dimension:
        raise ValueError(f"num_steps must be at most the number of parameters, {dimension}, got {num_steps}.")

    def quadrature(key: chex.PRNGKey) -> tuple[jax.Array, jax.Array]:
        nodes, vectors = jnp.linalg.eigh(tridiagonalize(matvec, _probe(key, params), num_steps).matrix())
        return nodes, vectors[0] ** 2

    return SpectralDensity(*jax.lax.map(quadrature, jax.random.split(key_or_default(key), num_probes)))


def _hutchinson(
    sample: Callable[[PyTree], PyTree], params: PyTree, num_probes: int, key: chex.PRNGKey | None
) -> Estimate:
    """Averages a function of random signs, one probe after the other (Welford's recurrence)."""
    params, _ = vector_space(params)
    check_count("num_probes", num_probes)
    if num_probes < 2:
        raise ValueError("num_probes must be at least 2, for a standard error, got 1.")

    def accumulate(moments: tuple[PyTree, PyTree], numbered_key: tuple[jax.Array, chex.PRNGKey]) -> tuple:
        (mean, squares), (number, key) = moments, numbered_key
        value = sample(_probe(key, params))
        before = optax.tree.sub(value, mean)
        mean = optax.tree.add_scale(mean, 1 / number, before)
        after = optax.tree.sub(value, mean)
        return (mean, jax.tree.map(lambda s, b, a: s + b * a, squares, before, after)), None

    zeros = optax.tree.zeros_like(jax.eval_shape(sample, params))
    numbers = jnp.arange(1.0, num_probes + 1)
    keys = jax.random.split(key_or_default(key), num_probes)
    (mean, squares), _ = jax.lax.scan(accumulate, (zeros, zeros), (numbers, keys))
    return Estimate(mean, jax.tree.map(lambda s: jnp.sqrt(s / (num_probes * (num_probes - 1))), squares))


def _probe(key: chex.PRNGKey, params: PyTree) -> PyTree:
    """Draws a sign for each parameter."""
    return optax.tree.random_like(key, params, jax.random.rademacher)

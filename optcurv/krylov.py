"""Krylov methods on pytrees. They know no loss: an operator is a function `v -> Av`."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, at_least_float32, check_count
from optcurv.curvature import MatVec


class MinresInfo(NamedTuple):
    r"""What `minres` did.

    Attributes:
      residual_norm: :math:`\|b - (A + \lambda I) x\|`, from the recurrence.
      iterations: steps that changed the solution; fewer than asked for where it converged.
      negative_curvature: whether a vector of the Krylov space met has :math:`v^\top (A + \lambda I) v < 0`.
      first_step: the number c for which c b is the solution after one step.
    """

    residual_norm: jax.Array
    iterations: jax.Array
    negative_curvature: jax.Array
    first_step: jax.Array


def minres(matvec: MatVec, b: PyTree, max_iter: int, *, shift: chex.Numeric = 0.0) -> tuple[PyTree, MinresInfo]:
    r"""Minimises :math:`\|(A + \lambda I) x - b\|` over the Krylov space of order k, for symmetric A.

    The short recurrence of Paige and Saunders (1975) from zero; Algorithm 1 of the EDF paper with its misprint
    corrected: the shift adds :math:`\lambda v_1`, the *normalised* Lanczos vector, not :math:`\lambda g`. A may be
    indefinite or singular. Memory is O(1) vectors, accumulated in at least float32; :math:`b = 0` gives 0.

    The solution stays as it is once it is as good as rounding allows: where the residual r has
    :math:`\|A r\| \le 1000\, \epsilon\, \|A\|_F \|r\|` (a least-squares solution; also where the Krylov space is
    exhausted) or :math:`\|r\| \le 4 \epsilon (\|A\|_F \|x\| + \|b\|)`, or where a step is so long that its rounding,
    :math:`4 \epsilon \|A\|_F \|\Delta x\|`, exceeds what the residual would gain; all as the recurrence has them.
    Further steps would only lead away: on a singular A to 10⁶ times the length of the pseudo-inverse's solution.

    The steps are unrolled: they are few as a rule, and an operator's convolutions stay as fast as they are outside of
    loops even where it does not come from `optcurv.curvature`. Compile time grows in proportion to `max_iter`.

    Args:
      matvec: the product :math:`v \mapsto A v`; must return the structure of `b`.
      b: the right-hand side, any pytree of real arrays.
      max_iter: the order k of the Krylov space, at least 1; each step takes one product.
      shift: :math:`\lambda`, any real scalar; default 0.

    Returns:
      The solution, of the structure of `b`, in the dtype of the recurrence; and a `MinresInfo`.

    Raises:
      ValueError: if `max_iter` is below 1.
      TypeError: if `max_iter` is not a Python int.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> a, b = jnp.array([[2.0, 1.0], [1.0, -3.0]]), jnp.array([3.0, -2.0])
      >>> x, info = optcurv.minres(lambda v: a @ v, b, max_iter=2)
      >>> print(x.round(4), info.iterations)
      [1. 1.] 2
    """
    check_count("max_iter", max_iter)
    b = at_least_float32(b)
    norm = beta = optax.tree.norm(b)
    epsilon = jnp.finfo(beta.dtype).eps
    shift = jnp.asarray(shift, beta.dtype)
    residual = beta
    square = jnp.zeros_like(beta)  # of the Frobenius norm of A, from below
    cos_old, cos, sin_old, sin = jnp.ones_like(beta), jnp.ones_like(beta), jnp.zeros_like(beta), jnp.zeros_like(beta)
    x = v_old = q_old = q = optax.tree.zeros_like(b)
    u = b
    length = first_step = jnp.zeros_like(beta)  # of x, from above
    steps_used = jnp.zeros((), jnp.int32)
    done = negative = jnp.zeros((), bool)

    for number in range(max_iter):
        # Lanczos: beta = 0 makes v zero, and with it all that follows in this loop.
        v = optax.tree.scale(inverse(beta), u)
        u = optax.tree.add_scale(matvec(v), shift, v)
        alpha = jnp.asarray(optax.tree.vdot(v, u))
        u = optax.tree.add_scale(optax.tree.add_scale(u, -alpha, v), -beta, v_old)
        beta_old, beta = beta if number > 0 else jnp.zeros_like(beta), optax.tree.norm(u)
        square = square + alpha**2 + beta_old**2 + beta**2
        operator_norm = jnp.sqrt(square)
        beta = jnp.where(beta <= 10 * epsilon * operator_norm, 0.0, beta)

        # The next column of the QR factorisation of the tridiagonal matrix.
        delta = cos * alpha - cos_old * sin * beta_old
        rho_2 = sin * alpha + cos_old * cos * beta_old
        rho_3 = sin_old * beta_old
        rho_1 = jnp.hypot(delta, beta)

        converged = jnp.hypot(delta, cos * beta) <= 1000 * epsilon * operator_norm
        converged |= jnp.abs(residual) <= 4 * epsilon * (operator_norm * length + norm)
        # r'Ar / r'r: negative at some step exactly if A has negative curvature in the space (Liu and Roosta 2022).
        residual_curvature = cos * delta

        # The solution follows along q.
        cos_old, cos = cos, delta * inverse(rho_1)
        sin_old, sin = sin, jnp.where(rho_1 > 0, beta * inverse(rho_1), 1.0)
        direction = optax.tree.add_scale(optax.tree.add_scale(v, -rho_2, q), -rho_3, q_old)
        q_old, q = q, optax.tree.scale(inverse(rho_1), direction)
        step_length = jnp.abs(cos * residual) * optax.tree.norm(q)
        decrease = jnp.abs(residual) * cos**2 / (1 + sin)
        undone = (decrease < 4 * epsilon * operator_norm * step_length) & (operator_norm * step_length > 3 * norm)
        done = done | converged | undone
        length = length + jnp.where(done, 0.0, step_length)
        x = optax.tree.add_scale(x, jnp.where(done, 0.0, cos * residual), q)
        residual = jnp.where(done, residual, -sin * residual)
        v_old = v
        steps_used = steps_used + ~done
        negative = negative | (~done & (residual_curvature < -1000 * epsilon * operator_norm))
        first_step = first_step if number > 0 else alpha * inverse(rho_1**2)
        # Fused across steps, the unrolled recurrence would take XLA a time quadratic in their number.
        x, q, q_old, u, v_old, beta, residual = jax.lax.optimization_barrier((x, q, q_old, u, v_old, beta, residual))

    return x, MinresInfo(jnp.abs(residual), steps_used, negative, first_step)


def inverse(x: jax.Array) -> jax.Array:
    """1/x, and 0 for x = 0; not a number stays so."""
    return jnp.where(x == 0, 0.0, 1 / jnp.where(x == 0, 1.0, x))


class Metric(NamedTuple):
    r"""The norm :math:`\|s\|_M = \sqrt{s^\top M s}` of a positive definite M, as two operators.

    Attributes:
      apply: :math:`v \mapsto M v`.
      inverse: :math:`v \mapsto M^{-1} v`.

    Example:
      >>> import optcurv
      >>> ball = optcurv.Metric(apply=lambda v: v, inverse=lambda v: v)
    """

    apply: MatVec
    inverse: MatVec


class Tridiagonal(NamedTuple):
    r"""An orthonormal basis Q of a Krylov space, and :math:`Q^\top A Q`.

    Attributes:
      basis: Q, a pytree whose leaves have a new first axis of the space's dimension; zero beyond its end.
      diagonal: of the matrix.
      off_diagonal: of the matrix; one fewer.
    """

    basis: PyTree
    diagonal: jax.Array
    off_diagonal: jax.Array

    def matrix(self) -> jax.Array:
        """Returns the dense matrix."""
        return jnp.diag(self.diagonal) + jnp.diag(self.off_diagonal, 1) + jnp.diag(self.off_diagonal, -1)


def tridiagonalize(matvec: MatVec, start: PyTree, num_steps: int) -> Tridiagonal:
    """Lanczos' method, each new vector orthogonalised against all before; it takes one product a step.

    Where the space ends early, the rest of the basis and of the matrix is zero.
    """
    plain = Metric(lambda v: v, lambda v: v)

    def step(basis: PyTree, index: jax.Array) -> tuple[PyTree, tuple[jax.Array, jax.Array]]:
        vector = jax.tree.map(lambda q: q[index], basis)
        product = matvec(vector)
        following, _, _ = orthonormalized(plain, basis, product)
        basis = jax.tree.map(lambda q, v: q.at[index + 1].set(v, mode="drop"), basis, following)
        return basis, (jnp.asarray(optax.tree.vdot(vector, product)), jnp.asarray(optax.tree.vdot(following, product)))

    first = optax.tree.scale(1 / optax.tree.norm(start), start)
    basis = jax.tree.map(lambda v: jnp.zeros((num_steps, *v.shape), v.dtype).at[0].set(v), first)
    basis, (diagonal, off_diagonal) = jax.lax.scan(step, basis, jnp.arange(num_steps))
    return Tridiagonal(basis, diagonal, off_diagonal[:-1])


def orthonormalized(metric: Metric, basis: PyTree, dual: PyTree) -> tuple[PyTree, jax.Array, jax.Array]:
    """Makes M⁻¹ times a vector M-orthonormal to a basis.

    Returns it, its length before it was normalised (0 if it is not new to the basis, and the vector then is zero), and
    its squared norm at the very start.
    """
    vector = metric.inverse(dual)
    square = jnp.asarray(optax.tree.vdot(dual, vector))
    vector = optax.tree.sub(vector, combine(coordinates(basis, dual), basis))
    # Once more: the first pass leaves rounding in proportion to what it removed.
    vector = optax.tree.sub(vector, combine(coordinates(basis, metric.apply(vector)), basis))
    rest = jnp.asarray(optax.tree.vdot(vector, metric.apply(vector)))
    is_new = rest > (100 * jnp.finfo(rest.dtype).eps) ** 2 * square
    length = jnp.where(is_new, jnp.sqrt(jnp.where(is_new, rest, 1.0)), 0.0)
    vector = optax.tree.where(is_new, optax.tree.scale(inverse(length), vector), optax.tree.zeros_like(vector))
    return vector, length, square


def coordinates(basis: PyTree, dual: PyTree) -> jax.Array:
    """Returns the inner products of a vector with every row of a basis."""
    products = jax.tree.map(lambda q, v: jnp.tensordot(q, v, axes=v.ndim, precision="highest"), basis, dual)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def combine(coefficients: jax.Array, basis: PyTree) -> PyTree:
    """Returns the sum of a basis' rows, each times its coefficient."""
    return jax.tree.map(lambda q: jnp.tensordot(coefficients, q, axes=1, precision="highest"), basis)

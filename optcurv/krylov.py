"""Krylov methods on pytrees. They know no loss: an operator is a function `v -> Av`."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, at_least_float32, check_count, check_number
from optcurv.convolutions import with_canonical_convolutions
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


def minres(
    matvec: MatVec, b: PyTree, max_iter: int, *, shift: chex.Numeric = 0.0, tol: chex.Numeric = 0.0
) -> tuple[PyTree, MinresInfo]:
    r"""Minimises :math:`\|(A + \lambda I) x - b\|` over the Krylov space of order k, for symmetric A.

    The short recurrence of Paige and Saunders (1975) from zero; Algorithm 1 of the EDF paper with its misprint
    corrected: the shift adds :math:`\lambda v_1`, the *normalised* Lanczos vector, not :math:`\lambda g`. A may be
    indefinite or singular. Memory is O(1) vectors, accumulated in at least float32; :math:`b = 0` gives 0.

    The solution stays as it is once it is as good as rounding allows: where the residual r has
    :math:`\|A r\| \le 1000\, \epsilon\, \|A\|_F \|r\|` (a least-squares solution; also where the Krylov space is
    exhausted) or :math:`\|r\| \le 4 \epsilon (\|A\|_F \|x\| + \|b\|)`, or where a step is so long that its rounding,
    :math:`4 \epsilon \|A\|_F \|\Delta x\|`, exceeds what the residual would gain; all as the recurrence has them.
    Further steps would only lead away: on a singular A to 10⁶ times the length of the pseudo-inverse's solution.

    Up to four steps are unrolled. More run in a loop, which ends where the solution stays as it is; compile time does
    not depend on their number, and the operator's convolutions are made as fast there as outside.

    Args:
      matvec: the product :math:`v \mapsto A v`; must return the structure of `b`.
      b: the right-hand side, any pytree of real arrays.
      max_iter: the order k of the Krylov space, at least 1; each step takes one product.
      shift: :math:`\lambda`, any real scalar; default 0.
      tol: takes no more steps once :math:`\|r\| \le \mathrm{tol} \, \|b\|`; default 0.

    Returns:
      The solution, of the structure of `b`, in the dtype of the recurrence; and a `MinresInfo`.

    Raises:
      ValueError: if `max_iter` is below 1, or `tol` negative.
      TypeError: if `max_iter` is not a Python int.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> a, b = jnp.array([[2.0, 1.0], [1.0, -3.0]]), jnp.array([3.0, -2.0])
      >>> x, info = optcurv.minres(lambda v: a @ v, b, max_iter=2)
      >>> print(x.round(4), info.iterations)
      [1. 1.] 2
    """
    check_count("max_iter", max_iter)
    check_number("tol", tol, minimum=0.0, constant=True)
    b = at_least_float32(b)
    norm = jnp.asarray(optax.tree.norm(b))
    shift = jnp.asarray(shift, norm.dtype)
    if max_iter > _UNROLLED:
        matvec = with_canonical_convolutions(matvec, b)

    def advance(state: _Minres, is_first: bool = False) -> _Minres:
        v = optax.tree.scale(inverse(state.beta), state.u)  # beta = 0 makes v zero, and with it all that follows
        return _minres_step(state, v, optax.tree.add_scale(matvec(v), shift, v), norm, tol, is_first)

    state = advance(_start_minres(b, norm), is_first=True)
    if max_iter <= _UNROLLED:
        for _ in range(max_iter - 1):
            state = advance(state)
    else:
        goes_on = lambda carry: (carry[0] < max_iter) & ~carry[1].done & jnp.isfinite(carry[1].residual)  # noqa: E731
        _, state = jax.lax.while_loop(goes_on, lambda carry: (carry[0] + 1, advance(carry[1])), (1, state))
    return state.x, MinresInfo(jnp.abs(state.residual), state.iterations, state.negative, state.first_step)


_UNROLLED = 4  # steps at most


class _Minres(NamedTuple):
    """The solution, what is known of it, and the recurrences of Lanczos, of the rotations and of q."""

    x: PyTree
    residual: jax.Array  # its norm, with the sign of the recurrence
    length: jax.Array  # of x, from above
    iterations: jax.Array
    done: jax.Array
    negative: jax.Array
    first_step: jax.Array
    square: jax.Array  # of the Frobenius norm of A, from below
    u: PyTree
    v_old: PyTree
    beta: jax.Array
    cos: jax.Array
    cos_old: jax.Array
    sin: jax.Array
    sin_old: jax.Array
    q: PyTree
    q_old: PyTree


def _start_minres(b: PyTree, norm: jax.Array) -> _Minres:
    zero, one, zeros, false = jnp.zeros_like(norm), jnp.ones_like(norm), optax.tree.zeros_like(b), jnp.zeros((), bool)
    return _Minres(
        x=zeros,
        residual=norm,
        length=zero,
        iterations=jnp.zeros((), jnp.int32),
        done=false,
        negative=false,
        first_step=zero,
        square=zero,
        u=b,
        v_old=zeros,
        beta=norm,
        cos=one,
        cos_old=one,
        sin=zero,
        sin_old=zero,
        q=zeros,
        q_old=zeros,
    )


def _minres_step(
    state: _Minres, v: PyTree, product: PyTree, norm: jax.Array, tol: chex.Numeric, is_first: bool
) -> _Minres:
    """One step, from the Lanczos vector and its product."""
    epsilon = jnp.finfo(norm.dtype).eps
    alpha = jnp.asarray(optax.tree.vdot(v, product))
    u = optax.tree.add_scale(optax.tree.add_scale(product, -alpha, v), -state.beta, state.v_old)
    beta_old, beta = jnp.zeros_like(norm) if is_first else state.beta, jnp.asarray(optax.tree.norm(u))
    square = state.square + alpha**2 + beta_old**2 + beta**2
    operator_norm = jnp.sqrt(square)

    # The next column of the QR factorisation of the tridiagonal matrix.
    delta = state.cos * alpha - state.cos_old * state.sin * beta_old
    rho_2 = state.sin * alpha + state.cos_old * state.cos * beta_old
    rho_3 = state.sin_old * beta_old
    rho_1 = jnp.hypot(delta, beta)
    cos, sin = delta * inverse(rho_1), jnp.where(rho_1 > 0, beta * inverse(rho_1), 1.0)

    # The solution follows along q, unless it is as good as it gets.
    direction = optax.tree.add_scale(optax.tree.add_scale(v, -rho_2, state.q), -rho_3, state.q_old)
    q = optax.tree.scale(inverse(rho_1), direction)
    residual = jnp.abs(state.residual)
    step_length = jnp.abs(cos) * residual * optax.tree.norm(q)
    converged = jnp.hypot(delta, state.cos * beta) <= 1000 * epsilon * operator_norm
    converged |= residual <= 4 * epsilon * (operator_norm * state.length + norm)
    decrease = residual * cos**2 / (1 + sin)
    undone = (decrease < 4 * epsilon * operator_norm * step_length) & (operator_norm * step_length > 3 * norm)
    done = state.done | converged | undone | (residual <= tol * norm)
    # r'Ar / r'r: negative at some step exactly if A has negative curvature in the space (Liu and Roosta 2022).
    negative = ~done & (state.cos * delta < -1000 * epsilon * operator_norm)
    return _Minres(
        x=optax.tree.add_scale(state.x, jnp.where(done, 0.0, cos * state.residual), q),
        residual=jnp.where(done, state.residual, -sin * state.residual),
        length=state.length + jnp.where(done, 0.0, step_length),
        iterations=state.iterations + ~done,
        done=done,
        negative=state.negative | negative,
        first_step=alpha * inverse(rho_1**2) if is_first else state.first_step,
        square=square,
        u=u,
        v_old=v,
        beta=jnp.where(beta <= 10 * epsilon * operator_norm, 0.0, beta),  # the space is exhausted
        cos=cos,
        cos_old=state.cos,
        sin=sin,
        sin_old=state.sin,
        q=q,
        q_old=state.q,
    )


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

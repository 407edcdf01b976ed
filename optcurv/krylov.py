"""Krylov methods on pytrees. They know no loss: an operator is a function `v -> Av`."""

import enum
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, at_least_float32, check_count, check_number
from optcurv.curvature import MatVec
from optcurv.quadratic import Minimizer, minimize_cubic, minimize_in_ball


class MinresInfo(NamedTuple):
    r"""What `minres` did.

    Attributes:
      residual_norm: :math:`\|b - (A + \lambda I) x\|`, from the recurrence.
      num_steps: steps that changed the solution; fewer than asked for where it converged.
      negative_curvature: whether a vector of the Krylov space met has :math:`v^\top (A + \lambda I) v < 0`.
      first_step: the number c for which c b is the solution after one step.
    """

    residual_norm: jax.Array
    num_steps: jax.Array
    negative_curvature: jax.Array
    first_step: jax.Array


def minres(matvec: MatVec, b: PyTree, num_steps: int, *, shift: chex.Numeric = 0.0) -> tuple[PyTree, MinresInfo]:
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
    loops even where it does not come from `optcurv.curvature`. Compile time grows in proportion to `num_steps`.

    Args:
      matvec: the product :math:`v \mapsto A v`; must return the structure of `b`.
      b: the right-hand side, any pytree of real arrays.
      num_steps: the order k of the Krylov space, at least 1; each step takes one product.
      shift: :math:`\lambda`, any real scalar; default 0.

    Returns:
      The solution, of the structure of `b`, in the dtype of the recurrence; and a `MinresInfo`.

    Raises:
      ValueError: if `num_steps` is below 1.
      TypeError: if `num_steps` is not a Python int.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> a, b = jnp.array([[2.0, 1.0], [1.0, -3.0]]), jnp.array([3.0, -2.0])
      >>> x, info = optcurv.minres(lambda v: a @ v, b, num_steps=2)
      >>> print(x.round(4), info.num_steps)
      [1. 1.] 2
    """
    check_count("num_steps", num_steps)
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

    for number in range(num_steps):
        # Lanczos: beta = 0 makes v zero, and with it all that follows in this loop.
        v = optax.tree.scale(_inverse(beta), u)
        u = optax.tree.add_scale(matvec(v), shift, v)
        alpha = jnp.asarray(optax.tree.vdot(v, u))
        u = optax.tree.add_scale(optax.tree.add_scale(u, -alpha, v), -beta, v_old)
        beta_old, beta = jnp.where(number == 0, 0.0, beta), optax.tree.norm(u)
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
        cos_old, cos = cos, delta * _inverse(rho_1)
        sin_old, sin = sin, jnp.where(rho_1 > 0, beta * _inverse(rho_1), 1.0)
        direction = optax.tree.add_scale(optax.tree.add_scale(v, -rho_2, q), -rho_3, q_old)
        q_old, q = q, optax.tree.scale(_inverse(rho_1), direction)
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
        first_step = jnp.where(number == 0, alpha * _inverse(rho_1**2), first_step)
        # Fused across steps, the unrolled recurrence would take XLA a time quadratic in their number.
        x, q, q_old, u, v_old, beta, residual = jax.lax.optimization_barrier((x, q, q_old, u, v_old, beta, residual))

    return x, MinresInfo(jnp.abs(residual), steps_used, negative, first_step)


def _inverse(x: jax.Array) -> jax.Array:
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


class Stop(enum.IntEnum):
    """Why a solver stopped.

    Attributes:
      NOT_FINITE: gradient or product.
      INDEFINITE_SHAPE: a vector met had a negative squared norm.
      CONVERGED: inside the region.
      BOUNDARY: the step ends on it.
      NEGATIVE_CURVATURE: likewise, along a direction of negative (or no) curvature.
      MAX_ITER: inside the region, with no more products to take.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> state = optcurv.trust_region().init(jnp.zeros(2))
      >>> optcurv.Stop(int(state.info.stop)).name  # of no step yet
      'NOT_FINITE'
    """

    NOT_FINITE = 0
    INDEFINITE_SHAPE = 1
    CONVERGED = 2
    BOUNDARY = 3
    NEGATIVE_CURVATURE = 4
    MAX_ITER = 5


class ModelStep(NamedTuple):
    r"""A step that reduces a quadratic model.

    Attributes:
      step: s, of the gradient's structure and dtype.
      predicted_decrease: :math:`m(0) - m(s)`.
      iterations: curvature products taken.
      stop: a `Stop`.
    """

    step: PyTree
    predicted_decrease: jax.Array
    iterations: jax.Array
    stop: jax.Array


Solver: TypeAlias = Callable[[MatVec, PyTree, Metric, jax.Array, jax.Array], ModelStep]
"""Maps the product with B, the gradient, the metric, the radius (or cubic weight) and a random key to a step."""


def steihaug(max_iter: int = 50, tol: float = 0.1) -> Solver:
    r"""Conjugate gradients for the trust region model, stopped at the boundary and at negative curvature.

    Reduces :math:`m(s) = g^\top s + \tfrac12 s^\top B s` subject to :math:`\|s\|_M \le \Delta` (Steihaug 1983),
    preconditioned with M, so that the iterates are those of plain conjugate gradients in the coordinates
    :math:`M^{1/2} s` and their norms grow monotonically. Where the next iterate would leave the region, or the
    curvature along its direction is not positive, the step goes on to the boundary. It decreases the model at least as
    much as the Cauchy point, and does not see negative curvature that the gradient hides: a zero gradient gives a zero
    step.

    Args:
      max_iter: the most products taken, at least 1.
      tol: κ ≥ 0; stops where the residual falls below :math:`\|g\| \min(\kappa, \sqrt{\|g\|})`, in the norm of
        :math:`M^{-1}`.

    Returns:
      The solver, for `optcurv.trust_region`.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if `max_iter` is not a Python int.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> ball = optcurv.Metric(apply=lambda v: v, inverse=lambda v: v)
      >>> solve = optcurv.steihaug(tol=1e-6)
      >>> g = jnp.array([2.0, 4.0])
      >>> found = solve(lambda v: jnp.array([1.0, 4.0]) * v, g, ball, jnp.array(10.0), jax.random.key(0))
      >>> print(found.step.round(3), found.iterations, optcurv.Stop(int(found.stop)).name)
      [-2. -1.] 2 CONVERGED
    """
    check_count("max_iter", max_iter)
    check_number("tol", tol, minimum=0.0, constant=True)

    def solve(matvec: MatVec, gradient: PyTree, metric: Metric, radius: jax.Array, key: jax.Array) -> ModelStep:
        del key  # nothing here is random
        preconditioned = metric.inverse(gradient)
        rho = jnp.asarray(optax.tree.vdot(gradient, preconditioned))
        norm = jnp.sqrt(rho)
        tolerance = norm * jnp.minimum(tol, jnp.sqrt(norm))

        def advance(state: _ConjugateGradients) -> _ConjugateGradients:
            s, r, p, rho, s_s, s_p, p_p, decrease, iterations, _ = state
            product = matvec(p)
            curvature = jnp.asarray(optax.tree.vdot(p, product))
            room = jnp.maximum(radius**2 - s_s, 0.0)
            to_boundary = room * _inverse(s_p + jnp.sqrt(s_p**2 + p_p * room))  # 0 where squares underflow
            to_minimum = rho / jnp.where(curvature > 0, curvature, 1.0)
            inside = (curvature > 0) & (to_minimum < to_boundary)
            length = jnp.where(inside, to_minimum, to_boundary)
            s, r = optax.tree.add_scale(s, length, p), optax.tree.add_scale(r, length, product)
            decrease = decrease + length * (rho - 0.5 * length * curvature)
            s_s, s_p = s_s + length * (2 * s_p + length * p_p), s_p + length * p_p

            preconditioned = metric.inverse(r)
            rho_new = jnp.asarray(optax.tree.vdot(r, preconditioned))
            beta = rho_new / rho
            p = optax.tree.add_scale(optax.tree.scale(-1.0, preconditioned), beta, p)
            s_p, p_p = beta * s_p, rho_new + beta**2 * p_p
            at_boundary = jnp.where(curvature > 0, Stop.BOUNDARY, Stop.NEGATIVE_CURVATURE)
            converged = jnp.where(jnp.sqrt(rho_new) <= tolerance, Stop.CONVERGED, Stop.MAX_ITER)
            stop = jnp.where(rho_new >= 0, jnp.where(inside, converged, at_boundary), Stop.INDEFINITE_SHAPE)
            stop = jnp.where(jnp.isfinite(curvature) & jnp.isfinite(rho_new), stop, Stop.NOT_FINITE)
            return _ConjugateGradients(s, r, p, rho_new, s_s, s_p, p_p, decrease, iterations + 1, stop)

        zero = jnp.zeros_like(rho)
        stop = jnp.where(norm <= tolerance, Stop.CONVERGED, Stop.MAX_ITER)
        stop = jnp.where(rho >= 0, stop, Stop.INDEFINITE_SHAPE)
        start = _ConjugateGradients(
            step=optax.tree.zeros_like(gradient),
            residual=gradient,
            direction=optax.tree.scale(-1.0, preconditioned),
            rho=rho,
            step_square=zero,
            step_direction=zero,
            direction_square=rho,
            decrease=zero,
            iterations=jnp.zeros((), jnp.int32),
            stop=jnp.where(jnp.isfinite(rho), stop, Stop.NOT_FINITE),
        )
        goes_on = lambda state: (state.stop == Stop.MAX_ITER) & (state.iterations < max_iter)  # noqa: E731
        end = jax.lax.while_loop(goes_on, advance, start)
        return ModelStep(end.step, end.decrease, end.iterations, end.stop)

    return solve


class _ConjugateGradients(NamedTuple):
    step: PyTree
    residual: PyTree
    direction: PyTree
    rho: jax.Array  # the residual's squared norm
    # Inner products by M, from recurrences: each M saved is a pass over the parameters.
    step_square: jax.Array
    step_direction: jax.Array
    direction_square: jax.Array
    decrease: jax.Array  # of the model
    iterations: jax.Array
    stop: jax.Array


def lanczos(max_iter: int = 10, tol: float = 0.1) -> Solver:
    r"""The trust region model's global minimiser in the Krylov space of the gradient.

    Minimises :math:`m(s) = g^\top s + \tfrac12 s^\top B s` subject to :math:`\|s\|_M \le \Delta` over the Krylov
    space of :math:`M^{-1} B` from :math:`M^{-1} g`: GLTR (Gould, Lucidi, Roma and Toint 1999). The step decreases the
    model at least as much as the Cauchy point. Unlike Steihaug's solver it goes on after it has met negative curvature
    or the boundary.

    Where the space ends before the products do, as at a saddle, where the gradient is zero, a second sequence starts
    from a random vector. A strict saddle is therefore left even where the gradient is zero. With `tol=0` and as many
    products as dimensions, the step decreases the model at least as much as the eigenpoint: Assumption 2 of "Adaptive
    norms for deep learning with regularized Newton methods", which Steihaug's solver does not meet. With fewer
    products, it does so as far as the space holds the lowest eigenvector.

    One vector is kept for each product.

    Args:
      max_iter: the most products taken, and the dimension of the space, at least 1.
      tol: κ ≥ 0; stops where no negative curvature has been met and the residual of Newton's equation falls below
        :math:`\|g\| \min(\kappa, \sqrt{\|g\|})`, in the norm of :math:`M^{-1}`.

    Returns:
      The solver, for `optcurv.trust_region`.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if `max_iter` is not a Python int.

    Example:
      A saddle, where the gradient is zero:

      >>> import jax, jax.numpy as jnp, optcurv
      >>> ball = optcurv.Metric(apply=lambda v: v, inverse=lambda v: v)
      >>> solve = optcurv.lanczos(max_iter=2)
      >>> g = jnp.array([0.0, 0.0])
      >>> found = solve(lambda v: jnp.array([1.0, -1.0]) * v, g, ball, jnp.array(1.0), jax.random.key(0))
      >>> print(found.predicted_decrease.round(3), optcurv.Stop(int(found.stop)).name)
      0.5 NEGATIVE_CURVATURE
    """
    check_count("max_iter", max_iter)
    check_number("tol", tol, minimum=0.0)

    def solve(matvec: MatVec, gradient: PyTree, metric: Metric, radius: jax.Array, key: jax.Array) -> ModelStep:
        space = _krylov_space(matvec, gradient, metric, max_iter, tol, key)
        minimizer = minimize_in_ball(space.operator, space.gradient, radius)
        at_boundary = jnp.where(minimizer.lowest_eigenvalue < 0, Stop.NEGATIVE_CURVATURE, Stop.BOUNDARY)
        stop = jnp.where(minimizer.multiplier > 0, at_boundary, Stop.CONVERGED)
        return _step_in_space(space, minimizer, stop, regularization=0.0)

    return solve


def cubic_lanczos(max_iter: int = 10, tol: float = 0.1) -> Solver:
    r"""Minimises :math:`g^\top s + \tfrac12 s^\top B s + \tfrac{\sigma}{3} \|s\|_M^3` in the space of `lanczos`.

    σ stands in the place of the radius, and the predicted decrease is that of the cubic model.

    Args:
      max_iter: the most products taken, and the dimension of the space, at least 1.
      tol: as in `lanczos`.

    Returns:
      The solver.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if `max_iter` is not a Python int.
    """
    check_count("max_iter", max_iter)
    check_number("tol", tol, minimum=0.0)

    def solve(matvec: MatVec, gradient: PyTree, metric: Metric, weight: jax.Array, key: jax.Array) -> ModelStep:
        space = _krylov_space(matvec, gradient, metric, max_iter, tol, key)
        minimizer = minimize_cubic(space.operator, space.gradient, weight)
        stop = jnp.where(minimizer.lowest_eigenvalue < 0, Stop.NEGATIVE_CURVATURE, Stop.CONVERGED)
        cubic_term = weight / 3 * jnp.linalg.norm(minimizer.point) ** 3
        return _step_in_space(space, minimizer, stop, cubic_term)

    return solve


class _KrylovSpace(NamedTuple):
    """An M-orthonormal basis Q, leaves of shape (k, ...), zero beyond `size` rows, with Q'BQ and Q'g."""

    basis: PyTree
    operator: jax.Array
    gradient: jax.Array
    size: jax.Array
    products: jax.Array
    least_square: jax.Array  # of the squared norms met: negative if M is not positive definite, NaN if one overflowed
    restarted: jax.Array  # whether the second sequence has begun
    # Of the first sequence, T = LDL' and Lz = -Q'g: the last entries of D and z, whether D has been positive, and the
    # norm of the residual of Th = -Q'g, infinite if not.
    pivot: jax.Array
    coefficient: jax.Array
    definite: jax.Array
    residual: jax.Array


def _krylov_space(
    matvec: MatVec, gradient: PyTree, metric: Metric, dimension: int, tol: float, key: jax.Array
) -> _KrylovSpace:
    """Lanczos from M⁻¹g, each new vector orthogonalised against all before; where that ends, from a random vector."""

    def append(space: _KrylovSpace, dual: PyTree) -> tuple[_KrylovSpace, jax.Array]:
        """Adds M⁻¹ times a vector to the basis, if it is new to it; returns also the length of what is new."""
        vector, length, square = _orthonormalized(metric, space.basis, dual)
        basis = jax.tree.map(lambda q, v: q.at[space.size].set(v, mode="drop"), space.basis, vector)
        size = jnp.minimum(space.size + (length > 0), dimension)
        square = jnp.where(jnp.isfinite(square), square, jnp.nan)
        least_square = jnp.minimum(space.least_square, square)
        return space._replace(basis=basis, size=size, least_square=least_square), length

    def restart(space: _KrylovSpace) -> _KrylovSpace:
        random = optax.tree.random_like(key, gradient, jax.random.normal)
        return append(space._replace(restarted=jnp.ones((), bool)), random)[0]

    def if_exhausted_restart(space: _KrylovSpace) -> _KrylovSpace:
        exhausted = (space.products == space.size) & (space.size < dimension) & ~space.restarted
        return jax.lax.cond(exhausted, restart, lambda space: space, space)

    def expand(space: _KrylovSpace) -> _KrylovSpace:
        product = matvec(jax.tree.map(lambda q: q[space.products], space.basis))
        column = _coordinates(space.basis, product)
        operator = space.operator.at[:, space.products].set(column)
        is_first, multiplier = space.products == 0, column[space.products - 1] * _inverse(space.pivot)
        pivot = column[space.products] - jnp.where(is_first, 0.0, multiplier * column[space.products - 1])
        coefficient = jnp.where(is_first, 1.0, -multiplier) * space.coefficient
        space, length = append(space._replace(operator=operator, products=space.products + 1), product)
        definite = space.definite & (pivot > 0)
        residual = jnp.where(definite, length * jnp.abs(coefficient * _inverse(pivot)), jnp.inf)
        space = space._replace(pivot=pivot, coefficient=coefficient, definite=definite, residual=residual)
        return if_exhausted_restart(space)

    basis = jax.tree.map(lambda leaf: jnp.zeros((dimension, *leaf.shape), leaf.dtype), gradient)
    zeros, false = _coordinates(basis, gradient), jnp.zeros((), bool)
    space = _KrylovSpace(
        basis=basis,
        operator=jnp.zeros((dimension, dimension), zeros.dtype),
        gradient=zeros,
        size=jnp.zeros((), jnp.int32),
        products=jnp.zeros((), jnp.int32),
        least_square=zeros[0],
        restarted=false,
        pivot=zeros[0],
        coefficient=zeros[0],
        definite=~false,
        residual=zeros[0] + jnp.inf,
    )
    space, norm = append(space, gradient)
    space = if_exhausted_restart(space._replace(coefficient=norm))
    tolerance = norm * jnp.minimum(tol, jnp.sqrt(norm))
    goes_on = lambda space: (space.products < space.size) & (space.restarted | (space.residual > tolerance))  # noqa: E731
    space = jax.lax.while_loop(goes_on, expand, space)
    upper = jnp.triu(space.operator)  # a column was computed before the rows below its diagonal
    # The last vector may be one that no product was taken with.
    coordinates = jnp.where(jnp.arange(dimension) < space.products, _coordinates(space.basis, gradient), 0.0)
    return space._replace(operator=upper + jnp.triu(upper, 1).T, gradient=coordinates)


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
        following, _, _ = _orthonormalized(plain, basis, product)
        basis = jax.tree.map(lambda q, v: q.at[index + 1].set(v, mode="drop"), basis, following)
        return basis, (jnp.asarray(optax.tree.vdot(vector, product)), jnp.asarray(optax.tree.vdot(following, product)))

    first = optax.tree.scale(1 / optax.tree.norm(start), start)
    basis = jax.tree.map(lambda v: jnp.zeros((num_steps, *v.shape), v.dtype).at[0].set(v), first)
    basis, (diagonal, off_diagonal) = jax.lax.scan(step, basis, jnp.arange(num_steps))
    return Tridiagonal(basis, diagonal, off_diagonal[:-1])


def _orthonormalized(metric: Metric, basis: PyTree, dual: PyTree) -> tuple[PyTree, jax.Array, jax.Array]:
    """Makes M⁻¹ times a vector M-orthonormal to a basis.

    Returns it, its length before it was normalised (0 if it is not new to the basis, and the vector then is zero), and
    its squared norm at the very start.
    """
    vector = metric.inverse(dual)
    square = jnp.asarray(optax.tree.vdot(dual, vector))
    vector = optax.tree.sub(vector, combine(_coordinates(basis, dual), basis))
    # Once more: the first pass leaves rounding in proportion to what it removed.
    vector = optax.tree.sub(vector, combine(_coordinates(basis, metric.apply(vector)), basis))
    rest = jnp.asarray(optax.tree.vdot(vector, metric.apply(vector)))
    is_new = rest > (100 * jnp.finfo(rest.dtype).eps) ** 2 * square
    length = jnp.where(is_new, jnp.sqrt(jnp.where(is_new, rest, 1.0)), 0.0)
    vector = optax.tree.where(is_new, optax.tree.scale(_inverse(length), vector), optax.tree.zeros_like(vector))
    return vector, length, square


def _coordinates(basis: PyTree, dual: PyTree) -> jax.Array:
    """Returns the inner products of a vector with every row of a basis."""
    products = jax.tree.map(lambda q, v: jnp.tensordot(q, v, axes=v.ndim, precision="highest"), basis, dual)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def combine(coefficients: jax.Array, basis: PyTree) -> PyTree:
    """Returns the sum of a basis' rows, each times its coefficient."""
    return jax.tree.map(lambda q: jnp.tensordot(coefficients, q, axes=1, precision="highest"), basis)


def _step_in_space(
    space: _KrylovSpace, minimizer: Minimizer, stop: jax.Array, regularization: jax.Array | float
) -> ModelStep:
    """Returns to the parameters' space."""
    h = minimizer.point
    product = functools.partial(jnp.matmul, precision="highest")
    quadratic = product(h, space.gradient + 0.5 * product(space.operator, h))
    stop = jnp.where(space.least_square >= 0, stop, Stop.INDEFINITE_SHAPE)
    stop = jnp.where(jnp.isfinite(quadratic + space.least_square), stop, Stop.NOT_FINITE)
    return ModelStep(combine(h, space.basis), -quadratic - regularization, space.products, stop)

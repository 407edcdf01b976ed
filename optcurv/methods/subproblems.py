"""Solvers of the model's subproblem by Krylov methods: in a region, or with a cubic term."""

import enum
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, check_count, check_number
from optcurv.curvature import MatVec
from optcurv.krylov import Metric, combine, coordinates, inverse, orthonormalized
from optcurv.methods.quadratic_models import minimize_cubic, minimize_in_ball


class Stop(enum.IntEnum):
    """Why a solver stopped.

    Attributes:
      NOT_FINITE: the gradient or a product was not finite.
      INDEFINITE_NORM: some vector had a negative squared norm.
      INDEFINITE_LOSS: the Hessian of `loss_fn` by the model's outputs is not positive semi-definite.
      CONVERGED: inside the region, within the tolerance.
      BOUNDARY: the step ends on the region's boundary.
      NEGATIVE_CURVATURE: likewise, along a direction of negative (or no) curvature.
      MAX_ITER: inside the region, with no more products to take.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> state = optcurv.trust_region().init(jnp.zeros(2))
      >>> optcurv.Stop(int(state.info.stop)).name  # of no step yet
      'NOT_FINITE'
    """

    NOT_FINITE = 0
    INDEFINITE_NORM = 1
    INDEFINITE_LOSS = 2
    CONVERGED = 3
    BOUNDARY = 4
    NEGATIVE_CURVATURE = 5
    MAX_ITER = 6


class ModelStep(NamedTuple):
    r"""A step that reduces a quadratic model.

    Attributes:
      step: s, of the gradient's structure and dtype.
      predicted_decrease: :math:`m(0) - m(s)`.
      iterations: curvature products taken, or matrices factorised.
      stop: a `Stop`.
      size: the damping that the step was found with, where the solver had to raise it; None if it is as asked for.
      on_residuals: whether the equations solved were as many as the residuals, rather than the parameters.
    """

    step: PyTree
    predicted_decrease: jax.Array
    iterations: jax.Array
    stop: jax.Array
    size: jax.Array | None = None
    on_residuals: bool = False


Solver: TypeAlias = Callable[[MatVec, PyTree, Metric, jax.Array, jax.Array], ModelStep]
"""Maps the product with B, the gradient, the metric, the size (radius, cubic weight or damping) and a random key to a
step."""


def steihaug(max_iter: int = 50, tol: float = 0.1) -> Solver:
    r"""Conjugate gradients for the trust region model, stopped at the boundary and at negative curvature.

    Reduces :math:`m(s) = g^\top s + \tfrac12 s^\top B s` subject to :math:`\|s\|_M \le \Delta` (Steihaug 1983),
    preconditioned with M, so that the iterates are those of plain conjugate gradients in the coordinates
    :math:`M^{1/2} s` and their norms grow monotonically. Where the next iterate would leave the region, or the
    curvature along its direction is not positive, the step goes on to the boundary. It decreases the model at least as
    much as the Cauchy point, and does not find negative curvature that the gradient does not show: a zero gradient
    gives a zero step.

    Args:
      max_iter: the largest number of products, at least 1.
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
            to_boundary = room * inverse(s_p + jnp.sqrt(s_p**2 + p_p * room))  # 0 where squares underflow
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
            stop = jnp.where(rho_new >= 0, jnp.where(inside, converged, at_boundary), Stop.INDEFINITE_NORM)
            stop = jnp.where(jnp.isfinite(curvature) & jnp.isfinite(rho_new), stop, Stop.NOT_FINITE)
            return _ConjugateGradients(s, r, p, rho_new, s_s, s_p, p_p, decrease, iterations + 1, stop)

        zero = jnp.zeros_like(rho)
        stop = jnp.where(norm <= tolerance, Stop.CONVERGED, Stop.MAX_ITER)
        stop = jnp.where(rho >= 0, stop, Stop.INDEFINITE_NORM)
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


def gltr(max_iter: int = 10, tol: float = 0.1) -> Solver:
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
      max_iter: the largest number of products, and the dimension of the space, at least 1.
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
      >>> solve = optcurv.gltr(max_iter=2)
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
        decrease = -_quadratic_model(space, minimizer.point)
        return _step_in_space(space, minimizer.point, decrease, stop)

    return solve


def cubic_lanczos(max_iter: int = 10, tol: float = 0.1) -> Solver:
    r"""Minimises :math:`g^\top s + \tfrac12 s^\top B s + \tfrac{\sigma}{3} \|s\|_M^3` in the space of `gltr`.

    σ takes the place of the radius, and the predicted decrease is that of the cubic model. The step counts as
    one at the boundary where the cubic term is more than a tenth of that decrease.

    Args:
      max_iter: the largest number of products, and the dimension of the space, at least 1.
      tol: as in `gltr`.

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
        cubic_term = weight / 3 * jnp.linalg.norm(minimizer.point) ** 3
        decrease = -_quadratic_model(space, minimizer.point) - cubic_term
        inside = jnp.where(cubic_term > 0.1 * decrease, Stop.BOUNDARY, Stop.CONVERGED)
        stop = jnp.where(minimizer.lowest_eigenvalue < 0, Stop.NEGATIVE_CURVATURE, inside)
        return _step_in_space(space, minimizer.point, decrease, stop)

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
        vector, length, square = orthonormalized(metric, space.basis, dual)
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
        column = coordinates(space.basis, product)
        operator = space.operator.at[:, space.products].set(column)
        is_first, multiplier = space.products == 0, column[space.products - 1] * inverse(space.pivot)
        pivot = column[space.products] - jnp.where(is_first, 0.0, multiplier * column[space.products - 1])
        coefficient = jnp.where(is_first, 1.0, -multiplier) * space.coefficient
        space, length = append(space._replace(operator=operator, products=space.products + 1), product)
        definite = space.definite & (pivot > 0)
        residual = jnp.where(definite, length * jnp.abs(coefficient * inverse(pivot)), jnp.inf)
        space = space._replace(pivot=pivot, coefficient=coefficient, definite=definite, residual=residual)
        return if_exhausted_restart(space)

    basis = jax.tree.map(lambda leaf: jnp.zeros((dimension, *leaf.shape), leaf.dtype), gradient)
    zeros, false = coordinates(basis, gradient), jnp.zeros((), bool)
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
    projected = jnp.where(jnp.arange(dimension) < space.products, coordinates(space.basis, gradient), 0.0)
    return space._replace(operator=upper + jnp.triu(upper, 1).T, gradient=projected)


def _quadratic_model(space: _KrylovSpace, point: jax.Array) -> jax.Array:
    """The model's value at a point in the basis's coordinates."""
    product = functools.partial(jnp.matmul, precision="highest")
    return product(point, space.gradient + 0.5 * product(space.operator, point))


def _step_in_space(space: _KrylovSpace, point: jax.Array, decrease: jax.Array, stop: jax.Array) -> ModelStep:
    """Returns to the parameters' space."""
    stop = jnp.where(space.least_square >= 0, stop, Stop.INDEFINITE_NORM)
    stop = jnp.where(jnp.isfinite(decrease + space.least_square), stop, Stop.NOT_FINITE)
    return ModelStep(combine(point, space.basis), decrease, space.products, stop)

"""Krylov solvers of the damped model, and the model around a centre."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, check_count, check_number
from optcurv.curvature import MatVec
from optcurv.krylov import Metric, minres
from optcurv.methods.subproblems import ModelStep, Solver, Stop


def conjugate_gradients(max_iter: int = 100, tol: float = 1e-3) -> Solver:
    r"""Solves :math:`(B + \lambda M) s = -g` by conjugate gradients, preconditioned with M.

    Hestenes and Stiefel (1952). Every iterate minimises
    :math:`g^\top s + \tfrac12 s^\top B s + \tfrac12 \lambda \|s\|_M^2` over its Krylov space. The products are taken in
    a loop. Where one shows negative curvature the step is rejected, and the damping grows.

    Args:
      max_iter: the most products taken, at least 1.
      tol: stops where the residual's norm is below tol times the gradient's, both in the norm of :math:`M^{-1}`.

    Returns:
      The solver, for `optcurv.levenberg_marquardt`.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if `max_iter` is not a Python int.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> ball = optcurv.Metric(apply=lambda v: v, inverse=lambda v: v)
      >>> solve = optcurv.conjugate_gradients(tol=1e-6)
      >>> g = jnp.array([2.0, 4.0])
      >>> found = solve(lambda v: jnp.array([1.0, 3.0]) * v, g, ball, jnp.array(1.0), jax.random.key(0))
      >>> print(found.step.round(3), found.iterations, optcurv.Stop(int(found.stop)).name)
      [-1. -1.] 2 CONVERGED
    """
    check_count("max_iter", max_iter)
    check_number("tol", tol, minimum=0.0, constant=True)

    def solve(matvec: MatVec, gradient: PyTree, metric: Metric, damping: jax.Array, key: jax.Array) -> ModelStep:
        del key  # nothing here is random
        preconditioned = metric.inverse(gradient)
        rho = jnp.asarray(optax.tree.vdot(gradient, preconditioned))
        tolerance = tol * jnp.sqrt(rho)

        def advance(state: _ConjugateGradients) -> _ConjugateGradients:
            s, r, p, rho, iterations, _ = state
            product = optax.tree.add_scale(matvec(p), damping, metric.apply(p))
            curvature = jnp.asarray(optax.tree.vdot(p, product))
            length = rho / jnp.where(curvature > 0, curvature, jnp.inf)
            s, r = optax.tree.add_scale(s, length, p), optax.tree.add_scale(r, length, product)
            preconditioned = metric.inverse(r)
            rho_new = jnp.asarray(optax.tree.vdot(r, preconditioned))
            p = optax.tree.add_scale(optax.tree.scale(-1.0, preconditioned), rho_new / rho, p)
            stop = jnp.where(jnp.sqrt(rho_new) <= tolerance, Stop.CONVERGED, Stop.MAX_ITER)
            stop = jnp.where(curvature > 0, stop, Stop.NEGATIVE_CURVATURE)
            stop = jnp.where(rho_new >= 0, stop, Stop.INDEFINITE_NORM)
            stop = jnp.where(jnp.isfinite(curvature) & jnp.isfinite(rho_new), stop, Stop.NOT_FINITE)
            return _ConjugateGradients(s, r, p, rho_new, iterations + 1, stop)

        stop = jnp.where(rho > 0, Stop.MAX_ITER, jnp.where(rho == 0, Stop.CONVERGED, Stop.INDEFINITE_NORM))
        start = _ConjugateGradients(
            step=optax.tree.zeros_like(gradient),
            residual=gradient,
            direction=optax.tree.scale(-1.0, preconditioned),
            rho=rho,
            iterations=jnp.zeros((), jnp.int32),
            stop=jnp.where(jnp.isfinite(rho), stop, Stop.NOT_FINITE),
        )
        goes_on = lambda state: (state.stop == Stop.MAX_ITER) & (state.iterations < max_iter)  # noqa: E731
        end = jax.lax.while_loop(goes_on, advance, start)
        # The residual is orthogonal to the step, which tells the step's curvature.
        slope, square = optax.tree.vdot(gradient, end.step), optax.tree.vdot(end.step, metric.apply(end.step))
        decrease = 0.5 * (damping * square - slope)
        return _unless_uphill(ModelStep(end.step, decrease, end.iterations, end.stop))

    return solve


class _ConjugateGradients(NamedTuple):
    step: PyTree
    residual: PyTree
    direction: PyTree
    rho: jax.Array  # the residual's squared norm
    iterations: jax.Array
    stop: jax.Array


def minimum_residual(max_iter: int = 100, tol: float = 1e-3) -> Solver:
    r"""Solves :math:`(B + \lambda M) s = -g` by `optcurv.minres`, which minimises the residual's Euclidean norm.

    Args:
      max_iter: the most products taken, at least 1. One more tells what the step does to the model.
      tol: stops where the residual's norm is below tol times the gradient's.

    Returns:
      The solver, for `optcurv.levenberg_marquardt`.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if `max_iter` is not a Python int.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> ball = optcurv.Metric(apply=lambda v: v, inverse=lambda v: v)
      >>> solve = optcurv.minimum_residual(max_iter=2)
      >>> g = jnp.array([2.0, 4.0])
      >>> found = solve(lambda v: jnp.array([1.0, 3.0]) * v, g, ball, jnp.array(1.0), jax.random.key(0))
      >>> print(found.step.round(3))
      [-1. -1.]
    """
    check_count("max_iter", max_iter)
    check_number("tol", tol, minimum=0.0, constant=True)

    def solve(matvec: MatVec, gradient: PyTree, metric: Metric, damping: jax.Array, key: jax.Array) -> ModelStep:
        del key  # nothing here is random
        damped = lambda v: optax.tree.add_scale(matvec(v), damping, metric.apply(v))  # noqa: E731
        solution, info = minres(damped, gradient, max_iter, tol=tol)
        step = optax.tree.scale(-1.0, solution)
        decrease = -jnp.asarray(optax.tree.vdot(step, optax.tree.add_scale(gradient, 0.5, matvec(step))))
        converged = info.residual_norm <= tol * optax.tree.norm(gradient)
        stop = jnp.where(converged | (info.iterations < max_iter), Stop.CONVERGED, Stop.MAX_ITER)
        stop = jnp.where(info.negative_curvature, Stop.NEGATIVE_CURVATURE, stop)
        stop = jnp.where(jnp.isfinite(decrease), stop, Stop.NOT_FINITE)
        return _unless_uphill(ModelStep(step, decrease, info.iterations, stop))

    return solve


def _unless_uphill(found: ModelStep) -> ModelStep:
    """Where the damped matrix is not positive definite the model has no minimum, and the step promises nothing."""
    negative = found.stop == Stop.NEGATIVE_CURVATURE
    return found._replace(predicted_decrease=jnp.where(negative, -jnp.inf, found.predicted_decrease))


def around(centre: PyTree, solver: Solver) -> Solver:
    r"""A solver of the model damped by :math:`\|s - c\|_M` in place of :math:`\|s\|_M`, that starts from c.

    With s = c + d, the model is :math:`m(c) + (g + B c)^\top d + \tfrac12 d^\top B d`.
    """

    def solve(matvec: MatVec, gradient: PyTree, metric: Metric, damping: jax.Array, key: jax.Array) -> ModelStep:
        product = matvec(centre)
        found = solver(matvec, optax.tree.add(gradient, product), metric, damping, key)
        to_centre = -jnp.asarray(optax.tree.vdot(centre, optax.tree.add_scale(gradient, 0.5, product)))
        return found._replace(
            step=optax.tree.add(centre, found.step), predicted_decrease=to_centre + found.predicted_decrease
        )

    return solve

"""Krylov methods on pytrees. They know no loss: an operator is a function `v -> Av`."""

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
      num_steps: steps that changed the solution; fewer than asked for after a lucky breakdown.
    """

    residual_norm: jax.Array
    num_steps: jax.Array


def minres(matvec: MatVec, b: PyTree, num_steps: int, *, shift: chex.Numeric = 0.0) -> tuple[PyTree, MinresInfo]:
    r"""Minimises :math:`\|(A + \lambda I) x - b\|` over the Krylov space of order k, for symmetric A.

    The short recurrence of Paige and Saunders (1975) from zero; Algorithm 1 of the EDF paper with its misprint
    corrected: the shift adds :math:`\lambda v_1`, the *normalised* Lanczos vector, not :math:`\lambda g`. A may be
    indefinite or singular. Memory is O(1) vectors, accumulated in at least float32. Where the Krylov space is exhausted
    (a lucky breakdown) the iterate stays as it is; :math:`b = 0` gives 0.

    The steps are unrolled: convolutions inside a loop are many times slower on XLA's CPU backend. Compile time grows in
    proportion to `num_steps`.

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
    beta = optax.tree.norm(b)
    epsilon = 10 * jnp.finfo(beta.dtype).eps
    shift = jnp.asarray(shift, beta.dtype)
    residual = beta
    operator_norm = jnp.zeros_like(beta)  # running estimate, the yardstick of a breakdown
    cos_old, cos, sin_old, sin = jnp.ones_like(beta), jnp.ones_like(beta), jnp.zeros_like(beta), jnp.zeros_like(beta)
    x = v_old = q_old = q = optax.tree.zeros_like(b)
    u = b
    steps_used = jnp.zeros((), jnp.int32)

    for _ in range(num_steps):
        # Lanczos: beta = 0 makes v zero, and with it all that follows in this loop.
        v = optax.tree.scale(_inverse(beta), u)
        u = optax.tree.add_scale(matvec(v), shift, v)
        alpha = jnp.asarray(optax.tree.vdot(v, u))
        u = optax.tree.add_scale(optax.tree.add_scale(u, -alpha, v), -beta, v_old)
        beta_old, beta = beta, optax.tree.norm(u)
        operator_norm = jnp.maximum(operator_norm, jnp.hypot(alpha, beta))
        beta = jnp.where(beta <= epsilon * operator_norm, 0.0, beta)

        # The next column of the QR factorisation of the tridiagonal matrix.
        delta = cos * alpha - cos_old * sin * beta_old
        rho_2 = sin * alpha + cos_old * cos * beta_old
        rho_3 = sin_old * beta_old
        rho_1 = jnp.hypot(delta, beta)
        rho_1 = jnp.where(rho_1 <= epsilon * operator_norm, 0.0, rho_1)
        solvable = rho_1 > 0
        cos_old, cos = cos, delta * _inverse(rho_1)
        sin_old, sin = sin, jnp.where(solvable, beta * _inverse(rho_1), 1.0)

        # The solution follows along q; where rho_1 = 0 neither it nor the residual changes.
        direction = optax.tree.add_scale(optax.tree.add_scale(v, -rho_2, q), -rho_3, q_old)
        q_old, q = q, optax.tree.scale(_inverse(rho_1), direction)
        x = optax.tree.add_scale(x, cos * residual, q)
        residual = -sin * residual
        v_old = v
        steps_used = steps_used + solvable
        # Fused across steps, the unrolled recurrence would take XLA a time quadratic in their number.
        x, q, q_old, u, v_old, beta, residual = jax.lax.optimization_barrier((x, q, q_old, u, v_old, beta, residual))

    return x, MinresInfo(residual_norm=jnp.abs(residual), num_steps=steps_used)


def _inverse(x: jax.Array) -> jax.Array:
    """1/x, and 0 for x = 0; not a number stays so."""
    return jnp.where(x == 0, 0.0, 1 / jnp.where(x == 0, 1.0, x))

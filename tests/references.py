"""Dense references, written plainly from the papers and textbooks."""

import jax
import numpy as np
import scipy.linalg
from jax.flatten_util import ravel_pytree

import optcurv
from optcurv import Stop


def dense_curvature(curvature, loss, params):
    """The matrix of `curvature` from `jax.jacobian` and `jax.hessian` alone."""
    flat, unravel = ravel_pytree(params)
    if curvature is optcurv.hessian_product:
        return np.asarray(jax.jit(jax.hessian(lambda w: loss(unravel(w))))(flat))

    @jax.jit
    def gauss_newton(flat):
        outputs, unravel_outputs = ravel_pytree(loss.model_fn(unravel(flat)))
        jacobian = jax.jacobian(lambda w: ravel_pytree(loss.model_fn(unravel(w)))[0])(flat)
        return jacobian.T @ jax.hessian(lambda out: loss.loss_fn(unravel_outputs(out)))(outputs) @ jacobian

    return np.asarray(gauss_newton(flat))


def dense_steihaug(b, g, m, radius, max_iter=50, tol=0.1):
    """Plain Steihaug in the coordinates M^{1/2} s (Nocedal and Wright, Algorithm 7.2); returns s, stop, iterations."""
    root = np.linalg.inv(scipy.linalg.sqrtm(m))
    b, g = root @ b @ root, root @ g
    z, r, d = np.zeros(g.size), g, -g
    tolerance = np.linalg.norm(g) * min(tol, np.sqrt(np.linalg.norm(g)))

    def at_boundary():
        return root @ (z + np.roots([d @ d, 2 * z @ d, z @ z - radius**2]).max() * d)

    for iteration in range(1, max_iter + 1):
        if d @ b @ d <= 0:
            return at_boundary(), Stop.NEGATIVE_CURVATURE, iteration
        alpha = r @ r / (d @ b @ d)
        if np.linalg.norm(z + alpha * d) >= radius:
            return at_boundary(), Stop.BOUNDARY, iteration
        z, r_old, r = z + alpha * d, r, r + alpha * b @ d
        if np.linalg.norm(r) <= tolerance:
            return root @ z, Stop.CONVERGED, iteration
        d = -r + (r @ r) / (r_old @ r_old) * d
    return root @ z, Stop.MAX_ITER, max_iter

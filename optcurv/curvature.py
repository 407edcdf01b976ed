"""The loss closure, and products with its Hessian and Gauss-Newton matrix.

An operator is a function `v -> Av` on pytrees of the parameters' structure. Each factory linearises the network once
and shares that work among all products, with each other and with the gradient where one `jit` holds them all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optcurv.arguments import PyTree, ValueFn, scalar_fn
from optcurv.jaxpr import with_canonical_convolutions

MatVec: TypeAlias = Callable[[PyTree], PyTree]
"""A linear operator: maps a pytree like the parameters to another, and keeps its dtype."""

CurvatureFn: TypeAlias = Callable[[ValueFn, PyTree], MatVec]
"""Builds an operator from a loss closure and the point at which it is taken."""


@dataclasses.dataclass(frozen=True)
class Composite:
    r"""A loss in two parts, :math:`L(w) = \ell(\varphi(w))`: a model and a convex loss of its outputs.

    Calling it evaluates the loss, so that one object serves `jax.value_and_grad`, optax's line searches and every
    method of optcurv. Gauss-Newton methods need to see the two parts.

    A composite is a pytree of what its two functions carry: one made of `jax.tree_util.Partial` can be an argument of
    a jitted function; one made of plain functions can be closed over, like any function.

    Attributes:
      model_fn: maps params to the model's outputs, any pytree of real arrays; with `has_aux` to a pair
        `(outputs, aux)`, where `aux` is whatever else the forward pass changes (Flax's `batch_stats`).
      loss_fn: maps the outputs to a real scalar, convex in them, usually a mean over the batch.
      has_aux: whether `model_fn` returns such a pair. The composite then returns `(value, aux)`, the form that
        `jax.value_and_grad(..., has_aux=True)` expects.

    Raises:
      TypeError: if `model_fn` or `loss_fn` is not callable.

    Example:
      >>> import jax, jax.numpy as jnp, optcurv
      >>> x, y = jnp.array([[1.0, 2.0]]), jnp.array([3.0])
      >>> loss = optcurv.Composite(
      ...     model_fn=lambda w: x @ w,
      ...     loss_fn=lambda outputs: 0.5 * jnp.mean((outputs - y) ** 2),
      ... )
      >>> print(loss(jnp.zeros(2)), jax.grad(loss)(jnp.zeros(2)))
      4.5 [-3. -6.]
    """

    model_fn: Callable[[Any], Any]
    loss_fn: Callable[[Any], Any]
    _: dataclasses.KW_ONLY
    has_aux: bool = False

    def __post_init__(self) -> None:
        for name in ("model_fn", "loss_fn"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Composite.{name} must be a function, got {getattr(self, name)!r}.")

    def __call__(self, params: PyTree, *, curvature_fn: ValueFn | None = None, monitored_value: Any = None) -> Any:
        """Returns the loss at `params`, or `(loss, aux)` with `has_aux`.

        The other arguments are ignored. They are named here because optax's line searches hand every extra argument of
        `update` on to `value_fn` and reject those it does not name.
        """
        del curvature_fn, monitored_value
        if not self.has_aux:
            return self.loss_fn(self.model_fn(params))
        outputs, aux = self.model_fn(params)
        return self.loss_fn(outputs), aux


jax.tree_util.register_dataclass(Composite, data_fields=["model_fn", "loss_fn"], meta_fields=["has_aux"])


def hessian_product(value_fn: ValueFn, params: PyTree) -> MatVec:
    r"""Linearises the gradient of a loss once and returns :math:`v \mapsto \nabla^2 L(w)\, v`.

    Forward over reverse: a product costs two gradients. The Hessian may be indefinite.

    Args:
      value_fn: the loss as a function of params; returns a real scalar, or a pair whose first is one.
      params: the point :math:`w`, any pytree of real arrays.

    Returns:
      The product, a function of a pytree like `params` that keeps the dtype of its argument.

    Raises:
      TypeError: when traced, if `value_fn` does not return a real scalar.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> product = optcurv.hessian_product(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 2.0]))
      >>> print(product(jnp.array([1.0, 0.0])))
      [4. 2.]
    """
    _, product = jax.linearize(jax.grad(scalar_fn(value_fn)), params)
    return _keeping_dtype(with_canonical_convolutions(product, params), params)


def gauss_newton_product(composite: ValueFn, params: PyTree) -> MatVec:
    r"""Linearises a model once and returns :math:`v \mapsto G v`, :math:`G = J_\varphi^\top H_\ell J_\varphi`.

    :math:`J_\varphi` is the Jacobian of the model's outputs, :math:`H_\ell` the Hessian of the loss by them (Eq. 17 of
    the EDF paper). :math:`G` is positive semi-definite for a convex loss, and a product costs 4/3 of a gradient.

    Args:
      composite: the loss as an `optcurv.Composite`.
      params: the point :math:`w`, any pytree of real arrays.

    Returns:
      The product, a function of a pytree like `params` that keeps the dtype of its argument.

    Raises:
      TypeError: if the loss is not a `Composite`; when traced, if its `loss_fn` does not return a real scalar.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss = optcurv.Composite(lambda w: w**2, lambda outputs: 0.5 * jnp.sum(outputs**2))
      >>> product = optcurv.gauss_newton_product(loss, jnp.array([1.0, 3.0]))
      >>> print(product(jnp.array([1.0, 1.0])))
      [ 4. 36.]
    """
    if not isinstance(composite, Composite):
        raise TypeError(
            "gauss_newton_product needs the loss in two parts, as an optcurv.Composite; got "
            f"{type(composite).__name__}. Write it as\n"
            "    value_fn = optcurv.Composite(\n"
            "        model_fn=lambda p: net.apply({'params': p}, x),\n"
            "        loss_fn=lambda logits: optcurv.softmax_cross_entropy_with_integer_labels(logits, y).mean(),\n"
            "    )\n"
            "or choose curvature=optcurv.hessian_product, which takes any closure."
        )
    if composite.has_aux:
        outputs, jacobian_product, _ = jax.linearize(composite.model_fn, params, has_aux=True)
    else:
        outputs, jacobian_product = jax.linearize(composite.model_fn, params)
    transposed_product = jax.linear_transpose(jacobian_product, params)
    loss_hessian_product = hessian_product(composite.loss_fn, outputs)

    def product(vector: PyTree) -> PyTree:
        (result,) = transposed_product(loss_hessian_product(jacobian_product(vector)))
        return result

    return _keeping_dtype(with_canonical_convolutions(product, params), params)


def _keeping_dtype(product: MatVec, params: PyTree) -> MatVec:
    """Lets a product of the parameters' dtype take and return vectors of another, usually a wider one."""

    def cast_product(vector: PyTree) -> PyTree:
        tangent = jax.tree.map(lambda v, p: jnp.asarray(v, jnp.result_type(p)), vector, params)
        return optax.tree.cast_like(product(tangent), vector)

    return cast_product

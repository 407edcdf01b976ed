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

from optcurv.arguments import PyTree, ValueFn, check_function, describe, scalar_fn
from optcurv.convolutions import with_canonical_convolutions
from optcurv.examples import PerExample

MatVec: TypeAlias = Callable[[PyTree], PyTree]
"""A linear operator: maps a pytree like the parameters to another, and keeps its dtype."""

ProductFn: TypeAlias = Callable[[ValueFn, PyTree], MatVec]
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
      TypeError: if `model_fn` or `loss_fn` is no function of one argument; when called, if `has_aux` does not say what
        `model_fn` returns.

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
        check_function("Composite.model_fn", self.model_fn, "params", "with the inputs in its closure")
        check_function("Composite.loss_fn", self.loss_fn, "outputs", "with the labels in its closure")

    def __call__(self, params: PyTree, curvature_value_fn: ValueFn | None = None, monitored_value: Any = None) -> Any:
        """Returns the loss at `params`, or `(loss, aux)` with `has_aux`.

        The other arguments are ignored. They are named here because optax's line searches hand every extra argument of
        `update` on to `value_fn` and reject those it does not name; and not by keyword only, because
        `nnx.value_and_grad` differentiates no function with such arguments.
        """
        if curvature_value_fn is not None:  # as in loss(params, batch)
            check_function(
                "curvature_value_fn", curvature_value_fn, "params", "and the loss has the batch in its closure"
            )
        del monitored_value
        outputs, aux = self.outputs_and_aux(params)
        value = self.loss_of_outputs(outputs)
        return (value, aux) if self.has_aux else value

    def outputs_and_aux(self, params: PyTree) -> tuple[PyTree, Any]:
        """Returns the model's outputs, and its auxiliary output or None."""
        result = self.model_fn(params)
        if not self.has_aux:
            return result, None
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                "With has_aux=True, Composite.model_fn must return a pair (outputs, aux), got "
                f"{describe(result)}. If it returns the outputs alone, leave has_aux out."
            )
        return result

    def loss_of_outputs(self, outputs: PyTree) -> Any:
        """Returns the loss; where it fails on a pair, says that this may be for want of `has_aux`."""
        try:
            return self.loss_fn(outputs)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            if self.has_aux or not (type(outputs) is tuple and len(outputs) == 2):
                raise
            raise TypeError(
                "Composite.loss_fn failed on the pair that model_fn returned, see above. If the second of the two is "
                "auxiliary output, such as Flax's batch_stats, say Composite(..., has_aux=True)."
            ) from error

    def of(self, params_from: Callable[[Any], PyTree]) -> "Composite":
        """Returns the loss as a function of what `params_from` makes the parameters of."""
        if isinstance(self.model_fn, PerExample):
            return dataclasses.replace(self, model_fn=self.model_fn.of(params_from))
        return dataclasses.replace(self, model_fn=lambda given: self.model_fn(params_from(given)))

    def mean_over_parts(self, fn: Callable[["Composite"], PyTree]) -> PyTree:
        """Returns the mean of a function over the losses whose mean this is: over itself, but for `accumulate`."""
        return fn(self)

    def stack_over_parts(self, fn: Callable[["Composite"], PyTree]) -> PyTree:
        """Returns the values of a function for the losses whose mean this is, along a new first axis."""
        return jax.tree.map(lambda leaf: leaf[None], fn(self))


jax.tree_util.register_dataclass(Composite, data_fields=["model_fn", "loss_fn"], meta_fields=["has_aux"])


def nnx_value_fn(loss_of_model: ValueFn, model: Any, wrt: Any = None) -> ValueFn:
    """Makes the `value_fn` of a Flax nnx model from a loss of the model itself, as `nnx.value_and_grad` takes it.

    The result is a function of `nnx.state(model, wrt)`, which `nnx.Optimizer` hands to an optimiser as params. Each
    evaluation uses a copy of the model as it is now: all draw the same dropout masks, and what they change, such as
    BatchNorm's statistics, is discarded with the copy. Make it inside the jitted step, before your own forward pass,
    which moves the model's random keys on.

    Args:
      loss_of_model: maps the model to a scalar, or to a pair (scalar, aux). A `Composite` whose `model_fn` maps the
        model to its outputs stays one.
      model: the `nnx.Module`.
      wrt: the filter that tells parameters from the rest, the same as the optimiser's; default `nnx.Param`.

    Returns:
      The loss as a function of the parameters.

    Raises:
      TypeError: if `loss_of_model` is no function of one argument.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optcurv.edf(1.0, 3, damping_scale=0.0), wrt=nnx.Param)
      >>> x, y = jnp.array([[1.0, 2.0], [3.0, 5.0], [4.0, 4.0]]), jnp.array([[1.0], [2.0], [3.0]])
      >>> loss = optcurv.Composite(lambda model: model(x), lambda outputs: jnp.mean((outputs - y) ** 2))
      >>> value_fn = optcurv.nnx_value_fn(loss, model)
      >>> value, grads = nnx.value_and_grad(loss)(model)
      >>> updates = optimizer.update(model, grads, value=value, value_fn=value_fn)
      >>> print(loss(model).round(4))
      0.0
    """
    from flax import nnx  # not needed by anything else in this package

    check_function("loss_of_model", loss_of_model, "model", "with the batch in its closure")
    graph, _, rest = nnx.split(nnx.clone(model), nnx.Param if wrt is None else wrt, ...)

    def merged(params: PyTree) -> Any:
        return nnx.merge(graph, params, rest, copy=True)

    if isinstance(loss_of_model, Composite):
        return loss_of_model.of(merged)
    return lambda params: loss_of_model(merged(params))


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


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, so that the product itself can be jitted
class GaussNewtonProduct:
    r"""The product :math:`v \mapsto J_\varphi^\top H_\ell J_\varphi\, v`, and its three factors.

    Attributes:
      composite: the loss.
      params: the point w.
      outputs: the model's outputs there.
      jacobian: :math:`v \mapsto J_\varphi v`, from vectors like the parameters to vectors like the outputs.
      transposed: :math:`u \mapsto J_\varphi^\top u`, the other way.
      loss_hessian: :math:`u \mapsto H_\ell u`, on vectors like the outputs.
      whole: all three, on vectors of any dtype; what calling the object does.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> loss = optcurv.Composite(lambda w: w**2, lambda outputs: 0.5 * jnp.sum(outputs**2))
      >>> product = optcurv.gauss_newton_product(loss, jnp.array([1.0, 3.0]))
      >>> print(product.jacobian(jnp.array([1.0, 1.0])))
      [2. 6.]
    """

    composite: Composite
    params: PyTree
    outputs: PyTree
    jacobian: MatVec
    transposed: MatVec
    loss_hessian: MatVec
    whole: MatVec

    def __call__(self, vector: PyTree) -> PyTree:
        """Returns the product with a vector like the parameters, in the vector's dtype."""
        return self.whole(vector)


def gauss_newton_product(composite: ValueFn, params: PyTree) -> GaussNewtonProduct:
    r"""Linearises a model once and returns :math:`v \mapsto G v`, :math:`G = J_\varphi^\top H_\ell J_\varphi`.

    :math:`J_\varphi` is the Jacobian of the model's outputs, :math:`H_\ell` the Hessian of the loss by them (Eq. 17 of
    the EDF paper). :math:`G` is positive semi-definite for a convex loss, and a product costs 4/3 of a gradient.

    Args:
      composite: the loss as an `optcurv.Composite`.
      params: the point :math:`w`, any pytree of real arrays.

    Returns:
      The product, a function of a pytree like `params` that keeps the dtype of its argument; an
      `optcurv.GaussNewtonProduct`, which has the factors too.

    Raises:
      TypeError: if the loss is not a `Composite`; when traced, if its `loss_fn` does not return a real scalar, or if
        its model has a `jax.custom_vjp`.

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
    outputs, jacobian_product, _ = jax.linearize(composite.outputs_and_aux, params, has_aux=True)
    transposed_product = jax.linear_transpose(jacobian_product, params)
    loss_hessian_product = hessian_product(composite.loss_of_outputs, outputs)

    def product(vector: PyTree) -> PyTree:
        (result,) = transposed_product(loss_hessian_product(jacobian_product(vector)))
        return result

    whole = _keeping_dtype(with_canonical_convolutions(product, params), params)
    return GaussNewtonProduct(
        composite,
        params,
        outputs,
        jacobian=jacobian_product,
        transposed=lambda cotangent: transposed_product(cotangent)[0],
        loss_hessian=loss_hessian_product,
        whole=whole,
    )


def _keeping_dtype(product: MatVec, params: PyTree) -> MatVec:
    """Lets a product of the parameters' dtype take and return vectors of another, usually a wider one."""

    def cast_product(vector: PyTree) -> PyTree:
        tangent = jax.tree.map(lambda v, p: jnp.asarray(v, jnp.result_type(p)), vector, params)
        return optax.tree.cast_like(product(tangent), vector)

    return cast_product

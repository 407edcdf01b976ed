"""Losses that keep their relative precision where the network fits."""

import jax
import jax.numpy as jnp


def softmax_cross_entropy_with_integer_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    r"""Softmax cross-entropy, precise however small it is.

    .. math:: -\log p_y = \log\Bigl(1 + \sum_{j \ne y} e^{z_j - z_y}\Bigr)
        = \operatorname{softplus}\Bigl(\log \sum_{j \ne y} e^{z_j} - z_y\Bigr)

    optax's function of this name takes the difference of :math:`\log \sum_j e^{z_j}` and :math:`z_y`: in float32 it
    rounds to multiples of about 1e-7, and an example fitted better than that has loss 0. A line search or a trust
    region compares losses, and late in training it would compare rounding. Here value, gradient and second derivatives
    are as precise, relative to themselves, as the logits are.

    Args:
      logits: z, of shape (..., classes); -inf excludes a class.
      labels: y, integers from 0 to classes - 1, of shape (...).

    Returns:
      The loss of each example, of shape (...), in at least float32 (optax keeps bfloat16, too coarse to compare losses
      in). It is infinite where a label is out of range.

    Raises:
      TypeError: if the logits are not real floating-point numbers, or the labels are not integers.
      ValueError: if the shape of `labels` is not that of `logits` without its last axis.

    Example:
      >>> import jax.numpy as jnp, optax, optcurv
      >>> logits, labels = jnp.array([[20.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0])
      >>> print(optcurv.softmax_cross_entropy_with_integer_labels(logits, labels))
      [2.0611537e-09 6.9314718e-01]
      >>> print(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
      [0.        0.6931472]
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not jnp.issubdtype(logits.dtype, jnp.floating) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"logits must be floating-point and labels integers, got {logits.dtype} and {labels.dtype}.")
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of logits without the last axis, got {labels.shape} and {logits.shape}."
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    is_label = labels[..., None] == jnp.arange(logits.shape[-1])
    label_logits = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
    others = jnp.where(is_label, jnp.finfo(logits.dtype).min, logits)  # not -inf: there may be no other class
    losses = jax.nn.softplus(jax.nn.logsumexp(others, axis=-1) - label_logits)
    return jnp.where(jnp.any(is_label, axis=-1), losses, jnp.inf)

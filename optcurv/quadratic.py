"""Local quadratic models of the loss."""

from jax import Array


def parabola_curvature(
    value: Array | float, slope: Array | float, step: Array | float, value_at_step: Array | float
) -> Array | float:
    r"""Second derivative of the parabola through two values and a slope.

    With :math:`l(0)`, :math:`l'(0)` and :math:`l(\mu)` given (Eq. 4 of the PAL paper):

    .. math:: l'' = \frac{(l(\mu) - l(0)) / \mu - l'(0)}{\mu / 2}

    Args:
      value: :math:`l(0)`.
      slope: :math:`l'(0)`.
      step: :math:`\mu`, not zero.
      value_at_step: :math:`l(\mu)`.

    Returns:
      The curvature :math:`l''`, a scalar.

    Example:
      >>> from optcurv.quadratic import parabola_curvature
      >>> parabola_curvature(value=5.0, slope=-2.0, step=2.0, value_at_step=7.0)  # l(s) = 5 - 2 s + 1.5 s²
      3.0
    """
    return ((value_at_step - value) / step - slope) / (step / 2)

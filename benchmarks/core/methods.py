"""The methods compared, one row each."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import optcurv
from optcurv.curvature import ProductFn

Setting = Mapping[str, Any]
"""The tuned numbers by name; within a compiled step they are traced."""


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A method, the numbers that are tuned, and what a step costs.

    Attributes:
      name: as in tables and pictures.
      optimizer: maps the tuned numbers, in the order of the grid, to the optimiser.
      grid: the values tried of each number, ascending.
      gradients: the price of a step in gradient-equivalents, a forward and a backward pass being one.
      product: the price of each product beyond that, where their number varies and the step's diagnostics report it.
    """

    name: str
    optimizer: Callable[..., optax.GradientTransformation]
    grid: Mapping[str, tuple[float, ...]]
    gradients: float = 1.0
    product: float = 0.0

    def make(self, setting: Setting) -> optax.GradientTransformationExtraArgs:
        """Returns the optimiser with a setting."""
        return optax.with_extra_args_support(self.optimizer(*setting.values()))

    @property
    def first_setting(self) -> dict[str, float]:
        """Returns the first of each number's values, where any will do."""
        return {name: values[0] for name, values in self.grid.items()}

    def at(self, **changes: Any) -> "Method":
        """Returns the method with other attributes."""
        return dataclasses.replace(self, **changes)

    def num_steps(self, budget: float) -> int:
        """Returns how many steps a budget of gradient-equivalents buys, at least one."""
        return max(1, math.floor(budget / self.gradients + 1e-6))

    @property
    def description(self) -> dict[str, Any]:
        """What distinguishes the method from others, beside the source; measurements are cached under it."""
        return {"method": self.name, "gradients": self.gradients, "product": self.product}


def _pal(measuring_step: float | jax.Array) -> optax.GradientTransformation:
    """PAL with its published ratio of longest to measuring step."""
    return optcurv.pal(measuring_step, max_step=10 * measuring_step)


def _full_batch_edf(max_iter: int, damping_scale: float = 1.0) -> Method:
    """EDF-G as recommended for full batches, damped and accelerated by W2; as published it is undamped."""
    optimizer = functools.partial(optcurv.edf, max_iter=max_iter, damping_scale=damping_scale, acceleration="nesterov")
    name = f"EDF-G k={max_iter}, W2" + (", undamped" if damping_scale == 0 else "")
    return Method(name, optimizer, {"learning rate": _FULL_BATCH_GRID}, 1 + 4 * max_iter / 3)


def edf(max_iter: int, curvature: ProductFn, grid: tuple[float, ...]) -> Method:
    """EDF damped as published for mini-batches, without acceleration.

    On these networks W1 momentum lost more single-seed trials than it won; on a ResNet with BatchNorm it won at all
    three rates tried.
    """
    letter, price = ("G", 4 / 3) if curvature is optcurv.gauss_newton_product else ("H", 2)
    optimizer = functools.partial(optcurv.edf, max_iter=max_iter, curvature=curvature)
    return Method(f"EDF-{letter} k={max_iter}", optimizer, {"learning rate": grid}, 1 + price * max_iter)


GRADIENT_DESCENT = Method("gradient step", optax.sgd, {"learning rate": (0.01,)})
"""The yardstick of costs."""

# As many values for each method, placed so that the best lies inside: EDF's published 0.1 to 2 was too low.
_SGD_GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_ADAM_GRID = (0.00015, 0.0005, 0.0015, 0.005, 0.015, 0.05)
_PAL_GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_EDF_GRID = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_FULL_BATCH_GRID = (0.1, 0.2, 0.4, 0.7, 1.0, 1.4)  # published: 1

_FIRST_ORDER = (
    Method("SGD-momentum", functools.partial(optax.sgd, momentum=0.9), {"learning rate": _SGD_GRID}),
    Method("Adam", optax.adam, {"learning rate": _ADAM_GRID}),
    Method("PAL", _pal, {"measuring step": _PAL_GRID}, 4 / 3),
)

METHODS = (
    *_FIRST_ORDER,
    edf(1, optcurv.gauss_newton_product, _EDF_GRID),
    edf(2, optcurv.gauss_newton_product, _EDF_GRID),
    edf(1, optcurv.hessian_product, _EDF_GRID),
    edf(2, optcurv.hessian_product, _EDF_GRID),
)
"""For mini-batches."""

FULL_BATCH_METHODS = (
    *_FIRST_ORDER,
    *(_full_batch_edf(max_iter) for max_iter in (1, 3, 8)),
    _full_batch_edf(8, damping_scale=0.0),
)
"""For batches that are the whole training set."""

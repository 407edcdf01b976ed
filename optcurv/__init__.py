"""Curvature-aware optimisers as optax transformations."""

from optcurv.curvature import Composite, gauss_newton_product, hessian_product
from optcurv.diagnostics import diagnostics
from optcurv.edf import edf, scale_by_edf, scale_by_nesterov_flow
from optcurv.krylov import minres
from optcurv.masking import masked
from optcurv.pal import pal, scale_by_parabolic_linesearch

__version__ = "0.1.0"

__all__ = [
    "Composite",
    "diagnostics",
    "edf",
    "gauss_newton_product",
    "hessian_product",
    "masked",
    "minres",
    "pal",
    "scale_by_edf",
    "scale_by_nesterov_flow",
    "scale_by_parabolic_linesearch",
]

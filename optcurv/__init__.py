"""Curvature-aware optimisers as optax transformations."""

from optcurv.curvature import Composite, gauss_newton_product, hessian_product
from optcurv.diagnostics import diagnostics
from optcurv.edf import edf, scale_by_edf, scale_by_nesterov_flow
from optcurv.krylov import Metric, Stop, lanczos, minres, steihaug
from optcurv.masking import masked
from optcurv.pal import pal, scale_by_parabolic_linesearch
from optcurv.shapes import Shape, adagrad_shape, full_matrix_shape, rmsprop_shape, uniform_shape
from optcurv.surface import diagonal_mass, least_squares_diagonal_mass, wigner_diagonal_mass
from optcurv.trust_region import adaptive_cubic, trust_region

__version__ = "0.1.0"

__all__ = [
    "Composite",
    "Metric",
    "Shape",
    "Stop",
    "adagrad_shape",
    "adaptive_cubic",
    "diagnostics",
    "diagonal_mass",
    "edf",
    "full_matrix_shape",
    "gauss_newton_product",
    "hessian_product",
    "lanczos",
    "least_squares_diagonal_mass",
    "masked",
    "minres",
    "pal",
    "rmsprop_shape",
    "scale_by_edf",
    "scale_by_nesterov_flow",
    "scale_by_parabolic_linesearch",
    "steihaug",
    "trust_region",
    "uniform_shape",
    "wigner_diagonal_mass",
]

"""Curvature-aware optimisers as optax transformations."""

from optcurv.accumulation import accumulate
from optcurv.comparisons import barrier_height, basin_width, functional_distance, label_disagreement
from optcurv.curvature import Composite, gauss_newton_product, hessian_product, nnx_value_fn
from optcurv.devices import state_shardings
from optcurv.diagnostics import diagnostics
from optcurv.edf import edf, scale_by_edf, scale_by_nesterov_flow
from optcurv.hessian_mass import diagonal_mass, least_squares_diagonal_mass, wigner_diagonal_mass
from optcurv.kronecker import BLOCK, DIAGONAL, KRONECKER, Structure
from optcurv.krylov import Metric, Stop, lanczos, minres, steihaug
from optcurv.labels import sample_categorical, sample_gaussian
from optcurv.losses import softmax_cross_entropy_with_integer_labels
from optcurv.masking import masked
from optcurv.pal import pal, scale_by_parabolic_linesearch
from optcurv.runge_kutta import EULER, HEUN, MIDPOINT, RALSTON, RK4, Tableau, adam_rk2, runge_kutta, sgd_rk2
from optcurv.shapes import Shape, adagrad_shape, full_matrix_shape, rmsprop_shape, uniform_shape
from optcurv.spectra import (
    hutchinson_diagonal,
    hutchinson_trace,
    leading_eigenpairs,
    spectral_density,
)
from optcurv.surface import (
    absolute_line,
    barycentric,
    bilinear,
    line,
    plane,
    plane_coordinates,
    random_direction,
    settled_statistics,
)
from optcurv.switching import SwitchRule, on_plateau, switch
from optcurv.taps import layers
from optcurv.trust_region import adaptive_cubic, trust_region
from optcurv.tso_alra import scale_by_kronecker, tso_alra

__version__ = "0.1.0"

__all__ = [
    "BLOCK",
    "DIAGONAL",
    "EULER",
    "HEUN",
    "KRONECKER",
    "MIDPOINT",
    "RALSTON",
    "RK4",
    "Composite",
    "Metric",
    "Shape",
    "Stop",
    "Structure",
    "SwitchRule",
    "Tableau",
    "absolute_line",
    "accumulate",
    "adagrad_shape",
    "adam_rk2",
    "adaptive_cubic",
    "barrier_height",
    "barycentric",
    "basin_width",
    "bilinear",
    "diagnostics",
    "diagonal_mass",
    "edf",
    "full_matrix_shape",
    "functional_distance",
    "gauss_newton_product",
    "hessian_product",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "label_disagreement",
    "lanczos",
    "layers",
    "leading_eigenpairs",
    "least_squares_diagonal_mass",
    "line",
    "masked",
    "minres",
    "nnx_value_fn",
    "on_plateau",
    "pal",
    "plane",
    "plane_coordinates",
    "random_direction",
    "rmsprop_shape",
    "runge_kutta",
    "sample_categorical",
    "sample_gaussian",
    "scale_by_edf",
    "scale_by_kronecker",
    "scale_by_nesterov_flow",
    "scale_by_parabolic_linesearch",
    "settled_statistics",
    "sgd_rk2",
    "softmax_cross_entropy_with_integer_labels",
    "spectral_density",
    "state_shardings",
    "steihaug",
    "switch",
    "trust_region",
    "tso_alra",
    "uniform_shape",
    "wigner_diagonal_mass",
]

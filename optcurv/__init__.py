"""Curvature-aware optimisers as optax transformations."""

from optcurv.accumulation import accumulate
from optcurv.arguments import PyTree, ValueFn
from optcurv.curvature import (
    Composite,
    GaussNewtonProduct,
    MatVec,
    ProductFn,
    gauss_newton_product,
    hessian_product,
    nnx_value_fn,
)
from optcurv.diagnostics import diagnostics
from optcurv.examples import PerExample, per_example
from optcurv.kronecker.factors import BLOCK, DIAGONAL, KRONECKER, Structure
from optcurv.kronecker.layers import Layers
from optcurv.kronecker.preconditioner import scale_by_kronecker
from optcurv.kronecker.recording import layers
from optcurv.kronecker.samplers import OutputGradientSampler, sample_categorical_gradients, sample_gaussian_gradients
from optcurv.krylov import Metric, MinresInfo, minres
from optcurv.landscape.batch_stats import recomputed_batch_stats
from optcurv.landscape.comparisons import barrier_height, basin_width, functional_distance, label_disagreement
from optcurv.landscape.diagonal_mass import (
    DiagonalMass,
    diagonal_mass,
    least_squares_diagonal_mass,
    wigner_diagonal_mass,
)
from optcurv.landscape.directions import plane_coordinates, random_direction
from optcurv.landscape.plots import plot_line, plot_plane, plot_spectrum, plot_surface
from optcurv.landscape.slices import SliceFn, absolute_line, barycentric, bilinear, line, plane
from optcurv.landscape.spectra import (
    Eigenpairs,
    Estimate,
    SpectralDensity,
    hutchinson_diagonal,
    hutchinson_trace,
    leading_eigenpairs,
    spectral_density,
)
from optcurv.losses import softmax_cross_entropy_with_integer_labels
from optcurv.masking import masked
from optcurv.methods.adaptive_cubic import adaptive_cubic
from optcurv.methods.damped import conjugate_gradients, minimum_residual
from optcurv.methods.dense import dense
from optcurv.methods.edf import edf, scale_by_edf, scale_by_nesterov_flow
from optcurv.methods.levenberg_marquardt import levenberg_marquardt
from optcurv.methods.norms import Norm, adagrad_norm, full_matrix_norm, rmsprop_norm, uniform_norm
from optcurv.methods.pal import pal, scale_by_parabolic_linesearch
from optcurv.methods.runge_kutta import EULER, HEUN, MIDPOINT, RALSTON, RK4, Tableau, adam_rk2, runge_kutta, sgd_rk2
from optcurv.methods.subproblems import ModelStep, Solver, Stop, gltr, steihaug
from optcurv.methods.switching import SwitchRule, on_plateau, switch
from optcurv.methods.trust_region import trust_region
from optcurv.methods.tso_alra import tso_alra
from optcurv.sharding import state_shardings

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
    "DiagonalMass",
    "Eigenpairs",
    "Estimate",
    "GaussNewtonProduct",
    "Layers",
    "MatVec",
    "Metric",
    "MinresInfo",
    "ModelStep",
    "Norm",
    "OutputGradientSampler",
    "PerExample",
    "ProductFn",
    "PyTree",
    "SliceFn",
    "Solver",
    "SpectralDensity",
    "Stop",
    "Structure",
    "SwitchRule",
    "Tableau",
    "ValueFn",
    "absolute_line",
    "accumulate",
    "adagrad_norm",
    "adam_rk2",
    "adaptive_cubic",
    "barrier_height",
    "barycentric",
    "basin_width",
    "bilinear",
    "conjugate_gradients",
    "dense",
    "diagnostics",
    "diagonal_mass",
    "edf",
    "full_matrix_norm",
    "functional_distance",
    "gauss_newton_product",
    "gltr",
    "hessian_product",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "label_disagreement",
    "layers",
    "leading_eigenpairs",
    "least_squares_diagonal_mass",
    "levenberg_marquardt",
    "line",
    "masked",
    "minimum_residual",
    "minres",
    "nnx_value_fn",
    "on_plateau",
    "pal",
    "per_example",
    "plane",
    "plane_coordinates",
    "plot_line",
    "plot_plane",
    "plot_spectrum",
    "plot_surface",
    "random_direction",
    "recomputed_batch_stats",
    "rmsprop_norm",
    "runge_kutta",
    "sample_categorical_gradients",
    "sample_gaussian_gradients",
    "scale_by_edf",
    "scale_by_kronecker",
    "scale_by_nesterov_flow",
    "scale_by_parabolic_linesearch",
    "sgd_rk2",
    "softmax_cross_entropy_with_integer_labels",
    "spectral_density",
    "state_shardings",
    "steihaug",
    "switch",
    "trust_region",
    "tso_alra",
    "uniform_norm",
    "wigner_diagonal_mass",
]

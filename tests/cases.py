"""The methods, one row each. The laws of `test_contract.py` hold for every row; exceptions are columns.

Those of `laws/` hold for the rows of `PARTS` too: public constructors that the methods are made of, or short for one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
import pytest

import optcurv


@dataclasses.dataclass(frozen=True)
class Fuzz:
    """What `laws/test_fuzz.py` does with a row.

    Attributes:
      ranges: of the numeric options that are drawn, on a logarithmic scale. The others are the row's.
      spikes_in_a_row: whether it bears a spike that it cannot tell from a new scale: the first batch of all, or one
        just after another. Plain gradient descent follows it as far as it says.
    """

    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    spikes_in_a_row: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A method and what the laws must know of it.

    Attributes:
      name: the test's id.
      factory: the constructor.
      options: its arguments, chosen for the small problems of the tests.
      static: those that `optax.inject_hyperparams` must not trace.
      needs_composite: whether a plain closure is refused.
      curvature: whether `curvature_value_fn` changes the step.
      variant: whether it is another choice of options for a method that has a row already; `-m "not variant"` leaves
        such rows out.
      moves_without_gradient: whether it may move where the gradient it is given is zero: along negative curvature, or
        along gradients elsewhere.
      gathers: whether it is dense by nature, and gathers a matrix where the parameters are sharded.
      optax_first: whether a transformation of optax's sees a call before ours does, and answers wrong ones.
      rosenbrock: other arguments for Rosenbrock's function, whose curvature is up to a thousand.
      state_by_path: whether its state holds dictionaries by path, which `optax.tree.map_params` cannot follow.
      public: the public constructors that it stands for; default: the factory.
      fuzz: how it is fuzzed, unless `laws/test_fuzz.py` has programs of its own for the method.
    """

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    static: tuple[str, ...] = ()
    needs_composite: bool = False
    curvature: bool = False
    moves_without_gradient: bool = False
    rosenbrock: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    state_by_path: bool = False
    public: tuple[Callable, ...] = ()
    variant: bool = False
    optax_first: bool = False
    gathers: bool = False
    fuzz: Fuzz = Fuzz()

    def make(self, **others: Any) -> optax.GradientTransformationExtraArgs:
        return self.factory(**self.options | others)


def edf_case(name: str, max_iter: int, *, needs_composite: bool = True, variant: bool = False, **options: Any) -> Case:
    return Case(
        name=name,
        factory=optcurv.edf,
        options={"learning_rate": 0.5, "max_iter": max_iter, **options},
        static=("max_iter", "curvature", "acceleration"),
        needs_composite=needs_composite,
        curvature=True,
        variant=variant,
    )


def trust_region_case(name: str, *, needs_composite: bool = False, variant: bool = True, **options: Any) -> Case:
    return Case(
        name=name,
        factory=optcurv.trust_region,
        options={"initial_radius": 0.3, **options},
        static=("norm", "solver", "curvature", "seed"),
        needs_composite=needs_composite,
        curvature=True,
        variant=variant,
    )


def levenberg_marquardt_case(name: str, *, variant: bool = True, **options: Any) -> Case:
    return Case(
        name=name,
        factory=optcurv.levenberg_marquardt,
        options=options,
        static=("norm", "solver", "curvature", "length_trials", "seed"),
        needs_composite=True,
        curvature=True,
        variant=variant,
        gathers="solver" not in options,  # `optcurv.dense`
    )


def tso_alra_case(name: str, structure: optcurv.Structure, *, variant: bool = True) -> Case:
    preconditioner = optcurv.scale_by_kronecker(structure=structure, factor_every=2, root_every=5)
    return Case(
        name=name,
        factory=optcurv.tso_alra,
        options={"learning_rate": 0.2, "when": 1000, "preconditioner": preconditioner},
        static=("when", "preconditioner"),
        curvature=structure is not optcurv.DIAGONAL,
        rosenbrock={"learning_rate": 1e-3, "max_update_norm": None},
        state_by_path=True,
        variant=variant,
    )


def adam_with_linesearch(measuring_step: float = 0.1, max_step: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Adam's averages would keep a gradient that is not finite, so it is guarded as optax recommends."""
    search = optcurv.scale_by_parabolic_linesearch(measuring_step, max_step=max_step)
    return optax.chain(optax.apply_if_finite(optax.adam(1.0), 2**31 - 1), search)


CASES = [
    edf_case("edf-g-2-nesterov", 2, learning_rate=0.2, acceleration="nesterov"),
    # Damped more: as published EDF-H is drawn to saddle points, here to the network that ignores its input.
    edf_case(
        "edf-h-1-momentum",
        1,
        curvature=optcurv.hessian_product,
        acceleration="momentum",
        damping_scale=2.0,
        needs_composite=False,
        variant=True,
    ),
    Case("pal", optcurv.pal, static=("exact_slope", "measure_slope")),
    Case("pal-slopes", optcurv.pal, {"measure_slope": True}, variant=True),
    Case(
        "pal-published",
        optcurv.pal,
        {"exact_slope": False, "decay": 0.9, "decay_steps": 10},
        rosenbrock={"decay": 1.0},
        variant=True,
    ),
    Case(
        "adam-parabolic-linesearch",
        adam_with_linesearch,
        public=(optcurv.scale_by_parabolic_linesearch,),
        optax_first=True,
    ),
    trust_region_case("trust-region", variant=False),
    trust_region_case(
        "trust-region-full-matrix-gauss-newton",
        norm=optcurv.full_matrix_norm(decay=0.8, eps=1e-2),
        curvature=optcurv.gauss_newton_product,
        initial_radius=1.0,
        needs_composite=True,
    ),
    Case(
        "adaptive-cubic",
        optcurv.adaptive_cubic,
        {"norm": optcurv.uniform_norm(), "max_iter": 6},
        static=("norm", "max_iter", "curvature", "seed"),
        curvature=True,
        moves_without_gradient=True,
    ),
    levenberg_marquardt_case("levenberg-marquardt", variant=False),
    levenberg_marquardt_case(
        "levenberg-marquardt-conjugate-gradients",
        solver=optcurv.conjugate_gradients(5, tol=0.0),
        norm=optcurv.rmsprop_norm(),
        momentum=0.3,
        length_trials=2,
    ),
    levenberg_marquardt_case(
        "levenberg-marquardt-minres", solver=optcurv.minimum_residual(5, tol=0.0), initial_damping=1.0
    ),
    Case(
        "adam-rk2",
        optcurv.runge_kutta,
        {"inner": optax.adam(0.1), "step_size": 0.01},
        static=("inner", "tableau"),
        moves_without_gradient=True,
        rosenbrock={"step_size": 1e-3},
    ),
    tso_alra_case("tso-alra", optcurv.KRONECKER, variant=False),
    tso_alra_case("tso-alra-block", optcurv.BLOCK),
    tso_alra_case("tso-alra-diagonal", optcurv.DIAGONAL),
]


def edf_by_parts(learning_rate: float = 0.5) -> optax.GradientTransformationExtraArgs:
    scale = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(optcurv.scale_by_edf(), scale, optcurv.scale_by_nesterov_flow())


def natural_gradient(learning_rate: float = 0.1, bound: float = 1.0) -> optax.GradientTransformationExtraArgs:
    scale = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(optcurv.scale_by_kronecker(-1.0), optax.clip_by_global_norm(bound), scale)


def adam_then_sgd(learning_rate: float = 0.1, second_learning_rate: float = 0.1) -> optax.GradientTransformation:
    return optcurv.switch(optax.adam(learning_rate), optax.sgd(second_learning_rate), when=100)


def masked_edf(learning_rate: float = 0.5) -> optax.GradientTransformationExtraArgs:
    return optcurv.masked(optcurv.edf(learning_rate), lambda params: jax.tree.map(lambda _: True, params))


PARTS = [
    Case(
        "edf-by-parts",
        edf_by_parts,
        public=(optcurv.scale_by_edf, optcurv.scale_by_nesterov_flow),
        needs_composite=True,
        curvature=True,
    ),
    Case("sgd-rk2", optcurv.sgd_rk2, {"learning_rate": 0.1}, static=("tableau",), rosenbrock={"learning_rate": 2e-3}),
    Case(
        "adam-rk2-alias",
        optcurv.adam_rk2,
        {"learning_rate": 0.1},
        static=("tableau",),
        rosenbrock={"learning_rate": 2e-3},
    ),
    Case("natural-gradient", natural_gradient, public=(optcurv.scale_by_kronecker,), state_by_path=True),
    Case("adam-then-sgd", adam_then_sgd, public=(optcurv.switch,), rosenbrock={"second_learning_rate": 1e-3}),
    Case("masked-edf", masked_edf, public=(optcurv.masked,), needs_composite=True, curvature=True),
]


def cases_where(holds: Callable[[Case], bool], cases: Sequence[Case] = CASES) -> pytest.MarkDecorator:
    """All tests of a case run in one process, where they share what is compiled."""

    def marks(case: Case) -> list[pytest.MarkDecorator]:
        return [pytest.mark.xdist_group(case.name), *([pytest.mark.variant] if case.variant else [])]

    params = [pytest.param(case, id=case.name, marks=marks(case)) for case in cases if holds(case)]
    return pytest.mark.parametrize("case", params)


every_case = cases_where(lambda case: True)
every_method = cases_where(lambda case: not case.variant)
"""For tests that do not hang on a method's options."""
every_part = cases_where(lambda case: True, [*CASES, *PARTS])

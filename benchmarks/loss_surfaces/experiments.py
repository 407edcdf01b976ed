"""Where optimisers end on the loss surfaces of deep networks, and what lies between and around."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax
from numpy.typing import NDArray

import optcurv
from benchmarks.loss_surfaces.networks import Initialisation, SurfaceTask
from benchmarks.loss_surfaces.runs import METHODS, Plan, Runner, Stage, Trained

Array = NDArray[np.float64]
Report = Callable[[str], None]

BASIN = 0.5
"""A basin is where the loss stays below this share of the way from the ends, in the median, to the initialisation."""
LENGTH = 3.0
"""Lines from the initialisation lead so many times as far as the run came."""

SWITCHED = tuple(itertools.permutations(("SGD", "Adam", "Adadelta"), 2))
SHARES = (0.25, 0.5, 0.75)
EXOTIC = (Initialisation(-10.0, 0.01), Initialisation(-1.0, 1.0))
_EXOTIC_RATES = (0.01, 0.1, 1.0, 10.0)  # BatchNorm divides a kernel's gradient by its length, which is large here
_FOUR = ("SGD", "RMSProp", "Adam", "SGD+RK2")  # of the bilinear surface


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained and looked at.

    Attributes:
      num_images: or pieces of text, to train on.
      num_seen: so many of them, and of the test's, at every point of a surface.
      num_epochs: of a run.
      tuning_epochs: of the runs that choose a learning rate.
      num_seeds: of each method.
      line_points: of each line.
      surface_points: along each side of a surface.
      methods: compared.
      switched: pairs of methods, the first switched to the second.
      is_tuned: whether the whole grid of learning rates is tried, or its middle taken.
    """

    num_images: int = 2048
    num_seen: int = 512
    num_epochs: int = 16
    tuning_epochs: int = 4
    num_seeds: int = 4
    line_points: int = 25
    surface_points: int = 11
    methods: tuple[str, ...] = ("SGD", "SGD-momentum", "RMSProp", "Adadelta", "Adam", "SGD+RK2", "Adam+RK2")
    switched: tuple[tuple[str, str], ...] = SWITCHED
    is_tuned: bool = True

    @property
    def seeds(self) -> range:
        """Other than the one that tunes."""
        return range(1, 1 + self.num_seeds)


QUICK = Scale(
    num_images=384,
    num_seen=128,
    num_epochs=2,
    num_seeds=1,
    line_points=10,
    surface_points=5,
    methods=("SGD", "Adam", "SGD+RK2"),
    switched=SWITCHED[:1],
    is_tuned=False,
)

Runs = dict[str, list[Trained]]
"""By name, one run a seed."""


def rate_of(runner: Runner, scale: Scale, method: str, report: Report) -> float:
    """Returns the learning rate of a method."""
    (grid,) = METHODS[method].grid.values()
    return runner.tuned_rate(method, scale.tuning_epochs, report) if scale.is_tuned else grid[len(grid) // 2]


def train_seeds(runner: Runner, scale: Scale, plan: Plan, report: Report) -> list[Trained]:
    """Carries a plan out with every seed."""
    runs = []
    for seed in scale.seeds:
        runs.append(runner.run(dataclasses.replace(plan, seed=seed)))
        report(f"{runner.task.name}: {runs[-1].plan}")
    return runs


def train_methods(runner: Runner, scale: Scale, methods: Iterable[str], report: Report) -> Runs:
    """Trains every method from the same initialisations on the same batches."""
    runs = {}
    for method in methods:
        stage = Stage(method, rate_of(runner, scale, method, report))
        runs[method] = train_seeds(runner, scale, Plan(stage, 0, scale.num_epochs), report)
    return runs


class Curves(NamedTuple):
    """Curves over a common axis; each name has one a seed, of shape (seeds, points)."""

    x: Array
    by_name: dict[str, Array]


class Between(NamedTuple):
    """What lies on the lines between the ends of pairs of runs: the loss, and the difference from the first end."""

    loss: Curves
    distance: Curves
    disagreement: Curves

    def barriers(self) -> dict[str, Array]:
        """Returns the height of every line's barrier, of shape (seeds,)."""
        return {
            pair: np.array([float(optcurv.barrier_height(losses)) for losses in curves])
            for pair, curves in self.loss.by_name.items()
        }


class Slices:
    """Slices of a problem's loss surface, each compiled once."""

    def __init__(self, task: SurfaceTask) -> None:
        self.task, self._loss = task, task.seen_loss
        self._between = jax.jit(self._compare)

    def _compare(self, first: optax.Params, second: optax.Params, coefficients: jax.Array) -> dict[str, jax.Array]:
        def outputs(params: optax.Params) -> tuple[jax.Array, jax.Array]:
            logits = self.task.logits(params)[1]
            return logits.reshape(-1, logits.shape[-1]), jax.nn.softmax(logits).reshape(-1, logits.shape[-1])

        logits_of_first, probabilities_of_first = outputs(first)

        def values(params: optax.Params) -> dict[str, jax.Array]:
            logits, probabilities = outputs(params)
            return {
                "loss": self.task.seen_loss(params),
                "distance": optcurv.functional_distance(probabilities_of_first, probabilities),
                "disagreement": optcurv.label_disagreement(logits_of_first, logits),
            }

        return optcurv.line(values, first, second, coefficients)

    def start(self, run: Trained) -> optax.Params:
        """Returns where a run began."""
        return self.task.start(run.plan.seed, run.plan.initialisation)

    def from_start(self, runs: Runs, num_points: int, report: Report) -> Curves:
        """Looks from where each run began, through where it ended, and on."""
        x = np.linspace(0, LENGTH, num_points)

        def losses(run: Trained) -> Array:
            report(f"{self.task.name}: line of {run.plan}")
            return np.asarray(optcurv.line(self._loss, self.start(run), run.params, x), np.float64)

        return Curves(x, {name: np.stack([losses(run) for run in column]) for name, column in runs.items()})

    def around_end(self, runs: Runs, num_points: int, report: Report) -> Curves:
        """Looks from where the first run of each name ended, by absolute distance, back to its start and on (Eq. 1)."""
        longest = max((x for column in runs.values() if math.isfinite(x := column[0].final["distance"])), default=1.0)
        x = np.linspace((1 - LENGTH) * longest, longest, num_points)
        curves = {}
        for name, (run, *_) in runs.items():
            report(f"{self.task.name}: basin of {run.plan}")
            start = self.start(run)
            curves[name] = np.asarray([optcurv.absolute_line(self._loss, run.params, start, x)])
        return Curves(x, curves)

    def between(self, pairs: Mapping[str, Sequence[tuple[Trained, Trained]]], points: int, report: Report) -> Between:
        """Looks from the end of one run to that of another, for every seed of every pair."""
        x = np.linspace(0, 1, points)
        found: dict[str, dict[str, Array]] = {name: {} for name in Between._fields}
        for pair, runs in pairs.items():
            rows = []
            for first, second in runs:
                rows.append(self._between(first.params, second.params, x))
                report(f"{self.task.name}: between {pair}")
            for name, by_pair in found.items():
                by_pair[pair] = np.stack([np.asarray(row[name], np.float64) for row in rows])
        return Between(**{name: Curves(x, by_pair) for name, by_pair in found.items()})

    def triangle(self, first: Trained, second: Trained, points: int) -> Array:
        """Looks at the plane through a common start and two ends; of shape (from the start, from second to first)."""
        return np.asarray(
            optcurv.barycentric(self._loss, (self.start(first), first.params, second.params), *_sides(points))
        )

    def square(self, corners: Sequence[optax.Params], points: int) -> Array:
        """Looks at the surface that four points span; the last lies at (0, 0), the first at (1, 1)."""
        side = np.linspace(0, 1, points)
        return np.asarray(optcurv.bilinear(self._loss, tuple(corners), side, side))


def _sides(points: int) -> tuple[Array, Array]:
    """Axes of a triangle: beyond its ends, and no farther than them."""
    return np.linspace(0, 1.25, points), np.linspace(0, 1, points)


class Surface(NamedTuple):
    """Losses over two axes, of shape (x, y)."""

    x: Array
    y: Array
    loss: Array


class Minima(NamedTuple):
    """Where the methods end on a problem's surface.

    Attributes:
      problem: its name.
      runs: of each method.
      from_start: lines from each initialisation.
      around_end: lines from the first end of each, by absolute distance.
      between: of pairs of methods.
      triangles: of pairs of methods, for the first seed.
      squares: the paper's two bilinear surfaces.
    """

    problem: str
    runs: Runs
    from_start: Curves
    around_end: Curves
    between: Between
    triangles: dict[str, Surface]
    squares: dict[str, Surface]

    @property
    def initial_loss(self) -> float:
        """The mean over the seeds."""
        return float(next(iter(self.from_start.by_name.values()))[:, 0].mean())

    @property
    def threshold(self) -> float:
        """The loss that bounds a basin; one for all methods."""
        ends = [run.final["train_loss"] for runs in self.runs.values() for run in runs]
        return (1 - BASIN) * float(np.nanmedian(ends)) + BASIN * self.initial_loss

    def finals(self, name: str) -> dict[str, list[float]]:
        """Returns a figure of each method's runs."""
        return {method: [run.final[name] for run in runs] for method, runs in self.runs.items()}

    def widths(self, absolute: bool) -> dict[str, list[float]]:
        """Returns the widths of the basins, in units of the run's length or of the parameters."""
        result = {}
        for method, curves in self.from_start.by_name.items():
            lengths = self.finals("distance")[method] if absolute else [1.0] * len(curves)
            result[method] = [
                basin(length * self.from_start.x, losses, self.threshold)
                for length, losses in zip(lengths, curves, strict=True)
            ]
        return result


def basin(distances: Array, losses: Array, threshold: float) -> float:
    """Returns the width of the basin; not a number if the loss is none where the run ended."""
    at_end = losses[np.argmin(np.abs(distances - distances[-1] / LENGTH))]
    return float(optcurv.basin_width(distances, losses, threshold)) if np.isfinite(at_end) else math.nan


def pairs_of(runs: Runs) -> dict[str, list[tuple[Trained, Trained]]]:
    """Returns the runs of every two names, seed by seed."""
    return {f"{a} | {b}": list(zip(runs[a], runs[b], strict=True)) for a, b in itertools.combinations(runs, 2)}


def measure_minima(slices: Slices, runs: Runs, scale: Scale, report: Report) -> Minima:
    """Looks at all that Table 1 and Figures 2 to 6 show, and 8 for a network without BatchNorm."""
    pairs, triangles = pairs_of(runs), {}
    for pair, ((first, second), *_) in pairs.items():
        triangles[pair] = Surface(*_sides(scale.surface_points), slices.triangle(first, second, scale.surface_points))
        report(f"{slices.task.name}: surface of {pair}")
    return Minima(
        slices.task.name,
        runs,
        slices.from_start(runs, scale.line_points, report),
        slices.around_end(runs, scale.line_points, report),
        slices.between(pairs, scale.line_points, report),
        triangles,
        _squares(slices, runs, scale),
    )


def _squares(slices: Slices, runs: Runs, scale: Scale) -> dict[str, Surface]:
    """Figure 2, two starts and the ends of SGD from them, and 3, the ends of four methods."""
    side, corners = np.linspace(0, 1, scale.surface_points), {}
    if len(runs["SGD"]) > 1:
        first, second = runs["SGD"][:2]
        ends = (first.params, second.params)
        corners["two starts (β = 0) and SGD's ends (β = 1)"] = (*ends, slices.start(first), slices.start(second))
    if all(method in runs for method in _FOUR):
        corners[" / ".join(_FOUR)] = tuple(runs[method][0].params for method in _FOUR)
    return {name: Surface(side, side, slices.square(points, scale.surface_points)) for name, points in corners.items()}


class Switching(NamedTuple):
    """Runs of one optimiser that another one took over, between runs of each alone; by group such as SGD → Adam."""

    problem: str
    initial_loss: float
    runs: dict[str, Runs]
    between: dict[str, Between]


def train_switched(runner: Runner, scale: Scale, report: Report) -> dict[str, Runs]:
    """Trains each optimiser alone, and switched at every share of the training."""
    alone = train_methods(runner, scale, dict.fromkeys(itertools.chain(*scale.switched)), report)
    groups = {}
    for first, second in scale.switched:
        stages = [run.plan.first for run in (alone[first][0], alone[second][0])]
        groups[f"{first} → {second}"] = runs = {first: alone[first]}
        for share in SHARES:
            plan = Plan(stages[0], 0, scale.num_epochs, second=stages[1], switch_at=share)
            runs[f"at {100 * share:g} %"] = train_seeds(runner, scale, plan, report)
        runs[second] = alone[second]
    return groups


def measure_switching(slices: Slices, groups: Mapping[str, Runs], scale: Scale, report: Report) -> Switching:
    """Looks between all ends of each group."""
    first = next(iter(next(iter(groups.values())).values()))
    start = np.mean([float(slices.task.seen_loss(slices.start(run))) for run in first])
    between = {name: slices.between(pairs_of(runs), scale.line_points, report) for name, runs in groups.items()}
    return Switching(slices.task.name, float(start), dict(groups), between)


class Exotic(NamedTuple):
    """SGD from usual and unusual initialisations; runs and lines by initialisation."""

    problem: str
    runs: Runs
    from_start: Curves


USUAL = "as usual"


def train_exotic(runner: Runner, scale: Scale, report: Report) -> Runs:
    """Trains SGD from each initialisation, at the best rate for it."""
    runs = train_methods(runner, scale, ["SGD"], report)
    runs = {USUAL: runs["SGD"]}
    for initialisation in EXOTIC:
        grid = _EXOTIC_RATES if scale.is_tuned else _EXOTIC_RATES[1:2]
        rate = runner.tuned_rate("SGD", scale.tuning_epochs, report, initialisation, grid)
        plan = Plan(Stage("SGD", rate), 0, scale.num_epochs, initialisation)
        runs[str(initialisation)] = train_seeds(runner, scale, plan, report)
    return runs


def measure_exotic(slices: Slices, runs: Runs, scale: Scale, report: Report) -> Exotic:
    """Looks along the way from each initialisation."""
    return Exotic(slices.task.name, runs, slices.from_start(runs, scale.line_points, report))


class RungeKutta(NamedTuple):
    """Runs that compute equally many gradients."""

    problem: str
    runs: Runs


SCHEMES = {"midpoint": "SGD+midpoint", "Heun": "SGD+RK2", "Ralston": "SGD+Ralston"}


def train_runge_kutta(runner: Runner, scale: Scale, report: Report) -> RungeKutta:
    """Trains SGD at its rate and at twice that, and SGD and Adam with RK2 at twice the rate for half as long."""
    plans = {}
    for method in ("SGD", "Adam"):
        rate = rate_of(runner, scale, method, report)
        plans[method] = Plan(Stage(method, rate), 0, scale.num_epochs)
        schemes = SCHEMES if method == "SGD" else {"RK2": "Adam+RK2"}
        if method == "SGD":
            plans["SGD x2"] = Plan(Stage(method, 2 * rate), 0, scale.num_epochs)
        for scheme, doubled in schemes.items():
            plans[f"{method}, {scheme}"] = Plan(Stage(doubled, 2 * rate), 0, scale.num_epochs // 2)
    runs = {name: train_seeds(runner, scale, plan, report) for name, plan in plans.items()}
    return RungeKutta(runner.task.name, runs)


def num_not_finite(found: Minima | Switching | Exotic | RungeKutta) -> int:
    """Returns how many of the numbers measured are not finite."""
    groups = jax.tree.leaves(found.runs, is_leaf=lambda leaf: isinstance(leaf, Trained))
    numbers = jax.tree.leaves((found._replace(runs={}), [run.curve for run in groups]))
    return sum(int(np.sum(~np.isfinite(leaf))) for leaf in numbers if not isinstance(leaf, str))

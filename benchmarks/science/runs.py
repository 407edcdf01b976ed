"""Runs of all methods on one problem, in turns, each until it has had its seconds."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from threadpoolctl import threadpool_limits

import optcurv
from benchmarks.core.methods import Method
from benchmarks.core.tune import no_nan, settings
from benchmarks.science.problems import PROBLEMS, Problem, network

OWN = (
    Method("LM", lambda: optcurv.levenberg_marquardt(), {}),
    Method("LM, CG", lambda: optcurv.levenberg_marquardt(solver=optcurv.conjugate_gradients()), {}),
    Method("EDF-G k=8, W2", lambda: optcurv.edf(1.0, 8, acceleration="nesterov"), {}),
    Method("trust region", lambda: optcurv.trust_region(curvature=optcurv.gauss_newton_product), {}),
)
"""With their defaults; nothing is tuned."""

RATES, HORIZONS = (3e-3, 1e-2, 3e-2, 1e-1), (1.0, 0.25)
_GRID = {"learning rate": RATES, "horizon": HORIZONS}
RIVALS = (
    Method("Adam", lambda rate, horizon: optax.adam(rate), _GRID),
    Method("Muon", lambda rate, horizon: optax.contrib.muon(rate), _GRID),
    Method("L-BFGS", optax.lbfgs, {}),
)
"""Tuned over the rate and the horizon of its cosine decay, a part of the seconds; L-BFGS has a line search instead."""

BARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_SHORTEST, _GROWTH, _OVER = 0.01, 0.1, 0.99
_CURVE_DIGITS = 3


def num_runs(methods: Iterable[Method]) -> int:
    """Returns how many runs `compare` makes on a problem."""
    return sum(math.prod(map(len, method.grid.values())) for method in methods)


class Program:
    """Some steps of a method on a problem in one compiled loop."""

    def __init__(self, problem: Problem, method: Method) -> None:
        reuses_gradient = method.name == "L-BFGS"  # its line search has computed the next one
        names = tuple(method.grid)

        def optimizer(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
            return method.make(dict.fromkeys(names, rate))

        def init(key: jax.Array) -> tuple[Any, Any]:
            params = problem.init(key)
            return params, optimizer(jnp.asarray(0.0)).init(params)

        def steps(state: Any, count: jax.Array, rate: jax.Array, begun: jax.Array, pace: jax.Array) -> Any:
            def step(index: jax.Array, state: Any) -> Any:
                params, inner = state
                decayed = rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(begun + index * pace, 0, 1)))
                if reuses_gradient:
                    value, grads = optax.value_and_grad_from_state(problem.loss)(params, state=inner)
                else:
                    value, grads = jax.value_and_grad(problem.loss)(params)
                updates, inner = optimizer(decayed).update(
                    grads, inner, params, value=value, grad=grads, value_fn=problem.loss
                )
                return optax.apply_updates(params, updates), inner

            return jax.lax.fori_loop(0, count, step, state)

        self.method, self.problem = method, problem
        self.start = jax.jit(init)(jax.random.key(0))
        begun = time.perf_counter()
        self.steps = jax.jit(steps).lower(self.start, 0, 0.0, 0.0, 0.0).compile()
        self.compile_seconds = time.perf_counter() - begun
        jax.block_until_ready(self.steps(self.start, 1, 0.0, 0.0, 0.0))  # the first call also loads


@dataclasses.dataclass
class Run:
    """One setting of a method, stopped by the clock.

    Attributes:
      program: what steps.
      evaluate: maps parameters to error and loss, outside of the seconds that count.
      setting: the tuned numbers; none of our methods has any.
      seconds: when it ends: the horizon, where it has one.
      spent: seconds spent in steps.
      taken: steps.
      curve: seconds and error after each turn.
    """

    program: Program
    evaluate: Callable[[Any], tuple[jax.Array, jax.Array]]
    setting: Mapping[str, float]
    seconds: float
    spent: float = 0.0
    taken: int = 0
    curve: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    loss: float = math.nan

    def __post_init__(self) -> None:
        """Starts at the program's parameters."""
        self.state = self.program.start
        self.record()

    @property
    def ended(self) -> bool:
        """Whether its seconds are over."""
        return self.spent >= _OVER * self.seconds

    def advance(self) -> None:
        """Takes the steps of one turn: a tenth of what was spent so far, so that times are known to a tenth."""
        pace = self.spent / self.taken if self.taken else math.inf
        turn = min(max(_SHORTEST, _GROWTH * self.spent), self.seconds - self.spent)
        count = max(1, round(turn / pace)) if self.taken else 1
        count = min(count, 2 * self.taken + 1)  # the first step alone says little
        rate = self.setting.get("learning rate", 0.0)
        begun = time.perf_counter()
        progress = (self.spent / self.seconds, min(pace, self.seconds) / self.seconds)
        self.state = jax.block_until_ready(self.program.steps(self.state, count, rate, *progress))
        self.spent += time.perf_counter() - begun
        self.taken += count
        self.record()

    def record(self) -> None:
        """Notes error and loss."""
        error, loss = self.evaluate(self.state[0])
        self.curve.append((self.spent, no_nan(float(error))))
        self.loss = float(loss)

    def summary(self) -> dict[str, Any]:
        """Returns what is told of the run."""
        passed = {bar: next((seconds for seconds, error in self.curve if error <= bar), math.inf) for bar in BARS}
        return {
            "setting": dict(self.setting),
            "compile_seconds": self.program.compile_seconds,
            "seconds": self.spent,
            "steps": self.taken,
            "passed": [passed[bar] for bar in BARS],
            "error": self.curve[-1][1],
            "loss": self.loss,
        }


def compare(name: str, methods: Iterable[Method], seconds: float, report: Callable[[str], None]) -> dict[str, Any]:
    """Runs all methods on a problem, the one that has spent least being next, so that all see the same load.

    Args:
      name: of the problem.
      methods: to run.
      seconds: of each run.
      report: is called when a run has ended.

    Returns:
      the summary: runs by method, and the curve of the best of each.
    """
    # Threads of BLAS wait for each other by spinning: on a busy machine a factorisation took a hundred times as long.
    with jax.enable_x64(True), threadpool_limits(1, user_api="blas"):
        problem = PROBLEMS[name]()
        evaluate = jax.jit(lambda params: (problem.error(params), problem.loss(params)))
        runs: dict[str, list[Run]] = {}
        for method in methods:
            program = Program(problem, method)
            runs[method.name] = [
                Run(program, evaluate, setting, seconds * setting.get("horizon", 1.0))
                for setting in settings(method.grid)
            ]
        active = [run for tried in runs.values() for run in tried]
        while active:
            run = min(active, key=lambda run: run.spent)
            run.advance()
            if run.ended:
                active.remove(run)
                report(f"{problem.title}, {run.program.method.name}: error {run.curve[-1][1]:.1e}")
        best = {name: min(tried, key=lambda run: run.curve[-1][1]) for name, tried in runs.items()}
        num_params = sum(leaf.size for leaf in jax.tree.leaves(next(iter(best.values())).state[0]))
        found = {
            "title": problem.title,
            "parameters": num_params,
            "seconds": seconds,
            "methods": {name: [run.summary() for run in tried] for name, tried in runs.items()},
            "curves": {name: _rounded(run.curve) for name, run in best.items()},
        }
        if name == "burgers":
            found["picture"] = picture(problem, best[OWN[0].name].state[0])
        return found


def _rounded(curve: list[tuple[float, float]]) -> list[list[float]]:
    """The curve as two columns of few digits, for small summaries."""
    return [[float(f"{number:.{_CURVE_DIGITS}g}") for number in column] for column in zip(*curve, strict=True)]


def picture(problem: Problem, params: Any, num_points: int = 17) -> dict[str, Any]:
    """Returns the solution, the network and its error on a grid of x and t."""
    assert problem.solution is not None
    x, t = jnp.linspace(-1, 1, 2 * num_points - 1), jnp.linspace(0, 1, num_points)
    grid = jnp.stack(jnp.meshgrid(x, t), -1)
    truth = jax.vmap(jax.vmap(problem.solution))(grid)
    error = network(params, grid) - truth
    digits = lambda array: [[float(f"{v:.3g}") for v in row] for row in np.asarray(array)]  # noqa: E731
    return {"truth": digits(truth), "error": digits(error)}

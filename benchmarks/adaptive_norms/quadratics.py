"""Figure 1: gradient descent and Adagrad on quadratics, each step the best in an implicit trust region."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optcurv
from benchmarks.core.report import table
from benchmarks.core.statistics import Claim, Verdict, is_less, mean_interval, plus_minus

NUM_STEPS = 20
START_DISTANCE = 3.0
LEVEL = 0.9  # of the intervals

METHODS = {
    "gradient descent": optcurv.uniform_norm(),
    "diagonal Adagrad": optcurv.adagrad_norm(),
    "full-matrix Adagrad": optcurv.full_matrix_norm(),
}
GD, DIAGONAL, FULL = METHODS

# Up to thrice the start's distance, which is about the length of Adagrad's first step. Beyond lies a trick that only an
# exact quadratic rewards: a first step so long that the huge gradients there outweigh all later ones.
STEP_SIZES = np.geomspace(0.01, 10.0, 31)


def _rotated(hessian: np.ndarray, degrees: float) -> np.ndarray:
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    rotation = np.array([[cosine, -sine], [sine, cosine]])
    return rotation @ hessian @ rotation.T


PROBLEMS = {
    "κ = 2, axis-aligned": np.diag([1.0, 2.0]),
    "κ = 30, axis-aligned": np.diag([1.0, 30.0]),
    "κ = 30, rotated by 45°": _rotated(np.diag([1.0, 30.0]), 45),
}
_, ALIGNED, ROTATED = PROBLEMS

_DRAWN_ANGLE = np.deg2rad(155)  # of the start in the picture


class Descent(NamedTuple):
    """The path of a method; T steps. Arrays of JAX or NumPy.

    Attributes:
      iterates: of shape (T + 1, 2).
      matrices: A^{1/2} of each step, whose norm measures the trust region, of shape (T, 2, 2).
      radii: of the trust regions in that norm, of shape (T,).
      values: ½ wᵀHw, of shape (T + 1,); the least is 0.
    """

    iterates: Any
    matrices: Any
    radii: Any
    values: Any


class Measured(NamedTuple):
    """A method on a problem.

    Attributes:
      step_size: the tuned one.
      log_values: log₁₀ suboptimality of every start at every iterate, of shape (starts, T + 1).
      drawn: the path from the start of the picture.
    """

    step_size: float
    log_values: np.ndarray
    drawn: Descent


def descend(shape: optcurv.Norm, hessian: jax.Array, start: jax.Array, step_size: jax.typing.ArrayLike) -> Descent:
    """Steps s = -η A^{-1/2} g, each of which minimises gᵀs within ‖s‖_{A^{1/2}} ≤ η ‖g‖_{A^{-1/2}} (Eq. 6)."""

    def step(carry: tuple[jax.Array, Any], _: None) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, ...]]:
        point, state = carry
        gradient = hessian @ point
        state = shape.update(state, gradient)
        direction = shape.at(state).inverse(gradient)
        matrix = jax.vmap(shape.at(state).apply)(jnp.eye(2))
        following = point - step_size * direction
        radius = step_size * jnp.sqrt(gradient @ direction)
        return (following, state), (following, jnp.asarray(matrix), jnp.asarray(radius))

    _, (points, matrices, radii) = jax.lax.scan(step, (start, shape.init(start)), None, length=NUM_STEPS)
    iterates = jnp.concatenate([start[None], points])
    return Descent(iterates, matrices, radii, 0.5 * jnp.einsum("ti,ij,tj->t", iterates, hessian, iterates))


def measure(num_starts: int) -> dict[str, dict[str, Measured]]:
    """Tunes every method on every problem, then runs it from as many fresh random starts."""
    measured: dict[str, dict[str, Measured]] = {problem: {} for problem in PROBLEMS}
    with jax.enable_x64(True):
        angles = 2 * jnp.pi * jax.random.uniform(jax.random.key(0), (2 * num_starts,))
        angles = jnp.concatenate([jnp.array([_DRAWN_ANGLE]), angles])
        starts = START_DISTANCE * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
        for name, shape in METHODS.items():
            from_each = jax.vmap(functools.partial(descend, shape), (None, 0, None))
            with_each = jax.jit(jax.vmap(from_each, (None, None, 0)))
            for problem, hessian in PROBLEMS.items():
                descents = with_each(jnp.asarray(hessian), starts, jnp.asarray(STEP_SIZES))
                measured[problem][name] = _tuned(jax.tree.map(np.asarray, descents))
    return measured


def _tuned(descents: Descent) -> Measured:
    """Chooses the step size by the mean over the tuning starts; the first start is the one drawn.

    The arrays have two more dimensions in front: step sizes, and starts.
    """
    log_values = np.log10(descents.values)
    tuning, fresh = np.split(log_values[:, 1:], 2, axis=1)
    best = np.argmin(tuning[:, :, -1].mean(axis=1))
    return Measured(float(STEP_SIZES[best]), fresh[best], Descent(*(array[best, 0] for array in descents)))


def inverse_roots(matrices: np.ndarray) -> np.ndarray:
    """Returns the inverse square roots of positive definite matrices, whose ellipses they map the unit circle to."""
    eigenvalues, vectors = np.linalg.eigh(matrices)
    return vectors / np.sqrt(eigenvalues)[..., None, :] @ np.swapaxes(vectors, -1, -2)


def final_values(measured: Mapping[str, Mapping[str, Measured]]) -> dict[str, dict[str, np.ndarray]]:
    """Returns the last log suboptimality of every start."""
    return {p: {name: one.log_values[:, -1] for name, one in by_name.items()} for p, by_name in measured.items()}


def judge(final: Mapping[str, Mapping[str, np.ndarray]]) -> list[Claim]:
    """Returns the claims of the figure, from the last log suboptimality of every start."""

    def numbers(problem: str, *names: str) -> str:
        return "; ".join(f"{name} {plus_minus(mean_interval(final[problem][name], LEVEL))}" for name in names)

    faster = is_less(final[ALIGNED][DIAGONAL], final[ALIGNED][GD])
    still = is_less(final[ROTATED][DIAGONAL], final[ROTATED][GD])
    restored = is_less(final[ROTATED][FULL], final[ROTATED][GD])
    return [
        Claim(f"{ALIGNED}: diagonal Adagrad beats gradient descent", faster, numbers(ALIGNED, GD, DIAGONAL)),
        Claim(
            f"{ROTATED}: diagonal Adagrad loses its advantage",
            Verdict.FAILS if still == Verdict.HOLDS else Verdict.HOLDS,
            numbers(ROTATED, GD, DIAGONAL),
        ),
        Claim(f"{ROTATED}: full-matrix Adagrad re-establishes it", restored, numbers(ROTATED, GD, FULL)),
    ]


def summarise(measured: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    """Returns the claims, and what the table and the picture show."""

    def one(method: Measured) -> dict[str, Any]:
        mean, half_width = mean_interval(method.log_values, LEVEL)
        curve = {"mean": mean, "half_width": half_width}
        last = plus_minus(mean_interval(method.log_values[:, -1], LEVEL))
        path = method.drawn
        drawn = {"iterates": path.iterates, "shapes": inverse_roots(path.matrices[::2]), "radii": path.radii[::2]}
        return {"step_size": method.step_size, "last": last, "curve": curve, "drawn": drawn}

    return {
        "starts": len(measured[ALIGNED][GD].log_values),
        "claims": [claim._asdict() for claim in judge(final_values(measured))],
        "problems": {
            problem: {name: one(each) for name, each in methods.items()} for problem, methods in measured.items()
        },
    }


def results_table(content: Mapping[str, Any]) -> str:
    """Lays out the last suboptimality and the tuned step size."""
    edges = (STEP_SIZES[0], STEP_SIZES[-1])
    rows = [
        {
            "problem": problem,
            "method": name,
            "log₁₀ suboptimality": one["last"],
            "step size": f"{one['step_size']:.3g}{' (edge)' if np.isclose(one['step_size'], edges).any() else ''}",
        }
        for problem, methods in content["problems"].items()
        for name, one in methods.items()
    ]
    caption = f"After {NUM_STEPS} steps; mean over {content['starts']} starts with its {LEVEL:.0%} interval."
    return table(rows, caption)

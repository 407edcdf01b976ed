"""What a plane of the loss surface costs, beside forward passes called from Python."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from rich.progress import track

import optcurv
from benchmarks.core.report import table
from benchmarks.core.statistics import quartiles
from benchmarks.core.task import Task
from benchmarks.core.timing import noise, seconds_of, temporary_bytes
from optcurv.arguments import PyTree

NUM_IMAGES = 2000
_SIDES = (5, 9)  # points along each


def measure_planes(task: Task, rounds: int) -> dict[str, Any]:
    """Returns throughput, in points, of a plane of 5x5 points, and memory of that and of a larger one.

    Nothing is compiled within the times: neither here nor there.
    """
    params = jax.jit(task.init)(jax.random.key(0))
    loss = jax.jit(task.loss(noise(NUM_IMAGES).train))
    directions = [optcurv.random_direction(jax.random.key(seed), params) for seed in (1, 2)]
    planes = {side: functools.partial(_plane, loss, directions, np.linspace(-1, 1, side)) for side in _SIDES}
    side = _SIDES[0]

    def forward_passes(params: PyTree) -> list[jax.Array]:
        return [loss(params) for _ in range(side**2)]

    programs = (planes[side], forward_passes)
    times = np.array(
        [
            [seconds_of(program, params) for program in programs]
            for _ in track(range(rounds + 1), "planes: timing", transient=True)
        ][1:]
    )
    throughput = times[:, 1] / times[:, 0]
    compiled = {side: jax.jit(plane).lower(params).compile() for side, plane in planes.items()}
    return {
        "num_images": NUM_IMAGES,
        "seconds_per_point": float(np.median(times[:, 0])) / side**2,
        "throughput_ratio_quartiles": np.quantile(throughput, [0.25, 0.5, 0.75]).tolist(),
        "temporary_bytes": {f"{side}x{side}": temporary_bytes(program) for side, program in compiled.items()},
        "forward_temporary_bytes": temporary_bytes(loss.lower(params).compile()),
    }


def _plane(
    loss: Callable[..., jax.Array], directions: list[optax.Params], axis: np.ndarray, params: PyTree
) -> jax.Array:
    return optcurv.plane(loss, params, directions, axis, axis)


def planes_table(content: Mapping[str, Any]) -> str:
    """Lays the figures out."""
    figures = content["planes"]
    shown = {"throughput, of forward passes called from Python": quartiles(figures["throughput_ratio_quartiles"])}
    shown["ms a point"] = f"{1e3 * figures['seconds_per_point']:.1f}"
    for name, count in figures["temporary_bytes"].items():
        shown[f"temporary MB, plane of {name}"] = f"{count / 1e6:.1f}"
    shown["temporary MB, forward pass"] = f"{figures['forward_temporary_bytes'] / 1e6:.1f}"
    rows = [{"a plane of the loss surface": name, "": figure} for name, figure in shown.items()]
    return table(rows, f"{figures['num_images']} images at each point. Ratio: median (quartiles).")

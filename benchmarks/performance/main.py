"""What a step costs: time and memory on one device, low precision, and scale."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import jax

from benchmarks.core import report
from benchmarks.core.cache import Cache
from benchmarks.core.figures import save
from benchmarks.core.timing import workloads
from benchmarks.performance import cost, loops, memory, precision, scale, scale_report, slices
from benchmarks.performance.scaling_model import Machine


@dataclasses.dataclass
class Options(report.Study):
    """What a step costs: time and memory beside a gradient step, bfloat16, and scale in parameters and devices."""

    part: Literal["cost", "memory", "precision", "parameters", "batch", "order", "devices", "model", "all"] = "all"
    """The cost of a step, its memory, low precision; a step against parameters, batch, Krylov order or virtual devices;
    a model of many devices on paper."""
    rounds: int = 20
    """Rounds of `cost`, in which each method runs in turn."""
    flops_rate: float = 100.0
    """On paper: TFLOP/s of a device."""
    bandwidth: float = 50.0
    """On paper: GB/s sent by each device."""
    latency: float = 5.0
    """On paper: microseconds of a message."""

    def run(self) -> None:
        """Measures part after part."""
        if jax.config.jax_num_cpu_devices < scale.NUM_DEVICES:  # must be said before JAX's backends start
            jax.config.update("jax_num_cpu_devices", scale.NUM_DEVICES)
        if self.part == "devices":
            os.environ.setdefault("NPROC", str(scale.NUM_THREADS))  # likewise
        cache, plan = Cache(self.folder), scale.QUICK if self.quick else scale.Plan()
        machine = Machine(1e12 * self.flops_rate, 1e9 * self.bandwidth, 1e-6 * self.latency)
        parts = {
            "cost": lambda: self.measure_costs(cache),
            "memory": lambda: self.measure_memory(cache),
            "precision": lambda: self.write("precision", self.compare_dtypes(cache)),
            "parameters": lambda: self.write("parameters", scale.against_parameters(plan, cache)),
            "batch": lambda: self.write("batch", scale.against_batch(plan, cache)),
            "order": lambda: self.write("order", scale.against_order(plan, cache)),
            "devices": lambda: self.write("devices", scale.on_virtual_devices(plan, cache)),
            "model": lambda: self.write("model", scale.on_paper(plan, cache, machine)),
        }
        for name, part in parts.items():
            if self.part == "all" and name == "devices":  # its threads would slow the others
                options = ["--part", name, "--output", str(self.folder), *(["--quick"] if self.quick else [])]
                subprocess.run([sys.executable, "-m", "benchmarks", "performance", *options], check=True)
            elif self.part in (name, "all"):
                part()

    def measure_costs(self, cache: Cache) -> None:
        """Times a step of each method on two networks, or one when quick, beside a gradient step."""
        rounds = 2 if self.quick else self.rounds
        for name, task in list(workloads().items())[: 1 if self.quick else None]:
            measured = cache.get(task.description | {"rounds": rounds}, cost.measure, task, rounds)
            self.write(f"cost-{name}", measured)

    def measure_memory(self, cache: Cache) -> None:
        """Counts the memory of compiled steps."""
        task = memory.make_task((200, 200)) if self.quick else memory.make_task()
        self.write("memory", {"rows": cache.get(task.description, memory.measure, task)})

    def compare_dtypes(self, cache: Cache) -> dict:
        """Trains in float32 and bfloat16."""
        num_seeds, num_steps, methods = (1, 10, precision.RUNS[:2]) if self.quick else (3, 400, precision.RUNS)
        return precision.measure(cache, methods, num_seeds, num_steps)


_TABLES = {
    "memory": memory.memory_table,
    "precision": precision.precision_table,
    "parameters": scale_report.ratios_table,
    "batch": scale_report.ratios_table,
    "order": scale_report.ratios_table,
    "devices": scale_report.devices_table,
    "model": scale_report.model_table,
}
_PICTURES = {
    "parameters": scale_report.draw_against,
    "batch": scale_report.draw_against,
    "order": scale_report.draw_orders,
    "devices": scale_report.draw_devices,
    "model": scale_report.draw_model,
}


def tables(folder: Path) -> dict[str, str]:
    """Returns the tables of each part."""
    found = {}
    for name, content in report.summaries(folder).items():
        if name in _TABLES:
            found[name] = _TABLES[name](content)
        else:
            network = name.removeprefix("cost-")
            found[name] = cost.cost_table(content)
            found[f"loops-{network}"] = loops.loops_table(content)
            found[f"planes-{network}"] = slices.planes_table(content)
        if name == "model":
            found["collectives"] = scale_report.collectives_table(content)
    return found


def draw(folder: Path) -> None:
    """Draws the parts on scale."""
    for name, content in report.summaries(folder).items():
        if name in _PICTURES:
            save(_PICTURES[name](content), folder / f"{name}.png")

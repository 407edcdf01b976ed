"""Every job goes on where it was killed: nothing that was measured is lost, and nothing is measured twice."""

import contextlib
import json
import math
import os
import pathlib
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.adaptive_norms import hessian_mass
from benchmarks.adaptive_norms import main as adaptive_norms
from benchmarks.adaptive_norms.trust_regions import BudgetTrainer
from benchmarks.comparison import main as compare
from benchmarks.core import data, kept
from benchmarks.core.kept import Kept
from benchmarks.core.training import Run, Trainer
from benchmarks.performance import cost, memory
from benchmarks.tso_alra import main as tso_alra
from benchmarks.tso_alra import peer, refresh, two_stages
from tests.benchmarks.test_two_stages import images

ROOT = pathlib.Path(__file__).parents[2]
KEY = {"setting": 0.1, "grid": (0.1, None)}
FOUND = {"loss": [1.0, math.nan], "steps": 3, "name": "one"}


def fail():
    raise AssertionError("It is measured again.")


def test_what_was_measured_is_read(tmp_path, capsys):
    first = Kept(tmp_path).get("run", KEY, lambda: FOUND | {"worst": math.inf})
    assert not capsys.readouterr().err
    second = Kept(tmp_path).get("run", KEY, fail)
    assert str(tmp_path) in capsys.readouterr().err
    for found in (first, second):
        np.testing.assert_equal(found, FOUND | {"worst": math.nan})  # JSON has neither
    assert len(list(tmp_path.rglob("*.*"))) == 1


def test_what_differs_is_measured_apart(tmp_path, monkeypatch):
    def get(name="run", key=KEY):
        return Kept(tmp_path).get(name, key, lambda: next(numbers))

    numbers = iter(range(10))
    measured = [get(), get("other"), get(key=KEY | {"setting": 0.2}), get(key=KEY | {"seed": 0})]
    monkeypatch.setattr(kept, "environment", lambda: {"jax": "another"})
    measured.append(get())
    monkeypatch.setattr(kept, "_source", lambda: "another")
    measured += [get(), get()]
    assert measured == [0, 1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("damage", ["cut", "", "[]", "{}", "another key"])
def test_a_damaged_file_is_replaced(tmp_path, damage):
    Kept(tmp_path).get("run", KEY, lambda: 1)
    (path,) = (tmp_path / "runs").iterdir()
    whole = path.read_text()
    damaged = {"cut": whole[:-9], "another key": json.dumps({"key": KEY, "result": 2})}
    path.write_text(damaged.get(damage, damage))
    assert Kept(tmp_path).get("run", KEY, lambda: 1) == 1
    assert path.read_text() == whole


class Killed(BaseException):
    """Stands for the signal."""


class Measured(list):
    """All that was measured, in order; the measurement after so many is killed."""

    fatal = None

    def check(self):
        if len(self) == self.fatal:
            raise Killed

    def note(self, *what):
        self.check()
        self.append(what)


def fake_run(method, setting, seed):
    """A run like any other; the first of the grid is not a number."""
    loss = math.nan if setting == method.grid[0] else setting + seed
    names = ("steps", "gradients", "epochs", "seconds", "test_loss", "test_accuracy", "progress")
    columns = {name: [1.0, 2.0] for name in names} | {"loss": [3.0, loss], "train_loss": [3.0, loss]}
    return Run(setting, seed, columns, columns)


def fake_training(monkeypatch, measured):
    def run(trainer, setting, seed, num_evaluations, report=None):
        measured.note(trainer.method.name, setting, seed, num_evaluations)
        return fake_run(trainer.method, setting, seed)

    for kind in (Trainer, BudgetTrainer):
        monkeypatch.setattr(kind, "run", run)
    for module, name in ((compare, "plot_curves"), (adaptive_norms, "plot_training"), (adaptive_norms, "plot_masses")):
        monkeypatch.setattr(module, name, lambda *_: None)


def fake_masses(monkeypatch, measured):
    def train(problem, step, seed):
        measured.note(seed)
        params = problem.task.init(jax.random.key(seed), problem.data.train)
        return hessian_mass.Checkpoints(params, params, params, 0.9, 10 * seed)

    fake_training(monkeypatch, measured)
    monkeypatch.setattr(hessian_mass, "train", train)
    mass = types.SimpleNamespace(mass=jnp.float32(0.25))
    monkeypatch.setattr(hessian_mass.optcurv, "diagonal_mass", lambda *_: mass)


def fake_costs(monkeypatch, measured):
    planes = {"num_images": 9, "seconds_per_point": 1.0, "throughput_ratio_quartiles": [1.0, math.nan, 3.0]}
    planes |= {"temporary_bytes": {"5x5": 7}, "forward_temporary_bytes": 6}
    figures = {"batch_size": 5, "forward_flops_ratio": 0.4, "rows": [], "loops": [], "planes": planes}
    monkeypatch.setattr(cost, "measure", lambda *what: measured.note(*what) or figures)
    row = {"method": "PAL", "limit": 2, "vectors": 1.5, "parameters": 9}
    monkeypatch.setattr(memory, "measure_memory", lambda: measured.note("memory") or [row])


def fake_data(monkeypatch):
    monkeypatch.setattr(data, "fashion_mnist", lambda folder: data.Dataset(images(1000), images(100, 1)))


def fake_refreshes(monkeypatch, measured):
    figures = dict.fromkeys(("average", "longest", "compile_seconds", "gradient_compile_seconds"), 1.0)
    figures["quiet"] = math.nan
    fake_data(monkeypatch)
    fake_training(monkeypatch, measured)
    monkeypatch.setattr(refresh, "measure_cost", lambda *what: measured.note(*what) or figures)
    monkeypatch.setattr(refresh, "measure_drift", lambda workload, *_: measured.note(workload, "drift") or 1.5)


def fake_sides(monkeypatch, measured):
    @contextlib.contextmanager
    def both_sides(python, arguments, *_):
        measured.check()  # none is started where nothing is left to measure

        def call(side):
            def train(method, seconds, setting):
                measured.note(*arguments.items(), side, method, seconds, *setting.items())
                return {"loss": sum(setting.values()), "steps": 3}

            return train

        yield {side: call(side) for side in peer.GRIDS}

    fake_data(monkeypatch)
    monkeypatch.setattr(peer, "make_environment", lambda folder: folder)
    monkeypatch.setattr(peer, "both_sides", both_sides)
    monkeypatch.setattr(peer, "measure_costs", lambda sides: measured.note("cost") or dict.fromkeys(sides, 1.5))


def fake_stages(monkeypatch, measured):
    def run(trainer, setting, seed, with_test):
        measured.note(trainer.family.name, *setting.items(), seed, with_test)
        names = ("epochs", "seconds", "train_loss", "validation_loss", "test_loss", "test_accuracy")
        return two_stages.Run(setting, seed, {name: [2.0, 1.0] for name in names})

    fake_data(monkeypatch)
    monkeypatch.setattr(two_stages.Trainer, "run", run)
    monkeypatch.setattr(tso_alra, "plot_stages", lambda *_: None)


JOBS = {
    "compare": (["--quick", "--seeds", "2"], fake_training, 7 * 8),
    "diagonal mass": (["adaptive-norms", "--quick", "--figure", "2"], fake_masses, 2),
    "trust regions": (["adaptive-norms", "--quick", "--figure", "3"], fake_training, 7 * 7),
    "cost": (["cost"], fake_costs, 3),
    "refreshes": (["tso-alra", "--quick", "--part", "cost"], fake_refreshes, 2 * 5),
    "stages": (["tso-alra", "--quick", "--part", "alexnet"], fake_stages, 4 * 2),
    "peer": (["tso-alra", "--peer", "kfac-jax"], fake_sides, 4 * 25),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_killed_job_goes_on(job, tmp_path, monkeypatch):
    options, fake, count = JOBS[job]
    measured = Measured()
    fake(monkeypatch, measured)

    def start(folder):
        assert main([*options, "--output", str(tmp_path / folder)]) == 0
        written = {path.name: path.read_text() for path in (tmp_path / folder).iterdir() if path.is_file()}
        return {name: text for name, text in written.items() if name.endswith((".json", ".txt"))}

    written, expected = start("whole"), list(measured)
    assert len(expected) == count
    measured.clear()
    for fatal in (1, count // 2 + 1):
        measured.fatal = min(fatal, count - 1)
        with pytest.raises(Killed):
            start("killed")
    measured.fatal = None
    assert start("killed") == written
    assert measured == expected
    measured.fatal = count
    assert start("killed") == written


# Two methods; the others would take long to compile.
PROGRAM = """
import sys
from benchmarks import __main__
from benchmarks.comparison import main as compare
compare.METHODS = compare.METHODS[:2]
sys.exit(__main__.main(sys.argv[1:]))
"""
NUM_RUNS = 2 * 7


def test_after_sigkill_the_next_start_goes_on(tmp_path):
    command = [sys.executable, "-c", PROGRAM, "--quick", "--output", str(tmp_path)]
    settings = {"cwd": ROOT, "env": os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}}

    def contents():
        return {path: (path.read_text(), path.stat().st_mtime_ns) for path in (tmp_path / "runs").glob("*.json")}

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, **settings) as process:
        try:
            while len(list((tmp_path / "runs").glob("*.json"))) < 2:
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            process.kill()
    before = contents()
    assert 2 <= len(before) < NUM_RUNS
    assert not (tmp_path / "results.json").exists()

    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, **settings)
    after = contents()
    assert len(after) == NUM_RUNS
    assert {path: after[path] for path in before} == before
    methods = json.loads((tmp_path / "results.json").read_text())["methods"]
    runs = [(name, run) for name, method in methods.items() for run in method["tuning"] + method["final"]]
    assert len({(name, run["setting"], run["seed"]) for name, run in runs}) == len(runs) == NUM_RUNS
    for text, _ in after.values():
        file = json.loads(text)
        assert (file["key"]["method"], file["result"]) in runs

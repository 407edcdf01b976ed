"""A job that was killed goes on where it was: nothing that was measured is lost, and nothing is measured twice."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from benchmarks import __main__
from benchmarks.comparison import main as comparison
from benchmarks.core.report import read_json
from benchmarks.core.train import Run, Trainer
from benchmarks.performance import main as performance
from benchmarks.tso_alra import main as tso_alra
from benchmarks.tso_alra import peer, refresh
from tests.benchmarks.pictures import images

ROOT = pathlib.Path(__file__).parents[2]


class Killed(BaseException):
    """Stands for the signal."""


class Measured(list):
    """All that was measured, in order; the measurement after so many is killed."""

    fatal = None

    def note(self, *what):
        if len(self) == self.fatal:
            raise Killed
        self.append(what)


def fake_training(monkeypatch, measured):
    """Runs like any other, whose loss depends on setting and seed."""

    def run(trainer, setting, seed, stops, evaluate=None, at_every_stop=True, start=None):
        measured.note(trainer.method.name, *setting.items(), seed)
        names = ("steps", "gradients", "epochs", "seconds", "loss", "train_loss", "validation_loss")
        names += ("test_loss", "test_accuracy", "progress")
        curve = {name: [2.0, 1.0 + seed / 100 + sum(setting.values())] for name in names}
        return Run(dict(setting), seed, curve, {name: column[-1] for name, column in curve.items()})

    monkeypatch.setattr(Trainer, "run", run)
    dataset = comparison.data.Dataset(images(1000), images(9))
    monkeypatch.setattr(comparison.data, "fashion_mnist", lambda folder: dataset)


def fake_costs(monkeypatch, measured):
    planes = {"num_images": 9, "seconds_per_point": 1.0, "throughput_ratio_quartiles": [1.0, 2.0, 3.0]}
    planes |= {"temporary_bytes": {"5x5": 7}, "forward_temporary_bytes": 6}
    row = {"method": "PAL", "floor": 1, "flops_ratio": 1, "seconds_ratio_quartiles": [1, 2, 3], "seconds": 1}
    row |= {"temporary_bytes": 5, "compile_seconds": 1.0}
    loop = {"curvature": "Hessian", "ratio_quartiles": [1, 2, 3]}
    loop |= dict.fromkeys(("looped_seconds", "unrolled_seconds", "compile_seconds", "gradient_compile_seconds"), 1.0)
    figures = {"batch_size": 5, "forward_flops_ratio": 0.4, "rows": [row], "loops": [loop], "planes": planes}
    monkeypatch.setattr(performance.cost, "measure", lambda task, rounds: measured.note(task.batch_size) or figures)


def fake_refreshes(monkeypatch, measured):
    figures = dict.fromkeys(("quiet", "average", "longest", "compile_seconds", "gradient_compile_seconds"), 1.0)
    fake_training(monkeypatch, measured)
    monkeypatch.setattr(refresh, "measure_cost", lambda *what: measured.note("cost") or figures)
    monkeypatch.setattr(refresh, "measure_drift", lambda *_: measured.note("drift") or 1.5)


def fake_sides(monkeypatch, measured):
    class Sides:
        """Both sides, started only where something is left to measure."""

        def __init__(self, python, arguments, *_):
            self.arguments = arguments

        def __enter__(self):
            if len(measured) == measured.fatal:
                raise Killed
            return {side: lambda *call, side=side: self.train(side, *call) for side in peer.GRIDS}

        def __exit__(self, *_):
            pass

        def train(self, side, method, seconds, setting):
            measured.note(*self.arguments.items(), side, method, seconds, *setting.items())
            return {"loss": sum(setting.values()), "steps": 3}

    fake_training(monkeypatch, measured)
    monkeypatch.setattr(peer, "make_environment", lambda folder: folder)
    monkeypatch.setattr(peer, "both_sides", Sides)
    monkeypatch.setattr(peer, "measure_costs", lambda sides: measured.note("cost") or dict.fromkeys(sides, 1.5))


JOBS = {
    "comparison": (["--quick", "--seeds", "2"], fake_training, 7 * 8),
    "trust regions": (["adaptive-norms", "--quick", "--figure", "3"], fake_training, 7 * 7),
    "cost": (["performance", "--part", "cost"], fake_costs, 2),
    "refreshes": (["tso-alra", "--quick", "--part", "cost"], fake_refreshes, 1 + 3 + 1),
    "stages": (["tso-alra", "--quick", "--part", "alexnet"], fake_training, 4 * 2),
    "peer": (["tso-alra", "--part", "peer"], fake_sides, 4 * 25),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_killed_job_goes_on(job, tmp_path, monkeypatch):
    options, fake, count = JOBS[job]
    measured = Measured()
    fake(monkeypatch, measured)
    monkeypatch.setattr(comparison, "draw", lambda folder: None)
    for study in (comparison, tso_alra, __main__.studies()["adaptive_norms"]):
        monkeypatch.setattr(study, "draw", lambda folder: None)

    def start(folder):
        assert __main__.main([*options, "--output", str(tmp_path / folder)]) == 0
        return {path.name: path.read_text() for path in (tmp_path / folder).iterdir() if path.is_file()}

    written, expected = start("whole"), list(measured)
    assert len(expected) == count
    measured.clear()
    for fatal in (1, len(expected) // 2 + 1):
        measured.fatal = min(fatal, len(expected) - 1)
        with pytest.raises(Killed):
            start("killed")
    measured.fatal = None
    assert start("killed") == written
    assert measured == expected
    measured.fatal = len(expected)
    assert start("killed") == written


# Two methods; the others would take long to compile.
PROGRAM = """
import sys
from benchmarks import __main__
from benchmarks.comparison import main as comparison
comparison.METHODS = comparison.METHODS[:2]
sys.exit(__main__.main(sys.argv[1:]))
"""
NUM_RUNS = 2 * 7


def test_after_sigkill_the_next_start_goes_on(tmp_path):
    command = [sys.executable, "-c", PROGRAM, "--quick", "--output", str(tmp_path)]
    settings = {"cwd": ROOT, "env": os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}}

    def runs():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("output.pkl")}

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, **settings) as process:
        try:
            while len(runs()) < 2:
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            process.kill()
    before = runs()
    assert 2 <= len(before) < NUM_RUNS
    assert not (tmp_path / "digits-mlp.json").exists()

    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, **settings)
    after = runs()
    assert len(after) == NUM_RUNS
    assert {path: after[path] for path in before} == before
    assert [one["method"] for one in read_json(tmp_path / "digits-mlp.json")["methods"]] == ["SGD-momentum", "Adam"]

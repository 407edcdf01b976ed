"""The benchmarks: data files, tuning, the main job end to end, what an interrupt leaves, the cost of steps."""

import dataclasses
import gzip
import json
import math
import struct

import jax
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.comparison import main as compare
from benchmarks.core import data, methods, training
from benchmarks.core.models import Mlp, Task, classification_loss
from benchmarks.performance import cost, loops, memory, precision

PNG = b"\x89PNG"


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion_folder(tmp_path):
    """A data set of six and four images, half of its files compressed."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 6), ("t10k", 4)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count, dtype=np.uint8)))
    return tmp_path


def test_fashion_mnist_reads_compressed_and_plain_files(fashion_folder):
    train, test = data.fashion_mnist(fashion_folder)
    raw = data.read_idx(fashion_folder / "train-images-idx3-ubyte.gz")
    assert train.images.shape == (6, 28, 28, 1)
    np.testing.assert_allclose(train.images[..., 0] * 255, raw, rtol=1e-6)
    np.testing.assert_array_equal(test.labels, np.arange(4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x0d\x01" + bytes(8), "no IDX file of unsigned bytes: it starts with 00 00 0d 01"),
        (b"<html>", "no IDX file"),
        (b"", "no IDX file"),
        (b"\x00\x00\x08\x03" + bytes(4), "ends within its header"),
        (idx_bytes(np.arange(9, dtype=np.uint8))[:-1], r"8 bytes of data where shape \(9,\)"),
    ],
)
def test_read_idx_refuses_other_files(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.read_idx(tmp_path / "file")


def test_read_idx_refuses_a_truncated_archive(tmp_path):
    (tmp_path / "file.gz").write_bytes(gzip.compress(bytes(range(256)) * 9)[:-20])
    with pytest.raises(data.DataError, match="damaged"):
        data.read_idx(tmp_path / "file.gz")


def test_images_without_as_many_labels_are_refused(fashion_folder):
    (fashion_folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(3, dtype=np.uint8)))
    with pytest.raises(data.DataError, match="do not match"):
        data.fashion_mnist(fashion_folder)


def test_a_missing_file_says_where_to_get_it(tmp_path, capsys):
    assert main(["--dataset", "fashion-mnist", "--data-dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    for hint in ("train-images-idx3-ubyte", str(tmp_path), "dataset-fashion-mnist", "--data-dir", "OPTCURV_DATA"):
        assert hint in message


def test_the_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTCURV_DATA", str(tmp_path))
    assert data.default_folder() == tmp_path
    monkeypatch.delenv("OPTCURV_DATA")
    assert data.default_folder() == data.DEBIAN_FOLDER


def fake_run(setting, train_loss, seed=0):
    return training.Run(setting, seed, {"loss": [train_loss]}, {"train_loss": [9.0, train_loss]})


@pytest.mark.parametrize(
    ("losses", "best", "on_edge"),
    [((3.0, 1.0, 2.0), 0.2, False), ((1.0, 2.0, math.nan), 0.1, True), ((math.nan, math.inf, 5.0), 0.3, True)],
)
def test_tuning_picks_the_least_final_loss(losses, best, on_edge):
    method = dataclasses.replace(methods.METHODS[0], grid=(0.1, 0.2, 0.3))
    result = compare.Result(method, [fake_run(*pair) for pair in zip(method.grid, losses, strict=True)])
    assert (result.best.setting, result.on_edge) == (best, on_edge)
    assert result.shown == [result.best]
    result.final = [fake_run(best, 1.0, seed=1), fake_run(best, 2.0, seed=2)]
    assert result.summary("train_loss") == pytest.approx((1.5, math.sqrt(0.5)))


@pytest.fixture
def few_methods(monkeypatch):
    """SGD and EDF-G, three and two settings each."""
    sgd, edf = methods.METHODS[0], methods.METHODS[3]
    few = (dataclasses.replace(sgd, grid=(1e-9, 1e-2, 1e30)), dataclasses.replace(edf, grid=(0.5, 1.0)))
    monkeypatch.setattr(compare, "METHODS", few)
    return few


@pytest.fixture
def tiny_problem(few_methods):
    del few_methods
    task = Task(Mlp(hidden=(8,)), classification_loss, has_accuracy=True)
    return training.Problem(task, data.digits(), batch_size=100, budget=14.0)


def test_a_budget_buys_fewer_of_the_dearer_steps(tiny_problem, few_methods):
    assert [tiny_problem.num_steps(method) for method in few_methods] == [14, 6]
    order = tiny_problem.batch_indices(seed=3, num_steps=20)
    np.testing.assert_array_equal(order[:6], tiny_problem.batch_indices(seed=3, num_steps=6))
    assert len(np.unique(order[:14])) == 1400  # an epoch shows no image twice
    assert not np.array_equal(order, tiny_problem.batch_indices(seed=4, num_steps=20))


def test_one_run(tiny_problem, few_methods):
    sgd = few_methods[0]
    reports = []
    trainer = training.Trainer(tiny_problem, sgd)
    run = trainer.run(0.1, seed=1, num_evaluations=4, report=lambda *pair: reports.append(pair))
    assert run.curve["steps"] == list(range(1, 15))
    assert run.curve["gradients"][-1] == sum(gradients for gradients, _ in reports) == 14
    assert run.curve["loss"][-1] < run.curve["loss"][0]
    assert all(np.diff(run.curve["seconds"]) > 0)
    assert run.evaluations["steps"] == [4, 7, 11, 14]
    assert run.final("train_loss") < run.evaluations["train_loss"][0]
    assert 0.2 < run.final("test_accuracy") <= 1
    still = trainer.run(
        1e-9, seed=1, num_evaluations=1, report=lambda *pair: None
    )  # the setting reaches the compiled step
    assert still.evaluations["steps"] == [14]
    assert still.curve["loss"][0] == pytest.approx(run.curve["loss"][0], rel=1e-5)
    assert still.final("train_loss") == pytest.approx(math.log(10), rel=0.2)


def test_the_main_job_writes_table_json_and_picture(tmp_path, few_methods, capsys):
    options = ["--budget", "1", "--seeds", "2", "--output", str(tmp_path)]
    assert main(options) == 0
    assert "SGD-momentum" in capsys.readouterr().out
    content = json.loads((tmp_path / "results.json").read_text())
    sgd = content["methods"]["SGD-momentum"]
    assert (sgd["best_setting"], sgd["best_on_edge"]) == (1e-2, False)
    assert [run["setting"] for run in sgd["tuning"]] == [1e-9, 1e-2, 1e30]
    assert [(run["setting"], run["seed"]) for run in sgd["final"]] == [(1e-2, 1), (1e-2, 2)]
    assert sgd["tuning"][2]["evaluations"]["train_loss"] == [None]  # diverged; JSON has no NaN
    assert content["methods"]["EDF-G k=1"]["best_on_edge"]
    assert content["environment"]["jax"] == jax.__version__
    assert not content["interrupted"]
    assert "(edge)" in (tmp_path / "results.txt").read_text()
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_a_batch_that_is_the_training_set_gets_the_full_batch_methods(tmp_path, monkeypatch, few_methods):
    del few_methods
    sgd, edf = methods.FULL_BATCH_METHODS[0], methods.FULL_BATCH_METHODS[3]
    few = (dataclasses.replace(sgd, grid=(0.1,)), dataclasses.replace(edf, grid=(0.5,)))
    monkeypatch.setattr(compare, "FULL_BATCH_METHODS", few)
    options = ["--batch-size", "1437", "--budget", "5", "--seeds", "1", "--output", str(tmp_path)]
    assert main(options) == 0
    measured = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert list(measured) == ["SGD-momentum", "EDF-G k=1, W2"]
    assert measured["EDF-G k=1, W2"]["final"][0]["curve"]["steps"][-1] == 2


@pytest.mark.parametrize(
    ("runs_before", "shown"),
    [(0, []), (2, ["SGD-momentum"]), (5, ["SGD-momentum"]), (6, ["SGD-momentum", "EDF-G k=1"])],
)
def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch, few_methods, runs_before, shown):
    del few_methods
    complete = []

    def run(trainer, setting, seed, num_evaluations, report):
        del trainer, num_evaluations, report
        if len(complete) == runs_before:
            raise KeyboardInterrupt
        axes = {"steps": [1.0, 2.0], "gradients": [1.0, 2.0], "seconds": [0.1, 0.2]}
        figures = {"train_loss": [3.0, setting], "test_loss": [3.0, 2.0], "test_accuracy": [0.1, 0.2]}
        complete.append(training.Run(setting, seed, axes | {"loss": [3.0, 2.0]}, axes | figures))
        return complete[-1]

    monkeypatch.setattr(training.Trainer, "run", run)
    assert main(["--output", str(tmp_path), "--seeds", "2"]) == 130
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["interrupted"]
    assert list(content["methods"]) == shown
    kept = [run for method in content["methods"].values() for run in method["tuning"] + method["final"]]
    assert len(kept) == runs_before
    assert (tmp_path / "curves.png").exists() == bool(shown)
    if shown:
        assert ("(tuning)" in (tmp_path / "results.txt").read_text()) == (runs_before in (2, 6))


@pytest.mark.parametrize("option", [["--budget", "0"], ["--seeds", "0"], ["--batch-size", "0"], ["--budget", "nan"]])
def test_options_out_of_range_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        main(option)
    assert option[0] in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused(capsys):
    assert main(["--batch-size", "2000"]) == 2
    assert "1437" in capsys.readouterr().err


def test_cost_of_a_small_network(tmp_path, monkeypatch, few_methods, capsys):
    monkeypatch.setattr(cost, "METHODS", few_methods)
    task = Task(Mlp(hidden=(64, 64)), classification_loss, has_accuracy=True)
    # At 32 images the guards against spikes, a few operations a parameter, are 6 % of Runge-Kutta's two gradients.
    monkeypatch.setitem(cost.WORKLOADS, "mlp", cost.Workload(task, batch_size=64))
    monkeypatch.setattr(cost, "NUM_IMAGES", 500)
    monkeypatch.setattr(loops, "NUM_COMPILES", 1)
    monkeypatch.setattr(loops, "CURVATURES", {"Hessian": loops.CURVATURES["Hessian"]})
    monkeypatch.setattr(memory, "TASK", task)
    monkeypatch.setattr(memory, "LIMITS", {"PAL": memory.LIMITS["PAL"]})
    assert main(["cost", "--model", "mlp", "--rounds", "2", "--output", str(tmp_path)]) == 0
    assert "EDF-G k=1" in capsys.readouterr().out
    figures = json.loads((tmp_path / "cost.json").read_text())["cost"]["mlp"]
    gradient, sgd, edf, runge_kutta, steihaug, lanczos = figures["rows"]
    assert gradient["flops_ratio"] == 1
    assert gradient["seconds_ratio_quartiles"] == [1, 1, 1]
    assert 1 < sgd["flops_ratio"] < runge_kutta["flops_ratio"] < edf["flops_ratio"] < 3
    assert runge_kutta["flops_ratio"] == pytest.approx(runge_kutta["floor"], rel=0.05)
    assert 1 / 3 < figures["forward_flops_ratio"] < 1 / 2
    # Four products each, all but one of them beyond XLA's count of a loop: of 4/3 and of 2 gradients, or less.
    assert 4 < steihaug["flops_ratio"] < 1.2 * steihaug["floor"] == pytest.approx(8)
    assert 6 < lanczos["flops_ratio"] < 1.2 * lanczos["floor"] == pytest.approx(11.2)
    assert edf["seconds_ratio_quartiles"] == sorted(edf["seconds_ratio_quartiles"])
    assert min(row["temporary_bytes"] for row in figures["rows"]) > 0
    assert "EDF-G k=1" in (tmp_path / "cost-mlp.txt").read_text()
    assert [row["curvature"] for row in figures["loops"]] == ["Hessian"]
    assert "ms in the CG loop" in (tmp_path / "loops-mlp.txt").read_text()
    assert "PAL" in (tmp_path / "memory.txt").read_text()
    planes = figures["planes"]
    of_planes = planes["temporary_bytes"]
    assert planes["forward_temporary_bytes"] > 4 * 64 * 500  # a layer's activations
    one_point = planes["forward_temporary_bytes"] + 4 * 60_000  # the parameters there
    assert of_planes["9x9"] == pytest.approx(of_planes["5x5"], rel=0.01)
    assert of_planes["9x9"] < 1.1 * one_point
    assert planes["throughput_ratio_quartiles"] == sorted(planes["throughput_ratio_quartiles"])
    assert "500 images" in (tmp_path / "planes-mlp.txt").read_text()


@pytest.mark.parametrize("name", ["PAL", "SGD-RK2", "EDF-G k=8", "TR Steihaug H"])
def test_steps_keep_to_their_memory(name, monkeypatch):
    """Counted by XLA, in vectors of parameters; much the same for a network of ten million."""
    monkeypatch.setattr(memory, "TASK", Task(Mlp(hidden=(400, 400)), classification_loss, has_accuracy=True))
    monkeypatch.setattr(memory, "LIMITS", {name: memory.LIMITS[name]})
    (row,) = memory.measure_memory()
    assert 0.5 < row["vectors"] <= row["limit"]
    assert "within" in str([list(column.cells) for column in memory.memory_table([row]).columns])


def test_precision_compares_accuracies(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "RUNS", precision.RUNS[:1])
    assert main(["precision", "--quick", "--output", str(tmp_path)]) == 0
    accuracies = json.loads((tmp_path / "precision.json").read_text())["accuracies"]["SGD-momentum"]
    assert [len(accuracies[dtype]) for dtype in ("float32", "bfloat16")] == [1, 1]
    assert accuracies["float32"] != accuracies["bfloat16"]
    assert "SGD-momentum" in (tmp_path / "precision.txt").read_text()


@pytest.mark.parametrize(("lost", "verdict"), [(0.005, "yes"), (0.02, "no")])
def test_a_loss_of_accuracy_is_told(lost, verdict):
    table = precision.precision_table({"SGD": {"float32": [0.9, 0.95], "bfloat16": [0.9 - lost, 0.95 - lost]}}, 10)
    assert list(table.columns[-1].cells) == [verdict]

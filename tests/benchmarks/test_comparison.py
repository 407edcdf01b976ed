"""The comparison end to end, and what it refuses."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.comparison import main as comparison
from benchmarks.core import methods
from benchmarks.core.report import read_json


@pytest.fixture
def few_methods(monkeypatch):
    """SGD and EDF-G, three and two settings each."""
    sgd, edf = methods.METHODS[0], methods.METHODS[3]
    few = (sgd.at(grid={"learning rate": (1e-9, 1e-2, 1e30)}), edf.at(grid={"learning rate": (0.5, 1.0)}))
    monkeypatch.setattr(comparison, "METHODS", few)
    return few


def test_the_main_job_writes_summary_table_and_picture(tmp_path, few_methods, capsys):
    del few_methods
    assert main(["--budget", "1", "--seeds", "2", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "digits-mlp.md").read_text() in printed
    assert "(edge)" in printed
    content = read_json(tmp_path / "digits-mlp.json")
    sgd, edf = content["methods"]
    assert [sgd["setting"], edf["setting"]] == ["learning rate 0.01", "learning rate 1 (edge)"]
    assert [len(one["figures"]["train_loss"]) for one in (sgd, edf)] == [2, 2]
    assert sgd["curve"]["gradients"][-1] == content["budget"] == 11
    assert edf["curve"]["steps"][-1] == 4
    low, mean, high = (sgd["curve"][name][-1] for name in ("least", "mean", "most"))
    assert low < mean < high
    assert content["environment"]["jax"]
    assert (tmp_path / "digits-mlp.png").read_bytes().startswith(b"\x89PNG")


def test_a_batch_that_is_the_training_set_gets_the_full_batch_methods(tmp_path, monkeypatch):
    few = [methods.FULL_BATCH_METHODS[i].at(grid={"learning rate": (0.5,)}) for i in (0, 3)]
    monkeypatch.setattr(comparison, "FULL_BATCH_METHODS", few)
    options = ["--batch-size", "1437", "--budget", "5", "--seeds", "1", "--output", str(tmp_path)]
    assert main(options) == 0
    measured = json.loads((tmp_path / "digits-mlp-full-batch.json").read_text())["methods"]
    assert [one["method"] for one in measured] == ["SGD-momentum", "EDF-G k=1, W2"]
    assert measured[1]["curve"]["steps"][-1] == 2


@pytest.mark.parametrize("option", [["--budget", "0"], ["--seeds", "0"], ["--batch-size", "0"], ["--budget", "nan"]])
def test_options_out_of_range_are_refused(option, capsys):
    assert main(option) == 2
    assert option[0] in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused(capsys):
    assert main(["--batch-size", "2000"]) == 2
    assert "1437" in capsys.readouterr().err

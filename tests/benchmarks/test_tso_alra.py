"""The two-stage experiments: data kept apart, figures of a run, verdicts, refreshing, the peer, the command."""

import math

import jax
import numpy as np
import optax
import pytest

import optcurv
from benchmarks.__main__ import main
from benchmarks.core.data import Dataset
from benchmarks.core.methods import Method
from benchmarks.core.models import Mlp, classification_loss
from benchmarks.core.report import read_json
from benchmarks.core.statistics import Verdict
from benchmarks.core.train import Run, Trainer
from benchmarks.core.tune import Result
from benchmarks.tso_alra import main as tso_alra
from benchmarks.tso_alra import peer, refresh, stages
from benchmarks.tso_alra.methods import make_methods, quick_methods, rate_factor
from benchmarks.tso_alra.networks import NETWORKS
from tests.benchmarks.pictures import images, write_fashion_mnist


def run_of(test_losses, seed=0):
    curve = {"epochs": list(range(1, len(test_losses) + 1)), "test_loss": test_losses, "test_accuracy": [0.9]}
    return Run({}, seed, curve, {name: column[-1] for name, column in curve.items()})


def test_figures_of_a_run():
    run = run_of([2.0, 1.0, 0.5, 0.6])
    assert stages.rise(run) == pytest.approx(0.2)
    assert stages.epochs_to(run, 1.0) == 2
    assert stages.epochs_to(run, 0.1) == math.inf


def results_of(losses):
    methods = {method.name: method for method in make_methods(10)}
    return [
        Result(methods[name], [], [run_of([curve[0], curve[1] + 1e-3 * seed], seed) for seed in range(5)])
        for name, curve in losses.items()
    ]


def test_verdicts():
    losses = dict.fromkeys(("SGD", "AMSGrad"), (1.0, 0.5)) | {"Adam": (0.2, 0.3)}
    losses |= {"TSO-ALRA": (0.45, 0.4), "bounded TSO-ALRA": (0.45, 0.46), "bounded, never switching": (0.45, 0.48)}
    claims = {claim.text: claim.verdict for claim in stages.judge("net", results_of(losses))}
    assert claims["net: TSO-ALRA reduces the test loss faster than SGD."] == Verdict.HOLDS
    assert claims["net: TSO-ALRA reduces the test loss faster than Adam."] == Verdict.UNDECIDED
    assert claims["net: TSO-ALRA ends with a lower test loss than AMSGrad."] == Verdict.HOLDS
    assert claims["net: TSO-ALRA ends with a lower test loss than Adam."] == Verdict.FAILS
    assert claims["net: TSO-ALRA has a test loss that does not rise late."] == Verdict.HOLDS
    assert claims["net: bounded TSO-ALRA has a test loss that does not rise late."] == Verdict.FAILS
    assert claims["net: bounded TSO-ALRA ends with a lower test loss than bounded, never switching."] == Verdict.HOLDS


def test_validation_images_are_not_trained_on():
    task = stages.make_task(Dataset(images(300), images(10, 1)), Mlp(hidden=(8,)), 200)
    assert (len(task.data.train.labels), len(task.data.validation.labels)) == (200, 40)
    rows = {picture.tobytes() for picture in np.asarray(task.data.train.images)}
    assert rows.isdisjoint(picture.tobytes() for picture in np.asarray(task.data.validation.images))


def test_rate_falls_after_half_and_three_quarters():
    factors = [float(rate_factor(count, 40)) for count in (0, 19, 20, 29, 30, 39)]
    np.testing.assert_allclose(factors, [1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("name", ["SGD", "TSO-ALRA"])
def test_methods_learn_and_switch_where_they_are_told(name):
    task = stages.make_task(Dataset(images(1000), images(100, 1)), Mlp(hidden=(16,)), 512)
    (method,) = (method for method in make_methods(4 * task.steps_per_epoch) if method.name == name)
    setting = {"learning rate": 0.1} | ({"switch at": 0.5} if name == "TSO-ALRA" else {})
    trainer = Trainer(task, method)
    run = stages.train(trainer, setting, 1, 4)
    assert run.curve["test_loss"][-1] < run.curve["test_loss"][0] < 3
    assert "test_loss" not in stages.train(trainer, setting, 0, 1).curve  # by which a setting may be picked
    if name == "TSO-ALRA":
        params = task.init(jax.random.key(0))
        state, stream, found = (params, trainer._init(params, setting)), task.batches(0), []
        for _ in range(16):
            state, _ = trainer._step(state, task.data.train, next(stream), setting, np.float32(np.nan))
            found.append(int(optcurv.diagnostics(state[1])["switch/stage"]))
        assert found == [0] * 8 + [1] * 8


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("name", ["alexnet", "vgg"])
def test_layers_of_the_networks_are_found(size, name):
    network, batch = NETWORKS[size][name], images(2)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), batch.images))["params"]
    loss = lambda p: classification_loss(network.apply({"params": p}, batch.images), batch)  # noqa: E731
    found = optcurv.layers(loss, params)
    assert not found.others
    assert len(found.found) == (8 if name == "alexnet" else 7 if size == "small" else 13)


def test_command_writes_summary_tables_and_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS["small"], "alexnet", Mlp(hidden=(16,)))
    folder = write_fashion_mnist(tmp_path / "data")
    options = ["tso-alra", "--part", "alexnet", "--quick", "--data-dir", str(folder), "--output", str(tmp_path / "out")]
    assert main(options) == 0
    content = read_json(tmp_path / "out" / "alexnet.json")
    assert {method.name for method in quick_methods(10)} == content["methods"].keys()
    assert len(content["claims"]) == 7
    assert {"alexnet.md", "claims-alexnet.md", "alexnet.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_refreshes_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(refresh, "measure_cost", cost_of)
    monkeypatch.setattr(refresh, "measure_drift", lambda *_: 1.5)
    monkeypatch.setattr(tso_alra, "workloads", lambda: {"mlp": peer.make_task("cnn", images(300))})
    monkeypatch.setattr(
        refresh, "make_method", lambda schedule: Method("SGD", optax.sgd, {"learning rate": (0.1, 0.2)})
    )
    folder = write_fashion_mnist(tmp_path / "data", 200, 20)
    options = ["tso-alra", "--part", "cost", "--quick", "--data-dir", str(folder), "--output", str(tmp_path / "out")]
    assert main(options) == 0
    content = read_json(tmp_path / "out" / "refresh-mlp.json")
    assert content["drift"] == 1.5
    assert content["rows"]["defaults"]["learning_rate"] == 0.2
    assert "| - " in (tmp_path / "out" / "refresh-mlp.md").read_text().replace("  ", "")  # no quiet step


def cost_of(task, schedule):
    del task, schedule
    figures = dict.fromkeys(("average", "longest", "compile_seconds", "gradient_compile_seconds"), 1.0)
    return figures | {"quiet": math.nan}


@pytest.fixture
def peer_data(tmp_path):
    batch, order = images(200), np.random.default_rng(0).integers(0, 200, (20, 64))
    np.savez(tmp_path / "data.npz", images=batch.images, labels=batch.labels, order=order)
    return str(tmp_path / "data.npz")


def test_sides_of_the_peer_comparison_step_and_learn(peer_data):
    side = peer.OptcurvSide("cnn", -0.5, factor_every=2, root_every=4, data=peer_data)
    setting = {"learning rate": 0.1, "damping": 1e-2}
    untrained = side.train(0.0, setting)
    assert untrained["steps"] == 0
    state = side.start()
    for count in range(40):
        state = side.step(state, count, setting)
    assert float(side._loss(state[0], side.images, side.labels)) < 0.5 * untrained["loss"]
    assert side.gradient_seconds(2) > 0
    side.step_seconds(3, setting)
    side.step_seconds(2, setting)
    assert int(side._stepping[1][0].count) == 5  # the clock's steps go on from one another


def test_costs_are_multiples_of_each_sides_own_gradient_step():
    speeds = {"optcurv": (1.0, 2.0), "kfac-jax": (3.0, 12.0)}

    def call(name):
        return lambda method, steps, *_: steps * speeds[name][method == "step_seconds"]

    assert peer.measure_costs({name: call(name) for name in speeds}) == {"optcurv": 2.0, "kfac-jax": 4.0}


def test_tuning_keeps_the_least_finite_loss():
    losses = {0.1: 2.0, 0.2: 1.0, 0.3: math.nan}
    call = lambda method, seconds, setting: {"loss": losses[setting["learning rate"]], "steps": 3}  # noqa: E731
    best = peer.best_of(call, {"learning rate": tuple(losses)}, 1.0, lambda text: None)
    assert best == {"setting": {"learning rate": 0.2}, "loss": 1.0, "steps": 3}


def test_an_environment_made_before_is_used_again(tmp_path):
    (tmp_path / "complete").touch()
    assert peer.make_environment(tmp_path) == tmp_path / "bin" / "python"


def test_the_end_of_the_other_side_is_told(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nread line\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="side ended"), peer.kfac_side(python, {}):
        pass

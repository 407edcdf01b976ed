"""The two-stage experiments: data kept apart, figures of a run, verdicts, and the command end to end."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optcurv
from benchmarks.__main__ import main
from benchmarks.core.claims import Verdict
from benchmarks.core.data import Dataset
from benchmarks.core.kept import Kept
from benchmarks.core.models import Batch, Mlp, classification_loss
from benchmarks.tso_alra import peer, refresh, two_stages
from tests.benchmarks.test_commands import idx_bytes


def images(count, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    pictures = rng.uniform(0, 0.3, (count, 28, 28, 1))
    pictures[np.arange(count), labels] += 0.7  # a bright row tells the class
    return Batch(jnp.asarray(pictures, jnp.float32), jnp.asarray(labels, jnp.int32))


def run_of(test_losses, seed=0):
    evaluations = {"epochs": list(range(1, len(test_losses) + 1)), "test_loss": test_losses, "test_accuracy": [0.9]}
    return two_stages.Run({}, seed, evaluations)


def test_figures_of_a_run():
    run = run_of([2.0, 1.0, 0.5, 0.6])
    assert run.rise() == pytest.approx(0.2)
    assert run.epochs_to(1.0) == 2
    assert run.epochs_to(0.1) == math.inf


def results_of(losses):
    families = {family.name: family for family in two_stages.FAMILIES}
    return [
        two_stages.Result(families[name], [], [run_of([curve[0], curve[1] + 1e-3 * seed], seed) for seed in range(5)])
        for name, curve in losses.items()
    ]


def test_verdicts():
    losses = dict.fromkeys(("SGD", "AMSGrad"), (1.0, 0.5)) | {"Adam": (0.2, 0.3)}
    losses |= {"TSO-ALRA": (0.45, 0.4), "bounded TSO-ALRA": (0.45, 0.46), "bounded, never switching": (0.45, 0.48)}
    claims = {claim.text: claim.verdict for claim in two_stages.judge("net", results_of(losses))}
    assert claims["net: TSO-ALRA reduces the test loss faster than SGD."] == Verdict.HOLDS
    assert claims["net: TSO-ALRA reduces the test loss faster than Adam."] == Verdict.UNDECIDED
    assert claims["net: TSO-ALRA ends with a lower test loss than AMSGrad."] == Verdict.HOLDS
    assert claims["net: TSO-ALRA ends with a lower test loss than Adam."] == Verdict.FAILS
    assert claims["net: TSO-ALRA has a test loss that does not rise late."] == Verdict.HOLDS
    assert claims["net: bounded TSO-ALRA has a test loss that does not rise late."] == Verdict.FAILS
    assert claims["net: bounded TSO-ALRA ends with a lower test loss than bounded, never switching."] == Verdict.HOLDS


def test_validation_images_are_not_trained_on():
    everything = images(300)
    problem = two_stages.make_problem(Dataset(everything, images(10, 1)), Mlp(hidden=(8,)), 200, 3)
    assert len(problem.train.labels) == 200
    assert len(problem.validation.labels) == 40
    rows = {picture.tobytes() for picture in np.asarray(problem.train.images)}
    assert rows.isdisjoint(picture.tobytes() for picture in np.asarray(problem.validation.images))


def test_rate_falls_after_half_and_three_quarters():
    problem = two_stages.Problem(None, images(1280), None, None, num_epochs=4)
    factors = [float(problem.factor(count)) for count in (0, 19, 20, 29, 30, 39)]
    np.testing.assert_allclose(factors, [1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("name", ["SGD", "TSO-ALRA"])
def test_families_learn_and_switch_where_they_are_told(name):
    (family,) = [family for family in two_stages.FAMILIES if family.name == name]
    problem = two_stages.make_problem(Dataset(images(1000), images(100, 1)), Mlp(hidden=(16,)), 512, 4)
    trainer = two_stages.Trainer(problem, family)
    run = trainer.run({"learning rate": 0.1, "switch at": 0.5}, seed=1)
    assert run.evaluations["test_loss"][-1] < run.evaluations["test_loss"][0] < 3
    assert "test_loss" not in trainer.run({"learning rate": 0.1, "switch at": 0.5}, 1, with_test=False).evaluations
    if name == "TSO-ALRA":
        state = trainer._init(jax.random.key(0), {"learning rate": 0.1, "switch at": 0.5})
        stages = []
        for _ in range(problem.num_steps):
            state, _ = trainer._step(
                state, np.arange(two_stages.BATCH_SIZE), {"learning rate": 0.1, "switch at": 0.5}, jnp.nan
            )
            stages.append(int(optcurv.diagnostics(state[1])["switch/stage"]))
        assert stages == [0] * 8 + [1] * 8


def test_runs_found_are_kept(tmp_path, monkeypatch):
    problem = two_stages.make_problem(Dataset(images(1000), images(100, 1)), Mlp(hidden=(16,)), 256, 2)
    one, other = (two_stages.Family("SGD", {"learning rate": rates}, two_stages._sgd) for rates in ((0.1,), (0.2,)))
    path, told, kept = tmp_path / "net.json", [], Kept(tmp_path)
    (first,) = two_stages.measure(problem, [one], 1, path, kept, told.append)
    assert len(told) == 2  # one setting, one seed
    monkeypatch.setattr(two_stages, "Trainer", None)
    (second,) = two_stages.measure(problem, [one], 1, path, kept, told.append)
    assert second == first
    assert len(told) == 4
    with pytest.raises(TypeError):  # it would measure another grid, or more seeds
        two_stages.measure(problem, [other], 1, path, kept, told.append)
    with pytest.raises(TypeError):
        two_stages.measure(problem, [one], 2, path, kept, told.append)


def test_rates_are_tuned_beyond_the_grid_and_the_edge_is_marked(tmp_path, monkeypatch):
    class Trainer:
        """The larger the rate, the better, but from 3 on nothing is a number."""

        def __init__(self, problem, family):
            pass

        def run(self, setting, seed, with_test):
            rate, share = setting["learning rate"], setting["switch at"]
            loss = 1 / rate + share if rate < 3 else math.nan
            evaluations = {"epochs": [1], "seconds": [1.0], "validation_loss": [loss], "test_loss": [loss]}
            return two_stages.Run(dict(setting), seed, evaluations | {"test_accuracy": [0.5]})

    monkeypatch.setattr(two_stages, "Trainer", Trainer)
    problem = two_stages.make_problem(Dataset(images(1000), images(100, 1)), Mlp(hidden=(16,)), 256, 2)
    grid = {"learning rate": (0.01, 0.1, 0.3), "switch at": (0.2, 0.4)}
    families = [two_stages.Family(name, grid, two_stages._sgd) for name in ("SGD", "one setting")]
    families[1] = dataclasses.replace(families[1], grid={name: values[-1:] for name, values in grid.items()})
    results = two_stages.measure(problem, families, 1, tmp_path / "net.json", Kept(tmp_path), lambda text: None)
    tried = [(run.setting["learning rate"], run.setting["switch at"]) for run in results[0].tuning]
    assert tried == [(rate, share) for rate in (0.01, 0.1, 0.3, 0.9, 2.7, 8.1) for share in (0.2, 0.4)]
    assert [result.best_setting() for result in results] == [
        "learning rate 2.7, switch at 0.2 (edge)",
        "learning rate 0.3, switch at 0.4",
    ]
    assert two_stages.results_table("title", results).row_count == 2
    assert 0.01 in two_stages._TSO_RATES["learning rate"]  # the paper's own


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("name", ["alexnet", "vgg"])
def test_layers_of_the_networks_are_found(size, name):
    network, batch = two_stages.NETWORKS[size][name], images(2)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), batch.images))["params"]
    loss = lambda p: classification_loss(network.apply({"params": p}, batch.images), batch)  # noqa: E731
    found = optcurv.layers(loss, params)
    assert not found.others
    assert len(found.found) == (8 if name == "alexnet" else 7 if size == "small" else 13)


def test_command_writes_tables_figures_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(two_stages.NETWORKS["small"], "alexnet", Mlp(hidden=(16,)))
    folder = tmp_path / "data"
    folder.mkdir()
    for prefix, batch in (("train", images(1000)), ("t10k", images(100, 1))):
        pictures = np.asarray(255 * np.clip(batch.images[..., 0], 0, 1)).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(pictures))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.asarray(batch.labels).astype(np.uint8)))
    options = ["tso-alra", "--part", "alexnet", "--quick", "--data-dir", str(folder), "--output", str(tmp_path / "out")]
    assert main(options) == 0
    content = json.loads((tmp_path / "out" / "alexnet.json").read_text())
    assert {family.name for family in two_stages.QUICK} == content["families"].keys()
    assert (tmp_path / "out" / "alexnet.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "out" / "claims-alexnet.json").read_text())["claims"]) == 7


def test_refreshes_are_told_apart():
    rows = {
        schedule.name: dict.fromkeys(("quiet", "average", "longest", "compile_seconds"), 1.0)
        for schedule in refresh.SCHEDULES
    }
    for row in rows.values():
        row |= {"gradient_compile_seconds": 2.0, "train_loss": 0.5, "learning_rate": 0.1}
    table = refresh.results_table("title", rows, 10, drift=1.0, drift_steps=100)
    assert table.row_count == len(refresh.SCHEDULES)


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
    best = peer.tune(call, {"learning rate": tuple(losses)}, 1.0, lambda text: None)
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

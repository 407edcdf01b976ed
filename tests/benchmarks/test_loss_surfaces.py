"""The loss-surface experiments: training and resuming, slices, verdicts, and the command end to end."""

import dataclasses
import math
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from benchmarks.__main__ import main
from benchmarks.core.cache import Cache
from benchmarks.core.data import DataError, Dataset
from benchmarks.core.models import Batch, classification_loss
from benchmarks.core.report import read_json
from benchmarks.core.statistics import Verdict
from benchmarks.loss_surfaces import experiments, networks, verdicts
from benchmarks.loss_surfaces import main as loss_surfaces
from benchmarks.loss_surfaces.experiments import Between, Curves, Minima
from benchmarks.loss_surfaces.networks import Initialisation, SurfaceTask
from benchmarks.loss_surfaces.runs import Plan, Runner, Stage, Trained
from tests.benchmarks.pictures import images, write_fashion_mnist


class Net(nn.Module):
    """A dense network, fast to compile."""

    batch_norm: bool = False

    @nn.compact
    def __call__(self, pictures, train=False):
        x = nn.Dense(8)(pictures.reshape(len(pictures), -1))
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(10)(nn.relu(x))


def make_task(batch_norm=False, seed=0):
    data, sizes = Dataset(images(256, seed), images(96, 1)), {"batch_size": networks.BATCH_SIZE, "num_seen": 100}
    return SurfaceTask(Net(batch_norm), classification_loss, data, name="net", **sizes)


@pytest.fixture
def task():
    return make_task()


@pytest.fixture
def runner(task, tmp_path):
    return Runner(task, Cache(tmp_path))


SCALE = dataclasses.replace(experiments.QUICK, num_seeds=2, methods=("SGD", "Adam"))


def leaves_equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_resumed_experiment_equals_an_uninterrupted_one(task, tmp_path, monkeypatch):
    def train(folder, report=lambda text: None):
        return experiments.train_methods(Runner(task, Cache(tmp_path / folder)), SCALE, SCALE.methods, report)

    whole, told, trained = train("a"), [], []

    def interrupt(text):
        told.append(text)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("b", interrupt)
    original = Runner._train
    monkeypatch.setattr(Runner, "_train", lambda self, plan: trained.append(plan) or original(self, plan))
    monkeypatch.setattr(Runner._train, "__qualname__", original.__qualname__)
    monkeypatch.setattr(Runner._train, "__module__", original.__module__)
    resumed = train("b")
    assert [(plan.first.method, plan.seed) for plan in trained] == [("Adam", 2)]
    for one, other in zip(whole["SGD"] + whole["Adam"], resumed["SGD"] + resumed["Adam"], strict=True):
        assert leaves_equal(one.params, other.params)
        assert {**one.curve, "seconds": 0} == {**other.curve, "seconds": 0}
        assert one.plan == other.plan


def test_what_differs_is_cached_apart(task, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(Runner, "_train", lambda self, plan: trained.append(plan) or len(trained))
    plan = Plan(Stage("SGD", 0.1), 1, 2)
    others = [{"seed": 2}, {"num_epochs": 3}, {"first": Stage("SGD", 0.2)}, {"second": Stage("Adam", 0.1)}]
    others += [{"switch_at": 0.5}, {"initialisation": Initialisation(-1.0, 1.0)}]
    cases = [(task, dataclasses.replace(plan, **other)) for other in ({}, *others)]
    cases += [(dataclasses.replace(task, num_seen=50), plan), (make_task(True), plan), (make_task(seed=5), plan)]
    for _ in range(2):
        found = [Runner(one, Cache(tmp_path)).run(plan) for one, plan in cases]
        assert found == list(range(1, 1 + len(cases)))


def by_hand(task, seed, optimizers):
    """Trains with an optimiser for each epoch; one that was there before keeps its state, a new one starts afresh."""
    params, rng, current, state = task.start(seed), np.random.default_rng(seed), None, None
    loss = lambda p, batch: classification_loss(task.network.apply({"params": p}, batch.images), batch)  # noqa: E731
    grad = jax.jit(jax.grad(loss))
    for optimizer in optimizers:
        if optimizer is not current:
            current, state, update = optimizer, optimizer.init(params), jax.jit(optimizer.update)
        order = rng.permutation(len(task.data.train.labels))
        for indices in order.reshape(-1, networks.BATCH_SIZE):
            batch = Batch(*(array[indices] for array in task.data.train))
            updates, state = update(grad(params, batch), state, params)
            params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_switched_run_equals_the_two_optimisers_by_hand(task, runner, share):
    plan = Plan(Stage("SGD", 0.1), 3, 4, second=Stage("Adam", 0.01), switch_at=share)
    run = runner.run(plan)
    first, second = optax.sgd(0.1), optax.adam(0.01)
    expected = by_hand(task, 3, [first] * int(4 * share) + [second] * int(4 - 4 * share))
    for got, want in zip(jax.tree.leaves(run.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    gap = optax.tree.norm(optax.tree.sub(run.params, task.start(3)))
    assert run.final["distance"] == pytest.approx(float(gap), rel=1e-4)
    assert run.curve["gradients"] == [4.0, 8.0, 12.0, 16.0]


def test_a_step_of_two_gradients_counts_as_two(runner):
    assert runner.run(Plan(Stage("SGD+RK2", 0.1), 1, 2)).curve["gradients"] == [8.0, 16.0]


@pytest.mark.parametrize("initialisation", experiments.EXOTIC, ids=str)
def test_unusual_initialisations_have_the_mean_and_deviation_they_name(initialisation):
    task = make_task(batch_norm=True)
    usual, drawn = task.start(1), task.start(1, initialisation)
    is_kernel = [leaf.ndim > 1 for leaf in jax.tree.leaves(usual)]
    pairs = list(zip(is_kernel, jax.tree.leaves(usual), jax.tree.leaves(drawn), strict=True))
    values = np.concatenate([np.ravel(leaf) for kernel, _, leaf in pairs if kernel])
    mean, deviation = {"N(-10, 0.01)": (-10, 0.01), "N(-1, 1)": (-1, 1)}[str(initialisation)]
    assert values.mean() == pytest.approx(mean, abs=5 * deviation / math.sqrt(values.size))
    assert values.std() == pytest.approx(deviation, rel=0.05)
    assert len(np.unique(values)) > 0.5 * values.size  # each kernel is a draw of its own
    assert all(np.array_equal(a, b) for kernel, a, b in pairs if not kernel)
    other = task.start(2, initialisation)
    assert not leaves_equal(drawn, other)


def test_networks_are_looked_at_with_the_statistics_of_the_seen_examples():
    task = make_task(batch_norm=True)
    params = task.start(0)
    seen = Batch(*(array[:100] for array in task.data.train))
    variables = {"params": params, "batch_stats": task._statistics}
    step = jax.jit(lambda v: v | task.network.apply(v, seen.images, train=True, mutable=["batch_stats"])[1])
    for _ in range(200):
        variables = step(variables)
    figures = jax.jit(task.figures)(params)
    for split, batch in (("train", seen), ("test", task.data.test)):
        logits = task.network.apply(variables, batch.images)
        assert figures[f"{split}_loss"] == pytest.approx(float(classification_loss(logits, batch)), rel=1e-4)
        share = np.mean(np.argmax(logits, axis=-1) == batch.labels)
        assert figures[f"{split}_accuracy"] == pytest.approx(share)


def test_rates_are_tuned_beyond_the_grid(runner, monkeypatch):
    rates, told = [], []

    def run(plan):
        rates.append(plan.first.rate)
        return run_of(loss=1 / plan.first.rate, plan=plan)

    monkeypatch.setattr(runner, "run", run)
    assert runner.tuned_rate("SGD", 2, told.append, grid=(0.1, 0.3)) == 8.1
    assert rates == [0.1, 0.3, 0.9, 2.7, 8.1]
    assert len(told) == 5


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    task = make_task()
    runner = Runner(task, Cache(tmp_path_factory.mktemp("runs")))
    runs = experiments.train_methods(runner, SCALE, SCALE.methods, lambda text: None)
    slices = experiments.Slices(task)
    result = experiments.measure_minima(slices, runs, SCALE, lambda text: None)
    return slices, result


def test_slices_meet_where_the_networks_are(task, found):
    slices, one = found
    sgd, adam = one.runs["SGD"][0], one.runs["Adam"][0]
    start, ends = float(task.seen_loss(slices.start(sgd))), (sgd.final["train_loss"], adam.final["train_loss"])
    line = one.from_start.by_name["SGD"][0]
    np.testing.assert_allclose(one.from_start.x[[0, 3, -1]], [0.0, 1.0, 3.0])
    np.testing.assert_allclose(line[[0, 3]], [start, ends[0]], rtol=1e-4)
    between = one.between.loss.by_name["SGD | Adam"][0]
    np.testing.assert_allclose(between[[0, -1]], ends, rtol=1e-4)
    triangle = one.triangles["SGD | Adam"]
    np.testing.assert_allclose(triangle.loss[0], start, rtol=1e-4)
    np.testing.assert_allclose(triangle.x[4], 1.25)
    along = experiments.Slices(task).triangle(sgd, adam, 6)  # with a point at α = 1
    np.testing.assert_allclose(along[4, [-1, 0]], ends, rtol=1e-4)
    assert one.initial_loss == pytest.approx(np.mean([curve[0] for curve in one.from_start.by_name["SGD"]]))


def test_absolute_lines_lead_from_the_end_to_the_start(task, found):
    slices, one = found
    x, sgd = one.around_end.x, one.runs["SGD"][0]
    longest = max(runs[0].final["distance"] for runs in one.runs.values())
    np.testing.assert_allclose(x[[0, -1]], [-2 * longest, longest])
    at_start = np.interp(sgd.final["distance"], x, one.around_end.by_name["SGD"][0])
    assert at_start == pytest.approx(float(task.seen_loss(slices.start(sgd))), rel=0.05)
    assert np.interp(0, x, one.around_end.by_name["SGD"][0]) == pytest.approx(sgd.final["train_loss"], rel=0.1)


def test_distance_and_disagreement_are_those_from_the_first_end(task, found):
    _, one = found
    first, second = (one.runs[name][1].params for name in ("SGD", "Adam"))
    a, b = (np.asarray(task.network.apply({"params": params}, task.data.test.images)) for params in (first, second))
    disagreement = one.between.disagreement.by_name["SGD | Adam"][1]
    distance = one.between.distance.by_name["SGD | Adam"][1]
    assert disagreement[0] == distance[0] == 0
    assert disagreement[-1] == pytest.approx(np.mean(a.argmax(-1) != b.argmax(-1)))
    gap = np.asarray(jax.nn.softmax(a) - jax.nn.softmax(b))
    assert distance[-1] == pytest.approx(math.sqrt(np.mean(np.sum(gap**2, axis=-1))), rel=1e-4)


def run_of(distance=(1.0,), seed=1, second=None, plan=None, **figures):
    curve = {name: [value] for name, value in figures.items()} | {"distance": list(distance)}
    plan = plan or Plan(Stage("Adam", 0.1), seed, len(distance), second=second, switch_at=0.5)
    setting = {"learning rate": plan.first.rate}
    final = {name: column[-1] for name, column in curve.items()}
    return Trained(setting=setting, seed=seed, curve=curve, final=final, plan=plan)


def made_up(basins, train_accuracies, barrier, disagreement=0.2, spread=1e-3):
    """Minima of two methods and four seeds: basins around α = 1 of a width, and a barrier between."""
    x, seeds = np.linspace(0, 3, 61), np.arange(4)
    from_start = {
        name: np.stack([np.clip(2 * np.abs(x - 1) / (width + 1e-3 * seed), 0, 2) for seed in seeds])
        for name, width in basins.items()
    }
    runs = {
        name: [
            run_of(seed=seed, train_loss=0.0, train_accuracy=accuracy + spread * seed, test_accuracy=0.8 + 1e-3 * seed)
            for seed in seeds
        ]
        for name, accuracy in train_accuracies.items()
    }
    bump = barrier * np.sin(np.pi * np.linspace(0, 1, 9))
    curves = {
        "loss": np.tile(bump, (4, 1)),
        "distance": np.full((4, 9), 0.1),
        "disagreement": np.full((4, 9), disagreement),
    }
    between = Between(**{key: Curves(np.linspace(0, 1, 9), {"SGD | Adam": rows}) for key, rows in curves.items()})
    lines = Curves(x, from_start)
    return Minima("net", runs, lines, lines, between, {}, {})


@pytest.mark.parametrize("holds", [True, False])
def test_verdicts_on_minima_follow_the_numbers(holds):
    narrow, wide = (0.4, 0.8) if holds else (0.8, 0.4)
    low, high = (0.8, 0.9) if holds else (0.9, 0.8)
    one = made_up({"SGD": narrow, "Adam": wide}, {"SGD": low, "Adam": high}, 0.5 * holds, 0.2 if holds else 0.02)
    assert one.initial_loss == pytest.approx(2)
    np.testing.assert_allclose(one.widths(absolute=False)["SGD"][0], narrow, rtol=1e-3)
    claims = {claim.text: claim.verdict for claim in verdicts.judge_minima(one)}
    expected = Verdict.HOLDS if holds else Verdict.FAILS
    for text in (
        "The loss rises between the ends of any two optimisers.",
        "Pairs disagree on more than a third of the labels that they could disagree on.",
        "SGD ends with a lower training accuracy than Adam.",
        "SGD ends in a basin of less relative width than Adam.",
        "SGD ends in a basin of less absolute width than Adam.",
    ):
        assert claims.pop(f"net: {text}") == expected
    assert claims == {"net: Test accuracies do not differ between optimisers.": Verdict.HOLDS}


def test_absolute_widths_are_in_units_of_the_parameters():
    one = made_up({"SGD": 0.4, "Adam": 0.8}, {"SGD": 0.8, "Adam": 0.9}, 0.5)
    for runs in one.runs.values():
        for run in runs:
            run.final["distance"] = 3.0
    np.testing.assert_allclose(one.widths(True)["Adam"], np.multiply(3, one.widths(False)["Adam"]), rtol=1e-5)


def test_a_run_that_diverged_has_no_basin_and_decides_nothing():
    x = np.linspace(0, 3, 7)
    assert math.isnan(experiments.basin(x, np.array([2.0, 1.0] + [np.nan] * 5), 1.5))
    claim = verdicts.separated("ends", {"a | b": [math.nan]}, 1.0)
    assert claim.verdict == Verdict.UNDECIDED
    bad = experiments.RungeKutta("net", {"SGD": [run_of(train_loss=math.inf), run_of((1.0, math.nan))]})
    assert experiments.num_not_finite(bad) == 2


def test_the_barriers_that_are_missing_are_named():
    claim = verdicts.separated("ends", {"a | b": [1.0, 1.2], "a | c": [0.01, 0.02]}, 2.0)
    assert claim.verdict == Verdict.FAILS
    assert "1 of 2 pairs" in claim.numbers
    assert "(a | c)" in claim.numbers


@pytest.mark.parametrize(("end", "verdict"), [(1.5, Verdict.HOLDS), (2.5, Verdict.FAILS)])
def test_coming_back_is_measured_from_the_switch(end, verdict):
    switched = [run_of((1.0, 2.0, 3.0, end), seed, second=Stage("SGD", 0.1)) for seed in (1, 2)]
    alone = [run_of((1.0, 2.0, 3.0, 9.0))]
    assert verdicts._comes_back({"Adam": alone, "at 50 %": switched, "SGD": alone}).verdict == verdict


@pytest.mark.parametrize("bumpy_without", [True, False])
def test_verdicts_on_batch_norm(bumpy_without):
    smooth = made_up({"SGD": 0.4, "Adam": 0.4}, {"SGD": 0.8, "Adam": 0.9}, 0.5)
    bumpy = made_up({"SGD": 0.4, "Adam": 0.4}, {"SGD": 0.8, "Adam": 0.9}, 0.5)
    bumpy.between.loss.by_name["SGD | Adam"][:] = [0, 1, 0.7, 1, 0.8, 1, 0.7, 1, 0]
    pair = (smooth, bumpy) if bumpy_without else (bumpy, smooth)
    _, tops, widths = verdicts.judge_batch_norm(*pair)
    assert tops.verdict == widths.verdict == (Verdict.HOLDS if bumpy_without else Verdict.FAILS)


def test_tops_and_widths_of_bumps():
    assert verdicts.num_peaks([0, 1, 0.99, 1.001, 0]) == 1
    assert verdicts.num_peaks([0, 1, 0.5, 1, 0]) == 2
    assert verdicts.num_peaks([1, 0, 1]) == 0
    assert verdicts.bump_width([0, 0, 0, 2, 0, 0, 0, 0]) == pytest.approx(1 / 8)
    assert math.isnan(verdicts.bump_width([2, 1, 0]))


@pytest.mark.parametrize("learns_without", [False, True])
def test_verdicts_on_initialisations(learns_without):
    def exotic(name, unusual):
        accuracies = {experiments.USUAL: 0.9} | {str(one): unusual for one in experiments.EXOTIC}
        runs = {
            start: [run_of(train_accuracy=value, train_loss=1 - value + 1e-3 * seed, seed=seed) for seed in range(4)]
            for start, value in accuracies.items()
        }
        return experiments.Exotic(name, runs, Curves(np.zeros(1), {}))

    claims = verdicts.judge_exotic(exotic("bn", 0.6), exotic("plain", 0.6 if learns_without else 0.1))
    by_text = {claim.text: claim.verdict for claim in claims}
    expected = Verdict.FAILS if learns_without else Verdict.HOLDS
    assert by_text["plain does not train from N(-10, 0.01)."] == expected
    assert by_text["bn trains from N(-1, 1)."] == Verdict.HOLDS
    assert by_text["bn ends with a lower training loss as usual than from N(-1, 1)."] == Verdict.HOLDS


def test_runge_kutta_runs_compute_equally_many_gradients(runner, monkeypatch):
    monkeypatch.setattr(experiments, "SCHEMES", {"Heun": "SGD+RK2"})  # each takes seconds to compile
    scale = dataclasses.replace(SCALE, num_seeds=1)
    found = experiments.train_runge_kutta(runner, scale, lambda text: None)
    assert {run.final["gradients"] for runs in found.runs.values() for run in runs} == {8.0}
    rates = {name: runs[0].plan.first.rate for name, runs in found.runs.items()}
    assert rates["SGD x2"] == rates["SGD, Heun"] == 2 * rates["SGD"]


def test_pieces_of_a_text_are_followed_by_their_labels(tmp_path):
    (tmp_path / "ptb.train.txt").write_text("abcd " * 100)
    with pytest.raises(DataError, match=r"ptb\.valid\.txt"):
        networks.read_text(tmp_path)
    (tmp_path / "ptb.valid.txt").write_text("dcbaz\n" * 100)
    train, test, _ = networks.read_text(tmp_path)
    for batch in (train, test):
        assert batch.images.shape[1] == 32
        np.testing.assert_array_equal(batch.images[:, 1:], batch.labels[:, :-1])
    following = dict(zip(np.ravel(train.images).tolist(), np.ravel(train.labels).tolist(), strict=True))
    assert len(following) == 5  # four letters and the space; each is followed by one other
    assert networks.NUM_SYMBOLS - 1 in np.asarray(test.images)  # the letter that training did not show


def test_without_a_text_pythons_manual_is_read(tmp_path):
    train, test, _ = networks.read_text(tmp_path)
    assert len(train.labels) > 4 * len(test.labels) > 2400
    assert "assert" in pydoc_data.topics.topics
    assert int(jnp.max(train.images)) == networks.NUM_SYMBOLS - 1


@pytest.mark.parametrize("name", list(loss_surfaces.NETWORKS))
def test_networks_take_part_with_and_without_batch_norm(name):
    network = loss_surfaces.NETWORKS[name]
    inputs = jnp.zeros((2, 5), jnp.int32) if name == "lstm" else images(2).images
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), inputs))
    assert ("batch_stats" in variables) == name.endswith("-bn")
    logits = jax.eval_shape(lambda v: network.apply(v, inputs), variables)
    assert logits.shape == ((2, 5, networks.NUM_SYMBOLS) if name == "lstm" else (2, 10))


@pytest.mark.parametrize("part", ["switching", "batch-norm", "initialisation"])
def test_command_writes_summaries_tables_and_pictures(part, tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path, 200, 64)
    small = {name: Net(name.endswith("-bn")) for name in loss_surfaces.NETWORKS if name != "lstm"}
    monkeypatch.setattr(loss_surfaces, "NETWORKS", small)
    monkeypatch.setattr(loss_surfaces, "WITHOUT_NORM", {"vgg": "vgg-bn"})
    quick = dataclasses.replace(experiments.QUICK, num_images=128, num_seen=64, methods=("SGD", "Adam"))
    monkeypatch.setattr(experiments, "QUICK", quick)
    options = ["loss-surfaces", "--part", part, "--quick", "--data-dir", str(tmp_path), "--output", str(tmp_path / "o")]
    assert main(options) == 0
    pictures, stem = {
        "switching": ({"figure-7-lines", "figure-7-distance", "figure-7-test-accuracy"}, "switching"),
        "batch-norm": ({"table-vgg", "between-vgg", "figure-6-vgg", "surface-vgg"}, "minima-vgg"),
        "initialisation": ({"figure-11"}, "initialisation"),
    }[part]
    assert pictures <= {path.stem for path in (tmp_path / "o").glob("*.png")}
    assert {path.stem for path in (tmp_path / "o").glob("*.md")} == {stem, f"claims-{stem}"}
    content = read_json(tmp_path / "o" / f"{stem}.json")
    assert content["claims"]
    assert content["not_finite"] == 0
    assert content["scale"]["num_images"] == 128

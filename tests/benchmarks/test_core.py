"""The core: data files, runs on a budget, tuning, statistics, cached measurements, tables, the command line."""

import gzip
import json
import math

import jax
import numpy as np
import optax
import pytest

from benchmarks.__main__ import main
from benchmarks.core import cache as caching
from benchmarks.core import data, methods, report
from benchmarks.core.cache import Cache
from benchmarks.core.figures import new_figure, save
from benchmarks.core.methods import Method
from benchmarks.core.models import Batch, Mlp, classification_loss
from benchmarks.core.statistics import Verdict, is_less, mean_deviation, mean_interval
from benchmarks.core.task import Task
from benchmarks.core.train import Run, Spent, Trainer, after_gradients, after_steps, spread, train_step
from benchmarks.core.tune import tune, tune_and_repeat
from tests.benchmarks.pictures import idx_bytes, images

HOLDS, FAILS, UNDECIDED = Verdict


@pytest.fixture
def fashion_folder(tmp_path):
    """A data set of six and four images, half of its files compressed."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 6), ("t10k", 4)):
        pictures = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(pictures)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count, dtype=np.uint8)))
    return tmp_path


def test_fashion_mnist_reads_compressed_and_plain_files(fashion_folder):
    train, test, _ = data.fashion_mnist(fashion_folder)
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


def test_the_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTCURV_DATA", str(tmp_path))
    assert data.default_folder() == tmp_path
    monkeypatch.delenv("OPTCURV_DATA")
    assert data.default_folder() == data.DEBIAN_FOLDER


@pytest.mark.parametrize(
    "options",
    [["--dataset", "fashion-mnist"], ["adaptive-norms", "--figure", "2", "--dataset", "fashion-mnist"], ["tso-alra"]],
)
def test_a_missing_file_says_where_to_get_it(options, tmp_path, capsys):
    assert main([*options, "--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for hint in ("train-images-idx3-ubyte", str(tmp_path), "dataset-fashion-mnist", "--data-dir", "OPTCURV_DATA"):
        assert hint in message


def test_help_names_every_study(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for words in (
        "comparison",
        "adaptive-norms",
        "loss-surfaces",
        "performance",
        "science",
        "tso-alra",
        "report",
        "--quick",
    ):
        assert words in shown


@pytest.fixture(scope="module")
def task():
    return Task(Mlp(hidden=(8,)), classification_loss, data.digits(), batch_size=100)


SGD = methods.METHODS[0]


def test_batches_show_no_image_twice_in_an_epoch_and_differ_between_seeds(task):
    stream = task.batches(seed=3)
    order = np.stack([next(stream) for _ in range(task.steps_per_epoch + 1)])
    assert len(np.unique(order[:-1])) == 1400
    assert not np.array_equal(order[0], order[-1])
    assert not np.array_equal(order[0], next(task.batches(seed=4)))
    np.testing.assert_array_equal(order[0], next(task.batches(seed=3)))


def test_a_budget_buys_fewer_of_the_dearer_steps():
    assert [method.num_steps(14.0) for method in methods.METHODS[:4]] == [14, 14, 10, 6]
    assert methods.METHODS[3].num_steps(0.1) == 1


def test_stops_are_spread_evenly():
    assert spread(14, 4) == [4, 7, 11, 14]
    assert spread(3, 24) == [1, 2, 3]


def test_a_stop_says_how_many_steps_are_left():
    (stop,) = after_steps([7])
    assert [stop(Spent(steps=steps)) for steps in (0, 3, 7)] == [7, 4, 0]
    (stop,) = after_gradients([20.0])
    assert stop(Spent()) == 1  # the first step's cost is not known
    assert stop(Spent(gradients=10.0, dearest=3.0)) == 3
    assert stop(Spent(gradients=0.0, dearest=0.1)) == 16
    assert stop(Spent(gradients=19.9, dearest=3.0)) == 1
    assert stop(Spent(gradients=20.0, dearest=3.0)) == 0


def test_a_run_equals_optax_by_hand(task):
    setting, trainer = {"learning rate": 0.1}, Trainer(task, SGD)
    run = trainer.run(setting, 1, after_steps([0, 3, 5]), at_every_stop=False)
    optimizer, stream, losses = optax.sgd(0.1, momentum=0.9), task.batches(1), []
    params = task.init(jax.random.key(1))
    state = optimizer.init(params)
    for _ in range(5):
        indices = next(stream)
        loss = task.loss(Batch(*(array[indices] for array in task.data.train)))
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    assert math.isnan(run.curve["loss"][0])
    np.testing.assert_allclose(run.curve["loss"][1:], [np.mean(losses[:3]), np.mean(losses[3:])], rtol=1e-5)
    assert (run.curve["steps"], run.curve["gradients"]) == ([0, 3, 5], [0, 3, 5])
    assert run.final["epochs"] == 5 * 100 / 1437
    assert 0 == run.curve["seconds"][0] < run.curve["seconds"][1] < run.curve["seconds"][2]
    expected = task.evaluate(params)
    assert {name: run.final[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert "train_loss" not in run.curve
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), run.params, params)
    still = trainer.run({"learning rate": 1e-9}, 1, after_steps([1]))  # the setting reaches the compiled step
    assert still.curve["train_loss"] == [pytest.approx(math.log(10), rel=0.2)]


def test_products_are_counted_where_a_method_says_what_they_cost(task):
    def run(product):
        method = Method("TR", lambda radius: methods.optcurv.trust_region(initial_radius=radius), {"radius": (0.1,)})
        trainer = Trainer(task, method.at(gradients=4 / 3, product=product))
        return trainer, trainer.run({"radius": 0.1}, 2, after_steps([1, 2]), evaluate=lambda params: {})

    trainer, counted = run(2.0)
    state, products = (task.init(jax.random.key(2)), None), []
    state = state[0], trainer.method.make({"radius": 0.1}).init(state[0])
    for indices, _ in zip(task.batches(2), range(2), strict=False):
        batch = Batch(*(array[indices] for array in task.data.train))
        state, _ = jax.jit(lambda s, b: train_step(task, trainer.method, s, b, {"radius": 0.1}))(state, batch)
        products.append(float(methods.optcurv.diagnostics(state[1])["trust_region/iterations"]))
    assert counted.curve["gradients"] == pytest.approx(list(np.cumsum(4 / 3 + 2 * np.array(products))))


def test_the_validation_loss_of_a_stop_is_told_to_the_next_step():
    told = []

    def update(updates, state, params=None, *, monitored_value, **_):
        jax.debug.callback(lambda value: told.append(float(value)), monitored_value, ordered=True)
        return jax.tree.map(lambda g: -0.1 * g, updates), state

    listener = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    splits = data.Dataset(images(60), images(20, 1), images(20, 2))
    task = Task(Mlp(hidden=(4,)), classification_loss, splits, batch_size=30)
    trainer = Trainer(task, Method("listener", lambda rate: listener, {"rate": (0.1,)}))
    at_stops = lambda params: {"expected": float(task.loss(splits.validation)(params))}  # noqa: E731
    run = trainer.run({"rate": 0.1}, 0, after_steps([2, 4]), at_stops)
    assert run.curve["validation_loss"] == pytest.approx(run.curve["expected"], rel=1e-5)
    jax.effects_barrier()
    # The first call compiles.
    np.testing.assert_allclose(told[1:], [math.nan, math.nan, run.curve["validation_loss"][0], math.nan])


def fake_run(setting, loss):
    return Run(setting, 0, {"train_loss": [9.0, loss]}, {"train_loss": loss})


@pytest.mark.parametrize(
    ("losses", "best", "tried"),
    [
        ({0.1: 2.0, 0.3: 1.0, 0.9: math.nan}, 0.3, [0.1, 0.3, 0.9]),
        ({0.1: 3.0, 0.3: 2.0, 0.9: 1.0, 2.7: 0.5, 8.1: 4.0}, 2.7, [0.1, 0.3, 0.9, 2.7, 8.1]),
        (
            {0.1: 3.0, 0.3: math.nan, 0.9: math.inf, 0.033: 2.0, 0.011: 1.0, 0.0037: 0.5},
            0.0037,
            [0.1, 0.3, 0.9, 0.033, 0.011, 0.0037],
        ),
    ],
)
def test_tuning_takes_the_least_finite_loss_and_looks_beyond_the_grid(losses, best, tried):
    method = SGD.at(grid={"learning rate": (0.1, 0.3, 0.9)})
    result = tune(method, lambda setting: fake_run(setting, losses[setting["learning rate"]]), "train_loss", 3)
    assert result.best.setting == {"learning rate": best}
    assert [run.setting["learning rate"] for run in result.tuning] == tried
    within = tune(method, lambda setting: fake_run(setting, losses[setting["learning rate"]]), "train_loss")
    assert len(within.tuning) == 3


def test_the_first_number_is_extended_with_all_values_of_the_others_and_edges_are_marked():
    grid = {"learning rate": (0.01, 0.1, 0.3), "switch at": (0.2, 0.4)}

    def loss(setting):
        rate = setting["learning rate"]
        return fake_run(setting, 1 / rate + setting["switch at"] if rate < 3 else math.nan)

    result = tune(SGD.at(grid=grid), loss, "train_loss", 3)
    tried = [tuple(run.setting.values()) for run in result.tuning]
    assert tried == [(rate, share) for rate in (0.01, 0.1, 0.3, 0.9, 2.7, 8.1) for share in (0.2, 0.4)]
    assert result.setting == "learning rate 2.7, switch at 0.2 (edge)"
    single = tune(SGD.at(grid={name: values[-1:] for name, values in grid.items()}), loss, "train_loss", 3)
    assert single.setting == "learning rate 0.3, switch at 0.4"


def test_methods_are_tuned_on_one_seed_and_run_on_fresh_ones(task, tmp_path):
    sgd, words = SGD.at(grid={"learning rate": (1e-9, 1e-2, 1e30)}), []
    (result,) = tune_and_repeat(task, [sgd], few_steps, {}, 2, Cache(tmp_path), words.append)
    runs = [(run.setting["learning rate"], run.seed) for run in result.tuning + result.final]
    assert runs == [(1e-9, 0), (1e-2, 0), (1e30, 0), (1e-2, 1), (1e-2, 2)]
    assert math.isnan(result.tuning[2].final["train_loss"])
    assert words[0].startswith("SGD-momentum, learning rate 1e-09, seed 0: train loss 2.")
    assert (len(words), result.finals("train_loss")) == (5, [run.final["train_loss"] for run in result.final])


def few_steps(trainer, setting, seed):
    return trainer.run(setting, seed, after_steps([6]))


def test_interval_is_students():
    mean, half_width = mean_interval([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    np.testing.assert_allclose(mean, [7 / 3, 5])
    np.testing.assert_allclose(half_width, [4.302653 * np.std([1, 2, 4], ddof=1) / np.sqrt(3), 0], rtol=1e-6)
    assert mean_interval([3.0, 4.0, 5.0, 6.0], level=0.9).half_width == pytest.approx(2.353363 * np.sqrt(5 / 3) / 2)
    assert mean_interval([3.0]) == (3, 0)
    assert (mean_deviation([1.0, 2.0]), mean_deviation([1.0])) == ("1.50 ± 0.7", "1.00")


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (range(10), range(20, 30), HOLDS),
        (range(20, 30), range(10), FAILS),
        (range(10), range(1, 11), UNDECIDED),
        (range(4), range(5, 8), UNDECIDED),  # chance orders them so, or the other way round, twice in 35
        (range(10), [math.inf] * 10, HOLDS),
        ([math.inf] * 10, range(10), FAILS),
        ([math.inf] * 10, [math.inf] * 10, UNDECIDED),
        ([1.0], [2.0], UNDECIDED),
    ],
)
def test_a_sample_is_less_only_beyond_chance(first, second, verdict):
    assert is_less(list(first), list(second)) == verdict


KEY = {"setting": 0.1, "grid": (0.1, None)}
FOUND = {"loss": np.array([1.0, math.nan]), "steps": 3, "worst": math.inf}


def find():
    return FOUND


def fail():
    raise AssertionError("It is measured again.")


def test_what_was_measured_is_found(tmp_path, capsys):
    first = Cache(tmp_path)
    first.get(KEY, find)
    assert not capsys.readouterr().err
    find.__code__, kept = fail.__code__, find.__code__
    try:
        np.testing.assert_equal(Cache(tmp_path).get(KEY, find), FOUND)
        assert str(tmp_path) in capsys.readouterr().err
        with pytest.raises(AssertionError):
            first.get(KEY | {"setting": 0.2}, find)
    finally:
        find.__code__ = kept


def test_what_differs_is_measured_apart(tmp_path, monkeypatch):
    numbers = iter(range(10))

    def get(key=KEY, function=lambda: next(numbers)):
        return Cache(tmp_path).get(key, function)

    measured = [get(), get(), get(KEY | {"setting": 0.2}), get(KEY | {"seed": 0})]
    monkeypatch.setattr(caching, "environment", lambda: {"jax": "another"})
    measured.append(get())
    monkeypatch.setattr(caching, "source", lambda module: "another")
    measured += [get(), get()]
    assert measured == [0, 0, 1, 2, 3, 4, 4]


def test_a_damaged_file_is_measured_anew(tmp_path):
    Cache(tmp_path).get(KEY, find)
    (path,) = tmp_path.rglob("output.pkl")
    path.write_bytes(path.read_bytes()[:-9])
    np.testing.assert_equal(Cache(tmp_path).get(KEY, find), FOUND)


def test_a_key_covers_the_source_that_is_imported_and_no_other():
    found = {}
    caching._collect("benchmarks.adaptive_norms.trust_regions", found)
    needed = {"benchmarks.core.train", "benchmarks.core.task", "benchmarks.adaptive_norms.progress"}
    assert needed | {"optcurv.methods.trust_region", "optcurv.krylov"} <= found.keys()
    assert not {"benchmarks.core.figures", "benchmarks.adaptive_norms.main", "jax"} & found.keys()


def test_json_keeps_four_digits_and_what_is_not_finite(tmp_path):
    content = {"a": np.array([1.23456, math.nan]), "b": [math.inf, {"c": np.float32(-1e-9)}], "d": None, "e": (1, "x")}
    report.write_json(tmp_path / "a.json", content)
    expected = {"a": [1.235, math.nan], "b": [math.inf, {"c": -1e-9}], "d": None, "e": [1, "x"]}
    np.testing.assert_equal(report.read_json(tmp_path / "a.json"), expected)
    json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)


def test_tables_are_markdown():
    text = report.table([{"method": "SGD", "loss": "0.10"}, {"method": "Adam", "loss": "1e-05"}], "A caption.")
    lines = [line.replace(" ", "") for line in text.splitlines()]
    assert [lines[0], *lines[2:]] == ["|method|loss|", "|SGD|0.10|", "|Adam|1e-05|", "", "Acaption."]


def test_pictures_are_small_png_files(tmp_path):
    figure = new_figure(4, 3)
    figure.subplots().plot([1, 2])
    save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.png").stat().st_size < 10_000

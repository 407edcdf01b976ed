"""The reproduction of the adaptive-norms paper: ellipses, tuning, intervals, verdicts, budgets, what is written."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from benchmarks.__main__ import main
from benchmarks.adaptive_norms import figures as plots
from benchmarks.adaptive_norms import hessian_mass, quadratics, trust_regions
from benchmarks.adaptive_norms.progress import progress_of, reconstruction_bounds
from benchmarks.core import data, training
from benchmarks.core.claims import Verdict, is_less, mean_interval
from benchmarks.core.kept import Kept
from benchmarks.core.methods import GRADIENT_DESCENT
from benchmarks.core.models import Autoencoder, Batch, Mlp, Task, classification_loss, reconstruction_loss
from benchmarks.core.tuning import Result

PNG = b"\x89PNG"
HOLDS, FAILS, UNDECIDED = Verdict


def test_interval_is_students():
    mean, half_width = mean_interval([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    np.testing.assert_allclose(mean, [7 / 3, 5])
    np.testing.assert_allclose(half_width, [4.302653 * np.std([1, 2, 4], ddof=1) / np.sqrt(3), 0], rtol=1e-6)
    assert mean_interval([3.0, 4.0, 5.0, 6.0], level=0.9).half_width == pytest.approx(2.353363 * np.sqrt(5 / 3) / 2)
    assert mean_interval([3.0]) == (3, 0)


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


@pytest.mark.parametrize("name", quadratics.METHODS)
@pytest.mark.parametrize("problem", quadratics.PROBLEMS)
def test_the_next_iterate_lies_on_the_ellipse_where_the_linear_model_is_least(problem, name):
    hessian, start = quadratics.PROBLEMS[problem], np.array([-2.0, 1.5])
    with jax.enable_x64(True):
        descent = quadratics.descend(quadratics.METHODS[name], jnp.asarray(hessian), jnp.asarray(start), 0.05)
    descent = jax.tree.map(np.asarray, descent)
    np.testing.assert_array_equal(descent.iterates[0], start)
    for i in (1, 4):
        region = plots.ellipse(descent.matrices[i], descent.radii[i], num_points=4001)
        step = descent.iterates[i + 1] - descent.iterates[i]
        gradient = hessian @ descent.iterates[i]
        for points in (step[None], region):
            squared_norms = np.einsum("ni,ij,nj->n", points, descent.matrices[i], points)
            np.testing.assert_allclose(squared_norms, descent.radii[i] ** 2, rtol=1e-6)
        assert (region @ gradient).min() == pytest.approx(step @ gradient, rel=1e-4)
    values = [0.5 * w @ hessian @ w for w in descent.iterates]
    np.testing.assert_allclose(descent.values, values, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "optimizer", "step_size"),
    [
        (quadratics.GD, optax.sgd, 0.05),
        (quadratics.DIAGONAL, lambda rate: optax.adagrad(rate, initial_accumulator_value=0.0, eps=1e-10), 0.5),
    ],
)
def test_descents_are_those_of_optax(name, optimizer, step_size):
    hessian = jnp.asarray(quadratics.PROBLEMS[quadratics.ROTATED], jnp.float32)
    start = point = jnp.array([-2.0, 1.5])
    optimizer = optimizer(step_size)
    state = optimizer.init(start)
    for _ in range(3):
        updates, state = optimizer.update(hessian @ point, state)
        point = optax.apply_updates(point, updates)
    descent = quadratics.descend(quadratics.METHODS[name], hessian, start, step_size)
    np.testing.assert_allclose(descent.iterates[3], point, rtol=1e-4)


def test_step_sizes_are_tuned_by_the_last_iterate():
    measured = quadratics.measure(num_starts=4)
    assert list(measured) == list(quadratics.PROBLEMS)
    round_one = measured["κ = 2, axis-aligned"][quadratics.GD]
    assert round_one.step_size == min(quadratics.STEP_SIZES, key=lambda size: abs(size - 2 / (1 + 2)))
    assert round_one.log_values.shape == (4, quadratics.NUM_STEPS + 1)
    for by_name in measured.values():
        drawn = by_name[quadratics.GD].drawn
        assert np.linalg.norm(drawn.iterates[0]) == pytest.approx(quadratics.START_DISTANCE)
        assert np.linalg.norm(drawn.iterates[1] - drawn.iterates[0]) == pytest.approx(drawn.radii[0])
        for one in by_name.values():  # from the same four starts, none of them the drawn one
            np.testing.assert_array_equal(one.log_values[:, 0], by_name[quadratics.GD].log_values[:, 0])
        assert len({*one.log_values[:, 0], np.log10(one.drawn.values[0])}) == 5


def quadratic_values(aligned, rotated):
    """Ten final values around each mean."""
    spread = np.linspace(-0.5, 0.5, 10)
    return {
        problem: {name: mean + spread for name, mean in zip(quadratics.METHODS, means, strict=True)}
        for problem, means in ((quadratics.ALIGNED, aligned), (quadratics.ROTATED, rotated))
    }


@pytest.mark.parametrize(
    ("aligned", "rotated", "verdicts"),
    [
        ((-1, -9, -9), (-1, -1, -9), [HOLDS, HOLDS, HOLDS]),
        ((-9, -1, -9), (-1, -9, 0), [FAILS, FAILS, FAILS]),
        ((-1, -1, -9), (-9, -1, -9), [UNDECIDED, HOLDS, UNDECIDED]),
    ],
)
def test_verdicts_on_quadratics(aligned, rotated, verdicts):
    assert [claim.verdict for claim in quadratics.judge(quadratic_values(aligned, rotated))] == verdicts


@pytest.mark.parametrize(
    ("masses", "verdict"),
    [((0.9, 0.9, 0.9, 0.9), HOLDS), ((0.9, 0.9, 0.9, 0.2), FAILS), ((0.9, 0.9, 0.45, 0.9), UNDECIDED)],
)
def test_verdicts_on_diagonal_mass(masses, verdict):
    spread = np.linspace(-0.05, 0.05, 10)
    by_stage = {stage: list(mass + spread) for stage, mass in zip(hessian_mass.STAGES, masses, strict=True)}
    measured = hessian_mass.Measured(10, by_stage, [0.9] * 10, [5] * 10)
    assert measured.baselines["Wigner"] == optcurv.wigner_diagonal_mass(10)
    assert (
        measured.baselines["least squares"]
        == optcurv.least_squares_diagonal_mass(10, 32)
        == pytest.approx(0.4406, abs=1e-3)
    )
    (claim,) = hessian_mass.judge({"MLP": measured})
    assert claim.verdict == verdict


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def test_progress_is_accuracy_or_the_share_explained(digits):
    classifier = training.Problem(Task(Mlp(), classification_loss, has_accuracy=True), digits, 10, 1)
    assert progress_of(classifier)({"train_accuracy": 0.7, "train_loss": 9.0}) == 0.7
    autoencoder = training.Problem(Task(Autoencoder(), reconstruction_loss, has_accuracy=False), digits, 10, 1)
    images = digits.train.images
    logits = jnp.log(images + 1e-7) - jnp.log1p(1e-7 - images)
    perfect = float(reconstruction_loss(logits, digits.train))
    mean = jnp.mean(images, axis=0)
    logits = jnp.broadcast_to(jnp.log(mean + 1e-7) - jnp.log1p(1e-7 - mean), images.shape)
    mean_image = float(reconstruction_loss(logits, digits.train))
    assert reconstruction_bounds(digits.train) == pytest.approx((mean_image, perfect), rel=1e-4)
    assert progress_of(autoencoder)({"train_loss": perfect}) == pytest.approx(1, abs=1e-3)
    assert progress_of(autoencoder)({"train_loss": mean_image}) == pytest.approx(0, abs=1e-3)


def test_checkpoints_are_start_middle_and_the_first_at_the_target(digits):
    task = Task(Mlp(hidden=(32,)), classification_loss, has_accuracy=True)
    problem = training.Problem(task, digits, 128, 2000)
    step = training.compile_step(task, hessian_mass._RMSPROP)
    run = hessian_mass.train(problem, step, seed=0)
    shares = [problem.evaluate(params)["train_accuracy"] for params in (run.initial, run.midway, run.trained)]
    assert shares[0] < 0.3 < shares[1] < 0.9 <= shares[2] == run.progress
    assert 20 < run.steps < 500
    cut = hessian_mass.train(dataclasses.replace(problem, budget=25), step, seed=0)
    assert (cut.steps, cut.progress < 0.9) == (25, True)


def test_a_compiled_step_sees_the_images_of_its_indices(digits):
    task = Task(Mlp(hidden=(8,)), classification_loss, has_accuracy=True)
    state = training.init_state(task, GRADIENT_DESCENT, jax.random.key(0), digits.train)
    indices = np.array([700, 5, 900])
    _, loss = training.compile_step(task, GRADIENT_DESCENT)(state, digits.train, indices, 0.1)
    expected = task.loss(Batch(digits.train.images[indices], digits.train.labels[indices]))(state[0])
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_noise_and_data_batches(digits):
    real, noise = hessian_mass.hessian_batches(digits.train, seed=1)
    assert real.images.shape == noise.images.shape == (hessian_mass.HESSIAN_BATCH, 8, 8, 1)
    assert 0.45 < float(noise.images.mean()) < 0.55
    assert len(np.unique(np.asarray(real.images).reshape(32, -1), axis=0)) == 32
    again, _ = hessian_mass.hessian_batches(digits.train, seed=1)
    np.testing.assert_array_equal(real.labels, again.labels)


@pytest.fixture
def tiny_problem(digits):
    return training.Problem(Task(Mlp(hidden=(8,)), classification_loss, has_accuracy=True), digits, 200, 60.0)


def test_a_budget_counts_the_products_that_steps_took(tiny_problem):
    region, sgd = trust_regions.TRUST_REGIONS[2], trust_regions.FIRST_ORDER[0]
    trainer = trust_regions.BudgetTrainer(tiny_problem, region)
    spent = trainer.run(0.1, seed=2, num_evaluations=5).evaluations

    # The same steps once more, one by one.
    state = training.init_state(tiny_problem.task, region, jax.random.key(2), tiny_problem.data.train, 0.1)
    costs = [0.0]
    for indices in tiny_problem.batch_indices(2, spent["steps"][-1]):
        state, _ = trainer._step(state, tiny_problem.data.train, indices, 0.1)
        costs.append(costs[-1] + 4 / 3 + 2 * float(optcurv.diagnostics(state[1])["trust_region/iterations"]))
    np.testing.assert_allclose(spent["gradients"], [costs[int(steps)] for steps in spent["steps"]], rtol=1e-5)
    assert spent["steps"][0] == spent["seconds"][0] == spent["gradients"][0] == 0
    goals = np.linspace(0, 60, 6)
    assert all(goals <= spent["gradients"])
    assert spent["gradients"][-1] < 60 + 2 * max(np.diff(costs))
    assert spent["epochs"][-1] == spent["steps"][-1] * 200 / 1437
    assert spent["train_loss"][-1] == pytest.approx(tiny_problem.evaluate(state[0])["train_loss"], rel=1e-3)
    assert spent["progress"] == spent["train_accuracy"]

    plain = trust_regions.BudgetTrainer(tiny_problem, sgd).run(0.1, seed=2, num_evaluations=5).evaluations
    assert plain["gradients"] == plain["steps"] == [0, 12, 24, 36, 48, 60]
    assert plain["train_loss"][0] == pytest.approx(spent["train_loss"][0], rel=1e-5)  # the same initialisation


def test_tuning_picks_the_radius_of_the_least_loss(tiny_problem, tmp_path):
    region = dataclasses.replace(trust_regions.TRUST_REGIONS[2], grid=(1e-6, 0.1, 1e-5))
    words = []
    (result,) = trust_regions.measure(tiny_problem, [region], 2, 3, Kept(tmp_path), words.append)
    assert [(run.setting, run.seed) for run in result.tuning + result.final] == [
        (1e-6, 0), (0.1, 0), (1e-5, 0), (0.1, 1), (0.1, 2),
    ]  # fmt: skip
    low, best, _ = (run.final("train_loss") for run in result.tuning)
    assert best < 0.9 * low
    assert [len(run.evaluations["steps"]) for run in result.tuning + result.final] == [2, 2, 2, 4, 4]
    assert words[0] == "TR RMSProp, initial radius 1e-06"
    assert len(words) == 5


def fake_result(method, progress, losses):
    """A result of which every run is evaluated at 0, 10 and 20 gradients, and as many seconds times ten."""
    runs = []
    for i, (middle, loss) in enumerate(zip(progress, losses, strict=True)):
        gradients = [0.0, 10.0 + i / 100, 20.0]
        evaluations = {
            "steps": [0, 5, 10],
            "gradients": gradients,
            "epochs": [0.0, 1.0, 2.0],
            "seconds": [10 * spent for spent in gradients],
            "progress": [0.1, middle, 0.5],
            "train_loss": [2.0, 1.0, loss],
        }
        runs.append(training.Run(1.0, i, {}, evaluations))
    return Result(method, tuning=runs[:1], final=runs)


def fake_measured(reached, losses):
    """Ten runs of each method, of which the named numbers reach 99 % at the second evaluation."""
    results = [
        fake_result(method, [0.995] * n + [0.5] * (10 - n), loss + np.linspace(0, 0.01, 10))
        for method, n, loss in zip(trust_regions.METHODS, reached, losses, strict=True)
    ]
    return trust_regions.Measured("mlp", 0.99, results)


@pytest.mark.parametrize(
    ("reached", "losses", "verdicts"),
    [
        ((0, 10, 10, 0, 10, 0, 0), (3, 1, 2, 9, 9, 9, 9), [HOLDS, HOLDS, HOLDS, HOLDS, HOLDS, UNDECIDED]),
        ((10, 0, 0, 10, 10, 10, 10), (1, 2, 1, 0, 0, 0, 0), [FAILS, FAILS, FAILS, UNDECIDED, FAILS, HOLDS]),
        ((0, 0, 10, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1, 1), [UNDECIDED, HOLDS, UNDECIDED, UNDECIDED, HOLDS, FAILS]),
        ((0,) * 7, (1,) * 7, [UNDECIDED] * 6),
    ],
)
def test_verdicts_on_trust_regions(reached, losses, verdicts):
    measured = fake_measured(reached, losses)
    claims = trust_regions.judge(measured._replace(model="cnn"))
    assert [claim.verdict for claim in claims] == verdicts
    last = trust_regions.judge(measured)[-1]  # on the MLP the paper claims the opposite
    assert "fewer seconds" in last.text
    assert last.verdict == {HOLDS: FAILS, FAILS: HOLDS, UNDECIDED: UNDECIDED}[verdicts[-1]]


def test_reaching_a_target():
    measured = fake_measured((3, *(0,) * 6), (1,) * 7)
    assert measured.reached(trust_regions.BALL, "gradients") == [10.0, 10.01, 10.02] + [math.inf] * 7
    assert measured.reached(trust_regions.BALL, "seconds")[:2] == pytest.approx([100.0, 100.1])
    run = measured.results[0].final[0]
    assert trust_regions.first_reach(run, 0.05, "epochs") == 0
    assert trust_regions.first_reach(run, 0.999, "epochs") == math.inf


def test_competitive_is_at_most_a_quarter_more():
    assert trust_regions._competitive([120.0], [100.0]) == HOLDS
    assert trust_regions._competitive([130.0], [100.0]) == FAILS
    assert trust_regions._competitive([math.inf], [math.inf]) == UNDECIDED


@pytest.fixture
def single_settings(monkeypatch):
    """All trust regions and one other method, one setting each, and small networks."""
    few = (*trust_regions.TRUST_REGIONS, trust_regions.FIRST_ORDER[0])
    monkeypatch.setattr(trust_regions, "METHODS", [dataclasses.replace(m, grid=m.grid[3:4]) for m in few])
    monkeypatch.setattr(trust_regions, "FIRST_ORDER", few[3:])
    monkeypatch.setitem(trust_regions.DEFAULTS, ("digits", "mlp"), trust_regions.Defaults(400.0, 512, 0.99))
    monkeypatch.setattr(trust_regions, "make_task", lambda *_: Task(Mlp(hidden=(8,)), classification_loss, True))
    small = Task(Mlp(hidden=(4,)), classification_loss, has_accuracy=True)
    monkeypatch.setitem(hessian_mass.NETWORKS, "digits", {"MLP": small})


def test_a_quick_run_writes_what_it_says(tmp_path, single_settings, capsys):
    del single_settings
    assert main(["adaptive-norms", "--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "rotated by 45°" in printed
    assert "TR RMSProp" in printed
    stems = ["claims-1", "claims-2", "claims-3", "figure-1", "figure-2", "figure-3-mlp"]
    figures = ("figure-1", "figure-2", "figure-3", "figure-3-mlp")
    pictures = {f"{stem}.{kind}" for stem in figures for kind in ("png", "svg")}
    expected = {f"{stem}.{suffix}" for stem in stems for suffix in ("txt", "json")} | pictures | {"runs"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert all((tmp_path / f"{stem}.png").read_bytes().startswith(PNG) for stem in figures)

    content = {stem: json.loads((tmp_path / f"{stem}.json").read_text()) for stem in stems}
    assert all(one["environment"]["jax"] == jax.__version__ for one in content.values())
    assert [len(content[f"claims-{figure}"]["claims"]) for figure in (1, 2, 3)] == [3, 1, 6]
    quadratic = content["figure-1"][quadratics.ALIGNED][quadratics.DIAGONAL]
    assert len(quadratic["log10_suboptimality"]) == quadratics.NUM_STEPS + 1
    assert quadratic["log10_suboptimality"][-1] < -10
    mass = content["figure-2"]["MLP"]
    assert mass["dimension"] == 8 * 8 * 4 + 4 + 4 * 10 + 10
    assert [len(masses) for masses in mass["masses"].values()] == [2] * 4
    region = content["figure-3-mlp"]["methods"]["TR RMSProp"]
    assert [run["seed"] for run in region["tuning"] + region["final"]] == [0, 1]
    assert len(region["final"][0]["evaluations"]["progress"]) == 6


def test_one_figure_alone(tmp_path):
    assert main(["adaptive-norms", "--quick", "--figure", "1", "--output", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"claims-1", "figure-1"}


def test_missing_data_are_reported(tmp_path, capsys):
    options = ["adaptive-norms", "--figure", "2", "--dataset", "fashion-mnist", "--data-dir", str(tmp_path)]
    assert main(options) == 2
    assert "dataset-fashion-mnist" in capsys.readouterr().err

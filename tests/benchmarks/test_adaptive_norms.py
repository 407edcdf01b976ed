"""The reproduction of the adaptive-norms paper: ellipses, tuning, intervals, verdicts, budgets, what is written."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from benchmarks.__main__ import main
from benchmarks.adaptive_norms import figures, hessian_mass, quadratics, trust_regions
from benchmarks.adaptive_norms import main as adaptive_norms
from benchmarks.adaptive_norms.progress import progress_of, reconstruction_bounds
from benchmarks.core import data
from benchmarks.core.models import Autoencoder, Batch, Mlp, classification_loss, reconstruction_loss
from benchmarks.core.report import read_json
from benchmarks.core.statistics import Verdict
from benchmarks.core.task import Task
from benchmarks.core.train import Run, Trainer, train_step
from benchmarks.core.tune import Result

HOLDS, FAILS, UNDECIDED = Verdict


@pytest.mark.parametrize("name", quadratics.METHODS)
@pytest.mark.parametrize("problem", quadratics.PROBLEMS)
def test_the_next_iterate_lies_on_the_ellipse_where_the_linear_model_is_least(problem, name):
    hessian, start = quadratics.PROBLEMS[problem], np.array([-2.0, 1.5])
    with jax.enable_x64(True):
        descent = quadratics.descend(quadratics.METHODS[name], jnp.asarray(hessian), jnp.asarray(start), 0.05)
    descent = jax.tree.map(np.asarray, descent)
    np.testing.assert_array_equal(descent.iterates[0], start)
    for i in (1, 4):
        (shape,) = quadratics.inverse_roots(descent.matrices[i : i + 1])
        region = figures.ellipse(shape, descent.radii[i], num_points=4001)
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
    classifier = Task(Mlp(), classification_loss, digits)
    assert progress_of(classifier)({"train_accuracy": 0.7, "train_loss": 9.0}) == 0.7
    autoencoder = Task(Autoencoder(), reconstruction_loss, digits, metrics={})
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
    task = Task(Mlp(hidden=(32,)), classification_loss, digits)
    trainer = Trainer(task, hessian_mass._RMSPROP)
    run = hessian_mass.train(trainer, 0, 2000)
    shares = [task.evaluate(params)["train_accuracy"] for params in (run.initial, run.midway, run.trained)]
    assert shares[0] < 0.3 < shares[1] < 0.9 <= shares[2] == run.progress
    assert 20 < run.steps < 500
    cut = hessian_mass.train(trainer, 0, 25)
    assert (cut.steps, cut.progress < 0.9) == (25, True)


def test_noise_and_data_batches(digits):
    real, noise = hessian_mass.hessian_batches(digits.train, seed=1)
    assert real.images.shape == noise.images.shape == (hessian_mass.HESSIAN_BATCH, 8, 8, 1)
    assert 0.45 < float(noise.images.mean()) < 0.55
    assert len(np.unique(np.asarray(real.images).reshape(32, -1), axis=0)) == 32
    again, _ = hessian_mass.hessian_batches(digits.train, seed=1)
    np.testing.assert_array_equal(real.labels, again.labels)


def test_a_budget_counts_the_products_that_steps_took(digits):
    task, region = Task(Mlp(hidden=(8,)), classification_loss, digits, batch_size=200), trust_regions.TRUST_REGIONS[2]
    setting = {"initial radius": 0.1}
    spent = trust_regions.train(Trainer(task, region), setting, 2, budget=60.0, num_evaluations=5).curve

    # The same steps once more, one by one.
    params, costs = task.init(jax.random.key(2)), [0.0]
    state = params, region.make(setting).init(params)
    step = jax.jit(lambda state, batch: train_step(task, region, state, batch, setting)[0])
    for indices, _ in zip(task.batches(2), range(spent["steps"][-1]), strict=False):
        state = step(state, Batch(*(array[indices] for array in task.data.train)))
        costs.append(costs[-1] + 4 / 3 + 2 * float(optcurv.diagnostics(state[1])["trust_region/iterations"]))
    np.testing.assert_allclose(spent["gradients"], [costs[int(steps)] for steps in spent["steps"]], rtol=1e-5)
    assert spent["steps"][0] == spent["seconds"][0] == spent["gradients"][0] == 0
    assert all(np.linspace(0, 60, 6) <= spent["gradients"])
    assert spent["gradients"][-1] < 60 + 2 * max(np.diff(costs))
    assert spent["train_loss"][-1] == pytest.approx(task.evaluate(state[0])["train_loss"], rel=1e-3)
    assert spent["progress"] == spent["train_accuracy"]

    sgd = Trainer(task, trust_regions.FIRST_ORDER[0])
    plain = trust_regions.train(sgd, {"learning rate": 0.1}, 2, budget=60.0, num_evaluations=5).curve
    assert plain["gradients"] == plain["steps"] == [0, 12, 24, 36, 48, 60]
    assert plain["train_loss"][0] == pytest.approx(spent["train_loss"][0], rel=1e-5)  # the same initialisation
    tuning = trust_regions.train(sgd, {"learning rate": 0.1}, 0, budget=60.0, num_evaluations=5).curve
    assert tuning["steps"] == [0, 60]


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
        final = {name: column[-1] for name, column in evaluations.items()}
        runs.append(Run({"radius": 1.0}, i, evaluations, final))
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


def test_a_quick_run_writes_what_it_says(tmp_path, monkeypatch, capsys):
    """All trust regions and one other method, one setting each, and small networks."""
    few = (*trust_regions.TRUST_REGIONS, trust_regions.FIRST_ORDER[0])
    few = [method.at(grid={name: values[3:4] for name, values in method.grid.items()}) for method in few]
    monkeypatch.setattr(trust_regions, "METHODS", few)
    monkeypatch.setattr(trust_regions, "FIRST_ORDER", few[3:])
    monkeypatch.setitem(trust_regions.DEFAULTS, ("digits", "mlp"), trust_regions.Defaults(400.0, 512, 0.99))
    make_task = lambda model, images, size: Task(Mlp(hidden=(8,)), classification_loss, images, size)  # noqa: E731
    monkeypatch.setattr(trust_regions, "make_task", make_task)
    networks = lambda images: {"MLP": Task(Mlp(hidden=(4,)), classification_loss, images)}  # noqa: E731
    monkeypatch.setattr(adaptive_norms.hessian_mass, "networks", networks)
    assert main(["adaptive-norms", "--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "rotated by 45°" in printed
    assert "TR RMSProp" in printed
    stems = ["figure-1", "figure-2-digits", "figure-3-digits-mlp"]
    expected = {f"{stem}.{suffix}" for stem in stems for suffix in ("md", "json", "png")} | {"figure-3-digits.png"}
    expected |= {f"claims-{stem}.md" for stem in stems} | {"cache"}
    assert {path.name for path in tmp_path.iterdir()} == expected

    quadratic, masses, training = (read_json(tmp_path / f"{stem}.json") for stem in stems)
    assert [len(one["claims"]) for one in (quadratic, masses, training)] == [3, 1, 6]
    adagrad = quadratic["problems"][quadratics.ALIGNED][quadratics.DIAGONAL]
    assert len(adagrad["curve"]["mean"]) == quadratics.NUM_STEPS + 1
    assert adagrad["curve"]["mean"][-1] < -10
    mass = masses["networks"]["MLP"]
    assert mass["dimension"] == 8 * 8 * 4 + 4 + 4 * 10 + 10
    assert [len(column) for column in mass["masses"].values()] == [2] * 4
    region = training["methods"]["TR RMSProp"]
    assert region["curves"]["gradients"]["end"] >= 20
    assert region["final_loss"][0] == region["final_loss"][2]  # one seed
    assert 4 / 3 < region["step"] < 50

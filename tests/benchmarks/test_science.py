"""The problems of `python -m benchmarks science`: residuals vanish at exact solutions; runs stop by the clock."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.core.methods import Method
from benchmarks.core.report import read_json
from benchmarks.science import main as science
from benchmarks.science import problems, results, runs


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", ["poisson-2d", "poisson-5d", "heat", "burgers", "inverse"])
def test_the_equation_holds_for_the_exact_solution(name):
    problem = problems.PROBLEMS[name]()
    shape = {"poisson-5d": (20, 5), "inverse": (20,)}.get(name, (20, 2))
    points = jax.random.uniform(jax.random.key(0), shape, minval=0.05)
    residual = lambda u: jax.vmap(lambda x: problem.equation(u, x))(points)  # noqa: E731
    assert np.abs(residual(problem.solution)).max() < 1e-8
    distorted = lambda x: jax.tree.map(lambda u: 1.01 * u + 0.01 * jnp.sum(x**2), problem.solution(x))  # noqa: E731
    assert np.abs(residual(distorted)).max() > 1e-2


def test_burgers_solution_starts_where_it_should():
    x = jnp.linspace(-1, 1, 11)
    found = jax.vmap(problems.cole_hopf)(jnp.stack([x, jnp.zeros(11)], 1))
    np.testing.assert_allclose(found, -jnp.sin(jnp.pi * x), atol=1e-12)


def test_the_allen_cahn_equation_holds_for_a_travelling_wave():
    width, speed = (
        np.sqrt(8 * problems.DIFFUSION / problems.REACTION),
        3 * np.sqrt(problems.DIFFUSION * problems.REACTION / 2),
    )
    wave = lambda point: 0.5 - 0.5 * jnp.tanh((point[0] - speed * point[1]) / width)  # noqa: E731
    points = jax.random.uniform(jax.random.key(0), (20, 2), minval=-1)
    assert np.abs(jax.vmap(lambda x: problems.allen_cahn_equation(wave, x))(points)).max() < 1e-10


def test_the_allen_cahn_reference_obeys_its_equation_and_has_converged():
    times, coarse = problems.allen_cahn_reference(num_modes=64, num_steps=1000)
    _, fine = problems.allen_cahn_reference()
    assert np.abs(coarse - fine[:, ::2]).max() < 1e-7
    times, dense = problems.allen_cahn_reference(num_modes=64, num_steps=2000, num_times=1000)
    middle, step = 500, times[1]
    velocity = (dense[middle + 1] - dense[middle - 1]) / (2 * step)
    u = dense[middle]
    curvature = np.fft.irfft(-((np.pi * np.arange(65)) ** 2) * np.fft.rfft(u), 128)
    reaction = problems.REACTION * (u - u**3)
    np.testing.assert_allclose(velocity, problems.DIFFUSION * curvature + reaction, atol=1e-4)


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_problems_have_finite_losses_in_float64(name):
    problem = problems.PROBLEMS[name]()
    params = problem.init(jax.random.key(0))
    figures = problem.loss(params), problem.error(params)
    assert all(np.isfinite(figure) and figure > 0 and figure.dtype == np.float64 for figure in figures)


def test_points_on_faces():
    points = np.asarray(problems.on_faces(jax.random.uniform(jax.random.key(0), (40, 3))))
    on_face = (points == 0) | (points == 1)
    assert (on_face.sum(1) == 1).all()
    assert on_face.sum(0).min() >= 13


def test_times_to_errors_are_the_least_over_the_settings():
    tried = [{"passed": [1.0, np.inf], "error": 0.2}, {"passed": [3.0, 5.0], "error": 0.1}]
    assert results.fastest(tried) == [1.0, 5.0]
    assert results.best_run(tried) is tried[1]
    content = {"methods": {"LM": tried, "Adam": [{"error": np.nan}], "Muon": [{"error": 2.0}]}}
    assert results.sides(content) == ((0.1, "LM"), (2.0, "Muon"))


def content_of(passed, rival_passed):
    run = {"setting": {}, "seconds": 1.0, "compile_seconds": 1.0, "steps": 2, "error": 1e-3, "loss": 1.0}
    methods = {"LM": [run | {"passed": passed}], "Adam": [run | {"passed": rival_passed, "error": 1e-2}]}
    return {"title": "a problem", "parameters": 3, "seconds": 1.0, "methods": methods}


def test_speed_is_compared_at_the_least_error_of_a_rival():
    never = [np.inf] * 3
    found = {"a": content_of([0.1, 0.2, 0.3, *never], [1.0, 2.0, np.inf, *never])}
    assert results.speed_table(found).splitlines()[2].replace(" ", "") == "|aproblem|1e-02|0.2(LM)|2(Adam)|10|"
    assert results.summary_table(found).endswith("at least 10 times below the best rival on 1 of 1.\n")
    assert "No rival" in results.speed_table({"a": content_of([0.1, *never, *never[1:]], [np.inf, *never, *never[1:]])})


def test_command_writes_summary_tables_and_picture(tmp_path, monkeypatch):
    sgd = Method("SGD", lambda rate, horizon: runs.optax.sgd(rate), {"learning rate": (0.0, 0.1), "horizon": (1.0,)})
    monkeypatch.setattr(runs, "RIVALS", (sgd,))
    monkeypatch.setattr(runs, "OWN", runs.OWN[:1])
    options = ["science", "--problem", "regression", "--seconds", "1", "--output", str(tmp_path)]
    assert main(options) == 0
    content = read_json(tmp_path / "regression.json")
    still, moving = content["methods"]["SGD"]
    (kept,) = (run for run in (still, moving) if run["error"] == min(still["error"], moving["error"]))
    assert content["curves"]["SGD"][1][-1] == pytest.approx(kept["error"], rel=0.01)
    assert still["error"] != moving["error"]
    assert still["seconds"] >= 0.99
    (own,) = content["methods"]["LM"]
    assert own["loss"] < still["loss"]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"regression.md", "summary.md", "all-runs.md", "errors.png"} <= names
    assert science.tables(tmp_path)["summary"].count("\n") > 3

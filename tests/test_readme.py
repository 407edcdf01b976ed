"""README and documentation: their examples run, their commands are those of CI, and nothing public is left out."""

import functools
import itertools
import pathlib
import re
import runpy

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optcurv
from tests import problems

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if not {"_build", "api"} & set(path.parts)  # made by Sphinx
}
WITH_CODE = [name for name, text in PAGES.items() if "```python" in text]
one_process = pytest.mark.xdist_group("documentation")  # a page runs once, and pages share what JAX has compiled


@functools.cache
def run(name):
    """The names that a page's blocks define, run one after the other."""
    namespace, enable_x64 = {}, jax.config.jax_enable_x64
    try:
        for block in re.findall(r"^```python\n(.*?)^```$", PAGES[name], flags=re.DOTALL | re.MULTILINE):
            exec(block, namespace)
    finally:
        jax.config.update("jax_enable_x64", enable_x64)
    return namespace


@one_process
@pytest.mark.parametrize("name", WITH_CODE)
def test_examples_run(name):
    assert run(name)


@one_process
@pytest.mark.parametrize("name", ["README.md", "docs/getting_started.md"])
def test_ten_lines_learn(name):
    namespace = run(name)
    assert namespace["value"] < 1.5  # ln 10 = 2.3 is chance
    assert "edf/damping" in optcurv.diagnostics(namespace["opt_state"])


@one_process
def test_train_state_form_learns():
    apply_curvature = run("docs/guides/linen.md")["apply_curvature"]
    net, x = nn.Dense(1), jnp.linspace(-1, 1, 8)[:, None]
    params = net.init(jax.random.key(0), x)["params"]
    loss = optcurv.Composite(lambda p: net.apply({"params": p}, x), lambda out: jnp.mean((out - 3 * x) ** 2))
    state = TrainState.create(apply_fn=net.apply, params=params, tx=optcurv.pal())
    start = loss(params)
    for _ in range(20):
        value, grads = jax.value_and_grad(loss)(state.params)
        state = apply_curvature(state, loss, value, grads)
    assert state.step == 20
    assert loss(state.params) < 0.01 * start


@one_process
def test_nnx_form_learns():
    nnx_train_step = run("docs/guides/nnx.md")["nnx_train_step"]
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs)
    )
    optimizer = nnx.Optimizer(model, optax.chain(optcurv.edf(0.5, 1)), wrt=nnx.Param)
    x, y = jax.random.normal(jax.random.key(0), (32, 4)), jnp.arange(32) % 3
    values = [float(nnx_train_step(model, optimizer, x, y)) for _ in range(15)]
    assert values[-1] < 0.9 * values[0]


@one_process
def test_sharded_form_learns():
    sharded = run("docs/guides/many_devices.md")["sharded"]
    params, batch = problems.network_params(), problems.blobs()
    params, state, step = sharded(optcurv.pal(), params, problems.network_loss)
    assert not params["a_kernel"].sharding.is_fully_replicated
    start = problems.network_loss(batch)(params)
    for _ in range(10):
        params, state = step(params, state, batch)
    assert problems.network_loss(batch)(params) < 0.5 * start


@one_process
def test_l2_adds_a_multiple_of_the_identity_and_decay_after_a_method_a_share():
    page = run("docs/guides/weight_decay.md")
    params, loss = problems.quadratic(condition=2.0)
    vector = jax.tree.map(jnp.cos, params)
    penalised_loss = page["with_l2"](loss, 3.0)
    plain, penalised = (optcurv.gauss_newton_product(one, params)(vector) for one in (loss, penalised_loss))
    jax.tree.map(lambda a, b, v: np.testing.assert_allclose(a, b + 3 * v, rtol=1e-5), penalised, plain, vector)

    params = jax.tree.map(jnp.ones_like, params)  # where the loss is least, a line search alone would stay
    assert penalised_loss(params) == 9  # as many numbers, each 1
    decayed = page["optimizer"]
    updates, _ = decayed.update(jax.grad(loss)(params), decayed.init(params), params, value_fn=loss)
    jax.tree.map(lambda u, p: np.testing.assert_allclose(u, -1e-4 * p, rtol=1e-6), updates, params)


@one_process
def test_frozen_layers_stay_and_the_others_move():
    page = run("docs/guides/frozen_layers.md")
    for layer, is_trained in page["trained"].items():
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), page["params"][layer], page["new_params"][layer])
        assert all(jax.tree.leaves(changed)) if is_trained else not any(jax.tree.leaves(changed))


@one_process
def test_poissons_equation_is_solved():
    page = run("docs/guides/physics_informed_networks.md")
    params, new_points = page["params"], page["step_with_new_points"]
    with jax.enable_x64(True):
        assert jnp.abs(page["error"]).max() < 1e-3  # the solution's largest value is 1
        stepped, _ = jax.eval_shape(new_points, params, page["optimizer"].init(params), jax.random.key(3))
    assert jax.tree.map(jnp.shape, stepped) == jax.tree.map(jnp.shape, params)


@one_process
def test_table_of_layers_is_the_one_printed():
    page = run("docs/guides/kronecker.md")
    assert f"```text\n{optcurv.layers(page['loss'], page['params'])}\n```" in PAGES["docs/guides/kronecker.md"]


def test_readme_is_short():
    assert len(README.splitlines()) <= 150, "Move what a newcomer does not need to a page under docs/."
    assert len(README.split()) <= 1300, "Move what a newcomer does not need to a page under docs/."


def test_commands_are_one_line_each():
    assert '    pip install -e ".[benchmarks]" && python -m benchmarks\n' in README
    assert '    pip install -e ".[test]" && pytest\n' in README


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Sphinx knows neither the README's links nor the pictures that lie outside of its folder."""
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", PAGES[name]):
        is_built = target.startswith(("notebooks/", "../notebooks/")) and name.startswith("docs/")  # copied by Sphinx
        path = ROOT / target.removeprefix("../") if is_built else folder / target
        assert path.exists(), f"{name} links to {target}."


def test_every_public_name_is_on_an_api_page():
    public_names = runpy.run_path(str(ROOT / "docs" / "api_pages.py"))["public_names"]()
    assert sorted(itertools.chain(*public_names.values())) == sorted(optcurv.__all__)

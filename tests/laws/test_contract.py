"""The contract of every method: laws crossed with the rows of `cases.py` and `wrappers.py`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import optcurv
from tests import problems
from tests.cases import CASES, cases_where, every_case, every_method
from tests.wrappers import WRAPPERS


def make_step(optimizer, loss_of_batch=problems.regression_loss):
    """One training step, as a user writes it."""

    def step(params, state, batch):
        loss = loss_of_batch(batch)
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    return step


def train(step, params, state, num_steps, start=0, repeats=1):
    """Steps on one batch after the other, on each as often as `repeats` says."""
    for n in range(start, start + num_steps):
        for _ in range(repeats):
            params, state = step(params, state, problems.blobs(seed=n))
    return params, state


def assert_same(actual, expected, rtol=1e-4):
    """Equal structures, and leaves equal up to rounding."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    actual, expected = jax.device_get((actual, expected))
    scale = np.abs(ravel_pytree(expected)[0]).max()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale), actual, expected)


def assert_finite(tree):
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


@functools.cache
def jitted_step(case, loss_of_batch=problems.regression_loss):
    return jax.jit(make_step(case.make(), loss_of_batch))


def program(optimizer, params):
    """A step as JAX traces it, on leaves alone. Where two are the same, nothing need run to see that the paths are."""
    return str(jax.make_jaxpr(make_step(optimizer))(params, optimizer.init(params), problems.blobs()))


@functools.cache
def reference_program(case):
    return program(case.make(), problems.regression_params())


@functools.cache
def reference(case):
    """The parameters and state after four jitted steps of a softmax regression."""
    params = problems.regression_params()
    return train(jitted_step(case), params, case.make().init(params), 4)


def update_on(optimizer, params, loss, **extra_args):
    """The first updates of an optimiser, in one compiled program: not jitted, a loop compiles anew at every call."""
    update = lambda params: optimizer.update(  # noqa: E731
        jax.grad(loss)(params), optimizer.init(params), params, value_fn=loss, **extra_args
    )
    return jax.jit(update)(params)[0]


# Learning.


@every_case
def test_converges_on_an_ill_conditioned_quadratic(case):
    params, loss = problems.quadratic(condition=100.0)
    optimizer = case.make()
    step = jax.jit(make_step(optimizer, lambda _: loss))
    start, (params, _) = loss(params), train(step, params, optimizer.init(params), 100)
    assert loss(params) < 0.05 * start


@every_case
def test_learns_to_classify(case):
    params = problems.network_params()
    params, _ = train(jitted_step(case, problems.network_loss), params, case.make().init(params), 60)
    loss, accuracy = loss_and_accuracy(params, problems.blobs(seed=1000, size=300))
    assert loss < 0.45  # 1.1 is chance
    assert accuracy > 0.8


@jax.jit
def loss_and_accuracy(params, batch):
    logits = problems.network(params, batch.x)
    return problems.cross_entropy(logits, batch.y), jnp.mean(jnp.argmax(logits, axis=1) == batch.y)


# JAX's transformations.


@every_method
def test_jit_equals_no_jit(case):
    step, params = jitted_step(case), problems.regression_params()
    halfway = train(step, params, case.make().init(params), 2)
    assert_same(train(make_step(case.make()), *halfway, 1, start=2), train(step, *halfway, 1, start=2))


@every_case
def test_second_step_compiles_nothing(case):
    optimizer, params = case.make(), problems.regression_params()
    step = jax.jit(make_step(optimizer))
    params, _ = train(step, params, optimizer.init(params), 4)
    assert step._cache_size() == 1
    assert_same(params, reference(case)[0], rtol=1e-6)


@every_method
def test_scan_equals_the_python_loop(case):
    optimizer, params = case.make(), problems.regression_params()
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[problems.blobs(seed=n) for n in range(4)])
    step = make_step(optimizer)
    body = lambda carry, batch: (step(*carry, batch), None)  # noqa: E731
    carry, _ = jax.jit(lambda p, s: jax.lax.scan(body, (p, s), batches))(params, optimizer.init(params))
    assert_same(carry, reference(case))


@every_case
def test_vmap_over_seeds_equals_the_loop_over_seeds(case):
    optimizer = case.make()
    several = [problems.regression_params(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    step = make_step(optimizer)
    batched = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))
    together, _ = train(batched, stacked, jax.vmap(optimizer.init)(stacked), 3)
    for seed, params in enumerate(several):
        alone, _ = train(jitted_step(case), params, optimizer.init(params), 3)
        assert_same(jax.tree.map(lambda leaf, seed=seed: leaf[seed], together), alone, rtol=1e-3)


@every_method
def test_params_and_state_can_be_donated(case):
    optimizer, params = case.make(), jax.tree.map(jnp.copy, problems.regression_params())
    step = jax.jit(make_step(optimizer), donate_argnums=(0, 1))
    assert_same(train(step, params, optimizer.init(params), 4), reference(case), rtol=1e-5)
    assert params["kernel"].is_deleted()


@every_case
def test_lowers_for_every_platform(case):
    optimizer, params = case.make(), problems.regression_params()
    arguments = (params, optimizer.init(params), problems.blobs())
    exported = jax.export.export(jax.jit(_flat(make_step(optimizer), arguments)), platforms=["cpu", "cuda", "tpu"])
    assert exported(*jax.tree.map(jax.typeof, jax.tree.leaves(arguments))).platforms == ("cpu", "cuda", "tpu")


def _flat(step, arguments):
    """The step on leaves alone: `jax.export` serialises no NamedTuples it does not know."""
    structure = jax.tree.structure(arguments)
    return lambda *leaves: jax.tree.leaves(step(*jax.tree.unflatten(structure, leaves)))


# Structures, dtypes, placement, checkpoints.


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_every_leaf_keeps_its_dtype(case, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        optimizer, params = case.make(), problems.regression_params(dtype=dtype)
        state = optimizer.init(params)
        step, batch = jitted_step(case), problems.blobs(dtype=dtype)
        new_params, new_state = params, state
        for _ in range(5):
            new_params, new_state = step(new_params, new_state, batch)
        assert jax.tree.map(_dtype_and_shape, new_params) == jax.tree.map(_dtype_and_shape, params)
        assert jax.tree.map(_dtype_and_shape, new_state) == jax.tree.map(_dtype_and_shape, state)
        loss = problems.regression_loss(batch)
        assert loss(new_params) < 0.9 * loss(params)


def _dtype_and_shape(leaf):
    return jnp.result_type(leaf), jnp.shape(leaf)


@every_method
def test_mixed_dtypes_are_kept(case):
    params = problems.regression_params() | {"kernel": problems.regression_params()["kernel"].astype(jnp.bfloat16)}
    optimizer = case.make()
    new_params, _ = train(jax.jit(make_step(optimizer)), params, optimizer.init(params), 2)
    assert jax.tree.map(_dtype_and_shape, new_params) == jax.tree.map(_dtype_and_shape, params)


class Layer(NamedTuple):
    bias: Any
    nothing: Any
    kernel: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LayerDataclass:
    bias: Any
    kernel: Any


STRUCTURES = {
    "NamedTuple-with-None": lambda bias, kernel: Layer(bias, None, kernel),
    "FrozenDict": lambda bias, kernel: flax.core.freeze({"one": {"a": bias}, "two": [kernel]}),
    "nnx.State": lambda bias, kernel: nnx.State({"a": nnx.Param(bias), "b": nnx.Param(kernel)}),
    "dataclass": LayerDataclass,
    "dict-with-None": lambda bias, kernel: {"a": bias, "b": kernel, "c": None},
}


@every_case
@pytest.mark.parametrize("build", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_any_structure_takes_the_same_path(case, build):
    optimizer, params = case.make(), build(*jax.tree.leaves(problems.regression_params()))
    state = optimizer.init(params)
    out_params, out_state = jax.eval_shape(make_step(optimizer), params, state, problems.blobs())
    assert jax.tree.structure((out_params, out_state)) == jax.tree.structure((params, state))
    if program(optimizer, params) == reference_program(case):
        return
    new_params, state = train(jax.jit(make_step(optimizer)), params, state, 4)
    assert_same(jax.tree.leaves(new_params), jax.tree.leaves(reference(case)[0]), rtol=1e-5)
    assert_finite(state)


@every_method
@pytest.mark.parametrize("params", [jnp.asarray(3.0), 3.0, {"w": 3.0}], ids=["array", "float", "float-in-dict"])
def test_scalar_parameters(case, params):
    loss = optcurv.Composite(lambda p: 2.0 * (jax.tree.leaves(p)[0] - 1.0), lambda residual: 0.5 * residual**2)
    optimizer = case.make()
    new_params, _ = train(jax.jit(make_step(optimizer, lambda _: loss)), params, optimizer.init(params), 3)
    assert loss(new_params) < loss(params)


@every_method
@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
def test_sharded_batch_takes_the_same_path(case, axis_type):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    everywhere, split = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))
    optimizer = case.make()
    params = jax.device_put(problems.regression_params(), everywhere)
    state = jax.device_put(optimizer.init(params), everywhere)
    step = jax.jit(make_step(optimizer))
    for n in range(4):
        params, state = step(params, state, jax.device_put(problems.blobs(seed=n), split))
    assert params["kernel"].sharding.is_fully_replicated
    assert_same(params, reference(case)[0])


def mean_over_mesh(loss):
    """The mean of the devices' own losses, as a user of `jax.shard_map` writes it."""
    return optcurv.Composite(loss.model_fn, lambda outputs: jax.lax.pmean(loss.loss_fn(outputs), "data"))


@every_case
def test_shard_map_takes_the_same_path(case):
    """All decisions are taken on what all devices found: replicated outputs must be, or JAX raises."""
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:4]), ("data",))
    step = make_step(case.make(), lambda batch: mean_over_mesh(problems.regression_loss(batch)))
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(jax.P(), jax.P(), jax.P("data")), out_specs=jax.P()))
    params = problems.regression_params()
    params, _ = train(step, params, case.make().init(params), 4)
    assert_same(params, reference(case)[0])


@every_method
def test_checkpoint_continues_bit_for_bit(case, tmp_path):
    step, params = jitted_step(case), problems.regression_params()
    halfway = train(step, params, case.make().init(params), 2)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "halfway", halfway)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "halfway", jax.tree.map(np.zeros_like, jax.device_get(halfway)))
    jax.tree.map(np.testing.assert_array_equal, train(step, *restored, 2, start=2), train(step, *halfway, 2, start=2))


# Company in a chain.


@every_method  # what a wrapper does to one does not hang on its options
@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda wrapper: wrapper.name)
def test_wrappers_do_what_the_table_says(case, wrapper):
    optimizer, params = wrapper.wrap(case), problems.regression_params()
    step = jax.jit(make_step(optimizer))
    if wrapper.error is not None:
        with pytest.raises(wrapper.error, match=wrapper.message):
            step(params, optimizer.init(params), problems.blobs())
        return
    assert optcurv.diagnostics(optimizer.init(params))
    if wrapper.holds == "same" and (wrapper.mini_steps > 1 or program(optimizer, params) != reference_program(case)):
        final, state = train(step, params, optimizer.init(params), 4, repeats=wrapper.mini_steps)
        assert optcurv.diagnostics(state)
        assert_same(final, reference(case)[0])
    if wrapper.holds == "learns" or wrapper.mini_steps > 1:
        final, _ = train(step, params, optimizer.init(params), 40)
        test = problems.regression_loss(problems.blobs(seed=1000))
        assert test(final) < 0.9 * test(params)


@every_method
def test_optax_backtracking_follows_with_all_our_extra_arguments(case):
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=10, store_grad=True)
    check_that_it_follows(case, search)


def test_optax_zoom_follows_with_all_our_extra_arguments():
    check_that_it_follows(CASES[0], optax.scale_by_zoom_linesearch(max_linesearch_steps=5))


def check_that_it_follows(case, search):
    """The value that such a search stores must be found in the chain too, by `optax.value_and_grad_from_state`.

    It looks fields up by name, so none of our states may use `value` or `grad`.
    """
    optimizer, params = optax.chain(case.make(), search), problems.regression_params()
    loss = problems.regression_loss(problems.blobs())
    value_and_grad = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(params, state):
        value, grad = value_and_grad(params, state=state)
        extra_args = {
            "value": value,
            "grad": grad,
            "value_fn": loss,
            "curvature_value_fn": loss,
            "monitored_value": value,
        }
        updates, state = optimizer.update(grad, state, params, **extra_args)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(6):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.9 * values[0]
    np.testing.assert_allclose(value_and_grad(params, state=state)[0], loss(params), rtol=1e-5)


@cases_where(lambda case: not case.moves_without_gradient)
def test_works_on_the_updates_it_is_handed(case):
    """With the incoming updates zero nothing moves, whatever the loss's own gradient is."""
    optimizer, params = optax.chain(optax.set_to_zero(), case.make()), problems.regression_params()
    new_params, _ = jax.jit(make_step(optimizer))(params, optimizer.init(params), problems.blobs())
    jax.tree.map(np.testing.assert_array_equal, new_params, params)


@every_method
def test_value_and_grad_only_save_work(case):
    optimizer, params, batch = case.make(), problems.regression_params(), problems.blobs()
    bare = update_on(optimizer, params, problems.regression_loss(batch))
    full, _ = jitted_step(case)(params, optimizer.init(params), batch)
    assert_same(optax.apply_updates(params, bare), full, rtol=1e-6)


@every_method
def test_unknown_extra_arguments_and_auxiliary_outputs_are_ignored(case):
    optimizer, params, loss = case.make(), problems.regression_params(), problems.regression_loss(problems.blobs())
    with_aux = optcurv.Composite(lambda p: (loss.model_fn(p), "aux"), loss.loss_fn, has_aux=True)
    bare = update_on(optimizer, params, loss)
    update = lambda p: optimizer.update(  # noqa: E731
        jax.grad(loss)(p), optimizer.init(p), p, value_fn=with_aux, somebody_elses=1.0
    )
    jax.tree.map(np.testing.assert_array_equal, bare, jax.jit(update)(params)[0])


@every_case
def test_curvature_closure_matters_only_to_curvature_methods(case):
    optimizer, params, loss = case.make(), problems.regression_params(), problems.regression_loss(problems.blobs())
    steeper = optcurv.Composite(loss.model_fn, lambda outputs: 1000 * loss.loss_fn(outputs))
    plain, other = update_on(optimizer, params, loss), update_on(optimizer, params, loss, curvature_value_fn=steeper)
    assert np.allclose(ravel_pytree(plain)[0], ravel_pytree(other)[0]) != case.curvature


@every_case
def test_state_names_no_python_objects_and_info_is_scalar(case):
    params = problems.regression_params()
    state = case.make().init(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    report = optcurv.diagnostics(reference(case)[1])
    assert report
    assert all(np.shape(value) == () for value in report.values())


# Faults.


@every_case
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_poisoned_batches_move_nothing_to_nan_and_the_next_ones_teach(case, poison):
    step, params = jitted_step(case, linear_loss), problems.regression_params()
    state, good = case.make().init(params), problems.blobs()
    bad = good._replace(x=good.x.at[3, 2].set(poison))
    for batch in (bad, good, good, bad, bad):
        params, state = step(params, state, batch)
        assert_finite(params)
    params, state = train(step, params, state, 20)
    assert_finite((params, state))
    assert linear_loss(good)(params) < 0.5 * linear_loss(good)(problems.regression_params())


def linear_loss(batch):
    """A loss that lets a poisoned input through, which a saturating one would hide."""

    def model_fn(params):
        bias, kernel = jax.tree.leaves(params)
        return batch.x @ kernel + bias

    return optcurv.Composite(model_fn, lambda outputs: jnp.mean((outputs - jax.nn.one_hot(batch.y, 3)) ** 2))


@every_case
def test_missing_closure_or_params(case):
    optimizer, params = case.make(), problems.regression_params()
    state = optimizer.init(params)
    with pytest.raises(TypeError, match=r"needs the extra argument value_fn.*update\(updates, state, params"):
        optimizer.update(params, state, params)
    with pytest.raises(ValueError, match="needs params"):
        optimizer.update(params, state, value_fn=problems.regression_loss(problems.blobs()))


@every_case
def test_complex_parameters(case):
    loss = optcurv.Composite(lambda w: jnp.abs(w - 1), lambda outputs: jnp.sum(outputs**2))
    optimizer, params = case.make(), jnp.array([1j, 2.0])
    with pytest.raises(TypeError, match="must be real"):
        optimizer.update(jax.grad(loss)(params), optimizer.init(params), params, value_fn=loss)


@every_case
def test_loss_that_is_no_scalar(case):
    optimizer, params, loss = case.make(), problems.regression_params(), problems.regression_loss(problems.blobs())
    per_example = optcurv.Composite(loss.model_fn, lambda outputs: jnp.sum(outputs**2, axis=1))
    with pytest.raises(TypeError, match=r"real scalar.*mean"):
        optimizer.update(params, optimizer.init(params), params, value_fn=per_example)


@cases_where(lambda case: case.needs_composite)
def test_plain_closure_where_a_composite_is_needed(case):
    optimizer, params = case.make(), problems.regression_params()
    loss = problems.regression_loss(problems.blobs())
    with pytest.raises(TypeError, match=r"optcurv\.Composite"):
        optimizer.update(params, optimizer.init(params), params, value_fn=lambda p: loss(p))


@cases_where(lambda case: not case.needs_composite)
def test_plain_closure_where_it_is_enough(case):
    optimizer, params = case.make(), problems.regression_params()
    plain = lambda batch: lambda p: problems.regression_loss(batch)(p)  # noqa: E731
    assert_same(train(jax.jit(make_step(optimizer, plain)), params, optimizer.init(params), 4), reference(case))

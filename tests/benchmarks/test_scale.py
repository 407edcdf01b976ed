"""Cost at scale: collectives counted in known programs, laws of what methods communicate, the model, the command."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from benchmarks.__main__ import main
from benchmarks.performance import scale, scale_report, scale_steps
from benchmarks.performance.programs import Traffic, read_cost
from benchmarks.performance.scale_steps import GRADIENT_STEP, TSO_ALRA, Placement, Setup, average_cost, edf
from benchmarks.performance.scaling_model import Machine, Work, make_work
from tests.test_sharding import auto_mesh

MACHINE = Machine(flops_rate=1e12, bandwidth=1e9, latency=1e-6)


def count(body, *shapes, loop_limit=None, branch=max):
    """What a program communicates, each of whose four devices runs the body on the same arrays."""
    everywhere = jax.P()
    program = jax.shard_map(body, mesh=auto_mesh(data=4), in_specs=everywhere, out_specs=everywhere, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_cost(jax.jit(program).lower(*arguments).compile().as_text(), loop_limit, branch).communication


def test_collectives_are_counted_where_they_stand_and_in_loops():
    def body(x, y):
        x = jax.lax.psum(x, "data")
        return x, jax.lax.fori_loop(0, 7, lambda i, y: jnp.sin(jax.lax.psum(y, "data")), y)

    assert count(body, (8, 3), (5,)) == {"all-reduce": Traffic(1 + 7, 4 * (24 + 7 * 5))}


def test_loops_within_loops_multiply():
    def inner(i, y):
        return jax.lax.fori_loop(0, 3, lambda j, y: jnp.sin(jax.lax.psum(y, "data")), jnp.cos(y))

    assert count(lambda y: jax.lax.fori_loop(0, 7, inner, y), (5,)) == {"all-reduce": Traffic(21, 4 * 21 * 5)}


def test_loops_that_may_stop_early_need_a_limit():
    def body(x):
        return jax.lax.while_loop(lambda x: x[0] < 1, lambda x: jnp.exp(jax.lax.psum(x, "data")), x)

    with pytest.raises(ValueError, match="give a limit"):
        count(body, (6,))
    assert count(body, (6,), loop_limit=5) == {"all-reduce": Traffic(5, 5 * 24)}


def test_a_loop_s_condition_is_met_once_more_than_its_body():
    def body(x):
        return jax.lax.while_loop(lambda x: jax.lax.psum(x[0], "data") < 1, jnp.exp, x)

    assert count(body, (6,), loop_limit=5) == {"all-reduce": Traffic(6, 6 * 4)}


def test_conditions_count_for_the_dearer_or_the_cheaper_branch():
    def body(x):
        branches = [lambda x: x, lambda x: jax.lax.psum(x[:3], "data").sum() * x, lambda x: jax.lax.psum(x, "data")]
        return jax.lax.switch(x[0].astype(int), branches, x)

    assert count(body, (6,)) == {"all-reduce": Traffic(1, 24)}
    assert count(body, (6,), branch=min) == {}


@pytest.mark.parametrize(
    ("collective", "kind", "num_bytes"),
    [
        (lambda x: jax.lax.all_gather(x, "data"), "all-gather", 4 * 4 * 24),
        (lambda x: jax.lax.psum_scatter(x, "data"), "reduce-scatter", 4 * 24),
        (lambda x: jax.lax.all_to_all(x, "data", 0, 0), "all-to-all", 4 * 24),
        (lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), "collective-permute", 4 * 24),
        (lambda x: jax.lax.psum(x.astype(jnp.float16), "data"), "all-reduce", 2 * 24),
    ],
)
def test_bytes_are_those_of_the_whole_array(collective, kind, num_bytes):
    found = count(collective, (4, 6))
    assert set(found) == {kind}
    assert found[kind].num_bytes == num_bytes


SETUP = Setup(width=16, batch_size=512, num_devices=4, platform="cpu", hidden_layers=1)
VECTOR = 4 * SETUP.num_params  # bytes
SCALARS = 64


def test_parameters_are_counted():
    shapes = jax.eval_shape(SETUP.task.init, jax.random.key(0), SETUP.batch_shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == SETUP.num_params


@pytest.mark.parametrize(
    ("candidate", "vectors"),
    [
        (GRADIENT_STEP, 1),
        (edf(2, optcurv.gauss_newton_product), 3),
        (scale_steps.trust_region(3), 4),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_data_parallel_steps_reduce_a_vector_a_gradient_and_one_a_product(candidate, vectors):
    found = average_cost(SETUP, candidate).communication
    assert set(found) == {"all-reduce"}
    assert vectors * VECTOR <= found["all-reduce"].num_bytes <= vectors * VECTOR + SCALARS


def test_sharded_parameters_are_gathered_once_and_directions_too():
    sharded = dataclasses.replace(SETUP, placement=Placement.ROWS)
    found = average_cost(sharded, edf(1, optcurv.gauss_newton_product)).communication
    assert found["all-gather"].num_bytes == pytest.approx(2 * VECTOR, rel=0.1)
    assert found["all-reduce"].num_bytes == pytest.approx(2 * VECTOR, rel=0.1)


def test_kronecker_factors_are_reduced_every_tenth_step():
    one_layer = dataclasses.replace(SETUP, hidden_layers=0)
    found = average_cost(one_layer, TSO_ALRA).communication
    factors = 17**2 + 10**2  # of inputs and a bias, and of outputs
    assert found["all-reduce"].num_bytes == pytest.approx(4 * (one_layer.num_params + 0.1 * factors), abs=SCALARS)


def test_the_clock_says_which_step_it_is():
    optimizer, params = TSO_ALRA.method.optimizer(0.1), {"w": jnp.ones((3, 2))}
    state = optimizer.init(params)
    _, changed = scale_steps.with_clock((params, state), (("count", 110), ("ages", -1)))
    assert optax.tree.get(changed, "count") == 110
    assert np.all(optax.tree.get(changed, "ages") == -1)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), changed) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )


def test_shares_of_a_method_s_kinds_of_steps_make_one():
    for candidate in scale_steps.CANDIDATES:
        assert sum(kind.share for kind in candidate.kinds) == pytest.approx(1)


def work(communication=None, **kwargs):
    communication = {"all-reduce": Traffic(1, 4e6)} if communication is None else communication
    return Work(
        **{"fixed_flops": 1e6, "flops_per_example": 6e6, "communication": communication, "sharded": False} | kwargs
    )


def test_one_device_communicates_nothing():
    assert work().seconds(MACHINE, 1, 128) == pytest.approx((1e6 + 128 * 6e6) / 1e12, rel=1e-12)
    assert work().weak_efficiency(MACHINE, 1, 128) == work().strong_efficiency(MACHINE, 1, 128) == 1


def test_an_all_reduce_takes_a_ring_s_bytes_and_a_tree_s_messages():
    assert work().communication_seconds(MACHINE, 8) == pytest.approx(2 * 7 / 8 * 4e6 / 1e9 + 2 * 3 * 1e-6)
    gather = {"all-gather": Traffic(2, 4e6)}
    assert work(gather).communication_seconds(MACHINE, 8) == pytest.approx(7 / 8 * 4e6 / 1e9 + 2 * 3 * 1e-6)


def test_efficiency_falls_with_the_devices_and_only_by_communication():
    devices = [2**i for i in range(11)]
    for efficiency in (work().weak_efficiency, work().strong_efficiency):
        assert np.all(np.diff([efficiency(MACHINE, n, 4096) for n in devices]) < 0)
    silent = work({})
    assert [silent.weak_efficiency(MACHINE, n, 4096) for n in devices] == [1] * len(devices)
    shared = work({}, sharded=True)
    assert shared.strong_efficiency(MACHINE, 1024, 4096) == pytest.approx(1)


def test_operations_grow_in_a_straight_line():
    fitted = make_work([5.0, 8.0], [10, 20], {}, sharded=False)
    assert (fitted.fixed_flops, fitted.flops_per_example) == pytest.approx((2.0, 0.3))


def test_operations_are_those_of_the_products_in_loops_too():
    width, batch_size = 16, 32
    alone = Setup(width, batch_size, hidden_layers=1)
    square, last = 2 * batch_size * width * width, 2 * batch_size * width * scale_steps.NUM_CLASSES
    # Forwards and to the weights, and in the second layer to the inputs.
    gradient = average_cost(alone, GRADIENT_STEP).flops
    assert gradient == 2 * square + 3 * last
    # Along the weights and back to them; in the second layer also along the inputs and back to these.
    product = 2 * square + 4 * last
    trial = square + last
    assert average_cost(alone, scale_steps.trust_region(3)).flops == gradient + 3 * product + trial


def test_a_kind_of_step_does_what_is_due():
    setup = Setup(width=64, batch_size=32, hidden_layers=0)
    quiet, factors, roots = (
        average_cost(setup, dataclasses.replace(TSO_ALRA, kinds=(kind._replace(share=1.0),))).flops
        for kind in TSO_ALRA.kinds
    )
    size, rank = 65, 16
    assert factors - quiet >= 2 * 32 * (size**2 + 10**2)
    assert roots - quiet >= 3 * 2 * size**2 * rank
    assert quiet < average_cost(setup, GRADIENT_STEP).flops + 2 * 64 * 10 * 10 * rank


def test_what_does_not_fit_into_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(scale_steps, "available_bytes", lambda: 1000)
    setup = Setup(width=16, batch_size=4, hidden_layers=1)
    found = scale_steps.compare(setup, GRADIENT_STEP, rounds=1)
    assert not found["fits"]
    assert found["bytes"] > 1000
    row = {"method": "m", "floor": 1.0, "parameters": 7, "flops_ratio": 1.0} | found
    assert "needs more memory" in " ".join(scale_report.ratios_table("", "parameters", [row]).columns[4].cells)
    assert scale_report.draw_against("", "parameters", [row]).axes
    monkeypatch.setattr(scale_steps, "available_bytes", lambda: 1e9)
    assert scale_steps.compare(setup, GRADIENT_STEP, rounds=1)["fits"]


def test_quick_command_writes_everything_and_keeps_what_it_measured(tmp_path, monkeypatch):
    command = ["scale", "--quick", "--output", str(tmp_path)]
    assert main(command) == 0
    pictures = {f"{name}.png" for name in scale.PARTS}
    tables = {f"{name}.{ending}" for name in [*scale.PARTS, "collectives"] for ending in ("txt", "json")}
    assert pictures | tables <= {path.name for path in tmp_path.iterdir()}

    def count_again(*args):
        raise AssertionError

    monkeypatch.setattr(scale, "average_cost", count_again)
    assert main([*command, "--part", "model", "--bandwidth", "500"]) == 0
    assert "500 GB/s" in (tmp_path / "model.txt").read_text()

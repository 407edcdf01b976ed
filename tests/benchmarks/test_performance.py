"""Performance: the cost of steps, memory, precision; collectives, laws of what methods communicate, the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from benchmarks.__main__ import main
from benchmarks.core import methods
from benchmarks.core.models import Mlp, classification_loss
from benchmarks.core.report import read_json
from benchmarks.core.task import Task
from benchmarks.core.timing import noise
from benchmarks.performance import cost, loops, memory, precision, scale, scale_report, scale_steps, slices
from benchmarks.performance import main as performance
from benchmarks.performance.programs import Traffic, read_cost
from benchmarks.performance.scale_steps import GRADIENT_STEP, TSO_ALRA, Placement, Setup, average_cost, edf
from benchmarks.performance.scaling_model import Machine, Work, make_work
from tests.test_sharding import auto_mesh


def test_cost_of_a_small_network(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "METHODS", [methods.METHODS[0], methods.METHODS[3]])
    # At 32 images the guards against spikes, a few operations a parameter, are 6 % of Runge-Kutta's two gradients.
    task = Task(Mlp(hidden=(64, 64)), classification_loss, noise(64), 64)
    monkeypatch.setattr(performance, "workloads", lambda: {"mlp": task})
    monkeypatch.setattr(slices, "NUM_IMAGES", 500)
    monkeypatch.setattr(loops, "NUM_COMPILES", 1)
    monkeypatch.setattr(loops, "CURVATURES", {"Hessian": loops.CURVATURES["Hessian"]})
    assert main(["performance", "--part", "cost", "--rounds", "2", "--output", str(tmp_path)]) == 0
    figures = read_json(tmp_path / "cost-mlp.json")
    gradient, sgd, edf, runge_kutta, steihaug, lanczos = figures["rows"]
    assert gradient["flops_ratio"] == 1
    assert gradient["seconds_ratio_quartiles"] == [1, 1, 1]
    assert 1 < sgd["flops_ratio"] < runge_kutta["flops_ratio"] < edf["flops_ratio"] < 3
    assert runge_kutta["flops_ratio"] == pytest.approx(runge_kutta["floor"], rel=0.05)
    assert 1 / 3 < figures["forward_flops_ratio"] < 1 / 2
    # Four products each, all but one of them beyond XLA's count of a loop: of 4/3 and of 2 gradients, or less.
    assert 4 < steihaug["flops_ratio"] < 1.2 * steihaug["floor"] == pytest.approx(8, rel=1e-3)
    assert 6 < lanczos["flops_ratio"] < 1.2 * lanczos["floor"] == pytest.approx(11.2, rel=1e-3)
    assert edf["seconds_ratio_quartiles"] == sorted(edf["seconds_ratio_quartiles"])
    assert min(row["temporary_bytes"] for row in figures["rows"]) > 0
    assert "EDF-G k=1" in (tmp_path / "cost-mlp.md").read_text()
    assert [row["curvature"] for row in figures["loops"]] == ["Hessian"]
    assert "ms in the CG loop" in (tmp_path / "loops-mlp.md").read_text()
    planes = figures["planes"]
    of_planes = planes["temporary_bytes"]
    assert planes["forward_temporary_bytes"] > 4 * 64 * 500  # a layer's activations
    one_point = planes["forward_temporary_bytes"] + 4 * 60_000  # the parameters there
    assert of_planes["9x9"] == pytest.approx(of_planes["5x5"], rel=0.01)
    assert of_planes["9x9"] < 1.1 * one_point
    assert planes["throughput_ratio_quartiles"] == sorted(planes["throughput_ratio_quartiles"])
    assert "500 images" in (tmp_path / "planes-mlp.md").read_text()


@pytest.mark.parametrize("name", ["PAL", "SGD-RK2", "EDF-G k=8", "TR Steihaug H"])
def test_steps_keep_to_their_memory(name, monkeypatch):
    """Counted by XLA, in vectors of parameters; much the same for a network of ten million."""
    monkeypatch.setattr(memory, "LIMITS", {name: memory.LIMITS[name]})
    (row,) = memory.measure(memory.make_task((400, 400)))
    assert 0.5 < row["vectors"] <= row["limit"]
    assert "within" in memory.memory_table({"rows": [row]})


def test_precision_compares_accuracies(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "RUNS", precision.RUNS[:1])
    assert main(["performance", "--part", "precision", "--quick", "--output", str(tmp_path)]) == 0
    accuracies = read_json(tmp_path / "precision.json")["accuracies"]["SGD-momentum"]
    assert [len(accuracies[dtype]) for dtype in ("float32", "bfloat16")] == [1, 1]
    assert accuracies["float32"] != accuracies["bfloat16"]


@pytest.mark.parametrize(("lost", "verdict"), [(0.005, "yes"), (0.02, "no")])
def test_a_loss_of_accuracy_is_told(lost, verdict):
    accuracies = {"SGD": {"float32": [0.9, 0.95], "bfloat16": [0.9 - lost, 0.95 - lost]}}
    text = precision.precision_table({"steps": 10, "accuracies": accuracies})
    (row,) = (line for line in text.splitlines() if "SGD" in line)
    assert row.endswith(f" {verdict} |")


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
    shapes = jax.eval_shape(SETUP.task.init, jax.random.key(0))
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
    content = {"title": "", "varied": "parameters", "rows": [row]}
    assert "needs more memory" in scale_report.ratios_table(content)
    assert scale_report.draw_against(content).axes
    monkeypatch.setattr(scale_steps, "available_bytes", lambda: 1e9)
    assert scale_steps.compare(setup, GRADIENT_STEP, rounds=1)["fits"]


def test_quick_parts_write_everything_and_keep_what_they_measured(tmp_path, monkeypatch):
    command = ["performance", "--quick", "--output", str(tmp_path)]
    parts = ("parameters", "batch", "order", "devices", "model")
    for part in parts:
        assert main([*command, "--part", part]) == 0
    pictures = {f"{name}.png" for name in parts}
    written = {f"{name}.{ending}" for name in parts for ending in ("md", "json")}
    assert pictures | written | {"collectives.md"} <= {path.name for path in tmp_path.iterdir()}

    def count_again(*args):
        raise AssertionError

    monkeypatch.setattr(scale, "average_cost", count_again)
    assert main([*command, "--part", "model", "--bandwidth", "500"]) == 0
    assert "500 GB/s" in (tmp_path / "model.md").read_text()

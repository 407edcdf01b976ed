import jax
import jax.numpy as jnp
import optax
import pytest

import optcurv
from tests import problems

EDF_FIELDS = "damping residual_norm iterations cosine negative_curvature breakdown finite refused"
EDF_KEYS = {f"edf/{field}" for field in EDF_FIELDS.split()}
PAL_KEYS = {f"pal/{field}" for field in ("slope", "curvature", "step", "case", "clipped", "noise")}


def everything(params):
    return jax.tree.map(lambda _: "all", params)


NESTINGS = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), optax.chain(tx)),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
    "multi_transform": lambda tx: optax.multi_transform({"all": tx}, everything),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "all-at-once": lambda tx: optax.MultiSteps(optax.chain(optax.multi_transform({"all": tx}, everything)), 1),
}


@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS.keys())
def test_info_is_found_in_any_nesting(nest):
    params, loss = problems.network_params(), problems.network_loss(problems.blobs())
    optimizer = nest(optax.chain(optcurv.edf(0.3), optcurv.scale_by_parabolic_linesearch()))
    state = optimizer.init(params)
    value, grad = jax.value_and_grad(loss)(params)
    _, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss)
    report = optcurv.diagnostics(state)
    assert report.keys() == EDF_KEYS | PAL_KEYS
    assert report["edf/iterations"] == 2
    assert report["edf/finite"]
    assert 0 < report["edf/cosine"] <= 1
    assert report["pal/slope"] < 0


def test_it_works_inside_jit():
    state = jax.jit(optcurv.edf(0.1).init)(jnp.zeros(3))
    assert jax.jit(optcurv.diagnostics)(state).keys() == EDF_KEYS


def test_repeated_methods_are_numbered():
    state = optax.chain(optcurv.scale_by_edf(1), optcurv.scale_by_edf(2)).init(jnp.zeros(3))
    assert optcurv.diagnostics(state).keys() == EDF_KEYS | {key.replace("edf/", "edf_1/") for key in EDF_KEYS}


def test_line_searches_of_optax_report_too():
    state = optax.chain(optcurv.edf(0.1), optax.scale_by_backtracking_linesearch(5)).init(jnp.zeros(3))
    assert "backtracking_linesearch/num_linesearch_steps" in optcurv.diagnostics(state)


def test_states_that_report_nothing_give_an_empty_dict():
    assert optcurv.diagnostics(optax.adam(0.1).init(jnp.zeros(3))) == {}

"""Wrong calls, and the sentence of ours that each is answered with. Nothing is compiled: they fail while traced."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from tests import problems
from tests.cases import CASES, Case, every_method
from tests.wrappers import everywhere


class Wrong(NamedTuple):
    """What is done wrong, and what it is answered with."""

    name: str
    call: Callable[..., Any]
    error: type[Exception]
    message: str


def table(rows):
    return pytest.mark.parametrize("wrong", [pytest.param(row, id=row.name) for row in rows])


network = optax.chain(optcurv.edf(0.1))  # a transformation where a function or a number is wanted
square = optcurv.Composite(lambda p: p, lambda outputs: jnp.sum(outputs**2))


@jax.custom_vjp
def backward_only(x):
    return jnp.tanh(x)


backward_only.defvjp(lambda x: (jnp.tanh(x), x), lambda x, cotangent: (cotangent / jnp.cosh(x) ** 2,))


LEARNING_RATES = {
    "edf": optcurv.edf,
    "sgd_rk2": optcurv.sgd_rk2,
    "adam_rk2": optcurv.adam_rk2,
    "tso_alra": functools.partial(optcurv.tso_alra, when=3),
}
WRONG_RATES = [
    ("a-string", "0.1", TypeError, r"learning_rate must be a number or a schedule, got '0\.1'"),
    ("none", None, TypeError, "learning_rate must be a number or a schedule, got None"),
    ("a-boolean", True, TypeError, "learning_rate must be a number or a schedule, got True"),
    ("not-a-number", float("nan"), ValueError, "learning_rate must be finite.*got nan"),
    ("infinite", float("inf"), ValueError, "learning_rate must be finite.*got inf"),
    ("negative", -1, ValueError, "learning_rate must be finite.*got -1"),
    ("a-schedule-not-made", optax.cosine_decay_schedule, TypeError, r"learning_rate must be a function of \(count\)"),
]

CONSTRUCTORS = [
    Wrong(f"{method}-rate-{name}", functools.partial(factory, rate), error, message)
    for method, factory in LEARNING_RATES.items()
    for name, rate, error, message in WRONG_RATES
] + [
    Wrong(
        "edf-curvature-of-one-argument",
        lambda: optcurv.edf(1.0, curvature=lambda p: p),
        TypeError,
        r"curvature must be a function of \(value_fn, params\).*the function <lambda>",
    ),
    Wrong(
        "edf-curvature-a-product",
        lambda: optcurv.edf(1.0, curvature=optcurv.hessian_product(square, jnp.ones(2))),
        TypeError,
        "curvature must be a function of",
    ),
    Wrong("edf-krylov-dim-fraction", lambda: optcurv.edf(1.0, 2.5), TypeError, "max_iter must be a Python int"),
    Wrong("edf-damping-negative", lambda: optcurv.edf(1.0, damping_scale=-1.0), ValueError, "damping_scale must be"),
    Wrong("edf-acceleration", lambda: optcurv.edf(1.0, acceleration="W2"), ValueError, "acceleration must be None"),
    Wrong(
        "nesterov-alpha-schedule",
        lambda: optcurv.scale_by_nesterov_flow(lambda count: 3.0),
        TypeError,
        "alpha must be a number, got the function",
    ),
    Wrong(
        "trust-region-solver-not-made",
        lambda: optcurv.trust_region(solver=optcurv.steihaug),
        TypeError,
        r"solver must be a function of \(matvec, .*such as optcurv\.steihaug\(\); got the function steihaug",
    ),
    Wrong("trust-region-solver-name", lambda: optcurv.trust_region(solver="steihaug"), TypeError, "solver must be"),
    Wrong(
        "trust-region-shape-not-made",
        lambda: optcurv.trust_region(norm=optcurv.rmsprop_norm),
        TypeError,
        r"norm must be an optcurv\.Norm like optcurv\.rmsprop_norm\(\)",
    ),
    Wrong(
        "trust-region-curvature-name", lambda: optcurv.trust_region(curvature="hessian"), TypeError, "curvature must be"
    ),
    Wrong(
        "trust-region-radius-schedule",
        lambda: optcurv.trust_region(initial_radius=lambda count: 0.1),
        TypeError,
        "initial_radius must be a number, got",
    ),
    Wrong(
        "cubic-shape-a-number", lambda: optcurv.adaptive_cubic(norm=1.0), TypeError, r"norm must be an optcurv\.Norm"
    ),
    Wrong("steihaug-tol-string", lambda: optcurv.steihaug(tol="0.1"), TypeError, "tol must be a number"),
    Wrong("lanczos-no-product", lambda: optcurv.gltr(0), ValueError, "max_iter must be at least 1"),
    Wrong("shape-eps-schedule", lambda: optcurv.rmsprop_norm(eps=lambda n: 0.1), TypeError, "eps must be a number"),
    Wrong("pal-momentum-schedule", lambda: optcurv.pal(momentum=lambda n: 0.4), TypeError, "momentum must be a number"),
    Wrong("pal-step-zero", lambda: optcurv.pal(0.0), ValueError, "measuring_step must be finite, > 0"),
    Wrong(
        "runge-kutta-of-a-number",
        lambda: optcurv.runge_kutta(0.1, 0.1),
        TypeError,
        r"inner must be an optax transformation such as optax\.adam\(1e-3\), got 0\.1",
    ),
    Wrong(
        "runge-kutta-inner-not-made",
        lambda: optcurv.runge_kutta(optax.adam, 0.1),
        TypeError,
        "inner must be an optax transformation .*got the function adam",
    ),
    Wrong(
        "runge-kutta-tableau-name",
        lambda: optcurv.runge_kutta(optax.sgd(0.1), 0.1, tableau="heun"),
        TypeError,
        r"tableau must be an optcurv\.Tableau",
    ),
    Wrong("adam-b1-schedule", lambda: optcurv.adam_rk2(0.1, lambda n: 0.9), TypeError, "b1 must be a number"),
    Wrong(
        "switch-second-a-number",
        lambda: optcurv.switch(optax.adam(0.1), 0.1, 5),
        TypeError,
        "second must be an optax transformation.*got 0.1",
    ),
    Wrong(
        "switch-first-not-made",
        lambda: optcurv.switch(optax.adam, optax.sgd(0.1), 5),
        TypeError,
        "first must be an optax transformation",
    ),
    Wrong(
        "switch-when-fraction",
        lambda: optcurv.switch(optax.adam(0.1), optax.sgd(0.1), 0.5),
        TypeError,
        "when must be a number of steps",
    ),
    Wrong(
        "switch-rule-not-made",
        lambda: optcurv.switch(optax.adam(0.1), optax.sgd(0.1), optcurv.on_plateau),
        TypeError,
        "when must be a number of steps or a rule",
    ),
    Wrong(
        "tso-alra-preconditioner-not-made",
        lambda: optcurv.tso_alra(0.1, when=3, preconditioner=optcurv.scale_by_kronecker),
        TypeError,
        "preconditioner must be an optax transformation",
    ),
    Wrong(
        "kronecker-layers-a-network",
        lambda: optcurv.scale_by_kronecker(layers=network),
        TypeError,
        r"layers must be what optcurv\.layers\(value_fn, params\) returns",
    ),
    Wrong(
        "kronecker-sampler-an-array",
        lambda: optcurv.scale_by_kronecker(sampler=jnp.zeros(3)),
        TypeError,
        r"sampler must be a function of \(key, outputs\), .*got an array float32\(3,\)",
    ),
    Wrong(
        "kronecker-sampler-of-one-argument",
        lambda: optcurv.scale_by_kronecker(sampler=lambda logits: logits),
        TypeError,
        r"sampler must be a function of \(key, outputs\)",
    ),
    Wrong(
        "kronecker-structure-name",
        lambda: optcurv.scale_by_kronecker(structure="block"),
        TypeError,
        r"structure must be optcurv\.KRONECKER",
    ),
    Wrong("kronecker-power-positive", lambda: optcurv.scale_by_kronecker(1.0), ValueError, "power must be negative"),
    Wrong("masked-none", lambda: optcurv.masked(optcurv.pal(), None), TypeError, "mask must be a pytree of booleans"),
    Wrong("masked-name", lambda: optcurv.masked(optcurv.pal(), "w"), TypeError, "mask must be a pytree of booleans"),
    Wrong(
        "masked-inner-not-made",
        lambda: optcurv.masked(optcurv.pal, {"w": True}),
        TypeError,
        "inner must be an optax transformation",
    ),
    Wrong("masked-mask-of-nothing", lambda: optcurv.masked(optcurv.pal(), lambda: True), TypeError, "mask must be"),
    Wrong("composite-value", lambda: optcurv.Composite(0.5, jnp.sum), TypeError, r"Composite\.model_fn must be a func"),
    Wrong(
        "composite-model-of-two",
        lambda: optcurv.Composite(lambda p, x: x @ p, jnp.sum),
        TypeError,
        r"Composite\.model_fn must be a function of \(params\), with the inputs in its closure",
    ),
    Wrong(
        "composite-loss-of-two",
        lambda: optcurv.Composite(lambda p: p, lambda outputs, labels: jnp.mean((outputs - labels) ** 2)),
        TypeError,
        r"Composite\.loss_fn must be a function of \(outputs\), with the labels in its closure",
    ),
    Wrong("composite-called-with-batch", lambda: square(jnp.ones(2), jnp.ones(3)), TypeError, "the loss has the batch"),
    Wrong(
        "nnx-loss-of-two",
        lambda: optcurv.nnx_value_fn(lambda model, batch: 0.0, None),
        TypeError,
        r"loss_of_model must be a function of \(model\)",
    ),
    Wrong("seed-a-string", lambda: optcurv.trust_region(seed="a"), TypeError, "seed must be an integer, got 'a'"),
    Wrong(
        "seed-of-labels", lambda: optcurv.scale_by_kronecker(seed=None), TypeError, "seed must be an integer, got None"
    ),
    Wrong("seed-a-fraction", lambda: optcurv.adaptive_cubic(seed=0.5), TypeError, "seed must be an integer, got 0.5"),
    Wrong(
        "accumulate-a-number",
        lambda: optcurv.accumulate(lambda batch: jnp.sum(batch), jnp.ones((2, 3))),
        TypeError,
        "loss_of_batch must return the loss as a function of params",
    ),
    Wrong(
        "accumulate-of-two",
        lambda: optcurv.accumulate(lambda params, batch: 0.0, jnp.ones((2, 3))),
        TypeError,
        r"loss_of_batch must be a function of \(batch\)",
    ),
    Wrong(
        "hessian-of-a-value",
        lambda: optcurv.hessian_product(0.5, jnp.ones(2)),
        TypeError,
        "The loss must be a function",
    ),
    Wrong(
        "gauss-newton-of-custom-vjp",
        lambda: optcurv.gauss_newton_product(optcurv.Composite(backward_only, jnp.sum), jnp.ones(2)),
        TypeError,
        r"backward derivative of jax\.custom_vjp.*by jax\.custom_jvp.*curvature=optcurv\.hessian_product",
    ),
]


@table(CONSTRUCTORS)
def test_constructors(wrong):
    with pytest.raises(wrong.error, match=wrong.message):
        wrong.call()


def test_numbers_may_be_numpys():
    optcurv.edf(np.float32(0.1), damping_power=np.int64(1))
    optcurv.trust_region(initial_radius=np.float64(0.1), seed=np.uint32(3))
    with pytest.raises(ValueError, match="learning_rate must be finite"):
        optcurv.edf(np.float32(np.nan))
    with pytest.raises(ValueError, match="power must be negative"):
        optcurv.scale_by_kronecker(np.float32(0.5))
    with pytest.raises(ValueError, match="momentum must be below 1"):
        optcurv.levenberg_marquardt(momentum=np.float32(1.0))


PARAMS = problems.regression_params()
OTHER = {"bias": jnp.zeros(5), "kernel": jnp.ones((4, 5))}
BROADCASTING = {"bias": jnp.zeros(1), "kernel": jnp.ones((1, 3))}
LOSS = problems.regression_loss(problems.blobs())
LIKE_PARAMS = r"must have the structure and the shapes of params"


def replaced(**changes):
    return lambda optimizer, call: call | changes


def loss_returning(value):
    """A loss whose two parts end in `value(loss)`."""
    return with_loss(optcurv.Composite(LOSS.model_fn, lambda logits: value(LOSS.loss_fn(logits))))


def with_loss(loss):
    """Without its value, so that every method calls it."""
    return replaced(value_fn=loss, value=None)


def cast(name, dtype):
    return lambda optimizer, call: call | {name: jax.tree.map(lambda leaf: leaf.astype(dtype), call[name])}


def with_integer(optimizer, call):
    """A parameter more, of integers, with what `jax.grad(..., allow_int=True)` gives for it."""
    zero = np.zeros((2,), jax.dtypes.float0)
    params = PARAMS | {"steps": jnp.zeros(2, int)}
    return call | {
        "params": params,
        "state": optimizer.init(params),
        "updates": call["updates"] | {"steps": zero},
        "grad": call["grad"] | {"steps": zero},
    }


UPDATES = [
    Wrong("no-params", replaced(params=None), ValueError, r"needs params: call update\(updates, state, params"),
    Wrong("no-loss", replaced(value_fn=None), TypeError, "needs the extra argument value_fn"),
    Wrong("loss-a-value", replaced(value_fn=0.5), TypeError, r"value_fn must be a function of \(params\).*got 0\.5"),
    Wrong(
        "loss-of-params-and-batch",
        replaced(value_fn=lambda params, batch: 0.0),
        TypeError,
        r"value_fn must be a function of \(params\), with the batch in its closure.*missing a required argument",
    ),
    Wrong(
        "curvature-loss-a-batch",
        replaced(curvature_value_fn=problems.blobs()),
        TypeError,
        "curvature_value_fn must be a func",
    ),
    Wrong("value-with-aux", replaced(value=(jnp.ones(()), {})), TypeError, "value must be .*pass the loss alone"),
    Wrong("value-per-example", replaced(value=jnp.ones(32)), TypeError, r"value must be .*float32\(32,\)"),
    Wrong("value-complex", replaced(value=1j), TypeError, "value must be the loss, a real scalar"),
    Wrong("value-a-string", replaced(value="0.5"), TypeError, "value must be the loss, a real scalar, got '0.5'"),
    Wrong("gradient-none", replaced(updates=None), ValueError, f"updates {LIKE_PARAMS}"),
    Wrong("gradient-with-aux", replaced(updates=(PARAMS, {})), ValueError, f"updates {LIKE_PARAMS}"),
    Wrong(
        "gradient-lacks-a-leaf",
        replaced(updates={"kernel": PARAMS["kernel"]}),
        ValueError,
        rf"{LIKE_PARAMS}, but params\['bias'\] has no counterpart in updates",
    ),
    Wrong(
        "gradient-has-a-leaf-more",
        replaced(updates=PARAMS | {"scale": jnp.ones(())}),
        ValueError,
        rf"{LIKE_PARAMS}, but updates\['scale'\] has no counterpart in params",
    ),
    Wrong(
        "gradient-transposed",
        replaced(updates=PARAMS | {"kernel": PARAMS["kernel"].T}),
        ValueError,
        rf"{LIKE_PARAMS}, but updates\['kernel'\] has the shape \(3, 4\), and params\['kernel'\] \(4, 3\)",
    ),
    Wrong("gradient-that-broadcasts", replaced(updates=BROADCASTING), ValueError, f"updates {LIKE_PARAMS}"),
    Wrong("gradient-in-another-container", replaced(updates=tuple(PARAMS.values())), ValueError, LIKE_PARAMS),
    Wrong("gradient-of-integers", cast("updates", int), TypeError, r"updates\['bias'\] must hold real float.*masked"),
    Wrong("gradient-complex", cast("updates", complex), TypeError, "must be real"),
    Wrong("params-of-integers", cast("params", int), TypeError, r"params\['bias'\] must hold real float.*masked"),
    Wrong("params-of-booleans", cast("params", bool), TypeError, r"params\['bias'\] must hold real float.*masked"),
    Wrong("params-partly-integers", with_integer, TypeError, r"params\['steps'\] must hold real.*optcurv\.masked"),
    Wrong("params-of-strings", replaced(params={"bias": "b", "kernel": "k"}), ValueError, LIKE_PARAMS),
    Wrong("grad-lacks-a-leaf", replaced(grad={"bias": PARAMS["bias"]}), ValueError, f"grad {LIKE_PARAMS}"),
    Wrong("grad-that-broadcasts", replaced(grad=BROADCASTING), ValueError, f"grad {LIKE_PARAMS}"),
    Wrong("grad-of-integers", cast("grad", int), TypeError, r"grad\['bias'\] must hold real floating"),
    Wrong(
        "state-and-params-swapped",
        lambda optimizer, call: call | {"state": call["params"], "params": call["state"]},
        ValueError,
        LIKE_PARAMS,
    ),
    Wrong("state-none", replaced(state=None), ValueError, "state must be one that .* made for these params"),
    Wrong(
        "state-of-another-optimiser",
        lambda optimizer, call: call | {"state": optax.adam(0.1).init(PARAMS)},
        ValueError,
        "state must be one that .* made for these params",
    ),
    Wrong("loss-none", loss_returning(lambda loss: None), TypeError, "The loss must be a real scalar.*got None"),
    Wrong("loss-of-three", loss_returning(lambda loss: (loss, 1, 2)), TypeError, "real scalar, or a pair.* tuple of 3"),
    Wrong("loss-second", loss_returning(lambda loss: ({}, loss)), TypeError, "a pair .loss, aux. whose first is one"),
    Wrong("loss-in-a-list", loss_returning(lambda loss: [loss, {}]), TypeError, "real scalar.*got a list of 2"),
    Wrong("loss-in-a-vector", loss_returning(lambda loss: loss[None]), TypeError, r"real scalar.*float32\(1,\)"),
    Wrong("loss-complex", loss_returning(lambda loss: loss * 1j), TypeError, "real scalar.*complex64"),
    Wrong(
        "has-aux-forgotten",
        with_loss(optcurv.Composite(lambda p: (LOSS.model_fn(p), {}), LOSS.loss_fn)),
        TypeError,
        r"loss_fn failed on the pair that model_fn returned.*has_aux=True",
    ),
    Wrong(
        "has-aux-of-a-model-without",
        with_loss(optcurv.Composite(LOSS.model_fn, LOSS.loss_fn, has_aux=True)),
        TypeError,
        r"With has_aux=True, Composite\.model_fn must return a pair \(outputs, aux\), got an array float32\(32, 3\)",
    ),
]


LINKS = [
    Case("scale_by_edf", optcurv.scale_by_edf),
    Case("scale_by_parabolic_linesearch", optcurv.scale_by_parabolic_linesearch),
    Case("scale_by_kronecker", optcurv.scale_by_kronecker),
    Case("switch", optcurv.switch, {"first": optcurv.pal(), "second": optcurv.pal(), "when": 5}),
    Case("masked", optcurv.masked, {"inner": optcurv.pal(), "mask": everywhere}),
]
METHODS = [case for case in CASES if not (case.variant or case.optax_first)] + LINKS


def every(cases):
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


def right_call(optimizer, params=PARAMS):
    return {
        "updates": params,
        "state": optimizer.init(params),
        "params": params,
        "value": 1.0,
        "grad": params,
        "value_fn": LOSS,
    }


def trace(optimizer, call):
    return jax.eval_shape(lambda: optimizer.update(**call))


@every(METHODS)
def test_a_right_call_is_none_of_them(case):
    optimizer = case.make()
    trace(optimizer, right_call(optimizer))


@every(METHODS)
@table(UPDATES)
def test_updates(case, wrong):
    optimizer = case.make()
    with pytest.raises(wrong.error, match=wrong.message):
        trace(optimizer, wrong.call(optimizer, right_call(optimizer)))


def shapes(tree):
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


@every([case for case in METHODS if shapes(case.make().init(PARAMS)) != shapes(case.make().init(OTHER))])
@pytest.mark.parametrize("other", [OTHER, BROADCASTING, {"kernel": PARAMS["kernel"]}], ids=["wider", "1", "fewer"])
def test_a_state_made_for_other_params(case, other):
    """A method that keeps nothing like the parameters has no row: its state fits any."""
    optimizer = case.make()
    call = right_call(optimizer) | {"state": optimizer.init(other)}
    with pytest.raises(ValueError, match=r"made for these params, but .*\. Make it anew"):
        trace(optimizer, call)


def test_nesterov_flow_needs_no_params_to_tell_that_its_state_is_not_theirs():
    flow = optcurv.scale_by_nesterov_flow()
    with pytest.raises(ValueError, match=r"state\.velocity has the shape \(1,\), and init\(params\)\.velocity \(3,\)"):
        flow.update(jnp.ones(3), flow.init(jnp.ones(1)))


# Where there is no number there is nothing to optimise. optax's own optimisers then return what they are given, and
# `optax.partition` and masks make such groups of parameters.

EMPTY = {
    "dict": {},
    "none": {"kernel": None, "bias": None},
    "masked": {"kernel": optax.MaskedNode(), "bias": optax.MaskedNode()},
    "no-rows": {"kernel": jnp.zeros((0, 3)), "bias": jnp.zeros(0)},
}


@every([*METHODS, Case("nesterov", optcurv.scale_by_nesterov_flow)])
@pytest.mark.parametrize("params", EMPTY.values(), ids=EMPTY.keys())
def test_params_without_a_number_are_returned_as_they_are(case, params):
    optimizer = case.make()
    call = right_call(optimizer, params)
    updates, state = optimizer.update(**call)
    jax.tree.map(np.testing.assert_array_equal, (updates, state), (params, call["state"]))


@every_method
def test_a_group_of_partition_and_a_mask_may_be_empty(case):
    elsewhere = lambda params: jax.tree.map(lambda _: "sgd", params)  # noqa: E731
    nowhere = jax.tree.map(lambda _: False, PARAMS)
    for optimizer in (
        optax.partition({"ours": case.make(), "sgd": optax.sgd(0.5)}, elsewhere),
        optax.chain(optcurv.masked(case.make(), nowhere), optax.sgd(0.5)),
    ):
        updates, _ = optimizer.update(**right_call(optimizer))
        jax.tree.map(np.testing.assert_array_equal, updates, jax.tree.map(lambda leaf: -0.5 * leaf, PARAMS))

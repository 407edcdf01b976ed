import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from tests import problems
from tests.cases import every_method

MASK = {"a_kernel": False, "b_bias": True, "c_kernel": True, "d_scale": False}
FROZEN = {name: not trained for name, trained in MASK.items()}


def train(optimizer, params, loss, num_steps=4):
    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss, curvature_fn=loss)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


def split(params):
    return tuple({k: v for k, v in params.items() if MASK[k] == side} for side in (True, False))


@every_method
def test_equals_optimising_the_part_alone_with_the_rest_closed_over(case):
    params, loss = problems.network_params(), problems.network_loss(problems.blobs())
    optimizer = optax.chain(optcurv.masked(case.make(), MASK), optax.freeze(FROZEN))
    whole, state = train(optimizer, params, loss)

    part, rest = split(params)
    part_loss = optcurv.Composite(lambda p: loss.model_fn(p | rest), loss.loss_fn)
    expected, _ = train(case.make(), part, part_loss)

    actual, kept = split(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected)
    jax.tree.map(np.testing.assert_array_equal, kept, rest)
    assert optcurv.diagnostics(state)


def test_two_methods_share_the_parameters():
    """Updates outside a mask pass through, so that another method can take them."""
    params, loss = problems.network_params(), problems.network_loss(problems.blobs())
    optimizer = optax.chain(optcurv.masked(optcurv.edf(0.5), MASK), optax.masked(optax.adam(1e-2), FROZEN))
    final, _ = train(optimizer, params, loss, 20)
    assert loss(final) < 0.5 * loss(params)
    assert not np.allclose(final["a_kernel"], params["a_kernel"])


def test_mask_may_be_a_function():
    params, loss = problems.network_params(), problems.network_loss(problems.blobs())
    of_tree, of_function = (
        train(optcurv.masked(optcurv.edf(0.5), mask), params, loss, 1)[0] for mask in (MASK, lambda params: MASK)
    )
    jax.tree.map(np.testing.assert_array_equal, of_function, of_tree)


def test_mask_may_be_a_prefix():
    params, loss = problems.quadratic()
    nested = {"outer": params, "other": jnp.ones(2)}
    nested_loss = optcurv.Composite(
        lambda p: {"residual": loss.model_fn(p["outer"]), "other": p["other"]},
        lambda out: loss.loss_fn(out["residual"]) + jnp.sum(out["other"] ** 2),
    )
    optimizer = optax.chain(
        optcurv.masked(optcurv.edf(1.0, 6, damping_scale=0.0), {"outer": True, "other": False}),
        optax.freeze({"outer": False, "other": True}),
    )
    final, _ = train(optimizer, nested, nested_loss, 2)
    np.testing.assert_allclose(jnp.concatenate(jax.tree.leaves(final["outer"])), 1.0, atol=1e-3)
    np.testing.assert_array_equal(final["other"], 1.0)


def test_plain_closure_and_an_optax_line_search_inside_the_mask():
    params, loss = problems.network_params(), problems.network_loss(problems.blobs())

    def plain(p, curvature_fn=None):
        del curvature_fn  # named, since optax's line searches hand it on
        return loss(p)

    inner = optax.chain(optcurv.edf(1.0, curvature=optcurv.hessian_product), optax.scale_by_backtracking_linesearch(10))
    final, _ = train(optax.chain(optcurv.masked(inner, MASK), optax.freeze(FROZEN)), params, plain, 6)
    assert loss(final) < loss(params)
    np.testing.assert_array_equal(final["a_kernel"], params["a_kernel"])


def test_missing_closure_is_still_our_error():
    params = problems.network_params()
    optimizer = optcurv.masked(optcurv.edf(0.1), MASK)
    with pytest.raises(TypeError, match="needs the extra argument value_fn"):
        optimizer.update(params, optimizer.init(params), params)


def test_mask_that_does_not_fit_the_parameters():
    optimizer = optcurv.masked(optcurv.edf(0.1), {"a_kernel": True})
    with pytest.raises(ValueError, match=r"(?s)mask must be a prefix of the structure of params.*b_bias"):
        optimizer.init(problems.network_params())


def test_integers_stay_outside_of_the_mask():
    """The gradient of integers has the dtype float0, which `optax.apply_updates` cannot add."""
    params = {"repeats": jnp.array([1, 2]), "w": jnp.array([3.0, 4.0])}
    loss = optcurv.Composite(lambda p: p["repeats"] * p["w"], lambda outputs: jnp.sum(outputs**2))
    optimizer = optcurv.masked(optcurv.edf(1.0, 2, damping_scale=0.0), {"repeats": False, "w": True})
    grads = jax.grad(loss, allow_int=True)(params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, grad=grads, value_fn=loss)
    final = optax.apply_updates(params, updates)
    np.testing.assert_allclose(final["w"], 0.0, atol=1e-5)
    np.testing.assert_array_equal(final["repeats"], params["repeats"])
    assert final["repeats"].dtype == params["repeats"].dtype


def test_accumulated_loss_inside_the_mask():
    params, batch = problems.network_params(), problems.blobs()
    halves = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), batch)
    accumulated = optcurv.accumulate(problems.network_loss, halves)
    one, other = (
        train(optcurv.masked(optcurv.pal(), MASK), params, loss, 1)[0]
        for loss in (accumulated, problems.network_loss(batch))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, other)

"""What optax asks of its own optimisers: minima of closed-form functions, layouts, injected numbers, schedules.

Here the loss has no layers and no batch, and parameters are bare arrays or tuples of arrays.
"""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from tests.cases import CASES, PARTS, every_part
from tests.laws.test_contract import make_step


class Problem(NamedTuple):
    """A sum of squares that vanishes at `minimum`."""

    start: Any
    minimum: Any
    loss: optcurv.Composite


def distance_to(minimum):
    def squares(residuals):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(residuals))

    return optcurv.Composite(lambda params: jax.tree.map(jnp.subtract, params, minimum), squares)


def sphere(minimum, start=0.0):
    minimum = jax.tree.map(jnp.asarray, minimum)
    return Problem(jax.tree.map(lambda leaf: jnp.full_like(leaf, start), minimum), minimum, distance_to(minimum))


def rosenbrock():
    valley = optcurv.Composite(lambda w: jnp.array([1 - w[0], 10 * (w[1] - w[0] ** 2)]), lambda r: jnp.sum(r**2))
    return Problem(jnp.zeros(2), jnp.ones(2), valley)


MATRIX, VECTOR = [[0.5, -3.0, 2.0], [1.0, 4.0, -1.5]], [2.0, -1.0]
PROBLEMS = {
    "vector": sphere(np.float32(VECTOR), start=8.0),
    "matrix": sphere(np.float32(MATRIX)),
    "tuple": sphere((np.float32(VECTOR), {"m": np.float32(MATRIX), "s": np.float32(0.7)})),
    "rosenbrock": rosenbrock(),
}


@every_part
@pytest.mark.parametrize("name", PROBLEMS)
def test_finds_the_minimum(case, name):
    start, minimum, loss = PROBLEMS[name]
    optimizer = case.make(**case.rosenbrock if name == "rosenbrock" else {})
    step = make_step(optimizer, lambda _: loss)

    @jax.jit
    def train(params):
        carry = params, optimizer.init(params)
        return jax.lax.scan(lambda carry, _: (step(*carry, None), None), carry, length=10_000)[0]

    params, _ = train(start)
    jax.tree.map(lambda found, least: np.testing.assert_allclose(found, least, atol=0.03), params, minimum)


@every_part
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_layouts_are_stable_whatever_the_values_dtype(case, dtype):
    """A step that may not be taken: both branches must return the same structures, shapes and dtypes."""
    with jax.enable_x64(dtype == jnp.float64):
        optimizer, params, loss = case.make(), jnp.ones(3, dtype), distance_to(jnp.zeros(3, dtype))

        def step(params, state, taken):
            value, grads = jax.value_and_grad(loss)(params)
            value = value.astype(jnp.float32 if dtype == jnp.float16 else jnp.float16)
            take = lambda: optimizer.update(grads, state, params, value=value, grad=grads, value_fn=loss)  # noqa: E731
            return jax.lax.cond(taken, take, lambda: (grads, state))

        state = optimizer.init(params)
        updates, new_state = jax.eval_shape(step, params, state, True)
        assert updates.dtype == params.dtype
        assert jax.tree.map(jnp.result_type, new_state) == jax.tree.map(jnp.result_type, state)


@every_part
def test_params_like_parts_of_the_state_can_be_mapped(case):
    optimizer = case.make()
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    state = optimizer.init(params)
    if case.state_by_path:
        with pytest.raises(ValueError, match="different numbers of pytree children"):
            optax.tree.map_params(optimizer, lambda leaf: leaf, state)
        return
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf, state)
    jax.tree.map(np.testing.assert_array_equal, mapped, state)


@every_part
def test_numbers_can_be_injected(case):
    injected = optax.inject_hyperparams(case.factory, static_args=case.static)(**case.options)
    minimum = [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))]
    start, loss = jax.tree.map(jnp.negative, minimum), distance_to(minimum)

    def first_step(optimizer):
        def update(params):
            return optimizer.update(jax.grad(loss)(params), optimizer.init(params), params, value_fn=loss)

        return jax.jit(update)(start)

    updates, state = first_step(case.make())
    injected_updates, injected_state = first_step(injected)
    for one, other in ((injected_updates, updates), (injected_state.inner_state, state)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)


def options_that_may_be_schedules():
    for case in (*CASES, *PARTS):
        for name, parameter in inspect.signature(case.factory).parameters.items():
            if parameter.annotation == optax.ScalarOrSchedule:
                yield pytest.param(case, name, id=f"{case.name}-{name}")


@pytest.mark.parametrize(("case", "name"), [*options_that_may_be_schedules()])
def test_options_annotated_so_may_be_schedules(case, name):
    number = case.options.get(name, inspect.signature(case.factory).parameters[name].default)
    optimizer = case.make(**{name: optax.constant_schedule(number)})
    params = jnp.ones(3)
    step = make_step(optimizer, lambda _: distance_to(jnp.zeros(3)))
    updates, _ = jax.eval_shape(step, params, optimizer.init(params), None)
    assert updates.dtype == params.dtype


def test_every_public_optimiser_has_a_row():
    public = {name for name in optcurv.__all__ if returns_a_transformation(getattr(optcurv, name))}
    rows = {function.__name__ for case in (*CASES, *PARTS) for function in case.public or (case.factory,)}
    assert not public - rows, (
        f"Add a row to tests/cases.py for {sorted(public - rows)}: to CASES for a method of its own, to PARTS for a "
        "part of one. All laws then hold for it too."
    )
    assert not rows - public, f"optcurv.__all__ lacks {sorted(rows - public)}, which have a row in tests/cases.py."


def returns_a_transformation(value):
    returned = inspect.signature(value).return_annotation if inspect.isfunction(value) else None
    return isinstance(returned, type) and issubclass(returned, optax.GradientTransformation)

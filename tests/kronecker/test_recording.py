"""One trace of a loss: what it costs, and what is learnt from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optcurv
from optcurv.kronecker.recording import record

PARAMS = {"v": jnp.ones((3, 4)), "a": jnp.ones(4), "w": jnp.ones((4, 2)), "sorted": jnp.ones(2)}


class CountedNetwork:
    """A network that counts how often it is traced, and its loss on so many examples."""

    def __init__(self):
        self.traces = 0

    def loss(self, num_examples):
        def model_fn(p):
            self.traces += 1
            x = jnp.linspace(-1, 1, 3 * num_examples).reshape(num_examples, 3)
            return jnp.tanh(x @ p["v"] + p["a"]) @ p["w"] + jnp.sort(p["sorted"])

        loss_fn = lambda outputs: jnp.mean(jnp.sum(outputs**2, axis=1))  # noqa: E731
        return optcurv.Composite(model_fn, loss_fn)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": optcurv.sample_gaussian_gradients},
        {"structure": optcurv.BLOCK},
        {"structure": optcurv.DIAGONAL},
    ],
    ids=["kronecker", "labels drawn", "block", "diagonal"],
)
def test_the_model_is_traced_once_in_an_update(options):
    optimizer, network, part = optcurv.scale_by_kronecker(**options), CountedNetwork(), CountedNetwork()
    state, loss = optimizer.init(PARAMS), network.loss(6)
    update = lambda params, **closures: optimizer.update(params, state, params, value_fn=loss, **closures)  # noqa: E731
    jax.make_jaxpr(update)(PARAMS)
    assert network.traces == 1
    jax.make_jaxpr(lambda params: update(params, curvature_value_fn=part.loss(3)))(PARAMS)
    assert (network.traces, part.traces) == (2, 1)


def test_squares_that_are_estimated_count_the_examples_of_the_gradient_not_those_of_the_curvature():
    optimizer, network = optcurv.scale_by_kronecker(), CountedNetwork()
    loss, part, state = network.loss(6), network.loss(3), optimizer.init(PARAMS)
    gradient = jax.grad(loss)(PARAMS)
    for options in ({}, {"curvature_value_fn": part}):
        _, after = optimizer.update(gradient, state, PARAMS, value_fn=loss, **options)
        expected = 6 * gradient["sorted"] ** 2
        np.testing.assert_allclose(after.squares["['sorted']"] / after.weight, expected, rtol=1e-5)


def test_a_loss_that_is_no_scalar_is_refused_where_labels_are_drawn_too():
    optimizer = optcurv.scale_by_kronecker(sampler=optcurv.sample_gaussian_gradients)
    loss = optcurv.Composite(CountedNetwork().loss(6).model_fn, lambda outputs: jnp.mean(outputs**2, axis=1))
    with pytest.raises(TypeError, match="The loss must be a real scalar"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, value_fn=loss)


def test_number_of_examples_on_several_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def count(params, x):
        loss = lambda p: jax.lax.pmean(jnp.mean(x @ p["v"]), "data")  # noqa: E731
        recording = record(loss, params)
        return jnp.array([recording.num_examples(), recording.num_examples(batch_size=2), x.shape[0]])

    sharded = jax.shard_map(count, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P())
    np.testing.assert_array_equal(jax.jit(sharded)(PARAMS, jnp.ones((8, 3))), [8, 4, 4])


def test_a_kernel_whose_uses_have_batches_of_different_sizes():
    params, x, y = {"v": jnp.ones((3, 3))}, jnp.ones((5, 3)), jnp.ones((7, 3))
    loss = lambda p: jnp.mean(jnp.tanh(x @ p["v"])) + jnp.mean(y @ p["v"])  # noqa: E731
    with pytest.raises(ValueError, match=r"leading axes of sizes 5 \(\['v'\]\), 7 \(\['v'\]\)"):
        record(loss, params).num_examples()

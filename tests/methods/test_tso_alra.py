"""The preconditioner against dense Fisher matrices, and the two stages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import optcurv
from tests import problems


def normal(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape)


def data(seed, num_examples):
    return normal(num_examples, 4, seed=seed), normal(num_examples, 2, seed=seed + 50)


def loss_on(x, y):
    def model_fn(p):
        return jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"] + p["b"]["bias"]

    return optcurv.Composite(model_fn, lambda outputs: 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, axis=1)))


def two_layers(num_examples=7):
    """A network with biases, its loss on a batch of a given seed, and by hand what its layers see of that batch."""
    params = {"b": {"bias": normal(2) * 0.1, "kernel": normal(3, 2)}, "a": {"bias": normal(3), "kernel": normal(4, 3)}}
    params = jax.tree.map(jnp.asarray, params)

    def loss_of(seed):
        return loss_on(*data(seed, num_examples))

    def layer_moments(p, seed):
        """Inputs and output gradients by hand, per layer."""
        (x, y), p = data(seed, num_examples), jax.device_get(p)
        hidden = np.tanh(x @ p["a"]["kernel"] + p["a"]["bias"])
        last = hidden @ p["b"]["kernel"] + p["b"]["bias"] - y
        first = (last @ p["b"]["kernel"].T) * (1 - hidden**2)
        ones = np.ones((num_examples, 1))
        return {
            "a": (np.concatenate([x, ones], axis=1), first),
            "b": (np.concatenate([hidden, ones], axis=1), last),
        }

    return params, loss_of, layer_moments


def matrix_of(layer):
    return np.concatenate([layer["kernel"], layer["bias"][None]])


def inverse_root(matrix, power, damping):
    damped = matrix + damping * np.trace(matrix) / len(matrix) * np.eye(len(matrix))
    return np.real(scipy.linalg.fractional_matrix_power(damped, power))


@pytest.mark.parametrize("power", [-0.5, -1.0])
@pytest.mark.parametrize("structure", [optcurv.KRONECKER, optcurv.BLOCK])
def test_update_equals_the_dense_fisher_matrix_to_a_power(structure, power):
    with jax.enable_x64(True):
        params, _, layer_moments = two_layers()
        decay, damping = 0.8, 0.04
        optimizer = optcurv.scale_by_kronecker(
            power, factor_decay=decay, factor_every=1, root_every=1, damping=damping, structure=structure
        )
        state = optimizer.init(params)
        sums, weight = {}, 0.0

        @jax.jit
        def step(state, seed_data):
            x, y = seed_data
            loss = loss_on(x, y)
            gradient = jax.grad(loss)(params)
            return gradient, *optimizer.update(gradient, state, params, value_fn=loss)

        for seed in range(3):
            gradient, updates, state = step(state, data(seed, 7))
            weight = decay * weight + 1 - decay
            for name, (a, b) in layer_moments(params, seed).items():
                per_example = np.einsum("ni,no->nio", a, b).reshape(len(a), -1)
                now = (
                    (a.T @ a / len(a), b.T @ b / len(b))
                    if structure is optcurv.KRONECKER
                    else (per_example.T @ per_example / len(a),)
                )
                before = sums.get(name, [0.0] * len(now))
                sums[name] = [decay * old + (1 - decay) * new for old, new in zip(before, now, strict=True)]
                roots = [inverse_root(factor / weight, power, damping ** (1 / len(now))) for factor in sums[name]]
                dense = np.kron(*roots) if structure is optcurv.KRONECKER else roots[0]
                expected = dense @ matrix_of(gradient[name]).reshape(-1)
                np.testing.assert_allclose(matrix_of(updates[name]).reshape(-1), expected, rtol=1e-7, atol=1e-10)


def test_diagonal_is_rmsprop_per_example():
    params, loss_of, _ = two_layers()
    gradient = jax.grad(loss_of(0))(params)
    updates, _ = first_update(params, loss_of(0), structure=optcurv.DIAGONAL, damping=0.0, absolute_damping=1e-6)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, g / np.sqrt(7 * g**2 + 1e-6), rtol=1e-4), updates, gradient)


def unit_problem():
    """Inputs and output gradients whose second moments are the identity."""
    x, targets = 2 * jnp.eye(4), 2 * jnp.eye(4)[:, ::-1]
    params = {"w": jnp.asarray(normal(4, 4), jnp.float32)}
    return params, lambda p: jnp.mean(jnp.sum((x @ p["w"]) * targets, axis=1))


@pytest.mark.parametrize("power", [-0.5, -1.0])
def test_with_unit_factors_it_is_sgd_bit_for_bit(power):
    params, loss = unit_problem()
    updates, _ = first_update(params, loss, power=power, damping=0.0)
    np.testing.assert_array_equal(updates["w"], jax.grad(loss)(params)["w"])


def test_after_the_switch_it_is_sgd_bit_for_bit():
    schedule = optax.cosine_decay_schedule(0.1, 20)
    optimizer, sgd = optcurv.tso_alra(schedule, when=3, momentum=0.9), optax.sgd(schedule)
    params = problems.network_params()
    state, sgd_state = optimizer.init(params), sgd.init(params)

    @jax.jit
    def step(params, state, sgd_state, batch):
        loss = problems.network_loss(batch)
        gradient = jax.grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params, value_fn=loss)
        expected, sgd_state = sgd.update(gradient, sgd_state, params)
        same = jax.tree.map(lambda a, b: jnp.all(a == b), updates, expected)
        return optax.apply_updates(params, updates), state, sgd_state, same

    for n in range(8):
        params, state, sgd_state, same = step(params, state, sgd_state, problems.blobs(seed=n))
        assert all(jax.tree.leaves(same)) == (n >= 3)


def test_first_stage_is_bounded_and_has_momentum():
    params, loss = unit_problem()
    preconditioner, gradient = optcurv.scale_by_kronecker(damping=0.0), jax.grad(loss)(params)
    optimizer = optcurv.tso_alra(0.1, when=9, momentum=0.5, preconditioner=preconditioner)
    state = optimizer.init(params)
    for factor in (1.0, 1.5):  # 1, and 1 + 0.5
        updates, state = optimizer.update(gradient, state, params, value_fn=loss)
        np.testing.assert_allclose(optax.tree.norm(updates), 0.1 * factor, rtol=1e-6)
    published = optcurv.tso_alra(0.1, when=9, max_update_norm=None, preconditioner=preconditioner)
    updates, _ = published.update(gradient, published.init(params), params, value_fn=loss)
    np.testing.assert_allclose(updates["w"], -0.1 * gradient["w"], rtol=1e-6)


def steps_of(**options):
    """The steps of both stages, two of the first, where every gradient is 1 and so is every preconditioned one."""
    optimizer = optcurv.tso_alra(when=2, preconditioner=optax.identity(), **options)
    w, state, steps = jnp.array(0.0), optimizer.init(jnp.array(0.0)), []
    for _ in range(5):
        updates, state = optimizer.update(jnp.array(1.0), state, w, value_fn=lambda w: w)
        steps.append(-float(updates))
    return steps


def test_second_stage_has_a_rate_and_a_momentum_of_its_own():
    steps = steps_of(learning_rate=0.3, second_learning_rate=0.1, momentum=0.5, second_momentum=0.9)
    np.testing.assert_allclose(steps, [0.3, 0.45, 0.1, 0.19, 0.271], rtol=1e-6)
    steps = steps_of(learning_rate=0.3, second_momentum=0.9)
    np.testing.assert_allclose(steps, [0.3, 0.3, 0.3, 0.57, 0.813], rtol=1e-6)


def test_schedule_counts_all_steps_and_one_of_the_second_stage_from_the_switch():
    schedule = lambda count: 0.1 + 0.01 * count  # noqa: E731
    np.testing.assert_allclose(steps_of(learning_rate=schedule), [0.1, 0.11, 0.12, 0.13, 0.14], rtol=1e-6)
    steps = steps_of(learning_rate=schedule, second_learning_rate=schedule)
    np.testing.assert_allclose(steps, [0.1, 0.11, 0.1, 0.11, 0.12], rtol=1e-6)


def test_preconditioned_gradients_are_white():
    """The covariance of single examples' gradients becomes the identity (Theorem 2)."""
    rng = np.random.default_rng(0)
    inputs, outputs = rng.normal(size=(5, 4)), rng.normal(size=(3, 2))
    num = 20_000
    x = jnp.asarray(rng.normal(size=(num, 5)) @ inputs, jnp.float32)
    c = jnp.asarray(rng.normal(size=(num, 3)) @ outputs, jnp.float32)
    params = {"w": jnp.zeros((4, 2))}
    optimizer = optcurv.scale_by_kronecker(damping=0.0)
    loss = lambda p: jnp.mean(jnp.sum((x @ p["w"]) * c, axis=1))  # noqa: E731
    _, state = first_update(params, loss, damping=0.0)
    gradients = {"w": jnp.einsum("ni,no->nio", x, c)}
    update = lambda gradient: optimizer.update(gradient, state, params, value_fn=loss)[0]  # noqa: E731
    white = jax.jit(jax.vmap(update))(gradients)
    flat = white["w"].reshape(num, -1)
    np.testing.assert_allclose(flat.T @ flat / num, np.eye(8), atol=5 * np.sqrt(2 / num))


def test_root_of_the_factors_keeps_the_length_in_the_fishers_norm():
    """‖F^{-1/2} u‖ in the norm of F is ‖u‖."""
    params, loss_of, layer_moments = two_layers()
    optimizer = optcurv.scale_by_kronecker(damping=0.0)
    u = jax.tree.map(lambda leaf: jnp.asarray(normal(*leaf.shape, seed=9)), params)
    moved, _ = jax.jit(lambda u: optimizer.update(u, optimizer.init(params), params, value_fn=loss_of(0)))(u)
    for name, (a, b) in layer_moments(params, 0).items():
        matrix = matrix_of(moved[name])
        length = np.einsum("io,ij,jp,op->", matrix, a.T @ a / len(a), matrix, b.T @ b / len(b))
        np.testing.assert_allclose(length, np.sum(matrix_of(u[name]) ** 2), rtol=1e-3)


# Choices.


def first_update(params, loss, curvature_value_fn=None, **options):
    optimizer = optcurv.scale_by_kronecker(**options)
    extra = {} if curvature_value_fn is None else {"curvature_value_fn": curvature_value_fn}

    @jax.jit
    def update(params):
        return optimizer.update(jax.grad(loss)(params), optimizer.init(params), params, value_fn=loss, **extra)

    return update(params)


def test_factors_above_the_limit_keep_their_diagonal():
    params, loss_of, layer_moments = two_layers()
    updates, _ = first_update(params, loss_of(0), max_factor_size=4, damping=0.04)
    gradient, (a, b) = jax.grad(loss_of(0))(params), layer_moments(params, 0)["a"]
    second = np.mean(a**2, axis=0)
    left = (second + 0.2 * second.mean()) ** -0.5
    expected = left[:, None] * matrix_of(gradient["a"]) @ inverse_root(b.T @ b / len(b), -0.5, 0.2)
    np.testing.assert_allclose(matrix_of(updates["a"]), expected, rtol=1e-4)


def test_block_above_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"block of \['a'\]\['kernel'\] would be a matrix of 15 x 15"):
        first_update(two_layers()[0], two_layers()[1](0), structure=optcurv.BLOCK, max_factor_size=10)


def test_sampled_labels_give_the_true_fisher_matrix():
    """For a softmax regression E[ββᵀ] is the mean of diag(p) - ppᵀ, whatever the labels are."""
    x, params = normal(4000, 4), {"kernel": normal(4, 3), "bias": normal(3)}
    params, x = jax.tree.map(lambda leaf: 0.5 * leaf.astype(jnp.float32), (params, x))
    model_fn = lambda p: x @ p["kernel"] + p["bias"]  # noqa: E731
    wrong = jnp.argmin(model_fn(params), axis=1)
    loss = optcurv.Composite(model_fn, lambda logits: problems.cross_entropy(logits, wrong))
    _, state = first_update(params, loss, sampler=optcurv.sample_categorical_gradients)
    p = jax.nn.softmax(model_fn(params))
    expected = jnp.mean(jax.vmap(lambda p: jnp.diag(p) - jnp.outer(p, p))(p), axis=0)
    actual = state.factors["['kernel']"][1][0] / state.weight
    np.testing.assert_allclose(actual, expected, atol=0.03)
    _, empirical = first_update(params, loss)
    assert not np.allclose(empirical.factors["['kernel']"][1][0] / empirical.weight, expected, atol=0.1)


def test_sampled_gaussians_have_the_identity_for_fisher_matrix():
    params, loss_of, _ = two_layers(num_examples=5000)
    _, state = first_update(params, loss_of(0), sampler=optcurv.sample_gaussian_gradients)
    np.testing.assert_allclose(state.factors["['b']['kernel']"][1][0] / state.weight, np.eye(2), atol=0.1)


def test_drawn_labels_need_a_composite():
    params, loss = unit_problem()
    with pytest.raises(TypeError, match=r"optcurv\.Composite"):
        first_update(params, loss, sampler=optcurv.sample_categorical_gradients)


def test_given_layers_make_the_state_for_any_kernel():
    x = normal(6, 5, 4).astype(jnp.float32)
    params = {"q": normal(4, 2, 3).astype(jnp.float32), "table": normal(9, 2).astype(jnp.float32)}
    loss = lambda p: jnp.mean(jnp.einsum("nti,ihk->nthk", x, p["q"]) ** 2) + jnp.mean(p["table"][:3] ** 2)  # noqa: E731
    with pytest.raises(ValueError, match=r"make the\s+optimiser with layers=optcurv.layers"):
        first_update(params, loss)
    updates, state = first_update(params, loss, layers=optcurv.layers(loss, params))
    assert [factor.shape for factor in state.factors["['q']"]] == [(1, 5, 5), (1, 6, 6)]
    assert state.squares.keys() == {"['table']"}
    assert jnp.all(jnp.isfinite(updates["q"]))


@pytest.mark.parametrize(
    ("options", "exponent"),
    [({}, 0), ({"power": -1.0}, -1), ({"power": -1.0, "sampler": optcurv.sample_gaussian_gradients}, 1)],
    ids=["root", "inverse", "labels drawn"],
)
def test_a_loss_c_times_as_large(options, exponent):
    params, loss_of, _ = two_layers()
    plain = loss_of(0)
    sevenfold = optcurv.Composite(plain.model_fn, lambda outputs: 7 * plain.loss_fn(outputs))
    expected, _ = first_update(params, plain, rank=None, **options)
    updates, _ = first_update(params, sevenfold, rank=None, **options)
    for name in params:
        np.testing.assert_allclose(
            matrix_of(updates[name]), 7.0**exponent * matrix_of(expected[name]), rtol=1e-3, atol=1e-5
        )


# Parameters in no layer.


def loss_with_one_layer(params):
    """Of `two_layers`' parameters a multiplies activations as it is; b goes in squared."""
    x, _ = data(0, 7)
    return jnp.mean(jnp.sum((x @ params["a"]["kernel"]) ** 2, axis=1)) + optax.tree.norm(params["b"], squared=True)


@pytest.mark.parametrize("structure", [optcurv.KRONECKER, optcurv.BLOCK])
def test_parameters_in_no_layer_are_preconditioned_diagonally(structure):
    params, _, _ = two_layers()
    updates, state = first_update(params, loss_with_one_layer, structure=structure, damping=0.0)
    _, given = first_update(params, loss_with_one_layer, layers=optcurv.layers(loss_with_one_layer, params))
    gradient = jax.grad(loss_with_one_layer)(params)["b"]
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, np.sign(g) / 7**0.5, rtol=1e-5), updates["b"], gradient)
    assert state.info.num_layers == 1
    assert not np.allclose(np.abs(updates["a"]["kernel"]), 7**-0.5, rtol=0.1)
    np.testing.assert_array_equal(state.squares["['b']['kernel']"], given.squares["['b']['kernel']"])
    assert given.squares.keys() == state.squares.keys() - {"['a']['kernel']"}


PARAMS_WITHOUT_LAYERS = {
    "vector": jnp.array([-1.0, 10.0, 1.0]),
    "matrix": jnp.array([[3.0, -2.0], [1.0, 4.0]]),
    "scalar": jnp.array(3.0),
    "float": 3.0,
    "several": {"kernel": jnp.ones((3, 4)), "nothing": None, "scale": jnp.array(2.0)},
}


@pytest.mark.parametrize("params", PARAMS_WITHOUT_LAYERS.values(), ids=PARAMS_WITHOUT_LAYERS)
@pytest.mark.parametrize("structure", [optcurv.KRONECKER, optcurv.DIAGONAL], ids=["kronecker", "diagonal"])
def test_loss_without_layers_is_that_of_one_example(structure, params):
    loss = lambda p: optax.tree.norm(p, squared=True)  # noqa: E731
    updates, state = first_update(params, loss, structure=structure, damping=0.0)
    jax.tree.map(lambda u: np.testing.assert_allclose(np.abs(u), 1.0, rtol=1e-6), updates)
    assert state.info.num_layers == 0
    updates, _ = first_update(params, loss, structure=structure, damping=0.0, batch_size=16)
    jax.tree.map(lambda u: np.testing.assert_allclose(np.abs(u), 0.25, rtol=1e-6), updates)


def test_loss_without_layers_is_refused_where_layers_were_given():
    params, loss_of, _ = two_layers()
    with pytest.raises(ValueError, match="No layer was found"):
        first_update(params, lambda p: optax.tree.norm(p, squared=True), layers=optcurv.layers(loss_of(0), params))
    with pytest.raises(ValueError, match="are not those the state was made for"):
        first_update(params, loss_with_one_layer, layers=optcurv.layers(loss_of(0), params))


@pytest.mark.parametrize("shape", [(0,), (0, 2), (4, 0)])
def test_empty_parameters_change_nothing(shape):
    params, loss = unit_problem()
    empty, x = jnp.ones(shape), jnp.ones((4, shape[0]))
    expected, _ = first_update(params, loss)
    updates, state = first_update(
        params | {"empty": empty, "nothing": None}, lambda p: loss(p) + jnp.sum(x @ p["empty"]) + jnp.sum(p["empty"])
    )
    np.testing.assert_array_equal(updates["w"], expected["w"])
    assert updates["empty"].shape == shape
    assert all(leaf.size for leaf in jax.tree.leaves(state))  # checkpoints hold no empty arrays


def test_a_tree_without_arrays_is_returned_as_it_is():
    for params in ({}, {"nothing": None}):
        updates, _ = first_update(params, lambda p: jnp.float32(1.0))
        assert updates == params


def test_a_scale_has_its_own_squares_and_a_kernel_left_out_an_estimate():
    x, y = normal(7, 4), normal(7, 2)
    params = {"kernel": normal(4, 3), "scale": normal(3), "head": normal(3, 2)}

    def one(p, x, y):
        return jnp.sum((jnp.tanh(x @ p["kernel"]) * p["scale"] @ p["head"] - y) ** 2)

    loss = lambda p: jnp.mean(jax.vmap(one, (None, 0, 0))(p, x, y))  # noqa: E731
    found = optcurv.layers(loss, params, leave_out=["['head']"])
    _, state = first_update(params, loss, layers=found)
    own = jax.vmap(jax.grad(one), (None, 0, 0))(params, x, y)
    actual = {path: square / state.weight for path, square in state.squares.items()}
    assert actual.keys() == {"['scale']", "['head']"}
    np.testing.assert_allclose(actual["['scale']"], np.mean(own["scale"] ** 2, axis=0), rtol=1e-4)
    np.testing.assert_allclose(actual["['head']"], 7 * np.mean(own["head"], axis=0) ** 2, rtol=1e-4)


def test_statistics_that_are_not_finite_are_not_averaged_in():
    params, loss_of, _ = two_layers()
    optimizer = optcurv.scale_by_kronecker(factor_every=1)

    @jax.jit
    def update(state, poison):
        loss = lambda p: loss_of(1)(p) * poison  # noqa: E731
        return optimizer.update(jax.grad(loss_of(1))(params), state, params, value_fn=loss)

    updates, before = update(optimizer.init(params), jnp.nan)  # no statistics yet
    assert optax.tree.norm(updates) == 0
    assert not before.info.finite
    _, state = update(before, 1.0)
    updates, after = update(state, jnp.nan)
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.factors, after.squares, after.weight),
        (state.factors, state.squares, state.weight),
    )
    assert bool(after.info.finite)  # the gradient was
    assert optax.tree.norm(updates) > 0


def test_statistics_far_from_the_averages_count_only_where_a_second_batch_confirms_them():
    params, loss_of, _ = two_layers()
    optimizer = optcurv.scale_by_kronecker(factor_every=1, structure=optcurv.BLOCK)

    @jax.jit
    def update(state, factor):
        loss = lambda p: factor * loss_of(1)(p)  # noqa: E731
        return optimizer.update(jax.grad(loss)(params), state, params, value_fn=loss)[1]

    def block_after(*factors):
        """The average block of a layer after batches whose losses have these factors."""
        state = optimizer.init(params)
        for factor in factors:
            state = update(state, factor)
        (block,) = state.factors["['a']['kernel']"]
        return block / state.weight

    def scale_after(*factors):
        return float(jnp.sqrt(jnp.trace(block_after(*factors)[0]) / jnp.trace(block_after(1)[0])))

    spike = 1e5
    for factors, expected in [
        ((1, 1, spike), 1),
        ((1, 1, spike, 1, spike), 1),
        ((1, 1, spike, spike), spike),
        ((1, 1, spike, spike, spike, 1), spike),
        ((1, 1, spike, spike, spike, 1, 1), 1),
    ]:
        np.testing.assert_allclose(scale_after(*factors), expected, rtol=1e-5)
    assert scale_after(*10 * [1], 1 / spike, 1 / spike) > 0.5  # later on, batches that fit well tell of no spike


def test_updates_beyond_the_range_of_their_dtype_become_zero():
    params = jnp.ones(2, jnp.float16)
    updates, state = first_update(params, lambda p: 1e-3 * jnp.sum(p), power=-1.5)  # one over the squared gradient
    np.testing.assert_array_equal(updates, jnp.zeros(2))
    assert not state.info.finite


def test_factors_are_averaged_at_early_steps_and_every_so_many():
    params, loss_of, _ = two_layers()
    loss, optimizer = loss_of(1), optcurv.scale_by_kronecker(factor_every=10, root_every=6)

    @jax.jit
    def update(state):
        return optimizer.update(jax.grad(loss)(params), state, params, value_fn=loss)[1]

    state, averaged = optimizer.init(params), []
    for step in range(21):
        before, state = state, update(state)
        if state.weight != before.weight:
            averaged.append(step)
    assert averaged == [0, 1, 2, 4, 10, 20]  # 8 is no longer early: roots are taken every 6


def test_curvature_closure_gives_the_factors():
    params, loss_of, _ = two_layers()
    _, expected = first_update(params, loss_of(1))
    _, state = first_update(params, loss_of(0), curvature_value_fn=loss_of(1))
    jax.tree.map(np.testing.assert_array_equal, state.factors, expected.factors)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"power": 0.0}, ValueError, "power must be negative"),
        ({"power": 0.5}, ValueError, "power must be negative"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"absolute_damping": -1.0}, ValueError, "absolute_damping"),
        ({"factor_decay": 1.5}, ValueError, "factor_decay"),
        ({"root_every": 0}, ValueError, "root_every must be at least 1"),
        ({"factor_every": 1.0}, TypeError, "factor_every must be a Python int"),
        ({"max_factor_size": 0}, ValueError, "max_factor_size"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"structure": "kronecker"}, TypeError, r"optcurv\.KRONECKER"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        optcurv.scale_by_kronecker(**options)


@pytest.mark.parametrize(
    "options", [{"momentum": 1.5}, {"max_update_norm": 0.0}, {"second_momentum": -0.1}, {"second_learning_rate": -1.0}]
)
def test_bad_options_of_the_stages(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        optcurv.tso_alra(0.1, when=3, **options)

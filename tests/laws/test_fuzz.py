"""Random options, networks, dtypes and poisoned batches: parameters stay finite, and every method learns afterwards.

A program is compiled once and runs many cases side by side: initial parameters, numeric options and batches are its
arguments. In a scan the state cannot change its structure, shapes or dtypes. FUZZ_SEED=1 in the environment draws
others.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optcurv
from tests import problems
from tests.cases import CASES
from tests.laws.test_contract import make_step

NUM_DRAWS = 12  # of options and initial parameters, for each program
NUM_POISONED, NUM_GOOD = 40, 200
SPIKE_AT = 5
BATCH_SIZE, NUM_GOOD_BATCHES = 64, 16


class Batch(NamedTuple):
    x: jax.Array
    y: jax.Array
    weight: jax.Array


# Networks: the initial parameters, and the dtype of each part.


def network_params(rng, kernels, biases, scale):
    """Two layers in these dtypes, with all that may stand in a tree besides: a scalar, no parameter, an empty one."""
    return {
        "hidden": (jnp.asarray(rng.normal(size=(4, 3)) / 2, kernels), jnp.asarray(0.1 * rng.normal(size=3), biases)),
        "nothing": None,
        "empty": jnp.zeros((0, 3), kernels),
        "head": {"kernel": jnp.asarray(rng.normal(size=(3, 3)) / 2, kernels), "bias": jnp.zeros(3, biases)},
        "scale": jnp.asarray(1.0, scale),
    }


def network_loss(batch):
    def model_fn(params):
        kernel, bias = params["hidden"]
        hidden = jax.nn.leaky_relu(batch.x.astype(kernel.dtype) @ kernel + bias, 0.3)
        return params["scale"] * (hidden @ params["head"]["kernel"] + params["head"]["bias"])

    def loss_fn(logits):
        return batch.weight * jnp.mean(optcurv.softmax_cross_entropy_with_integer_labels(logits, batch.y))

    return optcurv.Composite(model_fn, loss_fn)


FLOAT32 = (jnp.float32, jnp.float32, jnp.float32)
BFLOAT16 = (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16)
FLOAT16 = (jnp.float16, jnp.float16, jnp.float16)
MIXED = (jnp.bfloat16, jnp.float32, jnp.float16)


# Methods.


class Program(NamedTuple):
    """A method with the options that shape what is compiled, and the ranges of those that are drawn.

    Attributes:
      method: the public constructor, to see that all take part.
      make: the optimiser, from the numbers drawn.
      dtypes: of the network's kernels, of its biases and of its scale.
      ranges: of each number drawn, on a logarithmic scale.
      spikes_in_a_row: see `tests.cases.Fuzz`.
    """

    method: Callable
    make: Callable[[dict[str, jax.Array]], optax.GradientTransformationExtraArgs]
    dtypes: tuple
    ranges: dict[str, tuple[float, float]]
    spikes_in_a_row: bool = True


def program(method, dtypes, static=None, **ranges):
    return Program(method, lambda numbers: method(**(static or {}), **numbers), dtypes, ranges)


def edf(dtypes, *, rates=(0.1, 1), dampings=(1, 4), powers=(1, 1.5), **static):
    ranges = {"learning_rate": rates, "damping_scale": dampings, "damping_power": powers}
    # Below a power of 1 the direction grows with the gradient.
    return program(optcurv.edf, dtypes, static, **ranges)._replace(spikes_in_a_row=powers[0] >= 1)


def trust_region(dtypes, **static):
    ranges = {"initial_radius": (1e-3, 10), "growth": (1.1, 2), "shrinkage": (1.25, 2)}
    return program(optcurv.trust_region, dtypes, static, **ranges)


def adaptive_cubic(dtypes, **static):
    ranges = {"initial_weight": (1e-3, 10), "growth": (1.25, 2)}
    return program(optcurv.adaptive_cubic, dtypes, static, **ranges)


def levenberg_marquardt(dtypes, **static):
    ranges = {"initial_damping": (1e-4, 10), "growth": (2, 6), "shrinkage": (1.3, 2), "momentum": (0.1, 0.8)}
    return program(optcurv.levenberg_marquardt, dtypes, static, **ranges)


def after(step):
    """Switches after a number of steps that may be drawn."""
    return optcurv.SwitchRule(lambda: jnp.zeros((), jnp.int32), lambda count, value: (count + 1, count >= step))


def tso_alra(dtypes, structure, *, power=-0.5, **static):
    preconditioner = optcurv.scale_by_kronecker(power, structure=structure, factor_every=2, root_every=3)
    return Program(
        optcurv.tso_alra,
        lambda numbers: optcurv.tso_alra(
            numbers["rate"],
            when=after(numbers["when"]),
            preconditioner=preconditioner,
            second_learning_rate=numbers["second_rate"],
            **static,
        ),
        dtypes,
        {"rate": (0.03, 0.3), "second_rate": (0.03, 0.3), "when": (3, 300)},
        spikes_in_a_row=False,
    )


def kronecker(power, structure):
    return lambda numbers: optax.chain(
        optcurv.scale_by_kronecker(
            power, structure=structure, factor_every=2, root_every=3, damping=numbers["damping"]
        ),
        optax.clip_by_global_norm(1.0),
        optax.scale_by_learning_rate(numbers["learning_rate"]),
    )


def adam_with_linesearch(numbers):
    return optax.chain(
        optax.clip_by_global_norm(10.0),  # Adam's averages would keep a spike
        optax.apply_if_finite(optax.adam(1.0), 2**31 - 1),
        optcurv.scale_by_parabolic_linesearch(numbers["measuring_step"], max_step=1.0),
    )


GAUSS_NEWTON, HESSIAN = optcurv.gauss_newton_product, optcurv.hessian_product
RATES = {"learning_rate": (0.01, 0.1)}
STEPS = {"measuring_step": (0.01, 0.3), "max_step": (0.5, 2)}

PROGRAMS = {
    "edf-g-2": edf(FLOAT16, max_iter=2),
    "edf-g-3-momentum": edf(BFLOAT16, powers=(0.5, 1), max_iter=3, acceleration="momentum"),
    "edf-g-2-nesterov": edf(MIXED, max_iter=2, acceleration="nesterov"),
    "edf-h-1-momentum": edf(FLOAT32, max_iter=1, acceleration="momentum", curvature=HESSIAN),
    "edf-h-2-nesterov": edf(  # undamped it is drawn to saddle points, and fast rates diverge
        FLOAT16,
        rates=(0.1, 0.5),
        dampings=(2, 4),
        max_iter=2,
        acceleration="nesterov",
        curvature=HESSIAN,
    ),
    "pal": program(optcurv.pal, MIXED, momentum=(0.1, 0.6), **STEPS),
    "pal-slopes": program(optcurv.pal, FLOAT16, {"measure_slope": True}, **STEPS),
    "pal-published": program(optcurv.pal, FLOAT16, {"exact_slope": False}, decay=(0.98, 1), **STEPS),
    "adam-linesearch": Program(optcurv.scale_by_parabolic_linesearch, adam_with_linesearch, BFLOAT16, STEPS),
    "ball": trust_region(FLOAT16, norm=optcurv.uniform_norm()),
    "ball-lanczos-gauss-newton": trust_region(
        BFLOAT16, norm=optcurv.uniform_norm(), solver=optcurv.gltr(4), curvature=GAUSS_NEWTON
    ),
    "adagrad": trust_region(MIXED, norm=optcurv.adagrad_norm()),
    "rmsprop-lanczos": trust_region(FLOAT16, solver=optcurv.gltr(4)),
    "rmsprop-gauss-newton": trust_region(FLOAT32, curvature=GAUSS_NEWTON),
    "full-matrix": trust_region(FLOAT32, norm=optcurv.full_matrix_norm()),
    "full-matrix-rmsprop-lanczos": trust_region(
        MIXED, norm=optcurv.full_matrix_norm(decay=0.8), solver=optcurv.gltr(4), curvature=GAUSS_NEWTON
    ),
    "cubic": adaptive_cubic(FLOAT16, max_iter=4),
    "cubic-ball": adaptive_cubic(MIXED, max_iter=3, norm=optcurv.uniform_norm(), curvature=GAUSS_NEWTON),
    "levenberg-marquardt": levenberg_marquardt(MIXED),
    "levenberg-marquardt-conjugate-gradients": levenberg_marquardt(
        FLOAT16, solver=optcurv.conjugate_gradients(10), norm=optcurv.rmsprop_norm(), length_trials=2
    ),
    "sgd-rk2": program(optcurv.sgd_rk2, FLOAT16, {"momentum": 0.5, "tableau": optcurv.RALSTON}, **RATES),
    "adam-rk2": program(optcurv.adam_rk2, MIXED, **RATES),
    "adam-rk4": program(
        optcurv.runge_kutta,
        FLOAT16,
        {"inner": optax.adam(0.03, eps=1e-4), "tableau": optcurv.RK4},
        step_size=(0.01, 0.1),
    ),
    "switch-adam-sgd": Program(
        optcurv.switch,
        lambda numbers: optcurv.switch(
            optax.adam(numbers["rate"]), optax.sgd(numbers["rate"], momentum=0.9), after(numbers["when"])
        ),
        MIXED,
        {"rate": (0.01, 0.1), "when": (3, 300)},
        spikes_in_a_row=False,
    ),
    "tso-alra": tso_alra(FLOAT16, optcurv.KRONECKER, second_momentum=0.5),
    "tso-alra-block": tso_alra(MIXED, optcurv.BLOCK, momentum=0.5),
    "tso-alra-diagonal": tso_alra(BFLOAT16, optcurv.DIAGONAL),
    "kronecker": Program(
        optcurv.scale_by_kronecker,
        kronecker(-1.0, optcurv.KRONECKER),
        MIXED,
        {"damping": (1e-3, 1e-1), "learning_rate": (0.03, 0.3)},
        spikes_in_a_row=False,
    ),
}


def row_program(case):
    """The row's own options, in the parameters that ask most of a method."""
    fuzz = case.fuzz
    return Program(case.factory, lambda numbers: case.make(**numbers), MIXED, fuzz.ranges, fuzz.spikes_in_a_row)


with_programs = {program.method for program in PROGRAMS.values()}
PROGRAMS |= {
    case.name: row_program(case) for case in CASES if not with_programs.intersection(case.public or (case.factory,))
}


# Batches.


@functools.cache
def good_batches():
    several = [problems.blobs(seed=n, size=BATCH_SIZE) for n in range(NUM_GOOD_BATCHES)]
    return tuple(np.stack(leaves) for leaves in zip(*several, strict=True))


def some_of_them():
    """The batches by which learning is measured."""
    x, y = (np.concatenate(leaf[:2]) for leaf in good_batches())
    return Batch(x, y, np.float32(1))


def random_sequence(rng):
    x, y = good_batches()
    chosen = rng.integers(NUM_GOOD_BATCHES, size=NUM_POISONED + NUM_GOOD)
    return Batch(x[chosen], y[chosen], np.ones(len(chosen), np.float32))


def poison(rng, batches, spikes_in_a_row):
    """Does something to most of the first batches, in place."""
    may_spike = spikes_in_a_row  # otherwise only after a batch of the ordinary scale
    for n in range(NUM_POISONED):
        x, y = batches.x[n], batches.y[n]
        kind = rng.integers(8)
        if kind <= 1 and not may_spike:
            kind = 7
        match kind:
            case 0:
                x *= rng.choice([1e5, 1e18, 1e38]) / np.abs(x).max()
            case 1:
                batches.weight[n] = rng.choice([1e30, 1e38])
            case 2:
                x[rng.integers(len(x)), rng.integers(4)] = rng.choice([np.nan, np.inf, -np.inf])
            case 3:
                batches.weight[n] = rng.choice([np.inf, np.nan])
            case 4:
                batches.weight[n] = rng.choice([0.0, 1e-30])
            case 5:
                x[:] = rng.choice([0.0, 1.0, 1e-30])
            case 6:
                y[:] = rng.integers(3)
        may_spike = spikes_in_a_row or kind > 5


def stacked(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def draw(rng, program):
    """Parameters, numbers, and three sequences of batches: good ones, with a spike, and after poison."""
    numbers = {name: np.float32(np.exp(rng.uniform(*np.log(ends)))) for name, ends in program.ranges.items()}
    good, spiked, poisoned = (random_sequence(rng) for _ in range(3))
    spiked.weight[SPIKE_AT] = 1e30
    poison(rng, poisoned, program.spikes_in_a_row)
    return network_params(rng, *program.dtypes), numbers, stacked([good, spiked, poisoned])


def train(program, seen, params, numbers, batches):
    """Returns the loss on batches seen after every step, and whether all parameters were finite all along."""
    optimizer = program.make(numbers)
    step = make_step(optimizer, network_loss)

    def body(carry, batch):
        params, state = step(*carry, batch)
        finite = jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), params))
        return (params, state), (network_loss(seen)(params), finite)

    _, (losses, finite) = jax.lax.scan(body, (params, optimizer.init(params)), batches)
    return losses, finite


@pytest.mark.parametrize("name", PROGRAMS)
def test_poison_leaves_parameters_finite_and_does_not_keep_a_method_from_learning(name):
    program = PROGRAMS[name]
    rng = np.random.default_rng([int(os.environ.get("FUZZ_SEED", "0")), list(PROGRAMS).index(name)])
    run = jax.vmap(jax.vmap(functools.partial(train, program, some_of_them()), in_axes=(None, None, 0)))
    losses, finite = jax.device_get(jax.jit(run)(*stacked([draw(rng, program) for _ in range(NUM_DRAWS)])))
    assert np.all(finite)
    last = np.median(losses[..., -50:], axis=-1)  # a single step may go astray on a mini-batch
    good, spiked, poisoned = last.T
    after_poison = losses[:, 2, NUM_POISONED]
    assert np.all(spiked < 1.5 * good + 0.2)
    assert np.all((poisoned < 1.5 * good + 0.2) | (poisoned < 0.8 * after_poison))

"""SGD, Adam, AMSGrad and TSO-ALRA with the paper's schedule of rates, and the settings tried of each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import optcurv
from benchmarks.core.methods import Method

# The paper's grids (rates of 1e-4 to 1e-1, its own for TSO-ALRA being 1e-2), finer where the best lie and without what
# lies far from them; shares of the training in place of a switch after 5, 10, ..., 75 of 164 epochs.
_RATES = {"learning rate": (1e-3, 1e-2, 1e-1, 3e-1)}
_ADAPTIVE = {"learning rate": (1e-3, 3e-3, 1e-2), "momentum": (0.9, 0.99)}
_TSO_RATES = {"learning rate": (1e-3, 3e-3, 1e-2)}
_BOUNDED_RATES = {"learning rate": (1e-1, 3e-1)}
_NEVER_RATES = {"learning rate": (1e-1, 3e-1, 1.0)}
_NATURAL_RATES = {"learning rate": (3e-1, 1.0)}
_SWITCHES = {"switch at": (0.1, 0.45)}
_SGD_RATE = 0.1  # about the best for SGD alone
_RANK = 32  # twice the default: here a step's cost is not the point

BASELINES = ("SGD", "Adam", "AMSGrad")
TWO_STAGES = ("TSO-ALRA", "bounded TSO-ALRA")
NEVER_SWITCHING = "bounded, never switching"


def make_methods(num_steps: int) -> tuple[Method, ...]:
    """Returns the methods for runs of so many steps: as published, then with a bound on the first stage's update."""

    def factor(count: jax.typing.ArrayLike) -> jax.Array:
        return rate_factor(count, num_steps)

    def decaying(make: Callable[..., optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
        return lambda rate, *momentum: make(lambda count: rate * factor(count), *momentum)

    def published(rate: jax.Array, switch_at: jax.Array) -> optax.GradientTransformation:
        """One rate for both stages, and no bound on the norm of the first one's update."""
        return optcurv.tso_alra(
            lambda count: rate * factor(count),
            when=at_share(switch_at, num_steps),
            preconditioner=optcurv.scale_by_kronecker(rank=_RANK),
            max_update_norm=None,
        )

    def bounded(rate: jax.Array, when: optcurv.SwitchRule, power: float = -0.5) -> optax.GradientTransformation:
        """The norm of the preconditioned gradient bounded by 1; the second stage has SGD's own rate."""
        preconditioner = optcurv.scale_by_kronecker(power, rank=_RANK)
        stages = optcurv.tso_alra(rate, when=when, preconditioner=preconditioner, second_learning_rate=_SGD_RATE)
        return optax.chain(stages, optax.scale_by_schedule(factor))  # which counts the steps of both

    def switching(power: float) -> Callable[..., optax.GradientTransformation]:
        return lambda rate, switch_at: bounded(rate, at_share(switch_at, num_steps), power)

    return (
        Method("SGD", decaying(optax.sgd), _RATES),
        Method("Adam", decaying(optax.adam), _ADAPTIVE),
        Method("AMSGrad", decaying(optax.amsgrad), _ADAPTIVE),
        Method("TSO-ALRA", published, {**_TSO_RATES, **_SWITCHES}),
        Method("bounded TSO-ALRA", switching(-0.5), {**_BOUNDED_RATES, **_SWITCHES}),
        Method("bounded, on plateau", lambda rate: bounded(rate, optcurv.on_plateau(patience=2)), _BOUNDED_RATES),
        Method(NEVER_SWITCHING, lambda rate: bounded(rate, _NEVER), _NEVER_RATES),
        Method("bounded, power -1", switching(-1.0), {**_NATURAL_RATES, **_SWITCHES}),
    )


def quick_methods(num_steps: int) -> tuple[Method, ...]:
    """Returns what the verdicts need at least, one setting each."""
    needed = ("SGD", *TWO_STAGES, NEVER_SWITCHING)
    chosen = [method for method in make_methods(num_steps) if method.name in needed]
    return tuple(method.at(grid={name: values[-1:] for name, values in method.grid.items()}) for method in chosen)


def rate_factor(count: jax.typing.ArrayLike, num_steps: int) -> jax.Array:
    """Returns what the rate is multiplied by: a tenth after half of the steps, again after three quarters.

    In the paper after 81 and 122 of 164 epochs.
    """
    share = jnp.asarray(count) / num_steps
    return jnp.where(share < 0.5, 1.0, jnp.where(share < 0.75, 0.1, 0.01))


def at_share(share: jax.typing.ArrayLike, num_steps: int) -> optcurv.SwitchRule:
    """Switches after a share of all steps, which may be traced."""
    return optcurv.SwitchRule(
        init=lambda: jnp.zeros((), jnp.int32), update=lambda count, _: (count + 1, count >= share * num_steps)
    )


_NEVER = optcurv.SwitchRule(init=lambda: (), update=lambda state, _: (state, jnp.zeros((), bool)))

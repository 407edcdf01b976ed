"""One training step, and one run."""

import jax
import optax

from benchmarks.methods import Method
from benchmarks.models import Batch, Task

State = tuple[optax.Params, optax.OptState]


def init_state(method: Method, params: optax.Params) -> State:
    """Returns parameters and the optimiser's state."""
    return params, method.optimizer(method.grid[0]).init(params)


def train_step(
    task: Task, method: Method, state: State, batch: Batch, setting: float | jax.Array
) -> tuple[State, jax.Array]:
    """Takes one step on a batch; returns the new state and the loss before the step.

    The tuned number is an argument, so that one compiled step serves the whole grid.
    """
    params, opt_state = state
    optimizer = optax.with_extra_args_support(method.optimizer(setting))
    loss = task.loss(batch)
    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params, value=value, grad=grads, value_fn=loss)
    return (optax.apply_updates(params, updates), opt_state), value

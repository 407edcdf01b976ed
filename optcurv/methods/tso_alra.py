"""TSO-ALRA: a Kronecker-factored inverse square root of the Fisher matrix, and plain SGD after a switch."""

import optax

from optcurv.arguments import check_number, check_transformation, checked
from optcurv.kronecker.preconditioner import scale_by_kronecker
from optcurv.methods.switching import SwitchRule, switch


def tso_alra(
    learning_rate: optax.ScalarOrSchedule,
    *,
    when: int | SwitchRule,
    preconditioner: optax.GradientTransformation = scale_by_kronecker(),  # noqa: B008  pure functions
    momentum: float | None = None,
    max_update_norm: float | None = 1.0,
    second_learning_rate: optax.ScalarOrSchedule | None = None,
    second_momentum: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The two-stage optimiser TSO-ALRA; emits the final signed step.

    .. math:: u = F^{-1/2} g, \qquad w \leftarrow w - \eta_1 \min(1, c / \|u\|)\, u

    up to the switch, and :math:`w \leftarrow w - \eta_2\, g` after it (Algorithm 1). The paper has one rate for both
    stages, 0.01 with batches of 128, and no bound c: `optcurv.tso_alra(0.01, when=..., max_update_norm=None)`. Without
    a bound the first stage is stable only at rates that are too small for SGD; the default c = 1 allows larger ones.
    Where the loss still jumps at the switch, give the second stage a smaller rate of its own.

    See `optcurv.scale_by_kronecker` for what the update needs, and `optcurv.switch` for what `when` may be.

    Args:
      learning_rate: :math:`\eta_1`, a number or a schedule.
      when: when to switch to SGD: after a number of steps, or by `optcurv.on_plateau(...)`.
      preconditioner: the first stage, by default `optcurv.scale_by_kronecker()`.
      momentum: β in :math:`m \leftarrow \beta m + u` in the first stage; default: none, as published.
      max_update_norm: c, a bound on the norm of the preconditioned gradient, before momentum; None for none, as
        published.
      second_learning_rate: :math:`\eta_2`, a number or a schedule whose steps count from the switch. Default:
        `learning_rate`, as published; a schedule then goes on through the switch, counting all steps.
      second_momentum: likewise β of the second stage, which begins at zero; default: none, as published.

    Returns:
      The optimiser.

    Raises:
      ValueError: if a number is out of range.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optcurv
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> loss = lambda p: jnp.mean((x @ p["w"] - x @ jnp.ones((3, 1))) ** 2)
      >>> params = {"w": jnp.zeros((3, 1))}
      >>> optimizer = optcurv.tso_alra(0.1, when=20)
      >>> state = optimizer.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params, value_fn=loss)
      ...     return optax.apply_updates(params, updates), state
      >>> start = loss(params)
      >>> for _ in range(40):
      ...     params, state = step(params, state)
      >>> print(loss(params) < 1e-2 * start)
      True
    """
    check_number("learning_rate", learning_rate, minimum=0.0)
    check_transformation("preconditioner", preconditioner)
    links = [preconditioner]
    if max_update_norm is not None:
        check_number("max_update_norm", max_update_norm, minimum=0.0, exclusive=True, constant=True)
        links.append(optax.clip_by_global_norm(max_update_norm))
    if momentum is not None:
        check_number("momentum", momentum, minimum=0.0, maximum=1.0, constant=True)
        links.append(optax.trace(momentum))
    first, second = optax.chain(*links), optax.identity()
    if second_momentum is not None:
        check_number("second_momentum", second_momentum, minimum=0.0, maximum=1.0, constant=True)
        second = optax.trace(second_momentum)
    if second_learning_rate is None:
        stages = optax.chain(switch(first, second, when), optax.scale_by_learning_rate(learning_rate))
        return checked("tso_alra", *stages)
    check_number("second_learning_rate", second_learning_rate, minimum=0.0)
    stages = switch(
        optax.chain(first, optax.scale_by_learning_rate(learning_rate)),
        optax.chain(second, optax.scale_by_learning_rate(second_learning_rate)),
        when,
    )
    return checked("tso_alra", *stages)

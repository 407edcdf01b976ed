"""Reading what the methods report."""

import jax
import optax

from optcurv.arguments import PyTree


def diagnostics(opt_state: PyTree) -> dict[str, jax.Array]:
    """Gathers the `info` of every state inside an optimiser's state, as one flat dict for the log.

    Finds them in any nesting of `optax.chain`, `masked`, `partition`, `MultiSteps` and other wrappers. optax's own line
    searches keep an `info` too, which is included.

    Args:
      opt_state: the state of any optax optimiser.

    Returns:
      A dict from `"<method>/<field>"` to a scalar, where the method is the name of the info's class in snake case
      without "Info"; a second state of the same method is `"<method>_1/<field>"`, and so on. Empty if nothing reports.

    Example:
      >>> import jax.numpy as jnp, optcurv
      >>> state = optcurv.pal().init(jnp.zeros(3))
      >>> sorted(optcurv.diagnostics(state))
      ['pal/case', 'pal/clipped', 'pal/curvature', 'pal/noise', 'pal/slope', 'pal/step']
    """
    gathered = {}
    seen: dict[str, int] = {}
    for _, info in optax.tree.get_all_with_path(opt_state, "info"):
        if not hasattr(info, "_fields"):
            continue
        method = _snake_case(type(info).__name__.removesuffix("Info"))
        repeat = seen.get(method, 0)
        seen[method] = repeat + 1
        prefix = f"{method}_{repeat}" if repeat else method
        gathered.update({f"{prefix}/{field}": value for field, value in info._asdict().items()})
    return gathered


def _snake_case(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name).removeprefix("_")

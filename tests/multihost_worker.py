"""One of two processes that train together with every method; `test_multihost.py` starts them."""

import argparse
import os
import pathlib
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp

NUM_PROCESSES, DEVICES_EACH = 2, 2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--die-before", type=int, help="step before which the second process is killed")
    parser.add_argument("--methods", nargs="+", help="default: all")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_disable_most_optimizations", True)
    jax.distributed.initialize(f"127.0.0.1:{args.port}", NUM_PROCESSES, args.process)
    assert jax.device_count() == NUM_PROCESSES * DEVICES_EACH

    from tests import problems  # these compute when they are imported, and all must be set by then
    from tests.cases import CASES
    from tests.laws.test_contract import make_step

    names = args.methods or [case.name for case in CASES if not case.variant]
    methods = {case.name: case.make() for case in CASES if case.name in names}
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    everywhere, split = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P("data"))
    steps = {name: jax.jit(make_step(method)) for name, method in methods.items()}

    def start():
        params = problems.regression_params()
        return {name: (params, method.init(params)) for name, method in methods.items()}

    def batch(count):
        """Each process holds its own rows alone."""
        whole = problems.blobs(seed=count)
        rows = len(whole.x) // NUM_PROCESSES
        mine = jax.tree.map(lambda leaf: np.asarray(leaf[args.process * rows : (args.process + 1) * rows]), whole)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(split, leaf), mine)

    with ocp.CheckpointManager(args.folder / "checkpoints") as manager:
        states, first = jax.jit(start, out_shardings=everywhere)(), 0
        if (latest := manager.latest_step()) is not None:
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), states
            )
            states, first = manager.restore(latest, args=ocp.args.StandardRestore(shapes)), latest + 1
        for count in range(first, args.steps):
            if count == args.die_before and args.process == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            states = {name: step(*states[name], batch(count)) for name, step in steps.items()}
            manager.save(count, args=ocp.args.StandardSave(states))
            manager.wait_until_finished()
    print("first step", first)
    found = {
        f"{name}/{leaf}": np.asarray(value) for name, (params, _) in states.items() for leaf, value in params.items()
    }
    np.savez(args.folder / f"process-{args.process}.npz", **found)


if __name__ == "__main__":
    main()

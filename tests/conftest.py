import os
import pathlib

# The tests compile much and compute little: what one has compiled, the next need not, nor a process it starts, nor the
# next run. Each worker keeps its own, as they would read what others are still writing.
cache = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax" / os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

os.environ["MPLBACKEND"] = "agg"  # no windows
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would wait for each other's cores, one set a worker

import jax  # noqa: E402  it reads the environment
import pytest  # noqa: E402

# Four CPU devices on one machine, for the sharding laws; it must be said before JAX starts its backends.
jax.config.update("jax_num_cpu_devices", 4)

jax.config.update("jax_disable_most_optimizations", True)

# Their tolerances are those of float32, not of the shorter products that some accelerators take for it.
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads these options
def pytest_cmdline_main(config):
    """Tests run in parallel where pytest-xdist is installed, unless `-n` says otherwise."""
    options = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    if options.numprocesses is None and not options.usepdb:
        options.numprocesses = config.hook.pytest_xdist_auto_num_workers(config=config)
    if options.numprocesses and options.dist == "no":
        options.dist = "loadgroup"

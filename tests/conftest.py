import jax

# Four CPU devices on one machine, for the sharding laws; it must be said before JAX starts its backends.
jax.config.update("jax_num_cpu_devices", 4)

# The tests compile much and compute little.
jax.config.update("jax_disable_most_optimizations", True)

# Their tolerances are those of float32, not of the shorter products that some accelerators take for it.
jax.config.update("jax_default_matmul_precision", "highest")

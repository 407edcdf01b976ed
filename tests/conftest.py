import jax

# Four CPU devices on one machine, for the sharding laws; it must be said before JAX starts its backends.
jax.config.update("jax_num_cpu_devices", 4)

# The tests compile much and compute little.
jax.config.update("jax_disable_most_optimizations", True)

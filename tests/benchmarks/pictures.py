"""Small image data sets."""

import struct

import jax.numpy as jnp
import numpy as np

from benchmarks.core.models import Batch


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def images(count, seed=0):
    """Images in which a bright row tells the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    pictures = rng.uniform(0, 0.3, (count, 28, 28, 1))
    pictures[np.arange(count), labels] += 0.7
    return Batch(jnp.asarray(pictures, jnp.float32), jnp.asarray(labels, jnp.int32))


def write_fashion_mnist(folder, num_train=1000, num_test=100):
    """Writes such images where Fashion-MNIST is looked for."""
    folder.mkdir(exist_ok=True)
    for prefix, batch in (("train", images(num_train)), ("t10k", images(num_test, 1))):
        pictures = np.asarray(255 * np.clip(batch.images[..., 0], 0, 1)).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(pictures))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(np.asarray(batch.labels).astype(np.uint8)))
    return folder

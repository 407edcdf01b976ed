"""The data sets: scikit-learn's digits, and Fashion-MNIST from IDX files. Nothing is downloaded."""

import gzip
import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.core.models import Batch

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_UNSIGNED_BYTES = 0x08


class DataError(Exception):
    """A data set is missing or not what it should be."""


class Dataset(NamedTuple):
    """Images to train on, others to test on and, for some studies, others to tune on."""

    train: Batch
    test: Batch
    validation: Batch | None = None


def default_folder() -> Path:
    """Returns OPTCURV_DATA, or where Debian installs Fashion-MNIST."""
    return Path(os.environ.get("OPTCURV_DATA") or DEBIAN_FOLDER)


def digits() -> Dataset:
    """Returns 1 797 digits of 8x8 pixels, a fifth of them for the test."""
    images, labels = load_digits(return_X_y=True)
    pieces = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = (np.asarray(piece) for piece in pieces)
    shape = (-1, 8, 8, 1)
    return Dataset(_batch(train_images.reshape(shape), train_labels), _batch(test_images.reshape(shape), test_labels))


def fashion_mnist(folder: Path) -> Dataset:
    """Returns 60 000 and 10 000 images of 28x28 pixels from the four IDX files in a folder."""
    return Dataset(*(_split(folder, prefix) for prefix in ("train", "t10k")))


def small_fashion_mnist(folder: Path) -> Dataset:
    """Returns Fashion-MNIST in images of 14x14 pixels, the averages of 2x2."""
    splits = fashion_mnist(folder)[:2]
    return Dataset(*(split._replace(images=nn.avg_pool(split.images, (2, 2), (2, 2))) for split in splits))


def digest(*splits: Batch) -> str:
    """Returns what tells images and labels from others."""
    result = hashlib.sha256()
    for split in splits:
        for array in split:
            result.update(np.asarray(array).tobytes())
    return result.hexdigest()


def _split(folder: Path, prefix: str) -> Batch:
    images, labels = (read_idx(find_idx(folder, f"{prefix}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(f"{prefix} files in {folder}: images {images.shape} and labels {labels.shape} do not match.")
    return _batch(images[..., None] / np.float32(255), labels)


def _batch(images: np.ndarray, labels: np.ndarray) -> Batch:
    return Batch(jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32))


def find_idx(folder: Path, name: str) -> Path:
    """Returns the path of an IDX file, compressed or not.

    Raises:
      DataError: if there is neither; says where to get it.
    """
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(
        f"Found neither {name}.gz nor {name} in {folder}. Fashion-MNIST is four files, train-images-idx3-ubyte, "
        "train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, with or without .gz. On Debian: "
        f"apt install dataset-fashion-mnist, which puts them in {DEBIAN_FOLDER}. Elsewhere: "
        "https://github.com/zalandoresearch/fashion-mnist. Name their folder with --data-dir or in the environment "
        "variable OPTCURV_DATA."
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes.

    Raises:
      DataError: if the file is damaged or of another kind.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTES)):
        raise DataError(f"{path} is no IDX file of unsigned bytes: it starts with {content[:4].hex(' ')}.")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise DataError(f"{path} is damaged: it ends within its header.")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    if len(content) - header != np.prod(shape):
        raise DataError(f"{path} is damaged: {len(content) - header} bytes of data where shape {shape} is announced.")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)

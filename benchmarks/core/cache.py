"""Measurements are cached on disk, so that a job which was killed goes on where it was."""

import ast
import functools
import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import joblib

import optcurv
from benchmarks.core.timing import environment

T = TypeVar("T")
_ROOTS = {"benchmarks": Path(__file__).parents[1], "optcurv": Path(optcurv.__file__).parent}


class Cache:
    """What a job measured, kept by `joblib.Memory` in the folder `cache` of its output.

    A measurement is found again under its key, the device, the versions, and the source of the function that measures
    with all that this imports of optcurv and the benchmarks. Delete the folder to measure anew.
    """

    def __init__(self, output: Path) -> None:
        if (output / "cache").exists():
            print(f"What is found in {output} is not measured again; delete it to measure anew.", file=sys.stderr)
        self._memory = joblib.Memory(output / "cache", verbose=0)
        self._call: Callable[..., Any] = self._memory.cache(_call, ignore=["function", "arguments"])

    def get(self, key: Mapping[str, Any], function: Callable[..., T], *arguments: Any) -> T:
        """Returns what a function of these arguments returns, called now or before.

        Args:
          key: all that determines the result, in plain words and numbers.
          function: defined in a module; it may be a method or a `functools.partial`.
          *arguments: of the function.
        """
        plain = function.func if isinstance(function, functools.partial) else function
        surroundings = environment() | {"function": plain.__qualname__, "source": source(plain.__module__)}
        return self._call(dict(key), surroundings, function, arguments)


def _call(key: dict[str, Any], surroundings: dict[str, Any], function: Callable[..., T], arguments: tuple) -> T:
    del key, surroundings
    return function(*arguments)


@functools.cache
def source(module: str) -> str:
    """Returns a digest of a module and of all that it imports, directly or not, of optcurv and the benchmarks."""
    found: dict[str, bytes] = {}
    _collect(module, found)
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()


def _collect(module: str, found: dict[str, bytes]) -> None:
    path = _file(module)
    if module in found or path is None:
        return
    found[module] = path.read_bytes()
    for node in ast.walk(ast.parse(found[module])):
        if isinstance(node, ast.Import):
            for alias in node.names:
                _collect(alias.name, found)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):  # it may be a module
                _collect(name, found)


def _file(module: str) -> Path | None:
    package, *rest = module.split(".")
    path = _ROOTS.get(package, Path("nowhere")).joinpath(*rest)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)

"""What every job shows and writes: progress, tables, and JSON with the surroundings of the measurement."""

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_PACKAGES = ("optcurv", "jax", "jaxlib", "optax", "flax", "numpy")
_TEXT_WIDTH = 140


def environment() -> dict[str, Any]:
    """Returns what a reader needs to judge a timing: device, platform, versions."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"device": device_name(), "platform": platform.platform(), "python": platform.python_version()} | versions


def device_name() -> str:
    """Returns the accelerator's name, or the processor's and its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; numbers that are not finite become null. A file is there as a whole, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
    unfinished.replace(path)


def with_nan(content: Any) -> Any:
    """Returns what was read from JSON with NaN in place of null, which stands for numbers that are not finite."""
    match content:
        case dict():
            return {key: with_nan(value) for key, value in content.items()}
        case list():
            return [with_nan(value) for value in content]
        case None:
            return math.nan
    return content


def print_table(table: Table) -> None:
    """Prints a table; where the output is no terminal, wide enough for it."""
    Console(width=None if sys.stdout.isatty() else _TEXT_WIDTH).print(table)


def write_table(path: Path, table: Table) -> None:
    """Writes a table as plain text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        Console(file=file, width=_TEXT_WIDTH).print(table)


def write(stem: Path, table: Table, content: dict[str, Any]) -> None:
    """Prints a table, writes it as text, and writes what was measured as JSON."""
    print_table(table)
    write_table(stem.with_suffix(".txt"), table)
    write_json(stem.with_suffix(".json"), {"environment": environment()} | content)


@contextmanager
def progress_bar(num_runs: int) -> Iterator[Callable[[str], None]]:
    """Shows a bar; yields a function that is called after each run, with a word on it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=num_runs)
        yield lambda what: progress.update(bar, advance=1, description=what)


def _finite(content: Any) -> Any:
    match content:
        case dict():
            return {key: _finite(value) for key, value in content.items()}
        case list() | tuple():
            return [_finite(value) for value in content]
        case float() if not math.isfinite(content):
            return None
    return content

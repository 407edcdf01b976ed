"""Measurements are kept on disk, so that a job which was killed goes on where it was."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

import optcurv
from benchmarks.core.report import environment, with_nan, write_json


class Kept:
    """What a job measured, in the folder `runs` of its output: a file of JSON for each measurement, beside its key.

    The key is all that determines a measurement, with the device, the versions and optcurv's source. What is there is
    not measured again, neither after a kill nor after the job's end; delete the output to measure anew.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output / "runs"
        self._surroundings = environment() | {"source": _source()}
        if any(self.folder.glob("*.json")):
            hint = f"What is found in {output} is not measured again; delete the folder to measure anew."
            Console(stderr=True).print(hint, soft_wrap=True)

    def get(self, name: str, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """Returns what was measured under a key, now or before: always as JSON gives it back, but null as NaN.

        The name says what it is, and begins the name of the file. A file that is broken or has another key is replaced.
        """
        text = json.dumps({"name": name, **key, "environment": self._surroundings}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = self.folder / f"{name}-{digest}.json"
        full_key = json.loads(text)  # tuples have become lists, as in the file
        if (content := _read(path)).get("key") != full_key:
            write_json(path, {"key": full_key, "result": measure()})
            content = _read(path)
        return with_nan(content["result"])


def _source() -> str:
    """Returns a digest of optcurv's files: in a clone they change while the version stays."""
    files = sorted(Path(optcurv.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """Returns a file's content, or nothing of one that is not there or broken."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

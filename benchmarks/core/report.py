"""What a study shows and writes: progress, summaries as JSON, tables as Markdown, and pages made of them."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tabulate
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.core.data import default_folder
from benchmarks.core.statistics import Claim
from benchmarks.core.timing import environment

Row = Mapping[str, Any]

_PLACE = r"(?P<begin><!-- (?P<name>\w+): begin -->).*?(?P<end><!-- (?P=name): end -->)"
_LIST_OF_LEAVES = r"\[[^\[\]{}]*\]"


@dataclasses.dataclass
class Study:
    """Options of every study; a subclass declares its own and says what `run` measures."""

    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """A few small runs, to see that it works."""
    output: Path | None = None
    """Folder of tables, pictures and cached measurements (default: results/ and the study's name)."""
    data_dir: Path = dataclasses.field(default_factory=default_folder)
    """Folder of Fashion-MNIST's IDX files (default: OPTCURV_DATA, or the Debian package's)."""

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.output or Path("results") / type(self).__module__.split(".")[-2]

    def run(self) -> None:
        """Measures, and writes summaries as JSON to `folder`."""
        raise NotImplementedError

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a summary, and in what surroundings it was measured."""
        write_json(self.folder / f"{name}.json", {"environment": environment()} | dict(content))


def write_json(path: Path, content: Any, digits: int = 4) -> None:
    """Writes JSON with rounded numbers; those that are not finite become strings, for `read_json`."""
    text = json.dumps(_rounded(content, digits), indent=1, ensure_ascii=False, allow_nan=False)
    text = re.sub(_LIST_OF_LEAVES, lambda match: re.sub(r"\s+", " ", match[0]), text)  # on one line
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote."""
    return _numbers(json.loads(path.read_text()))


def summaries(folder: Path, pattern: str = "*") -> dict[str, Any]:
    """Returns all summaries of a folder by name."""
    return {path.stem: read_json(path) for path in sorted(folder.glob(f"{pattern}.json"))}


def _rounded(content: Any, digits: int) -> Any:
    match content:
        case dict():
            return {str(key): _rounded(value, digits) for key, value in content.items()}
        case list() | tuple():
            return [_rounded(value, digits) for value in content]
        case float():
            return float(f"{content:.{digits}g}") if math.isfinite(content) else str(content)
    return _rounded(content.tolist(), digits) if hasattr(content, "tolist") else content


def _numbers(content: Any) -> Any:
    match content:
        case dict():
            return {key: _numbers(value) for key, value in content.items()}
        case list():
            return [_numbers(value) for value in content]
        case "nan" | "inf" | "-inf":
            return float(content)
    return content


def table(rows: Iterable[Row], caption: str = "") -> str:
    """Lays rows out as Markdown; numbers are formatted already."""
    rows = [dict(row) for row in rows]
    align = ("left", *("right" for _ in list(rows[0])[1:]))
    text = tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True, colalign=align)
    return f"{text}\n\n{caption}\n" if caption else f"{text}\n"


def claims_table(claims: Iterable[Claim | Row]) -> str:
    """Lays out what a paper claims and whether it held."""
    rows = [claim._asdict() if isinstance(claim, Claim) else claim for claim in claims]
    return table({"the paper claims": row["text"], "here": row["verdict"], "numbers": row["numbers"]} for row in rows)


def write_report(study: ModuleType, folder: Path) -> dict[str, str]:
    """Writes a study's tables and pictures beside its summaries; returns the tables by name.

    Args:
      study: its module `main`, with `tables(folder)`, which maps summaries to Markdown, and `draw(folder)`.
      folder: of the summaries.
    """
    tables = study.tables(folder)
    for name, text in tables.items():
        (folder / f"{name}.md").write_text(text)
    study.draw(folder)
    return tables


def page(study: ModuleType, tables: Mapping[str, str]) -> str:
    """Returns a study's page of the documentation: its README, but for the files, and its results with their tables."""
    folder = Path(study.__file__ or "").parent
    template = (folder / "README.md").read_text().split("## Files")[0] + (folder / "results.md").read_text()
    return re.sub(r"\{\{(.*?)\}\}", lambda match: tables[match[1]].strip(), template)


def filled(text: str, contents: Mapping[str, str]) -> str:
    """Writes contents by name into a page, each between `<!-- name: begin -->` and `<!-- name: end -->`."""

    def fill(match: re.Match[str]) -> str:
        return f"{match['begin']}\n\n{contents[match['name']].strip()}\n\n{match['end']}"

    return re.sub(_PLACE, fill, text, flags=re.DOTALL)


def typed_by_hand(text: str) -> str:
    """Returns a page without what `filled` writes."""
    return re.sub(_PLACE, "", text, flags=re.DOTALL)


@contextlib.contextmanager
def progress_bar(num_runs: int | None = None) -> Iterator[Callable[[str], None]]:
    """Shows a bar, of unknown length if need be; yields a function that is called after each run, with a word on it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=num_runs)
        yield lambda what: progress.update(bar, advance=1, description=what)

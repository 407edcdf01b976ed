"""The command line; `python -m benchmarks --help`."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import tyro

from benchmarks.core import report
from benchmarks.core.data import DataError

_FOLDER = Path(__file__).parent
PAGES = _FOLDER.parent / "docs" / "results"
WITH_HEADLINE = (_FOLDER.parent / "README.md", PAGES / "index.md")
DEFAULT = "comparison"
HEADLINES = (
    "science",
    "comparison",
)  # of the README's picture and table: their modules have `headline(folder)`

HELP = """Benchmarks of optcurv: one command a study. Without a command: the comparison of all
methods, which takes some minutes.

With --quick a study takes a minute or so, and shows whether it works. A job that was killed goes on at the next start:
what is found in the output folder is not measured again, not even after its end; delete the folder to measure anew.
benchmarks/<study>/README.md has each study's question and how long it takes; docs/results has what came out."""


def studies() -> dict[str, ModuleType]:
    """Returns the module `main` of each folder that has one, the default first."""
    names = sorted((path.parent.name for path in _FOLDER.glob("*/main.py")), key=lambda name: (name != DEFAULT, name))
    return {name: importlib.import_module(f"benchmarks.{name}.main") for name in names}


def headline() -> dict[str, str]:
    """Returns what README and the page of all results show, by the names of the marked places."""
    found, contents = studies(), {}
    for name in HEADLINES:
        contents |= found[name].headline(_FOLDER / "results" / name)
    return contents


def write_pages() -> None:
    """Draws every table, picture and page of the documentation, and the README's, from what benchmarks/results has."""
    for name, study in studies().items():
        tables = report.write_report(study, _FOLDER / "results" / name)
        (PAGES / f"{name}.md").write_text(report.page(study, tables))
    contents = headline()
    for path in WITH_HEADLINE:
        path.write_text(report.filled(path.read_text(), contents))


def main(argv: Sequence[str]) -> int:
    """Runs a command; without one, the comparison."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = [DEFAULT, *argv]
    found = studies()
    commands = {name.replace("_", "-"): study.Options for name, study in found.items()} | {"report": write_pages}
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)
    try:
        chosen = tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m benchmarks", description=HELP, args=list(argv), config=config
        )
        if isinstance(chosen, report.Study):
            chosen.run()
            tables = report.write_report(sys.modules[type(chosen).__module__], chosen.folder)
            print(*tables.values(), f"Written to {chosen.folder}", sep="\n")
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The next start goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

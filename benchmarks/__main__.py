"""The command line; `python -m benchmarks --help`."""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.adaptive_norms import main as adaptive_norms
from benchmarks.comparison import main as compare
from benchmarks.core.data import DataError
from benchmarks.loss_surfaces import main as loss_surfaces
from benchmarks.performance import cost, precision, scale
from benchmarks.tso_alra import main as tso_alra

COMMANDS = {
    "compare": compare,
    "cost": cost,
    "scale": scale,
    "precision": precision,
    "adaptive-norms": adaptive_norms,
    "tso-alra": tso_alra,
    "loss-surfaces": loss_surfaces,
}


def main(argv: Sequence[str]) -> int:
    """Runs a command; without one, the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Benchmarks of optcurv. A job that was killed goes on at the next start. What is found in its "
        "output folder is not measured again, not even after its end: delete the folder to measure anew.",
        epilog="Without a command: compare.",
    )
    commands = parser.add_subparsers(dest="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip()
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["compare", *argv]
    args = parser.parse_args(argv)
    try:
        return COMMANDS[args.command].main(args)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

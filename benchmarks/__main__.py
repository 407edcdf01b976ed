"""The command line; `python -m benchmarks --help`."""

import argparse
import sys

from benchmarks import cost

COMMANDS = {"cost": cost}


def main(argv: list[str]) -> int:
    """Runs a command; without one, the comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of optcurv.")
    commands = parser.add_subparsers(dest="command")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip()
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["compare", *argv]
    args = parser.parse_args(argv)
    return COMMANDS[args.command].main(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

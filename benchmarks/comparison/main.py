"""Trains a network with every method, each tuned over its grid on the same budget."""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.comparison.figures import plot_curves
from benchmarks.core import data
from benchmarks.core.kept import Kept
from benchmarks.core.methods import FULL_BATCH_METHODS, METHODS, Method
from benchmarks.core.models import make_task
from benchmarks.core.report import environment, print_table, write_json, write_table
from benchmarks.core.training import SAMPLE, Problem, Run, Trainer
from benchmarks.core.tuning import TUNING_SEED, Result


class Defaults(NamedTuple):
    """Epochs' worth of gradients, and batch size: some minutes on two cores."""

    budget: float
    batch_size: int


DEFAULTS = {
    ("digits", "mlp"): Defaults(40, 128),
    ("digits", "cnn"): Defaults(30, 128),
    ("digits", "autoencoder"): Defaults(60, 128),
    ("fashion-mnist", "mlp"): Defaults(8, 250),
    ("fashion-mnist", "cnn"): Defaults(3, 250),
    ("fashion-mnist", "autoencoder"): Defaults(4, 250),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="digits", help="default: digits")
    parser.add_argument("--model", choices=["mlp", "cnn", "autoencoder"], default="mlp", help="default: mlp")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=data.default_folder(),
        help="folder of Fashion-MNIST's IDX files (default: OPTCURV_DATA, or the Debian package's)",
    )
    parser.add_argument("--budget", type=_positive, help="epochs' worth of gradients for each run")
    parser.add_argument("--batch-size", type=_count)
    parser.add_argument("--seeds", type=_count, help="fresh seeds for the tuned methods (default: 3)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder; measurements found in its runs/ are kept (default: results/<dataset>-<model>)",
    )
    parser.add_argument("--quick", action="store_true", help="one seed and a fiftieth of the budget: does it run?")


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def main(args: argparse.Namespace) -> int:
    """Compares, prints the table and writes table, JSON and pictures; after Ctrl-C, of what is complete."""
    problem = make_problem(args)
    num_seeds = args.seeds or (1 if args.quick else 3)
    folder = args.output or Path("results") / f"{args.dataset}-{args.model}"
    kept, results = Kept(folder), []
    interrupted = False
    try:
        compare(problem, FULL_BATCH_METHODS if problem.full_batch else METHODS, num_seeds, kept, results)
    except KeyboardInterrupt:
        interrupted = True
        Console(stderr=True).print("Interrupted; writing what is complete. The next start goes on.")
    title = f"{args.dataset}, {args.model}, batch {problem.batch_size}"
    measured = [result for result in results if result.tuning]
    options = {"dataset": args.dataset, "model": args.model, "batch_size": problem.batch_size, "seeds": num_seeds}
    options |= {"budget_gradients": problem.budget, "quick": args.quick}
    write_json(folder / "results.json", _as_json(measured, options, interrupted))
    if measured:
        table = results_table(title, problem, measured)
        print_table(table)
        write_table(folder / "results.txt", table)
        plot_curves(folder / "curves.png", title, {result.method.name: result.shown for result in measured})
    Console().print(f"Written to {folder}")
    return 130 if interrupted else 0


def make_problem(args: argparse.Namespace) -> Problem:
    """Returns what the options ask for."""
    dataset = data.digits() if args.dataset == "digits" else data.fashion_mnist(args.data_dir)
    defaults = DEFAULTS[args.dataset, args.model]
    batch_size = args.batch_size or defaults.batch_size
    num_images, image_size = dataset.train.images.shape[:2]
    if batch_size > num_images:
        raise data.DataError(f"--batch-size {batch_size} is more than the {num_images} training images.")
    epochs = args.budget or (defaults.budget / 50 if args.quick else defaults.budget)
    return Problem(make_task(args.model, image_size), dataset, batch_size, epochs * (num_images // batch_size))


def compare(problem: Problem, methods: Sequence[Method], num_seeds: int, kept: Kept, results: list[Result]) -> None:
    """Tunes and runs one method after the other; appends to `results` as it goes, for an interrupt to find them."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        num_runs = sum(len(method.grid) + num_seeds for method in methods)
        bar = progress.add_task("", total=num_runs * problem.budget)
        counts = itertools.count(1)

        def run(trainer: Trainer, setting: float, seed: int, num_evaluations: int) -> Run:
            label = f"{trainer.method.name}, {trainer.method.tuned} {setting:g}, seed {seed}"
            progress.update(bar, description=label)

            def report(gradients: float, loss: float) -> None:
                progress.update(bar, advance=gradients, description=f"{label}: loss {loss:.4f}")

            def measure() -> dict[str, Any]:
                return dataclasses.asdict(trainer.run(setting, seed, num_evaluations, report))

            key = problem.key(trainer.method, setting=setting, seed=seed, num_evaluations=num_evaluations)
            record = kept.get("comparison", key, measure)
            progress.update(bar, completed=next(counts) * problem.budget)
            return Run(**record)

        for method in methods:
            result = Result(method)
            results.append(result)
            trainer = Trainer(problem, method)
            for setting in method.grid:
                result.tuning.append(run(trainer, setting, TUNING_SEED, num_evaluations=1))
            for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + num_seeds):
                result.final.append(run(trainer, result.best.setting, seed, num_evaluations=4))
        progress.update(bar, description="done", completed=num_runs * problem.budget)


def results_table(title: str, problem: Problem, results: Sequence[Result]) -> Table:
    """Lays out mean and spread over the seeds."""
    num_images = min(SAMPLE, len(problem.data.train.labels))
    notes = [
        "Mean ± standard deviation over seeds. Seconds: of the steps alone.",
        f"Train loss: over {num_images} training images after the last step.",
    ]
    if any(result.on_edge for result in results):
        notes.append("(edge): the first or last setting of its grid; a better one may lie beyond.")
    if not all(result.final for result in results):
        notes.append("(tuning): interrupted before the fresh seeds; the best tuning run.")
    table = Table(title=title, caption="\n".join(notes))
    score = "test_accuracy" if problem.task.has_accuracy else "test_loss"
    table.add_column("method", no_wrap=True)
    for column in ("train loss", score.replace("_", " "), "seconds", "gradients", "steps"):
        table.add_column(column, justify="right")
    table.add_column("best setting")
    for result in results:
        mark = (" (edge)" if result.on_edge else "") + ("" if result.final else " (tuning)")
        table.add_row(
            result.method.name,
            _plus_minus(*result.summary("train_loss")),
            _plus_minus(*result.summary(score)),
            f"{result.summary('seconds')[0]:.2f}",
            f"{result.summary('gradients')[0]:.0f}",
            f"{result.summary('steps')[0]:.0f}",
            f"{result.method.tuned} {result.best.setting:g}{mark}",
        )
    return table


def _plus_minus(mean: float, spread: float) -> str:
    return f"{mean:#.3g} ± {spread:.1g}" if spread else f"{mean:#.3g}"


def _as_json(results: Sequence[Result], options: dict[str, Any], interrupted: bool) -> dict[str, Any]:
    methods = {
        result.method.name: {
            "tuned": result.method.tuned,
            "grid": result.method.grid,
            "gradients_per_step": result.method.gradients,
            "best_setting": result.best.setting,
            "best_on_edge": result.on_edge,
            "tuning": [dataclasses.asdict(run) for run in result.tuning],
            "final": [dataclasses.asdict(run) for run in result.final],
        }
        for result in results
    }
    return {"environment": environment(), "options": options, "interrupted": interrupted, "methods": methods}

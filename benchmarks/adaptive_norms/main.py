"""Reproduces the three figures of "Adaptive norms for deep learning with regularized Newton methods", in small."""

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.adaptive_norms import hessian_mass, quadratics, trust_regions
from benchmarks.adaptive_norms.figures import Column, plot_masses, plot_quadratics, plot_training
from benchmarks.core import data
from benchmarks.core.claims import Claim, claims_table
from benchmarks.core.kept import Kept
from benchmarks.core.report import progress_bar, write

_AXES = ("gradients", "epochs", "seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument("--figure", choices=["1", "2", "3", "all"], default="all", help="default: all")
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="digits", help="default: digits")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=data.default_folder(),
        help="folder of Fashion-MNIST's IDX files (default: OPTCURV_DATA, or the Debian package's)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few runs on small budgets, of networks the MLP alone: does it run?"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder; measurements found in its runs/ are kept (default: results/adaptive-norms-<dataset>)",
    )


def main(args: argparse.Namespace) -> int:
    """Measures and judges each figure; writes tables, JSON and pictures."""
    folder = args.output or Path("results") / f"adaptive-norms-{args.dataset}"
    kept = Kept(folder)
    dataset = data.digits() if args.dataset == "digits" else data.fashion_mnist(args.data_dir)
    for number, figure in {"1": figure_1, "2": figure_2, "3": figure_3}.items():
        if args.figure in (number, "all"):
            claims = figure(folder, args.dataset, dataset, kept, quick=args.quick)
            content = {"claims": [claim._asdict() for claim in claims]}
            write(folder / f"claims-{number}", claims_table(f"Figure {number}: what held", claims), content)
    Console().print(f"Written to {folder}")
    return 0


def figure_1(folder: Path, dataset_name: str, dataset: data.Dataset, kept: Kept, *, quick: bool) -> list[Claim]:
    """Quadratics; no data, and nothing worth keeping: no clock runs, and all takes seconds."""
    del dataset_name, dataset, kept
    measured = quadratics.measure(num_starts=5 if quick else 30)
    write(folder / "figure-1", quadratics.results_table(measured), quadratics.as_json(measured))
    plot_quadratics(folder / "figure-1.png", measured)
    return quadratics.judge(quadratics.final_values(measured))


def figure_2(folder: Path, dataset_name: str, dataset: data.Dataset, kept: Kept, *, quick: bool) -> list[Claim]:
    """Diagonal mass."""
    num_runs, max_steps = (2, 20) if quick else (10, 10_000)
    networks = dict(list(hessian_mass.NETWORKS[dataset_name].items())[: 1 if quick else None])
    with progress_bar(num_runs * len(networks)) as report:
        measured = {
            name: hessian_mass.measure(dataset, task, num_runs, max_steps, kept, lambda name=name: report(name))
            for name, task in networks.items()
        }
    write(folder / "figure-2", hessian_mass.results_table(measured), hessian_mass.as_json(measured))
    plot_masses(folder / "figure-2.png", f"Diagonal mass of Hessians, {dataset_name}", measured)
    return hessian_mass.judge(measured)


def figure_3(folder: Path, dataset_name: str, dataset: data.Dataset, kept: Kept, *, quick: bool) -> list[Claim]:
    """Trust regions and first-order methods."""
    num_seeds, num_evaluations = (1, 5) if quick else (10, 60)
    models = trust_regions.MODELS[: 1 if quick else None]
    measured = []
    num_runs = sum(len(method.grid) + num_seeds for method in trust_regions.METHODS)
    with progress_bar(num_runs * len(models)) as report:
        for model in models:
            problem = trust_regions.make_problem(dataset_name, dataset, model, quick=quick)
            target = trust_regions.DEFAULTS[dataset_name, model].target
            results = trust_regions.measure(problem, trust_regions.METHODS, num_seeds, num_evaluations, kept, report)
            measured.append(trust_regions.Measured(model, target, results))
    for one in measured:
        title = f"Figure 3: {dataset_name}, {one.model}"
        write(folder / f"figure-3-{one.model}", trust_regions.results_table(one, title), trust_regions.as_json(one))
        plot_training(folder / f"figure-3-{one.model}.png", title, [_column(one, axis) for axis in _AXES])
    regions = [one._replace(results=one.results[: len(trust_regions.TRUST_REGIONS)]) for one in measured]
    title = f"Balls and ellipsoids, {dataset_name}"
    plot_training(folder / "figure-3.png", title, [_column(one, "gradients", one.model) for one in regions])
    return [claim for one in measured for claim in trust_regions.judge(one)]


def _column(measured: trust_regions.Measured, axis: str, title: str = "") -> Column:
    runs = {result.method.name: result.shown for result in measured.results}
    return Column(title, axis, measured.progress, measured.target, runs)

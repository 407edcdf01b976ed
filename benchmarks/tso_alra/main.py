"""TSO-ALRA on Fashion-MNIST against SGD, Adam and AMSGrad, and what its steps cost."""

import argparse
import functools
from pathlib import Path

from flax import linen as nn
from rich.console import Console

from benchmarks.core import data
from benchmarks.core.claims import claims_table
from benchmarks.core.kept import Kept
from benchmarks.core.report import print_table, progress_bar, write, write_table
from benchmarks.core.timing import WORKLOADS
from benchmarks.tso_alra import peer, refresh, two_stages
from benchmarks.tso_alra.figures import plot_stages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "--part", choices=["alexnet", "vgg", "cost", "all"], default="all", help="a network, or costs (default: all)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=data.default_folder(),
        help="folder of Fashion-MNIST's IDX files (default: OPTCURV_DATA, or the Debian package's)",
    )
    parser.add_argument("--size", choices=["small", "full"], default="small", help="full: the paper's, for a GPU")
    parser.add_argument("--epochs", type=int, default=12, help="default: 12; published: 164")
    parser.add_argument("--images", type=int, default=4000, help="to train on, at most 50000 (default: 4000)")
    parser.add_argument(
        "--seeds", type=int, default=4, help="fresh seeds for the tuned methods; verdicts need 4 (default: 4)"
    )
    parser.add_argument("--peer", choices=["kfac-jax"], help="compare with this library, and do nothing else")
    parser.add_argument(
        "--peer-environment",
        type=Path,
        default=Path.home() / ".cache" / "optcurv" / "kfac-jax",
        help="where it is installed, unless it is there already (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run beside the peer (default: 10)")
    parser.add_argument("--quick", action="store_true", help="few settings, two epochs of 640 images: does it run?")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/tso-alra"),
        help="folder; measurements found there are kept (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    """Measures, judges and writes tables, JSON and pictures."""
    dataset = data.fashion_mnist(args.data_dir)
    kept = Kept(args.output)
    if args.peer:
        compare_with_peer(args, dataset, kept)
        return 0
    for name, network in two_stages.NETWORKS[args.size].items():
        if args.part in (name, "all"):
            train_network(args, dataset, name, network, kept)
    if args.part in ("cost", "all"):
        measure_refreshes(args, dataset, kept)
    Console().print(f"Written to {args.output}")
    return 0


def train_network(args: argparse.Namespace, dataset: data.Dataset, name: str, network: nn.Module, kept: Kept) -> None:
    """Runs all families on one network."""
    num_images, num_epochs, num_seeds = (640, 2, 1) if args.quick else (args.images, args.epochs, args.seeds)
    problem = two_stages.make_problem(dataset, network, num_images, num_epochs)
    families = two_stages.QUICK if args.quick else two_stages.FAMILIES
    with progress_bar(sum(len(family.settings()) + num_seeds for family in families)) as report:
        results = two_stages.measure(problem, families, num_seeds, args.output / f"{name}.json", kept, report)
    title = f"Fashion-MNIST, {name}, {num_images} images, {num_epochs} epochs"
    claims = two_stages.judge(name, results)
    table = two_stages.results_table(title, results)
    print_table(table)
    write_table(args.output / f"{name}.txt", table)
    content = {"claims": [claim._asdict() for claim in claims]}
    write(args.output / f"claims-{name}", claims_table(f"{name}: what held", claims), content)
    plot_stages(args.output / f"{name}.png", title, results)


def measure_refreshes(args: argparse.Namespace, dataset: data.Dataset, kept: Kept) -> None:
    """Costs of steps, and losses after equally many, on the networks of `cost`."""
    num_steps, drift_steps = (10, 40) if args.quick else (refresh.NUM_STEPS, refresh.DRIFT_STEPS)
    for name, workload in WORKLOADS.items():
        schedules, rows = refresh.SCHEDULES[: 1 if args.quick else 3 if name == "cnn" else 4], {}
        with progress_bar(4 * len(schedules)) as report:
            for schedule in schedules:
                key = workload.description | {"schedule": schedule}
                measure_cost = functools.partial(refresh.measure_cost, workload, schedule)
                rows[schedule.name] = kept.get("refresh-cost", key, measure_cost)
                report(f"{schedule.name}: timed")
                rows[schedule.name] |= refresh.measure_loss(workload, dataset, schedule, num_steps, kept, report)
        key = workload.description | {"data": data.digest(dataset.train), "steps": drift_steps}
        measure_drift = functools.partial(refresh.measure_drift, workload, dataset, drift_steps)
        drift = kept.get("refresh-drift", key, measure_drift)
        title = f"Refreshing factors and roots: {name} of `cost`, batch {workload.batch_size}"
        table = refresh.results_table(title, rows, num_steps, drift, drift_steps)
        write(args.output / f"refresh-{name}", table, {"rows": rows, "drift": drift})


def compare_with_peer(args: argparse.Namespace, dataset: data.Dataset, kept: Kept) -> None:
    """Costs of steps, and losses after equal seconds, beside kfac-jax."""
    python, results = peer.make_environment(args.peer_environment), {}
    cases = [(name, power) for name in peer.NETWORKS for power in peer.POWERS]
    with progress_bar(24 * len(cases)) as report:
        for name, power in cases:
            results[f"{name}, {power:g}"] = peer.compare(dataset, python, name, power, args.seconds, kept, report)
    table = peer.results_table(results, args.seconds)
    write(args.output / "peer-kfac-jax", table, {"schedule": peer.SCHEDULE, "results": results})

"""TSO-ALRA on Fashion-MNIST against SGD, Adam and AMSGrad, and what its steps cost."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

from benchmarks.core import data, report
from benchmarks.core.cache import Cache
from benchmarks.core.figures import save
from benchmarks.core.timing import workloads
from benchmarks.core.tune import num_runs, tune_and_repeat
from benchmarks.tso_alra import methods, peer, refresh, stages
from benchmarks.tso_alra.figures import draw_stages
from benchmarks.tso_alra.networks import NETWORKS

_MAX_EXTENSIONS = 3
_RUNS_OF_A_CASE = 24  # beside the peer: two sides, twelve settings


@dataclasses.dataclass
class Options(report.Study):
    """Preconditioning first, SGD later: TSO-ALRA against SGD, Adam and AMSGrad; what refreshing costs; kfac-jax."""

    part: Literal["alexnet", "vgg", "cost", "all", "peer"] = "all"
    """A network, the cost of refreshing, or (not among all) the comparison with kfac-jax."""
    size: Literal["small", "full"] = "small"
    """Of the networks; full: the paper's, for a GPU."""
    epochs: int = 12
    """Of a run; published: 164."""
    images: int = 4000
    """To train on, at most 50000."""
    seeds: int = 4
    """Fresh seeds for the tuned methods; verdicts need 4."""
    peer_environment: Path = Path.home() / ".cache" / "optcurv" / "kfac-jax"
    """Where kfac-jax is installed, unless it is there already."""
    seconds: float = 10.0
    """Of each run beside the peer."""

    def run(self) -> None:
        """Measures and judges."""
        dataset, cache = data.fashion_mnist(self.data_dir), Cache(self.folder)
        for name in list(NETWORKS[self.size])[: 1 if self.quick and self.part == "all" else None]:
            if self.part in (name, "all"):
                self.train_network(name, dataset, cache)
        if self.part in ("cost", "all"):
            self.measure_refreshes(dataset, cache)
        if self.part == "peer":
            self.compare_with_peer(dataset, cache)

    def train_network(self, name: str, dataset: data.Dataset, cache: Cache) -> None:
        """Runs all methods on one network."""
        num_images, num_epochs, num_seeds = (640, 2, 1) if self.quick else (self.images, self.epochs, self.seeds)
        task = stages.make_task(dataset, NETWORKS[self.size][name], num_images)
        make = methods.quick_methods if self.quick else methods.make_methods
        tried = make(num_epochs * task.steps_per_epoch)
        about = {"num_epochs": num_epochs}
        train = functools.partial(stages.train, **about)
        with report.progress_bar(num_runs(tried, num_seeds)) as progress:
            results = tune_and_repeat(
                task, tried, train, about, num_seeds, cache, progress, "validation_loss", _MAX_EXTENSIONS
            )
        self.write(name, stages.summarise(name, num_images, results))

    def measure_refreshes(self, dataset: data.Dataset, cache: Cache) -> None:
        """Costs of steps, and losses after equally many, on the networks whose steps are timed elsewhere too."""
        for name, task in list(workloads().items())[: 1 if self.quick else None]:
            schedules = refresh.SCHEDULES[: 1 if self.quick else 3 if name == "cnn" else 4]
            with report.progress_bar(4 * len(schedules)) as progress:
                self.write(f"refresh-{name}", refresh.measure(task, dataset, schedules, self.quick, cache, progress))

    def compare_with_peer(self, dataset: data.Dataset, cache: Cache) -> None:
        """Costs of steps, and losses after equal seconds, beside kfac-jax."""
        python, results = peer.make_environment(self.peer_environment), {}
        cases = [(name, power) for name in peer.NETWORKS for power in peer.POWERS]
        with report.progress_bar(_RUNS_OF_A_CASE * len(cases)) as progress:
            for name, power in cases:
                results[f"{name}, {power:g}"] = peer.compare(
                    dataset, python, name, power, self.seconds, cache, progress
                )
        self.write("peer", {"seconds": self.seconds, "results": results})


def tables(folder: Path) -> dict[str, str]:
    """Returns the tables of the networks, of refreshing and of the peer, and what held of the paper's claims."""
    found = {}
    for name, content in report.summaries(folder).items():
        kind = refresh if name.startswith("refresh") else peer if name == "peer" else stages
        found[name] = kind.results_table(content)
        if "claims" in content:
            found[f"claims-{name}"] = report.claims_table(content["claims"])
    return found


def draw(folder: Path) -> None:
    """Draws the test losses of each network."""
    for name, content in report.summaries(folder).items():
        if "claims" in content:
            save(draw_stages(content), folder / f"{name}.png")

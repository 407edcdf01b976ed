"""Reproduces the three figures of "Adaptive norms for deep learning with regularized Newton methods", in small."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

from benchmarks.adaptive_norms import hessian_mass, quadratics, trust_regions
from benchmarks.adaptive_norms.figures import Column, draw_masses, draw_quadratics, draw_training
from benchmarks.core import data, report
from benchmarks.core.cache import Cache
from benchmarks.core.figures import save
from benchmarks.core.task import MODELS
from benchmarks.core.tune import num_runs, tune_and_repeat


@dataclasses.dataclass
class Options(report.Study):
    """Trust regions in balls and ellipsoids: repeats three figures of the paper on adaptive norms, and judges them."""

    figure: Literal["1", "2", "3", "all"] = "all"
    """1: quadratics; 2: the diagonal mass of Hessians; 3: training."""
    dataset: Literal["digits", "fashion-mnist"] = "digits"
    """Images of figures 2 and 3."""

    def run(self) -> None:
        """Measures and judges each figure."""
        if self.figure in ("1", "all"):  # nothing worth caching: no clock runs, and all takes seconds
            measured = quadratics.measure(num_starts=5 if self.quick else 30)
            self.write("figure-1", quadratics.summarise(measured))
        if self.figure == "1":
            return
        images = data.digits() if self.dataset == "digits" else data.fashion_mnist(self.data_dir)
        cache = Cache(self.folder)
        if self.figure in ("2", "all"):
            self.measure_masses(images, cache)
        if self.figure in ("3", "all"):
            self.train(images, cache)

    def measure_masses(self, images: data.Dataset, cache: Cache) -> None:
        """Measures figure 2."""
        runs, max_steps = (2, 20) if self.quick else (10, 10_000)
        tasks = dict(list(hessian_mass.networks(images).items())[: 1 if self.quick else None])
        with report.progress_bar(runs * len(tasks)) as progress:
            measured = {
                name: hessian_mass.measure(task, runs, max_steps, cache, functools.partial(progress, name))
                for name, task in tasks.items()
            }
        self.write(f"figure-2-{self.dataset}", hessian_mass.summarise(measured))

    def train(self, images: data.Dataset, cache: Cache) -> None:
        """Trains for figure 3."""
        num_seeds, num_evaluations = (1, 5) if self.quick else (10, 60)
        models = MODELS[: 1 if self.quick else None]
        methods = trust_regions.METHODS
        with report.progress_bar(len(models) * num_runs(methods, num_seeds)) as progress:
            for model in models:
                task, budget = trust_regions.task_and_budget(self.dataset, images, model, quick=self.quick)
                about = {"budget": budget, "num_evaluations": num_evaluations}
                train = functools.partial(trust_regions.train, **about)
                results = tune_and_repeat(task, methods, train, about, num_seeds, cache, progress)
                target = trust_regions.DEFAULTS[self.dataset, model].target
                measured = trust_regions.Measured(model, target, results)
                self.write(f"figure-3-{self.dataset}-{model}", trust_regions.summarise(measured))


def tables(folder: Path) -> dict[str, str]:
    """Returns the tables of the figures, and what held of the paper's claims."""
    kinds = {"figure-1": quadratics, "figure-2": hessian_mass, "figure-3": trust_regions}
    found = {}
    for name, content in report.summaries(folder).items():
        found[name] = kinds[name[:8]].results_table(content)
        found[f"claims-{name}"] = report.claims_table(content["claims"])
    return found


def draw(folder: Path) -> None:
    """Draws the figures."""
    regions = [method.name for method in trust_regions.TRUST_REGIONS]
    for name, content in report.summaries(folder).items():
        if name == "figure-1":
            save(draw_quadratics(content), folder / f"{name}.png")
        elif name.startswith("figure-2"):
            save(draw_masses(f"Diagonal mass of Hessians, {name[9:]}", content), folder / f"{name}.png")
        else:
            columns = [Column("", content, axis, list(content["methods"])) for axis in trust_regions.AXES]
            save(draw_training(f"Training on {name[9:]}", columns), folder / f"{name}.png")
    for dataset in ("digits", "fashion-mnist"):
        if found := report.summaries(folder, f"figure-3-{dataset}-*"):
            columns = [Column(one["model"], one, "gradients", regions) for one in found.values()]
            save(draw_training(f"Balls and ellipsoids, {dataset}", columns), folder / f"figure-3-{dataset}.png")

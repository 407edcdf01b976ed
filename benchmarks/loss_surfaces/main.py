"""Loss surfaces between the minima that optimisers find, of small VGG and Network-in-Network CNNs and an LSTM."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure

from benchmarks.core import data, report
from benchmarks.core.cache import Cache
from benchmarks.core.figures import save
from benchmarks.core.models import Batch, Vgg, classification_loss
from benchmarks.loss_surfaces import experiments, figures, summary, verdicts
from benchmarks.loss_surfaces.experiments import Minima
from benchmarks.loss_surfaces.networks import (
    BATCH_SIZE,
    NUM_SYMBOLS,
    LanguageModel,
    NetworkInNetwork,
    SurfaceTask,
    read_text,
)
from benchmarks.loss_surfaces.runs import Runner

NETWORKS: dict[str, nn.Module] = {
    "vgg-bn": Vgg(batch_norm=True),
    "nin-bn": NetworkInNetwork(batch_norm=True),
    "lstm": LanguageModel(NUM_SYMBOLS),
    "vgg": Vgg(),
    "nin": NetworkInNetwork(),
}
WITHOUT_NORM = {"vgg": "vgg-bn", "nin": "nin-bn"}


@dataclasses.dataclass
class Options(report.Study):
    """Loss surfaces between the minima that optimisers find, of small CNNs and an LSTM."""

    part: Literal["minima", "switching", "batch-norm", "initialisation", "runge-kutta", "all"] = "all"
    """minima: Table 1, Figures 2 to 6; switching: 7; batch-norm: 8; initialisation: 11; runge-kutta: 9."""
    epochs: int = experiments.Scale.num_epochs
    """Of a run; published: 200."""
    images: int = experiments.Scale.num_images
    """Or pieces of text, to train on. The LSTM reads ptb.train.txt and ptb.valid.txt in the data folder if they are
    there, else Python's own reference manual."""
    seeds: int = experiments.Scale.num_seeds
    """Of each method; verdicts need 4; switching takes half."""
    full_size: bool = False
    """Images of 28x28 pixels; without it, of 14x14, the averages of 2x2."""

    def run(self) -> None:
        """Trains, looks and judges."""
        Session(self).run()


class Session:
    """What the parts share: tasks, what was trained for them, and what was found between the ends."""

    def __init__(self, options: Options) -> None:
        self.options, self.scale = options, experiments.QUICK
        if not options.quick:
            self.scale = experiments.Scale(options.images, num_epochs=options.epochs, num_seeds=options.seeds)
        self._cache = Cache(options.folder)
        self.runner = functools.cache(self._runner)
        self.slices = functools.cache(lambda name: experiments.Slices(self.runner(name).task))
        self.minima = functools.cache(self._minima)
        read = data.fashion_mnist if options.full_size else data.small_fashion_mnist
        self._images = functools.cache(lambda: read(options.data_dir))

    def run(self) -> None:
        """Runs the parts that are wanted."""
        with report.progress_bar() as self.progress:
            for name, part in PARTS.items():
                if self.options.part in (name, "all"):
                    part(self)

    def _runner(self, name: str) -> Runner:
        dataset = read_text(self.options.data_dir) if name == "lstm" else self._images()
        order = np.random.default_rng(0).permutation(len(dataset.train.labels))[: self.scale.num_images]
        train = Batch(*(array[order] for array in dataset.train))
        test = Batch(*(array[: self.scale.num_seen] for array in dataset.test))
        splits = data.Dataset(train, test)
        sizes = {"batch_size": BATCH_SIZE, "name": name, "num_seen": self.scale.num_seen}
        return Runner(SurfaceTask(NETWORKS[name], classification_loss, splits, **sizes), self._cache)

    def _minima(self, name: str) -> Minima:
        scale, progress = self.scale, self.progress
        runs = experiments.train_methods(self.runner(name), scale, scale.methods, progress)
        return experiments.measure_minima(self.slices(name), runs, scale, progress)

    def write(self, name: str, content: Mapping[str, Any], pictures: Mapping[str, Figure]) -> None:
        """Writes a summary, and the pictures that no page shows."""
        self.options.write(name, {"scale": dataclasses.asdict(self.scale)} | dict(content))
        for stem, figure in pictures.items():
            save(figure, self.options.folder / f"{stem}.png")


def minima(session: Session) -> None:
    """Table 1 and Figures 2 to 6."""
    for name in NETWORKS:
        if name not in WITHOUT_NORM:
            found = session.minima(name)
            content = summary.summarise_minima(found, verdicts.judge_minima(found))
            session.write(f"minima-{name}", content, figures.draw_minima(found))


def batch_norm(session: Session) -> None:
    """Table 2 and Figure 8."""
    for name, with_norm in WITHOUT_NORM.items():
        found = session.minima(name)
        claims = verdicts.judge_batch_norm(session.minima(with_norm), found)
        session.write(f"minima-{name}", summary.summarise_minima(found, claims), figures.draw_minima(found))


def switching(session: Session) -> None:
    """Figure 7."""
    name = "vgg-bn"
    scale = dataclasses.replace(session.scale, num_seeds=max(1, session.scale.num_seeds // 2))
    groups = experiments.train_switched(session.runner(name), scale, session.progress)
    found = experiments.measure_switching(session.slices(name), groups, scale, session.progress)
    content = summary.summarise_switching(found, verdicts.judge_switching(found))
    session.write("switching", content, figures.draw_switching(found))


def initialisation(session: Session) -> None:
    """Figure 11."""
    found = []
    for name in ("nin-bn", "nin"):
        runs = experiments.train_exotic(session.runner(name), session.scale, session.progress)
        found.append(experiments.measure_exotic(session.slices(name), runs, session.scale, session.progress))
    session.write("initialisation", summary.summarise_exotic(found, verdicts.judge_exotic(*found)), {})


def runge_kutta(session: Session) -> None:
    """Figure 9."""
    found = experiments.train_runge_kutta(session.runner("vgg-bn"), session.scale, session.progress)
    content = summary.summarise_runge_kutta(found, verdicts.judge_runge_kutta(found))
    session.write("runge-kutta", content, {})


PARTS: dict[str, Callable[[Session], None]] = {
    "minima": minima,
    "switching": switching,
    "batch-norm": batch_norm,
    "initialisation": initialisation,
    "runge-kutta": runge_kutta,
}


def tables(folder: Path) -> dict[str, str]:
    """Returns a table for each part, and what held of the paper's claims."""
    found = {}
    for name, content in report.summaries(folder).items():
        found[name] = summary.results_table(content)
        found[f"claims-{name}"] = report.claims_table(content["claims"])
    return found


def draw(folder: Path) -> None:
    """Draws what the page shows."""
    for name, content in report.summaries(folder).items():
        for stem, figure in figures.draw_page(name, content).items():
            save(figure, folder / f"{stem}.png")

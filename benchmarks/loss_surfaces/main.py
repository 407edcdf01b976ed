"""Loss surfaces between the minima that optimisers find, of small VGG and Network-in-Network CNNs and an LSTM."""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.core import data
from benchmarks.core.claims import Claim, claims_table, mean_interval, plus_minus
from benchmarks.core.models import Batch
from benchmarks.core.report import progress_bar, write
from benchmarks.core.style import save
from benchmarks.core.surface_plots import draw_lines, draw_pairs, draw_panels, draw_plane
from benchmarks.loss_surfaces import experiments, verdicts
from benchmarks.loss_surfaces.experiments import Minima
from benchmarks.loss_surfaces.networks import NUM_SYMBOLS, LanguageModel, NetworkInNetwork, Problem, Vgg, read_text
from benchmarks.loss_surfaces.training import Store, Trained, Trainer

NETWORKS: dict[str, nn.Module] = {
    "vgg-bn": Vgg(batch_norm=True),
    "nin-bn": NetworkInNetwork(batch_norm=True),
    "lstm": LanguageModel(NUM_SYMBOLS),
    "vgg": Vgg(),
    "nin": NetworkInNetwork(),
}
WITHOUT_NORM = {"vgg": "vgg-bn", "nin": "nin-bn"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    default = experiments.Scale()
    parser.add_argument(
        "--part",
        choices=[*PARTS, "all"],
        default="all",
        help="minima: Table 1, Figures 2 to 6; switching: 7; batch-norm: 8; initialisation: 11; runge-kutta: 9",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=data.default_folder(),
        help="folder of Fashion-MNIST's IDX files (default: OPTCURV_DATA, or the Debian package's); the LSTM reads "
        "ptb.train.txt and ptb.valid.txt if they are there, else Python's own reference manual",
    )
    parser.add_argument("--epochs", type=int, default=default.num_epochs, help="default: %(default)s; published: 200")
    parser.add_argument(
        "--images",
        type=int,
        default=default.num_images,
        help="or pieces of text, to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=default.num_seeds, help="verdicts need 4, the default; switching takes half"
    )
    parser.add_argument(
        "--full-size", action="store_true", help="images of 28x28 pixels; without it, of 14x14, the averages of 2x2"
    )
    parser.add_argument("--quick", action="store_true", help="few methods, two epochs of few images: does it run?")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/loss-surfaces"),
        help="folder; networks found in its runs/ are kept (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> int:
    """Trains, looks, judges, and writes tables, JSON and pictures."""
    session = Session(args)
    for name, part in PARTS.items():
        if args.part in (name, "all"):
            claims = part(session)
            content = {"claims": [claim._asdict() for claim in claims]}
            write(args.output / f"claims-{name}", claims_table(f"{name}: what held", claims), content)
    Console().print(f"Written to {args.output}")
    return 0


class Session:
    """What the parts share: problems, what was trained for them, and what was found between the ends."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.output: Path = args.output
        self.scale = experiments.QUICK
        if not args.quick:
            sizes = {"num_images": args.images, "num_epochs": args.epochs, "num_seeds": args.seeds}
            self.scale = experiments.Scale(**sizes)
        self._data_dir: Path = args.data_dir
        self._store = Store(args.output / "runs")
        self.trainer = functools.cache(self._trainer)
        self.slices = functools.cache(lambda name: experiments.Slices(self.trainer(name).problem))
        self.minima = functools.cache(self._minima)
        read = data.fashion_mnist if args.full_size else data.small_fashion_mnist
        self._images = functools.cache(lambda: read(self._data_dir))

    def _trainer(self, name: str) -> Trainer:
        dataset = read_text(self._data_dir) if name == "lstm" else self._images()
        order = np.random.default_rng(0).permutation(len(dataset.train.labels))[: self.scale.num_images]
        train = Batch(*(array[order] for array in dataset.train))
        test = Batch(*(array[: self.scale.num_seen] for array in dataset.test))
        problem = Problem(name, NETWORKS[name], train, test, self.scale.num_seen)
        return Trainer(problem, self._store)

    def _minima(self, name: str) -> Minima:
        scale = self.scale
        with progress_bar(experiments.num_runs(scale, scale.methods)) as report:
            runs = experiments.train_methods(self.trainer(name), scale, scale.methods, report)
        with progress_bar(experiments.num_slices(scale, len(runs))) as report:
            return experiments.measure_minima(self.slices(name), runs, scale, report)

    def write(self, stem: str, table: Table, content: Any) -> None:
        """Writes a part's table and all that was measured; says how much of it is not finite."""
        content = experiments.plain(content)
        count = experiments.num_not_finite(content)
        table.caption = f"{table.caption or ''}\nNumbers measured that are not finite: {count}.".strip()
        write(self.output / stem, table, {"scale": dataclasses.asdict(self.scale), "not_finite": count} | content)

    def draw(self, stem: str, figure: Figure) -> None:
        """Writes a picture."""
        save(figure, self.output / stem)


def minima(session: Session) -> list[Claim]:
    """Table 1 and Figures 2 to 6."""
    claims = []
    for name in NETWORKS:
        if name not in WITHOUT_NORM:
            claims += report_minima(session, session.minima(name))
    return claims


def batch_norm(session: Session) -> list[Claim]:
    """Table 2 and Figure 8."""
    claims = []
    for name, with_norm in WITHOUT_NORM.items():
        found = session.minima(name)
        report_minima(session, found)
        claims += verdicts.judge_batch_norm(session.minima(with_norm), found)
    return claims


def report_minima(session: Session, found: Minima) -> list[Claim]:
    """Writes and draws what lies between and around the ends on one problem."""
    name = found.problem
    session.write(f"minima-{name}", minima_table(found), found)
    draw_minima(session, found)
    _draw_surfaces(session, found)
    return verdicts.judge_minima(found)


def minima_table(found: Minima) -> Table:
    """Lays out where each method ended."""
    table = _table(
        f"{found.problem}: ends of the optimisers",
        ("rate", *_FIGURES.values(), "distance", "basin, relative", "basin, absolute"),
        f"Mean and 95 % interval over the seeds. Basins: loss below {found.threshold:.3g}, midway between that of "
        f"the ends, in the median, and the {found.initial_loss:.3g} at initialisation; the line is "
        f"{experiments.LENGTH:g} times as long as the way.",
    )
    relative, absolute = found.widths(absolute=False), found.widths(absolute=True)
    for method, runs in found.runs.items():
        table.add_row(
            method, *_figures(runs), _interval(relative[method], digits=2), _interval(absolute[method], digits=2)
        )
    return table


_FIGURES = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
}


def _table(title: str, columns: Sequence[str], caption: str = "Mean and 95 % interval over the seeds.") -> Table:
    table = Table(title=title, caption=caption)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _figures(runs: Sequence[Trained]) -> list[str]:
    """Returns a row's rate, figures and distance."""
    figures = [_interval([run.final(name) for run in runs]) for name in (*_FIGURES, "distance")]
    return [f"{runs[0].plan.first.rate:g}", *figures]


def _interval(values: Sequence[float], digits: int = 3) -> str:
    """Writes the mean of what is finite."""
    finite = [value for value in values if np.isfinite(value)]
    return plus_minus(mean_interval(finite), digits) if finite else "not finite"


def draw_minima(session: Session, found: Minima) -> None:
    """Draws Figures 4 to 6: accuracies by initialisation, lines through the ends and between them."""
    name, scale = found.problem, session.scale
    seeds = [f"seed {seed}" for seed in scale.seeds]
    panels = {}
    for title, key in (("training", "train_accuracy"), ("test", "test_accuracy")):
        columns = found.finals(key)
        panels[title] = {
            seed: (list(columns), [column[i] for column in columns.values()]) for i, seed in enumerate(seeds)
        }
    figure = draw_panels(f"{name}: accuracies by initialisation", panels, "", "accuracy")
    for panel in figure.axes:
        panel.tick_params(axis="x", rotation=60)
    session.draw(f"figure-4-{name}", figure)

    def by_seed(curves: experiments.Curves) -> dict[str, dict[str, tuple[Any, Any]]]:
        return {
            key: {seed: (curves.x, row) for seed, row in zip(seeds, rows, strict=False)}
            for key, rows in curves.by_name.items()
        }

    stem = "8" if name in WITHOUT_NORM else "5"
    title = f"{name}: from initialisation (α = 0) to the end (α = 1)"
    session.draw(f"figure-{stem}-ends-{name}", _bounded(draw_panels(title, by_seed(found.from_start), "α", _LOSS)))
    title = f"{name}: between the ends of two optimisers"
    session.draw(f"figure-{stem}-pairs-{name}", _bounded(draw_panels(title, by_seed(found.between.loss), "α", _LOSS)))
    absolute = {method: rows[0] for method, rows in found.around_end.by_name.items()}
    title = f"{name}: from the end towards the initialisation and beyond, {seeds[0]}"
    figure = draw_lines(title, found.around_end.x, absolute, "distance from the end", _LOSS)
    session.draw(f"figure-6-{name}", _bounded(figure, 1.5 * found.initial_loss))


_LOSS = "training loss"


def _bounded(figure: Figure, highest: float | None = None) -> Figure:
    """Cuts off the few high values that would flatten the rest."""
    panels = [panel for panel in figure.axes if panel.lines]
    values = np.concatenate([np.asarray(line.get_ydata(), np.float64) for panel in panels for line in panel.lines])
    finite = values[np.isfinite(values)]
    if finite.size:
        top = highest or 1.05 * np.percentile(finite, 99.5)
        for panel in panels:
            panel.set_ylim(min(0.0, finite.min()), min(top, 1.05 * finite.max()))
    return figure


def _draw_surfaces(session: Session, found: Minima) -> None:
    """Draws Table 1, one of its surfaces larger, and Figures 2 and 3."""
    name = found.problem
    distances = found.between.distance
    figure = draw_pairs(
        f"{name}: initialisation at the left, two ends at the right",
        list(found.runs),
        found.triangles,
        {pair: (distances.x, rows[0]) for pair, rows in distances.by_name.items()},
        _LOSS,
        "functional distance from one end to the other",
    )
    session.draw(f"table-{2 if name in WITHOUT_NORM else 1}-{name}", figure)
    surfaces = {f"surface-{name}": ("SGD | Adam", found.triangles["SGD | Adam"])}
    surfaces |= {f"square-{name}-{i}": square for i, square in enumerate(found.squares.items(), start=1)}
    for stem, (title, surface) in surfaces.items():
        labels = ("α", "β", _LOSS)
        title = f"{name}: {title}"
        session.draw(stem, draw_plane(title, *surface, *labels))


def switching(session: Session) -> list[Claim]:
    """Figure 7."""
    name = "vgg-bn"
    scale = dataclasses.replace(session.scale, num_seeds=max(1, session.scale.num_seeds // 2))
    methods = set(itertools.chain(*scale.switched))
    count = experiments.num_runs(scale, methods) + len(scale.switched) * len(experiments.SHARES) * scale.num_seeds
    with progress_bar(count) as report:
        groups = experiments.train_switched(session.trainer(name), scale, report)
    with progress_bar(len(groups) * 10 * scale.num_seeds) as report:
        found = experiments.measure_switching(session.slices(name), groups, scale, report)
    table = _table(f"{name}: switched optimisers", ("rate", *_FIGURES.values(), "distance"))
    for group, runs in groups.items():
        for end, column in runs.items():
            table.add_row(f"{group}: {end}", *_figures(column))
        table.add_section()
    session.write("switching", table, found)
    _draw_switching(session, found)
    return verdicts.judge_switching(found)


def _draw_switching(session: Session, found: experiments.Switching) -> None:
    """Draws accuracies, distances from the initialisation, and lines between the ends, for the first seed."""
    figures = {"test_accuracy": "test accuracy", "loss": "loss of the mini-batches", "distance": "distance"}
    for key, label in figures.items():
        panels = {}
        for group, runs in found.runs.items():
            first, second = group.split(" → ")
            names = {first: "first alone", second: "second alone"}
            panels[group] = {
                names.get(end, end): (column[0].curve["epochs"], column[0].curve[key]) for end, column in runs.items()
            }
        title = f"{found.problem}: switched optimisers"
        session.draw(f"figure-7-{key.replace('_', '-')}", draw_panels(title, panels, "epochs", label, num_columns=3))
    panels = {}
    for group, between in found.between.items():
        pairs = {pair: rows[0] for pair, rows in between.loss.by_name.items()}
        first = group.split(" → ")[0]
        chosen = {pair: rows for pair, rows in pairs.items() if pair.startswith(f"{first} | at")}
        panels[group] = {pair.split(" | ")[1]: (between.loss.x, rows) for pair, rows in chosen.items()}
    title = f"{found.problem}: from the end of the first optimiser alone to that of switched runs"
    session.draw("figure-7-lines", _bounded(draw_panels(title, panels, "α", _LOSS, num_columns=3)))


def initialisation(session: Session) -> list[Claim]:
    """Figure 11."""
    found = {}
    for name in ("nin-bn", "nin"):
        with progress_bar(experiments.num_exotic_runs(session.scale)) as report:
            runs = experiments.train_exotic(session.trainer(name), session.scale, report)
        with progress_bar(len(runs) * session.scale.num_seeds) as report:
            found[name] = experiments.measure_exotic(session.slices(name), runs, session.scale, report)
    table = _table("SGD from unusual initialisations", ("rate", *_FIGURES.values(), "distance"))
    for name, one in found.items():
        for start, runs in one.runs.items():
            table.add_row(f"{name} {start}", *_figures(runs))
    session.write("initialisation", table, found)
    curves = {
        name: {start: _curve(runs, "train_loss") for start, runs in one.runs.items()} for name, one in found.items()
    }
    figure = draw_panels("SGD from unusual initialisations", curves, "epochs", _LOSS)
    session.draw("figure-11-training", _bounded(figure))
    lines = {
        name: {start: (one.from_start.x, rows[0]) for start, rows in one.from_start.by_name.items()}
        for name, one in found.items()
    }
    figure = draw_panels("From initialisation (α = 0) to the end (α = 1)", lines, "α", _LOSS)
    session.draw("figure-11-lines", _bounded(figure))
    return verdicts.judge_exotic(found["nin-bn"], found["nin"])


def _curve(runs: Sequence[Trained], name: str, axis: str = "epochs") -> tuple[Any, Any]:
    """Returns axis and mean over the seeds."""
    return runs[0].curve[axis], np.mean([run.curve[name] for run in runs], axis=0)


def runge_kutta(session: Session) -> list[Claim]:
    """Figure 9."""
    name = "vgg-bn"
    with progress_bar(experiments.num_runge_kutta_runs(session.scale)) as report:
        found = experiments.train_runge_kutta(session.trainer(name), session.scale, report)
    table = _table(f"{name}: equal numbers of gradients", ("rate", *_FIGURES.values(), "distance", "gradients"))
    for method, runs in found.runs.items():
        table.add_row(method, *_figures(runs), f"{runs[0].final('gradients'):g}")
    session.write("runge-kutta", table, found)
    panels: Mapping[str, Mapping[str, tuple[Any, Any]]] = {
        figure: {method: _curve(runs, key, "gradients") for method, runs in found.runs.items()}
        for key, figure in (("train_accuracy", "training"), ("test_accuracy", "test"))
    }
    figure = draw_panels(f"{name}: Runge-Kutta, mean over the seeds", panels, "gradients computed", "accuracy")
    session.draw("figure-9", figure)
    return verdicts.judge_runge_kutta(found)


PARTS = {
    "minima": minima,
    "switching": switching,
    "batch-norm": batch_norm,
    "initialisation": initialisation,
    "runge-kutta": runge_kutta,
}

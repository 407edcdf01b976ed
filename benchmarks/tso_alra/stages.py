"""TSO-ALRA against tuned SGD, Adam and AMSGrad: test loss by epochs and seconds, switching tuned on validation data."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax
from flax import linen as nn

from benchmarks.core.data import Dataset
from benchmarks.core.methods import Setting
from benchmarks.core.models import Batch, classification_loss
from benchmarks.core.report import table
from benchmarks.core.statistics import Claim, Verdict, is_less, mean_interval, plus_minus
from benchmarks.core.task import Task
from benchmarks.core.train import Run, Trainer, after_steps
from benchmarks.core.tune import TUNING_SEED, Result
from benchmarks.tso_alra.methods import BASELINES, NEVER_SWITCHING, TWO_STAGES

BATCH_SIZE = 128


def make_task(dataset: Dataset, network: nn.Module, num_images: int) -> Task:
    """Takes so many images to train on, and a fifth as many to validate."""
    order = np.random.default_rng(0).permutation(len(dataset.train.labels))
    train, validation = (
        Batch(*(array[indices] for array in dataset.train))
        for indices in (order[:num_images], order[num_images : num_images + num_images // 5])
    )
    return Task(network, classification_loss, Dataset(train, dataset.test, validation), BATCH_SIZE)


def train(trainer: Trainer, setting: Setting, seed: int, num_epochs: int) -> Run:
    """Trains for so many epochs; looks at the test images only where no setting is picked by the run."""
    task = trainer.task

    def evaluate(params: optax.Params) -> Mapping[str, float]:
        return {} if seed == TUNING_SEED else task.evaluate(params, ("test",))

    stops = after_steps(task.steps_per_epoch * epoch for epoch in range(1, num_epochs + 1))
    return trainer.run(setting, seed, stops, evaluate)


def rise(run: Run) -> float:
    """Returns by how much the last test loss lies above the least, relatively."""
    return run.final["test_loss"] / min(run.curve["test_loss"]) - 1


def epochs_to(run: Run, test_loss: float) -> float:
    """Returns how many epochs the test loss takes to fall so far; infinity if it does not."""
    reached = np.flatnonzero(np.asarray(run.curve["test_loss"]) <= test_loss)
    return float(1 + reached[0]) if reached.size else math.inf


def sgd_level(results: Sequence[Result]) -> float:
    """Returns the test loss that all runs of SGD reach."""
    (sgd,) = [result for result in results if result.method.name == "SGD"]
    return max(run.final["test_loss"] for run in sgd.final)


def judge(network: str, results: Sequence[Result]) -> list[Claim]:
    """The paper's claims: a faster decrease, no late rise of the test loss, a better final test loss."""
    by_name = {result.method.name: result.final for result in results}
    target = sgd_level(results)

    def is_lower(first: str, text: str, second: str, figure: Callable[[Run], float]) -> Claim:
        ours, theirs = ([figure(run) for run in by_name[name]] for name in (first, second))
        numbers = f"median {statistics.median(ours):.3g} against {statistics.median(theirs):.3g}"
        return Claim(f"{network}: {first} {text} {second}.", is_less(ours, theirs), numbers)

    def final_loss(run: Run) -> float:
        return run.final["test_loss"]

    def epochs(run: Run) -> float:
        return epochs_to(run, target)

    claims = []
    baselines = [name for name in BASELINES if name in by_name]
    for method in TWO_STAGES:
        for baseline in baselines:
            claims.append(is_lower(method, "reduces the test loss faster than", baseline, epochs))
            claims.append(is_lower(method, "ends with a lower test loss than", baseline, final_loss))
        rises = {name: statistics.fmean(rise(run) for run in by_name[name]) for name in (method, *baselines)}
        verdict = Verdict.HOLDS if rises[method] < 0.01 else Verdict.FAILS
        numbers = ", ".join(f"{name} {100 * rise:.1f} %" for name, rise in rises.items())
        claims.append(Claim(f"{network}: {method} has a test loss that does not rise late.", verdict, numbers))
    claims.append(is_lower(TWO_STAGES[1], "ends with a lower test loss than", NEVER_SWITCHING, final_loss))
    return claims


def summarise(network: str, num_images: int, results: Sequence[Result]) -> dict[str, Any]:
    """Returns the claims, and what the table and the picture show."""
    target = sgd_level(results)
    methods = {}
    for result in results:
        runs = result.final
        losses = [run.curve["test_loss"] for run in runs]
        methods[result.method.name] = {
            "test_loss": result.finals("test_loss"),
            "test_accuracy": result.finals("test_accuracy"),
            "rise": statistics.fmean(map(rise, runs)),
            "epochs_to_target": statistics.median(epochs_to(run, target) for run in runs),
            "seconds": [
                statistics.fmean(column) for column in zip(*(run.curve["seconds"] for run in runs), strict=True)
            ],
            "curve": list(mean_interval(losses)),
            "setting": result.setting,
        }
    claims = [claim._asdict() for claim in judge(network, results)]
    sizes = {"num_images": num_images, "seeds": len(results[0].final)}
    return {"network": network, **sizes, "claims": claims, "methods": methods}


def results_table(content: Mapping[str, Any]) -> str:
    """Lays out the figures of the fresh seeds."""
    rows = [
        {
            "method": name,
            "test loss": plus_minus(mean_interval(one["test_loss"])),
            "test accuracy": plus_minus(mean_interval(one["test_accuracy"])),
            "rise %": f"{100 * one['rise']:.1f}",
            "epochs to SGD's test loss": f"{one['epochs_to_target']:g}",
            "seconds an epoch": f"{one['seconds'][-1] / len(one['seconds']):.2f}",
            "best setting": one["setting"],
        }
        for name, one in content["methods"].items()
    ]
    num_epochs = len(next(iter(content["methods"].values()))["seconds"])
    caption = f"{content['network']}, {content['num_images']} images of Fashion-MNIST, {num_epochs} epochs: mean over "
    caption += f"{content['seeds']} seeds with its 95 % interval. Rise: the last test loss over the least. (edge): the "
    return table(rows, caption + "least or largest tried, after extending the rates; a better one may lie beyond.")

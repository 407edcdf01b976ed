"""Runs on a budget of gradients, what is kept of them, and their table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.core.methods import Setting
from benchmarks.core.report import table
from benchmarks.core.statistics import mean_deviation
from benchmarks.core.task import Task
from benchmarks.core.train import Run, Trainer, after_steps, spread
from benchmarks.core.tune import Result

_NUM_STOPS = 24
_AXES = ("steps", "gradients", "seconds")


def train_budget(trainer: Trainer, setting: Setting, seed: int, budget: float) -> Run:
    """Trains for as many steps as the budget of gradient-equivalents buys, and evaluates at the end."""
    stops = after_steps(spread(trainer.method.num_steps(budget), _NUM_STOPS))
    return trainer.run(setting, seed, stops, at_every_stop=False)


def summarise(title: str, task: Task, budget: float, results: Sequence[Result]) -> dict[str, Any]:
    """Returns what the table and the picture show."""
    methods = []
    for result in results:
        figures = {name: result.finals(name) for name in result.final[0].final}
        losses = np.array([run.curve["loss"] for run in result.final])
        curve = {axis: np.mean([run.curve[axis] for run in result.final], axis=0) for axis in _AXES}
        curve |= {"mean": losses.mean(axis=0), "least": losses.min(axis=0), "most": losses.max(axis=0)}
        about = {"method": result.method.name, "setting": result.setting}
        methods.append(about | {"figures": figures, "curve": curve})
    sizes = {"batch_size": task.batch_size, "num_images": task.num_images, "budget": budget}
    return {"title": title, **sizes, "seeds": len(results[0].final), "methods": methods}


def results_table(content: Mapping[str, Any]) -> str:
    """Lays out mean and spread over the seeds."""
    score = "test_accuracy" if "test_accuracy" in content["methods"][0]["figures"] else "test_loss"

    def row(method: Mapping[str, Any]) -> dict[str, str]:
        figures = method["figures"]
        return {
            "method": method["method"],
            "train loss": mean_deviation(figures["train_loss"]),
            score.replace("_", " "): mean_deviation(figures[score]),
            "seconds": f"{np.mean(figures['seconds']):.2f}",
            "gradients": f"{np.mean(figures['gradients']):.0f}",
            "steps": f"{np.mean(figures['steps']):.0f}",
            "best setting": method["setting"],
        }

    caption = (
        f"{content['title']}: batches of {content['batch_size']}, {content['budget']:g} gradients, mean ± standard "
    )
    caption += (
        f"deviation over {content['seeds']} seeds. The training loss is measured after the last step, the seconds "
    )
    caption += "are those of the steps alone."
    if any("(edge)" in method["setting"] for method in content["methods"]):
        caption += " (edge): the first or last setting of its grid; a better one may lie beyond."
    return table(map(row, content["methods"]), caption)


def headline_table(contents: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Lays out the final training loss of some methods, a column for each comparison, the lowest of all in bold."""
    rows = {name: {"method": name} for name in names}
    for content in contents:
        size = content["batch_size"]
        column = f"{content['title']}, {'full batch' if size == content['num_images'] else f'batch {size}'}"
        losses = {method["method"]: method["figures"]["train_loss"] for method in content["methods"]}
        losses = {name.removesuffix(", W2"): values for name, values in losses.items()}
        lowest = min(losses, key=lambda name: np.mean(losses[name]))
        for name, row in rows.items():
            text = mean_deviation(losses[name]) if name in losses else ""
            row[column] = f"**{text}**" if name == lowest else text
    caption = (
        f"Final training loss at an equal budget of gradients, each method tuned, mean ± standard deviation over "
        f"{contents[0]['seeds']} fresh seeds. On the full batch EDF is accelerated."
    )
    return table(rows.values(), caption)

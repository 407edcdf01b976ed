"""Tables of what was measured, and whether the methods of optcurv are ahead."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.core.report import Row, table
from benchmarks.core.tune import no_nan
from benchmarks.science.runs import BARS, OWN

_OWN_NAMES = {method.name for method in OWN}


def best_run(tried: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The run with the least final error."""
    return min(tried, key=lambda run: no_nan(run["error"]))


def problem_table(content: Mapping[str, Any]) -> str:
    """A row for each method, at its best setting by the final error."""
    return table(_row(name, best_run(tried), fastest(tried)) for name, tried in content["methods"].items())


def all_runs_table(found: Mapping[str, Any]) -> str:
    """A row for each run."""
    return table(
        {"problem": content["title"], **_row(name, run, run["passed"])}
        for content in found.values()
        for name, tried in content["methods"].items()
        for run in tried
    )


def fastest(tried: Iterable[Mapping[str, Any]]) -> list[float]:
    """The least seconds to each error, over all settings."""
    return [min(times) for times in zip(*(run["passed"] for run in tried), strict=True)]


def _row(name: str, run: Mapping[str, Any], passed: Iterable[float]) -> Row:
    times = {
        f"to {bar:.0e}": "–" if math.isinf(time) else f"{time:.2g}" for bar, time in zip(BARS, passed, strict=True)
    }
    return {
        "method": name,
        "setting": ", ".join(f"{key} {value:g}" for key, value in run["setting"].items()) or "default",
        "compiling, s": f"{run['compile_seconds']:.1f}",
        "steps": str(run["steps"]),
        "ms a step": f"{1e3 * run['seconds'] / run['steps']:.2g}",
        **times,
        "final error": f"{run['error']:.1e}",
        "final loss": f"{run['loss']:.1e}",
    }


def sides(content: Mapping[str, Any]) -> tuple[tuple[float, str], tuple[float, str]]:
    """The least final error of optcurv's methods and of the rivals, each with the method's name."""
    finals = [(no_nan(best_run(tried)["error"]), name) for name, tried in content["methods"].items()]
    own, rivals = ([each for each in finals if (each[1] in _OWN_NAMES) == ours] for ours in (True, False))
    return min(own), min(rivals)


def summary_table(found: Mapping[str, Any]) -> str:
    """A row for each problem: the best of either side at equal seconds, and Levenberg-Marquardt by default."""
    rows = []
    for content in found.values():
        (own, own_name), (rival, rival_name) = sides(content)
        rows.append(
            {
                "problem": content["title"],
                "parameters": str(content["parameters"]),
                "LM by default": f"{best_run(content['methods'][OWN[0].name])['error']:.1e}",
                "best of optcurv, untuned": f"{own:.1e} ({own_name})",
                "best rival, tuned": f"{rival:.1e} ({rival_name})",
                "rival's error / optcurv's": f"{rival / own:.2g}",
            }
        )
    ahead = sum(rival >= 10 * own for (own, _), (rival, _) in map(sides, found.values()))
    seconds = max(content["seconds"] for content in found.values())
    return table(
        rows,
        f"Final errors after {seconds:g} s of each run. "
        f"The best of optcurv ends at least 10 times below the best rival on {ahead} of {len(found)}.",
    )


def speed_table(found: Mapping[str, Any]) -> str:
    """A row for each problem: seconds to the least of the errors that a rival came below."""
    rows = []
    for content in found.values():
        times = {name: fastest(tried) for name, tried in content["methods"].items()}
        own, rivals = ([(times[n], n) for n in times if (n in _OWN_NAMES) == ours] for ours in (True, False))
        passed = [index for index in range(len(BARS)) if any(math.isfinite(each[index]) for each, _ in rivals)]
        if not passed:
            continue
        quickest = [min((each[passed[-1]], name) for each, name in side) for side in (own, rivals)]
        (own_time, own_name), (rival_time, rival_name) = quickest
        rows.append(
            {
                "problem": content["title"],
                "error": f"{BARS[passed[-1]]:.0e}",
                "optcurv, s": f"{own_time:.2g} ({own_name})" if math.isfinite(own_time) else "–",
                "rivals, s": f"{rival_time:.2g} ({rival_name})",
                "rivals' seconds / optcurv's": f"{rival_time / own_time:.2g}",
            }
        )
    return table(rows) if rows else "No rival came below any of the errors.\n"

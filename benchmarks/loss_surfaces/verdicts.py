"""What the ends of optimisers on deep networks' loss surfaces say to the paper's claims."""

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.signal
import scipy.stats
from numpy.typing import ArrayLike

from benchmarks.core.statistics import Claim, Verdict, is_less
from benchmarks.loss_surfaces.experiments import EXOTIC, SHARES, USUAL, Exotic, Minima, RungeKutta, Runs, Switching

BARRIER = 0.05
"""Minima are different if the loss between them rises by more than this share of the loss at initialisation."""
LEARNT = 0.3
"""A network of ten classes trains if it gets more of the training examples right than this; chance is 0.1."""


def judge_minima(found: Minima) -> list[Claim]:
    """Section 4.1 and 4.2: different minima, as good as each other, in basins that tell the optimiser."""
    claims: list[Claim | None] = [
        separated("the ends of any two optimisers", found.between.barriers(), found.initial_loss),
        _functionally_different(found),
        _equally_good(found),
    ]
    accuracy = found.finals("train_accuracy")
    for other in ("RMSProp", "Adadelta", "Adam"):
        claims.append(_below("SGD ends with a lower training accuracy than", "SGD", other, accuracy))
    for kind, absolute in (("relative", False), ("absolute", True)):
        widths = found.widths(absolute)
        for narrow, wide in (("SGD", "Adam"), ("SGD+RK2", "Adam+RK2")):
            claims.append(_below(f"{narrow} ends in a basin of less {kind} width than", narrow, wide, widths))
    return [claim._replace(text=f"{found.problem}: {claim.text}") for claim in claims if claim]


def _below(text: str, first: str, second: str, samples: Mapping[str, Sequence[float]]) -> Claim | None:
    """Compares two methods, if both were run."""
    if first not in samples or second not in samples:
        return None
    a, b = samples[first], samples[second]
    return Claim(f"{text} {second}.", is_less(a, b), f"median {_median(a):.3g} against {_median(b):.3g}")


def _median(values: ArrayLike) -> float:
    """Of the finite ones."""
    values = np.asarray(values, np.float64)
    return float(np.median(values[np.isfinite(values)])) if np.isfinite(values).any() else math.nan


def separated(what: str, barriers: Mapping[str, ArrayLike], initial_loss: float) -> Claim:
    """Whether every pair has a barrier between its ends, in the median over the seeds."""
    heights = {pair: _median(values) / initial_loss for pair, values in barriers.items()}
    heights = {pair: height for pair, height in heights.items() if math.isfinite(height)}
    joined = [pair for pair, height in heights.items() if height <= BARRIER]
    verdict = Verdict.UNDECIDED if not heights else Verdict.FAILS if joined else Verdict.HOLDS
    numbers = f"a barrier in {len(heights) - len(joined)} of {len(heights)} pairs"
    if heights:
        lowest = min(heights, key=lambda pair: heights[pair])
        numbers += f"; median height {statistics.median(heights.values()):.2g} of the loss at initialisation, least "
        numbers += f"{heights[lowest]:.2g} ({lowest})"
    return Claim(f"The loss rises between {what}.", verdict, numbers)


def _functionally_different(found: Minima) -> Claim:
    """The paper: a third of the most that two networks of their errors can disagree."""
    accuracy, shares, distances = found.finals("test_accuracy"), [], []
    for pair, curves in found.between.disagreement.by_name.items():
        first, second = pair.split(" | ")
        most = 2 - np.add(accuracy[first], accuracy[second])
        with np.errstate(divide="ignore", invalid="ignore"):
            shares.append(_median(curves[:, -1] / np.minimum(most, 1)))
        distances.append(_median(found.between.distance.by_name[pair][:, -1]))
    disagreement = _median([_median(curves[:, -1]) for curves in found.between.disagreement.by_name.values()])
    share = _median(shares)
    verdict = Verdict.UNDECIDED if math.isnan(share) else Verdict.HOLDS if share > 1 / 3 else Verdict.FAILS
    numbers = f"distance {_median(distances):.2g}, disagreement {disagreement:.2g}, {share:.2g} of the possible"
    return Claim("Pairs disagree on more than a third of the labels that they could disagree on.", verdict, numbers)


def _equally_good(found: Minima) -> Claim:
    """Kruskal and Wallis's test of several samples."""
    accuracy = {name: values for name, values in found.finals("test_accuracy").items() if np.isfinite(values).all()}
    medians = {name: _median(values) for name, values in accuracy.items()}
    numbers = f"medians {min(medians.values()):.3f} to {max(medians.values()):.3f}" if medians else "none finite"
    verdict = Verdict.UNDECIDED
    if len(accuracy) > 1 and min(map(len, accuracy.values())) > 2 and len(set(itertools.chain(*accuracy.values()))) > 1:
        p_value = float(scipy.stats.kruskal(*accuracy.values()).pvalue)
        verdict, numbers = Verdict.HOLDS if p_value > 0.05 else Verdict.FAILS, f"{numbers}, p = {p_value:.2g}"
    return Claim("Test accuracies do not differ between optimisers.", verdict, numbers)


def judge_switching(found: Switching) -> list[Claim]:
    """Section 4.3: other minima however late the switch; the way back from Adam."""
    claims = []
    for group, between in found.between.items():
        barriers, (first, second) = between.barriers(), group.split(" → ")
        what = f"the ends of {first}, {second}, and {first} switched to {second} early, midway and late"
        claims.append(separated(what, barriers, found.initial_loss))
        late = f"at {100 * SHARES[-1]:g} %"
        pair = {f"{first} | {late}": barriers[f"{first} | {late}"]}
        claims.append(separated(f"the ends of {first} with and without {second} from 75 %", pair, found.initial_loss))
        if (first, second) == ("Adam", "SGD"):
            claims.append(_comes_back(found.runs[group]))
    return [claim._replace(text=f"{found.problem}: {claim.text}") for claim in claims]


def _comes_back(runs: Runs) -> Claim:
    """Whether the distance from the initialisation shrinks after the switch."""
    ratios = []
    for run in itertools.chain(*runs.values()):
        if run.plan.second:
            distances = [0.0, *run.curve["distance"]]
            at_switch = distances[max(1, math.floor(run.plan.switch_at * run.plan.num_epochs))]
            ratios.append(distances[-1] / at_switch)
    shorter = sum(ratio < 1 for ratio in ratios)
    verdict = Verdict.HOLDS if shorter == len(ratios) else Verdict.FAILS if 2 * shorter < len(ratios) else None
    numbers = f"in {shorter} of {len(ratios)} runs; median {_median(ratios):.3g} of the distance at the switch"
    text = "After a switch from Adam to SGD the distance from the initialisation decreases."
    return Claim(text, verdict or Verdict.UNDECIDED, numbers)


def num_peaks(losses: ArrayLike) -> int:
    """Returns how many tops a curve has that stand out by a twentieth of its range; ends are none."""
    losses = np.asarray(losses)
    return len(scipy.signal.find_peaks(losses, prominence=np.ptp(losses) / 20)[0])


def bump_width(losses: ArrayLike) -> float:
    """Returns the share of a line on which the loss is above half of the barrier; not a number without a barrier."""
    losses = np.asarray(losses)
    rise = losses - np.linspace(losses[0], losses[-1], len(losses))
    return float(np.mean(rise > rise.max() / 2)) if rise.max() > 0 else math.nan


def judge_batch_norm(with_norm: Minima, without: Minima) -> list[Claim]:
    """Section 4.4: without BatchNorm ends depend on the initialisation, and the surface between them is bumpy."""
    both = (with_norm, without)
    spreads, peaks, widths = [], [], []
    for one in both:
        losses = one.finals("train_accuracy").values()
        spreads.append([float(np.std(column)) for column in losses if np.isfinite(column).all()])
        lines = [line for curves in one.between.loss.by_name.values() for line in curves if np.isfinite(line).all()]
        peaks.append([num_peaks(line) for line in lines])
        widths.append([width for line in lines if not math.isnan(width := bump_width(line))])

    def claim(text: str, samples: Sequence[Sequence[float]], figure: Callable[[Any], float] = np.median) -> Claim:
        if (with_norm.runs and len(next(iter(with_norm.runs.values()))) == 1) or not all(samples):
            return Claim(f"{without.problem}: {text}", Verdict.UNDECIDED, "too few")
        ours, theirs = (figure(sample) for sample in samples)
        return Claim(
            f"{without.problem}: {text}", is_less(samples[0], samples[1]), f"{theirs:.3g} against {ours:.3g} with"
        )

    return [
        claim("Without BatchNorm the accuracy varies more with the initialisation.", spreads),
        claim("Without BatchNorm the loss between ends has more tops (average).", peaks, np.mean),
        claim("Without BatchNorm the bumps between ends are wider (share of the line).", widths),
    ]


def judge_exotic(with_norm: Exotic, without: Exotic) -> list[Claim]:
    """Appendix A.5: BatchNorm redeems bad initialisations, if not wholly."""
    claims = []
    for name in map(str, EXOTIC):
        for found, expected in ((without, False), (with_norm, True)):
            accuracies = [run.final["train_accuracy"] for run in found.runs[name]]
            learnt = [accuracy > LEARNT for accuracy in accuracies]
            as_claimed = [one == expected for one in learnt]
            verdict = Verdict.HOLDS if all(as_claimed) else Verdict.UNDECIDED if any(as_claimed) else Verdict.FAILS
            numbers = f"training accuracy {min(accuracies):.2f} to {max(accuracies):.2f}"
            text = f"{found.problem} {'trains' if expected else 'does not train'} from {name}."
            claims.append(Claim(text, verdict, numbers))
        losses = {start: [run.final["train_loss"] for run in with_norm.runs[start]] for start in (USUAL, name)}
        text = f"{with_norm.problem} ends with a lower training loss {USUAL} than from"
        claim = _below(text, USUAL, name, losses)
        claims += [claim] if claim else []
    return claims


def judge_runge_kutta(found: RungeKutta) -> list[Claim]:
    """Appendix A.4: Heun and Ralston outperform SGD, but not midpoint; Adam outperforms Adam with RK2."""
    losses = {name: [run.final["train_loss"] for run in runs] for name, runs in found.runs.items()}
    text = "at equal numbers of gradients {} ends with a lower training loss than"
    claims = []
    for better, worse in (("SGD, Heun", "SGD"), ("SGD, Ralston", "SGD"), ("Adam", "Adam, RK2")):
        claims.append(_below(text.format(better), better, worse, losses))
    claims.append(_below(text.format("SGD"), "SGD", "SGD, midpoint", losses))
    return [claim._replace(text=f"{found.problem}: {claim.text}") for claim in claims if claim]

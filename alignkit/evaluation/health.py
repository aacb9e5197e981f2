"""What a training log says: series by key, and plain-language warnings about runs that go wrong.

A log is `log_history` of transformers' trainer_state.json: a list of dicts with `step` and any of `loss`, `grad_norm`,
`health/implicit_accuracy`, `health/margin`, `health/winner_error_delta`, `health/loser_error_delta`,
`health/saturated`, `eval_reward/<name>`. Deliberately not here: stopping a run; trainers do that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignkit.evaluation.results import Evaluation
from alignkit.evaluation.svg import Point, compact

Log = Sequence[Mapping[str, Any]]
HELD_OUT = "eval_reward/"
_MOSTLY_SATURATED = 0.5
_SPIKE = 10.0  # times the median gradient norm


def points(log: Log, key: str) -> list[Point]:
    """The finite (step, value) pairs of `key`, in order of step."""
    rows = [(float(row["step"]), float(row[key])) for row in log if key in row and "step" in row]
    return sorted((step, value) for step, value in rows if math.isfinite(value))


def held_out_rewards(log: Log) -> list[str]:
    """Names of the rewards measured during training."""
    keys = dict.fromkeys(key for row in log for key in row if key.startswith(HELD_OUT))
    return [key.removeprefix(HELD_OUT) for key in keys]


def training_warnings(log: Log) -> list[str]:
    """Sentences about what went wrong, each with the numbers and what to try; empty for a healthy run."""
    found = [_winner_unlearned(log), _saturated(log), _spike(log), _not_finite(log)]
    return [sentence for sentence in found if sentence]


def hacking_warning(evaluation: Evaluation) -> str:
    """A sentence when proxies rise while gold falls, else nothing."""
    gold = evaluation.gold
    if gold is None or not (gold.overall.gain.mean < 0):
        return ""
    risen = [r.reward for r in evaluation.results if not r.is_gold and r.overall.gain.low > 0]
    if not risen:
        return ""
    return (
        f"{', '.join(risen)} rose while the held-out reward {gold.reward} fell "
        f"({compact(gold.overall.gain.mean, signed=True)}): this looks like reward hacking. Train for fewer steps, "
        "with a larger beta, or with more rewards in the ensemble."
    )


def _winner_unlearned(log: Log) -> str:
    winner, margin = (_ends(points(log, f"health/{key}")) for key in ("winner_error_delta", "margin"))
    if not (winner and margin and winner[1] > max(0.0, winner[0]) and margin[1] > margin[0]):
        return ""
    return (
        f"The winner's error rose to {compact(winner[1], signed=True)} above the reference while the margin grew from "
        f"{compact(margin[0])} to {compact(margin[1])}: the model gets worse on what it should prefer, only less so "
        "than on the rest. Lower the learning rate, stop earlier, or turn on winner protection."
    )


def _ends(series: Sequence[Point]) -> tuple[float, float] | None:
    """Means of the first and last quarter when they differ by more than two standard errors, else None."""
    quarter = len(series) // 4
    if quarter < 2:
        return None
    first, last = (np.array([value for _, value in part]) for part in (series[:quarter], series[-quarter:]))
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / quarter)
    return (float(first.mean()), float(last.mean())) if abs(last.mean() - first.mean()) > 2 * error else None


def _saturated(log: Log) -> str:
    shares = [value for _, value in points(log, "health/saturated")][-10:]
    if not shares or np.mean(shares) <= _MOSTLY_SATURATED:
        return ""
    share = f"{np.mean(shares):.0%}"
    return f"{share} of pairs were saturated at the end: they teach nothing more. Lower beta or stop earlier."


def _spike(log: Log) -> str:
    norms = points(log, "grad_norm")
    if len(norms) < 10:
        return ""
    median = float(np.median([value for _, value in norms]))
    step, largest = max(norms, key=lambda point: point[1])
    if largest <= _SPIKE * median:
        return ""
    return f"The gradient norm jumped to {compact(largest)} at step {step:g}, {largest / median:.0f} times its median."


def _not_finite(log: Log) -> str:
    keys = ("loss", "grad_norm")
    steps = [row["step"] for row in log for key in keys if key in row and not math.isfinite(float(row[key]))]
    return f"Loss or gradient norm was not finite at {len(steps)} logged steps, first at {steps[0]}." if steps else ""

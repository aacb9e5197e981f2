"""Paired statistics: bootstrap intervals over prompts, win rates, and several training seeds together.

Shape letters: P prompts, S seeds a prompt, R trained runs, N bootstrap samples. A score that is NaN or infinite
drops its pair (both sides), never the prompt.

Deliberately not here: p-values; an interval says more and is harder to misread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alignkit.errors import DataError

Floats = NDArray[np.float64]
_BLOCK = 2_000_000  # bootstrap weights held at once; bounds memory at 16 MB whatever P and N are


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with a bootstrap interval; `low` and `high` are NaN where one prompt gives no spread to resample."""

    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """True when the whole interval lies on one side of `value`."""
        return self.low > value or self.high < value


@dataclass(frozen=True, slots=True)
class Comparison:
    """One reward on one group of prompts: means of both sides, paired gain, share of pairs won (ties half)."""

    base: Interval
    tuned: Interval
    gain: Interval
    win_rate: Interval
    ties: float
    prompts: int
    pairs: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Combined:
    """Several trained runs of one recipe: the mean gain, its interval, and each run's own mean gain."""

    gain: Interval
    runs: tuple[float, ...]
    prompts: int


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How intervals are made: `samples` resamples, two-sided `confidence`, explicit `seed`."""

    samples: int = 2000
    confidence: float = 0.95
    seed: int = 0


def compare(base_PS: Floats, tuned_PS: Floats, bootstrap: Bootstrap) -> Comparison:
    """Compare two sides drawn from the same prompts and seeds.

    Prompts are resampled and the seeds of a prompt stay together (they share its difficulty), so the interval is
    that of new prompts. Percentile bootstrap; every measure uses the same resamples. Raises DataError when shapes
    differ or no pair is finite.
    """
    if base_PS.shape != tuned_PS.shape or base_PS.ndim != 2:
        raise DataError(f"paired scores must have one shape [P, S]; base {base_PS.shape}, tuned {tuned_PS.shape}.")
    valid_PS = np.isfinite(base_PS) & np.isfinite(tuned_PS)
    if not valid_PS.any():
        raise DataError("no pair has finite scores on both sides; look at the reward's output on one image.")
    gain_PS = np.where(valid_PS, tuned_PS, 0) - np.where(valid_PS, base_PS, 0)
    wins_PS = (np.sign(gain_PS) + 1) / 2
    base, tuned, gain, wins = _intervals([base_PS, tuned_PS, gain_PS, wins_PS], valid_PS, bootstrap)
    ties = float((gain_PS[valid_PS] == 0).mean())
    prompts, pairs = int(valid_PS.any(axis=1).sum()), int(valid_PS.sum())
    return Comparison(base, tuned, gain, wins, ties, prompts, pairs, valid_PS.size - pairs)


def bootstrap_mean(values_PS: Floats, bootstrap: Bootstrap) -> Interval:
    """Mean over all finite values with an interval over prompts (rows)."""
    return _intervals([values_PS], np.isfinite(values_PS), bootstrap)[0]


def combine_runs(gain_RPS: Floats, bootstrap: Bootstrap) -> Combined:
    """Mean gain of R trained runs evaluated on the same prompts and seeds, with an interval over prompts and runs.

    Gains are read as gain_rp = mean + run_r + prompt_p + rest_rp (the S seeds averaged). Prompts are resampled on the
    mean over runs, which carries prompt_p and rest_rp; runs are resampled on deviations scaled to the unbiased
    estimate of run_r's variance (Searle's variance components), for plain resampling of R values would show only
    (R-1)/R of it. With R = 1 the spread of training cannot be seen and the interval is over prompts alone; with R = 3
    and a spread dominated by training the true coverage is nearer 0.80 than 0.95 (measured): read `runs` too.
    """
    valid_RPS = np.isfinite(gain_RPS)
    keep_P = valid_RPS.any(axis=2).all(axis=0)
    if not keep_P.any():
        raise DataError("no prompt has a finite gain in every run; were the runs evaluated on the same prompts?")
    sums_RP = np.where(valid_RPS, gain_RPS, 0)[:, keep_P].sum(axis=2)
    gain_RP = sums_RP / valid_RPS[:, keep_P].sum(axis=2)
    mean_R, mean_P = gain_RP.mean(axis=1), gain_RP.mean(axis=0)
    rng = np.random.default_rng(bootstrap.seed)
    means_N = _resample(mean_P[:, None], rng, bootstrap.samples)[:, 0]
    means_N = means_N + _resample(_run_deviations(gain_RP)[:, None], rng, bootstrap.samples)[:, 0]
    gain = _percentiles(float(gain_RP.mean()), means_N, bootstrap.confidence, len(mean_P))
    return Combined(gain, tuple(float(mean) for mean in mean_R), len(mean_P))


def _run_deviations(gain_RP: Floats) -> Floats:
    """Run effects [R], mean zero, with mean square equal to the estimated variance of run_r (never below zero)."""
    runs, prompts = gain_RP.shape
    deviation_R = gain_RP.mean(axis=1) - gain_RP.mean()
    square = float((deviation_R**2).mean())
    if runs < 2 or prompts < 2 or square == 0:
        return np.zeros(runs)
    rest_RP = gain_RP - gain_RP.mean(axis=0) - deviation_R[:, None]
    rest = float((rest_RP**2).sum()) / ((runs - 1) * (prompts - 1))
    variance = max(0.0, square * runs / (runs - 1) - rest / prompts)
    scaled_R: Floats = deviation_R * math.sqrt(variance / square)
    return scaled_R


def _intervals(measures: list[Floats], valid_PS: NDArray[np.bool_], bootstrap: Bootstrap) -> list[Interval]:
    """One interval a measure; the count of valid pairs is resampled along, so means stay means over pairs."""
    keep_P = valid_PS.any(axis=1)
    totals = [np.where(valid_PS, values, 0).sum(axis=1)[keep_P] for values in measures]
    counts_P = valid_PS.sum(axis=1)[keep_P].astype(np.float64)
    rng = np.random.default_rng(bootstrap.seed)
    *sums, counts_N = _resample(np.stack([*totals, counts_P], axis=1), rng, bootstrap.samples).T
    means = [float(total.sum() / counts_P.sum()) for total in totals]
    return [
        _percentiles(mean, sums_N / counts_N, bootstrap.confidence, len(counts_P))
        for mean, sums_N in zip(means, sums, strict=True)
    ]


def _resample(values_PM: Floats, rng: np.random.Generator, samples: int) -> Floats:
    """Means [N, M] of rows drawn with replacement: multinomial counts times values, a block of samples at a time."""
    rows = len(values_PM)
    block = max(1, _BLOCK // rows)
    sizes = [min(block, samples - start) for start in range(0, samples, block)]
    even = np.full(rows, 1 / rows)
    sums_NM: Floats = np.concatenate([rng.multinomial(rows, even, size=size) @ values_PM for size in sizes])
    return sums_NM / rows


def _percentiles(mean: float, means_N: Floats, confidence: float, prompts: int) -> Interval:
    if prompts < 2:
        return Interval(mean, math.nan, math.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means_N, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))

"""Intervals against closed forms, coverage on synthetic data with known gain, and degenerate input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from alignkit.errors import DataError
from alignkit.evaluation.statistics import Bootstrap, Interval, bootstrap_mean, combine_runs, compare

FEW = Bootstrap(samples=400)


def test_interval_agrees_with_the_normal_closed_form():
    values_PS = np.random.default_rng(0).normal(3.0, 2.0, size=(400, 1))
    interval = bootstrap_mean(values_PS, Bootstrap(samples=8000))
    half = 1.96 * values_PS.std() / math.sqrt(400)
    assert interval.mean == pytest.approx(values_PS.mean(), abs=1e-12)
    assert interval.low == pytest.approx(values_PS.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values_PS.mean() + half, abs=0.1 * half)


def test_seeds_of_a_prompt_stay_together():
    """Copies of one seed say nothing new: the interval is that of one seed, not sqrt(S) narrower."""
    one_PS = np.random.default_rng(1).normal(size=(60, 1))
    single, copied = bootstrap_mean(one_PS, FEW), bootstrap_mean(np.repeat(one_PS, 9, axis=1), FEW)
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high))


@pytest.mark.parametrize("binary", [False, True])
def test_coverage_of_a_known_gain(binary):
    """True gain 0.1 with effects of prompts and seeds: about 95 of 100 intervals hold it."""
    rng = np.random.default_rng(2)
    held = 0
    for trial in range(300):
        hard_P = rng.normal(0, 0.25, size=(80, 1))
        base_PS, tuned_PS = hard_P + rng.normal(0, 0.3, (80, 2)), 0.1 + hard_P + rng.normal(0, 0.3, (80, 2))
        if binary:
            chance = np.clip(0.4 + hard_P, 0.05, 0.85)
            base_PS, tuned_PS = (rng.random((80, 2)) < chance) * 1.0, (rng.random((80, 2)) < chance + 0.1) * 1.0
        gain = compare(base_PS, tuned_PS, Bootstrap(samples=300, seed=trial)).gain
        held += gain.low <= 0.1 <= gain.high
    assert 0.90 <= held / 300 <= 0.985


def test_gain_is_the_difference_of_the_means_and_pairing_removes_what_is_shared():
    rng = np.random.default_rng(3)
    hard_PS = rng.normal(0, 10, size=(50, 2))
    result = compare(hard_PS, hard_PS + 0.5 + rng.normal(0, 0.1, (50, 2)), FEW)
    assert result.gain.mean == pytest.approx(result.tuned.mean - result.base.mean)
    assert result.gain.high - result.gain.low < 0.1 < result.base.high - result.base.low
    assert result.gain.excludes(0)


def test_win_rate_counts_ties_half():
    result = compare(np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[1.0, 1.0], [2.0, 2.0]]), FEW)
    assert result.win_rate.mean == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert result.ties == 0.5


def test_swapping_the_sides_mirrors_everything():
    rng = np.random.default_rng(4)
    base_PS, tuned_PS = rng.normal(size=(2, 30, 2))
    there, back = compare(base_PS, tuned_PS, FEW), compare(tuned_PS, base_PS, FEW)
    assert (back.gain.mean, back.gain.low, back.gain.high) == pytest.approx(
        (-there.gain.mean, -there.gain.high, -there.gain.low)
    )
    assert back.win_rate.mean == pytest.approx(1 - there.win_rate.mean)


def test_nothing_changed_is_a_tie_with_no_gain():
    same_PS = np.random.default_rng(5).normal(size=(10, 3))
    result = compare(same_PS, same_PS, FEW)
    assert result.gain == Interval(0.0, 0.0, 0.0)
    assert result.win_rate == Interval(0.5, 0.5, 0.5)
    assert not result.gain.excludes(0)


def test_one_prompt_has_a_mean_and_no_interval():
    result = compare(np.zeros((1, 5)), np.ones((1, 5)), FEW)
    assert result.gain.mean == 1.0
    assert math.isnan(result.gain.low)
    assert not result.gain.excludes(0)


def test_a_score_that_is_not_finite_drops_its_pair_from_both_sides():
    base_PS, tuned_PS = (
        np.array([[1.0, 5.0], [1.0, 1.0], [1.0, 1.0]]),
        np.array([[2.0, np.nan], [2.0, 2.0], [2.0, np.inf]]),
    )
    result = compare(base_PS, tuned_PS, FEW)
    assert (result.base.mean, result.tuned.mean, result.gain.mean) == (1.0, 2.0, 1.0)
    assert (result.prompts, result.pairs, result.dropped) == (3, 4, 2)


def test_shapes_that_do_not_pair_and_no_finite_pair_are_refused():
    with pytest.raises(DataError, match=r"base \(2, 2\), tuned \(2, 3\)"):
        compare(np.zeros((2, 2)), np.zeros((2, 3)), FEW)
    with pytest.raises(DataError, match="finite scores on both sides"):
        compare(np.full((2, 2), np.nan), np.zeros((2, 2)), FEW)


def test_blocks_of_resamples_make_no_difference_to_what_is_estimated(monkeypatch):
    values_PS = np.random.default_rng(6).normal(size=(40, 1))
    whole = bootstrap_mean(values_PS, FEW)
    monkeypatch.setattr("alignkit.evaluation.statistics._BLOCK", 400)
    blocks = bootstrap_mean(values_PS, FEW)
    assert (blocks.mean, blocks.low, blocks.high) == pytest.approx((whole.mean, whole.low, whole.high))


def test_runs_that_agree_are_as_sure_as_their_prompts_and_runs_that_differ_are_not():
    rng = np.random.default_rng(7)
    prompt_RPS = np.repeat(rng.normal(0.1, 0.5, (1, 80, 1)), 3, axis=0)
    agree = combine_runs(prompt_RPS, FEW)
    alone = bootstrap_mean(prompt_RPS[0], FEW)
    assert agree.gain.high - agree.gain.low == pytest.approx(alone.high - alone.low, rel=0.15)
    differ = combine_runs(prompt_RPS + np.array([-0.4, 0.0, 0.4])[:, None, None], FEW)
    assert differ.gain.mean == pytest.approx(agree.gain.mean)
    assert differ.gain.high - differ.gain.low > 2 * (agree.gain.high - agree.gain.low)
    assert differ.runs == pytest.approx([agree.gain.mean + shift for shift in (-0.4, 0.0, 0.4)])


def test_coverage_over_prompts_and_runs():
    rng = np.random.default_rng(8)
    held = 0
    for trial in range(200):
        prompt, run = rng.normal(0, 0.5, (1, 60, 1)), rng.normal(0, 0.05, (6, 1, 1))
        gain = combine_runs(0.2 + prompt + run + rng.normal(0, 0.5, (6, 60, 2)), Bootstrap(300, seed=trial)).gain
        held += gain.low <= 0.2 <= gain.high
    assert 0.88 <= held / 200 <= 0.99


def test_a_single_run_falls_back_to_prompts():
    gain_RPS = np.random.default_rng(9).normal(size=(1, 50, 2))
    run, prompts = combine_runs(gain_RPS, FEW).gain, bootstrap_mean(gain_RPS[0], FEW)
    assert (run.mean, run.low, run.high) == pytest.approx((prompts.mean, prompts.low, prompts.high))

"""Warnings on logs that go wrong and silence on those that do not; charts at their edges."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from alignkit.evaluation.health import hacking_warning, points, training_warnings
from alignkit.evaluation.report_guard import guard_panel
from alignkit.evaluation.results import read_evaluation
from alignkit.evaluation.statistics import Interval
from alignkit.evaluation.svg import Row, Series, bar_chart, compact, gain_chart, histogram, line_chart, tick_text, tone


def log(steps=80, **slopes):
    """Noisy straight lines: slope per run for margin, winner_error_delta, ..."""
    rng = np.random.default_rng(0)
    lines = {
        f"health/{key}": slope * np.linspace(0, 1, steps) + rng.normal(0, 0.05, steps) for key, slope in slopes.items()
    }
    return [{"step": k, "grad_norm": 1.0} | {key: line[k] for key, line in lines.items()} for k in range(steps)]


@pytest.mark.parametrize(
    ("winner", "margin", "warned"), [(0.5, 1.0, True), (-0.5, 1.0, False), (0.5, -1.0, False), (0.0, 1.0, False)]
)
def test_the_warning_needs_a_rising_winner_error_and_a_growing_margin(winner, margin, warned):
    found = training_warnings(log(winner_error_delta=winner, margin=margin))
    assert bool(found) == warned
    assert all("winner's error rose" in sentence for sentence in found)


def test_a_winner_error_that_rises_back_to_the_reference_is_no_warning():
    rows = [
        row | {"health/winner_error_delta": row["health/winner_error_delta"] - 2} for row in log(winner_error_delta=1)
    ]
    assert training_warnings(rows) == []


def test_saturation_spikes_and_losses_that_are_not_finite():
    rows = [row | {"health/saturated": 0.8} for row in log()]
    rows[40]["grad_norm"] = 500.0
    rows[50]["loss"] = float("inf")
    saturated, spike, bad = training_warnings(rows)
    assert "80% of pairs" in saturated
    assert "500 at step 40, 500 times" in spike
    assert "1 logged steps, first at 50" in bad


def test_an_empty_or_short_log_is_silent():
    assert training_warnings([]) == []
    assert training_warnings(log(steps=3, winner_error_delta=9.0, margin=9.0)) == []


def test_points_are_finite_and_in_order():
    rows = [
        {"step": 2, "loss": 1},
        {"step": 1, "loss": 3.0},
        {"step": 3, "loss": float("nan")},
        {"loss": 4.0},
        {"step": 9},
    ]
    assert points(rows, "loss") == [(1.0, 3.0), (2.0, 1.0)]


def test_proxies_that_rise_while_gold_falls_look_like_hacking(finished):
    evaluation = read_evaluation(finished)
    gold, grey = evaluation.results

    def moved(result, low, mean, high):
        return dataclasses.replace(result, overall=dataclasses.replace(result.overall, gain=Interval(mean, low, high)))

    hacked = dataclasses.replace(evaluation, results=(moved(gold, -0.3, -0.2, -0.1), moved(grey, 1, 2, 3)))
    assert "grey rose while the held-out reward gold fell" in hacking_warning(hacked)
    fine = dataclasses.replace(evaluation, results=(moved(gold, 0.1, 0.2, 0.3), moved(grey, 1, 2, 3)))
    unsure = dataclasses.replace(evaluation, results=(moved(gold, -0.3, -0.2, -0.1), moved(grey, -1, 2, 3)))
    assert hacking_warning(fine) == hacking_warning(unsure) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0641, "0.064"), (-23.456, "−23.46"), (0.00014, "0.00014"), (1e-7, "1.0e-07"), (1234.5, "1,234"),
     (float("nan"), "n/a")],
)  # fmt: skip
def test_compact_numbers(value, text):
    assert compact(value) == text


def test_neighbouring_ticks_are_told_apart():
    for ticks in ([0.0, 0.0005, 0.001], [22.9, 23.0, 23.1], [0.0, 0.25, 0.5], [0, 100, 200], [-1e-6, 0, 1e-6]):
        assert len({tick_text(tick, ticks) for tick in ticks}) == 3


def test_tone_claims_only_what_the_interval_shows():
    assert [tone(Interval(m, lo, hi)) for m, lo, hi in ((1, 0.5, 2), (-1, -2, -0.5), (1, -0.1, 2))] == [
        "good",
        "bad",
        "quiet",
    ]
    assert tone(Interval(1, float("nan"), float("nan"))) == "quiet"


def test_charts_of_one_point_equal_values_and_no_interval():
    nan = Interval(0.0, float("nan"), float("nan"))
    charts = [
        line_chart([Series("a", [(0.0, 0.0)])], alt="x"),
        line_chart([Series("a", [(float(k), 3.0) for k in range(1000)])], alt="x", zero=True),
        bar_chart([Row("a", [("base", "base", nan)])], alt="x"),
        gain_chart([("a", nan)], alt="x"),
        histogram([0, 1], [0], alt="x"),
    ]
    for chart in charts:
        assert "nan" not in chart
        assert "inf" not in chart


def test_a_bar_is_as_long_as_its_value():
    rows = [Row("a", [("base", "base", Interval(v, v, v))]) for v in (1.0, 2.0, 4.0)]
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([\d.]+)"', bar_chart(rows, alt="x"))]
    assert [w / widths[0] for w in widths] == pytest.approx([1, 2, 4], abs=0.01)


def test_the_guards_panel_marks_the_best_step_that_did_not_fall():
    rows = [(0, 1.0, 5.0, 0), (20, 3.0, 6.0, 1), (40, 2.0, 9.0, 0), (60, 0.0, 9.0, 1)]
    keys = ("step", "eval_guard/clip", "eval_reward/careful", "eval_guard_fallen")
    held_out = [dict(zip(keys, row, strict=True)) | {"eval_eight_bit/careful": row[2]} for row in rows]
    panel = guard_panel([{"step": 1, "loss": 1.0}, *held_out])
    assert "The guard was best at step 40 (dashed)" in panel
    assert "guard clip: 1.000 to 0" in panel
    assert "trained careful: 5.000 to 9.000" in panel
    assert panel.count('class="zero"') == 2  # y = 0 and the step
    ends = [float(x) for x in re.findall(r'<circle[^>]* cy="([\d.]+)"', panel)]
    levels = [float(y) for y in re.findall(r'<path class="t-good line" d="M[\d.]+ ([\d.]+) L[\d.]+ ([\d.]+)', panel)[0]]
    assert ends[1] == pytest.approx(levels[1], abs=0.11)  # +1 of careful and +1 of clip (at step 20) are equally high
    assert guard_panel([{"step": 1, "loss": 1.0}]) == ""

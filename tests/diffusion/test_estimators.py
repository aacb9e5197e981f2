"""Which steps each estimator differentiates, and that its draws hang on the key alone."""

from __future__ import annotations

from collections import Counter

import pytest

from alignkit.diffusion.estimators import ESTIMATORS, Estimator, find_estimator
from alignkit.errors import ConfigError

N = 40


def plans(estimator, count=N, draws=300):
    return [estimator.draw(count, 0, step) for step in range(draws)]


@pytest.mark.parametrize(
    ("steps", "active"),
    [
        ("last 3", {37, 38, 39}),
        ("first 2", {0, 1}),
        ("last 10%", {36, 37, 38, 39}),
        ("window 2-4", {2, 3, 4}),
        ("window 0%-10%", {0, 1, 2, 3}),
        ("window 95%-100%", {38, 39}),
        ("window 50%", {20}),
        ("all", None),
    ],
)
def test_steps_that_are_not_drawn(steps, active):
    for plan in plans(Estimator(steps), draws=3):
        assert plan.steps.active == active
        assert plan.end == N - 1


def test_random_steps_are_distinct_and_cover_the_chain():
    drawn = [plan.steps.active for plan in plans(Estimator("random 3"))]
    assert {len(active) for active in drawn} == {3}
    assert set().union(*drawn) == set(range(N))


def test_a_late_bias_draws_in_proportion():
    """One step with weight (i + 1)^2: the share of the last of 4 steps is 16 / 30."""
    drawn = Counter(next(iter(p.steps.active)) for p in plans(Estimator("random 1", late_bias=2.0), 4, 4000))
    for index in range(4):
        assert drawn[index] / 4000 == pytest.approx((index + 1) ** 2 / 30, abs=0.03)


def test_even_steps_have_one_distance():
    for plan in plans(Estimator("even 4"), 10):
        first, *rest = sorted(plan.steps.active)
        assert [step - first for step in rest] == [2, 4, 6]
    starts = {min(plan.steps.active) for plan in plans(Estimator("even 4"), 10)}
    assert starts == {0, 1, 2, 3}


def test_equal_keys_give_equal_plans():
    estimator = ESTIMATORS["drtune"]
    assert plans(estimator) == plans(estimator)
    assert len({(plan.end, plan.steps.active) for plan in plans(estimator)}) > 50


def test_the_published_estimators():
    """Their papers' steps, on a chain of 40."""
    drawn = {name: plans(estimator) for name, estimator in ESTIMATORS.items()}
    last = frozenset({N - 1})
    assert {plan.steps.active for plan in drawn["exact"]} == {None}
    assert {plan.steps.active for plan in drawn["draft"]} == {plan.steps.active for plan in drawn["draft-lv"]} == {last}
    assert {plan.noise_samples for plan in drawn["draft-lv"]} == {2}
    assert {plan.steps.active for plan in drawn["draft-3"]} == {frozenset(range(N - 3, N))}
    assert {plan.end for plan in drawn["refl"]} == set(range(30, 40))
    assert all(plan.steps.active == {plan.end} for plan in drawn["refl"])
    assert {len(plan.steps.active) for plan in drawn["alignprop"]} == set(range(1, N + 1))
    assert all(plan.steps.active == set(range(min(plan.steps.active), N)) for plan in drawn["alignprop"])
    assert {plan.end for plan in drawn["drtune"]} == set(range(24, 40))
    assert all(len(plan.steps.active) == 3 and max(plan.steps.active) <= plan.end for plan in drawn["drtune"])
    assert {plan.steps.active for plan in drawn["first-step"]} == {frozenset({0})}
    assert {len(plan.steps.active) for plan in drawn["flowbp-sparse"]} == {3}
    coupled = {name for name, found in drawn.items() if found[0].steps.coupling == 1}
    assert set(ESTIMATORS) - coupled == {"drtune", "flowbp-sparse"}
    assert all(estimator.source for estimator in ESTIMATORS.values())


@pytest.mark.parametrize("steps", ["last", "last 0", "all 3", "middle 3", "last 3-", "window 4-2", "last -1", ""])
def test_a_form_that_is_none_is_refused(steps):
    with pytest.raises(ConfigError, match="steps with gradients"):
        Estimator(steps).draw(N, 0)


def test_steps_outside_the_chain_are_refused():
    with pytest.raises(ConfigError, match=r"'window 2-9'.* steps 2 to 9; the chain has steps 0 to 7"):
        Estimator("window 2-9").draw(8, 0)
    with pytest.raises(ConfigError, match=r"'last 9'; the chain has 8 steps, so K is from 1 to 8"):
        Estimator("last 9").draw(8, 0)
    with pytest.raises(ConfigError, match=r"'even 3'; the chain has 2 steps"):  # an early end leaves too few
        Estimator("even 3", early_end="1-5").draw(8, 0)
    with pytest.raises(ConfigError, match=r"early_end is '30-39'"):
        Estimator("last 1", early_end="30-39").draw(8, 0)
    with pytest.raises(ConfigError, match="coupling is 2"):
        Estimator("all", coupling=2)
    with pytest.raises(ConfigError, match="noise_samples is -1"):
        Estimator("all", noise_samples=-1)
    with pytest.raises(ConfigError, match="Did you mean 'drtune'"):
        find_estimator("drtuen")

"""The front of mixtures: dominance, hypervolume, attainment and barriers against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fronts import NAMES, REWARDS, point

from alignkit.evaluation.frontier import MEMBERS, OTHERS, Frontier, simplex, table
from alignkit.evaluation.frontier_page import _panels, _reached, _stairs, plot
from alignkit.evaluation.frontier_place import place, plots


@pytest.fixture
def frontier():
    """Two members (4, 0) and (0, 4) in two runs; one soup lies on the line in run 0, and below it in run 1."""
    return Frontier(
        ["a", "b"],
        REWARDS,
        [
            point(MEMBERS, (1, 0), (4, 0), (4, 0), name="a"),
            point(MEMBERS, (0, 1), (0, 4), (0, 4), name="b"),
            point("weights", (0.5, 0.5), (2, 2), (1, 1)),
            point("prediction", (0.5, 0.5), (3, 3), (3, 3)),
            point(OTHERS, (0, 0), (-1, 5), name="joint"),
        ],
    )


def test_what_no_other_point_beats(frontier):
    assert [one.name for one in frontier.non_dominated()] == ["a", "b", "0.5-0.5", "joint"]
    assert frontier.non_dominated()[2].space == "prediction"
    worse = Frontier(["a", "b"], REWARDS, [*frontier.points[:2], point("weights", (0.5, 0.5), (-1, -1))])
    assert [one.name for one in worse.non_dominated()] == ["a", "b"]
    below_base = Frontier(["a", "b"], REWARDS, [point(MEMBERS, (1, 0), (-1, -1)), point(MEMBERS, (0, 1), (0, 1))])
    assert [one.weights for one in below_base.non_dominated()] == [(0.0, 1.0)]


def test_hypervolume_of_each_run(frontier):
    """The reference is (0, 0); the corners (4, 0) and (0, 4) enclose no area, (2, 2) four, (3, 3) nine."""
    volumes = frontier.hypervolumes()
    assert volumes["weights"] == pytest.approx([4.0, 1.0])
    assert volumes["prediction"] == pytest.approx([9.0, 9.0])
    assert volumes[MEMBERS] == pytest.approx([0.0, 0.0])
    better = Frontier(["a", "b"], REWARDS, [point(MEMBERS, (1, 0), (3, 1)), point(MEMBERS, (0, 1), (1, 3))])
    assert better.hypervolumes()[MEMBERS] == pytest.approx([5.0])  # from the base, not from the lowest gain
    worse = Frontier(["a", "b"], REWARDS, [point(MEMBERS, (1, 0), (2, -1)), point(MEMBERS, (0, 1), (-1, 2))])
    assert worse.hypervolumes()[MEMBERS] == pytest.approx([0.0])


def test_attainment_of_the_runs(frontier):
    reached = frontier.attainment("weights")
    best, all_runs = (sorted(map(tuple, reached[level].tolist())) for level in (0.0, 100.0))
    assert best == [(0.0, 4.0), (2.0, 2.0), (4.0, 0.0)]
    assert all_runs == [(0.0, 4.0), (1.0, 1.0), (4.0, 0.0)]
    assert _stairs(reached[100.0]) == [(0.0, 4.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (4.0, 0.0)]
    one_run = Frontier(["a", "b"], REWARDS, [point(MEMBERS, (1, 0), (4, 0)), point(MEMBERS, (0, 1), (0, 4))])
    assert one_run.attainment("weights") == {}


def test_panels_show_what_runs_reach_on_their_two_axes(frontier):
    """One space: all levels; several: half of the runs, and each has a panel with all levels.

    With three objectives, those of the panel alone.
    """
    two = plot(frontier, REWARDS)
    assert two.count('class="t-quiet reach') == 2
    assert "Lines: what half of the runs reach (solid: weights, dashed: prediction)." in two
    panels = _panels(frontier)
    for space in ("weights", "prediction"):
        assert f"warm against sharp, {space}" in panels
        assert all(panels.count(f"<title>{space}, {level}<") == 1 for level in ("any run", "all runs"))
    one = plot(Frontier(["a", "b"], REWARDS, frontier.points[:3]), REWARDS)
    assert one.count('class="t-quiet reach') == 3
    assert "Lines: what the runs reach (dotted: any run, solid: half of the runs, dashed: all runs)." in one
    ends = [point(MEMBERS, (1, 0), (4, 0, 9), (4, 0, 9)), point(MEMBERS, (0, 1), (0, 4, 0), (0, 4, 0))]
    three = Frontier(["a", "b"], NAMES, [*ends, point("weights", (0.5, 0.5), (2, 2, 8), (1, 1, 8))])
    reached = {line.name: line.points for line in _reached(replace(three, objectives=REWARDS), ["weights"])[0]}
    assert reached["weights, all runs"] == _stairs(frontier.attainment("weights")[100.0])
    assert plot(three, ("sharp", "deep")).count('class="t-quiet reach') == 3
    alone = Frontier(["a", "b"], REWARDS, [point(MEMBERS, (1, 0), (4, 0)), point("weights", (0.5, 0.5), (2, 2))])
    assert "Lines" not in plot(alone, REWARDS)


def test_barriers_to_the_straight_line(frontier):
    """At (0.5, 0.5) the line is at (2, 2): the soup is 0 and 1 below it in the two runs, predictions 1 above it."""
    found = {(one.space, one.reward): one for one in frontier.barriers()}
    assert set(found) == {(space, reward) for space in ("weights", "prediction") for reward in REWARDS}
    soup = found["weights", "sharp"]
    assert soup.height.runs == pytest.approx((0.0, 1.0))
    assert soup.ends == ("a", "b")
    assert found["prediction", "warm"].height.gain.mean == pytest.approx(-1.0)
    lopsided = Frontier(["a", "b"], REWARDS, [*frontier.points[:2], point("weights", (0.25, 0.75), (1, 2), (1, 2))])
    heights = {one.reward: one.height.gain.mean for one in lopsided.barriers()}
    assert heights == pytest.approx({"sharp": 0.0, "warm": 1.0})


def test_a_barrier_counts_mixtures_between_the_ends_alone(frontier):
    """Half of both members, and more of one than there is, lie far below the line but not between the ends."""
    outside = [point("weights", (0.25, 0.25), (-9, -9), (-9, -9)), point("weights", (1.5, -0.5), (-9, -9), (-9, -9))]
    wider = Frontier(["a", "b"], REWARDS, [*frontier.points, *outside])
    heights = {(one.space, one.reward): one.height.gain.mean for one in wider.barriers()}
    assert heights == {(one.space, one.reward): one.height.gain.mean for one in frontier.barriers()}


def test_the_end_points_of_a_space_with_a_window_are_its_own(frontier):
    """In a window the members gain half as much, so the line from (2, 0) to (0, 2) is at (1, 1)."""
    ends = [point("prediction", (1, 0), (2, 0), (2, 0)), point("prediction", (0, 1), (0, 2), (0, 2))]
    windowed = Frontier(["a", "b"], REWARDS, [*frontier.points, *ends])
    assert windowed.of("prediction") == [frontier.points[3], *ends]
    assert windowed.of("weights") == frontier.of("weights")
    assert windowed.of(MEMBERS) == list(frontier.points[:2])
    heights = {one.space: one.height.gain.mean for one in windowed.barriers() if one.reward == "warm"}
    assert heights == pytest.approx({"weights": 0.5, "prediction": 1.0 - 3.0})


def test_the_page_of_numbers(frontier):
    page = table(frontier, title="Two tastes", settings=["command: none"])
    lines = page.replace("\\", "").splitlines()
    assert any(line.startswith("| weights | 0.5-0.5 |  | +1.500 [") for line in lines)
    assert "| others | joint | yes | -1.000 [-1.000, -1.000] | +5.000 [+5.000, +5.000] |" in lines
    assert "| weights | 4, 1 |" in lines
    assert sum("| a and b |" in line for line in lines) == 4


def test_weights_on_the_simplex():
    assert simplex(2, 4) == [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]
    assert len(simplex(3, 4)) == 15
    assert all(sum(weights) == pytest.approx(1) for weights in simplex(3, 7))
    assert simplex(3, 1) == [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)]


def test_the_place_of_a_mixture(frontier):
    """Between (4, 0) at weights (1, 0) and the soup's mean (1.5, 1.5) at (0.5, 0.5), and towards the base at 0."""
    there = place(frontier, "weights", {"a": 0.75, "b": 0.25})
    assert there.gains == pytest.approx({"sharp": 2.75, "warm": 0.75})
    assert place(frontier, "weights", {"a": 0.8, "b": 0.2}).nearest.name == "a"
    soup = place(frontier, "weights", {"a": 0.45, "b": 0.55})
    assert (soup.nearest.space, soup.nearest.name) == ("weights", "0.5-0.5")
    assert place(frontier, "prediction", {"a": 0.5, "b": 0.5}).gains == pytest.approx({"sharp": 3.0, "warm": 3.0})
    half = place(frontier, "weights", {"a": 0.25, "b": 0.25, "base": 0.5})
    assert half.gains == pytest.approx({"sharp": 0.75, "warm": 0.75})
    assert place(frontier, "weights", {"base": 1.0}).gains == pytest.approx({"sharp": 0.0, "warm": 0.0})
    assert place(frontier, "weights", {"a": 1.4, "base": -0.4}).gains is None  # outside of what was evaluated
    assert place(frontier, "embedding", {"a": 1.0}) is None
    drawn = plots(frontier, "weights", {"a": 0.75, "b": 0.25})
    assert "this mixture, interpolated: 2.750, 0.750" in drawn
    assert "nearest:" not in plots(frontier, "embedding", {"a": 1.0})

"""The frontier of mixtures: which of them no other beats, how large the front is, and what a mixture costs.

Points are evaluations, read from their folders; objectives are rewards, their gains over the base are maximised. What a
single mixture reaches has the intervals of the ladder. Sets of points are measured with moocore, once for each run:

    non-dominated    no other point is at least as good in all objectives and better in one
    hypervolume      of the region between a reference point and the points of one space, members included
    attainment       the region that a share of the runs reaches (Grunert da Fonseca, Fonseca and Hall 2001)
    barrier          max over the edge between two members (w_i >= 0, sum 1) of sum_i w_i gain_i - gain(mixture),
                     Frankle et al. 2020

Deliberately not here: making mixtures.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkit.errors import ConfigError
from alignkit.escape import to_markdown
from alignkit.evaluation.ladder import ArmResult, points
from alignkit.evaluation.statistics import Bootstrap, Combined, Floats, combine_runs

MEMBERS = "members"  # the space of the members alone in all steps: the end points of spaces without a window
OTHERS = "others"  # of generators that are no mixture of the members
LEVELS = (0.0, 50.0, 100.0)  # percentiles of the attainment: what any, half, and all runs reach


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One mixture: its space, the weight of each member, and its evaluations, one a run."""

    space: str
    weights: tuple[float, ...]
    result: ArmResult

    @property
    def name(self) -> str:
        """As in the tables: the weights, or the name of a generator that is no mixture."""
        return self.result.name

    def gains(self, objectives: Sequence[str], run: int | None = None) -> Floats:
        """Mean gains [objectives], over all runs or of one."""
        combined = [self.result.rewards[name] for name in objectives]
        if run is None:
            return np.array([one.gain.mean for one in combined])
        row = self.result.runs.index(run)
        return np.array([one.runs[row] for one in combined])


@dataclass(frozen=True, slots=True)
class Barrier:
    """By how much the worst mixture between two members falls below the straight line between them; of one reward."""

    space: str
    ends: tuple[str, str]
    reward: str
    at: tuple[float, ...]
    height: Combined


@dataclass(frozen=True, slots=True)
class Frontier:
    """All points of a sweep; `members` are the names that weights refer to, `objectives` the axes."""

    members: Sequence[str]
    objectives: Sequence[str]
    points: Sequence[Point]

    @property
    def spaces(self) -> list[str]:
        """The spaces of the mixtures, in the order in which they were given."""
        found = dict.fromkeys(point.space for point in self.points)
        return [space for space in found if space not in (MEMBERS, OTHERS)]

    def of(self, space: str) -> list[Point]:
        """The points of a space, with the members alone where it has no end points of its own."""
        own = {point.weights for point in self.points if point.space == space}
        return [
            point
            for point in self.points
            if point.space == space or (point.space == MEMBERS and point.weights not in own)
        ]

    def non_dominated(self) -> list[Point]:
        """The points that no other beats, by their mean gains; the base, with gains of 0, is one of the others."""
        base = np.zeros((1, len(self.objectives)))
        values = np.concatenate([self._gains(self.points), base])
        kept = load_moocore().is_nondominated(values, maximise=True, keep_weakly=True)
        return [point for point, is_kept in zip(self.points, kept, strict=False) if is_kept]

    def runs(self, space: str) -> Mapping[int, Floats]:
        """By run the gains [points, objectives] of a space; only runs that all of its points have."""
        own = self.of(space)
        shared = set.intersection(*(set(point.result.runs) for point in own))
        return {run: self._gains(own, run) for run in sorted(shared)}

    def _gains(self, points: Sequence[Point], run: int | None = None) -> Floats:
        return np.stack([point.gains(self.objectives, run) for point in points])

    def hypervolumes(self) -> dict[str, list[float]]:
        """By space the hypervolume of each run, beside that of the members alone.

        The reference is the lowest gain of any point of any run in each objective, or 0 where that is lower.
        """
        by_space = {space: list(self.runs(space).values()) for space in (MEMBERS, *self.spaces)}
        every = np.concatenate([gains for runs in by_space.values() for gains in runs])
        lowest = np.minimum(every.min(0), 0.0)
        measure = functools.partial(load_moocore().hypervolume, ref=lowest, maximise=True)
        return {space: list(map(measure, runs)) for space, runs in by_space.items()}

    def attainment(self, space: str) -> dict[float, Floats]:
        """By percentile of `LEVELS` the corners [n, objectives] of what such a share of runs reaches; {} for one."""
        runs = self.runs(space)
        if len(runs) < 2 or len(self.objectives) not in (2, 3):
            return {}
        sets = np.repeat(np.arange(len(runs)), [len(own) for own in runs.values()])
        found = load_moocore().eaf(-np.concatenate(list(runs.values())), sets, percentiles=list(LEVELS))
        return {level: -found[found[:, -1] == level, :-1] for level in LEVELS}

    def barriers(self) -> list[Barrier]:
        """The largest barrier of every reward between every two members in every space that has points between them."""
        pairs = itertools.product(self.spaces, itertools.combinations(range(len(self.members)), 2))
        return [barrier for space, ends in pairs for barrier in self._barriers_between(space, ends)]

    def _barriers_between(self, space: str, ends: tuple[int, int]) -> list[Barrier]:
        points = {point.weights: point for point in self.of(space)}
        first, second = (points.get(tuple(row)) for row in np.eye(len(self.members))[list(ends)])
        between = [
            point
            for point in points.values()
            if tuple(np.flatnonzero(point.weights)) == ends
            and min(point.weights) >= 0
            and math.isclose(sum(point.weights), 1, abs_tol=1e-6)
        ]
        if first is None or second is None or not between:
            return []
        names, found = (self.members[ends[0]], self.members[ends[1]]), []
        for reward in first.result.rewards:
            heights = [_below_line(point, (first, second), ends, reward) for point in between]
            number = int(np.argmax([height.gain.mean for height in heights]))
            found.append(Barrier(space, names, reward, between[number].weights, heights[number]))
        return found


def _below_line(point: Point, between: tuple[Point, Point], ends: tuple[int, int], reward: str) -> Combined:
    """How far a mixture lies below the straight line between its end points, on the runs that all three have."""
    results = [one.result for one in (*between, point)]
    shared = sorted(set.intersection(*(set(result.runs) for result in results)))
    first, second, mixed = (result.gains[reward][np.searchsorted(result.runs, shared)] for result in results)
    line = point.weights[ends[0]] * first + point.weights[ends[1]] * second
    return combine_runs(line - mixed, Bootstrap(confidence=point.result.evaluation.confidence))


def simplex(members: int, parts: int) -> list[tuple[float, ...]]:
    """All weights of `members` members that are multiples of 1 / parts and sum to 1, end points included."""
    if members == 1:
        return [(1.0,)]
    found = []
    for bars in itertools.combinations(range(parts + members - 1), members - 1):
        edges = [-1, *bars, parts + members - 1]
        found.append(tuple((right - left - 1) / parts for left, right in itertools.pairwise(edges)))
    return sorted(found, reverse=True)


def table(frontier: Frontier, *, title: str, settings: Sequence[str]) -> str:
    """A Markdown page: every point with its intervals, hypervolumes, barriers."""
    first = frontier.points[0].result
    gold = first.evaluation.gold
    scales = {name: 100.0 if gold and name == gold.reward else 1.0 for name in first.rewards}
    names = [f"{to_markdown(name)}{' (points)' if scale > 1 else ''}" for name, scale in scales.items()]
    best = frontier.non_dominated()
    rows = []
    for point in frontier.points:
        gains = [_gain(point.result.rewards[name], scale) for name, scale in scales.items()]
        rows.append([point.space, to_markdown(point.name), "yes" if point in best else "", *gains])
    objectives = " and ".join(map(to_markdown, frontier.objectives))
    lines = [f"# {to_markdown(title)}", "", *(f"- {line}" for line in settings)]
    lines += [
        "",
        "Paired gains over the base, with intervals over prompts and runs. `front`: no other point, nor the base,",
    ]
    lines += [f"is at least as good in {objectives} and better in one of them.", ""]
    lines += _rows(["space", "weights", "front", *names], rows)
    volumes = [[space, ", ".join(map("{:.4g}".format, own))] for space, own in frontier.hypervolumes().items()]
    lines += ["", "Hypervolume, one number a run:", "", *_rows(["space", "hypervolume"], volumes)]
    barriers = []
    for one in frontier.barriers():
        at, ends = ":".join(map("{:.3g}".format, one.at)), " and ".join(one.ends)
        barriers.append(
            [one.space, to_markdown(ends), to_markdown(one.reward), at, _gain(one.height, scales[one.reward])]
        )
    if barriers:
        lines += ["", "Largest barrier between two members (above 0: the mixture is worse than the straight line):", ""]
        lines += _rows(["space", "between", "reward", "at", "barrier"], barriers)
    return "\n".join([*lines, ""])


def _gain(combined: Combined, scale: float) -> str:
    if scale > 1:
        return points(combined, scale)
    gain = combined.gain
    return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def load_moocore() -> Any:
    """The library that measures sets of points. Raises ConfigError where it is not installed."""
    try:
        import moocore
    except ImportError as error:
        raise ConfigError("a frontier is measured with moocore: pip install 'alignkit[frontier]'") from error
    return moocore

"""Where a mixture lies among the evaluated ones of a frontier: the nearest of them, and gains interpolated from them.

Gains are interpolated linearly over the weights of the members (a triangulation; for two members along the line
between neighbours). The base, of weights 0 and gains 0, is a point too. That is a guess: a frontier has barriers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import LinearNDInterpolator

from alignkit.evaluation.frontier import Frontier, Point
from alignkit.evaluation.frontier_page import plot
from alignkit.evaluation.statistics import Floats, Interval
from alignkit.evaluation.svg import Dot, Series

_INSIDE = 1 - 1e-9  # moves a mixture on the border of the evaluated ones into them, whatever its weights round to


@dataclass(frozen=True, slots=True)
class Place:
    """The evaluated mixture with the nearest weights, and gains by objective: None outside of all evaluated ones."""

    nearest: Point
    gains: Mapping[str, float] | None


def place(frontier: Frontier, space: str, weights: Mapping[str, float]) -> Place | None:
    """Where the mixture of `weights`, by the members' names, lies; None where the frontier has none of its space.

    Names that are no members of the frontier must have weight 0, but for the base, whose weight is not looked at.
    """
    points = frontier.of(space)
    if space not in frontier.spaces:
        return None
    here = np.array([weights.get(name, 0.0) for name in frontier.members])
    known = np.array([point.weights for point in points])
    nearest = points[int(np.linalg.norm(known - here, axis=1).argmin())]
    corners = np.concatenate([known, np.zeros((1, len(here)))])
    gains = np.stack([*(point.gains(frontier.objectives) for point in points), np.zeros(len(frontier.objectives))])
    found: Floats = LinearNDInterpolator(corners, gains)(here * _INSIDE)[0]
    inside = bool(np.isfinite(found).all())
    return Place(nearest, dict(zip(frontier.objectives, map(float, found), strict=True)) if inside else None)


def plots(frontier: Frontier, space: str, weights: Mapping[str, float]) -> str:
    """The panels of the frontier, as HTML, with the mixture of `weights`: a cross, and a ring at the nearest point."""
    here, panels = place(frontier, space, weights), []
    for axes in itertools.combinations(frontier.objectives, 2):
        marks, lines = [], []
        if here is not None:
            near = here.nearest
            x, y = (_exact(near.result.rewards[name].gain.mean) for name in axes)
            marks.append(Dot(f"nearest: {near.space} {near.name}", x, y, "ring", "ink"))
            if here.gains is not None:
                x, y = (_exact(here.gains[name]) for name in axes)
                marks.append(Dot("this mixture, interpolated", x, y, "cross", "ink"))
        if len(frontier.members) == 2 and space in frontier.spaces:
            ordered = sorted(frontier.of(space), key=lambda point: point.weights)
            on_line = [point.gains(axes) for point in ordered]
            lines.append(Series(space, [(float(x), float(y)) for x, y in on_line], "tuned"))
        panels.append(plot(frontier, axes, marks, lines))
    return "".join(panels)


def _exact(value: float) -> Interval:
    return Interval(value, math.nan, math.nan)

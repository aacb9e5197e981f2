"""The page of a frontier: Pareto plots with intervals and attainment, and the images of the mixtures side by side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from alignkit.escape import to_html
from alignkit.evaluation import page
from alignkit.evaluation.frontier import LEVELS, MEMBERS, OTHERS, Frontier, Point
from alignkit.evaluation.gallery import lead_reward
from alignkit.evaluation.ladder import points as in_points
from alignkit.evaluation.results import Pairs, read_pairs
from alignkit.evaluation.statistics import Floats
from alignkit.evaluation.svg import Dot, Series, compact, scatter_chart
from alignkit.media import clip_preview, decode_clip

_SHAPES = {"weights": "circle", "embedding": "square", "prediction": "triangle", MEMBERS: "diamond", OTHERS: "square"}
_DASHES = {"weights": "solid", "embedding": "dotted", "prediction": "dashed"}
_LEVEL_DASHES = dict(zip(LEVELS, ("dotted", "solid", "dashed"), strict=True))
_LEVEL_NAMES = dict(zip(LEVELS, ("any run", "half of the runs", "all runs"), strict=True))


def render(frontier: Frontier, folders: Mapping[str, Path], *, title: str, command: str, prompts: int = 4) -> str:
    """The page; `folders` are evaluations by the name `SPACE NAME` of their point, whose images are shown."""
    header = f'<header><p class="eyebrow">alignkit frontier</p><h1>{to_html(title)}</h1></header>'
    lead = "Each point is a mixture, with its gain over the base and intervals. Up and to the right is better."
    strips = "".join(_strip(frontier, space, folders, prompts) for space in frontier.spaces)
    note = "Equal prompts and seeds in every column; weights of the members in this order: " + ", ".join(
        frontier.members
    )
    parts = [
        page.section(
            "front", "The front", lead, f'<div class="charts wide">{_panels(frontier)}</div>' + _table(frontier)
        ),
        page.section("pictures", "Images", note, strips),
        page.section("setup", "Command", "", f"<pre>{to_html(command)}</pre>"),
    ]
    return page.document(title, header + "".join(parts))


def _panels(frontier: Frontier) -> str:
    """For every two objectives a panel of all points; of several spaces, each has one more with all that runs reach."""
    panels = []
    for axes in itertools.combinations(frontier.objectives, 2):
        panels.append(plot(frontier, axes))
        if len(frontier.spaces) > 1:
            panels += [plot(frontier, axes, space=one) for one in frontier.spaces if len(frontier.runs(one)) > 1]
    return "".join(panels)


def plot(
    frontier: Frontier,
    axes: tuple[str, str],
    marks: Sequence[Dot] = (),
    lines: Sequence[Series] = (),
    *,
    space: str | None = None,
) -> str:
    """A panel with all points, or those of one space, on two objectives; `marks` and `lines` are drawn beside them."""
    best, dots = frontier.non_dominated(), []
    points = frontier.points if space is None else frontier.of(space)
    for point in points:
        x, y = (point.result.rewards[name].gain for name in axes)
        tone = "good" if point in best else "quiet" if point.space == OTHERS else "tuned"
        dots.append(Dot(f"{point.space} {point.name}", x, y, _SHAPES[point.space], tone))
    reached, meaning = _reached(replace(frontier, objectives=axes), frontier.spaces if space is None else [space])
    spaces = dict.fromkeys(point.space for point in points)
    shown = "; ".join(f"{_SHAPES[one]}: {one}" for one in spaces)
    shown += f". Green: no other point is better in every objective.{meaning}"
    title = f"{axes[1]} against {axes[0]}{f', {space}' if space else ''}"
    chart = scatter_chart([*dots, *marks], [*reached, *lines], alt=title, names=axes)
    return page.panel(title, shown, chart)


def _reached(frontier: Frontier, spaces: Sequence[str]) -> tuple[list[Series], str]:
    """What the runs reach on the two objectives, as lines, and what the lines mean; of several spaces half of the runs.

    All levels of several spaces would be too many lines to tell apart.
    """
    levels = LEVELS if len(spaces) == 1 else (50.0,)
    lines, meaning = [], {}
    for space in spaces:
        for level, corners in frontier.attainment(space).items():
            if level in levels:
                name, dash = (_LEVEL_NAMES[level], _LEVEL_DASHES[level]) if len(levels) > 1 else (space, _DASHES[space])
                lines.append(Series(f"{space}, {_LEVEL_NAMES[level]}", _stairs(corners), "quiet", dash))
                meaning[dash] = name
    what = "the runs" if len(levels) > 1 else "half of the runs"
    legend = ", ".join(f"{dash}: {name}" for dash, name in meaning.items())
    return lines, f" Lines: what {what} reach ({legend})." if lines else ""


def _stairs(corners: Floats) -> list[tuple[float, float]]:
    """The border of the region below and left of the corners, from the left."""
    ordered = sorted((float(x), float(y)) for x, y in corners)
    steps = ordered[:1]
    for before, after in itertools.pairwise(ordered):
        steps += [(before[0], after[1]), after]
    return steps


def _table(frontier: Frontier) -> str:
    first = frontier.points[0].result
    gold = first.evaluation.gold.reward if first.evaluation.gold else None
    best, rows = frontier.non_dominated(), []
    for point in frontier.points:
        cells = []
        for name, combined in point.result.rewards.items():
            gain = combined.gain
            plain = f"{compact(gain.mean, signed=True)} [{compact(gain.low)}, {compact(gain.high)}]"
            cells.append(to_html(in_points(combined) if name == gold else plain))
        rows.append([to_html(f"{point.space} {point.name}"), "yes" if point in best else "", *cells])
    head = ["mixture", "front", *(f"{name}{', points' if name == gold else ''}" for name in first.rewards)]
    return page.table(head, rows, "Gains over the base with intervals over prompts and runs.")


def _strip(frontier: Frontier, space: str, folders: Mapping[str, Path], count: int) -> str:
    """Images of the first prompts: the base, then the mixtures of one space in order of their weights."""
    columns = sorted(frontier.of(space), key=lambda point: point.weights, reverse=True)
    pairs = {point: read_pairs(folders[f"{point.space} {point.name}"]) for point in columns}
    first = pairs[columns[0]]
    rows = list(range(0, len(first.prompts), first.seeds_per_prompt))[:count]
    shown = {"base": _media(first, "base", rows, columns[0])}
    shown |= {point.name: _media(own, "tuned", rows, point) for point, own in pairs.items()}
    lines = []
    for row in rows:
        cells = [page.picture(images[row], f"{name}: {first.prompts[row].text}") for name, images in shown.items()]
        lines.append([to_html(first.prompts[row].text), *cells])
    lead = lead_reward(columns[0].result.evaluation)
    gains = [compact(point.result.rewards[lead].gain.mean, signed=True) for point in columns]
    lines.append([to_html(f"gain of {lead}"), to_html(compact(0.0)), *map(to_html, gains)])
    return page.table(["prompt", *shown], lines, f"Mixtures of {space}, first training seed.")


def _media(pairs: Pairs, side: str, rows: Sequence[int], point: Point) -> dict[int, bytes]:
    media = pairs.media(side, rows)
    if pairs.modality == "image":
        return media
    fps = point.result.evaluation.sampling.fps
    return {row: clip_preview(decode_clip(data, f"{side} video {row}"), fps) for row, data in media.items()}

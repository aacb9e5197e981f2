"""Scenes of the sandbox: coloured shapes on a dark ground, drawn analytically on 64 x 64 pixels.

A `Spec` is the meaning of a caption, a `Scene` the content of one image. Not here: captions (`captions.py`), analysis
of images (`gold.py`). Every random choice takes a numpy Generator, so a scene is a function of its seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

SIZE = 64
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PALETTE = {
    "red": (225, 45, 40),
    "green": (45, 175, 65),
    "blue": (60, 100, 245),
    "yellow": (245, 220, 50),
    "purple": (190, 70, 220),
    "cyan": (60, 215, 220),
    "white": (240, 240, 240),
}
BACKGROUNDS = {"black": (10, 10, 12), "gray": (70, 70, 74), "navy": (14, 18, 62), "brown": (62, 36, 20)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# Per category, the share of captions that an image contradicts in the last stage of a policy's training, which can
# generate correct images before it. Chosen so that the policy fails as large generators do: often at binding, counting
# and positions, rarely at single objects.
POLICY_NOISE: Mapping[str, float] = {
    "single_object": 0.05,
    "two_object": 0.5,
    "counting": 0.6,
    "colors": 0.2,
    "position": 0.7,
    "color_attr": 0.6,
}

# The same for the flow policy: guidance 2.5 makes up for the shares above.
FLOW_NOISE: Mapping[str, float] = {
    "single_object": 0.05,
    "two_object": 0.6,
    "counting": 0.7,
    "colors": 0.25,
    "position": 0.8,
    "color_attr": 0.7,
}

# How often training draws each category once the easy ones are learnt.
HARD: Mapping[str, float] = {
    "single_object": 0.5,
    "two_object": 1.5,
    "counting": 1.5,
    "colors": 0.5,
    "position": 2.0,
    "color_attr": 2.0,
}


@dataclass(frozen=True, slots=True)
class Spec:
    """The meaning of a caption. `kinds` holds (shape, colour or None) of every object, in caption order."""

    category: str
    kinds: tuple[tuple[str, str | None], ...]
    relation: str | None = None
    background: str | None = None


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn object: centre (x, y) and radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of an image."""

    things: tuple[Thing, ...]
    background: str


def distance(shape: str, x: NDArray[np.float32], y: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
    """Signed distance in pixels to the outline (negative inside); all shapes have about the same visual size."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.74 * radius) - 0.26 * radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "cross":
        arm, width = radius, 0.32 * radius
        upright = np.maximum(np.abs(x) - width, np.abs(y) - arm)
        return np.minimum(upright, np.maximum(np.abs(x) - arm, np.abs(y) - width))
    if shape == "triangle":
        slope = np.float32(np.sqrt(0.2))  # unit normal (2, -1)/sqrt(5) of a side of slope 2
        side = (2 * np.abs(x) - (y + radius)) * slope
        return np.maximum(side, y - 0.8 * radius)
    raise ValueError(f"unknown shape '{shape}'; known: {', '.join(SHAPES)}")


_GRID_Y, _GRID_X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def coverage(thing: Thing) -> NDArray[np.float32]:
    """Share of each pixel [64, 64] that the object covers (one pixel of anti-aliasing)."""
    outside = distance(thing.shape, _GRID_X - thing.x, _GRID_Y - thing.y, thing.radius)
    return np.clip(0.5 - outside, 0.0, 1.0)


def render(scene: Scene, rng: np.random.Generator) -> NDArray[np.float32]:
    """Float image [64, 64, 3] in [0, 1]; the brightness of ground and objects varies a little, as in photographs."""
    image = np.empty((SIZE, SIZE, 3), np.float32)
    image[:] = np.array(BACKGROUNDS[scene.background], np.float32) * rng.uniform(0.85, 1.15)
    for thing in scene.things:
        color = np.array(PALETTE[thing.color], np.float32) * rng.uniform(0.9, 1.04)
        alpha = coverage(thing)[..., None]
        image = image * (1 - alpha) + color * alpha
    return np.clip(image / 255, 0, 1).astype(np.float32)


def _place(count: int, rng: np.random.Generator, relation: str | None) -> list[tuple[float, float, float]]:
    """Non-overlapping (x, y, radius) for `count` objects; the first two obey `relation`."""
    low, high = ((8.0, 12.5) if count == 1 else (7.0, 10.5)) if count <= 2 else (5.8, 8.2)
    while True:
        radius = rng.uniform(low, high, count)
        x, y = (rng.uniform(radius + 2, SIZE - radius - 2) for _ in range(2))
        gap = np.hypot(x[:, None] - x, y[:, None] - y) - 1.2 * (radius[:, None] + radius) - 2
        if count > 1 and gap[np.triu_indices(count, 1)].min() < 0:
            continue
        if relation is None or _obeys(x[0] - x[1], y[0] - y[1], relation, margin=1.4):
            return list(zip(x.tolist(), y.tolist(), radius.tolist(), strict=True))


def _obeys(dx: float, dy: float, relation: str, margin: float) -> bool:
    """Whether the offset along `relation` is positive and more than `margin` times the offset across it."""
    ux, uy = RELATIONS[relation]
    along, across = dx * ux + dy * uy, abs(dx * uy) + abs(dy * ux)
    return along > margin * across


def compose(spec: Spec, rng: np.random.Generator) -> Scene:
    """One scene that shows `spec`; what the caption does not determine is random."""
    same_kind = spec.category == "counting"
    shared = str(rng.choice(list(PALETTE)))
    things = []
    for (shape, color), (x, y, radius) in zip(spec.kinds, _place(len(spec.kinds), rng, spec.relation), strict=True):
        free = shared if same_kind else str(rng.choice(list(PALETTE)))
        things.append(Thing(shape, color or free, x, y, radius))
    return Scene(tuple(things), spec.background or str(rng.choice(list(BACKGROUNDS))))


def contradict(spec: Spec, rng: np.random.Generator) -> Spec:
    """A spec that contradicts `spec` as wrong captions of web images do: another count, side, colour or shape."""
    if spec.category == "counting":
        wrong = int(rng.choice([n for n in (1, 2, 3, 4, 5) if abs(n - len(spec.kinds)) == 1]))
        return replace(spec, kinds=(spec.kinds[0],) * wrong)
    if spec.category == "position":
        return replace(spec, relation=str(rng.choice([name for name in RELATIONS if name != spec.relation])))
    if spec.category == "color_attr":
        (shape_a, color_a), (shape_b, color_b) = spec.kinds
        leak = color_a if rng.random() < 0.3 else color_b
        return replace(spec, kinds=((shape_a, leak), (shape_b, color_a)))
    if spec.category == "colors":
        shape, color = spec.kinds[0]
        return replace(spec, kinds=((shape, _other(tuple(PALETTE), color, rng)),))
    index = int(rng.integers(len(spec.kinds)))
    shape, color = spec.kinds[index]
    kinds = list(spec.kinds)
    if spec.category == "two_object" and rng.random() < 0.5:
        del kinds[index]
    else:
        kinds[index] = (_other(SHAPES, shape, rng), color)
    return replace(spec, kinds=tuple(kinds))


def _other(names: tuple[str, ...], name: str | None, rng: np.random.Generator) -> str:
    return str(rng.choice([candidate for candidate in names if candidate != name]))

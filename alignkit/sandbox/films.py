"""Clips for the video generator: one or two coloured shapes on 32 x 32 pixels, of which at most one moves.

A `FilmSpec` is the meaning of a caption, a `Film` the content of a clip; `compose` draws a film that shows a spec,
`glitch` adds faults that last a few frames. Not here: captions (`film_captions.py`), analysis of pixels
(`film_gold.py`), and the clips about which the vision-language model is asked (`clips.py`). Every random choice takes a
numpy Generator, so a film is a function of its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from alignkit.sandbox import scenes
from alignkit.sandbox.clips import DIRECTIONS

SIZE, FRAMES, FPS = 32, 33, 8
# One segment per latent frame of a causal codec of temporal ratio 4; the first frame belongs to the first segment.
SEGMENTS = ((0, 5), *((start, start + 4) for start in range(5, FRAMES, 4)))
SHAPES = ("square", "ring", "cross")  # the ones that differ most at this size
COLORS = ("red", "green", "blue", "yellow", "white")
SPEEDS = {"slowly": (5.0, 8.0), "quickly": (12.0, 17.0)}  # pixels from the first frame to the last
GROUND = (18, 18, 22)
RADII = {1: (5.0, 6.5), 2: (4.6, 5.6)}  # by number of objects
FAULTS = ("color", "shape", "vanish", "double")
FAULT_FRAMES = (3, 6)  # a fault lasts at least and at most so many frames
MARGIN = 1.0  # pixels between an object and the border of the image
GAP = 2.0  # pixels between two objects


@dataclass(frozen=True, slots=True)
class FilmSpec:
    """The meaning of a caption. `kinds` holds (shape, colour) of every object, the one that moves first if any does."""

    kinds: tuple[tuple[str, str], ...]
    direction: str | None = None  # None: nothing moves
    speed: str | None = None


@dataclass(frozen=True, slots=True)
class Actor:
    """One drawn object in the frames [start, end): its centre is (x, y) of each frame [FRAMES], in pixels."""

    shape: str
    color: str
    radius: float
    x: NDArray[np.float32]
    y: NDArray[np.float32]
    start: int = 0
    end: int = FRAMES


@dataclass(frozen=True, slots=True)
class Film:
    """The content of a clip."""

    actors: tuple[Actor, ...]


def render(film: Film, rng: np.random.Generator) -> NDArray[np.float32]:
    """Float frames [33, 32, 32, 3] in [0, 1]; brightness is drawn once a clip, so nothing flickers."""
    frames = np.empty((FRAMES, SIZE, SIZE, 3), np.float32)
    frames[:] = np.array(GROUND, np.float32) / 255 * np.float32(rng.uniform(0.7, 1.3))
    light = dict(zip(COLORS, rng.uniform(0.92, 1.04, len(COLORS)), strict=True))
    for actor in film.actors:
        color = np.clip(np.array(scenes.PALETTE[actor.color]) / 255 * light[actor.color], 0, 1).astype(np.float32)
        rows, columns = (_span(track, actor.radius) for track in (actor.y, actor.x))
        region = frames[actor.start : actor.end, rows, columns]
        region += _coverage(actor, rows, columns)[..., None] * (color - region)
    return frames


def _span(track: NDArray[np.float32], radius: float) -> slice:
    """The pixels of one axis that an object on `track` can cover."""
    return slice(max(0, int(track.min() - radius) - 1), min(SIZE, int(track.max() + radius) + 2))


def _coverage(actor: Actor, rows: slice, columns: slice) -> NDArray[np.float32]:
    """Share of each pixel [end - start, rows, columns] that the object covers; of one frame if it stands still."""
    is_still = np.ptp(actor.x) + np.ptp(actor.y) == 0
    frames = slice(actor.start, actor.start + 1 if is_still else actor.end)
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5 - actor.y[frames, None, None]
    x = np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - actor.x[frames, None, None]
    return np.clip(0.5 - scenes._distance(actor.shape, x, y, actor.radius), 0, 1)


def compose(spec: FilmSpec, rng: np.random.Generator) -> Film:
    """One film that shows `spec`; sizes, places and the exact path are random."""
    while True:
        low, high = RADII[len(spec.kinds)]
        actors = []
        for index, (shape, color) in enumerate(spec.kinds):
            radius = float(rng.uniform(low, high))
            direction = spec.direction if index == 0 else None
            length = float(rng.uniform(*SPEEDS[spec.speed])) if direction and spec.speed else 0.0
            actors.append(Actor(shape, color, radius, *_path(direction, length, radius, rng)))
        if len(actors) == 1 or not touch(*actors):
            return Film(tuple(actors))


def _path(
    direction: str | None, length: float, radius: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """x and y [FRAMES] of a straight path of `length` pixels that stays inside the image."""
    ux, uy = DIRECTIONS[direction] if direction else (0, 0)
    share = np.linspace(-0.5, 0.5, FRAMES, dtype=np.float32)
    edge = radius + MARGIN
    places = []
    for along in (ux, uy):
        half = abs(along) * length / 2
        centre = rng.uniform(edge + half, SIZE - edge - half)
        places.append(np.float32(centre) + np.float32(along * length) * share)
    return places[0], places[1]


def touch(one: Actor, other: Actor) -> bool:
    """Whether two objects come nearer than GAP in a frame that shows both."""
    frames = slice(max(one.start, other.start), min(one.end, other.end))
    apart = np.maximum(np.abs(one.x - other.x), np.abs(one.y - other.y))[frames]
    return bool((apart < one.radius + other.radius + GAP).any())


def glitch(film: Film, count: float, rng: np.random.Generator) -> Film:
    """`film` with `count` faults on average, each of FAULT_FRAMES frames at one of its objects.

    An object gets another colour or shape, vanishes, or is there twice. The faults of a clip do not overlap in time,
    so where no frame is left there are fewer. Their number is Poisson distributed.
    """
    actors, taken = list(film.actors), np.zeros(FRAMES, bool)
    for _ in range(int(rng.poisson(count))):
        length = int(rng.integers(FAULT_FRAMES[0], FAULT_FRAMES[1] + 1))
        start = int(rng.integers(0, FRAMES - length + 1))
        kind, chosen = str(rng.choice(FAULTS)), int(rng.integers(len(film.actors)))
        if taken[max(start - 2, 0) : start + length + 2].any():
            continue
        taken[start : start + length] = True
        key = film.actors[chosen]
        index = next(i for i, actor in enumerate(actors) if _plays(actor, key, start))
        actors[index : index + 1] = _faulty(actors[index], kind, (start, start + length), film, rng)
    return Film(tuple(actors))


def _plays(actor: Actor, key: Actor, frame: int) -> bool:
    return actor.x is key.x and actor.start <= frame < actor.end


def _faulty(
    actor: Actor, kind: str, span: tuple[int, int], film: Film, rng: np.random.Generator
) -> list[Actor]:
    """The pieces of `actor`, of which those in the frames `span` show the fault."""
    start, end = span
    during = replace(actor, start=start, end=end)
    around = [replace(actor, end=start), replace(actor, start=end)]
    if kind == "vanish":
        pieces = around
    elif kind == "double":
        pieces = [actor, *_copies(during, film, rng)]
    else:
        shown = {thing.color for thing in film.actors} if kind == "color" else {actor.shape}
        names = [name for name in (COLORS if kind == "color" else SHAPES) if name not in shown]
        pieces = [*around, replace(during, **{kind: str(rng.choice(names))})]
    return [piece for piece in pieces if piece.start < piece.end]


def _copies(actor: Actor, film: Film, rng: np.random.Generator) -> Sequence[Actor]:
    """A second copy of `actor` in a free place; none where the image has no room for it."""
    edge = actor.radius + MARGIN
    for _ in range(30):
        place = rng.uniform(edge, SIZE - edge, 2).astype(np.float32)
        copy = replace(actor, x=np.full(FRAMES, place[0]), y=np.full(FRAMES, place[1]))
        if not any(touch(copy, thing) for thing in film.actors):
            return [copy]
    return []

"""Clips for the video generator: one or two coloured shapes on 32 x 32 pixels, of which at most one moves.

A `FilmSpec` is the meaning of a caption, a `Film` the content of a clip; `compose` draws a film that shows a spec,
`glitch` adds faults that last a few frames. Not here: captions (`film_captions.py`), analysis of pixels
(`film_gold.py`), and the clips about which the vision-language model is asked (`clips.py`). Every random choice takes a
numpy Generator, so a film is a function of its seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def render(film: Film, rng: np.random.Generator, start: int = 0, end: int = FRAMES) -> NDArray[np.float32]:
    """Float frames [end - start, 32, 32, 3] in [0, 1]; brightness is drawn once a clip, so nothing flickers."""
    frames = np.empty((end - start, SIZE, SIZE, 3), np.float32)
    frames[:] = np.array(GROUND, np.float32) / 255 * np.float32(rng.uniform(0.7, 1.3))
    light = dict(zip(COLORS, rng.uniform(0.92, 1.04, len(COLORS)), strict=True))
    for whole in film.actors:
        actor = replace(whole, start=max(whole.start, start), end=min(whole.end, end))
        if actor.start < actor.end:
            _draw(actor, frames[actor.start - start : actor.end - start], light[actor.color])
    return frames


def _draw(actor: Actor, frames: NDArray[np.float32], light: float) -> None:
    """Draw the object into `frames`, those in which it is there; only pixels that it can reach are computed."""
    color = np.clip(np.array(scenes.PALETTE[actor.color]) / 255 * light, 0, 1).astype(np.float32)
    box = []
    for track in (actor.y[actor.start : actor.end], actor.x[actor.start : actor.end]):
        low, high = track.min() - actor.radius, track.max() + actor.radius
        box.append(slice(max(0, int(low) - 1), min(SIZE, int(high) + 2)))
    region = frames[:, box[0], box[1]]
    region += _coverage(actor, box[0], box[1])[..., None] * (color - region)


def _coverage(actor: Actor, rows: slice, columns: slice) -> NDArray[np.float32]:
    """Share of each pixel [end - start, rows, columns] that the object covers; of one frame if it stands still."""
    is_still = np.ptp(actor.x) + np.ptp(actor.y) == 0
    frames = slice(actor.start, actor.start + 1 if is_still else actor.end)
    places = np.arange(SIZE, dtype=np.float32) + np.float32(0.5)
    y = places[rows, None] - actor.y[frames, None, None]
    x = places[columns] - actor.x[frames, None, None]
    return np.asarray(np.clip(0.5 - scenes.distance(actor.shape, x, y, actor.radius), 0, 1))


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


def crowd(count: int, rng: np.random.Generator) -> Film:
    """A film of `count` objects that move in any direction and may cover each other: what an autoencoder learns from.

    Most pixels of a composed film are ground, from which it learns nothing.
    """
    actors = []
    for _ in range(count):
        radius = float(rng.uniform(RADII[2][0], RADII[1][1]))
        direction = str(rng.choice(list(DIRECTIONS)))
        length = float(rng.uniform(0, SPEEDS["quickly"][1]))
        shape, color = str(rng.choice(SHAPES)), str(rng.choice(COLORS))
        actors.append(Actor(shape, color, radius, *_path(direction, length, radius, rng)))
    return Film(tuple(actors))


def touch(one: Actor, other: Actor) -> bool:
    """Whether two objects come nearer than GAP in a frame that shows both."""
    frames = slice(max(one.start, other.start), min(one.end, other.end))
    apart = np.maximum(np.abs(one.x - other.x), np.abs(one.y - other.y))[frames]
    return bool((apart < one.radius + other.radius + GAP).any())


def contradict(spec: FilmSpec, rng: np.random.Generator) -> FilmSpec:
    """A spec that differs from `spec` in one thing: a colour, a shape, the direction, the speed or the number."""
    changes = ["color", "shape", "number", *(["direction", "speed"] if spec.direction else [])]
    change = str(rng.choice(changes))
    if change == "direction":
        return replace(spec, direction=_other(DIRECTIONS, spec.direction, rng))
    if change == "speed":
        return replace(spec, speed=_other(SPEEDS, spec.speed, rng))
    kinds = list(spec.kinds)
    index = int(rng.integers(len(kinds)))
    shape, color = kinds[index]
    if change == "number" and len(kinds) == 2:
        return FilmSpec((kinds[0],), spec.direction, spec.speed)
    if change == "number":
        return replace(spec, kinds=(*kinds, (_other(SHAPES, shape, rng), _other(COLORS, color, rng))))
    kinds[index] = (shape, _other(COLORS, color, rng)) if change == "color" else (_other(SHAPES, shape, rng), color)
    return replace(spec, kinds=tuple(kinds))


def _other(names: Iterable[str], name: str | None, rng: np.random.Generator) -> str:
    return str(rng.choice([known for known in names if known != name]))


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
        pieces = (i for i, actor in enumerate(actors) if actor.x is key.x and actor.start <= start < actor.end)
        index = next(pieces)
        actors[index : index + 1] = _faulty(actors[index], kind, (start, start + length), film, rng)
    return Film(tuple(actors))


def _faulty(actor: Actor, kind: str, span: tuple[int, int], film: Film, rng: np.random.Generator) -> list[Actor]:
    """The pieces of `actor`, of which those in the frames `span` show the fault."""
    start, end = span
    during = replace(actor, start=start, end=end)
    around = [replace(actor, end=start), replace(actor, start=end)]
    if kind == "vanish":
        pieces = around
    elif kind == "double":
        pieces = [actor, *_copies(during, film, rng)]
    else:
        by_color, by_shape = _other(COLORS, actor.color, rng), _other(SHAPES, actor.shape, rng)
        wrong = replace(during, color=by_color) if kind == "color" else replace(during, shape=by_shape)
        pieces = [*around, wrong]
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


def cells(film: Film, patch: int = 8) -> NDArray[np.int64]:
    """For each latent frame and patch [9, 4, 4] the number (from 1) of the actor that covers over 1/5 of it, or 0.

    Latent frame k shows the pixel frames 4 k - 3 to 4 k; the place is that of frame 4 k - 2, of the first frame 0.
    """
    side, chosen = SIZE // patch, np.array([0, *range(2, FRAMES, 4)])
    shares = np.full((1 + len(film.actors), len(chosen), side, side), 0.2, np.float32)
    for row, actor in enumerate(film.actors, start=1):
        frames = replace(actor, x=actor.x[chosen], y=actor.y[chosen], start=0, end=len(chosen))
        covered = _coverage(frames, slice(0, SIZE), slice(0, SIZE))
        shares[row] = covered.reshape(-1, side, patch, side, patch).mean((2, 4))
    return np.asarray(shares.argmax(0))

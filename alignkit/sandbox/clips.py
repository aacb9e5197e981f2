"""Short clips of the sandbox's shapes in motion: one object glides in a straight line, the others stand still.

A `Motion` is what can be asked of a clip; item i of a dataset is a function of its seed. Not here: reading clips.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from alignkit.sandbox.scenes import SIZE, Scene, Thing, coverage, render

FRAMES, FPS = 8, 8
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True, slots=True)
class Motion:
    """Which object of a scene moves where; `direction` is None where nothing moves. `pixels` is the whole way."""

    thing: int
    direction: str | None
    pixels: float


def move(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Motion]:
    """The first frame and a motion that keeps the object inside and clear of the others; one clip in six is still."""
    for _ in range(0 if rng.random() < 1 / 6 else 50):
        index = int(rng.integers(len(scene.things)))
        direction = str(rng.choice(list(DIRECTIONS)))
        motion = Motion(index, direction, float(rng.uniform(10, 24)))
        started = _back(scene, motion)
        if _is_clear(started, motion):
            return started, motion
    return scene, Motion(0, None, 0.0)


def _back(scene: Scene, motion: Motion) -> Scene:
    """The scene half a way before, so that motions start and end all over the image."""
    return at(scene, motion, -0.5)


def at(scene: Scene, motion: Motion, share: float) -> Scene:
    """The scene when `share` of the way is gone."""
    if motion.direction is None:
        return scene
    ux, uy = DIRECTIONS[motion.direction]
    thing = scene.things[motion.thing]
    moved = replace(thing, x=thing.x + ux * motion.pixels * share, y=thing.y + uy * motion.pixels * share)
    return replace(scene, things=(*scene.things[: motion.thing], moved, *scene.things[motion.thing + 1 :]))


def _is_clear(scene: Scene, motion: Motion) -> bool:
    """Whether no frame cuts the mover off at the border or lets it touch another object."""
    for share in np.linspace(0, 1, FRAMES):
        things = at(scene, motion, float(share)).things
        mover = things[motion.thing]
        if not all(mover.radius + 1 <= place <= SIZE - mover.radius - 1 for place in (mover.x, mover.y)):
            return False
        if any(_touch(mover, other) for other in things if other is not mover):
            return False
    return True


def _touch(one: Thing, other: Thing) -> bool:
    return bool(np.hypot(one.x - other.x, one.y - other.y) < 1.2 * (one.radius + other.radius))


def film(scene: Scene, motion: Motion, rng: np.random.Generator, frames: int = FRAMES) -> NDArray[np.float32]:
    """Float frames [frames, 64, 64, 3] in [0, 1]; brightness is drawn once a clip, for nothing flickers."""
    light = int(rng.integers(2**31))
    shares = np.linspace(0, 1, frames)
    return np.stack([render(at(scene, motion, float(share)), np.random.default_rng(light)) for share in shares])


def covers(scene: Scene, patch: int = 8) -> NDArray[np.int64]:
    """For each patch [SIZE / patch, SIZE / patch] the object, from 1, that covers a quarter of it and more, or 0."""
    side = SIZE // patch
    shares = np.full((1 + len(scene.things), side, side), 0.25, np.float32)
    for row, thing in enumerate(scene.things, start=1):
        shares[row] = coverage(thing).reshape(side, patch, side, patch).mean((1, 3))
    return shares.argmax(0)

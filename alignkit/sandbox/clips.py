"""Short clips of the sandbox's shapes: one object moves in a straight line, the others stand still.

Questions about a clip are about its `Motion`. Every random choice takes a numpy Generator. Not here: reading clips.
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
    """The moving object's index in a scene, its direction (None if nothing moves) and the distance in `pixels`."""

    thing: int
    direction: str | None
    pixels: float


def move(scene: Scene, rng: np.random.Generator) -> tuple[Scene, Motion]:
    """The first scene and a motion in which the object stays inside and touches no other; one in six has no motion."""
    for _ in range(0 if rng.random() < 1 / 6 else 50):
        index = int(rng.integers(len(scene.things)))
        direction = str(rng.choice(list(DIRECTIONS)))
        motion = Motion(index, direction, float(rng.uniform(10, 24)))
        started = _back(scene, motion)
        if _is_clear(started, motion):
            return started, motion
    return scene, Motion(0, None, 0.0)


def _back(scene: Scene, motion: Motion) -> Scene:
    """The scene half the distance earlier, so that motions start and end anywhere in the image."""
    return at(scene, motion, -0.5)


def at(scene: Scene, motion: Motion, share: float) -> Scene:
    """The scene after `share` of the distance."""
    if motion.direction is None:
        return scene
    ux, uy = DIRECTIONS[motion.direction]
    thing = scene.things[motion.thing]
    moved = replace(thing, x=thing.x + ux * motion.pixels * share, y=thing.y + uy * motion.pixels * share)
    return replace(scene, things=(*scene.things[: motion.thing], moved, *scene.things[motion.thing + 1 :]))


def _is_clear(scene: Scene, motion: Motion) -> bool:
    """Whether in every frame the moving object is inside the image and touches no other object."""
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
    """Float frames [frames, 64, 64, 3] in [0, 1]; brightness is drawn once a clip, so nothing flickers."""
    light_seed = int(rng.integers(2**31))
    shares = np.linspace(0, 1, frames)
    return np.stack([render(at(scene, motion, float(share)), np.random.default_rng(light_seed)) for share in shares])


def covers(scene: Scene, patch: int = 8) -> NDArray[np.int64]:
    """For each patch [SIZE / patch, SIZE / patch] the number (from 1) of the object that covers over 1/4, or 0."""
    side = SIZE // patch
    shares = np.full((1 + len(scene.things), side, side), 0.25, np.float32)
    for row, thing in enumerate(scene.things, start=1):
        shares[row] = coverage(thing).reshape(side, patch, side, patch).mean((1, 3))
    return shares.argmax(0)

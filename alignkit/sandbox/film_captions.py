"""The captions of the sandbox's clips and their inverse.

    caption = ["a clip of"] phrase [joint phrase]
    phrase  = "a" colour shape (moving | still)
    moving  = ("moves" | "moving" | "slides" | "sliding") direction speed | speed ("moves" | "moving") direction
    still   = "stands still" | "standing still" | "does not move" | "that does not move"
    joint   = "and" | "while" | "beside"

After "a clip of" the forms in -ing and "that" stand, else the others. Of two objects one or none moves, in either
order. `parse` recovers the full meaning.
"""

from __future__ import annotations

import itertools
import re
from typing import Literal

import numpy as np

from alignkit.errors import ConfigError, DataError
from alignkit.records import Prompt
from alignkit.sandbox.clips import DIRECTIONS
from alignkit.sandbox.films import COLORS, SHAPES, SPEEDS, FilmSpec
from alignkit.seeds import derive_seed

CATEGORIES = ("one_moving", "one_still", "two_moving", "two_still")
FREQUENCIES = (4 / 9, 1 / 18, 4 / 9, 1 / 18)  # of the categories in training, see `random_spec`
_TRIES = 2_000  # for a new prompt of one category
Split = Literal["training", "held_out"]
SPLITS: tuple[Split, Split] = ("training", "held_out")
PREFIXES = ("", "a clip of ")
MOVING = (
    ("moves {direction} {speed}", "slides {direction} {speed}", "{speed} moves {direction}"),
    ("moving {direction} {speed}", "sliding {direction} {speed}", "{speed} moving {direction}"),
)
STILL = (("stands still", "does not move"), ("standing still", "that does not move"))
JOINTS = (("and", "while"), ("and", "beside"))
TOKENS = 19  # "a clip of a red ring that does not move beside a blue cross that does not move", and an end marker

_MOTION = re.compile(
    rf"^(?:(?:mov|slid)(?:es|ing) ({'|'.join(DIRECTIONS)}) ({'|'.join(SPEEDS)})"
    rf"|({'|'.join(SPEEDS)}) mov(?:es|ing) ({'|'.join(DIRECTIONS)}))$"
)
_PHRASE = re.compile(rf"^a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) (.*)$")
_JOINT = re.compile(r" (?:and|while|beside) (?=a )")
_STILL = {words for form in STILL for words in form}
WORDS = tuple(
    dict.fromkeys(
        word
        for text in (*PREFIXES, *itertools.chain(*STILL, *JOINTS), "moves slides moving sliding", "a")
        for word in [*text.split(), *COLORS, *SHAPES, *DIRECTIONS, *SPEEDS]
    )
)


def specs() -> list[FilmSpec]:
    """Every meaning, in a fixed order: one object or two that differ in shape and colour, at rest or with a motion."""
    kinds = list(itertools.product(SHAPES, COLORS))
    pairs = [(a, b) for a, b in itertools.permutations(kinds, 2) if a[0] != b[0] and a[1] != b[1]]
    groups = [*((kind,) for kind in kinds), *pairs]
    motions = list(itertools.product(DIRECTIONS, SPEEDS))
    moving = [FilmSpec(group, *motion) for group in groups for motion in motions]
    return moving + [FilmSpec(group) for group in groups if group == tuple(sorted(group))]


_SPECS = specs()


def random_spec(rng: np.random.Generator, pairs: float = 0.5, still: float = 1 / 9) -> FilmSpec:
    """A meaning for training: the share `pairs` has two objects, the share `still` has no motion."""
    a, b = int(rng.integers(len(SHAPES))), int(rng.integers(len(COLORS)))
    kinds = [(SHAPES[a], COLORS[b])]
    if rng.random() < pairs:
        other = (a + 1 + int(rng.integers(len(SHAPES) - 1))) % len(SHAPES)
        tint = (b + 1 + int(rng.integers(len(COLORS) - 1))) % len(COLORS)
        kinds.append((SHAPES[other], COLORS[tint]))
    if rng.random() < still:
        return FilmSpec(tuple(sorted(kinds)))
    return FilmSpec(tuple(kinds), str(rng.choice(list(DIRECTIONS))), str(rng.choice(list(SPEEDS))))


def word(spec: FilmSpec, rng: np.random.Generator) -> str:
    """`spec` in one of its wordings."""
    form = int(rng.integers(2))
    moving, still, joint = (str(rng.choice(choices[form])) for choices in (MOVING, STILL, JOINTS))
    phrases = []
    for index, (shape, color) in enumerate(spec.kinds):
        moves = spec.direction is not None and index == 0
        what = moving.format(direction=spec.direction, speed=spec.speed) if moves else still
        phrases.append(f"a {color} {shape} {what}")
    order = rng.permutation(len(phrases))
    return PREFIXES[form] + f" {joint} ".join(phrases[index] for index in order)


def parse(text: str) -> FilmSpec:
    """The meaning of a caption. Raises DataError for a text outside the grammar."""
    body = text.removeprefix("a clip of ")
    kinds, motions = [], []
    for part in _JOINT.split(body):
        phrase = _PHRASE.match(part)
        motion = _MOTION.match(phrase.group(3)) if phrase else None
        if phrase is None or (motion is None and phrase.group(3) not in _STILL):
            raise DataError(f"'{text}' is no caption of a sandbox clip; try 'a red ring moves left slowly'")
        color, shape, _ = phrase.groups()
        kinds.append((shape, color))
        motions.append(motion and (motion.group(1) or motion.group(4), motion.group(2) or motion.group(3)))
    moving = [(index, motion) for index, motion in enumerate(motions) if motion]
    if len(kinds) > 2 or len(moving) > 1:
        raise DataError(f"'{text}': a sandbox clip has one or two objects, of which at most one moves")
    if not moving:
        return FilmSpec(tuple(sorted(kinds)))
    mover, (direction, speed) = moving[0]
    return FilmSpec((kinds[mover], *kinds[:mover], *kinds[mover + 1 :]), direction, speed)


def split_of(spec: FilmSpec) -> Split:
    """The half of all meanings that `spec` is in, so that no training shows the meaning of a held-out prompt."""
    return SPLITS[derive_seed("film-halves", repr(spec)) % 2]


def spec_in(split: Split | None, rng: np.random.Generator) -> FilmSpec:
    """A random meaning of one split, or of both; categories are as frequent as in training."""
    while True:
        spec = random_spec(rng)
        if split is None or split_of(spec) == split:
            return spec


def prompts(count: int, *, seed: int, split: Split | None = None) -> list[Prompt]:
    """Up to `count` different prompts; half have two objects, one in nine has no motion, as in training.

    Prompts of one meaning have different wordings: there are only 15 meanings of one object at rest. `split` is the
    half of the meanings: "training" or "held_out"; None for both.
    """
    require_split(split)
    rng = np.random.default_rng(derive_seed("film-prompts", seed))
    chosen: dict[str, Prompt] = {}
    for _ in range(count):
        wanted = str(rng.choice(CATEGORIES, p=FREQUENCIES))
        for _ in range(_TRIES):
            spec = spec_in(split, rng)
            text = word(spec, rng)
            category = CATEGORIES[2 * (len(spec.kinds) - 1) + (spec.direction is None)]
            if category == wanted and text not in chosen:
                chosen[text] = Prompt.from_text(text, category=category)
                break
    return list(chosen.values())


def require_split(split: str | None) -> None:
    """ConfigError for the name of no split."""
    if split is not None and split not in SPLITS:
        raise ConfigError(f"split is '{split}'; use {SPLITS[0]} or {SPLITS[1]}, or leave it out")

"""The caption grammar of the sandbox, in the six categories of GenEval, and its inverse.

    caption    = [photo] body [ground]
    photo      = "a photo of" | "a picture of" | "a drawing of"
    ground     = "on a" background "background"
    body       = "a" shape | "a" colour shape | "a" shape "and a" shape | number [colour] shapes
               | "a" shape relation "a" shape | "a" colour shape "and a" colour shape

`parse` recovers the full meaning, so a prompt's text is all that the gold verifier needs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import numpy as np

from alignkit.errors import DataError
from alignkit.records import Prompt
from alignkit.sandbox.scenes import BACKGROUNDS, CATEGORIES, PALETTE, RELATIONS, SHAPES, Spec
from alignkit.seeds import derive_seed

NUMBERS = {"two": 2, "three": 3, "four": 4}
PREFIXES = ("", "a photo of ", "a picture of ", "a drawing of ")

_COLOR = rf"(?:({'|'.join(PALETTE)}) )?"
_SHAPE = rf"({'|'.join(SHAPES)})"
_PHOTO = re.compile(r"^(?:a (?:photo|picture|drawing) of )?(.*?)(?: on a (\w+) background)?$")
_ONE = re.compile(rf"^a {_COLOR}{_SHAPE}$")
_MANY = re.compile(rf"^({'|'.join(NUMBERS)}) {_COLOR}({'|'.join(SHAPES)})(?:e?s)$")
_PAIR = re.compile(rf"^a {_COLOR}{_SHAPE} (and|{'|'.join(RELATIONS)}) a {_COLOR}{_SHAPE}$")


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def bodies(category: str) -> list[str]:
    """Every body of a category, in a fixed order."""
    pairs = list(itertools.permutations(SHAPES, 2))
    if category == "single_object":
        return [f"a {shape}" for shape in SHAPES]
    if category == "colors":
        return [f"a {color} {shape}" for color in PALETTE for shape in SHAPES]
    if category == "two_object":
        return [f"a {a} and a {b}" for a, b in pairs]
    if category == "position":
        return [f"a {a} {relation} a {b}" for relation in RELATIONS for a, b in pairs]
    if category == "color_attr":
        colors = itertools.permutations(PALETTE, 2)
        return [f"a {c} {a} and a {d} {b}" for (c, d), (a, b) in itertools.product(colors, pairs)]
    if category == "counting":
        tints = ["", *(f"{color} " for color in PALETTE)]
        return [f"{n} {tint}{_plural(shape)}" for n in NUMBERS for tint in tints for shape in SHAPES]
    raise DataError(f"unknown category '{category}'; known: {', '.join(CATEGORIES)}")


def captions(category: str) -> list[str]:
    """Every caption of a category: bodies x prefixes x grounds."""
    grounds = ["", *(f" on a {name} background" for name in BACKGROUNDS)]
    return [f"{pre}{body}{ground}" for body in bodies(category) for pre in PREFIXES for ground in grounds]


def parse(text: str) -> Spec:
    """The meaning of a caption. Raises DataError for a text outside the grammar."""
    photo = _PHOTO.match(text)
    body, ground = (photo.group(1), photo.group(2)) if photo else (text, None)
    if match := _ONE.match(body):
        color, shape = match.groups()
        return Spec("colors" if color else "single_object", ((shape, color),), None, ground)
    if match := _MANY.match(body):
        number, color, shape = match.groups()
        return Spec("counting", ((shape, color),) * NUMBERS[number], None, ground)
    if match := _PAIR.match(body):
        color_a, a, joint, color_b, b = match.groups()
        relation = None if joint == "and" else joint
        category = "position" if relation else "color_attr" if color_a else "two_object"
        return Spec(category, ((a, color_a), (b, color_b)), relation, ground)
    raise DataError(f"'{text}' is no sandbox caption; try 'a photo of three red circles' or 'a cross above a ring'")


def prompts(count: int, *, seed: int, weights: dict[str, float] | None = None) -> list[Prompt]:
    """Up to `count` distinct prompts; categories are drawn with equal probability, or by `weights`."""
    rng = np.random.default_rng(derive_seed("sandbox-prompts", seed))
    pools = {category: list(rng.permutation(captions(category))) for category in CATEGORIES}
    share = np.array([(weights or {}).get(category, 1.0) for category in CATEGORIES])
    chosen: list[Prompt] = []
    while len(chosen) < count and any(pools.values()):
        left = np.array([bool(pools[category]) for category in CATEGORIES]) * share
        category = CATEGORIES[int(rng.choice(len(CATEGORIES), p=left / left.sum()))]
        chosen.append(Prompt.from_text(str(pools[category].pop()), category=category))
    return chosen


def random_caption(rng: np.random.Generator, weights: Mapping[str, float] | None = None) -> str:
    """One caption for training; the category is drawn first (by `weights`), so large categories do not dominate."""
    share = None if weights is None else np.array([weights[category] for category in CATEGORIES])
    category = str(rng.choice(list(CATEGORIES), p=None if share is None else share / share.sum()))
    return str(rng.choice(PREFIXES)) + _random_body(category, rng) + _random_ground(rng)


def _random_ground(rng: np.random.Generator) -> str:
    name = str(rng.choice(["", *BACKGROUNDS]))
    return f" on a {name} background" if name else ""


_BODIES = {category: bodies(category) for category in CATEGORIES}


def _random_body(category: str, rng: np.random.Generator) -> str:
    return _BODIES[category][int(rng.integers(len(_BODIES[category])))]

"""Questions with answers about scenes and clips: the sandbox's vision-language model is trained and tested on them.

Yes/no questions are balanced and their negatives are near misses (the colour of another object, one object more, the
opposite side). Not here: the model (`vlm.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alignkit.sandbox.captions import _plural, parse, random_caption
from alignkit.sandbox.clips import DIRECTIONS, Motion
from alignkit.sandbox.raters import marks
from alignkit.sandbox.scenes import CATEGORIES, PALETTE, RELATIONS, SHAPES, Scene, Thing, _obeys, compose, contradict

COUNTS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
SHOWS = 'Does this figure show "{}"? Please answer Yes or No.'  # VQAScore's words
OBJECT = "Is there a {}?"
COLOR = "Is the {} {}?"
NUMBER = "Is the number of {} {}?"
ALL = "objects"  # in NUMBER; `vlm_corrections` knows this word, `vlm` does not
RELATION = "Is the {} {} the {}?"
MOVING, WAY = "Is the {} moving?", "Is the {} moving {}?"
BETTER = 'Which picture shows "{}" better? Answer first or second.'
SHARES = dict(zip(CATEGORIES, (0.5, 1.0, 2.0, 0.5, 1.5, 1.5), strict=True))  # more of those with more questions
YES_NO = ("object", "color", "count", "relation", "motion", "caption")
OPEN = ("what_color", "how_many", "which_way", "what_shows")


@dataclass(frozen=True, slots=True)
class Question:
    """`kind` is one of YES_NO, OPEN or "pair"."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Subject:
    """A scene, its motion if it is a clip, and a caption that it may contradict.

    `near`: where the scene has two colours, the share of wrong colours that are the colour of another object. To know
    which colours the scene has does not help to reject those.
    """

    scene: Scene
    caption: str
    is_shown: bool
    motion: Motion | None = None
    near: float = 0.5


def subject(rng: np.random.Generator, near: float = 0.5) -> Subject:
    """A scene and a random caption; half of all scenes contradict their caption."""
    caption = random_caption(rng, SHARES)
    is_shown = bool(rng.random() < 0.5)
    spec = parse(caption)
    return Subject(compose(spec if is_shown else contradict(spec, rng), rng), caption, is_shown, near=near)


def ask(about: Subject, rng: np.random.Generator, count: int) -> list[Question]:
    """`count` questions of different kinds, as far as the subject allows."""
    kinds = [kind for kind in _MAKERS if (kind in ("motion", "which_way")) <= (about.motion is not None)]
    made = (_MAKERS[str(kind)](about, rng) for kind in rng.permutation(kinds))
    possible = [question for question in made if question is not None]
    possible.sort(key=lambda question: question.kind not in ("relation", "motion", "which_way"))  # rare ones first
    return possible[:count]


def pair(rng: np.random.Generator) -> tuple[Scene, Scene, str, Question]:
    """(first scene, second scene, caption, question): one scene shows the caption, the other contradicts it."""
    caption = random_caption(rng)
    spec = parse(caption)
    right, wrong = compose(spec, rng), compose(contradict(spec, rng), rng)
    is_first = rng.random() < 0.5
    question = Question("pair", BETTER.format(caption), "first" if is_first else "second")
    return (right, wrong, caption, question) if is_first else (wrong, right, caption, question)


def stands(first: Thing, second: Thing, relation: str) -> bool:
    """Whether `first` is clearly in this `relation` to `second`: "left of", "above" and so on."""
    return _obeys(first.x - second.x, first.y - second.y, relation, margin=1.4)


def _yes(truth: bool) -> str:  # noqa: FBT001 - the only argument
    return "Yes" if truth else "No"


def _coin(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


def _pick(rng: np.random.Generator, names: list[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _thing(about: Subject, rng: np.random.Generator) -> Thing:
    return about.scene.things[int(rng.integers(len(about.scene.things)))]


def _unique(about: Subject) -> list[Thing]:
    """Objects whose shape occurs once, so the shape identifies them."""
    counts = Counter(thing.shape for thing in about.scene.things)
    return [thing for thing in about.scene.things if counts[thing.shape] == 1]


def _object(about: Subject, rng: np.random.Generator) -> Question:
    """Is there a circle? Is there a red circle? For "No" the scene has no such object, but may have its colour."""
    truth, thing = _coin(rng), _thing(about, rng)
    if _coin(rng):
        absent = [shape for shape in SHAPES if shape not in {other.shape for other in about.scene.things}]
        shape = thing.shape if truth else _pick(rng, absent)
        return Question("object", OBJECT.format(shape), _yes(truth))
    shown = list(dict.fromkeys((other.shape, other.color) for other in about.scene.things))  # a set has no order
    near = [(shape, color) for shape, _ in shown for _, color in shown if (shape, color) not in shown]
    other = [(thing.shape, color) for color in PALETTE if (thing.shape, color) not in shown]
    wrong = near if near and rng.random() < about.near else other
    shape, color = (thing.shape, thing.color) if truth else wrong[int(rng.integers(len(wrong)))]
    return Question("object", OBJECT.format(f"{color} {shape}"), _yes(truth))


def _color(about: Subject, rng: np.random.Generator) -> Question | None:
    if not (unique := _unique(about)):
        return None
    truth, thing = _coin(rng), unique[int(rng.integers(len(unique)))]
    near = [other.color for other in about.scene.things if other.color != thing.color]
    wrong = near if near and rng.random() < about.near else [color for color in PALETTE if color != thing.color]
    color = thing.color if truth else _pick(rng, wrong)
    return Question("color", COLOR.format(thing.shape, color), _yes(truth))


def _count(about: Subject, rng: np.random.Generator) -> Question:
    truth, shape = _coin(rng), _thing(about, rng).shape
    count = sum(thing.shape == shape for thing in about.scene.things)
    return _number(_plural(shape), count, rng, truth=truth)


def number_of_all(count: int, rng: np.random.Generator) -> Question:
    """Whether the number of all objects is `count`, or one more or less, for which the answer is No."""
    return _number(ALL, count, rng, truth=_coin(rng))


def _number(things: str, count: int, rng: np.random.Generator, *, truth: bool) -> Question:
    if not truth:
        count = int(rng.choice([other for other in COUNTS if abs(other - count) == 1]))
    return Question("count", NUMBER.format(things, COUNTS[count]), _yes(truth))


def _relation(about: Subject, rng: np.random.Generator) -> Question | None:
    unique = _unique(about)
    if len(unique) < 2 or about.motion is not None:  # motion changes positions
        return None
    first, second = (unique[int(i)] for i in rng.permutation(len(unique))[:2])
    true = [name for name in RELATIONS if stands(first, second, name)]
    if not true:
        return None
    truth = _coin(rng)
    name = true[0] if truth else _pick(rng, [name for name in RELATIONS if name != true[0]])
    return Question("relation", RELATION.format(first.shape, name, second.shape), _yes(truth))


def _caption(about: Subject, rng: np.random.Generator) -> Question | None:  # noqa: ARG001 - all makers have one signature
    if about.motion is not None and parse(about.caption).relation is not None:  # motion changes positions
        return None
    return Question("caption", SHOWS.format(about.caption), _yes(about.is_shown))


def _mover(about: Subject) -> tuple[Motion, str] | None:
    """The motion and the shape of the moving object, if that shape occurs once; else None."""
    motion = about.motion
    if motion is None or motion.direction is None:
        return None
    thing = about.scene.things[motion.thing]
    return (motion, thing.shape) if thing in _unique(about) else None


def _motion(about: Subject, rng: np.random.Generator) -> Question | None:
    """Is the circle moving left? Is the circle moving?"""
    if _coin(rng) and (mover := _mover(about)):
        motion, shape = mover
        truth = _coin(rng)
        way = motion.direction if truth else _pick(rng, [name for name in DIRECTIONS if name != motion.direction])
        return Question("motion", WAY.format(shape, way), _yes(truth))
    if not (unique := _unique(about)) or about.motion is None:
        return None
    thing, motion = unique[int(rng.integers(len(unique)))], about.motion
    moves = motion.direction is not None and about.scene.things[motion.thing] is thing
    return Question("motion", MOVING.format(thing.shape), _yes(moves))


def _which_way(about: Subject, rng: np.random.Generator) -> Question | None:  # noqa: ARG001 - as above
    mover = _mover(about)
    return mover and Question("which_way", f"Which way is the {mover[1]} moving?", str(mover[0].direction))


def _what_color(about: Subject, rng: np.random.Generator) -> Question | None:
    if not (unique := _unique(about)):
        return None
    thing = unique[int(rng.integers(len(unique)))]
    return Question("what_color", f"What color is the {thing.shape}?", thing.color)


def _how_many(about: Subject, rng: np.random.Generator) -> Question:
    shape = _thing(about, rng).shape
    count = sum(thing.shape == shape for thing in about.scene.things)
    return Question("how_many", f"How many {_plural(shape)} are there?", COUNTS[count])


def _what_shows(about: Subject, rng: np.random.Generator) -> Question:  # noqa: ARG001 - as above
    """All objects from left to right; equal ones are named together with their number."""
    things = sorted(about.scene.things, key=lambda thing: thing.x)
    kinds = Counter((thing.shape, thing.color) for thing in things)
    named = [
        f"a {color} {shape}" if n == 1 else f"{COUNTS[n]} {color} {_plural(shape)}"
        for (shape, color), n in kinds.items()
    ]
    return Question("what_shows", "What does the picture show?", " and ".join(named))


_MAKERS: dict[str, Callable[[Subject, np.random.Generator], Question | None]] = {
    "object": _object,
    "color": _color,
    "count": _count,
    "relation": _relation,
    "motion": _motion,
    "caption": _caption,
    "what_color": _what_color,
    "how_many": _how_many,
    "which_way": _which_way,
    "what_shows": _what_shows,
}


# Facts that a word can refer to in an image, and the number of classes of each. For the name of a shape: the colour of
# its object (the last two classes: no object, several objects), the object's side of the only other object, and its
# motion (the last class: none). For a plural: the count. For the name of a colour: the shape of its object.
HEADS = {
    "color": len(PALETTE) + 2,
    "side": len(RELATIONS),
    "way": len(DIRECTIONS) + 1,
    "count": 6,
    "shape": len(SHAPES) + 2,
}
MEANT = (*SHAPES, *map(_plural, SHAPES), *PALETTE)
NOUNS = (*SHAPES, *map(_plural, SHAPES), "background")


def meanings(scene: Scene, motion: Motion | None = None) -> dict[str, dict[str, int]]:
    """What every word of MEANT refers to in an image or clip: head -> class, for the heads that apply.

    Sides and not absolute positions: the vision tower encodes relative positions only, because the ground is uniform.
    """
    colors, shapes = list(PALETTE), list(SHAPES)
    meant: dict[str, dict[str, int]] = {}
    for shape in SHAPES:
        own = [thing for thing in scene.things if thing.shape == shape]
        meant[_plural(shape)] = {"count": len(own)}
        meant[shape] = {"color": _only([colors.index(thing.color) for thing in own], len(colors))}
        if len(own) == 1:
            meant[shape] |= whereabouts(scene, own[0], motion)
    for color in colors:
        own = [thing for thing in scene.things if thing.color == color]
        meant[color] = {"shape": _only([shapes.index(thing.shape) for thing in own], len(shapes))}
    return meant


def phrases(caption: str, scene: Scene) -> list[int]:
    """For each noun of a caption, 1 if `scene` shows the words from the previous noun up to this one, else 0.

    A causal network can decide only at the noun whether "two", "red" or "left of a" is true.
    """
    shown, least = [], 1.0
    for word, mark in zip(caption.split(), marks(caption, scene), strict=True):
        least = least if mark < 0 else min(least, mark)
        if word in NOUNS:
            shown.append(int(least))
            least = 1.0
    return shown


def _only(kinds: list[int], count: int) -> int:
    """The only element of `kinds`; `count` if it is empty, `count` + 1 if it has several."""
    return kinds[0] if len(kinds) == 1 else count + bool(kinds)


def whereabouts(scene: Scene, thing: Thing, motion: Motion | None) -> dict[str, int]:
    """The side of `thing` relative to the only other object; in a clip the direction in which `thing` moves."""
    if motion is not None:
        is_mover = motion.direction is not None and scene.things[motion.thing] is thing
        return {"way": list(DIRECTIONS).index(str(motion.direction)) if is_mover else len(DIRECTIONS)}
    others = [other for other in scene.things if other is not thing]
    sides = [n for n, name in enumerate(RELATIONS) if len(others) == 1 and stands(thing, others[0], name)]
    return {"side": sides[0]} if sides else {}

"""Questions with answers about scenes and clips of the sandbox: what its vision-language model learns and is asked.

Yes/no questions are balanced and their negatives are near misses (the other object's colour, one object more, the
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
BETTER = 'Which picture shows "{}" better? Answer first or second.'
SHARES = dict(zip(CATEGORIES, (0.5, 1.0, 2.0, 0.5, 1.5, 1.5), strict=True))  # more of what has more to ask
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
    """A scene, how it moves where it is a clip, and a caption that it may contradict.

    `near` is the share of wrong colours, where there are two, that are another object's: knowing which colours there
    are tells those from right ones no better than chance.
    """

    scene: Scene
    caption: str
    is_shown: bool
    motion: Motion | None = None
    near: float = 0.5


def subject(rng: np.random.Generator, near: float = 0.5) -> Subject:
    """A scene of a random caption, which half of all scenes contradict."""
    caption = random_caption(rng, SHARES)
    is_shown = bool(rng.random() < 0.5)
    spec = parse(caption)
    return Subject(compose(spec if is_shown else contradict(spec, rng), rng), caption, is_shown, near=near)


def ask(about: Subject, rng: np.random.Generator, count: int) -> list[Question]:
    """`count` questions of different kinds, as far as the subject allows."""
    kinds = [kind for kind in _MAKERS if (kind in ("motion", "which_way")) <= (about.motion is not None)]
    made = (_MAKERS[str(kind)](about, rng) for kind in rng.permutation(kinds))
    found = [question for question in made if question is not None]
    found.sort(key=lambda question: question.kind not in ("relation", "motion", "which_way"))  # what few can tell
    return found[:count]


def pair(rng: np.random.Generator) -> tuple[Scene, Scene, str, Question]:
    """Two scenes of which one shows a caption and one contradicts it, the caption, and which it is."""
    caption = random_caption(rng)
    spec = parse(caption)
    right, wrong = compose(spec, rng), compose(contradict(spec, rng), rng)
    is_first = rng.random() < 0.5
    question = Question("pair", BETTER.format(caption), "first" if is_first else "second")
    return (right, wrong, caption, question) if is_first else (wrong, right, caption, question)


def stands(first: Thing, second: Thing, relation: str) -> bool:
    """Whether `first` clearly stands so from `second`: "left of", "above" and so on."""
    return _obeys(first.x - second.x, first.y - second.y, relation, margin=1.4)


def _yes(truth: bool) -> str:  # noqa: FBT001 - the one thing it is about
    return "Yes" if truth else "No"


def _coin(rng: np.random.Generator) -> bool:
    return bool(rng.random() < 0.5)


def _pick(rng: np.random.Generator, names: list[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _thing(about: Subject, rng: np.random.Generator) -> Thing:
    return about.scene.things[int(rng.integers(len(about.scene.things)))]


def _unique(about: Subject) -> list[Thing]:
    """Objects that their shape alone names."""
    counts = Counter(thing.shape for thing in about.scene.things)
    return [thing for thing in about.scene.things if counts[thing.shape] == 1]


def _object(about: Subject, rng: np.random.Generator) -> Question:
    """Is there a circle? Is there a red circle? A wrong one has the other's colour, or is nowhere."""
    truth, thing = _coin(rng), _thing(about, rng)
    if _coin(rng):
        absent = [shape for shape in SHAPES if shape not in {other.shape for other in about.scene.things}]
        shape = thing.shape if truth else _pick(rng, absent)
        return Question("object", f"Is there a {shape}?", _yes(truth))
    shown = list(dict.fromkeys((other.shape, other.color) for other in about.scene.things))  # a set has no order
    near = [(shape, color) for shape, _ in shown for _, color in shown if (shape, color) not in shown]
    other = [(thing.shape, color) for color in PALETTE if (thing.shape, color) not in shown]
    wrong = near if near and rng.random() < about.near else other
    shape, color = (thing.shape, thing.color) if truth else wrong[int(rng.integers(len(wrong)))]
    return Question("object", f"Is there a {color} {shape}?", _yes(truth))


def _color(about: Subject, rng: np.random.Generator) -> Question | None:
    if not (unique := _unique(about)):
        return None
    truth, thing = _coin(rng), unique[int(rng.integers(len(unique)))]
    near = [other.color for other in about.scene.things if other.color != thing.color]
    wrong = near if near and rng.random() < about.near else [color for color in PALETTE if color != thing.color]
    color = thing.color if truth else _pick(rng, wrong)
    return Question("color", f"Is the {thing.shape} {color}?", _yes(truth))


def _count(about: Subject, rng: np.random.Generator) -> Question:
    truth, shape = _coin(rng), _thing(about, rng).shape
    count = sum(thing.shape == shape for thing in about.scene.things)
    if not truth:
        count = int(rng.choice([other for other in COUNTS if abs(other - count) == 1]))
    return Question("count", f"Is the number of {_plural(shape)} {COUNTS[count]}?", _yes(truth))


def _relation(about: Subject, rng: np.random.Generator) -> Question | None:
    unique = _unique(about)
    if len(unique) < 2 or about.motion is not None:  # likewise
        return None
    first, second = (unique[int(i)] for i in rng.permutation(len(unique))[:2])
    true = [name for name in RELATIONS if stands(first, second, name)]
    if not true:
        return None
    truth = _coin(rng)
    name = true[0] if truth else _pick(rng, [name for name in RELATIONS if name != true[0]])
    return Question("relation", f"Is the {first.shape} {name} the {second.shape}?", _yes(truth))


def _caption(about: Subject, rng: np.random.Generator) -> Question | None:  # noqa: ARG001 - makers are called alike
    if about.motion is not None and parse(about.caption).relation is not None:  # where a mover stands changes
        return None
    return Question("caption", SHOWS.format(about.caption), _yes(about.is_shown))


def _mover(about: Subject) -> tuple[Motion, str] | None:
    """The motion and the mover's shape, where the shape names it."""
    motion = about.motion
    if motion is None or motion.direction is None:
        return None
    thing = about.scene.things[motion.thing]
    return (motion, thing.shape) if thing in _unique(about) else None


def _motion(about: Subject, rng: np.random.Generator) -> Question | None:
    """Is the circle moving left? Is the circle moving?"""
    if _coin(rng) and (found := _mover(about)):
        motion, shape = found
        truth = _coin(rng)
        way = motion.direction if truth else _pick(rng, [name for name in DIRECTIONS if name != motion.direction])
        return Question("motion", f"Is the {shape} moving {way}?", _yes(truth))
    if not (unique := _unique(about)) or about.motion is None:
        return None
    thing, motion = unique[int(rng.integers(len(unique)))], about.motion
    moves = motion.direction is not None and about.scene.things[motion.thing] is thing
    return Question("motion", f"Is the {thing.shape} moving?", _yes(moves))


def _which_way(about: Subject, rng: np.random.Generator) -> Question | None:  # noqa: ARG001 - as above
    found = _mover(about)
    return found and Question("which_way", f"Which way is the {found[1]} moving?", str(found[0].direction))


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
    """Everything there is, from left to right; equal neighbours are counted."""
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


# What a word can mean in an image, and how many answers there are: of a shape's word the colour of its object (none
# and several come last), its side of the only other object and its motion (none last); of a plural the number; of a
# colour's word the shape of its object.
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
    """What every word of MEANT means in an image or clip: head -> answer, for the heads that apply.

    Sides rather than places: the eyes know relative places only, for a blank ground looks the same all over.
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
    """For each noun of a caption, 1 if `scene` shows what is said since the noun before, else 0.

    A network that reads from left to right knows no sooner whether "two", "red" or "left of a" is true.
    """
    shown, least = [], 1.0
    for word, mark in zip(caption.split(), marks(caption, scene), strict=True):
        least = least if mark < 0 else min(least, mark)
        if word in NOUNS:
            shown.append(int(least))
            least = 1.0
    return shown


def _only(kinds: list[int], count: int) -> int:
    """The one kind there is, or `count` for none and `count` + 1 for several objects."""
    return kinds[0] if len(kinds) == 1 else count + bool(kinds)


def whereabouts(scene: Scene, thing: Thing, motion: Motion | None) -> dict[str, int]:
    """Its side: where `thing` stands from the only other object; in a clip its way: where it goes."""
    if motion is not None:
        is_mover = motion.direction is not None and scene.things[motion.thing] is thing
        return {"way": list(DIRECTIONS).index(str(motion.direction)) if is_mover else len(DIRECTIONS)}
    others = [other for other in scene.things if other is not thing]
    sides = [n for n, name in enumerate(RELATIONS) if len(others) == 1 and stands(thing, others[0], name)]
    return {"side": sides[0]} if sides else {}

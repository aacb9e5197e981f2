"""Simulated raters of different taste, and pairs of rendered images that they compare.

A rater looks at the scene graph of rendered images, weighs what it cares for and answers with Bradley-Terry noise.
Nobody here sees a generated image or asks the gold verifier: that is what makes the heads proxies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.utils.data import Dataset

from alignkit.sandbox.captions import NUMBERS, _plural, parse, random_caption
from alignkit.sandbox.scenes import PALETTE, SHAPES, Scene, Spec, _obeys, compose, contradict, render
from alignkit.sandbox.worlds import centres, to_tensor
from alignkit.seeds import derive_seed

# What each rater cares for; the unit is log-odds of preferring an image that has it fully over one that lacks it.
TASTES: Mapping[str, Mapping[str, float]] = {
    "careful": {"count": 3.0, "shapes": 4.0, "colors": 3.0, "relation": 3.0, "clean": 2.5, "big": 0.3, "dark": 0.0},
    "showy": {"count": 1.2, "shapes": 2.5, "colors": 2.5, "relation": 0.6, "clean": 3.0, "big": 2.5, "dark": 1.0},
}


def features(spec: Spec, scene: Scene, clean: float) -> dict[str, float]:
    """What raters can care for, each in [0, 1]: does `scene` show `spec`, and is it pleasant?"""
    wanted, drawn = Counter(shape for shape, _ in spec.kinds), Counter(thing.shape for thing in scene.things)
    tinted = [(shape, color) for shape, color in spec.kinds if color]
    have = Counter((thing.shape, thing.color) for thing in scene.things)
    matched = sum((Counter(tinted) & have).values()) / len(tinted) if tinted else 1.0
    return {
        "count": float(len(scene.things) == len(spec.kinds)),
        "shapes": sum((wanted & drawn).values()) / max(wanted.total(), drawn.total()),
        "colors": matched,
        "relation": float(spec.relation is None or _stands(spec, scene)),
        "clean": clean,
        "big": float(np.clip((np.mean([thing.radius for thing in scene.things]) - 5.5) / 6, 0, 1)),
        "dark": float(scene.background == "black"),
    }


def _stands(spec: Spec, scene: Scene) -> bool:
    places = {thing.shape: thing for thing in scene.things}
    if spec.relation is None or any(shape not in places for shape, _ in spec.kinds):
        return False
    first, second = (places[shape] for shape, _ in spec.kinds)
    return _obeys(first.x - second.x, first.y - second.y, spec.relation, margin=1.0)


def _flawed(picture: NDArray[np.float32], ghost: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """An image with the flaws generators make: two half-drawn scenes at once, blur, or melted outlines."""
    kind = rng.integers(3)
    if kind == 0:
        share = np.float32(rng.uniform(0.25, 0.5))
        return picture * (1 - share) + ghost * share
    if kind == 1:
        return np.asarray(ndimage.gaussian_filter(picture, (rng.uniform(1.0, 2.5),) * 2 + (0,)), np.float32)
    bend = [ndimage.gaussian_filter(rng.normal(0, 1, picture.shape[:2]), 3) * 25 for _ in range(2)]
    grid = np.mgrid[0 : picture.shape[0], 0 : picture.shape[1]]
    places = [grid[0] + bend[0], grid[1] + bend[1]]
    channels = [ndimage.map_coordinates(picture[..., c], places, order=1, mode="nearest") for c in range(3)]
    return np.stack(channels, -1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Judged:
    """One side of a comparison: an image [64, 64, 3] and what can be said of it."""

    picture: NDArray[np.float32]
    scene: Scene
    features: Mapping[str, float]


def _side(spec: Spec, rng: np.random.Generator) -> Judged:
    """An image for a caption: faithful in half of all cases, else contradicted once or twice; sometimes flawed."""
    shown = spec
    for _ in range(int(rng.choice([0, 1, 2], p=[0.5, 0.4, 0.1]))):
        shown = contradict(shown, rng) if _can_contradict(shown) else shown
    if len(shown.kinds) < 4 and rng.random() < 0.12:
        shown = replace(shown, kinds=(*shown.kinds, shown.kinds[-1]), relation=None)
    scene = compose(shown, rng)
    picture, clean = render(scene, rng), 1.0
    if rng.random() < 0.25:
        picture, clean = _flawed(picture, render(compose(shown, rng), rng), rng), 0.0
    # A trace of blur and noise, as an autoencoder leaves, so that sharpness of rendering is not what heads go by.
    picture = ndimage.gaussian_filter(picture, (rng.uniform(0, 0.6),) * 2 + (0,))
    picture = np.clip(picture + rng.normal(0, 0.015, picture.shape), 0, 1).astype(np.float32)
    return Judged(picture, scene, features(spec, scene, clean))


def _can_contradict(spec: Spec) -> bool:
    full = {"color_attr": 2, "position": 2, "two_object": 2}
    return len(spec.kinds) >= full.get(spec.category, 1)


ASPECTS = ("count", "shapes", "colors", "relation", "clean")


def marks(text: str, scene: Scene) -> list[float]:
    """For each word of a caption, 1 if `scene` shows what it says, 0 if not, -1 for words that say nothing alone."""
    spec, words = parse(text), text.split()
    shapes = {_plural(shape): shape for shape in SHAPES} | {shape: shape for shape in SHAPES}
    drawn = Counter((thing.shape, thing.color) for thing in scene.things)
    counts = Counter(thing.shape for thing in scene.things)
    marked = []
    for index, word in enumerate(words):
        following = next((shapes[later] for later in words[index:] if later in shapes), "")
        if word in shapes:
            marked.append(float(counts[shapes[word]] > 0))
        elif words[index + 1 : index + 2] == ["background"]:
            marked.append(float(scene.background == word))
        elif word in PALETTE:
            marked.append(float(drawn[following, word] > 0))
        elif word in NUMBERS:
            marked.append(float(counts[following] == NUMBERS[word]))
        elif spec.relation is not None and word == spec.relation.split()[0]:
            marked.append(float(_stands(spec, scene)))
        else:
            marked.append(-1.0)
    return marked


class Readings(Dataset[dict[str, Any]]):
    """`size` images with what annotators say of each: its objects, a mark for every word, the aspects in [0, 1].

    `marks` is aligned with the tokens (a begin marker, then one a word) and -1 where there is nothing to say; the first
    of `answers` is whether the image is faithful in every respect, the others are ASPECTS.
    """

    def __init__(self, size: int, seed: int, tokens: int) -> None:
        self.size, self.seed, self.tokens = size, seed, tokens

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(derive_seed("reading", self.seed, index))
        text = random_caption(rng)
        side = _side(parse(text), rng)
        aspects = [side.features[name] for name in ASPECTS]
        line = torch.full((self.tokens,), -1.0)
        line[1 : 1 + len(text.split())] = torch.tensor(marks(text, side.scene))
        faithful = float(min(aspects[:-1]) == 1.0)
        pixels, labels = to_tensor(side.picture), centres(side.scene)
        answers = torch.tensor([faithful, *aspects])
        return {"pixels": pixels, "prompt": text, "labels": labels, "marks": line, "answers": answers}


class Comparisons(Dataset[dict[str, Any]]):
    """`size` pairs with one rater's answers, +1 first, -1 second, 0 no difference: the verdict, then one an aspect.

    Platforms that collect preferences ask for aspects too (MPS, VisionReward): six answers teach more than one.
    """

    def __init__(self, size: int, seed: int, taste: Mapping[str, float]) -> None:
        self.size, self.seed, self.taste = size, seed, dict(taste)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(derive_seed("pair", self.seed, index))
        text = random_caption(rng)
        sides = [_side(parse(text), rng) for _ in range(2)]
        first, second = (sum(self.taste[k] * v for k, v in side.features.items()) for side in sides)
        verdict = 1 if rng.random() < 1 / (1 + np.exp(second - first)) else -1
        aspects = [int(np.sign(sides[0].features[k] - sides[1].features[k])) for k in ASPECTS]
        pictures = [to_tensor(side.picture) for side in sides]
        return {"first": pictures[0], "second": pictures[1], "prompt": text, "answers": [verdict, *aspects]}

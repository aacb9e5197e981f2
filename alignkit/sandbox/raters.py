"""Simulated raters of different taste, and pairs of rendered images that they compare.

A rater weighs features of the scene graphs of two rendered images and answers with Bradley-Terry noise. Generated
images and the gold verifier are not used here, so the heads trained on the answers are proxies.
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

# Weight of each feature, in log-odds of preferring an image that has the feature fully over one that lacks it.
TASTES: Mapping[str, Mapping[str, float]] = {
    "careful": {"count": 3.0, "shapes": 4.0, "colors": 3.0, "relation": 3.0, "clean": 2.5, "big": 0.3, "dark": 0.0},
    "showy": {"count": 1.2, "shapes": 2.5, "colors": 2.5, "relation": 0.6, "clean": 3.0, "big": 2.5, "dark": 1.0},
}


def features(spec: Spec, scene: Scene, clean: float) -> dict[str, float]:
    """The features that raters weigh, each in [0, 1]: how far `scene` shows `spec`, and how it looks."""
    asked, drawn = Counter(shape for shape, _ in spec.kinds), Counter(thing.shape for thing in scene.things)
    colored = [(shape, color) for shape, color in spec.kinds if color]
    drawn_kinds = Counter((thing.shape, thing.color) for thing in scene.things)
    matched = sum((Counter(colored) & drawn_kinds).values()) / len(colored) if colored else 1.0
    return {
        "count": float(len(scene.things) == len(spec.kinds)),
        "shapes": sum((asked & drawn).values()) / max(asked.total(), drawn.total()),
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


def _flawed(image: NDArray[np.float32], other: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """An image with a typical flaw of generators: a blend of two scenes, blur, or distorted outlines."""
    kind = rng.integers(3)
    if kind == 0:
        share = np.float32(rng.uniform(0.25, 0.5))
        return image * (1 - share) + other * share
    if kind == 1:
        return np.asarray(ndimage.gaussian_filter(image, (rng.uniform(1.0, 2.5),) * 2 + (0,)), np.float32)
    bend = [ndimage.gaussian_filter(rng.normal(0, 1, image.shape[:2]), 3) * 25 for _ in range(2)]
    grid = np.mgrid[0 : image.shape[0], 0 : image.shape[1]]
    places = [grid[0] + bend[0], grid[1] + bend[1]]
    channels = [ndimage.map_coordinates(image[..., c], places, order=1, mode="nearest") for c in range(3)]
    return np.stack(channels, -1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Judged:
    """One side of a comparison: an image [64, 64, 3], its scene and its features."""

    image: NDArray[np.float32]
    scene: Scene
    features: Mapping[str, float]


def _side(spec: Spec, rng: np.random.Generator) -> Judged:
    """An image for a caption that it may contradict once or twice; some have one more object, or a flaw."""
    shown = spec
    for _ in range(int(rng.choice([0, 1, 2], p=[0.5, 0.4, 0.1]))):
        shown = contradict(shown, rng) if _can_contradict(shown) else shown
    if len(shown.kinds) < 4 and rng.random() < 0.12:
        shown = replace(shown, kinds=(*shown.kinds, shown.kinds[-1]), relation=None)
    scene = compose(shown, rng)
    image, clean = render(scene, rng), 1.0
    if rng.random() < 0.25:
        image, clean = _flawed(image, render(compose(shown, rng), rng), rng), 0.0
    # A little blur and noise, as an autoencoder adds, so that heads do not score the sharpness of the rendering.
    image = ndimage.gaussian_filter(image, (rng.uniform(0, 0.6),) * 2 + (0,))
    image = np.clip(image + rng.normal(0, 0.015, image.shape), 0, 1).astype(np.float32)
    return Judged(image, scene, features(spec, scene, clean))


def _can_contradict(spec: Spec) -> bool:
    full = {"color_attr": 2, "position": 2, "two_object": 2}
    return len(spec.kinds) >= full.get(spec.category, 1)


ASPECTS = ("count", "shapes", "colors", "relation", "clean")


def marks(text: str, scene: Scene) -> list[float]:
    """For each word of a caption, 1 if `scene` shows it, 0 if not, -1 for words that have no meaning alone."""
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
    """`size` images with annotations: the objects, a mark for every word of the caption, the aspects in [0, 1].

    `marks` is aligned with the tokens (a begin marker, then one token a word) and is -1 where no mark applies. The
    first of `answers` is 1 if the image shows the whole caption, the others are ASPECTS.
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
        pixels, labels = to_tensor(side.image), centres(side.scene)
        answers = torch.tensor([faithful, *aspects])
        return {"pixels": pixels, "prompt": text, "labels": labels, "marks": line, "answers": answers}


class Comparisons(Dataset[dict[str, Any]]):
    """`size` pairs with one rater's answers (+1 first, -1 second, 0 no difference): the verdict, then one per aspect.

    Published preference data has answers per aspect too (MPS, VisionReward): six answers train better than one.
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
        images = [to_tensor(side.image) for side in sides]
        return {"first": images[0], "second": images[1], "prompt": text, "answers": [verdict, *aspects]}

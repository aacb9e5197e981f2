"""Seeded datasets of rendered scenes: item i is a function of (seed, i) alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from alignkit.sandbox.captions import parse, random_caption
from alignkit.sandbox.scenes import PALETTE, SHAPES, Scene, compose, contradict, render
from alignkit.seeds import derive_seed


def to_tensor(image: np.ndarray) -> Tensor:
    """[H, W, 3] -> [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class Captioned(Dataset[dict[str, Any]]):
    """`size` captioned scenes.

    `noise`: per category, the share of images that contradict their caption. `weights`: how often each category is
    drawn (default: equally).
    """

    def __init__(
        self,
        size: int,
        seed: int,
        noise: Mapping[str, float] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.size, self.seed, self.noise, self.weights = size, seed, dict(noise or {}), weights

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(derive_seed("scene", self.seed, index))
        text = random_caption(rng, self.weights)
        spec = parse(text)
        if rng.random() < self.noise.get(spec.category, 0.0):
            spec = contradict(spec, rng)
        return {"pixels": to_tensor(render(compose(spec, rng), rng)), "prompt": text}


def centres(scene: Scene) -> Tensor:
    """Labels [64] of the 8 x 8 patches: 0, or 1 + the (shape, colour) index of the object whose centre is in it."""
    labels = torch.zeros(64, dtype=torch.long)
    for thing in scene.things:
        patch = int(thing.y // 8) * 8 + int(thing.x // 8)
        labels[patch] = 1 + SHAPES.index(thing.shape) * len(PALETTE) + list(PALETTE).index(thing.color)
    return labels

"""Validation during training: images of fixed prompts and seeds, a grid of them and held-out reward means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alignkit.errors import NumericsError
from alignkit.escape import get_logger
from alignkit.media import checked_pixels, encode_image
from alignkit.protocols import ImageSource, Reward, as_scores
from alignkit.records import Prompt, Sampling, texts
from alignkit.seeds import derive_seed
from alignkit.storage import write_atomic
from alignkit.trainers.sharding import Ranks

logger = get_logger(__name__)


@dataclass(frozen=True)
class Validation:
    """What is generated and scored at each evaluation step; the first `shown` images make the grid."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    rewards: Mapping[str, Reward]
    seed: int = 0
    batch_size: int = 16
    shown: int = 16

    @torch.no_grad()
    def run(self, source: ImageSource, grid: Path | None, ranks: Ranks = Ranks()) -> dict[str, float]:  # noqa: B008
        """Mean of every reward over the prompts, and the mean of those means as `mean` when there are several.

        Each prompt has one image, from a seed of its own (run seed, prompt id). Every process of `ranks` generates and
        scores each world-th prompt, batch by batch; only what the grid shows is kept. All processes return the same
        means, so that all pick the same best checkpoint; rank 0 writes the `grid`.
        """
        scores: list[tuple[int, dict[str, float]]] = []
        images: list[tuple[int, Tensor]] = []
        own = range(ranks.rank, len(self.prompts), ranks.world)
        for start in range(0, len(own), self.batch_size):
            numbers = own[start : start + self.batch_size]
            prompts = [self.prompts[number] for number in numbers]
            seeds = [derive_seed(self.seed, prompt.id, 0) for prompt in prompts]
            pixels = source.generate(texts(prompts), seeds, self.sampling)
            media = checked_pixels(pixels, len(prompts), f"validation: generator '{source.name}'").cpu()
            totals = {}
            for name, reward in self.rewards.items():
                totals[name] = as_scores(reward(media, prompts), name, len(prompts)).total.tolist()
            for row, number in enumerate(numbers):
                scores.append((number, {name: values[row] for name, values in totals.items()}))
                if number < self.shown and grid is not None:
                    images.append((number, grid_frames(media[row]).clone()))
        scores, images = (sorted(ranks.gather(items), key=lambda item: item[0]) for items in (scores, images))
        if grid is not None and ranks.rank == 0:
            save_grid(torch.stack([image for _, image in images]), grid)
        means: dict[str, float] = {}
        for name in self.rewards:
            means[name] = _mean(name, [values[name] for _, values in scores])
        return means | ({"mean": float(np.mean(list(means.values())))} if len(means) > 1 else {})


def _mean(name: str, values: Sequence[float]) -> float:
    """The mean of the finite values: a single NaN would make every checkpoint the best or the worst."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        raise NumericsError(f"reward '{name}' is NaN or infinite on all {len(values)} validation prompts; mend it")
    if len(finite) < len(values):
        bad = len(values) - len(finite)
        logger.warning("reward '%s' is NaN or infinite on %d of %d validation prompts", name, bad, len(values))
    return float(torch.tensor(finite).mean())


def grid_frames(medium: Tensor, columns: int = 8) -> Tensor:
    """Of a video [F, 3, H, W] at most `columns` frames, equally far apart; an image [3, H, W] as it is."""
    if medium.dim() == 3:
        return medium
    return medium[torch.linspace(0, len(medium) - 1, min(columns, len(medium))).round().long()]


def save_grid(media: Tensor, file: Path, columns: int = 8) -> None:
    """Images [B, 3, H, W] side by side in rows of `columns`, as a PNG; of videos [B, F, 3, H, W] a row each, with as
    many of its frames, equally far apart.
    """
    if media.dim() == 5:
        media = torch.stack([grid_frames(video, columns) for video in media])
        columns, media = media.shape[1], media.flatten(0, 1)
    columns = min(columns, len(media))
    rows = -(-len(media) // columns)
    padded = torch.zeros(rows * columns, *media.shape[1:])
    padded[: len(media)] = media
    grid = padded.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    write_atomic(file, encode_image((grid.numpy() * 255).round().astype(np.uint8)))

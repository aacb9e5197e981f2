"""Validation during training: images of fixed prompts and seeds, a grid of them and held-out reward means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alignkit.errors import NumericsError
from alignkit.escape import get_logger
from alignkit.media import checked_pixels, encode_image, quantise, to_pixels
from alignkit.protocols import ImageSource, Reward, as_scores
from alignkit.records import Prompt, Sampling, texts
from alignkit.seeds import derive_seed
from alignkit.storage import write_atomic
from alignkit.trainers.sharding import Ranks

logger = get_logger(__name__)


@dataclass(frozen=True)
class Validation:
    """What is generated and scored at each evaluation step; the first `shown` images make the grid.

    A method may add to what a user asked for: `trained`, the rewards that its loss uses, are scored as well, and scored
    again on the media as 8-bit files; the first `repeated` prompts get a second image; of the reward `guard` the
    standard error is given too.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    rewards: Mapping[str, Reward]
    seed: int = 0
    batch_size: int = 16
    shown: int = 16
    trained: Mapping[str, Reward] = field(default_factory=dict)
    repeated: int = 0
    guard: str = ""

    @torch.no_grad()
    def run(self, source: ImageSource, grid: Path | None, ranks: Ranks = Ranks()) -> dict[str, float]:  # noqa: B008
        """Means over the prompts, by the metric's name.

        `reward/NAME` for every reward, and `reward/mean`, the mean over `rewards` when there are several;
        `eight_bit/NAME` for those of `trained`; `diversity`, the mean absolute pixel difference between a prompt's two
        images; for videos with a guard `motion`, that between neighbouring frames; `guard/NAME` with `guard_error`.

        The seeds of a prompt's images depend on (run seed, prompt id). Every process of `ranks` generates and scores
        each world-th prompt, batch by batch; only what the grid shows is kept. All processes return the same means, so
        that all pick the same best checkpoint; rank 0 writes the `grid`.
        """
        rows: list[tuple[int, dict[str, float]]] = []
        images: list[tuple[int, Tensor]] = []
        own = range(ranks.rank, len(self.prompts), ranks.world)
        for start in range(0, len(own), self.batch_size):
            numbers = own[start : start + self.batch_size]
            prompts = [self.prompts[number] for number in numbers]
            media = self._sampled(source, prompts, 0)
            columns = {name: values.tolist() for name, values in self._measured(media, prompts).items()}
            for row, number in enumerate(numbers):
                rows.append((number, {name: values[row] for name, values in columns.items()}))
                if number < self.shown and grid is not None:
                    images.append((number, grid_frames(media[row]).clone()))
            twice = sum(number < self.repeated for number in numbers)
            if twice:
                apart = (media[:twice] - self._sampled(source, prompts[:twice], 1)).abs().flatten(1).mean(1)
                rows += [(number, {"diversity": value}) for number, value in zip(numbers, apart.tolist(), strict=False)]
        rows, images = (sorted(ranks.gather(items), key=lambda item: item[0]) for items in (rows, images))
        if grid is not None and ranks.rank == 0:
            save_grid(torch.stack([image for _, image in images]), grid)
        return self._means([row for _, row in rows])

    def _sampled(self, source: ImageSource, prompts: Sequence[Prompt], number: int) -> Tensor:
        """The `number`-th image or video of each prompt."""
        seeds = [derive_seed(self.seed, prompt.id, number) for prompt in prompts]
        pixels = source.generate(texts(prompts), seeds, self.sampling)
        return checked_pixels(pixels, len(prompts), f"validation: generator '{source.name}'").cpu()

    def _measured(self, media: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """By the metric's name, values [B]."""
        measured = {}
        for name, reward in {**self.rewards, **self.trained}.items():
            measured[f"reward/{name}"] = as_scores(reward(media, prompts), name, len(prompts)).total
        stored = to_pixels(quantise(media)) if self.trained else media
        for name, reward in self.trained.items():
            measured[f"eight_bit/{name}"] = as_scores(reward(stored, prompts), name, len(prompts)).total
        if self.guard and media.dim() == 5:
            measured["motion"] = media.diff(dim=1).abs().flatten(1).mean(1)
        return measured

    def _means(self, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Means of all metrics in `rows`, which leave some out, and what is derived of them."""
        means = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            means[name] = _mean(name.removeprefix("reward/"), [row[name] for row in rows if name in row])
        if len(self.rewards) > 1:
            means["reward/mean"] = float(np.mean([means[f"reward/{name}"] for name in self.rewards]))
        if self.guard:
            key = f"reward/{self.guard}"
            finite = [row[key] for row in rows if math.isfinite(row.get(key, math.nan))]
            means[f"guard/{self.guard}"] = means[key]
            means["guard_error"] = float(np.std(finite, ddof=1) / math.sqrt(len(finite))) if len(finite) > 1 else 0.0
        return means


def _mean(name: str, values: Sequence[float]) -> float:
    """The mean of the finite values: a single NaN would make every checkpoint the best or the worst."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        raise NumericsError(f"reward '{name}' is NaN or infinite on all {len(values)} validation prompts; correct it")
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

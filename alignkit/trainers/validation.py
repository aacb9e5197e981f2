"""Validation pictures during training: fixed prompts and seeds, a picture grid and held-out reward means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignkit.protocols import ImageSource, Reward
from alignkit.records import Prompt, Sampling, texts
from alignkit.seeds import derive_seed


@dataclass(frozen=True)
class Validation:
    """What is drawn and judged at each evaluation step; the first `shown` pictures make the grid."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    rewards: Mapping[str, Reward]
    seed: int = 0
    batch_size: int = 16
    shown: int = 16

    @torch.no_grad()
    def run(self, source: ImageSource, grid: Path | None) -> dict[str, float]:
        """Mean of every reward over the prompts, and the mean of those means as `mean` when there are several."""
        pictures = draw(source, self.prompts, self.seed, self.sampling, self.batch_size)
        if grid is not None:
            save_grid(pictures[: self.shown], grid)
        starts = range(0, len(pictures), self.batch_size)
        batches = [(pictures[i : i + self.batch_size], self.prompts[i : i + self.batch_size]) for i in starts]
        means = {
            name: float(torch.cat([reward(*batch).total.cpu() for batch in batches]).mean())
            for name, reward in self.rewards.items()
        }
        return means | ({"mean": float(np.mean(list(means.values())))} if len(means) > 1 else {})


def draw(source: ImageSource, prompts: Sequence[Prompt], seed: int, sampling: Sampling, batch_size: int) -> Tensor:
    """One picture (or clip) a prompt [P, 3, H, W], each from its own seed (run seed, prompt id)."""
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    return torch.cat(
        [
            source.generate(texts(batch), [derive_seed(seed, prompt.id, 0) for prompt in batch], sampling).cpu()
            for batch in batches
        ]
    )


def save_grid(pictures: Tensor, file: Path, columns: int = 8) -> None:
    """Pictures [B, 3, H, W] side by side in rows of `columns`, as a PNG; of clips [B, F, 3, H, W] a row each, with as
    many of its frames, equally far apart.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if pictures.dim() == 5:
        frames = torch.linspace(0, pictures.shape[1] - 1, min(columns, pictures.shape[1])).round().long()
        columns, pictures = len(frames), pictures[:, frames].flatten(0, 1)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    padded = torch.zeros(rows * columns, *pictures.shape[1:])
    padded[: len(pictures)] = pictures
    grid = padded.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    Image.fromarray((grid.numpy() * 255).round().astype(np.uint8)).save(file)

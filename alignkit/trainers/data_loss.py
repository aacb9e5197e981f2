"""A denoising loss on real images or clips beside another loss: it keeps the generator near the data.

The loss is that of supervised fine-tuning (`native_error`), on the medium in each prompt's row, as in ReFL (Xu et al.
2023, arXiv 2304.05977) and PRFL (arXiv 2511.21541).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from alignkit.errors import DataError
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.trainers.buckets import Sizes
from alignkit.trainers.config import AlignConfig
from alignkit.trainers.data import PromptData
from alignkit.trainers.draws import DrawPlan
from alignkit.trainers.latents import COLUMNS, LATENTS, LatentDataset, encode_rows
from alignkit.trainers.native_error import mean_square, residuals
from alignkit.trainers.ranges import NOT_NEGATIVE, Range, require_in_range
from alignkit.trainers.sharding import Ranks

PREFIX = "data."  # of batch keys
_RANGES = {"data_weight": NOT_NEGATIVE, "data_dropout": Range(0, 1)}


@dataclass
class DataLossConfig(AlignConfig):
    """Keys of the data loss."""

    data_weight: float = field(
        default=0.0, metadata={"help": "Weight of the denoising loss on the rows' column image or video; 0: none."}
    )
    data_dropout: float = field(
        default=0.1, metadata={"help": "Share of prompts that the data loss replaces by the null prompt."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where latents of the data loss are stored between runs; default: in the run."}
    )

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, else `output_dir/_cache`: names with an underscore stay out of `push_to_hub`."""
        return Path(self.cache_dir or Path(self.output_dir) / "_cache")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in_range(vars(self), _RANGES)


@dataclass(frozen=True)
class OneSize(Sizes):
    """All media at one size in pixels, that of the chains."""

    height: int = 0
    width: int = 0

    def bucket(self, height: int, width: int, multiple: int) -> tuple[int, int]:  # noqa: ARG002 - of every medium
        """(height, width) of all media."""
        return self.height, self.width


def drop_media(rows: Any) -> Any:
    """`rows` without their media, where they are a `datasets.Dataset`: prompts would keep all of them in memory."""
    if not isinstance(rows, datasets.Dataset):
        return rows
    names = {LATENTS, *(name for both in COLUMNS.values() for name in both)}
    return rows.remove_columns(sorted(names & {*rows.column_names}))


class PromptsWithMedia(PromptData):
    """Prompts with the cached latents of their rows' media: an item of each, the latents' under `data.NAME`.

    `keeps_media`: whether the metadata of the prompts has the encoded media too, all of them in memory.
    """

    def __init__(
        self, rows: datasets.Dataset, noise_seed: int, latents: LatentDataset, *, keeps_media: bool = False
    ) -> None:
        super().__init__(rows if keeps_media else drop_media(rows), noise_seed)
        self.latents = latents

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.latents.epoch = self.epoch
        return {**super().__getitem__(index), **{PREFIX + name: value for name, value in self.latents[index].items()}}


def with_media(
    generator: PipelineGenerator,
    rows: Any,
    args: DataLossConfig,
    sizes: Sizes,
    ranks: Ranks,
    *,
    keeps_media: bool = False,
) -> PromptsWithMedia:
    """The rows as prompts, with their media encoded or read from the cache. All processes call it together.

    Raises DataError where `rows` are no `datasets.Dataset`, lack media, or hold one that cannot be decoded.
    """
    if not isinstance(rows, datasets.Dataset):
        raise DataError(
            f"the loss reads images or videos (data_weight is {args.data_weight}), and the rows are a "
            f"{type(rows).__name__}: give a datasets.Dataset with the columns prompt and image (or video)"
        )
    plan = DrawPlan(generator.noise_schedule.sample_t, args.noise_seed, args.data_dropout)
    latents = encode_rows(generator, rows, plan, args.cache_folder, sizes=sizes, targets=lambda *_: {}, ranks=ranks)
    return PromptsWithMedia(rows, args.noise_seed, latents, keeps_media=keeps_media)


def data_errors(
    generator: PipelineGenerator, model: nn.Module, batch: Mapping[str, Any], null: Mapping[str, Tensor]
) -> Tensor:
    """Mean squared errors of the native target [P], on the media of the rows."""
    own = {name.removeprefix(PREFIX): value for name, value in batch.items() if name.startswith(PREFIX)}
    return mean_square(residuals(generator, model, own, null), "item").mean(-1)


def null_condition(generator: PipelineGenerator) -> Mapping[str, Tensor]:
    """The null condition of the text encoders as they are."""
    with torch.no_grad():
        return generator.encode_prompts([""]).null

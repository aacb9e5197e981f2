"""Rows of pairs -> both clips as pixels: from the stored videos, else from the latents, by the VAE that made them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError
from alignkit.media import decode_clip
from alignkit.pairs import ClipDecoder, ShownPair
from alignkit.records import Prompt, Sampling
from data_pipelines.dense.rows import LATENTS, sampling_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

VIDEOS = "videos"
MEDIA = (VIDEOS, LATENTS)

BuildDecoder = Callable[[Sampling], ClipDecoder]


@dataclass
class PairReader:
    """Decodes the clips of rows; the decoder of latents is built, once, for the first row without videos.

    build: makes the decoder for the sampling of a row; None where there is no generator.
    """

    build: BuildDecoder | None
    _decoder: ClipDecoder | None = None

    def read(self, row: Mapping[str, Any], where: str) -> ShownPair:
        """The pair of `row`, which has the columns of the dense format; `where` is for messages.

        Raises DataError for clips or latents that cannot be decoded or do not fit the row, NumericsError for latents
        that decode to NaN; ConfigError where the row has no videos and there is no generator, or the generator has
        another VAE.
        """
        cells = row.get(VIDEOS) or []
        has_videos = any(cell and cell["bytes"] for cell in cells)
        clips = _stored(cells, where) if has_videos else self._decoded(row, where)
        segments = tuple((start, end) for start, end in row["segments"])
        if not segments or clips.shape[1] < segments[-1][1]:
            raise DataError(
                f"{where}: the clips have {clips.shape[1]} frames, and the segments are {row['segments']}; make the "
                "pair again"
            )
        return ShownPair(Prompt(row["prompt_id"], row["prompt"]), clips, row["fps"], segments)

    def _decoded(self, row: Mapping[str, Any], where: str) -> np.ndarray:
        latents = _latents(row.get(LATENTS) or [], where)
        if self.build is None:
            raise ConfigError(
                f"{where}: the pair has latents and no videos; give `generator`, the model that made it, which decodes "
                "them, or make pairs with videos: true"
            )
        if self._decoder is None:
            self._decoder = self.build(sampling_of(row))
        if self._decoder.codec != row["codec"]:
            raise ConfigError(
                f"{where}: the latents are those of the VAE {row['codec']}, and `generator` has {self._decoder.codec}; "
                "give the model, and its dtype, that the pairs were made with"
            )
        return self._decoder.decode(latents)


def _stored(cells: list[Any], where: str) -> np.ndarray:
    """uint8 [2, F, H, W, 3]; the path beside the bytes is not followed."""
    import numpy as np

    data = [cell["bytes"] if cell else b"" for cell in cells]
    if len(data) != 2 or not all(data):
        raise DataError(f"{where}: {len(data)} videos, {data.count(b'')} of them empty; a pair has two")
    clips = [decode_clip(one, f"{where}, video {copy}") for copy, one in enumerate(data)]
    if clips[0].shape != clips[1].shape:
        sizes = " and ".join(str(list(clip.shape[:3])) for clip in clips)
        raise DataError(f"{where}: the videos are [frames, height, width] {sizes}; both must have one size")
    return np.stack(clips)


def _latents(cells: list[Any], where: str) -> Tensor:
    """Float32 latents [2, C, T, h, w] of a row's cells."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    if len(cells) != 2 or not all(cell and cell["bytes"] for cell in cells):
        raise DataError(f"{where}: neither two videos nor two latents; make the pair again")
    try:
        copies = [load(cell["bytes"])[LATENTS].float() for cell in cells]
        latents = torch.stack(copies)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # RuntimeError: of two shapes
        raise DataError(f"{where}: the latents cannot be read ({error}); make the pair again") from error
    if latents.dim() != 5 or not torch.isfinite(latents).all():
        raise DataError(f"{where}: latents {list(latents.shape)}, or NaN in them; expected [2, C, T, h, w], finite")
    return latents

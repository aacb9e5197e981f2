"""Pairs of clips as the page shows them: the rows of a folder, and both clips of one as frames when asked for.

    FRAMES is a sequence of: 4 bytes, little-endian, the length of an image; the image (PNG or JPEG)

Browsers do not play FFV1, and players of two videos do not keep in step; the page draws these frames itself. Clips
come from the rows' videos, else from the latents by the model that made them, else from the previews in `clips/`.
Not here: votes.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alignkit.errors import DataError
from alignkit.media import encode_image, read_preview
from alignkit.storage import read_schema, recorded_parts
from data_pipelines.dense.index import IndexedPair, read_index
from data_pipelines.dense.pairs import PREVIEWS, STAGE
from data_pipelines.dense.shown import VIDEOS, BuildDecoder, PairReader

LARGEST_SIDE = 768  # pixels of a frame on the page; larger ones are made smaller
LOSSLESS_SIDE = 256  # up to this side frames are PNG, above it JPEG
JPEG: Mapping[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0}


class Pairs:
    """The pairs in `folder`, which `alignkit dense-pairs` wrote.

    `build` makes the decoder of latents, for rows without videos; without it their previews are shown. Raises what
    `recorded_parts` and `read_index` raise, and DataError where nothing gives the clips.
    """

    def __init__(self, folder: Path, build: BuildDecoder | None = None) -> None:
        _, parts = recorded_parts(folder, STAGE)
        self.folder, self._reader, self._index = folder, PairReader(build), read_index(folder, parts, None)
        self.rows: list[IndexedPair] = list(self._index.pairs.values())
        self.numbers = {row.id: number for number, row in enumerate(self.rows)}
        has_videos = all(VIDEOS in read_schema(folder / path).names for part in parts for path in part.files)
        # NUMBER-COPY.webp; the number counts the videos, also those in quarantine, which have no file.
        files = [] if has_videos or build else sorted((folder / PREVIEWS).glob("*-[01].webp"))
        self._previews = list(zip(files[::2], files[1::2], strict=False))
        if not (has_videos or build or len(files) == 2 * len(self.rows)):
            raise DataError(
                f"'{folder}' holds latents alone, no clips to show; make the pairs with `videos: true` or `previews: "
                "true`, or give `generator`, the model that made them, which decodes them"
            )

    @property
    def segments(self) -> int:
        """How many there are in all pairs."""
        return sum(len(row.segments) for row in self.rows)

    def clips(self, number: int) -> np.ndarray:
        """uint8 [2, F, H, W, 3] of the pair `number`; raises what `PairReader.read` raises, DataError for previews."""
        row = self.rows[number]
        if not self._previews:
            return self._reader.read(self._index.media(row), row.where).clips
        count = row.segments[-1][1]
        both = [read_preview(file.read_bytes(), f"'{file}'", count, row.fps) for file in self._previews[number]]
        if both[0].shape != both[1].shape:
            raise DataError(f"{row.where}: its previews differ in size; make the pairs again")
        return np.stack(both)


def packed(frames: np.ndarray) -> bytes:
    """FRAMES of uint8 [F, H, W, 3], at most `LARGEST_SIDE` a side."""
    images = (_image(frame) for frame in frames)
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def _image(frame: np.ndarray) -> bytes:
    if max(frame.shape[:2]) <= LOSSLESS_SIDE:
        return encode_image(frame)
    image, buffer = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    image.save(buffer, **JPEG)
    return buffer.getvalue()

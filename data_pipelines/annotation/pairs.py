"""Pairs of clips as an annotator sees them: texts and segments of all rows, and the frames of one clip when asked for.

    FRAMES is a sequence of: 4 bytes, little-endian, the length of an image; the image (PNG or JPEG)

Browsers do not play FFV1, and players of two videos do not keep in step; the page draws these frames itself. Frames
come from the column `videos`, else from the previews in `clips/`, else from a decoder of the latents. Not here: votes.
"""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from alignkit.errors import DataError, MissingFileError
from alignkit.media import decode_clip, encode_image
from alignkit.pairs import PairMaker
from alignkit.paths import Bounds
from alignkit.records import Sampling
from alignkit.segments import CODEC, LABELS, SEGMENTS, Segments, read_labels
from data_pipelines.cells import read_cell
from data_pipelines.dense.pairs import PREVIEWS
from data_pipelines.dense.rows import LATENTS, sampling_of
from data_pipelines.dense.votes import IDENTITY, pair_id

if TYPE_CHECKING:
    import pyarrow as pa

VIDEOS = "videos"  # column
LARGEST_SIDE = 768  # pixels of a frame on the page; larger ones are made smaller
LOSSLESS_SIDE = 256  # up to this side frames are PNG, above it JPEG
JPEG: Mapping[str, Any] = {"format": "JPEG", "quality": 95, "subsampling": 0}
FPS = 8.0  # of rows without `fps`


@dataclass(frozen=True, slots=True)
class Row:
    """A pair without its clips: `number` counts the rows of the folder, `place` leads to the row in its file."""

    number: int
    id: str
    prompt: str
    fps: float
    segments: Segments
    place: tuple[Path, int]  # parquet file, row in it


class Pairs:
    """The rows at `folder`, a folder that `alignkit dense-pairs` wrote or another with parquet files of that format.

    `build_maker` loads the model of the pairs for a sampling, which decodes latents; it is called where rows have no
    videos, and without it previews are shown. Raises MissingFileError without a file, DataError for rows that the dense
    format does not allow, for two rows of the same clips, and where nothing gives the frames.
    """

    def __init__(self, folder: Path, build_maker: Callable[[Sampling], PairMaker] | None = None) -> None:
        self.folder = folder
        self.rows = list(_read_rows(folder))
        self.by_id = {row.id: row for row in self.rows}
        if len(self.by_id) < len(self.rows):
            raise DataError(f"'{folder}' holds the same pair twice; remove one of the files that it is in")
        files = {row.place[0] for row in self.rows}
        self._has_videos = all(VIDEOS in _opened(file).schema_arrow.names for file in files)
        self._maker = None
        if build_maker and not self._has_videos:
            self._maker = build_maker(sampling_of(_cells(self.rows[0].place, ["sampling"])))
        self._previews = _previews(folder, len(self.rows))
        if not (self._has_videos or self._maker or self._previews):
            raise DataError(
                f"'{folder}' holds latents alone, no clips to show; make the pairs with `videos: true` or `previews: "
                "true`, or name the model that made them: --generator.model MODEL"
            )

    @property
    def segments(self) -> int:
        """How many there are in all pairs."""
        return sum(len(row.segments) for row in self.rows)

    def frames(self, row: Row, copy: int) -> np.ndarray:
        """uint8 [F, H, W, 3] of the first (0) or second (1) clip. Raises DataError where it cannot be decoded."""
        where = f"'{row.place[0]}', row {row.place[1]}"
        end = row.segments[-1][1]
        if self._has_videos:
            cell = (_cells(row.place, [VIDEOS])[VIDEOS] or [None, None])[copy]
            frames = decode_clip(read_cell(cell, Bounds(self.folder), f"{where}, {VIDEOS}"), f"{where}, {VIDEOS}")
        elif self._maker:
            frames = _decoded(self._maker, _cells(row.place, [LATENTS, CODEC]), copy, where)
        else:
            file = self._previews[2 * row.number + copy]
            frames = decode_clip(file, f"'{file}'")
            frames = frames.repeat(-(-end // len(frames)), axis=0)  # a preview of a long clip leaves out frames
        if len(frames) < end:
            raise DataError(f"{where}: a clip has {len(frames)} frames, its segments end at {end}; make the pair again")
        return frames


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


def _decoded(maker: PairMaker, cells: Mapping[str, Any], copy: int, where: str) -> np.ndarray:
    """The clip of latents, which must be those of the maker's VAE."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    if cells[CODEC] != maker.codec:
        raise DataError(f"{where}: made with the VAE {cells[CODEC]}, and here is {maker.codec}; load the model of the row")
    try:
        latents = load(cells[LATENTS][copy]["bytes"])[LATENTS]
    except (SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"{where}: the latents cannot be read: {error}; make the pair again") from error
    return maker.decode(latents.to(torch.float32)[None])[0]


# --- parquet --------------------------------------------------------------------------------------------------------


def _read_rows(folder: Path) -> Iterator[Row]:
    import pyarrow as pa
    from datasets import Dataset

    files = sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*.parquet"))
    if not files:
        raise MissingFileError(f"'{folder}' holds no pairs of clips (data/*.parquet); give OUT of `alignkit dense-pairs`")
    number = itertools.count()
    for path in files:
        file = _opened(path)
        missing = {"prompt", SEGMENTS, LABELS} - set(file.schema_arrow.names)
        if missing:
            raise DataError(f"'{path}' lacks the columns {', '.join(sorted(missing))}; it holds no pairs of clips")
        known = {"fps", LABELS, *IDENTITY} & set(file.schema_arrow.names)
        try:
            table: pa.Table = file.read(columns=sorted(known)).replace_schema_metadata()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"'{path}' cannot be read: {error}; make the pairs again") from error
        _, segments = read_labels(Dataset(table), f"'{path}'")
        for place, row in enumerate(table.to_pylist()):
            fps = row.get("fps") or FPS
            yield Row(next(number), pair_id(row), row["prompt"], fps, (segments or [])[place], (path, place))


def _opened(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"'{path}' cannot be read: {error}; make the pairs again") from error


def _cells(place: tuple[Path, int], columns: Sequence[str]) -> dict[str, Any]:
    """The cells of one row, without holding those of the rows before it."""
    path, number = place
    file = _opened(path)
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if number < size:
            batches = file.iter_batches(batch_size=1, row_groups=[group], columns=list(columns))
            cells: dict[str, Any] = next(itertools.islice(batches, number, None)).to_pylist()[0]
            return cells
        number -= size
    raise DataError(f"'{path}' has changed since the start; start `alignkit annotate` again")


def _previews(folder: Path, rows: int) -> list[Path]:
    """The files `NUMBER-COPY.webp` in the order of the rows; empty where they are not those of all rows.

    NUMBER counts the videos, those in quarantine too, which have no file.
    """
    files = sorted((folder / PREVIEWS).glob("*-[01].webp"))
    return files if len(files) == 2 * rows else []

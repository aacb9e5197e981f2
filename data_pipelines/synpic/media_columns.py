"""The column of a stage's parquet files that holds its media: `images` or `videos`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import DataError
from alignkit.storage import Part, read_schema

if TYPE_CHECKING:
    from collections.abc import Iterable

MEDIA = {"images": "image", "videos": "video"}  # column -> modality


def media_feature(column: str) -> Any:
    """The `datasets` feature of one medium; videos stay encoded, for `alignkit.media.decode_clip`."""
    from datasets import Image, Video

    return Image() if column == "images" else Video(decode=False)


def find_column(columns: Iterable[str], where: object) -> str:
    """`images` or `videos`, whichever is among `columns`; DataError naming `where` for neither."""
    present = [name for name in MEDIA if name in set(columns)]
    if not present:
        raise DataError(f"'{where}' has no column `images` or `videos`; give what `alignkit generate` or `rank` wrote")
    return present[0]


def media_column(folder: Path, part: Part) -> str:
    """The media column of a finished part of candidates."""
    (path,) = part.files
    return find_column(read_schema(folder / path).names, folder / path)

"""Encoded pictures and clips become pixels of a given size. Clips are decoded by PyAV, their sound is left alone."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignkit.errors import DataError


def read_picture(picture: Any, where: str) -> Image.Image:
    """A PIL picture, encoded bytes, a path or {"bytes", "path"} -> PIL RGB. Raises DataError naming `where`."""
    picture = _source(picture, where)
    if isinstance(picture, bytes | str):
        try:
            picture = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
            picture.load()
        except (OSError, SyntaxError) as error:
            raise DataError(f"{where}: the picture cannot be decoded ({error}); remove or remake it") from error
    return picture.convert("RGB")


def read_clip(clip: Any, where: str, *, count: int | None = None, fps: float | None = None) -> list[Image.Image]:
    """The first `count` frames (default: all) of encoded bytes, a path or {"bytes", "path"}, as PIL RGB.

    With `fps` those frames that are nearest in time, for a clip of that rate. Raises DataError naming `where`.
    """
    import av

    source = _source(clip, where)
    try:
        with av.open(io.BytesIO(source) if isinstance(source, bytes) else source) as container:
            if not container.streams.video:
                raise DataError(f"{where}: the file holds no video; remove or replace it")
            stream = container.streams.video[0]
            frames = container.decode(stream) if fps is None else _paced(container, stream, fps, where)
            found = [frame.to_image() for frame in itertools.islice(frames, count)]
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{where}: the clip cannot be decoded ({error.strerror}); remove or remake it") from error
    if not found:
        raise DataError(f"{where}: the clip has no frame; remove or remake it")
    return found


def _source(medium: Any, where: str) -> Any:
    if isinstance(medium, Mapping):
        medium = medium["path"] if medium["bytes"] is None else medium["bytes"]
    if medium is None or medium == b"":
        raise DataError(f"{where}: there is nothing (zero bytes); remove the row or put the file back")
    return medium


def _paced(container: Any, stream: Any, fps: float, where: str) -> Iterator[Any]:
    if not stream.average_rate:
        raise DataError(f"{where}: the clip tells no frame rate; leave out `fps`, or encode the clip with one")
    pace, given = float(stream.average_rate) / fps, 0
    for index, frame in enumerate(container.decode(stream)):
        while round(given * pace) == index:
            yield frame
            given += 1


def fit(frame: Image.Image, size: tuple[int, int], multiple: int) -> Image.Image:
    """The centre of `frame` at `size` (height, width).

    It is resampled to cover `size` first (Lanczos, antialiased), unless it exceeds it by less than `multiple` pixels a
    side: those are only cut off.
    """
    height, width = size
    if not (0 <= frame.height - height < multiple and 0 <= frame.width - width < multiple):
        scale = max(height / frame.height, width / frame.width)
        covering = (max(width, round(frame.width * scale)), max(height, round(frame.height * scale)))
        frame = frame.resize(covering, Image.Resampling.LANCZOS)
    left, top = (frame.width - width) // 2, (frame.height - height) // 2
    return frame.crop((left, top, left + width, top + height))


def to_pixels(frames: Sequence[Image.Image]) -> Tensor:
    """PIL RGB frames of one size -> [F, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(frame, np.float32) / 255 for frame in frames])).permute(0, 3, 1, 2)

"""Clips decoded to the frames, rate and size of the pairs, in threads ahead of the generator."""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from alignkit.errors import DataError
from alignkit.media import decode_clip
from alignkit.records import Sampling
from alignkit.storage import checksum
from data_pipelines.dense.clips import Clip, Clips

if TYPE_CHECKING:
    import numpy as np

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Decoded:
    """Frames uint8 [F, H, W, 3] of a clip, and the SHA-256 of its file."""

    frames: np.ndarray
    sha256: str


def decoded(data: bytes | Path, where: str, sampling: Sampling) -> Decoded:
    """The first `sampling.num_frames` frames at `sampling.fps`, upright, the centre at the size of the sampling.

    Frames are chosen by their presentation time, so a variable frame rate is supported. Raises DataError naming
    `where` for a clip that cannot be decoded or is too short.
    """
    size = (sampling.height, sampling.width)
    frames = decode_clip(data, where, count=sampling.num_frames, fps=sampling.fps, size=size)
    if len(frames) < sampling.num_frames:
        raise DataError(
            f"{where}: the clip has {len(frames)} frames at {sampling.fps:g} frames a second, {sampling.num_frames} "
            "are asked for; lower num_frames or raise fps, or remove the clip"
        )
    digest = checksum(data) if isinstance(data, Path) else hashlib.sha256(data).hexdigest()
    return Decoded(frames, digest)


def decode_listed(clips: Clips, clip: Clip, sampling: Sampling) -> Decoded | DataError:
    """The decoded clip, or what is wrong with it: one bad clip does not stop the others."""
    try:
        return decoded(clips.read(clip.place, clip.where), clip.where, sampling)
    except DataError as error:
        return error


@contextlib.contextmanager
def ahead(make: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Iterator[Result]]:
    """The results of `make`, in order, computed in `workers` threads.

    While one result is used, at most `workers` others wait or are being made: memory does not depend on the number of
    items.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def results() -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)

"""Videos through PyAV, which is imported and called here only, and moving WebPs through PIL; callers use `media`."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from alignkit.errors import DataError

# bgr0 is RGB with 8 bits a channel in the form that FFV1 takes; `bitexact` leaves out versions and random numbers.
_FORMAT, _PIXELS = "matroska", "bgr0"
_CONTAINER_OPTIONS = {"fflags": "+bitexact"}
_CODEC_OPTIONS = {"level": "3", "slicecrc": "1", "flags": "+bitexact"}
LARGEST_CLIP = 16  # decoded pixels of a clip, in units of PIL's limit for an image: 4 GiB
_MERGING = "gif"  # FFmpeg's format that, like WebP, stores equal frames as one, with the time for which it is shown
_LARGEST_DENOMINATOR = 1001  # of a frame rate, as in 30000/1001
BACKGROUND = "white"  # behind the transparent parts of an image or a frame
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def encode(frames: np.ndarray, fps: float) -> bytes:
    """uint8 [F, H, W, 3] -> FFV1 in Matroska."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=_FORMAT, options=_CONTAINER_OPTIONS) as container:
        rate = Fraction(fps).limit_denominator(_LARGEST_DENOMINATOR)
        stream: Any = container.add_stream("ffv1", rate=rate, options=_CODEC_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], _PIXELS
        stream.codec_context.thread_count = 1  # the same bytes whatever the machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode(
    source: bytes | str | Path,
    where: str,
    *,
    count: int | None,
    fps: float | None,
    each: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """uint8 [F, H, W, 3], upright; see `media.decode_clip`."""
    with _opened(source, where) as clip:
        decoded = clip.frames
        if fps is not None:
            decoded = _nearest(_timed(clip, where), Fraction(fps))
        frames, shapes = [], set()
        for frame in itertools.islice(decoded, count):
            _require_bounded(frame.height, frame.width, 1, where)
            picture = _upright(frame, where)
            shapes.add(picture.shape)
            frames.append(picture if each is None else each(picture))
            height, width = frames[-1].shape[:2]
            _require_bounded(height, width, len(frames), where)
    if not frames:
        raise DataError(f"{where}: the clip has no frame; remove or replace it")
    if len(shapes) > 1:
        raise DataError(f"{where}: the clip changes its size on the way; encode it again with one size")
    return np.stack(frames)


def shape(source: bytes | str | Path, where: str) -> tuple[int, int, int]:
    """(frames, height, width), upright: packets are counted and one frame is decoded."""
    with _opened(source, where) as clip:
        frames = clip.count()
    height, width = decode(source, where, count=1, fps=None).shape[1:3]
    return frames, height, width


@dataclass(frozen=True, slots=True)
class _Clip:
    """An opened clip: its frames, decoded as they are asked for, or their number without decoding them.

    has_durations: whether equal frames are stored as one, with the time for which it is shown.
    """

    frames: Iterator[Any]
    count: Callable[[], int]
    has_durations: bool


@contextlib.contextmanager
def _opened(source: bytes | str | Path, where: str) -> Iterator[_Clip]:
    """The clip in `source`; DataError for what cannot be read, also while it is used."""
    try:
        # Files are opened here, so that no path is read as a URL, and what a file names (a playlist) is not opened.
        with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
            head = file.read(12)
            file.seek(0)
            is_webp = (head[:4], head[8:]) == (b"RIFF", b"WEBP")
            with _webp(file, where) if is_webp else _video(file, where) as clip:
                yield clip
    except OSError as error:
        raise _damaged(where, error.strerror or str(error)) from error


@contextlib.contextmanager
def _video(file: Any, where: str) -> Iterator[_Clip]:
    """What FFmpeg reads: the file's first video stream."""
    import av

    try:
        # Names and titles are not used, so they may be in any encoding.
        with av.open(file, options={"protocol_whitelist": "none"}, metadata_errors="replace") as container:
            if container.format.name.endswith("_pipe"):  # as FFmpeg calls the formats of still images
                raise _still(where)
            if not container.streams.video:
                raise DataError(f"{where}: the file holds no video; remove or replace it")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise _damaged(where, "its codec is not known")
            _require_bounded(stream.height, stream.width, 1, where)
            has_durations = container.format.name == _MERGING
            yield _Clip(
                container.decode(stream),
                lambda: sum(1 for packet in container.demux(stream) if packet.size),
                has_durations,
            )
    except av.FFmpegError as error:
        raise _damaged(where, error.strerror) from error


def _still(where: str) -> DataError:
    return DataError(f"{where}: an image, where a video is expected; keep images and videos in separate datasets")


def _damaged(where: str, what: object) -> DataError:
    return DataError(f"{where}: the clip cannot be decoded ({what}); remove or replace it")


@dataclass(frozen=True, slots=True)
class _WebPFrame:
    """A frame of a moving WebP with what is used of PyAV's frames; transparent parts show `BACKGROUND`."""

    image: Image.Image  # RGBA
    pts: int  # milliseconds
    duration: int
    time_base: Fraction = Fraction(1, 1000)
    rotation: int = 0

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height

    def to_ndarray(self, format: str) -> np.ndarray:  # noqa: A002, ARG002 - PyAV's name; the format is always RGB
        behind = Image.new("RGBA", self.image.size, BACKGROUND)
        return np.asarray(Image.alpha_composite(behind, self.image).convert("RGB"))


@contextlib.contextmanager
def _webp(file: Any, where: str) -> Iterator[_Clip]:
    """A moving WebP, which FFmpeg does not read."""
    try:
        with Image.open(file) as image:
            moving: Any = image
            _require_bounded(moving.height, moving.width, 1, where)
            if not moving.is_animated:
                raise _still(where)

            def frames() -> Iterator[_WebPFrame]:
                for number in range(moving.n_frames):
                    moving.seek(number)
                    moving.load()
                    yield _WebPFrame(moving.convert("RGBA"), moving.info["timestamp"], moving.info["duration"])

            yield _Clip(frames(), lambda: int(moving.n_frames), True)
    except (UnidentifiedImageError, SyntaxError, EOFError, *_BOMBS) as error:
        raise _damaged(where, error) from error


def _require_bounded(height: int, width: int, count: int, where: str) -> None:
    """DataError where `count` frames of this size would take more memory than any sensible clip."""
    pixels, limit = width * height, Image.MAX_IMAGE_PIXELS
    if limit and (pixels > limit or count * pixels > LARGEST_CLIP * limit):
        facts = f"{count} or more frames of {width} x {height}; the limit is {limit:,} a frame"
        raise DataError(
            f"{where}: the clip has too many pixels ({facts} and {LARGEST_CLIP * limit:,} in all); make it smaller or "
            "shorter"
        )


def _upright(frame: Any, where: str) -> np.ndarray:
    """RGB pixels [H, W, 3] as a player shows them."""
    turns, rest = divmod(frame.rotation, 90)  # degrees, counter-clockwise
    if rest:
        raise DataError(
            f"{where}: the clip is to be shown rotated by {frame.rotation} degrees; only 90, 180 and 270 are "
            "supported: encode it again, upright"
        )
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


@dataclass(frozen=True, slots=True)
class _Timed:
    """A frame, seconds since the first one, how long it is shown (0: not known), and one tick of the clip's clock."""

    frame: Any
    time: Fraction
    duration: Fraction
    tick: Fraction


def _timed(clip: _Clip, where: str) -> Iterator[_Timed]:
    """The frames with their times; DataError for a clip without."""
    start: Fraction | None = None
    time = Fraction(0)
    count = 0
    for frame in clip.frames:
        if frame.pts is None:
            raise DataError(f"{where}: the clip has no presentation times; leave out `fps`, or encode the clip again")
        time = frame.pts * frame.time_base
        start = time if start is None else start
        count += 1
        duration = (frame.duration or 0) * frame.time_base if clip.has_durations else Fraction(0)
        yield _Timed(frame, time - start, duration, frame.time_base)
    if count > 1 and time == start:
        raise DataError(f"{where}: all frames have the same time; leave out `fps`, or encode the clip again")


def _nearest(timed: Iterable[_Timed], fps: Fraction) -> Iterator[Any]:
    """The frame nearest in time to 0, 1/fps, 2/fps, ... until the clip ends.

    A frame that says how long it is shown counts as repeated every 1/fps. The last one without lasts as long as the one
    before it. Two ticks are taken off: times are rounded to ticks, and a clip must not get a frame more by that.
    """
    number, position, gap = 0, -1, Fraction(0)
    before: _Timed | None = None
    for position, now in enumerate(timed):
        if before is not None:
            gap = now.time - before.time
            last = before.time + max(before.duration - 1 / fps, Fraction(0))
            while number / fps < now.time:
                time = number / fps
                is_first = (max(time - last, 0), (position - 1) % 2) < (now.time - time, position % 2)
                yield before.frame if is_first else now.frame
                number += 1
        before = now
    if before is None:
        return
    end = before.time + max((before.duration or gap) - 2 * before.tick, Fraction(0))
    while number == 0 or number / fps <= before.time or number / fps < end:
        yield before.frame
        number += 1

"""Segments of a pair of clips and their labels: what a row may hold, and which latent frames a segment owns.

A label says which clip of the pair is better in a segment: 1 the first, -1 the second, 0 neither. A segment is a
half-open range [start, end) of pixel frames. docs/formats.md describes the rows. Not here: opening datasets and
statistics (`data_pipelines.segments`). Shape letters: S segments, T latent frames.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from alignkit.columns import column
from alignkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

LABELS, SEGMENTS = "labels", "segments"  # columns
ETAS = "etas"  # column: the noise level at which each clip of a pair started, 0 for a real video
CODEC = "codec"  # column: fingerprint of the VAE that a row's latents belong to, PRECISION:HASH
LEAST_LABELLED = 0.2  # share of segments without a tie that a training pair has at least (DenseDPO, A.3)
NONE = -1  # the segment of a frame that no segment covers
_LARGEST_DENOMINATOR = 1001  # of a frame rate, as in 30000/1001

Segments = tuple[tuple[int, int], ...]


def equal_segments(num_frames: int, frames_per_segment: int) -> Segments:
    """[start, end) of segments of `frames_per_segment` frames, the last one shorter or longer.

    A tail shorter than half a segment belongs to the segment before it (121 frames at 24: 5 segments, the last of 25).
    Raises ConfigError for numbers below 1.
    """
    if min(num_frames, frames_per_segment) < 1:
        raise ConfigError(f"{num_frames} frames in segments of {frames_per_segment}; both must be at least 1")
    whole, tail = divmod(num_frames, frames_per_segment)
    count = max(1, whole + (2 * tail >= frames_per_segment))
    starts = [frames_per_segment * number for number in range(count)]
    return tuple(zip(starts, [*starts[1:], num_frames], strict=True))


@functools.lru_cache(maxsize=4096)  # the rows of a dataset have few different ones
def owners(segments: Segments, places: Sequence[int], temporal_ratio: int) -> tuple[int, ...]:
    """The number of the segment that owns each of T latent frames; `NONE` where most of its frames are in no segment.

    Latent frame 0 covers pixel frame 0, latent frame k >= 1 the pixel frames r (k - 1) + 1 to r k, as in a causal codec
    of temporal ratio r. It belongs to the segment that has most of them, of equals to the earlier one. DenseDPO does
    not state its rule; this one is derived. `places` are the pixel frames of the latents by their numbers in the clip
    that `segments` counts, ascending: `range(F)`, or others where the clip was brought to another frame rate;
    F = 1 + r (T - 1).
    Hashable, because results are cached. Raises ConfigError for another F.
    """
    if not places or (len(places) - 1) % temporal_ratio:
        raise ConfigError(f"a clip of {len(places)} frames; a codec of temporal ratio {temporal_ratio} takes 1 + r k")
    found = []
    for latent in range(1 + (len(places) - 1) // temporal_ratio):
        first = max(0, temporal_ratio * (latent - 1) + 1)
        covered = places[first : temporal_ratio * latent + 1]
        counts = [bisect_left(covered, end) - bisect_left(covered, start) for start, end in segments]
        most = max(counts, default=0)
        is_owned = most > 0 and most >= len(covered) - sum(counts)
        found.append(counts.index(most) if is_owned else NONE)
    return tuple(found)


def latent_labels(
    labels_S: Tensor | Sequence[int], *, num_frames: int, frames_per_segment: int, temporal_ratio: int
) -> Tensor:
    """Labels [T] of the latent frames of a clip in `equal_segments`; see `owners` for the rule.

    Raises ConfigError for `num_frames` that is not 1 + r k, DataError for another number of labels than segments.
    """
    import torch

    segments = equal_segments(num_frames, frames_per_segment)
    labels_S = torch.as_tensor(labels_S)
    if labels_S.shape != (len(segments),):
        raise DataError(
            f"{list(labels_S.shape)} labels; {num_frames} frames in segments of {frames_per_segment} have "
            f"{len(segments)}, a tail shorter than half a segment belonging to the last one"
        )
    return labels_S[list(owners(segments, range(num_frames), temporal_ratio))]


def places_of(num_frames: int, own_fps: float, fps: float | None) -> Sequence[int]:
    """The frame of a clip at `own_fps` that each of `num_frames` frames at `fps` shows, as `media.decode_clip` chooses.

    The nearest in time, halves to the even one. Without `fps` the frames are the clip's own.
    """
    if fps is None:
        return range(num_frames)
    own, wanted = (Fraction(rate).limit_denominator(_LARGEST_DENOMINATOR) for rate in (own_fps, fps))
    return tuple(round(number * own / wanted) for number in range(num_frames))


def clip_label(labels_S: Sequence[int]) -> int:
    """The label of the whole clip, by majority of its segments; 0 where both signs are equally many.

    DenseDPO states no rule for that case.
    """
    total = sum(labels_S)
    return (total > 0) - (total < 0)


def is_labelled(labels_S: Sequence[int], least: float = LEAST_LABELLED) -> bool:
    """Whether at least the share `least` of the segments, and at least one, is no tie; a row without labels is not."""
    count = sum(label != 0 for label in labels_S)
    return count > 0 and count / len(labels_S) >= least


def read_labels(rows: Dataset, where: str = "") -> tuple[list[list[int]], list[Segments] | None]:
    """The labels [S] and the segments of each row, checked; empty labels where a row has none yet.

    Without a column `segments` the second is None, and labels may have any length. Raises DataError naming `where`, the
    row and the value: labels other than 1, 0 and -1, another number than segments, segments that are empty, overlap,
    are not in order, or end after `num_frames`.
    """
    has = {SEGMENTS, "num_frames"} & set(rows.column_names)
    labels = [[] if values is None else values for values in column(rows, LABELS).to_pylist()]
    cells = column(rows, SEGMENTS).to_pylist() if SEGMENTS in has else None
    frames = column(rows, "num_frames").to_pylist() if "num_frames" in has else [None] * len(rows)
    segments: list[Segments] = []
    for row, own in enumerate(labels):
        place = f"{where}, row {row}" if where else f"row {row}"
        if not isinstance(own, list):
            raise DataError(f"{place}: labels are {own!r:.80}; give a list of 1, 0 and -1, one for each segment")
        for number, label in enumerate(own):
            if label not in (1, 0, -1):
                raise DataError(f"{place}: label {number} is {label}; labels are 1 (the first clip), 0 (tie) and -1")
        if cells is not None:
            segments.append(checked_segments(cells[row], frames[row], place))
            if own and len(own) != len(segments[-1]):
                raise DataError(f"{place}: {len(own)} labels {own} for {len(segments[-1])} segments; give one for each")
    return labels, segments if cells is not None else None


def checked_segments(cell: Any, num_frames: int | None, place: str) -> Segments:
    """The segments in a cell of a row. Raises DataError naming `place`, as `read_labels` does."""
    if num_frames is not None and type(num_frames) is not int:
        raise DataError(f"{place}: num_frames is {num_frames!r:.80}; give an integer")
    pairs = cell if isinstance(cell, list | tuple) else []
    if not pairs or not all(isinstance(pair, list | tuple) and [*map(type, pair)] == [int, int] for pair in pairs):
        raise DataError(f"{place}: segments are {cell!r:.200}; give [start, end) in frames, two integers, for each")
    edges = [0, *(edge for segment in cell for edge in segment), math.inf if num_frames is None else num_frames]
    gaps = [edges[i + 1] - edges[i] for i in range(0, len(edges), 2)]
    lengths = [edges[i + 1] - edges[i] for i in range(1, len(edges) - 1, 2)]
    if min(gaps) < 0 or min(lengths) < 1:
        known = "" if num_frames is None else f" of {num_frames} frames"
        raise DataError(
            f"{place}: segments are {cell}; give [start, end) in frames of the clip{known}, in order, without overlap"
        )
    return tuple((start, end) for start, end in cell)

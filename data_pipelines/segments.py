"""Pairs of clips with labels of their segments: reading the dense format, and statistics of labels for manifests.

The format is that of docs/formats.md; the records and the mapping to latent frames are in `alignkit.segments`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.segments import (
    CODEC,
    LABELS,
    SEGMENTS,
    clip_label,
    equal_segments,
    is_labelled,
    latent_labels,
    read_labels,
)
from data_pipelines.rows import load_rows

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["clip_label", "equal_segments", "is_labelled", "latent_labels", "load_dense", "statistics"]

REQUIRED = (("prompt",), ("videos", "latents"), (LABELS,))
OPTIONAL = (SEGMENTS, "num_frames", "fps", CODEC)  # a trainer says which it needs


def load_dense(path: Path, split: str, *, held_out: float, root: Path | None = None) -> Dataset:
    """The "train" or "heldout" rows at `path`, see `rows.load_rows`; labels and segments of all rows are checked.

    Raises DataError naming the row and the value of a label or segment that `alignkit.segments.read_labels` refuses.
    """
    return load_rows(path, split, held_out=held_out, columns=REQUIRED, root=root, optional=OPTIONAL, check=read_labels)


def statistics(labels: Sequence[Sequence[int]], truth: Sequence[Sequence[int]] | None = None) -> Mapping[str, Any]:
    """What a manifest says of the labels of its pairs; shares are null where nothing is counted.

    `tie_rate` is over segments; `mixed` is the share of pairs with both signs, `usable` of those that `is_labelled`
    keeps. With `truth`, labels of the same segments: `agreement` with it by segment and by clip (majority), over those
    whose truth is no tie, as in DenseDPO's table 3a, and the share of these that the labels call a tie.
    """
    labelled = [own for own in labels if own]
    flat = [label for own in labelled for label in own]
    result: dict[str, Any] = {"pairs": len(labels), "labelled": len(labelled), "segments": len(flat)}
    result["tie_rate"] = _share([label == 0 for label in flat])
    result["mixed"] = _share([{1, -1} <= set(own) for own in labelled])
    result["usable"] = _share([is_labelled(own) for own in labelled])
    if truth is not None:
        known = [(own, true) for own, true in zip(labels, truth, strict=True) if own and true]
        clips = [(clip_label(own), clip_label(true)) for own, true in known]
        segments = [pair for own, true in known for pair in zip(own, true, strict=True)]
        result["agreement"] = {"segments": _agreement(segments), "clips": _agreement(clips)}
    return result


def _agreement(pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    counted = [(own, true) for own, true in pairs if true]
    equal = _share([own == true for own, true in counted])
    return {"counted": len(counted), "equal": equal, "tie": _share([own == 0 for own, _ in counted])}


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None

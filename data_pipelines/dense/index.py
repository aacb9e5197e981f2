"""The pairs of a finished dense-pairs stage by their ids, without the media, which are read for one pair at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alignkit.errors import DataError
from alignkit.segments import LABELS, Segments, checked_segments
from alignkit.storage import Part, read_row, read_schema, read_table
from data_pipelines.dense.rows import SCHEDULE, WEIGHTS
from data_pipelines.dense.shown import MEDIA
from data_pipelines.dense.votes import IDENTITY, pair_id

NEEDED = ("prompt", "prompt_id", "segments", LABELS, "label_source", "fps")


@dataclass(frozen=True, slots=True)
class IndexedPair:
    """A row without its media: `path` and `number` say where it is; `truth` are known labels, empty without any."""

    id: str
    path: str
    number: int
    where: str  # for messages
    source_id: str
    prompt: str
    fps: float
    segments: Segments
    truth: Sequence[int]


@dataclass
class Index:
    """The pairs of a folder in order, by id. `truth_column`: whether the data has the labels to compare with."""

    folder: Path
    parts: Sequence[Part]
    pairs: dict[str, IndexedPair]
    has_truth: bool

    @cached_property
    def by_file(self) -> Mapping[str, Sequence[IndexedPair]]:
        """The pairs of each file, in order."""
        found: dict[str, list[IndexedPair]] = {}
        for pair in self.pairs.values():
            found.setdefault(pair.path, []).append(pair)
        return found

    def batches(self, pairs: Sequence[IndexedPair], size: int) -> Iterator[list[IndexedPair]]:
        """At most `size` of `pairs` at a time, each batch from one file."""
        for _, own in itertools.groupby(pairs, lambda pair: pair.path):
            while batch := list(itertools.islice(own, size)):
                yield batch

    def media(self, pair: IndexedPair) -> Mapping[str, Any]:
        """The row of a pair with its media."""
        file = self.folder / pair.path
        names = {*NEEDED, *MEDIA, "codec", "sampling"} & set(read_schema(file).names)
        return read_row(file, pair.number, sorted(names))


def read_index(folder: Path, parts: Sequence[Part], truth: str | None) -> Index:
    """The pairs of `parts`; `truth` may name a column of labels of theirs.

    Raises DataError for rows that lack a column, segments that are none, two pairs of one id, and known labels of
    another number than segments or other than 1, 0 and -1; where there is no pair at all.
    """
    pairs: dict[str, IndexedPair] = {}
    has_truth = False
    for path in (path for part in parts for path in part.files):
        names = read_schema(folder / path).names
        missing = [name for name in NEEDED if name not in names]
        if missing:
            raise DataError(f"'{folder / path}' lacks the columns {', '.join(missing)}; make the pairs again")
        has_truth |= truth in names
        wanted = {*IDENTITY, WEIGHTS, SCHEDULE, *NEEDED, *({truth} if truth else ())} & set(names)
        for number, row in enumerate(read_table(folder / path, columns=sorted(wanted)).to_pylist()):
            pair = _indexed(row, path, number, f"'{folder / path}', row {number}", truth)
            if pair.id in pairs:
                raise DataError(f"{pair.where} and {pairs[pair.id].where} are one pair; remove one of them")
            pairs[pair.id] = pair
    if not pairs:
        raise DataError(f"'{folder}' holds no pair; make pairs with `alignkit dense-pairs`")
    return Index(folder, parts, pairs, has_truth)


def _indexed(row: Mapping[str, Any], path: str, number: int, where: str, truth: str | None) -> IndexedPair:
    segments = checked_segments(row["segments"], row.get("num_frames"), where)
    known = (row.get(truth) or []) if truth else []
    if known and (len(known) != len(segments) or not set(known) <= {1, 0, -1}):
        raise DataError(
            f"{where}, column {truth}: labels {known} for {len(segments)} segments; give 1, 0 or -1 for each"
        )
    source, fps = row.get("source_id") or "", row["fps"]
    return IndexedPair(pair_id(row), path, number, where, source, row["prompt"], fps, segments, known)

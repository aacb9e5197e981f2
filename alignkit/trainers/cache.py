"""Rows encoded once, by all processes of a job together, and read again by any later job.

Each process maps one contiguous range of whole batches into an Arrow part of its own; an index (JSON) that lists the
parts in order is written when all are there. A job with another number of processes reads the same index. The ranges
end between batches, so all values are those of a job of one process, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets

from alignkit.errors import DataError
from alignkit.provenance import write_text
from alignkit.trainers.sharding import Ranks


def encode_cached(
    rows: datasets.Dataset,
    encode: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]],
    index: Path,
    *,
    removed: Sequence[str],
    batch_size: int,
    ranks: Ranks,
) -> datasets.Dataset:
    """`rows` with the columns that `encode(batch, row numbers)` adds and without those `removed`.

    Raises DataError when `index` lies in a folder that not all processes share.
    """
    present = _read(index)
    start, stop = share_of(len(rows), batch_size, ranks)
    if present is None and stop > start:
        own = rows.select(range(start, stop))
        part = _part(index, ranks.rank, ranks.world)
        own.map(
            lambda batch, numbers: encode(batch, [start + number for number in numbers]),
            batched=True,
            with_indices=True,
            batch_size=batch_size,
            remove_columns=list(removed),
            cache_file_name=str(part),
            new_fingerprint=part.stem,
            desc="latents",
        )
    ranks.wait()
    if present is None and ranks.rank == 0:
        _publish(index, len(rows), batch_size, ranks.world)
    ranks.wait()
    present = _read(index)
    if present is None:
        raise DataError(
            f"{index} is not visible to process {ranks.rank}: give a cache_dir that all nodes share, or set "
            "save_on_each_node, with which each node encodes for itself"
        )
    return datasets.concatenate_datasets(present)


def share_of(count: int, batch_size: int, ranks: Ranks) -> tuple[int, int]:
    """The range [start, stop) of `count` rows that a process encodes: whole batches, as even as they allow."""
    batches = -(-count // batch_size)
    start, stop = (batch_size * (batches * rank // ranks.world) for rank in (ranks.rank, ranks.rank + 1))
    return min(start, count), min(stop, count)


def _part(index: Path, rank: int, world: int) -> Path:
    return index.with_name(f"{index.stem}-{rank}-of-{world}.arrow")


def _publish(index: Path, count: int, batch_size: int, world: int) -> None:
    parts = []
    for rank in range(world):
        start, stop = share_of(count, batch_size, Ranks(rank, world))
        part = _part(index, rank, world)
        if stop > start and not part.is_file():
            raise DataError(
                f"the part {part} of process {rank} is missing: give a cache_dir that all nodes share, or set "
                "save_on_each_node, with which each node encodes for itself"
            )
        if stop > start:
            parts.append(part.name)
    write_text(index, json.dumps(parts, indent=2) + "\n")


def _read(index: Path) -> list[datasets.Dataset] | None:
    """The parts that `index` lists, or None where it or one of them is missing."""
    if not index.is_file():
        return None
    parts = [index.with_name(name) for name in json.loads(index.read_text(encoding="utf-8"))]
    if not all(part.is_file() for part in parts):
        return None
    return [datasets.Dataset.from_file(str(part)) for part in parts]

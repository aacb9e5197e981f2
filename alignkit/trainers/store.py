"""Tensors stored under the content that they were made from, and made once, by all processes of a job together.

A store is a folder of Arrow files (memory-mapped by `datasets`). The name of each file is the SHA-256 of its bytes, so
damage is noticed without an index: a damaged file is removed, and its rows are made again. A file appears only when it
is whole, so a killed job continues. Not here: what the keys and the rows are (`content`, `latents`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pa_compute
import torch
from datasets.utils import tqdm
from torch import Tensor

from alignkit.columns import column
from alignkit.errors import DataError
from alignkit.escape import get_logger, to_line
from alignkit.storage import checksum, write_atomic
from alignkit.trainers.sharding import Ranks

logger = get_logger(__name__)
PART_BYTES = 2**27  # of tensors in one file: damage or a kill costs no more work than that
KEY = "key"  # the column of keys
SHAPE, DTYPE = ".shape", ".dtype"  # suffixes of the columns beside a tensor's
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TYPES = {bytes: pa.large_binary(), str: pa.string(), int: pa.int64(), list: pa.list_(pa.int64())}

Row = Mapping[str, Any]


class Store:
    """A folder of rows by their keys, shared by all jobs that use it."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks

    def rows(self, keys: Sequence[str], make: Callable[[list[int]], Sequence[Row]], batch_size: int) -> Any:
        """A `datasets.Dataset` with the stored row of each key, in their order.

        `make(numbers)` makes the rows of the keys at these positions (see `packed`); it is called with `batch_size` of
        them for keys that are not stored. All processes call this together; each makes a share of whole batches, so
        the values are those of one process. Raises DataError where the processes share no folder.
        """
        self._remove_damaged()
        present, places = self._find(keys)
        first = {keys[number]: number for number in reversed(np.flatnonzero(places < 0).tolist())}
        missing = self.ranks.broadcast(sorted(first.values()))
        if missing:
            start, stop = share_of(len(missing), batch_size, self.ranks)
            self._write(keys, make, [missing[place : place + batch_size] for place in range(start, stop, batch_size)])
            self.ranks.wait()
            present, places = self._find(keys)
        if present is None or (places < 0).any():
            raise DataError(
                f"'{self.folder}' lacks rows that another process made, as seen by process {self.ranks.rank}: give a "
                "cache_dir that all nodes share, or set save_on_each_node, with which each node encodes for itself"
            )
        return present.select(places)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.arrow"))

    def _find(self, keys: Sequence[str]) -> tuple[datasets.Dataset | None, np.ndarray]:
        """All stored rows, and the number of each key's row among them, -1 where there is none."""
        parts = [datasets.Dataset.from_file(str(file)) for file in self._files()]
        if not parts:
            return None, np.full(len(keys), -1)
        present = datasets.concatenate_datasets(parts)
        found = pa_compute.index_in(pa.array(keys), value_set=column(present, KEY).combine_chunks())
        return present, pa_compute.fill_null(found, -1).to_numpy()

    def _remove_damaged(self) -> None:
        own = self._files()[self.ranks.rank :: self.ranks.world]
        with ThreadPoolExecutor() as pool:
            damaged = [file for file, found in zip(own, pool.map(checksum, own), strict=True) if found != file.stem]
        for file in damaged:
            logger.warning("'%s' is damaged (its checksum differs from its name); its rows are made again", file)
            file.unlink(missing_ok=True)
        self.ranks.wait()

    def _write(
        self, keys: Sequence[str], make: Callable[[list[int]], Sequence[Row]], batches: Sequence[list[int]]
    ) -> None:
        rows: list[dict[str, Any]] = []
        held = 0
        try:
            for numbers in tqdm(batches, desc=to_line(f"{self.folder.name}, batches")):
                made = [{KEY: keys[number], **row} for number, row in zip(numbers, make(numbers), strict=True)]
                rows += made
                held += sum(len(value) for row in made for value in row.values() if isinstance(value, bytes))
                if held >= PART_BYTES:
                    self._write_part(rows)
                    rows, held = [], 0
        finally:  # what was made before a damaged row or an interruption is not made again
            if rows:
                self._write_part(rows)

    def _write_part(self, rows: Sequence[dict[str, Any]]) -> None:
        schema = pa.schema([(name, _TYPES[type(value)]) for name, value in rows[0].items()])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist(list(rows), schema))
        data = memoryview(sink.getvalue())
        write_atomic(self.folder / f"{hashlib.sha256(data).hexdigest()}.arrow", data)


def share_of(count: int, batch_size: int, ranks: Ranks) -> tuple[int, int]:
    """The range [start, stop) of `count` rows that a process makes: whole batches, as even as they allow."""
    batches = -(-count // batch_size)
    start, stop = (batch_size * (batches * rank // ranks.world) for rank in (ranks.rank, ranks.rank + 1))
    return min(start, count), min(stop, count)


# --- tensors in rows --------------------------------------------------------------------------------------------------


def packed(tensors: Mapping[str, tuple[Tensor, torch.dtype]]) -> dict[str, Any]:
    """The columns of a row that hold `tensors`, each with the precision of the encoder that computed it."""
    row: dict[str, Any] = {}
    for name, (tensor, dtype) in tensors.items():
        row[name], row[name + DTYPE] = pack(tensor, dtype)
        row[name + SHAPE] = list(tensor.shape)
    return row


def unpacked(row: Row, name: str) -> Tensor:
    """The tensor `name` of a row, in the dtype that it was stored in."""
    return unpack(row[name], row[name + SHAPE], row[name + DTYPE])


def pack(tensor: Tensor, dtype: torch.dtype) -> tuple[bytes, str]:
    """Bytes of a tensor and the name of their dtype: `dtype` (the encoder's) where that loses nothing, else float32.

    The result of an encoder in half precision then takes half the space of float32. What LZ4 makes smaller is stored
    compressed: the zeros that families pad conditioning with take no space.
    """
    wide = tensor.detach().float().cpu()
    narrow = wide.to(dtype) if dtype in (torch.bfloat16, torch.float16) else wide
    chosen = narrow if torch.equal(narrow.float(), wide) else wide
    raw = chosen.reshape(-1).view(torch.uint8).numpy().tobytes()
    short = pa.compress(raw, codec="lz4", asbytes=True)
    return min(raw, short, key=len), str(chosen.dtype).removeprefix("torch.")


def unpack(raw: bytes, shape: Sequence[int], dtype: str) -> Tensor:
    """The tensor that `pack` stored, in the dtype that it was stored in."""
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if len(raw) != size:
        raw = pa.decompress(raw, decompressed_size=size, codec="lz4", asbytes=True)
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(tuple(shape))

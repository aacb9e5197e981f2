"""Keys of the latents cache: digests of what a row holds, and of all that its encoding depends on.

Media count with all their bytes, those in files too: hashing reads 1 to 2 GB/s a process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pa_compute

from alignkit.adapters.fingerprint import fingerprint
from alignkit.columns import once_each, stored_places
from alignkit.generators.prompt_length import tokenizers_of
from alignkit.trainers.buckets import AS_THEY_ARE, Sizes
from alignkit.trainers.sharding import Ranks
from alignkit.trainers.store import share_of

if TYPE_CHECKING:
    import datasets

    from alignkit.generators.pipeline import PipelineGenerator

FORMAT = 3  # of the cache; another number makes old caches unused


def latents_key(generator: PipelineGenerator, sizes: Sizes = AS_THEY_ARE) -> str:
    """Identifies what latents depend on beside a row's media: the codec, its settings, and how media are resized."""
    vae = generator.pipeline.components["vae"]
    config = {name: str(value) for name, value in vae.config.items() if not name.startswith("_")}
    settings = [config, astuple(sizes), generator.pixel_multiple, generator.frame_step]
    return _key(generator, fingerprint(vae), settings)


def conditioning_key(generator: PipelineGenerator) -> str:
    """Identifies what conditioning depends on beside a prompt: text encoders, tokenizers and their limits."""
    words = {}
    for name, tokenizer in tokenizers_of(generator.pipeline).items():
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
        words[name] = [_sha256(vocabulary), list(generator.text_window(tokenizer))]
    return _key(generator, fingerprint(*generator.conditioner.encoders.values()), [words])


def _key(generator: PipelineGenerator, weights: str, settings: Sequence[Any]) -> str:
    kind = type(generator)
    parts = [FORMAT, f"{kind.__module__}.{kind.__qualname__}", weights, *settings]
    return _sha256(json.dumps(parts, sort_keys=True, default=str).encode())[:16]


def prompt_digests(prompts: Sequence[str]) -> list[str]:
    """The key of each prompt's conditioning."""
    return list(once_each(prompts, lambda prompt: _sha256(prompt.encode())))


def row_digests(rows: datasets.Dataset, column: str, ranks: Ranks) -> list[str]:
    """The key of each row's latents: all bytes of its media in `column`, or the latents that it holds.

    All processes call this together; each reads a part of the rows, in the order in which they are stored.
    """
    start, stop = share_of(len(rows), 1, ranks)
    stored, order = np.unique(stored_places(rows)[start:stop], return_inverse=True)
    digests: list[str] = []
    begin = 0
    for cells in rows.data.column(column).chunks:
        end = begin + len(cells)
        digests += _digests(cells, stored[slice(*stored.searchsorted([begin, end]))] - begin)
        begin = end
    return ranks.gather([digests[place] for place in order.tolist()])


def _digests(cells: pa.Array, rows: np.ndarray) -> Iterator[str]:
    """The digests of these rows of `cells`, whose bytes are not copied."""
    is_list = pa.types.is_list(cells.type)
    media = pa_compute.list_flatten(cells) if is_list else cells
    if not pa.types.is_struct(media.type):
        yield from (_whole_digest(cells.slice(row, 1)) for row in rows.tolist())
        return
    counts = pa_compute.list_value_length(cells).fill_null(0).to_numpy() if is_list else np.ones(len(cells), np.int64)
    stops = counts.cumsum()[rows]
    starts = stops - counts[rows]
    encoded, paths = (pa_compute.struct_field(media, name) for name in ("bytes", "path"))
    if encoded.null_count:
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            raw = [_raw(encoded[place], paths[place]) for place in range(start, stop)]
            yield _row_digest([len(part) for part in raw], raw)
        return
    data, places = _buffer(encoded)
    lengths = np.diff(places).tolist()
    ranges = (array.tolist() for array in (starts, stops, places[starts], places[stops]))
    for start, stop, first, last in zip(*ranges, strict=True):
        yield _row_digest(lengths[start:stop], [data[first:last]])


def _buffer(encoded: pa.Array) -> tuple[memoryview, np.ndarray]:
    """The bytes of all elements, side by side, and the places where each begins, with the end of the last."""
    kind = np.int64 if pa.types.is_large_binary(encoded.type) else np.int32
    _, offsets, data = encoded.buffers()
    places = np.frombuffer(offsets, kind)[encoded.offset : encoded.offset + len(encoded) + 1]
    return memoryview(b"" if data is None else data), places


def _row_digest(lengths: Sequence[int], parts: Sequence[Any]) -> str:
    digest = hashlib.sha256(repr(lengths).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _raw(encoded: pa.Scalar, path: pa.Scalar) -> bytes | pa.Buffer:
    """The bytes of a medium; of one that cannot be read its path, for the decoder names it."""
    if encoded.is_valid:
        return encoded.as_buffer()
    file = path.as_py()
    return Path(file).read_bytes() if file is not None and Path(file).is_file() else f"{file}".encode()


def _whole_digest(cell: pa.Array) -> str:
    sink = pa.BufferOutputStream()
    batch = pa.record_batch([cell], ["cell"])
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return _sha256(memoryview(sink.getvalue()))


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()

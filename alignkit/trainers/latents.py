"""Media and prompts become cached latents and conditioning, and items with their random draws.

The cache consists of Arrow files (memory-mapped by `datasets`) outside the dataset, keyed by the weights of codec and
text encoders and by the data, so that a second run, another seed or another loss starts at once.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pa_compute
import torch
from torch import Tensor

from alignkit.adapters.fingerprint import fingerprint
from alignkit.errors import DataError
from alignkit.media import decode_clip, decode_image, fit, to_pixels
from alignkit.records import Conditioning, Prompt, Texts
from alignkit.trainers.buckets import AS_THEY_ARE, Sizes
from alignkit.trainers.cache import encode_cached
from alignkit.trainers.data import EpochData, draw_ids
from alignkit.trainers.draws import DrawPlan
from alignkit.trainers.sharding import Ranks

if TYPE_CHECKING:
    import datasets
    import numpy as np

    from alignkit.generators.pipeline import PipelineGenerator

COND = "cond."  # prefix of conditioning columns and batch keys
PROMPT = "prompt"  # column and batch key of the text itself
LATENTS = "latents"  # column and batch key of latents; as a column of the data they are not encoded
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of cached tensors
FORMAT = 2  # of the cache; another number makes old caches unused
COLUMNS = {"image": ("images", "image"), "video": ("videos", "video")}  # of media, by modality


class LatentDataset(EpochData):
    """Cached rows with draws of their own in each `epoch`, which the trainer sets.

    Args:
        rows: the cache's rows; columns prompt_id, latents and conditioning as bytes, `shape` (of the latents [K, ...])
            and `dtypes`.
        targets: per row what the loss compares with, by its batch key: phi [K], labels [T], ...
        cond_shapes: shapes of one row's conditioning, by its column.
        plan: how time, noise and caption dropout are drawn.
        key: identifies the cached values; default: the fingerprint that `datasets` gives `rows`.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        targets: Mapping[str, Sequence[Tensor] | Tensor],
        cond_shapes: Mapping[str, Sequence[int]],
        plan: DrawPlan,
        key: str | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.targets, self.cond_shapes, self.plan = rows, dict(targets), dict(cond_shapes), plan
        self.key = key or rows._fingerprint  # noqa: SLF001 - the name `datasets` itself keys its cache with
        self.latent_shapes = [tuple(shape) for shape in rows["shape"][:]]
        self.draw_ids = draw_ids(rows["prompt_id"])
        self.picked: Tensor | None = None  # [rows, k] candidate numbers, where not all are used
        self.reference: Tensor | None = None  # [epochs, rows, k], once precomputed

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only; each keeps its draws."""
        self.rows = self.rows.select(rows)
        for name, values in self.targets.items():
            self.targets[name] = values[torch.tensor(rows)] if torch.is_tensor(values) else [values[i] for i in rows]
        self.latent_shapes = [self.latent_shapes[row] for row in rows]
        self.draw_ids = [self.draw_ids[row] for row in rows]

    def pick(self, candidates_Nk: Tensor, *, targets: Sequence[str]) -> None:
        """Keep these candidates of each row, in this order; `targets` are those with one value a candidate."""
        self.picked = candidates_Nk
        for name in targets:
            rows = zip(self.targets[name], candidates_Nk, strict=True)
            self.targets[name] = torch.stack([values[candidates] for values, candidates in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        shapes = {**self.cond_shapes, LATENTS: self.latent_shapes[index]}
        item: dict[str, Any] = {}
        for name, shape in shapes.items():
            item[name] = unpack(row[name], shape, row["dtypes"][name]).float()
        if self.picked is not None:
            item[LATENTS] = item[LATENTS][self.picked[index]]
        item |= {name: values[index] for name, values in self.targets.items()}
        item["row"] = torch.tensor(index)
        draws = self.plan.draw(self.draw_ids[index], self.epoch, item[LATENTS].shape)
        item |= {"t": draws.t, "noise": draws.noise, "dropped": torch.tensor(draws.dropped)}
        if self.reference is not None:
            item["reference_err"] = self.reference[self.epoch, index]
        if PROMPT in row:  # text encoders that are trained read it anew in each step
            item[PROMPT] = row[PROMPT]
        return item


def pack(tensor: Tensor, dtype: torch.dtype) -> tuple[bytes, str]:
    """Bytes of a tensor and the name of their dtype: `dtype` (the encoder's) where that loses nothing, else float32.

    The result of an encoder in half precision then takes half the space of float32.
    """
    wide = tensor.detach().float().cpu()
    narrow = wide.to(dtype) if dtype in (torch.bfloat16, torch.float16) else wide
    chosen = narrow if torch.equal(narrow.float(), wide) else wide
    return chosen.reshape(-1).view(torch.uint8).numpy().tobytes(), str(chosen.dtype).removeprefix("torch.")


def unpack(raw: bytes, shape: Sequence[int], dtype: str) -> Tensor:
    """The tensor that `pack` stored, in the dtype that it was stored in."""
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(tuple(shape))


def conditioning(batch: Mapping[str, Any], null: Mapping[str, Tensor]) -> Conditioning | Texts:
    """The batch's Conditioning [P, ...] with its caption dropout applied; Texts if the batch has the prompts."""
    tensors = {key.removeprefix(COND): value for key, value in batch.items() if key.startswith(COND)}
    null = {name: tensor.to(batch["dropped"].device) for name, tensor in null.items()}
    cached = Conditioning(tensors, null).drop(batch["dropped"])
    return Texts(batch[PROMPT], batch["dropped"], cached) if PROMPT in batch else cached


class Encoder:
    """Turns rows (prompt, media) into rows of bytes; batched by `datasets.map`.

    Every row goes to the size of its first medium's bucket; `column` holds a medium or a list of `count` ones, or
    latents [K, ...], which are stored as they are.
    """

    def __init__(self, generator: PipelineGenerator, column: str, count: int, sizes: Sizes) -> None:
        self.generator, self.column, self.count, self.sizes = generator, column, count, sizes
        self.is_video = generator.modality == "video"

    @torch.no_grad()
    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        numbered = list(zip(indices, batch[self.column], strict=True))
        if self.column == LATENTS:
            latents, changed = [self._given_latents(*pair) for pair in numbered], [0] * len(numbered)
        else:
            rows = [self._row(*pair) for pair in numbered]
            latents, changed = self._latents([pixels for pixels, _ in rows]), [number for _, number in rows]
        cond = self.generator.encode_prompts(batch["prompt"])
        columns = {LATENTS: (latents, self.generator.pipeline.vae.dtype)}
        columns |= {COND + name: (list(tensor), tensor.dtype) for name, tensor in cond.tensors.items()}
        result: dict[str, list[Any]] = {"shape": [list(row.shape) for row in latents], "changed": changed}
        result["dtypes"] = [{} for _ in latents]
        for name, (tensors, dtype) in columns.items():
            packed = [pack(tensor, dtype) for tensor in tensors]
            result[name] = [raw for raw, _ in packed]
            for stored, (_, kind) in zip(result["dtypes"], packed, strict=True):
                stored[name] = kind
        return result

    def _given_latents(self, row: int, cells: Any) -> Tensor:
        latents = torch.from_numpy(np.asarray(cells, np.float32))
        axes = 5 if self.is_video else 4
        channels = self.generator.latent_channels
        if latents.dim() != axes or len(latents) != self.count or latents.shape[1] != channels:
            layout = "[K, C, T, H, W]" if self.is_video else "[K, C, H, W]"
            raise DataError(
                f"row {row}: latents of shape {list(latents.shape)}; the model takes {layout} with K = {self.count} as "
                f"in row 0 and C = {channels}"
            )
        return latents

    def _latents(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Latents [K, ...] of each row; rows of one size are encoded together, but clips each alone: they are large."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, tensor in enumerate(pixels):
            groups[tensor.shape].append(row)
        found: dict[int, Tensor] = {}
        for rows in groups.values():
            together = torch.stack([pixels[row] for row in rows]).flatten(0, 1)
            parts = together.split(1 if self.is_video else len(together))
            latents = torch.cat([self.generator.encode(part.to(self.generator.device)) for part in parts])
            found |= zip(rows, latents.unflatten(0, (len(rows), -1)), strict=True)
        return [found[row] for row in range(len(pixels))]

    def _row(self, row: int, cells: Any) -> tuple[Tensor, int]:
        """Pixels [K, 3, H, W] or [K, F, 3, H, W] of a row, and how many of its media had another size."""
        cells = cells if isinstance(cells, list) else [cells]
        if len(cells) != self.count:
            raise DataError(
                f"row {row}: {len(cells)} candidates, row 0 has {self.count}; give all rows the same number"
            )
        media = self._read(row, cells)
        (height, width), multiple = media[0].shape[1:3], self.generator.pixel_multiple
        size = self.sizes.bucket(height, width, multiple)
        if not all(size):
            raise DataError(f"row {row}: {width} x {height} pixels, below the {multiple} that the model needs")
        pixels = [to_pixels(fit(frames, size, multiple)) for frames in media]
        changed = sum(frames.shape[1:3] != size for frames in media)
        return torch.stack([frames if self.is_video else frames[0] for frames in pixels]), changed

    def _read(self, row: int, cells: Sequence[Any]) -> list[np.ndarray]:
        """The frames [F, H, W, 3] of each medium; of an image one."""
        where = [f"row {row}, candidate {k}" for k in range(len(cells))]
        if not self.is_video:
            return [decode_image(*pair)[None] for pair in zip(cells, where, strict=True)]
        wished, fps = self.sizes.num_frames, self.sizes.fps
        clips = [decode_clip(*pair, count=wished, fps=fps) for pair in zip(cells, where, strict=True)]
        shortest = min(len(frames) for frames in clips)
        frames = self.sizes.frames(shortest, self.generator.temporal_ratio)
        if shortest < frames:
            raise DataError(
                f"row {row}: a clip has {shortest} frames, num_frames asks for {frames}; lower it or remove the row"
            )
        return [clip[:frames] for clip in clips]


def phi_targets(rows: datasets.Dataset, count: int) -> dict[str, Tensor]:
    """{"phi": [N, K]} of ranked rows; 0 where the data has no phi. Raises DataError naming a row that does not fit."""
    if "phi" not in rows.column_names:
        return {"phi": torch.zeros(len(rows), count)}
    phi = rows["phi"][:]
    for row, values in enumerate(phi):
        if len(values) != count or not all(0 <= value <= 1 for value in values):
            wanted = f"{count} finite numbers within 0 and 1, one a candidate"
            raise DataError(f"row {row}: phi is {values}; it must be {wanted}")
    return {"phi": torch.tensor(phi, dtype=torch.float32)}


def encode_rows(
    generator: PipelineGenerator,
    rows: datasets.Dataset,
    plan: DrawPlan,
    cache_dir: Path,
    *,
    sizes: Sizes = AS_THEY_ARE,
    batch_size: int = 16,
    targets: Callable[[datasets.Dataset, int], Mapping[str, Sequence[Tensor] | Tensor]] = phi_targets,
    ranks: Ranks = Ranks(),  # noqa: B008 - a frozen record
) -> LatentDataset:
    """Encode `rows` (columns prompt, images or videos or latents; prompt_id optional) once, or reuse the cache.

    A column `image` or `video` holds a medium instead of a list. `targets(rows, K)` reads what the loss compares with;
    targets are not part of the cache, so the same media under other labels share one. All processes of a job call
    this together; each encodes a part. Raises DataError for missing columns, no rows, and, naming the row, for K that
    differs, targets that do not fit, or a medium that cannot be decoded, is smaller than the model's patch or shorter
    than `num_frames`.
    """
    column = _media_column(generator, rows)
    if not len(rows):
        raise DataError("training data has no row")
    rows = _with_ids(rows if column == LATENTS else _undecoded(rows, column))
    count = _count(rows[0][column])
    if not count:
        raise DataError("row 0: no image; remove the row")
    loaded = targets(rows, count)
    key = cache_key(generator, rows, sizes)
    cache_dir.mkdir(parents=True, exist_ok=True)
    encoded = encode_cached(
        rows,
        Encoder(generator, column, count, sizes),
        cache_dir / f"latents-{key}.json",
        removed=[name for name in rows.column_names if name != "prompt_id"],
        batch_size=batch_size if generator.modality == "image" else 1,
        ranks=ranks,
    )
    with torch.no_grad():
        null = generator.encode_prompts([""])
    shapes = {COND + name: tuple(tensor.shape[1:]) for name, tensor in null.tensors.items()}
    return LatentDataset(encoded, loaded, shapes, plan, key)


def _media_column(generator: PipelineGenerator, rows: datasets.Dataset) -> str:
    """The column that holds what `generator` makes. Raises DataError for other media, or when a column is missing."""
    names = COLUMNS[generator.modality]
    if {LATENTS, "prompt"} <= set(rows.column_names):
        return LATENTS
    present = [name for name in names if name in rows.column_names]
    foreign = {name for both in COLUMNS.values() for name in both}.intersection(rows.column_names)
    if foreign and not present:
        raise DataError(
            f"the data holds {sorted(foreign)}, '{generator.name}' makes {names[0]}; give data with {names[0]}, or "
            "another model"
        )
    missing = {"prompt"} - set(rows.column_names) | (set() if present else {names[0]})
    if missing:
        raise DataError(f"training data lacks {sorted(missing)}; its columns are {rows.column_names}")
    return present[0]


def _undecoded(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Media as bytes or paths: a damaged one is then named by its row, and nothing is decoded twice."""
    from datasets import Image as ImageFeature
    from datasets import List, Video

    kind = (Video if column.startswith("video") else ImageFeature)(decode=False)
    return rows.cast_column(column, List(kind) if isinstance(rows.features[column], List) else kind)


def _count(cells: Any) -> int:
    return len(cells) if isinstance(cells, list) else 1


def _with_ids(rows: datasets.Dataset) -> datasets.Dataset:
    """`prompt_id` from the text where the data has none (plain captioned images for SFT)."""
    if "prompt_id" in rows.column_names:
        return rows
    # The row number is part of it: the same caption may belong to several images, each with its own draws.
    ids = [f"{Prompt.from_text(text).id}-{i}" for i, text in enumerate(rows["prompt"])]
    return rows.add_column("prompt_id", ids)


def cache_key(generator: PipelineGenerator, rows: datasets.Dataset, sizes: Sizes = AS_THEY_ARE) -> str:
    """Identifies codec weights, encoder weights, sizes, prompts and media; an edit to any of them gives another key.

    A picture counts with its length and last bytes (a PNG's checksum, a JPEG's entropy code), one that is a file with
    the file's size and time: quick on any amount.
    """
    components = generator.pipeline.components
    encoders = [components.get(name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    codec = components["vae"].config
    digest = hashlib.sha256(f"{fingerprint(components['vae'])}{fingerprint(*encoders)}".encode())
    scales = [codec.get(name) for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")]
    digest.update(json.dumps([FORMAT, scales, astuple(sizes), generator.pixel_multiple]).encode())
    column = _media_column(generator, rows)
    for table in rows.select_columns(["prompt_id", "prompt", column]).with_format("arrow").iter(batch_size=1000):
        digest.update(json.dumps([table["prompt_id"].to_pylist(), table["prompt"].to_pylist()]).encode())
        digest.update(_digest_of(table.select([column]), column))
    return digest.hexdigest()[:16]


def _digest_of(table: pa.Table, column: str) -> bytes:
    if column == LATENTS:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return hashlib.sha256(sink.getvalue()).digest()
    is_list = pa.types.is_list(table[column].type)
    media = pa_compute.list_flatten(table[column]) if is_list else table[column]
    encoded = pa_compute.struct_field(media, "bytes")
    paths = pa_compute.struct_field(media, "path").to_pylist()
    tails = pa_compute.binary_slice(encoded, -32).to_pylist()
    lengths = pa_compute.binary_length(encoded).to_pylist()
    files = [_stamp(path) if length is None else None for path, length in zip(paths, lengths, strict=True)]
    return repr([lengths, tails, paths, files]).encode()


def _stamp(path: str | None) -> tuple[int, int] | None:
    if path is None or not Path(path).is_file():
        return None
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns

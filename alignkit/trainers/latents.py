"""Pictures and prompts become cached latents and conditioning, and batches with their random draws.

The cache is an Arrow file (memory-mapped by `datasets`) outside the dataset, keyed by the codec's and encoder's weights
and by the data, so that a second run, another seed or another loss starts at once. Every draw (time, noise, caption
dropout) is keyed by (noise seed, prompt id, epoch): no result depends on batch size, order or worker count.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pa_compute
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from alignkit.errors import DataError
from alignkit.records import Conditioning, Prompt, Texts
from alignkit.seeds import derive_seed
from alignkit.trainers.buckets import AS_THEY_ARE, Sizes
from alignkit.trainers.media import fit, read_clip, read_picture, to_pixels

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

    from alignkit.generators.pipeline import PipelineGenerator

COND = "cond."  # prefix of conditioning columns and batch keys
PROMPT = "prompt"  # column and batch key of the text itself
COLUMNS = {"image": ("images", "image"), "video": ("videos", "video")}  # of media, by modality


def fingerprint(*modules: nn.Module | None) -> str:
    """A hash of weights: of every tensor's name, shape, sum and a strided sample (fast, and any training shows)."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in () if module is None else module.state_dict().items():
            if "lora_" in name:  # conditioning is cached as the base model has it
                continue
            name = name.replace(".base_layer", "")  # noqa: PLW2901
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)].double().cpu().numpy()
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}{float(flat.double().sum())!r}".encode())
            digest.update(sample.tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Draws:
    """The random part of one prompt's item."""

    t: Tensor  # [K], canonical times
    noise: Tensor  # [K, C, H, W] or [K, C, T, H, W]
    dropped: bool


@dataclass(frozen=True)
class DrawPlan:
    """How an item's draws are made; `share_*` give all K candidates of a prompt one time / one noise.

    Times are the family's density pressed into [t_min, 1].
    """

    sample_t: Callable[[int, torch.Generator], Tensor]
    noise_seed: int
    caption_dropout: float
    share_noise: bool = True
    share_timestep: bool = True
    t_min: float = 0.0

    def draw(self, prompt_id: str, epoch: int, shape: Sequence[int]) -> Draws:
        """Draws of one item with latents of `shape` [K, C, H, W] or [K, C, T, H, W]."""
        source = torch.Generator().manual_seed(derive_seed("draw", self.noise_seed, prompt_id, epoch))
        count = shape[0]
        t = self.sample_t(1 if self.share_timestep else count, source).expand(count)
        t = self.t_min + (1 - self.t_min) * t
        noise = torch.randn((1 if self.share_noise else count, *shape[1:]), generator=source).expand(*shape)
        dropped = bool(torch.rand((), generator=source) < self.caption_dropout)
        return Draws(t, noise, dropped)


def _draw_ids(prompt_ids: Iterable[str]) -> list[str]:
    """What draws are keyed by: the prompt, and from its second row on (pairs of one caption) the row's number too."""
    seen: Counter[str] = Counter()
    names = []
    for prompt_id in prompt_ids:
        names.append(f"{prompt_id}-{seen[prompt_id]}" if seen[prompt_id] else prompt_id)
        seen[prompt_id] += 1
    return names


class LatentDataset(Dataset[dict[str, Any]]):
    """Cached rows with draws of their own in each `epoch`, which the trainer sets.

    `sizes` are the shapes of the rows' latents, all candidates together; `shapes` those of their conditioning.
    """

    def __init__(
        self, rows: datasets.Dataset, phi_NK: Tensor, shapes: Mapping[str, Sequence[int]], plan: DrawPlan
    ) -> None:
        self.rows, self.phi, self.shapes, self.plan = rows, phi_NK, dict(shapes), plan
        self.sizes = [tuple(size) for size in rows["shape"][:]]
        self.draw_ids = _draw_ids(rows["prompt_id"])
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by loader workers that outlive an epoch
        self.picked: Tensor | None = None  # [rows, k] candidate numbers, where not all are used
        self.reference: Tensor | None = None  # [epochs, rows, k], once precomputed

    @property
    def epoch(self) -> int:
        """Which epoch's draws items carry; 0 unless set, so held-out rows always meet the same draws."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    def keep_best_and_worst(self) -> None:
        """Only each row's best and worst candidate, best first; rows of ties go."""
        kept = (self.phi.amax(-1) > self.phi.amin(-1)).nonzero().flatten()
        self.rows, self.phi = self.rows.select(kept.tolist()), self.phi[kept]
        self.sizes, self.draw_ids = ([every[row] for row in kept.tolist()] for every in (self.sizes, self.draw_ids))
        self.picked = torch.stack([self.phi.argmax(-1), self.phi.argmin(-1)], -1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        item: dict[str, Any] = {key: _unpack(row[key], shape) for key, shape in self.shapes.items()}
        item["latents"] = _unpack(row["latents"], self.sizes[index])
        item |= {"phi": self.phi[index], "row": torch.tensor(index)}
        if self.picked is not None:
            item |= {key: item[key][self.picked[index]] for key in ("latents", "phi")}
        draws = self.plan.draw(self.draw_ids[index], self.epoch, item["latents"].shape)
        item |= {"t": draws.t, "noise": draws.noise, "dropped": torch.tensor(draws.dropped)}
        if self.reference is not None:
            item["reference_err"] = self.reference[self.epoch, index]
        if PROMPT in row:  # text encoders that are trained read it anew in each step
            item[PROMPT] = row[PROMPT]
        return item


def _unpack(raw: bytes, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(tuple(shape))


def _pack(tensor: Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack items; all rows of a batch have one size (see `buckets.BucketBatches`). Texts stay a list."""
    columns = {key: [item[key] for item in items] for key in items[0]}
    return {key: column if key == PROMPT else torch.stack(column) for key, column in columns.items()}


def conditioning(batch: Mapping[str, Any], null: Mapping[str, Tensor]) -> Conditioning | Texts:
    """The batch's Conditioning [P, ...] with its caption dropout applied; Texts if the batch has the prompts."""
    tensors = {key.removeprefix(COND): value for key, value in batch.items() if key.startswith(COND)}
    null = {name: tensor.to(batch["dropped"].device) for name, tensor in null.items()}
    cached = Conditioning(tensors, null).drop(batch["dropped"])
    return Texts(batch[PROMPT], batch["dropped"], cached) if PROMPT in batch else cached


class Encoder:
    """Turns rows (prompt, media) into rows of bytes; batched by `datasets.map`.

    Every row goes to the size of its first medium's bucket; `column` holds a medium or a list of `count` ones.
    """

    def __init__(self, generator: PipelineGenerator, column: str, count: int, sizes: Sizes) -> None:
        self.generator, self.column, self.count, self.sizes = generator, column, count, sizes
        self.is_video = generator.modality == "video"

    @torch.no_grad()
    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [self._row(*pair) for pair in zip(indices, batch[self.column], strict=True)]
        latents = self._latents([pixels for pixels, _ in rows])
        cond = self.generator.encode_prompts(batch["prompt"])
        columns = {"latents": latents, **{COND + name: tensor for name, tensor in cond.tensors.items()}}
        packed: dict[str, list[Any]] = {name: [_pack(row) for row in tensor] for name, tensor in columns.items()}
        return packed | {"shape": [list(row.shape) for row in latents], "changed": [changed for _, changed in rows]}

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
        first, multiple = media[0][0], self.generator.pixel_multiple
        size = self.sizes.bucket(first.height, first.width, multiple)
        if not all(size):
            raise DataError(
                f"row {row}: {first.width} x {first.height} pixels, below the {multiple} that the model needs"
            )
        pixels = [to_pixels([fit(frame, size, multiple) for frame in frames]) for frames in media]
        changed = sum((frames[0].height, frames[0].width) != size for frames in media)
        return torch.stack([frames if self.is_video else frames[0] for frames in pixels]), changed

    def _read(self, row: int, cells: Sequence[Any]) -> list[list[Image]]:
        """The frames of each medium, of a picture one."""
        where = [f"row {row}, candidate {k}" for k in range(len(cells))]
        if not self.is_video:
            return [[read_picture(*pair)] for pair in zip(cells, where, strict=True)]
        wished, fps = self.sizes.num_frames, self.sizes.fps
        clips = [read_clip(*pair, count=wished, fps=fps) for pair in zip(cells, where, strict=True)]
        shortest = min(len(frames) for frames in clips)
        frames = self.sizes.frames(shortest, self.generator.temporal_ratio)
        if shortest < frames:
            raise DataError(
                f"row {row}: a clip has {shortest} frames, num_frames asks for {frames}; lower it or remove the row"
            )
        return [clip[:frames] for clip in clips]


def encode_rows(
    generator: PipelineGenerator,
    rows: datasets.Dataset,
    plan: DrawPlan,
    cache_dir: Path,
    *,
    sizes: Sizes = AS_THEY_ARE,
    batch_size: int = 16,
) -> LatentDataset:
    """Encode `rows` (columns prompt, images or videos; phi and prompt_id optional) once, or reuse the cache.

    A column `image` or `video` holds a medium instead of a list. Raises DataError for missing columns, no rows, and,
    naming the row, for K that differs, a phi that is not K finite numbers, or a medium that cannot be decoded, is
    smaller than the model's patch or shorter than `num_frames`.
    """
    column = _media_column(generator, rows)
    if not len(rows):
        raise DataError("training data has no row")
    rows = _with_defaults(_undecoded(rows, column), column)
    count = _count(rows[0][column])
    if not count:
        raise DataError("row 0: no picture; remove the row")
    phi_NK = _labels(rows["phi"][:], count)
    key = cache_key(generator, rows, sizes)
    file = cache_dir / f"latents-{key}.arrow"
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Labels stay outside: the same pictures under other rankings share one cache.
    kept = [name for name in rows.column_names if name != "prompt_id"]
    encoded = rows.map(
        Encoder(generator, column, count, sizes),
        batched=True,
        with_indices=True,
        batch_size=batch_size if generator.modality == "image" else 1,
        remove_columns=kept,
        cache_file_name=str(file),
        new_fingerprint=key,
        desc="latents",
    )
    with torch.no_grad():
        null = generator.encode_prompts([""])
    shapes = {COND + name: tuple(tensor.shape[1:]) for name, tensor in null.tensors.items()}
    return LatentDataset(encoded, phi_NK, shapes, plan)


def _media_column(generator: PipelineGenerator, rows: datasets.Dataset) -> str:
    """The column that holds what `generator` makes. Raises DataError for other media, or when a column is missing."""
    names = COLUMNS[generator.modality]
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


def _labels(phi: Sequence[Sequence[float]], count: int) -> Tensor:
    for row, values in enumerate(phi):
        if len(values) != count or not all(math.isfinite(value) for value in values):
            raise DataError(f"row {row}: phi is {values}; it must be {count} finite numbers, one a picture")
    return torch.tensor(phi, dtype=torch.float32)


def _with_defaults(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """`prompt_id` from the text, `phi` zero, where the data has none (plain captioned pictures for SFT)."""
    if "prompt_id" not in rows.column_names:
        # The row number goes in too: the same caption may stand under several pictures, each with its own draws.
        ids = [f"{Prompt.from_text(text).id}-{i}" for i, text in enumerate(rows["prompt"])]
        rows = rows.add_column("prompt_id", ids)
    if "phi" not in rows.column_names:
        rows = rows.add_column("phi", [[0.0] * _count(rows[0][column])] * len(rows))
    return rows


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
    digest.update(json.dumps([scales, astuple(sizes), generator.pixel_multiple]).encode())
    column = _media_column(generator, rows)
    for table in rows.select_columns(["prompt_id", "prompt", column]).with_format("arrow").iter(batch_size=1000):
        digest.update(json.dumps([table["prompt_id"].to_pylist(), table["prompt"].to_pylist()]).encode())
        is_list = pa.types.is_list(table[column].type)
        pictures = pa_compute.list_flatten(table[column]) if is_list else table[column]
        encoded = pa_compute.struct_field(pictures, "bytes")
        paths = pa_compute.struct_field(pictures, "path").to_pylist()
        tails = pa_compute.binary_slice(encoded, -32).to_pylist()
        lengths = pa_compute.binary_length(encoded).to_pylist()
        files = [_stamp(path) if length is None else None for path, length in zip(paths, lengths, strict=True)]
        digest.update(repr([lengths, tails, paths, files]).encode())
    return digest.hexdigest()[:16]


def _stamp(path: str | None) -> tuple[int, int] | None:
    if path is None or not Path(path).is_file():
        return None
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns

"""Pictures and prompts become cached latents and conditioning, and batches with their random draws.

The cache is an Arrow file (memory-mapped by `datasets`) outside the dataset, keyed by the codec's and encoder's weights
and by the data, so that a second run, another seed or another loss starts at once. Every draw (time, noise, caption
dropout) is keyed by (noise seed, prompt id, epoch): no result depends on batch size, order or worker count.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pa_compute
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from alignkit.errors import DataError
from alignkit.records import Captions, Conditioning, Prompt, derive_seed

if TYPE_CHECKING:
    import datasets

    from alignkit.generators.base import PipelineGenerator

COND = "cond."  # prefix of conditioning columns and batch keys
PROMPT = "prompt"  # column and batch key of the text itself


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


def to_pixels(picture: Any, where: str) -> Tensor:
    """A PIL picture, encoded bytes or {"bytes": ...} -> [3, H, W] in [0, 1]. Raises DataError naming `where`."""
    if isinstance(picture, Mapping):
        picture = picture["path"] if picture["bytes"] is None else picture["bytes"]
    if isinstance(picture, bytes | str):
        try:
            picture = Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)
            picture.load()
        except (OSError, SyntaxError) as error:
            raise DataError(f"{where}: the picture cannot be decoded ({error}); remove or remake it") from error
    array = np.asarray(picture.convert("RGB"), np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1)


@dataclass(frozen=True)
class Draws:
    """The random part of one prompt's item."""

    t: Tensor  # [K], canonical times
    noise: Tensor  # [K, C, H, W]
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
        """Draws of one item with latents of `shape` [K, C, H, W]."""
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
    """Cached rows with draws of their own in each `epoch`, which the trainer sets."""

    def __init__(
        self, rows: datasets.Dataset, phi_NK: Tensor, shapes: Mapping[str, Sequence[int]], plan: DrawPlan
    ) -> None:
        self.rows, self.phi, self.shapes, self.plan = rows, phi_NK, dict(shapes), plan
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
        self.draw_ids = [self.draw_ids[index] for index in kept.tolist()]
        self.picked = torch.stack([self.phi.argmax(-1), self.phi.argmin(-1)], -1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        item: dict[str, Any] = {key: _unpack(row[key], shape) for key, shape in self.shapes.items()}
        item["phi"] = self.phi[index]
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
    """Stack items; all rows of a batch have one size. Texts stay a list."""
    columns = {key: [item[key] for item in items] for key in items[0]}
    return {key: column if key == PROMPT else torch.stack(column) for key, column in columns.items()}


def conditioning(batch: Mapping[str, Any], null: Mapping[str, Tensor]) -> Conditioning:
    """The batch's Conditioning [P, ...] with its caption dropout applied, and its captions where it has the texts."""
    captions = Captions(batch[PROMPT], batch["dropped"]) if PROMPT in batch else None
    tensors = {key.removeprefix(COND): value for key, value in batch.items() if key.startswith(COND)}
    null = {name: tensor.to(batch["dropped"].device) for name, tensor in null.items()}
    return Conditioning(tensors, null, captions).drop(batch["dropped"])


class Encoder:
    """Turns rows (prompt, images, phi, prompt_id) into rows of bytes; batched by `datasets.map`."""

    def __init__(self, generator: PipelineGenerator, shape: Sequence[int]) -> None:
        self.generator, self.shape = generator, tuple(shape)  # [K, 3, H, W] of every row

    @torch.no_grad()
    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        pixels_PK = torch.stack([self._row(*pair) for pair in zip(indices, batch["images"], strict=True)])
        latents = self.generator.encode(pixels_PK.flatten(0, 1).to(self.generator.device))
        latents = latents.unflatten(0, pixels_PK.shape[:2])
        cond = self.generator.encode_prompts(batch["prompt"])
        columns = {"latents": latents, **{COND + name: tensor for name, tensor in cond.tensors.items()}}
        return {name: [_pack(row) for row in tensor] for name, tensor in columns.items()}

    def _row(self, row: int, images: Sequence[Any]) -> Tensor:
        pixels = [to_pixels(picture, f"row {row}, candidate {k}") for k, picture in enumerate(images)]
        shapes = {(len(pixels), *picture.shape) for picture in pixels}
        if shapes != {self.shape}:
            raise DataError(
                f"row {row}: [K, channels, height, width] is {sorted(shapes)}, row 0 has {self.shape}; give all rows "
                "the same number and size of pictures"
            )
        return torch.stack(pixels)


def encode_rows(
    generator: PipelineGenerator, rows: datasets.Dataset, plan: DrawPlan, cache_dir: Path, *, batch_size: int = 16
) -> LatentDataset:
    """Encode `rows` (columns prompt, images; phi and prompt_id optional) once, or reuse the cache.

    Raises DataError for missing columns, no rows, and, naming the row, for K or a size that differs, a phi that is not
    K finite numbers, or a picture that cannot be decoded.
    """
    missing = {"prompt", "images"} - set(rows.column_names)
    if missing:
        raise DataError(f"training data lacks {sorted(missing)}; its columns are {rows.column_names}")
    if not len(rows):
        raise DataError("training data has no row")
    from datasets import Image as ImageFeature
    from datasets import List

    # Undecoded: a damaged picture is then named by its row, and nothing is decoded twice.
    rows = _with_defaults(rows.cast_column("images", List(ImageFeature(decode=False))))
    first = rows[0]["images"]
    if not first:
        raise DataError("row 0: no picture; remove the row")
    shape = (len(first), *to_pixels(first[0], "row 0, candidate 0").shape)
    phi_NK = _labels(rows["phi"][:], shape[0])
    key = cache_key(generator, rows)
    file = cache_dir / f"latents-{key}.arrow"
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Labels stay outside: the same pictures under other rankings share one cache.
    kept = [name for name in rows.column_names if name != "prompt_id"]
    encoded = rows.map(
        Encoder(generator, shape),
        batched=True,
        with_indices=True,
        batch_size=batch_size,
        remove_columns=kept,
        cache_file_name=str(file),
        new_fingerprint=key,
        desc="latents",
    )
    with torch.no_grad():
        null = generator.encode_prompts([""])
    shapes = {COND + name: tuple(tensor.shape[1:]) for name, tensor in null.tensors.items()}
    shapes["latents"] = (shape[0], *generator.latent_shape(*shape[2:]))
    return LatentDataset(encoded, phi_NK, shapes, plan)


def _labels(phi: Sequence[Sequence[float]], count: int) -> Tensor:
    for row, values in enumerate(phi):
        if len(values) != count or not all(math.isfinite(value) for value in values):
            raise DataError(f"row {row}: phi is {values}; it must be {count} finite numbers, one a picture")
    return torch.tensor(phi, dtype=torch.float32)


def _with_defaults(rows: datasets.Dataset) -> datasets.Dataset:
    """`prompt_id` from the text, `phi` zero, where the data has none (plain captioned pictures for SFT)."""
    if "prompt_id" not in rows.column_names:
        # The row number goes in too: the same caption may stand under several pictures, each with its own draws.
        ids = [f"{Prompt.from_text(text).id}-{i}" for i, text in enumerate(rows["prompt"])]
        rows = rows.add_column("prompt_id", ids)
    if "phi" not in rows.column_names:
        rows = rows.add_column("phi", [[0.0] * len(rows[0]["images"])] * len(rows))
    return rows


def cache_key(generator: PipelineGenerator, rows: datasets.Dataset) -> str:
    """Identifies codec weights, encoder weights, prompts and pictures; an edit to any of them gives another key.

    A picture counts with its length and last bytes (a PNG's checksum, a JPEG's entropy code): quick on any amount.
    """
    components = generator.pipeline.components
    encoders = [components.get(name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    codec = components["vae"].config
    digest = hashlib.sha256(f"{fingerprint(components['vae'])}{fingerprint(*encoders)}".encode())
    scales = [codec.get(name) for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")]
    digest.update(json.dumps(scales).encode())
    for table in rows.select_columns(["prompt_id", "prompt", "images"]).with_format("arrow").iter(batch_size=1000):
        digest.update(json.dumps([table["prompt_id"].to_pylist(), table["prompt"].to_pylist()]).encode())
        pictures = pa_compute.list_flatten(table["images"])
        encoded = pa_compute.struct_field(pictures, "bytes")
        paths = pa_compute.struct_field(pictures, "path").to_pylist()
        tails = pa_compute.binary_slice(encoded, -32).to_pylist()
        digest.update(repr([pa_compute.binary_length(encoded).to_pylist(), tails, paths]).encode())
    return digest.hexdigest()[:16]

"""Media and prompts become cached latents and conditioning, and items with their random draws.

The cache lies outside the dataset: a store of latents by the content of a row's media, and one of conditioning by
prompt, for the weights of codec and text encoders. A second run, another seed, another loss or rows with other labels
encode nothing; new rows alone are encoded. The conditioning of a prompt is stored once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pa_compute
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from alignkit.adapters.fingerprint import base_of, is_other_base
from alignkit.columns import column, once_each, stored_places
from alignkit.errors import DataError
from alignkit.escape import get_logger
from alignkit.media import decode_clip, decode_image, fit, has_transparency, to_pixels
from alignkit.records import Conditioning, Prompt, Texts
from alignkit.segments import CODEC
from alignkit.trainers.buckets import AS_THEY_ARE, Sizes
from alignkit.trainers.content import conditioning_key, latents_key, prompt_digests, row_digests
from alignkit.trainers.data import EpochData, draw_ids
from alignkit.trainers.draws import DrawPlan
from alignkit.trainers.sharding import Ranks
from alignkit.trainers.store import SHAPE, Store, packed, unpacked

if TYPE_CHECKING:
    import datasets

    from alignkit.generators.pipeline import PipelineGenerator

logger = get_logger(__name__)

COND = "cond."  # prefix of conditioning columns and batch keys
PROMPT = "prompt"  # column and batch key of the text itself
LATENTS = "latents"  # column and batch key of latents; as a column of the data they are not encoded (docs/formats.md)
CHANGED = "changed"  # column: how many of a row's media were resized or cropped
TRANSPARENT = "transparent"  # column: how many of a row's images have transparency
COLUMNS = {"image": ("images", "image"), "video": ("videos", "video")}  # of media, by modality
IMAGES_A_CALL = 2  # the most images that the VAE encodes at once
PIXELS_A_CALL = 1024**2  # and of more pixels than these, one: activations of the VAE are its peak of memory


class LatentDataset(EpochData):
    """Cached rows with draws of their own in each `epoch`, which the trainer sets.

    Args:
        rows: latents [K, ...] of each row, as `store.packed` holds them.
        conditioning: the same of each row's prompt, in columns named `cond.NAME`.
        targets: per row what the loss compares with, by its batch key: phi [K], labels [T], ...
        names: per row the key of its draws; see `data.draw_ids`.
        plan: how time, noise and caption dropout are drawn.
        key: identifies the cached values; default: the fingerprints that `datasets` gives them.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        conditioning: datasets.Dataset,
        targets: Mapping[str, Sequence[Tensor] | Tensor],
        names: Sequence[str],
        plan: DrawPlan,
        *,
        key: str | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.conditioning, self.targets, self.plan = rows, conditioning, dict(targets), plan
        self.key = key or rows._fingerprint + conditioning._fingerprint  # noqa: SLF001 - `datasets` keys with them
        self.latent_shapes = _shapes(column(rows, LATENTS + SHAPE))
        self.draw_ids = list(names)
        self.prompts: list[str] | None = None  # of each row, where trained text encoders read them in each step
        self.picked: Tensor | None = None  # [rows, k] candidate numbers, where not all are used
        self.reference: Tensor | None = None  # [epochs, rows, k], once precomputed
        self._names = [name for name in conditioning.column_names if f"{name}{SHAPE}" in conditioning.column_names]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows only; each keeps its draws."""
        self.rows, self.conditioning = self.rows.select(rows), self.conditioning.select(rows)
        for name, values in self.targets.items():
            places = torch.tensor(rows, dtype=torch.long)
            self.targets[name] = values[places] if torch.is_tensor(values) else [values[i] for i in rows]
        self.latent_shapes = [self.latent_shapes[row] for row in rows]
        self.draw_ids = [self.draw_ids[row] for row in rows]
        if self.prompts is not None:
            self.prompts = [self.prompts[row] for row in rows]

    def pick(self, candidates_Nk: Tensor, *, targets: Sequence[str]) -> None:
        """Keep these candidates of each row, in this order; `targets` are those with one value a candidate."""
        self.picked = candidates_Nk
        for name in targets:
            values = self.targets[name]
            values_NK = values if isinstance(values, Tensor) else torch.stack(list(values))
            self.targets[name] = values_NK.gather(1, candidates_Nk)

    def total(self, name: str) -> int:
        """The sum of a column of counts of the rows; rows that an earlier version cached may lack it and count 0."""
        return pa_compute.sum(column(self.rows, name)).as_py() or 0 if name in self.rows.column_names else 0

    def __len__(self) -> int:
        return len(self.draw_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        texts, latents = self.conditioning[index], unpacked(self.rows[index], LATENTS).float()
        item = {name: unpacked(texts, name).float() for name in self._names}
        item[LATENTS] = latents if self.picked is None else latents[self.picked[index]]
        item |= {name: values[index] for name, values in self.targets.items()}
        item["row"] = torch.tensor(index)
        draws = self.plan.draw(self.draw_ids[index], self.epoch, item[LATENTS].shape)
        item |= {"t": draws.t, "noise": draws.noise, "dropped": torch.tensor(draws.dropped)}
        if self.reference is not None:
            item["reference_err"] = self.reference[self.epoch, index]
        if self.prompts is not None:
            item[PROMPT] = self.prompts[index]
        return item


def conditioning(batch: Mapping[str, Any], null: Mapping[str, Tensor]) -> Conditioning | Texts:
    """The batch's Conditioning [P, ...] with its caption dropout applied; Texts if the batch has the prompts."""
    tensors = {key.removeprefix(COND): value for key, value in batch.items() if key.startswith(COND)}
    null = {name: tensor.to(batch["dropped"].device) for name, tensor in null.items()}
    cached = Conditioning(tensors, null).drop(batch["dropped"])
    return Texts(batch[PROMPT], batch["dropped"], cached) if PROMPT in batch else cached


def _shapes(cells: pa.ChunkedArray) -> list[tuple[int, ...]]:
    """The shape of each row, all of one number of axes; rows of one shape share the object."""
    if not len(cells):
        return []
    sizes_NA = pa_compute.list_flatten(cells).to_numpy().reshape(len(cells), -1)
    different, numbers = np.unique(sizes_NA, axis=0, return_inverse=True)
    shapes = [tuple(sizes) for sizes in different.tolist()]
    return [shapes[number] for number in numbers.tolist()]


class Encoder:
    """Turns rows (prompt, media) into rows of the store, from their numbers.

    Every row goes to the size of its first medium's bucket; `column` holds a medium or a list of `count` ones, or
    latents [K, ...] (safetensors bytes or nested lists), which are stored as they are.
    """

    def __init__(self, generator: PipelineGenerator, rows: datasets.Dataset, column: str, sizes: Sizes) -> None:
        self.generator, self.column, self.sizes = generator, column, sizes
        self.rows = rows.select_columns([column, PROMPT]).with_format("arrow")  # not decoded: damage is named by row
        self.count = _count(self.rows, column)
        self.is_video = generator.modality == "video"

    @torch.no_grad()
    def latents(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Latents [K, ...] of these rows, and how many of their media had another size or were transparent."""
        dtype, made = self.generator.pipeline.vae.dtype, []
        for number, cells in zip(numbers, self.rows[numbers][self.column].to_pylist(), strict=True):
            if self.column == LATENTS:
                latents, counts = self._given_latents(number, cells), {CHANGED: 0, TRANSPARENT: 0}
            else:
                pixels, counts = self._row(number, cells)
                is_alone = self.is_video or pixels[0, 0].numel() > PIXELS_A_CALL
                # No call holds media of two rows, so a row's values depend on the row alone.
                parts = pixels.split(1 if is_alone else IMAGES_A_CALL)
                latents = torch.cat([self.generator.encode(part.to(self.generator.device)) for part in parts])
            made.append({**packed({LATENTS: (latents, dtype)}), **counts})
        return made

    @torch.no_grad()
    def conditioning(self, numbers: list[int]) -> list[dict[str, Any]]:
        """The conditioning of these rows' prompts."""
        cond = self.generator.encode_prompts(self.rows[numbers][PROMPT].to_pylist())
        made = []
        for row in range(len(numbers)):
            tensors = {COND + name: (tensor[row], tensor.dtype) for name, tensor in cond.tensors.items()}
            made.append(packed(tensors))
        return made

    def _given_latents(self, row: int, cells: Any) -> Tensor:
        if isinstance(cells[0], dict):
            items = [_safetensors(cell, f"row {row}, candidate {k}") for k, cell in enumerate(cells)]
            shapes = sorted({tuple(item.shape) for item in items})
            if len(shapes) > 1:
                raise DataError(f"row {row}: its latents differ in shape: {shapes}")
            latents = torch.stack(items)
        else:
            latents = torch.from_numpy(np.asarray(cells, np.float32))
        axes = 5 if self.is_video else 4
        channels = self.generator.latent_channels
        if latents.dim() != axes or len(latents) != self.count or latents.shape[1] != channels:
            layout = "[K, C, T, H, W]" if self.is_video else "[K, C, H, W]"
            raise DataError(
                f"row {row}: latents of shape {list(latents.shape)}; the model takes {layout} with K = {self.count} as "
                f"in row 0 and C = {channels}"
            )
        if not torch.isfinite(latents).all():
            raise DataError(f"row {row}: its latents hold NaN or infinite values; make them again or remove the row")
        return latents

    def _row(self, row: int, cells: Any) -> tuple[Tensor, dict[str, int]]:
        """Pixels [K, 3, H, W] or [K, F, 3, H, W] of a row; how many of its media had another size, were transparent."""
        cells = cells if isinstance(cells, list) else [cells]
        where = [f"row {row}, candidate {k}" for k in range(len(cells))]
        media = self._read(row, cells, where)
        (height, width), multiple = media[0].shape[1:3], self.generator.pixel_multiple
        size = self.sizes.bucket(height, width, multiple)
        if not all(size):
            raise DataError(f"row {row}: {width} x {height} pixels, below the {multiple} that the model needs")
        pixels = [to_pixels(fit(frames, size, multiple)) for frames in media]
        counts = {CHANGED: sum(frames.shape[1:3] != size for frames in media)}
        counts[TRANSPARENT] = 0 if self.is_video else sum(map(has_transparency, cells, where))
        return torch.stack([frames if self.is_video else frames[0] for frames in pixels]), counts

    def _read(self, row: int, cells: Sequence[Any], where: Sequence[str]) -> list[np.ndarray]:
        """The frames [F, H, W, 3] of each medium; of an image one."""
        if not self.is_video:
            return [decode_image(*pair)[None] for pair in zip(cells, where, strict=True)]
        wished, fps = self.sizes.num_frames, self.sizes.fps
        clips = [decode_clip(*pair, count=wished, fps=fps) for pair in zip(cells, where, strict=True)]
        shortest = min(len(frames) for frames in clips)
        frames = self.sizes.frames(shortest, self.generator.frame_step)
        if shortest < frames:
            raise DataError(
                f"row {row}: a clip has {shortest} frames, num_frames asks for {frames}; lower it or remove the row"
            )
        return [clip[:frames] for clip in clips]


def _safetensors(cell: Mapping[str, Any], where: str) -> Tensor:
    """The one tensor in the bytes of a safetensors file, float32. Raises DataError for other bytes or tensors."""
    try:
        tensors = safetensors.torch.load(cell["bytes"] or b"")
    except safetensors.SafetensorError as error:
        raise DataError(f"{where}: its latents are no safetensors file ({error}); make them again") from error
    if list(tensors) != [LATENTS] or not tensors[LATENTS].is_floating_point():
        raise DataError(
            f"{where}: the safetensors file holds {sorted(tensors)}; one tensor of floats, '{LATENTS}', is read"
        )
    return tensors[LATENTS].float()


def require_own_latents(generator: PipelineGenerator, rows: datasets.Dataset) -> None:
    """DataError where the column `codec` says that latents were made by another VAE than the generator's.

    Where the two cannot be compared (see `is_other_base`) there is a warning.
    """
    for base in column(rows, CODEC).unique().to_pylist():
        is_other = is_other_base(generator.pipeline.vae, base or "")
        if base and is_other is None:
            logger.warning(
                "the latents' VAE %s and that of '%s', %s, cannot be compared; make sure that they are the same, or "
                "load the model in the precision of the latents' VAE",
                base,
                generator.name,
                base_of(generator.pipeline.vae),
            )
        if not base or is_other:
            raise DataError(
                f"latents made with the VAE {base or 'of no name'}; that of '{generator.name}' is "
                f"{base_of(generator.pipeline.vae)}. Train the model that made them, or give rows with videos"
            )


def _count(rows: datasets.Dataset, name: str) -> int:
    """K. Raises DataError for none, and naming the first row with another number."""
    cells = rows.data.column(name)
    if not pa.types.is_list(cells.type):
        return 1
    counts = pa_compute.fill_null(pa_compute.list_value_length(cells), 0).to_numpy()[stored_places(rows)]
    if not counts[0]:
        raise DataError("row 0: no image; remove the row")
    for row in (counts != counts[0]).nonzero()[0]:
        raise DataError(f"row {row}: {counts[row]} candidates, row 0 has {counts[0]}; give all rows the same number")
    return int(counts[0])


def phi_targets(rows: datasets.Dataset, count: int) -> dict[str, Tensor]:
    """{"phi": [N, K]} of ranked rows; 0 where the data has no phi. Raises DataError naming a row that does not fit."""
    if "phi" not in rows.column_names:
        return {"phi": torch.zeros(len(rows), count)}
    cells = column(rows, "phi")
    values = pa_compute.fill_null(pa_compute.list_flatten(cells).cast(pa.float64()), float("nan")).to_numpy()
    counts = pa_compute.fill_null(pa_compute.list_value_length(cells), 0).to_numpy()
    is_good = counts == count
    if is_good.all():
        is_good = ((values >= 0) & (values <= 1)).reshape(len(rows), count).all(1)
    for row in (~is_good).nonzero()[0]:
        wanted = f"{count} finite numbers within 0 and 1, one a candidate"
        raise DataError(f"row {row}: phi is {cells[row].as_py()}; it must be {wanted}")
    return {"phi": torch.from_numpy(values.reshape(len(rows), count).astype(np.float32))}


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
    """Encode `rows` (columns prompt, images or videos or latents; prompt_id optional); what is cached is not encoded.

    A column `image` or `video` holds a medium instead of a list. `targets(rows, K)` reads what the loss compares with;
    targets are not part of the cache, so the same media under other labels share one. `batch_size` prompts are encoded
    together. All processes of a job call this together; each encodes a part. Raises DataError for missing columns, no
    rows, latents of another VAE, and, naming the row, for K that differs, targets that do not fit, or a medium that
    cannot be decoded, is smaller than the model's patch or shorter than `num_frames`. Raises ConfigError for a
    `num_frames` that the model does not take.
    """
    media = _media_column(generator, rows)
    if not len(rows):
        raise DataError("training data has no row: check the file or folder given as `data`, and `held_out`")
    if sizes.num_frames is not None:
        generator.require_frames(sizes.num_frames, "num_frames")
    if media == LATENTS and CODEC in rows.column_names:
        require_own_latents(generator, rows)
    encoder = Encoder(generator, _with_structs(rows, media), media, sizes)
    loaded = targets(rows, encoder.count)
    texts = column(rows, PROMPT).to_pylist()
    names = [latents_key(generator, sizes), conditioning_key(generator)]
    keys = [row_digests(encoder.rows, media, ranks), prompt_digests(texts)]
    folders = [cache_dir / f"latents-{names[0]}", cache_dir / f"conditioning-{names[1]}"]
    latents = Store(folders[0], ranks).rows(
        keys[0], encoder.latents, batch_size if generator.modality == "image" else 1
    )
    cond = Store(folders[1], ranks).rows(keys[1], encoder.conditioning, batch_size)
    if "prompt_id" in rows.column_names:
        ids = column(rows, "prompt_id").to_pylist()
    else:  # plain captioned images; the same caption may belong to several, each with its own draws
        own = once_each(texts, lambda text: Prompt.from_text(text).id)
        ids = [f"{prompt_id}-{row}" for row, prompt_id in enumerate(own)]
    key = hashlib.sha256("\n".join([*names, *keys[0], *keys[1]]).encode()).hexdigest()[:16]
    return LatentDataset(latents, cond, loaded, draw_ids(ids), plan, key=key)


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


def _with_structs(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """The rows with media as {bytes, path}; those that are bytes or paths alone are cast."""
    from datasets import Image as ImageFeature
    from datasets import List, Video

    feature = rows.features[column]
    inner = feature.feature if isinstance(feature, List) else feature
    if column == LATENTS or isinstance(inner, ImageFeature | Video):
        return rows
    kind = (Video if column.startswith("video") else ImageFeature)(decode=False)
    return rows.cast_column(column, List(kind) if isinstance(feature, List) else kind)

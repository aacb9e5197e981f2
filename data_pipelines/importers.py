"""Preference data of any known layout -> a `datasets.Dataset` with the ranked columns, so that it trains directly.

    ranked       what the rank stage writes, of images or of videos
    Pick-a-Pic   jpg_0, jpg_1, label_0, caption      label_0 = 1: the first is better, 0: the second, else a tie
    TRL          prompt, chosen, rejected            images, or videos
    folders      w/NAME.png and l/NAME.png, caption in w/NAME.txt
    captioned    image, and text, caption or prompt (what `imagefolder` with a metadata.jsonl gives): for SFT
    kohya        NAME.png with NAME.txt or NAME.caption, also in folders `10_NAME`: for SFT
    clips        video, or videos [K] and perhaps phi [K], and text, caption or prompt (what `videofolder` gives)

Pairs become rows with K = 2 in the order they stand in, phi 1 for the better one and 0 for the other, or the label
itself where it is a probability (labels.py); captioned images rows with K = 1 and phi 0. Where columns are not of the
type `Video`, the first row says whether they hold images or videos (`media.is_video`). Videos stay encoded, for
`alignkit.media.decode_clip`: training decodes them. Columns come from parquet, `save_to_disk`, JSON lines or CSV
(opening.py).
Not here: downloading, and the way back (exporters.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.columns import column
from alignkit.errors import DataError
from alignkit.escape import get_logger
from alignkit.media import clip_shape, image_size, is_video
from alignkit.paths import Bounds
from alignkit.records import Prompt
from data_pipelines.cells import contained, read_cell, read_files
from data_pipelines.folders import FolderRow, Say, captioned_rows, is_captioned_folder, pair_rows
from data_pipelines.labels import first_is_better
from data_pipelines.opening import IMAGE_COLUMNS, bounds_of, is_plain_folder, open_dataset, own_split
from data_pipelines.prompts import to_prompt
from data_pipelines.rows import rows_of_split
from data_pipelines.synpic.rank import COLUMNS, SPLITS, VIDEO_COLUMNS, ranked_features

if TYPE_CHECKING:
    from datasets import Dataset

logger = get_logger(__name__)

LABEL = "label"  # the name under which a given preference stands among the scores
UNKNOWN_SEED = -1
CAPTIONS = ("text", "caption", "prompt")  # columns that hold the text of a captioned medium

Row = dict[str, Any]
Read = Callable[[Any, str], Row]  # a cell and where it stands -> {bytes, path}
Convert = Callable[[Row, str, Read], Row | None]


def load_ranked(path: str | Path, split: str, *, held_out: float = 0.1, root: str | Path | None = None) -> Dataset:
    """The "train" or "heldout" rows of any layout above, with the ranked columns; images open as PIL images, videos as
    {"bytes", "path"}.

    `path` is a folder or a .parquet, .jsonl or .csv file. Where the data has splits, "heldout", else "validation", else
    "test" is the held-out one; other data is split by `split_of(prompt_id, held_out)`. Files that rows name must be in
    the data's folder, or in `root`. Ties, rows without a label and files that are not used are counted in a warning.

    Raises MissingFileError, or DataError naming the columns expected and found, an image that is missing, empty or
    outside the folder, labels of no known convention, phi outside [0, 1], or a split that holds no row.
    """
    path = Path(path)
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; use 'train' or 'heldout'")
    # Both splits are loaded in one job; what is true of the data is reported once.
    say = logger.warning if split == "train" else logger.debug
    root = None if root is None else Path(root)
    splits = _open(path, root, say)
    own = own_split(splits, split, path, say)
    if own is not None:
        return _to_ranked(splits[own], path, bounds_of(path, root), say) if own else _empty(path, split, held_out)
    ranked = _to_ranked(next(iter(splits.values())), path, bounds_of(path, root), say)
    mine = rows_of_split(ranked, split, held_out)
    return ranked.select(mine) if mine else _empty(path, split, held_out)


def _empty(path: Path, split: str, held_out: float) -> Dataset:
    raise DataError(
        f"'{path}' has no row in the split '{split}' (held_out {held_out}); give more data or another share"
    )


def _open(path: Path, root: Path | None, say: Say) -> Mapping[str, Dataset]:
    if (path / "w").is_dir() and (path / "l").is_dir():
        return {"train": _from_folder(pair_rows(path, say))}
    if is_plain_folder(path) and is_captioned_folder(path):
        return {"train": _from_folder(captioned_rows(path, say))}
    return open_dataset(path, root=root, say=say)


def _to_ranked(raw: Dataset, path: Path, bounds: Bounds, say: Say) -> Dataset:
    """Recognise the layout by its columns and convert; ranked data passes as it is, once it is checked."""
    from datasets import Image, List

    for columns, medium in ((COLUMNS, "images"), (VIDEO_COLUMNS, "videos")):
        if set(columns) <= set(raw.column_names):
            _check_phi(raw, path)
            rows = contained(raw.select_columns(list(columns)), medium, bounds, f"'{path}'")
            return rows.cast_column("images", List(Image())) if medium == "images" else rows
    if {"video", "videos"}.intersection(raw.column_names):
        return _clips(raw, path, bounds)
    for columns, convert in LAYOUTS.items():
        if set(columns) <= set(raw.column_names):
            raw = _with_phi(raw, path, say) if "label_0" in columns else raw
            return _converted(raw, columns, convert, path, bounds)
    expected = "; or ".join(", ".join(columns) for columns in (COLUMNS, *LAYOUTS))
    raise DataError(f"'{path}' has the columns {', '.join(raw.column_names)}; expected {expected}")


def _converted(raw: Dataset, columns: Sequence[str], convert: Convert, path: Path, bounds: Bounds) -> Dataset:
    from datasets import Image, Value, Video

    has_bytes = True  # else they are in files beside the dataset, which are not in the key of `datasets`' cache
    for name in columns:
        feature = raw.features[name]
        if isinstance(feature, Image | Video):
            raw = raw.cast_column(name, type(feature)(decode=False))
            has_bytes = has_bytes and not any(read_files(raw, name))
        elif name not in (*CAPTIONS, "label_0"):
            has_bytes = has_bytes and feature != Value("string")
    name = next(name for name in columns if name in IMAGE_COLUMNS)
    is_typed = isinstance(raw.features[name], Video)
    medium = "videos" if is_typed or _holds_video(raw, name, bounds, path) else "images"
    read = partial(_medium, bounds=bounds, check=clip_shape if medium == "videos" else image_size)
    return raw.map(
        partial(_convert_batch, convert=partial(convert, read=read), path=str(path), medium=medium),
        batched=True,
        batch_size=64,
        with_indices=True,
        remove_columns=raw.column_names,
        features=ranked_features([LABEL], medium),
        load_from_cache_file=has_bytes,
        desc="import",
    )


def _holds_video(raw: Dataset, name: str, bounds: Bounds, path: Path) -> bool:
    """Whether column `name` holds a video in the first row."""
    if not len(raw):
        return False
    cell = raw[0][name]
    file = cell if isinstance(cell, str) else cell.get("path") if isinstance(cell, dict) else ""
    return is_video(read_cell(cell, bounds, f"'{path}', row 0, {name}"), file or "")


def _with_phi(raw: Dataset, path: Path, say: Say) -> Dataset:
    """Pairs with phi of the first image as `label_0`; what the labels mean, and rows that go, are reported."""
    columns = {name: raw[name][:] for name in ("label_0", "label_1", "has_label") if name in raw.column_names}
    labelled = [str(value).lower() not in ("false", "0", "none") for value in columns.get("has_label", ())]
    labels = columns["label_0"]
    if labelled:
        labels = [label if known else None for label, known in zip(labels, labelled, strict=True)]
        if "label_1" in columns:
            others = zip(columns["label_1"], labelled, strict=True)
            columns["label_1"] = [label if known else None for label, known in others]
    phi, convention = first_is_better(labels, columns.get("label_1"), f"'{path}'")
    say("%s: label_0 is read as %s", path, convention)
    ties, missing = phi.count(0.5), phi.count(None)
    if missing:
        say("%s: %d rows without a label dropped", path, missing)
    if ties:
        say("%s: %d ties dropped, %d rows kept", path, ties, len(phi) - ties - missing)
    return raw.remove_columns(list(columns)).add_column("label_0", phi)


def _check_phi(rows: Dataset, path: Path) -> None:
    import pyarrow.compute as pa_compute

    cells = column(rows, "phi")
    numbers, counts = pa_compute.list_flatten(cells), pa_compute.list_value_length(cells)
    within = pa_compute.and_(pa_compute.greater_equal(numbers, 0), pa_compute.less_equal(numbers, 1))
    if all(pa_compute.all(good, skip_nulls=False).as_py() for good in (within, pa_compute.greater(counts, 0))):
        return
    for row, values in enumerate(cells.to_pylist()):
        if not values or any(value is None or not 0 <= value <= 1 for value in values):
            raise DataError(f"'{path}', row {row}: phi is {values}; it must be a list of numbers within 0 and 1")


def _clips(raw: Dataset, path: Path, bounds: Bounds) -> Dataset:
    texts = [name for name in CAPTIONS if name in raw.column_names]
    if not texts:
        raise DataError(f"'{path}' has clips, but none of the columns {', '.join(CAPTIONS)}; give each clip its text")
    if "phi" in raw.column_names:
        _check_phi(raw, path)
    name = "videos" if "videos" in raw.column_names else "video"
    kept = contained(raw.select_columns([name, *({"phi"} & set(raw.column_names))]), name, bounds, f"'{path}'")
    prompts = [_prompt(text, f"'{path}', row {row}") for row, text in enumerate(raw[texts[0]][:])]
    named = kept.add_column("prompt", [prompt.text for prompt in prompts])
    return named.add_column("prompt_id", [prompt.id for prompt in prompts])


def _convert_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    *,
    convert: Callable[[Row, str], Row | None],
    path: str,
    medium: str,
) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    pairs = [convert(row, f"'{path}', row {index}") for index, row in zip(indices, rows, strict=True)]
    columns = {name: [pair[name] for pair in pairs if pair is not None] for name in COLUMNS}
    return {medium if name == "images" else name: values for name, values in columns.items()}


def _from_pickapic(row: Row, where: str, read: Read) -> Row | None:
    phi = row["label_0"]
    if phi is None or phi == 0.5:
        return None
    images = [read(row[name], f"{where}, {name}") for name in ("jpg_0", "jpg_1")]
    return _row(row["caption"], images, (phi, 1.0 - phi), where)


def _from_trl(row: Row, where: str, read: Read) -> Row:
    media = [read(row[name], f"{where}, {name}") for name in ("chosen", "rejected")]
    return _row(row["prompt"], media, (1.0, 0.0), where)


def _from_captioned(row: Row, where: str, read: Read, *, column: str) -> Row:
    return _row(row[column], [read(row["image"], f"{where}, image")], (0.0,), where)


LAYOUTS: dict[tuple[str, ...], Convert] = {
    ("jpg_0", "jpg_1", "label_0", "caption"): _from_pickapic,
    ("prompt", "chosen", "rejected"): _from_trl,
    **{("image", column): partial(_from_captioned, column=column) for column in CAPTIONS},
}


def _medium(cell: Any, where: str, *, bounds: Bounds, check: Callable[[bytes, str], object]) -> Row:
    """A cell of a media column, plain bytes or a path -> {bytes, path}; `check` raises DataError for damaged bytes."""
    data = read_cell(cell, bounds, where)
    check(data, where)
    return {"bytes": data, "path": None}


def _prompt(text: Any, where: str) -> Prompt:
    prompt = to_prompt(text, where)
    if not prompt.text:
        raise DataError(f"{where}: the prompt is empty; write one or remove the row")
    return prompt


def _row(text: Any, media: Sequence[Row], phi: tuple[float, ...], where: str) -> Row:
    prompt = _prompt(text, where)
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "images": list(media),
        "generators": ["unknown"] * len(phi),
        "seeds": [UNKNOWN_SEED] * len(phi),
        "sampling": "{}",
        "scores": {LABEL: list(phi)},
        "phi": list(phi),
    }


def _from_folder(rows: Sequence[FolderRow]) -> Dataset:
    """Rows that name the image files; their bytes are read when a row is. The first of two images is the better one."""
    from datasets import Dataset

    ranked = []
    for row in rows:
        images = [{"bytes": None, "path": str(file)} for file in row.files]
        ranked.append(_row(row.text, images, (1.0, 0.0) if len(images) > 1 else (0.0,), f"'{row.files[0]}'"))
    return Dataset.from_list(ranked, features=ranked_features([LABEL]))

"""Preference data of any known layout -> a `datasets.Dataset` with the ranked columns, so that it trains directly.

    ranked       what the rank stage writes, of images or of videos
    Pick-a-Pic   jpg_0, jpg_1, label_0, caption      label_0 = 1: the first is better, 0: the second, else a tie
    TRL          prompt, chosen, rejected            images, or videos where these columns are `Video`
    folders      w/NAME.png and l/NAME.png, caption in w/NAME.txt
    captioned    image, and text, caption or prompt (what `imagefolder` with a metadata.jsonl gives): for SFT
    clips        video, or videos [K] and perhaps phi [K], and text, caption or prompt (what `videofolder` gives)

Pairs become rows with K = 2 in the order they stand in, phi 1 for the better one and 0 for the other; captioned
images rows with K = 1 and phi 0. Videos stay encoded, for `alignkit.media.decode_clip`: training decodes them.
Not here: downloading, and the way back (exporters.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import DataError
from alignkit.media import clip_shape, image_size
from alignkit.records import Prompt
from data_pipelines.prompts import split_of
from data_pipelines.rows import open_dataset
from data_pipelines.synpic.media_columns import media_feature
from data_pipelines.synpic.rank import COLUMNS, SPLITS, VIDEO_COLUMNS, ranked_features

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

LABEL = "label"  # the name under which a given preference stands among the scores
UNKNOWN_SEED = -1
CAPTIONS = ("text", "caption", "prompt")  # columns that hold the text of a captioned medium
PICTURES = (".png", ".jpg", ".jpeg", ".webp")

Row = dict[str, Any]
Read = Callable[[Any, str], Row]  # a cell and where it stands -> {bytes, path}
Convert = Callable[[Row, str, Read], Row | None]


def load_ranked(path: str | Path, split: str, *, held_out: float = 0.1) -> Dataset:
    """The "train" or "heldout" rows of any layout above, with the ranked columns; images open as PIL images, videos as
    {"bytes", "path"}.

    `path` is a folder or a parquet file. Data without a held-out split of its own is split by `split_of(prompt_id,
    held_out)`. Ties are dropped and their number is logged.

    Raises MissingFileError, or DataError naming the columns expected and found, a picture that is missing or empty,
    or a split that holds no row.
    """
    path = Path(path)
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'; use 'train' or 'heldout'")
    splits = _open(path)
    if "heldout" in splits:
        return _to_ranked(splits[split], path) if split in splits else _empty(path, split, held_out)
    ranked = _to_ranked(splits["train"] if "train" in splits else next(iter(splits.values())), path)
    mine = [row for row, prompt_id in enumerate(ranked["prompt_id"]) if split_of(prompt_id, held_out) == split]
    return ranked.select(mine) if mine else _empty(path, split, held_out)


def _empty(path: Path, split: str, held_out: float) -> Dataset:
    raise DataError(
        f"'{path}' has no row in the split '{split}' (held_out {held_out}); give more data or another share"
    )


def _open(path: Path) -> Mapping[str, Dataset]:
    if (path / "w").is_dir() and (path / "l").is_dir():
        return {"train": _from_folders(path)}
    return open_dataset(path)


def _to_ranked(raw: Dataset, path: Path) -> Dataset:
    """Recognise the layout by its columns and convert; ranked data passes as it is."""
    from datasets import Image, List, Video

    if set(COLUMNS) <= set(raw.column_names):
        return raw.select_columns(list(COLUMNS))
    if set(VIDEO_COLUMNS) <= set(raw.column_names):
        return raw.cast_column("videos", List(media_feature("videos"))).select_columns(list(VIDEO_COLUMNS))
    if {"video", "videos"}.intersection(raw.column_names):
        return _clips(raw, path)
    for columns, convert in LAYOUTS.items():
        if set(columns) <= set(raw.column_names):
            for name in columns:
                if isinstance(raw.features[name], Image | Video):
                    raw = raw.cast_column(name, type(raw.features[name])(decode=False))
            media = "videos" if isinstance(raw.features[columns[1]], Video) else "images"
            ranked = raw.map(
                partial(_convert_batch, convert=convert, path=str(path), column=media),
                batched=True,
                batch_size=64,
                with_indices=True,
                remove_columns=raw.column_names,
                features=ranked_features([LABEL], media),
                desc="import",
            )
            if len(ranked) < len(raw):
                logger.warning("%s: %d ties dropped, %d rows kept", path, len(raw) - len(ranked), len(ranked))
            return ranked
    expected = "; or ".join(", ".join(columns) for columns in (COLUMNS, *LAYOUTS))
    raise DataError(f"'{path}' has the columns {', '.join(raw.column_names)}; expected {expected}")


def _clips(raw: Dataset, path: Path) -> Dataset:
    from datasets import List, Video

    texts = [name for name in CAPTIONS if name in raw.column_names]
    if not texts:
        raise DataError(f"'{path}' has clips, but none of the columns {', '.join(CAPTIONS)}; give each clip its text")
    name = "videos" if "videos" in raw.column_names else "video"
    kind = List(Video(decode=False)) if name == "videos" else Video(decode=False)
    kept = raw.cast_column(name, kind).select_columns([name, *({"phi"} & set(raw.column_names))])
    prompts = [_prompt(text, f"'{path}', row {row}") for row, text in enumerate(raw[texts[0]][:])]
    named = kept.add_column("prompt", [prompt.text for prompt in prompts])
    return named.add_column("prompt_id", [prompt.id for prompt in prompts])


def _convert_batch(
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int],
    *,
    convert: Convert,
    path: str,
    column: str,
) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    read = partial(_medium, column=column)
    pairs = [convert(row, f"'{path}', row {index}", read) for index, row in zip(indices, rows, strict=True)]
    columns = {name: [pair[name] for pair in pairs if pair is not None] for name in COLUMNS}
    return {column if name == "images" else name: values for name, values in columns.items()}


def _from_pickapic(row: Row, where: str, read: Read) -> Row | None:
    if row["label_0"] not in (0, 1):
        return None
    pictures = [read(row[name], f"{where}, {name}") for name in ("jpg_0", "jpg_1")]
    return _row(row["caption"], pictures, (float(row["label_0"]), 1.0 - row["label_0"]), where)


def _from_trl(row: Row, where: str, read: Read) -> Row:
    pictures = [read(row[name], f"{where}, {name}") for name in ("chosen", "rejected")]
    return _row(row["prompt"], pictures, (1.0, 0.0), where)


def _from_captioned(row: Row, where: str, read: Read, *, column: str) -> Row:
    return _row(row[column], [read(row["image"], f"{where}, image")], (0.0,), where)


LAYOUTS: dict[tuple[str, ...], Convert] = {
    ("jpg_0", "jpg_1", "label_0", "caption"): _from_pickapic,
    ("prompt", "chosen", "rejected"): _from_trl,
    **{("image", column): partial(_from_captioned, column=column) for column in CAPTIONS},
}


def _medium(cell: Any, where: str, *, column: str) -> Row:
    """A cell of an `Image` or `Video` column, or plain bytes -> {bytes, path}; DataError when it cannot be read."""
    medium = {"bytes": cell, "path": None} if isinstance(cell, bytes) else cell
    if not isinstance(medium, dict):
        raise DataError(f"{where}: expected encoded {column}, got {type(cell).__name__}")
    data = medium["bytes"] if medium["path"] is None else medium["bytes"] or Path(medium["path"]).read_bytes()
    (image_size if column == "images" else clip_shape)(data or b"", where)
    return {"bytes": data, "path": None}


def _prompt(text: Any, where: str) -> Prompt:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: the prompt must be text, got {text!r}")
    return Prompt.from_text(text)


def _row(text: Any, pictures: Sequence[Row], phi: tuple[float, ...], where: str) -> Row:
    prompt = _prompt(text, where)
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        "images": list(pictures),
        "generators": ["unknown"] * len(phi),
        "seeds": [UNKNOWN_SEED] * len(phi),
        "sampling": "{}",
        "scores": {LABEL: list(phi)},
        "phi": list(phi),
    }


def _from_folders(path: Path) -> Dataset:
    """Rows that name the picture files; their bytes are read when a row is."""
    from datasets import Dataset

    winners = sorted(file for file in (path / "w").iterdir() if file.suffix.lower() in PICTURES)
    if not winners:
        raise DataError(f"'{path / 'w'}' holds no picture ({', '.join(PICTURES)})")
    rows = [_folder_row(winner, path / "l" / winner.name) for winner in winners]
    return Dataset.from_list(rows, features=ranked_features([LABEL]))


def _folder_row(winner: Path, loser: Path) -> Row:
    caption = winner.with_suffix(".txt")
    for file, what in ((winner, "winner"), (loser, "loser of the same name"), (caption, "caption")):
        if not file.is_file() or not file.stat().st_size:
            raise DataError(f"'{file}' ({what}) is missing or empty; every pair is w/NAME.png, l/NAME.png, w/NAME.txt")
    try:
        text = caption.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"'{caption}' is not UTF-8 ({error}); save it as UTF-8") from error
    pictures = [{"bytes": None, "path": str(file)} for file in (winner, loser)]
    return _row(text, pictures, (1.0, 0.0), f"'{winner}'")

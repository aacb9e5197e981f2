"""Datasets by path: open what `datasets` can read, and the rows of one side with their columns checked.

Deliberately not here: what the columns of ranked data may be (`importers`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import DataError, MissingFileError
from alignkit.records import Prompt
from data_pipelines.prompts import split_of

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv"}  # of single files; any other is read as parquet


def open_dataset(path: Path) -> Mapping[str, Dataset]:
    """The splits of a folder, or the one split "train" of a parquet, JSON lines or CSV file.

    Raises MissingFileError where nothing is at `path`, DataError for what `datasets` cannot read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.exists():
        raise MissingFileError(f"'{path}' does not exist; download the dataset first and give its folder")
    cache = _cache_of(path)
    try:
        if path.is_file():
            opened = load_dataset(FORMATS.get(path.suffix, "parquet"), data_files=str(path), cache_dir=cache)
        else:
            opened = load_dataset(str(path), cache_dir=cache)
    except (FileNotFoundError, DatasetGenerationError) as error:
        raise DataError(f"'{path}' cannot be opened: {error}; give a parquet file, or a folder of them") from error
    return dict(opened)


def _cache_of(path: Path) -> str:
    """A cache of its own for these very files.

    `load_dataset` keys a folder that has a dataset card by its last name alone: a second run's `ranked` folder would
    silently be read as the first one's.
    """
    from datasets import config

    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return str(Path(config.HF_DATASETS_CACHE) / "alignkit" / key)


def load_rows(path: Path, split: str, *, held_out: float, columns: Sequence[Sequence[str]]) -> Dataset:
    """The "train" or "heldout" rows at `path`, with a column `prompt_id`.

    `columns` are the required ones, each with its alternatives: (("prompt",), ("videos", "latents")). Data without a
    split "heldout" is split by `split_of(prompt_id, held_out)`. Raises DataError naming missing columns and the row of
    an empty prompt, or where the side holds no row.
    """
    splits = open_dataset(path)
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    if "heldout" in splits and split == "heldout":
        rows = splits["heldout"]
    missing = [" or ".join(names) for names in columns if not set(names) & set(rows.column_names)]
    if missing:
        raise DataError(f"'{path}' lacks the columns {', '.join(missing)}; it has {', '.join(rows.column_names)}")
    rows = with_prompt_ids(rows, path)
    if "heldout" not in splits:
        rows = rows.select([row for row, id_ in enumerate(rows["prompt_id"]) if split_of(id_, held_out) == split])
    if not len(rows):
        raise DataError(f"'{path}' has no row in the split '{split}' (held_out {held_out}); give more data")
    return rows


def with_prompt_ids(rows: Dataset, path: Path) -> Dataset:
    """`rows` with the column `prompt_id`: a hash of the prompt's text, where the data has none of its own."""
    prompts: list[Any] = rows["prompt"][:]
    for row, text in enumerate(prompts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"'{path}', row {row}: the prompt must be text, not {text!r}")
    if "prompt_id" in rows.column_names:
        return rows
    return rows.add_column("prompt_id", [Prompt.from_text(text).id for text in prompts])


def without_prompts(rows: Dataset, ids: frozenset[str]) -> Dataset:
    """`rows` less those whose prompt has one of `ids`. Raises DataError where none stays."""
    stay = [row for row, text in enumerate(rows["prompt"][:]) if Prompt.from_text(text).id not in ids]
    if not stay:
        raise DataError("every training row has a prompt that validation or evaluation uses; give other prompts")
    return rows if len(stay) == len(rows) else rows.select(stay)

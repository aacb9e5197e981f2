"""Prompt files -> `Prompt` records, and the split of prompts by hash.

Not here: downloading a prompt set, the formats of tables (tables.py), and any change of wording; a prompt is folded and
hashed by `Prompt.from_text` only.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, MissingFileError
from alignkit.escape import get_logger
from alignkit.records import Prompt
from alignkit.seeds import derive_seed
from data_pipelines.tables import read_rows, require_column

logger = get_logger(__name__)

MAX_PROMPT = 128 << 10  # characters, as many as a field of a CSV file may have


def read_prompts(path: str | Path, *, column: str = "prompt") -> list[Prompt]:
    """Prompts of a .txt (one a line), .jsonl, .csv or .parquet file, in order, each once.

    `column` names the text in every format but .txt; the other columns become `Prompt.metadata`. Rows without text
    are skipped, and counted in a warning where the file is a table. Duplicates (equal `Prompt.id`) are dropped, the
    first one kept, and their number is logged as a warning.

    Raises MissingFileError, or DataError naming file and line for an unknown ending, an empty file, text that is not
    UTF-8, broken JSON or CSV, a missing column, or a prompt that is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"prompts file '{path}' does not exist; give a .txt, .jsonl, .csv or .parquet file")
    rows = [_to_prompt(row, column, f"'{path}', {where}") for where, row in read_rows(path, column)]
    prompts, duplicates = drop_duplicates(prompt for prompt in rows if prompt.text)
    if not prompts:
        raise DataError(f"prompts file '{path}' holds no prompt; write at least one")
    blank = sum(not prompt.text for prompt in rows)
    if blank:
        logger.warning("%s: %d rows without text in '%s' skipped", path, blank, column)
    if duplicates:
        logger.warning("%s: %d duplicate prompts dropped, %d kept", path, duplicates, len(prompts))
    return prompts


def drop_duplicates(prompts: Iterable[Prompt]) -> tuple[list[Prompt], int]:
    """The first prompt of every id, in order, and how many were dropped."""
    first: dict[str, Prompt] = {}
    total = 0
    for prompt in prompts:
        first.setdefault(prompt.id, prompt)
        total += 1
    return list(first.values()), total - len(first)


def split_of(prompt_id: str, held_out: float = 0.1) -> str:
    """`"train"` or `"heldout"`, by a hash of the id: the same prompt falls on the same side in every run and dataset.

    `held_out` is the expected share, in [0, 1], of held-out prompts; raising it only moves prompts out of train.
    """
    return "heldout" if derive_seed("split", prompt_id) < held_out * 2**63 else "train"


def to_prompt(text: Any, where: str, *, column: str = "prompt") -> Prompt:
    """A cell of a table as a `Prompt`, whose text may be empty.

    Raises DataError naming `where` and `column` for what is no text, too long, or cannot be written as UTF-8.
    """
    if not isinstance(text, str):
        raise DataError(f"{where}: '{column}' must be text, got {reprlib.repr(text)}")
    if len(text) > MAX_PROMPT:
        raise DataError(f"{where}: '{column}' has {len(text)} characters, the limit is {MAX_PROMPT}; shorten it")
    if "\0" in text:
        raise DataError(f"{where}: '{column}' holds a NUL character; remove it")
    try:
        return Prompt.from_text(text)
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{where}: '{column}' holds half of a character ({half}); write the whole one") from error


def _to_prompt(row: dict[str, Any], column: str, where: str) -> Prompt:
    require_column(list(row), column, where)
    metadata = {key: value for key, value in row.items() if key != column}
    return replace(to_prompt(row[column], where, column=column), metadata=metadata)

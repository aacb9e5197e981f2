"""Prompt files -> `Prompt` records, and the split of prompts by hash.

Not here: downloading a prompt set, and any change of wording; a prompt is folded and hashed by `Prompt.from_text` only.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, MissingFileError, nearest
from alignkit.records import Prompt
from alignkit.seeds import derive_seed

logger = logging.getLogger(__name__)

Row = tuple[str, dict[str, Any]]  # where it stands ("line 3"), and its columns


def read_prompts(path: str | Path, *, column: str = "prompt") -> list[Prompt]:
    """Prompts of a .txt (one a line), .jsonl, .csv or .parquet file, in order, each once.

    `column` names the text in every format but .txt; the other columns become `Prompt.metadata`. Blank lines are
    skipped. Duplicates (equal `Prompt.id`) are dropped, the first one kept, and their number is logged as a warning.

    Raises MissingFileError, or DataError naming file and line for an unknown ending, an empty file, bytes that are not
    UTF-8, broken JSON, a missing column, or a prompt that is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"prompts file '{path}' does not exist; give a .txt, .jsonl, .csv or .parquet file")
    if path.suffix not in _READERS:
        raise DataError(f"prompts file '{path}': cannot read '{path.suffix}' files.{nearest(path.suffix, _READERS)}")
    found = [_to_prompt(path, where, row, column) for where, row in _READERS[path.suffix](path, column)]
    prompts, duplicates = drop_duplicates(prompt for prompt in found if prompt.text)
    if not prompts:
        raise DataError(f"prompts file '{path}' holds no prompt; write at least one")
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


def _to_prompt(path: Path, where: str, row: dict[str, Any], column: str) -> Prompt:
    if column not in row:
        hint = f"found: {', '.join(map(str, row)) or 'none'}"
        raise DataError(f"prompts file '{path}', {where}: no column '{column}'; {hint}; name one as `column`")
    text = row[column]
    if not isinstance(text, str):
        raise DataError(f"prompts file '{path}', {where}: '{column}' must be text, got {text!r}")
    return replace(Prompt.from_text(text), metadata={key: value for key, value in row.items() if key != column})


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        bad = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise DataError(f"prompts file '{path}', line {line}: {bad} is not UTF-8; save the file as UTF-8") from error


def _read_txt(path: Path, column: str) -> Iterator[Row]:
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        yield f"line {number}", {column: line}


def _read_jsonl(path: Path, column: str) -> Iterator[Row]:
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if line.strip():
            yield f"line {number}", _json_object(path, number, line, column)


def _json_object(path: Path, number: int, line: str, column: str) -> dict[str, Any]:
    shape = f'one JSON object a line, like {{"{column}": "a red cube"}}'
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"prompts file '{path}', line {number}: {error}; expected {shape}") from error
    if not isinstance(row, dict):
        raise DataError(f"prompts file '{path}', line {number}: got {row!r}; expected {shape}")
    return row


def _read_csv(path: Path, column: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_decode(path), newline=""))
    if reader.fieldnames is not None and column not in reader.fieldnames:
        _to_prompt(path, "line 1", dict.fromkeys(reader.fieldnames), column)
    for row in reader:
        yield f"line {reader.line_num}", row


def _read_parquet(path: Path, column: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"prompts file '{path}' is no readable parquet file: {error}") from error
    if column not in table.column_names:
        _to_prompt(path, "schema", dict.fromkeys(table.column_names), column)
    for number, row in enumerate(table.to_pylist()):
        yield f"row {number}", row


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

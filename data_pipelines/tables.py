"""Text, JSON lines, CSV and parquet files -> rows, each with its place, strictly and within bounds.

What would lose text in silence (a comma outside quotes, an open quote, a name used twice) is a DataError with file and
line. Text is UTF-8, with or without a byte order mark, with any line ends. Not here: what the columns mean.
"""

from __future__ import annotations

import csv
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, nearest

MAX_LINE = 64 << 20  # bytes; a line of JSON may hold encoded images
BYTE_ORDER_MARK = "\ufeff"
FOREIGN = {
    b"\xff\xfe": "UTF-16 or UTF-32 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "a gzip archive; decompress it first (gunzip)",
    b"BZh": "a bzip2 archive; decompress it first (bunzip2)",
    b"\xfd7zXZ": "an xz archive; decompress it first (unxz)",
    b"\x28\xb5\x2f\xfd": "a zstd archive; decompress it first (unzstd)",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or export it as CSV in UTF-8",
    b"PAR1": "a parquet file; give it the ending .parquet",
}

Row = tuple[str, dict[str, Any]]  # where it is ("line 3"), and its columns


def read_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """Rows of a .txt (one column, named `column`), .jsonl, .csv or .parquet file, in order, blank lines left out.

    With `column`, CSV and parquet files must have it. Raises DataError naming file and line or row.
    """
    ending = path.suffix.lower()
    if ending not in _READERS:
        raise DataError(f"'{path}': cannot read '{ending}' files.{nearest(ending, _READERS)}")
    return _READERS[ending](path, column)


def read_text(path: Path) -> str:
    """A text file of any line ends, with newlines; DataError naming file and line as `read_rows` does."""
    return "\n".join(line for _, line in _lines(path))


def require_column(names: Sequence[str], column: str, where: str) -> None:
    """DataError naming what is there instead, when `column` is not among `names`."""
    if column not in names:
        raise DataError(f"{where}: no column '{column}'; found: {', '.join(names) or 'none'}; name one as `column`")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends (LF, CR LF or CR)."""
    number, offset = 0, 0
    try:
        with path.open("rb") as stream:
            while data := stream.readline(MAX_LINE + 1):
                for line in _split(path, data, number, offset):
                    number += 1
                    yield number, line
                offset += len(data)
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}; check the file and its permissions") from error


def _split(path: Path, data: bytes, number: int, offset: int) -> list[str]:
    """The lines in `data`, of which `number` lines and `offset` bytes come before; several where lines end in CR."""
    where = f"'{path}', line {number + 1}"
    for start, what in FOREIGN.items():
        if offset == 0 and data.startswith(start):
            raise DataError(f"'{path}' is {what}")
    if len(data) > MAX_LINE:
        raise DataError(f"{where}: over {MAX_LINE >> 20} MiB long, the limit for one line; split it into several")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = number + data.count(b"\r", 0, error.start) + 1
        bad = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}"
        raise DataError(f"'{path}', line {line}: {bad} is not UTF-8; save the file as UTF-8") from error
    if "\0" in text:
        raise DataError(f"{where}: a NUL byte; the file is binary or UTF-16, save it as UTF-8 text")
    lines = text.removesuffix("\n").removesuffix("\r").split("\r")
    return [line.removeprefix(BYTE_ORDER_MARK) for line in lines]  # also where files were joined


def _read_txt(path: Path, column: str | None) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            yield f"line {number}", {column or "text": line}


def _read_jsonl(path: Path, column: str | None) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            yield f"line {number}", _json_object(line, f"'{path}', line {number}", column or "prompt")


def _json_object(line: str, where: str, column: str) -> dict[str, Any]:
    shape = f'one JSON object a line, like {{"{column}": "a red cube"}}'
    try:
        row = json.loads(line, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # a ValueError too for a number of thousands of digits
        raise DataError(f"{where}: {error}; expected {shape}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: got {reprlib.repr(row)}; expected {shape}")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which `json` itself would keep the last of two equal names."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a name is there twice: {', '.join(repeated([name for name, _ in pairs]))}")
    return row


def repeated(names: Sequence[str]) -> list[str]:
    """The names that are there more than once, each once, in order."""
    return [name for name, count in Counter(names).items() if count > 1]


def _read_csv(path: Path, column: str | None) -> Iterator[Row]:
    header: list[str] = []
    for line, cells in _csv_cells(path):
        where = f"'{path}', line {line}"
        if not header:
            header = cells
            if repeated(header):
                raise DataError(f"{where}: columns of equal names: {', '.join(repeated(header))}; rename one")
            if column is not None:
                require_column(header, column, where)
        elif len(cells) != len(header):
            advice = 'a text with a comma must be in double quotes, like "red, blue"'
            raise DataError(f"{where}: {len(cells)} fields, but the header has {len(header)}; {advice}")
        else:
            yield f"line {line}", dict(zip(header, cells, strict=True))


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record that is not blank, with the line on which it begins."""
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            advice = 'put a text with a quote in double quotes and double the quote, like "a ""red"" cube"'
            place = f"'{path}', line {first}"
            raise DataError(f"{place}: {error} (read up to line {reader.line_num}); {advice}") from error
        if cells:
            yield first, cells


def _read_parquet(path: Path, column: str | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if repeated(names):
                raise DataError(f"'{path}': columns of equal names: {', '.join(repeated(names))}; rename one")
            if column is not None:
                require_column(names, column, f"'{path}'")
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows))
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise DataError(f"'{path}' is no readable parquet file: {error}; write it again") from error


_READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

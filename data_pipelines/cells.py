"""Cells of media columns: bytes, or the path of a file inside the dataset's folder.

A path in a row is data, and may come from someone else: it is resolved and checked before any library opens it, for
`datasets` and PyAV would follow a URL. Not here: decoding.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from alignkit.errors import DataError
from alignkit.paths import Bounds

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

Cell = dict[str, Any]  # {"bytes": bytes or None, "path": str or None}


def text_cell(value: Any, bounds: Bounds, where: str) -> Cell:
    """What JSON and CSV can say of a file: a path, {"path": ...} or {"bytes": BASE64} -> {bytes, path}."""
    cell = {"path": value} if isinstance(value, str) else value
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), str):
        try:
            return {"bytes": base64.b64decode(cell["bytes"], validate=True), "path": None}
        except binascii.Error as error:
            raise DataError(f"{where}: 'bytes' must be in base64: {error}") from error
    if isinstance(cell, dict) and isinstance(cell.get("path"), str):
        return {"bytes": None, "path": str(bounds.file(cell["path"], where))}
    what = type(value).__name__
    raise DataError(f"{where}: expected a path, or an object with 'path' or 'bytes' (base64), not {what}")


def read_cell(cell: Any, bounds: Bounds, where: str) -> bytes:
    """The bytes of a cell: {bytes, path}, plain bytes, or a path. DataError for anything else, or no bytes at all."""
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str):
        cell = {"path": cell}
    if not isinstance(cell, dict):
        raise DataError(f"{where}: expected an encoded image or video, got {type(cell).__name__}")
    data, path = cell.get("bytes"), cell.get("path")
    if data is not None or path is None:
        return data or b""
    file = bounds.file(path, where)
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: '{file}' cannot be read: {error.strerror}; check its permissions") from error


def contained(rows: Dataset, name: str, bounds: Bounds, where: str) -> Dataset:
    """`rows`, undecoded, whose media column `name` names no file outside `bounds`.

    Paths become absolute; in cells that hold bytes they are not used, and not checked. Raises DataError naming
    `where` and the row.
    """
    from datasets import Image, List, Video

    kind = Image(decode=False) if name.startswith("image") else Video(decode=False)
    is_list = isinstance(rows.features[name], List)
    rows = rows.cast_column(name, List(kind) if is_list else kind)
    if not any(cells.field("bytes").null_count for cells in _structs(rows, name)):
        return rows

    def resolve(column: Sequence[Any], indices: Sequence[int]) -> dict[str, list[Any]]:
        fixed = []
        for row, value in zip(indices, column, strict=True):
            place = f"{where}, row {row}, {name}"
            cells = [_resolved(cell, bounds, place) for cell in (value if is_list else [value])]
            fixed.append(cells if is_list else cells[0])
        return {name: fixed}

    return rows.map(resolve, input_columns=name, with_indices=True, batched=True, batch_size=64, features=rows.features)


def named_files(rows: Dataset) -> Iterator[str]:
    """The paths in all media columns."""
    from datasets import Image, List, Video

    for name, feature in rows.features.items():
        if isinstance(feature.feature if isinstance(feature, List) else feature, Image | Video):
            for cells in _structs(rows, name):
                yield from (path for path in cells.field("path").to_pylist() if path)


def read_files(rows: Dataset, name: str) -> Iterator[str]:
    """The paths in a media column of cells that hold no bytes, which are read when the row is."""
    for cells in _structs(rows, name):
        for cell in cells.filter(cells.field("bytes").is_null()).field("path").to_pylist():
            yield from [cell] if cell else []


def _structs(rows: Dataset, name: str) -> Iterator[pa.StructArray]:
    """The {bytes, path} of a media column, lists flattened, without a copy of the bytes."""
    import pyarrow as pa

    for chunk in rows.data.column(name).chunks:
        yield chunk if pa.types.is_struct(chunk.type) else chunk.flatten()


def _resolved(cell: Any, bounds: Bounds, where: str) -> Any:
    if cell is None or cell["bytes"] is not None or cell["path"] is None:
        return cell
    return {"bytes": None, "path": str(bounds.file(cell["path"], where))}

"""Files on disk: atomic writing, JSON, checksums and resumable parts.

    FOLDER/parts/           one small record for each finished part, written after the part's files
    FOLDER/manifest.json    written when a stage is finished: rows, counts, checksums

Everything is written to a temporary name, fsynced and renamed. Nothing that is hashed holds a time, so a run that was
killed and run again ends with the bytes of an unbroken one. A record may come from someone else: the files that it
names must be parquet files below its folder. Not here: what is in a part; what a folder was made with (`claims`);
keeping a second process out of it (`locks`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from alignkit.errors import AlignKitError, DataError, MissingFileError, StorageError
from alignkit.escape import get_logger
from alignkit.paths import Bounds

if TYPE_CHECKING:
    import pyarrow as pa

logger = get_logger(__name__)

STAGE_FILES = ("data", "parts", "manifest.json", "README.md")  # what a data stage writes


@dataclass(frozen=True, slots=True)
class Part:
    """A finished part: SHA-256 by file name, SHA-256 of what it was made from, and what its stage noted down."""

    name: str
    files: Mapping[str, str]
    inputs: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageResult:
    """A finished stage: its folder, the rows it holds, and its counts (dropped, quarantined, ...)."""

    folder: Path
    rows: int
    counts: Mapping[str, int]


def part_name(index: int) -> str:
    """`part-00007`."""
    return f"part-{index:05d}"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write; only when the block ends without an error does it appear, whole and synced, as `path`.

    Several processes may write the same `path`: the last one wins. Raises StorageError (disk full, no permission). No
    temporary file is left after an error; what a killed process left is removed by the next `claim`.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - the atomic step, by the name that tests break
        sync(path.parent)  # without it a power cut may forget the rename
    except AlignKitError:
        raise
    except OSError as error:
        advice = "make room on the disk or fix the folder, then run the same command again"
        raise StorageError(
            f"could not write '{path}': {error}; what was finished before is unchanged; {advice}"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # the error above says what is wrong with the folder
            temporary.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files, up to two folders deep, whose process on this machine does not run any more."""
    for pattern in ("", "*/", "*/*/"):
        for entry in list(folder.glob(f"{pattern}.*.{socket.gethostname()}-*.tmp")):
            process = entry.name.removesuffix(".tmp").rpartition("-")[2]
            if process.isdecimal() and not is_running(int(process)):
                entry.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_atomic(path: Path, data: bytes | memoryview) -> str:
    """Write `data` so that `path` holds all of it or what it held before; returns its SHA-256."""
    with atomic_file(path) as handle:
        handle.write(data)
    return hashlib.sha256(data).hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write UTF-8 text atomically; returns its SHA-256."""
    return write_atomic(path, text.encode())


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any) -> str:
    """Readable JSON with sorted keys and a final newline: equal values give equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str) + "\n"


def write_json(path: Path, value: Any) -> str:
    """`to_json(value)`, written atomically; returns its SHA-256."""
    return write_atomic(path, to_json(value).encode())


def read_json(path: Path) -> Any:
    """The value of a JSON file; MissingFileError or DataError name the file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingFileError(
            f"'{path}' does not exist; run the command that writes '{path.parent}' to its end"
        ) from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error}; correct its permissions") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{path}' is not JSON: {error}; remove it and run the same command again") from error


def write_part(
    folder: Path,
    name: str,
    tables: Mapping[str, pa.Table],
    *,
    inputs: Mapping[str, str] | None = None,
    notes: Mapping[str, Any] | None = None,
    page_checksums: bool = False,
    row_group_size: int | None = None,
) -> Part:
    """Write parquet files (`tables`, by path below `folder`), then the record that makes them a finished part.

    With `page_checksums`, `read_table` notices damage without hashing the whole file. Readers decode whole row groups
    of `row_group_size` rows (default: all rows). Raises DataError for a path that leaves `folder`.
    """
    _require_inside(folder, tables)
    # Sorted as in the record, so that a part just written and one read back are in the same order.
    options = {"write_page_checksum": page_checksums, "row_group_size": row_group_size}
    files = {path: write_atomic(folder / path, _parquet(table, options)) for path, table in sorted(tables.items())}
    part = Part(name, files, inputs or {}, notes or {})
    write_json(_record(folder, name), asdict(part))
    return part


def _parquet(table: pa.Table, options: Mapping[str, Any]) -> memoryview:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    # The bulk is encoded images and videos, which do not shrink.
    pq.write_table(table, buffer, compression="none", **options)
    return buffer.getbuffer()


def write_quarantine(folder: Path, faults: Iterable[Mapping[str, Any]]) -> Path:
    """Write `folder/quarantine.jsonl`: what a stage left out, a line each with its `reason`."""
    lines = [json.dumps(fault, sort_keys=True, ensure_ascii=False) + "\n" for fault in faults]
    write_text(folder / "quarantine.jsonl", "".join(lines))
    return folder / "quarantine.jsonl"


def _record(folder: Path, name: str) -> Path:
    return folder / "parts" / f"{name}.json"


def _to_part(record: Any, folder: Path, name: str) -> Part:
    """The part `name` of a record as read.

    Raises TypeError for what is no record, DataError where it has another name, or a file that is not below `folder`.
    """
    part = Part(**record)
    if not all(isinstance(section, Mapping) for section in (part.files, part.inputs, part.notes)):
        raise TypeError("files, inputs and notes must be mappings")
    if part.name != name:
        raise DataError(f"'{_record(folder, name)}' is the record of {part.name!r}, not of '{name}'; remove it")
    _require_inside(folder, part.files)
    return part


def _require_inside(folder: Path, paths: Iterable[str]) -> None:
    """DataError for the first of `paths` that is not a parquet file's relative path below `folder`.

    An absolute path is refused too: a stage writes its results under the names that its inputs have.
    """
    for path in paths:
        Bounds(folder).path(path, f"'{folder}', record of a part")
        if Path(path).is_absolute() or not path.endswith(".parquet"):
            raise DataError(f"'{folder}', record of a part: '{path}' is no relative path of a parquet file; remove it")


def finished_part(folder: Path, name: str, *, inputs: Mapping[str, str] | None = None) -> Part | None:
    """The part if all its files are undamaged and it was made from `inputs` (where not None); else None.

    A part that was finished and is damaged now is named in a warning; the caller rebuilds it. Raises DataError for a
    record that names files outside `folder`.
    """
    record = _record(folder, name)
    if not record.is_file():
        return None
    try:
        part = _to_part(json.loads(record.read_bytes()), folder, name)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"'{record}' cannot be read: {error}; correct its permissions") from error
    except (ValueError, TypeError, RecursionError) as error:
        logger.warning("'%s' is damaged (%s); %s is rebuilt", record, error, name)
        return None
    for path, expected in part.files.items():
        fault = _fault(folder / path, expected)
        if fault:
            logger.warning("'%s' %s; %s is rebuilt", folder / path, fault, name)
            return None
    if inputs is not None and part.inputs != inputs:
        logger.warning("%s of '%s' was made from other inputs; it is rebuilt", name, folder)
        return None
    return part


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises MissingFileError or DataError naming a file that cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise MissingFileError(f"'{path}' does not exist; run the stage that made it again") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error}; correct its permissions") from error


def _fault(path: Path, expected: str) -> str | None:
    if not path.is_file():
        return "is missing"
    return None if checksum(path) == expected else "is damaged (its checksum differs)"


def finish_run(
    folder: Path,
    stage: str,
    parts: Sequence[Part],
    *,
    rows: int,
    counts: Mapping[str, int],
    facts: Mapping[str, Any] | None = None,
) -> StageResult:
    """Write `manifest.json`: rows, counts, the checksum of every file, and `facts`, what else the stage states.

    Raises DataError where a part or one of its files is not there any more.
    """
    for part in parts:
        for path in (_record(folder, part.name), *(folder / name for name in part.files)):
            if not path.is_file():
                raise DataError(f"'{path}' was removed while the stage ran; run the same command again to rebuild it")
    files = {path: value for part in parts for path, value in part.files.items()}
    manifest = {"stage": stage, "rows": rows, "counts": counts, "parts": len(parts), "files": files}
    write_json(folder / "manifest.json", {**(facts or {}), **manifest})
    return StageResult(folder, rows, dict(counts))


def recorded_parts(folder: Path, stage: str) -> tuple[dict[str, Any], list[Part]]:
    """The manifest and the parts of a finished stage, in order; their files are not read (see `require_intact`).

    Raises MissingFileError when the stage is not finished, DataError for the folder of another stage, a manifest or
    record that is none, and a record that names files outside `folder`.
    """
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
    except MissingFileError as error:
        raise MissingFileError(
            f"'{folder}' is not a finished stage '{stage}': it has no manifest.json; run `alignkit {stage}` "
            "to its end, or give the folder that it wrote"
        ) from error
    if not isinstance(manifest, dict) or "stage" not in manifest or not isinstance(manifest.get("parts"), int):
        raise DataError(f"'{path}' is no manifest of a stage; run the stage that made it again")
    if manifest["stage"] != stage:
        raise DataError(
            f"'{folder}' holds the stage '{manifest['stage']}', expected '{stage}'; give the folder that `alignkit "
            f"{stage}` wrote"
        )
    parts = []
    for name in map(part_name, range(manifest["parts"])):
        record = _record(folder, name)
        try:
            parts.append(_to_part(read_json(record), folder, name))
        except TypeError as error:
            raise DataError(f"'{record}' is no record of a part: {error}; run the stage that made it again") from error
    return manifest, parts


def require_intact(folder: Path, part: Part) -> None:
    """DataError naming the first file of `part` that is missing or damaged."""
    for path, expected in part.files.items():
        fault = _fault(folder / path, expected)
        if fault:
            raise DataError(f"'{folder / path}' {fault}; run the stage that made it again, which rebuilds this part")


def read_schema(path: Path) -> pa.Schema:
    """The schema of a parquet file; DataError naming the file when it cannot be read."""
    import pyarrow.parquet as pq

    with _reading(path):
        return pq.read_schema(path)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet file, or some columns of it; DataError naming the file when it cannot be read."""
    import pyarrow.parquet as pq

    with _reading(path):
        return pq.read_table(path, columns=columns, page_checksum_verification=True)


def read_row(path: Path, number: int, columns: Sequence[str]) -> dict[str, Any]:
    """One row of a parquet file, without holding others of its row group; DataError naming the file."""
    import pyarrow.parquet as pq

    with _reading(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if number < size:
                rows = file.iter_batches(batch_size=1, row_groups=[group], columns=list(columns))
                return dict(next(itertools.islice(rows, number, None)).to_pylist()[0])
            number -= size
    raise DataError(f"'{path}' has {number} rows fewer than at the start; run the same command again")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """MissingFileError or DataError naming the parquet file at `path`, which is read inside."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"'{path}' does not exist; run the stage that made it again") from error
    except PermissionError as error:
        raise DataError(f"'{path}' cannot be read: {error}; correct its permissions") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"'{path}' is damaged or not a parquet file ({error}); run the stage that made it again, which rebuilds it"
        ) from error

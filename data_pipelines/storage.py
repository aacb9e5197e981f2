"""Parts on disk: written to a temporary name, fsynced, renamed, with checksums; found again after a kill.

A stage folder holds `config.json` (what resume compares), `versions.json` (informative, never compared), `data/` (the
files), `parts/` (one small record a finished part, written after its files) and at the end `manifest.json`. Nothing
hashed holds a time, so a run that was killed and run again ends with the bytes of an unbroken one.

Not here: what is in a part; locking of a folder against a second process.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from alignkit.errors import AlignKitError, DataError, MissingFileError, ResumeError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

PACKAGES = ("alignkit", "datasets", "diffusers", "numpy", "pillow", "pyarrow", "torch", "transformers")


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
    """A file to write; only when the block ends well does it appear, whole and synced, as `path`.

    Raises StorageError (disk full, no permission). Whatever is raised, no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - the atomic step, by the name that tests break
        _sync_folder(path.parent)
    except AlignKitError:
        raise
    except OSError as error:
        advice = "what was finished before is kept; make room or fix the folder, then run the same command again"
        raise StorageError(f"could not write '{path}': {error}; {advice}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | memoryview) -> str:
    """Write `data` so that `path` holds all of it or what it held before; returns its SHA-256."""
    with atomic_file(path) as handle:
        handle.write(data)
    return hashlib.sha256(data).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # without it a power cut may forget the rename
    finally:
        os.close(handle)


def to_json(value: Any) -> str:
    """Readable JSON with sorted keys and a final newline: equal values give equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> str:
    """`to_json(value)`, written atomically; returns its SHA-256."""
    return write_atomic(path, to_json(value).encode())


def read_json(path: Path) -> Any:
    """The value of a JSON file; MissingFileError or DataError naming it."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise MissingFileError(f"'{path}' does not exist; '{path.parent}' is no finished stage") from error
    except ValueError as error:
        raise DataError(f"'{path}' is no JSON: {error}; remove it and run the stage again") from error


def write_part(
    folder: Path,
    name: str,
    tables: Mapping[str, pa.Table],
    *,
    inputs: Mapping[str, str] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Part:
    """Write parquet files (`tables`, by path below `folder`), then the record that makes them a finished part."""
    # Sorted as in the record, so that a part just written and one found again go on in the same order.
    files = {path: write_atomic(folder / path, _parquet(table)) for path, table in sorted(tables.items())}
    part = Part(name, files, inputs or {}, notes or {})
    write_json(_record(folder, name), asdict(part))
    return part


def _parquet(table: pa.Table) -> memoryview:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none")  # the bulk is PNG, which does not shrink
    return buffer.getbuffer()


def _record(folder: Path, name: str) -> Path:
    return folder / "parts" / f"{name}.json"


def finished_part(folder: Path, name: str, *, inputs: Mapping[str, str] | None = None) -> Part | None:
    """The part if all of it is there unharmed and (where given) made from `inputs`; else None.

    A part that was finished and is harmed now is named in a warning; the caller rebuilds it.
    """
    record = _record(folder, name)
    if not record.is_file():
        return None
    try:
        part = Part(**json.loads(record.read_bytes()))
    except (ValueError, TypeError) as error:
        logger.warning("'%s' is damaged (%s); %s is rebuilt", record, error, name)
        return None
    for path, wanted in part.files.items():
        fault = _fault(folder / path, wanted)
        if fault:
            logger.warning("'%s' %s; %s is rebuilt", folder / path, fault, name)
            return None
    if inputs is not None and part.inputs != inputs:
        logger.warning("%s of '%s' was made from other input; it is rebuilt", name, folder)
        return None
    return part


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fault(path: Path, wanted: str) -> str | None:
    if not path.is_file():
        return "is missing"
    return None if checksum(path) == wanted else "is damaged (its checksum differs)"


def open_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Begin or resume a stage in `folder`: `config.json` and `versions.json`.

    `settings` is all that decides the stage's bytes. Raises ResumeError when the folder was begun with other settings
    (the message shows them key by key) or holds files of another origin under the names this stage would write.
    """
    path = folder / "config.json"
    wanted = json.loads(to_json(settings))
    if path.exists():
        differences = list(_differences(read_json(path), wanted))
        if differences:
            lines = "\n  ".join(differences)
            advice = "Use the old values, or another output folder."
            raise ResumeError(f"'{folder}' was begun with another config:\n  {lines}\n{advice}")
    else:
        taken = [name for name in ("data", "parts", "manifest.json", "README.md") if (folder / name).exists()]
        if taken:
            held = ", ".join(taken)
            raise ResumeError(f"'{folder}' holds {held} but no config.json, so no stage made it; use another folder")
        write_json(path, wanted)
    _note_versions(folder / "versions.json")


def _differences(old: Any, new: Any, key: str = "") -> Iterable[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, now) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, now, f"{key}[{index}]")
    elif old != new:
        yield f"{key}: {json.dumps(old)} -> {json.dumps(new)}"


def _note_versions(path: Path) -> None:
    installed = {name: importlib.metadata.version(name) for name in PACKAGES if _is_installed(name)}
    versions = {"python": platform.python_version(), **installed}
    if not path.exists():
        write_json(path, versions)
        return
    for line in _differences(read_json(path), versions):
        logger.warning("'%s' was begun with other library versions (%s); new parts may differ slightly", path, line)


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def finish_run(folder: Path, stage: str, parts: Sequence[Part], *, rows: int, counts: Mapping[str, int]) -> StageResult:
    """Write `manifest.json`: rows, counts and the checksum of every file."""
    files = {path: value for part in parts for path, value in part.files.items()}
    manifest = {"stage": stage, "rows": rows, "counts": counts, "parts": len(parts), "files": files}
    write_json(folder / "manifest.json", manifest)
    return StageResult(folder, rows, dict(counts))


def recorded_parts(folder: Path, stage: str) -> tuple[dict[str, Any], list[Part]]:
    """The manifest and the parts of a finished stage, in order; their files are not read (see `require_intact`).

    Raises MissingFileError when the stage is not finished, DataError for the folder of another stage.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest["stage"] != stage:
        raise DataError(f"'{folder}' holds the stage '{manifest['stage']}', expected '{stage}'")
    records = [read_json(_record(folder, part_name(index))) for index in range(manifest["parts"])]
    return manifest, [Part(**record) for record in records]


def require_intact(folder: Path, part: Part) -> None:
    """DataError naming the first file of `part` that is missing or harmed."""
    for path, wanted in part.files.items():
        fault = _fault(folder / path, wanted)
        if fault:
            raise DataError(f"'{folder / path}' {fault}; run the stage that made it again, which rebuilds this part")


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet file, or some columns of it; DataError naming the file when it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError as error:
        raise MissingFileError(f"'{path}' does not exist; run the stage that made it again") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"'{path}' is no readable parquet file ({error}); run the stage that made it again") from error

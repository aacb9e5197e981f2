"""Small files written whole or not at all, and never over something a user wrote.

Deliberately not here: checkpoints (transformers.Trainer writes them) and dataset parts (data_pipelines).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.errors import DataError, MissingFileError, StorageError

_MARK = re.compile(rb"\n<!-- written by alignkit, sha256 ([0-9a-f]{64}) -->\n\Z")


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name, fsync and rename: a killed run leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror}. What was complete before is kept.") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented, sorted, ending in a newline: equal values give equal bytes. NaN is refused (it is not JSON)."""
    write_whole(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The parsed file; MissingFileError or DataError name it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} is not there; run `alignkit evaluate` first.") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); delete it and run the same command again.") from error


def write_generated(path: Path, text: str) -> None:
    """Write a page with a checksum comment at its end; a file there that was edited by hand is first set aside.

    The set-aside file is `NAME.kept-1.EXT` (2, 3, ...), so regenerating a page never loses what somebody wrote.
    """
    body = text.encode()
    if path.exists() and not _untouched(path.read_bytes()):
        path.rename(_free_name(path))
    write_whole(path, body + f"\n<!-- written by alignkit, sha256 {hashlib.sha256(body).hexdigest()} -->\n".encode())


def _untouched(data: bytes) -> bool:
    mark = _MARK.search(data)
    return mark is not None and hashlib.sha256(data[: mark.start()]).hexdigest().encode() == mark.group(1)


def _free_name(path: Path) -> Path:
    number = 1
    while (kept := path.with_name(f"{path.stem}.kept-{number}{path.suffix}")).exists():
        number += 1
    return kept

"""One record of what a folder was made with, compared when its work is continued.

    FOLDER/run.json         what its results depend on, in named sections
    FOLDER/versions.json    library versions; informative, a difference is only warned of

The record binds from the first result on: a first attempt that made nothing may be corrected. What is compared is
content, not the place where it lies (`provenance.comparable`). Not here: keeping a second process out (`locks`).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from alignkit.errors import ResumeError
from alignkit.escape import get_logger
from alignkit.locks import LOCK
from alignkit.storage import read_json, remove_abandoned, to_json, write_json

logger = get_logger(__name__)

RUN = "run.json"
VERSIONS = "versions.json"
EARLIER_RECORDS = ("config.yaml", "inputs.json", "settings.json")  # of version 0.1.0 before run.json
RECORDS = {RUN, VERSIONS, LOCK, "config.yaml", "judge.json", "log.txt"}  # files that are no results
NO_RESULTS = {"parts", "runs"}  # folders: records of parts, whose data is elsewhere; TensorBoard's logs
CONTENT = "content"  # before the fingerprint of a file or folder, in the record
PACKAGES = (
    "accelerate",
    "alignkit",
    "av",
    "datasets",
    "diffusers",
    "numpy",
    "peft",
    "pillow",
    "pyarrow",
    "torch",
    "transformers",
    "trl",
)


def claim(
    folder: Path,
    record: Mapping[str, Any],
    *,
    free: Collection[str] = (),
    writes: Collection[str] = (),
    advice: Mapping[str, str] | None = None,
) -> None:
    """Begin or resume `folder`: `run.json` holds what its results depend on, `versions.json` the library versions.

    `record` has named sections ("config", "inputs", ...). A section that `run.json` lacks is added; one that it has
    must be equal, except for the keys in `free` (dotted, as "config.report"), which are replaced. While the folder
    holds no result, any section is replaced. `writes` are names that the caller will write in `folder`: without a
    `run.json` none of them may exist. `advice` says by key how else to get what a changed value asks for.

    Raises ResumeError with the differences, key by key, or when the files in `folder` are of another origin.
    """
    remove_abandoned(folder)
    known = claimed(folder)
    if not known:
        _require_unused(folder, writes)
    sections: dict[str, Any] = json.loads(to_json(record))  # as it will be read back
    changed = [
        line
        for section in sorted(sections.keys() & known.keys())
        for line in differences(known[section], sections[section], section, free=free)
    ]
    if changed and holds_results(folder):
        raise ResumeError(*_refusal(folder, changed, advice or {}))
    if changed:
        for part in (folder / "parts").glob("*.json"):
            part.unlink()  # of parts without data, such as those of which every row was left out
    if known != known | sections:
        write_json(folder / RUN, known | sections)
    _note_versions(folder / VERSIONS)


def _refusal(folder: Path, changed: Collection[str], advice: Mapping[str, str]) -> list[str]:
    lines = [f"'{folder}' was made with another config or other inputs:", *(f"  {line}" for line in changed)]
    if any(CONTENT in line for line in changed):
        lines.append(f"('{CONTENT}' and 16 digits stand for what is in a file or folder.)")
    keys = {line.partition(":")[0] for line in changed}
    ways = dict.fromkeys(way for key, way in advice.items() if key in keys)
    return [*lines, "Use the old values to continue it, or another folder.", *ways]


def holds_results(folder: Path) -> bool:
    """Whether there is a result in `folder` or below it: any file that is no record, log, cache or temporary file.

    Caches have names with an underscore at the start, temporary files with a point.
    """
    for _, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(("_", ".")) and name not in NO_RESULTS]
        if any(name not in RECORDS and not name.startswith(".") for name in files):
            return True
    return False


def claimed(folder: Path) -> dict[str, Any]:
    """The sections of `run.json`; empty where nothing has been claimed yet."""
    path = folder / RUN
    record: dict[str, Any] = read_json(path) if path.exists() else {}
    return record


def _require_unused(folder: Path, writes: Collection[str]) -> None:
    present = [name for name in (*writes, *EARLIER_RECORDS) if (folder / name).exists()]
    if present:
        raise ResumeError(
            f"'{folder}' holds {', '.join(present)} but no {RUN}, so this version did not make it. Finished results of "
            "an earlier version can be read, but not continued: use another folder"
        )


def differences(old: Any, new: Any, key: str = "", *, free: Collection[str] = ()) -> list[str]:
    """Lines `key: old -> new` (values as JSON) for every leaf that differs, less the dotted keys in `free`."""
    if key in free:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new})
        inner = [(f"{key}.{name}" if key else name, old.get(name), new.get(name)) for name in names]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        inner = [(f"{key}[{index}]", *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        before, now = (json.dumps(value, ensure_ascii=False) for value in (old, new))
        return [] if old == new else [f"{key}: {before} -> {now}"]
    return [line for name, first, second in inner for line in differences(first, second, name, free=free)]


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the libraries a result depends on; imports none of them."""
    installed = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "absent"
    return installed


def _note_versions(path: Path) -> None:
    if not path.exists():
        write_json(path, versions())
        return
    for line in differences(read_json(path), versions()):
        logger.warning("'%s' was begun with other library versions (%s); new results may differ slightly", path, line)

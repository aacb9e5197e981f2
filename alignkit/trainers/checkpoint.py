"""Which checkpoint may be resumed: `complete.json`, written last, lists every file of a checkpoint with its size.

A checkpoint without it, or whose files differ from it, was interrupted while being written; transformers would resume
from such a folder silently and with other weights.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from alignkit.errors import ResumeError
from alignkit.storage import write_json

MARK = "complete.json"


def mark_complete(folder: Path) -> None:
    """List the folder's files in `complete.json` (atomically)."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MARK]
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    write_json(folder / MARK, sizes)


def mark_incomplete(folder: Path) -> None:
    """To be called before anything is written into `folder`, which may hold an older checkpoint."""
    (folder / MARK).unlink(missing_ok=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when it is whole."""
    mark = folder / MARK
    if not mark.is_file():
        return f"{MARK} is missing, so its writing was interrupted"
    try:
        sizes = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError:
        return f"{MARK} cannot be read"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def find_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones are skipped with a warning that names them."""
    folders = [folder for folder in output_dir.glob("checkpoint-*") if folder.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda folder: int(folder.name.split("-")[-1]), reverse=True):
        problem = damage(folder)
        if problem is None:
            return folder
        warnings.warn(f"checkpoint '{folder}' is refused: {problem}; trying the one before it", stacklevel=2)
    return None


def require_whole(folder: Path) -> Path:
    """`folder`, or ResumeError saying what is wrong with it and which checkpoint to use instead."""
    problem = damage(folder) if folder.is_dir() else "there is no such folder"
    if problem is None:
        return folder
    other = find_checkpoint(folder.parent) if folder.parent.is_dir() else None
    advice = f"use '{other}'" if other else "no whole checkpoint is left beside it: start anew"
    raise ResumeError(f"checkpoint '{folder}' cannot be resumed: {problem}; {advice}")

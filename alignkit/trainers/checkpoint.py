"""Which checkpoint may be resumed: `complete.json`, written last, vouches for every file of a checkpoint.

It holds the size and SHA-256 of each file, all synced to disk before, and the batch of the run that wrote them. A
checkpoint without it, or whose files differ from it, was interrupted while being written or damaged later; transformers
would resume from such a folder silently and with other weights.
"""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from alignkit.errors import AlignKitError, ResumeError, StorageError
from alignkit.storage import checksum, sync, write_json

MARK = "complete.json"
_STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR),
}
_WRITERS = (
    "PytorchStreamWriter",
    "inline_container",
    "iostream error",
    "Parent directory",
)  # torch.save names no errno


@dataclass(frozen=True, slots=True)
class StepBatch:
    """How the rows of one optimizer step are divided."""

    processes: int
    rows_per_device: int
    accumulation: int

    @property
    def rows(self) -> int:
        """Rows of a step over all processes."""
        return self.processes * self.rows_per_device * self.accumulation

    def __str__(self) -> str:
        """`2 processes x 4 rows x 8 accumulated`."""
        return f"{self.processes} processes x {self.rows_per_device} rows x {self.accumulation} accumulated"


def mark_complete(folder: Path, batch: StepBatch) -> None:
    """Sync the folder's files to disk and list them in `complete.json` (atomically)."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MARK]
    for path in [*files, *{file.parent for file in files}]:
        sync(path)
    contents = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": checksum(file)} for file in files
    }
    write_json(folder / MARK, {"batch": asdict(batch), "files": contents})


def mark_incomplete(folder: Path) -> None:
    """To be called before anything is written into `folder`, which may hold an older checkpoint."""
    (folder / MARK).unlink(missing_ok=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when it is whole. Reads all its files."""
    mark = folder / MARK
    if not mark.is_file():
        return f"{MARK} is missing, so its writing was interrupted"
    try:
        contents = json.loads(mark.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"{MARK} cannot be read"
    for name, expected in contents.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if checksum(file) != expected["sha256"]:
            return f"{name} is damaged (its checksum differs)"
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


def require_batch(folder: Path, batch: StepBatch) -> None:
    """ResumeError if a step of the checkpoint's run had another number of rows; a warning if only the division differs.

    Learning rate, losses and the order of the data belong to the number of rows, so it must not change unnoticed.
    """
    before = StepBatch(**json.loads((folder / MARK).read_text(encoding="utf-8"))["batch"])
    if before.rows != batch.rows:
        raise ResumeError(
            f"checkpoint '{folder}' was trained with {before.rows} rows a step ({before}), now they are {batch.rows} "
            f"({batch}). Change the number of processes, per_device_train_batch_size or gradient_accumulation_steps so "
            f"that their product is {before.rows}, or train in another folder"
        )
    if before != batch:
        warnings.warn(
            f"'{folder}' was trained with {before}, which is now {batch}: still {batch.rows} rows a step, but random "
            "dropout, and the rows of a step where sizes differ, are not those of the unbroken run",
            stacklevel=2,
        )


def stored_state(folder: Path) -> TrainerState:
    """The trainer's state in a checkpoint."""
    return TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))


def best_checkpoint(folder: Path) -> str | None:
    """The best checkpoint that the state in `folder` names: beside it, also when both were moved, or where it was."""
    best = stored_state(folder).best_model_checkpoint
    places = [folder.parent / Path(best).name, Path(best)] if best else []
    return next((str(place) for place in places if place.is_dir()), None)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a full disk, a missing folder or missing permission within it into a StorageError that names the file."""
    try:
        yield
    except AlignKitError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno not in _STORAGE_ERRORS:
            raise
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _WRITERS):
            raise
        name = error.filename if isinstance(error, OSError) and error.filename else folder
        raise StorageError(
            f"could not write '{name}': {error}. What was finished before is unchanged, an unfinished checkpoint is "
            "skipped; make room on the disk or fix the folder, then run the same command again"
        ) from error

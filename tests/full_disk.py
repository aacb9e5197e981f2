"""A disk that is full: one step of writing fails with the operating system's error for it."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

STEPS = ("write", "flush", "fsync", "close", "replace")


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Handle:
    """An open file whose `step` fails; of what is written the first half reaches the disk."""

    def __init__(self, handle: Any, step: str) -> None:
        self._handle, self._step = handle, step

    def write(self, data: Any) -> int:
        if self._step != "write":
            return int(self._handle.write(data))
        self._handle.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        self._handle.flush()
        if self._step == "flush":
            full()

    def close(self) -> None:
        self._handle.close()
        if self._step == "close":
            full()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def full_disk(folder: Path, step: str) -> Iterator[None]:
    """Within it `step` fails for every file in `folder` that Python opens for writing."""
    opened = io.open

    def open_full(file: Any, mode: str = "r", *given: Any, **options: Any) -> Any:
        handle = opened(file, mode, *given, **options)
        is_written = set(mode) & set("wxa+") and str(file).startswith(f"{folder}{os.sep}")
        return Handle(handle, step) if is_written else handle

    with pytest.MonkeyPatch.context() as patch:
        if step in ("fsync", "replace"):
            patch.setattr(os, step, full)
        else:
            patch.setattr(io, "open", open_full)
            patch.setattr(builtins, "open", open_full)
        yield

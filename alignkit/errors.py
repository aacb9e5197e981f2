"""Every error alignkit raises on purpose.

Each child also inherits the standard-library error it refines, so `except ValueError` keeps working.
A message says what is wrong, where (file, row, key), which value, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class AlignKitError(Exception):
    """Root of all errors raised on purpose; the program prints these without a traceback.

    Each argument is a line of the message. A line break within one came with a name or value: it is shown escaped.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class ConfigError(AlignKitError, ValueError):
    """A config key, flag or value is unknown, duplicated, of the wrong type or contradicts another."""


class UnknownNameError(ConfigError, LookupError):
    """A generator, reward, loss or backbone name is in no table."""


class DataError(AlignKitError, ValueError):
    """A file, row, column or image cannot be used."""


class FlaggedError(DataError):
    """A generator was asked for images and its safety checker replaced some of them.

    `pixels` are those of the whole batch, as `ImageSource.generate` returns them; `flags` [B] say which were replaced.
    """

    def __init__(self, message: str, *, pixels: Any = None, flags: Sequence[bool] = ()) -> None:
        super().__init__(message)
        self.pixels, self.flags = pixels, tuple(flags)


class MissingFileError(DataError, FileNotFoundError):
    """A file or folder that a stage needs is not there."""


class ResumeError(AlignKitError, RuntimeError):
    """An interrupted run cannot be continued: another config, or no complete checkpoint."""


class FolderInUseError(ResumeError):
    """Another process works in the folder; its lock says who."""


class CheckpointMismatchError(ResumeError):
    """A checkpoint was written by a run with other trainable weights."""


class StorageError(AlignKitError, OSError):
    """A result could not be written (full disk, no permission); what was complete before is kept."""


class NumericsError(AlignKitError, ArithmeticError):
    """A loss, gradient or reward is NaN or infinite where that must stop the run."""


class ServerError(AlignKitError, ConnectionError):
    """A served model cannot be reached, refuses what it is asked, or answers what cannot be used."""


class AdapterError(AlignKitError, ValueError):
    """An adapter matches no layer, or belongs to another model family."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest known name, or a list of all where none is close."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else f" Known: {', '.join(names)}."


def require_at_least(minimum: float, numbers: Mapping[str, float | None]) -> None:
    """ConfigError for the first of the named numbers that is below `minimum` or NaN; None passes."""
    for name, value in numbers.items():
        if value is not None and not value >= minimum:
            raise ConfigError(f"{name} is {value}; it must be at least {minimum}")

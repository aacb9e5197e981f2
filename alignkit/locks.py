"""One process at a time in a folder: `FOLDER/lock.json` says who holds it.

The lock itself is the kernel's (`flock`), which ends with the process however that ends, so that no killed process
blocks a folder; the file's text (host, pid, since) is for people, and for file systems without `flock`. Not here: what
the process does with the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

from alignkit.errors import FolderInUseError, StorageError
from alignkit.storage import is_running

LOCK = "lock.json"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of this start of the machine; containers on it have the same
_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())  # lock files of this process
GRACE = 10.0  # seconds for the children of a killed process, which hold its lock too, to notice that it is gone


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; inside itself it does nothing. A missing folder is made, and
    removed when it stays empty.

    In a training of several processes (torchrun) only the first holds it. Raises FolderInUseError naming who does,
    StorageError for a folder that cannot be written, and at the end for one that was deleted or moved meanwhile.
    """
    path = folder.absolute() / LOCK
    is_first = os.environ.get("RANK", "0") in ("", "0")
    if path in _HELD.get() or not is_first:
        yield
        return
    is_new = not folder.exists()
    handle = _acquire(path)
    token = _HELD.set(_HELD.get() | {path})
    try:
        yield
        if not _is_still(handle, path):
            raise StorageError(
                f"'{folder}' was deleted or moved while the command ran (its {LOCK} is gone), so results may be "
                "missing: run the same command again"
            )
    finally:
        _HELD.reset(token)
        if _is_still(handle, path):
            path.unlink(missing_ok=True)
        handle.close()
        if is_new:
            with contextlib.suppress(OSError):  # not empty: it holds results
                folder.rmdir()


def _acquire(path: Path) -> BinaryIO:
    """The locked file, which says that this process holds it."""
    end = time.monotonic() + GRACE
    while True:
        handle = _opened(path)
        is_free = _try_lock(handle)
        holder = _holder(handle)
        if is_free and not _is_still(handle, path):  # its holder has just removed it
            handle.close()
            continue
        if is_free and not _is_elsewhere(holder):
            _sign(handle, path)
            return handle
        handle.close()
        if is_free or not (_is_here(holder) and _is_gone(holder)) or time.monotonic() > end:
            raise FolderInUseError(_refusal(path, holder))
        time.sleep(0.1)


def _opened(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+b", buffering=0)
    except OSError as error:
        raise StorageError(f"could not write '{path}': {error}; make the folder writable, or choose another") from error


def _try_lock(handle: BinaryIO) -> bool:
    """Lock the file if it is free. Without file locks it is free when its holder's process has ended."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
            raise StorageError(f"'{handle.name}' cannot be locked: {error}; choose a folder elsewhere") from error
        holder = _holder(handle)
        return not holder or (_is_here(holder) and _is_gone(holder))
    return True


def _holder(handle: BinaryIO) -> dict[str, Any]:
    """What the file says; empty where its holder has not written it yet."""
    handle.seek(0)
    try:
        value = json.loads(handle.read(4096))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _sign(handle: BinaryIO, path: Path) -> None:
    """Write who holds the lock."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "boot": _boot()}
    try:
        handle.truncate(0)
        handle.write(json.dumps(holder).encode() + b"\n")
    except OSError as error:
        path.unlink(missing_ok=True)
        handle.close()
        advice = "make room on the disk, then run the same command again"
        raise StorageError(f"could not write '{path}': {error}; {advice}") from error


def _boot() -> str:
    return BOOT_ID.read_text(encoding="utf-8").strip() if BOOT_ID.is_file() else ""


def _is_here(holder: Mapping[str, Any]) -> bool:
    """Whether the holder's process is, or was, on this machine."""
    return holder.get("host") == socket.gethostname()


def _is_elsewhere(holder: Mapping[str, Any]) -> bool:
    """Whether the holder may run on another machine, whose locks this one may not see (network file systems)."""
    is_same_machine = _is_here(holder) or (holder.get("boot") and holder.get("boot") == _boot())
    return bool(holder) and not is_same_machine


def _is_gone(holder: Mapping[str, Any]) -> bool:
    process = holder.get("pid")
    return not (isinstance(process, int) and process > 0 and is_running(process))


def _is_still(handle: BinaryIO, path: Path) -> bool:
    """Whether `path` is the file that is open as `handle`, and not removed or replaced since."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _refusal(path: Path, holder: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{key} {holder[key]}" for key in ("host", "pid", "since") if key in holder)
    advice = "wait until it ends, or use another folder"
    if _is_elsewhere(holder):
        advice += f"; if that process is gone for certain, remove '{path}'"
    return f"'{path.parent}' is in use by another process ({facts or 'which has just begun'}): {advice}"

"""One process at a time in a folder, whoever was killed in it before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from alignkit.errors import FolderInUseError, StorageError
from alignkit.locks import LOCK, locked

HOLD = """
import sys
from pathlib import Path
from alignkit.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `folder` until its input ends."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        if process.stdin is not None:
            process.stdin.close()


def test_a_second_process_is_refused_by_the_name_of_the_first_until_that_ends(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with holder(folder) as process:
        pattern = rf"out' is in use .*host {socket.gethostname()}, pid {process.pid}, since 20\d\d-.*another folder$"
        with pytest.raises(FolderInUseError, match=pattern), locked(folder):
            pytest.fail("two in one folder")
    assert process.returncode == 0
    assert not folder.exists()
    with locked(folder):
        assert json.loads((folder / LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()
    assert not folder.exists()


def test_a_killed_process_blocks_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))["pid"] == process.pid
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))["pid"] == os.getpid()


def test_a_stale_lock_of_this_machine_is_taken_over_even_if_its_number_runs_again(tmp_path: Path) -> None:
    stale = {"host": socket.gethostname(), "pid": os.getpid(), "since": "2026-01-01T00:00:00Z"}
    for text in (json.dumps(stale), "", "{", "[]"):
        (tmp_path / LOCK).write_text(text, encoding="utf-8")
        with locked(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text(encoding="utf-8"))["since"] != stale["since"]


def test_the_lock_of_another_machine_is_respected_with_the_way_on(tmp_path: Path) -> None:
    """Its process cannot be looked for, and its lock may not be seen through a network file system."""
    text = json.dumps({"host": "far", "pid": 1, "since": "2026-01-01T00:00:00Z", "boot": "another"})
    (tmp_path / LOCK).write_text(text, encoding="utf-8")
    with pytest.raises(FolderInUseError, match=rf"host far, pid 1, since 2026.*remove '.*{LOCK}'"), locked(tmp_path):
        pytest.fail("two in one folder")
    assert (tmp_path / LOCK).read_text(encoding="utf-8") == text


def test_a_folder_that_is_held_may_be_held_again_and_is_free_only_at_the_end(tmp_path: Path) -> None:
    with locked(tmp_path):
        with locked(tmp_path):
            pass
        with pytest.raises(subprocess.CalledProcessError):
            subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], check=True, capture_output=True, text=True)
    assert not (tmp_path / LOCK).exists()


def test_only_the_first_of_several_training_processes_holds_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with locked(tmp_path):
        assert not (tmp_path / LOCK).exists()


def test_a_place_that_is_no_folder_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"could not write '.*lock\.json'"), locked(tmp_path / "file" / "out"):
        pytest.fail("held")


def test_a_folder_that_is_deleted_meanwhile_is_an_error_at_the_end(tmp_path: Path) -> None:
    """Whether or not it is there again; an error of the work itself stays what it is."""
    folder = tmp_path / "out"

    def make_again() -> None:
        folder.mkdir()
        (folder / "result").write_bytes(b"")

    def work(then: Callable[[], object]) -> None:
        with locked(folder):
            shutil.rmtree(folder)
            then()

    for then in (lambda: None, make_again):
        with pytest.raises(StorageError, match=r"out' was deleted or moved while the command ran"):
            work(then)
    with pytest.raises(KeyError):
        work(lambda: {}["x"])
    with locked(folder):
        (folder / "result").write_bytes(b"")
    assert [path.name for path in folder.iterdir()] == ["result"]

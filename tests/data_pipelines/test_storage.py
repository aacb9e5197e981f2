"""Atomic parts: nothing half-written is taken for finished, nothing finished is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pyarrow as pa
import pytest

from alignkit.errors import DataError, MissingFileError, ResumeError, StorageError
from data_pipelines import storage

TABLE = {"data/a.parquet": pa.table({"x": [1, 2, 3]})}


def test_part_round_trip(tmp_path: Path) -> None:
    part = storage.write_part(tmp_path, "part-00000", TABLE, inputs={"i": "1"}, notes={"rows": 3})
    assert storage.finished_part(tmp_path, "part-00000") == part
    assert storage.finished_part(tmp_path, "part-00001") is None
    assert storage.read_table(tmp_path / "data/a.parquet").equals(TABLE["data/a.parquet"])


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "record"])
def test_harmed_part_is_named_and_not_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str) -> None:
    part = storage.write_part(tmp_path, "part-00000", TABLE)
    path = tmp_path / "data/a.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    {
        "flip": lambda: path.write_bytes(data),
        "truncate": lambda: path.write_bytes(data[:-1]),
        "remove": path.unlink,
        "record": lambda: (tmp_path / "parts/part-00000.json").write_text("{"),
    }[harm]()
    assert storage.finished_part(tmp_path, "part-00000") is None
    assert "part-00000 is rebuilt" in caplog.text
    if harm != "record":
        with pytest.raises(DataError, match=r"a\.parquet'.*(missing|damaged)"):
            storage.require_intact(tmp_path, part)


def test_part_of_other_input_is_not_finished(tmp_path: Path) -> None:
    storage.write_part(tmp_path, "part-00000", TABLE, inputs={"from": "1"})
    assert storage.finished_part(tmp_path, "part-00000", inputs={"from": "2"}) is None


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    storage.write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageError, match=r"could not write .*No space left.*make room"):
        storage.write_atomic(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_other_config_is_refused_key_by_key(tmp_path: Path) -> None:
    storage.open_run(tmp_path, {"config": {"seed": 1, "sources": [{"name": "a", "seeds": 2}], "same": 0}})
    storage.open_run(tmp_path, {"config": {"seed": 1, "sources": [{"name": "a", "seeds": 2}], "same": 0}})
    with pytest.raises(ResumeError) as caught:
        storage.open_run(tmp_path, {"config": {"seed": 2, "sources": [{"name": "a", "seeds": 3}], "same": 0}})
    message = str(caught.value)
    assert "config.seed: 1 -> 2" in message
    assert "config.sources[0].seeds: 2 -> 3" in message
    assert "same" not in message


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ResumeError, match=r"README\.md but no config\.json"):
        storage.open_run(tmp_path, {})
    assert (tmp_path / "README.md").read_text() == "mine"


def test_versions_are_noted_and_never_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage.open_run(tmp_path, {})
    storage.write_json(tmp_path / "versions.json", storage.read_json(tmp_path / "versions.json") | {"torch": "0.1"})
    storage.open_run(tmp_path, {})
    assert 'torch: "0.1" -> ' in caplog.text


def test_unfinished_and_wrong_stages_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no finished stage"):
        storage.recorded_parts(tmp_path, "generate")
    part = storage.write_part(tmp_path, "part-00000", TABLE)
    storage.finish_run(tmp_path, "generate", [part], rows=3, counts={})
    assert storage.recorded_parts(tmp_path, "generate")[1] == [part]
    with pytest.raises(DataError, match="'generate', expected 'score'"):
        storage.recorded_parts(tmp_path, "score")

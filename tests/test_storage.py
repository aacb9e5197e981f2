"""Atomic parts: nothing half-written is taken for finished, nothing finished is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from alignkit import claims, storage
from alignkit.errors import DataError, MissingFileError, StorageError

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


def test_what_a_killed_process_left_is_removed_but_not_what_a_running_one_writes(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    names = [f".x.json.{socket.gethostname()}-{process}.tmp" for process in (ended.pid, os.getpid())]
    elsewhere = ".x.json.another-machine-1.tmp"
    for name in (*names, elsewhere):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / name).write_bytes(b"")
    claims.claim(tmp_path, {"config": {}})
    assert {entry.name for entry in (tmp_path / "parts").iterdir()} == {names[1], elsewhere}


def test_unfinished_and_wrong_stages_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"not a finished stage 'generate': .* run `alignkit generate`"):
        storage.recorded_parts(tmp_path, "generate")
    part = storage.write_part(tmp_path, "part-00000", TABLE)
    storage.finish_run(tmp_path, "generate", [part], rows=3, counts={})
    assert storage.recorded_parts(tmp_path, "generate")[1] == [part]
    with pytest.raises(DataError, match="'generate', expected 'score'; give the folder that `alignkit score` wrote"):
        storage.recorded_parts(tmp_path, "score")


def change_record(folder: Path, **changes: object) -> None:
    path = folder / "parts" / "part-00000.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(record | changes), encoding="utf-8")


HOSTILE = [
    "../victim.parquet",
    "ABSOLUTE",
    "part-/../../victim.parquet",
    "data\\..\\..\\victim.parquet",
    "link/victim.parquet",
    "link.parquet",
    "file:///victim.parquet",
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_record_names_no_file_outside(tmp_path: Path, name: str) -> None:
    """It is refused by name, whether the file is there or not and whatever its checksum; so it is for writing."""
    folder, victim = tmp_path / "stage", tmp_path / "victim.parquet"
    part = storage.write_part(folder, "part-00000", TABLE)
    storage.finish_run(folder, "generate", [part], rows=3, counts={})
    (folder / "link").symlink_to(tmp_path)
    (folder / "link.parquet").symlink_to(victim)
    name = str(victim) if name == "ABSOLUTE" else name
    sha = storage.write_atomic(victim, b"mine")
    change_record(folder, files={name: sha})
    before = sorted(tmp_path.rglob("*"))
    for read in (
        lambda: storage.finished_part(folder, "part-00000"),
        lambda: storage.recorded_parts(folder, "generate"),
        lambda: storage.write_part(folder, "part-00001", {name: TABLE["data/a.parquet"]}),
    ):
        with pytest.raises(DataError, match=f"stage', record of a part: .*{re.escape(repr(name)[1:-1])}.*"):
            read()
    assert victim.read_bytes() == b"mine"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["run.json", "manifest.json", "data/a.parquet/../../x", "INSIDE"])
def test_a_record_names_parquet_files_by_relative_paths(tmp_path: Path, name: str) -> None:
    """A stage writes its own results under these names, so they must not lead back to the stage before."""
    storage.write_part(tmp_path, "part-00000", TABLE)
    change_record(tmp_path, files={str(tmp_path / "data" / "a.parquet") if name == "INSIDE" else name: "0"})
    with pytest.raises(DataError, match="record of a part"):
        storage.finished_part(tmp_path, "part-00000")


@pytest.mark.parametrize("name", ["../../victim", "/victim", "part-00001", None, 3])
def test_a_record_has_the_name_of_its_part(tmp_path: Path, name: object) -> None:
    part = storage.write_part(tmp_path, "part-00000", TABLE)
    storage.finish_run(tmp_path, "generate", [part], rows=3, counts={})
    change_record(tmp_path, name=name)
    for read in (
        lambda: storage.finished_part(tmp_path, "part-00000"),
        lambda: storage.recorded_parts(tmp_path, "generate"),
    ):
        with pytest.raises(DataError, match=r"part-00000\.json' is the record of .*, not of 'part-00000'"):
            read()


@pytest.mark.parametrize("text", ["[]", "{}", '{"stage": "generate", "parts": "1"}'])
def test_a_manifest_is_checked(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="is no manifest of a stage"):
        storage.recorded_parts(tmp_path, "generate")


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"name": "part-00000", "files": ["../x"]}'])
def test_a_record_of_another_form_is_damage(tmp_path: Path, text: str) -> None:
    part = storage.write_part(tmp_path, "part-00000", TABLE)
    storage.finish_run(tmp_path, "generate", [part], rows=3, counts={})
    (tmp_path / "parts" / "part-00000.json").write_text(text, encoding="utf-8")
    assert storage.finished_part(tmp_path, "part-00000") is None
    with pytest.raises(DataError, match="is no record of a part"):
        storage.recorded_parts(tmp_path, "generate")


@pytest.mark.parametrize("lost", ["data/a.parquet", "parts/part-00000.json"])
def test_a_stage_whose_output_was_removed_does_not_finish(tmp_path: Path, lost: str) -> None:
    part = storage.write_part(tmp_path, "part-00000", TABLE)
    (tmp_path / lost).unlink()
    with pytest.raises(DataError, match=rf"{lost}' was removed while the stage ran; run the same command again"):
        storage.finish_run(tmp_path, "generate", [part], rows=3, counts={})
    assert not (tmp_path / "manifest.json").exists()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """A folder stands for a file without permission, which the superuser could read."""
    for read in (storage.read_json, storage.checksum, storage.read_schema):
        with pytest.raises(DataError, match=rf"'{tmp_path}' (cannot be read: .*directory|is damaged)"):
            read(tmp_path)
    for read in (storage.read_json, storage.checksum, storage.read_schema, storage.read_table):
        with pytest.raises(MissingFileError, match="none' does not exist"):
            read(tmp_path / "none")
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"deep\.json' is not JSON"):
        storage.read_json(deep)
    table = tmp_path / "a.parquet"
    storage.write_part(tmp_path, "part-00000", {"a.parquet": TABLE["data/a.parquet"]})
    table.write_bytes(table.read_bytes()[:-9])
    for read in (storage.read_table, storage.read_schema):
        with pytest.raises(DataError, match=r"a\.parquet' is damaged or not a parquet file"):
            read(table)


def test_a_place_below_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"could not write '.*file/out/x'.*Not a directory"):
        storage.write_text(tmp_path / "file" / "out" / "x", "text")

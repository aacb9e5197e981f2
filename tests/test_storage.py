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

from alignkit import storage
from alignkit.errors import DataError, MissingFileError, ResumeError, StorageError

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
    record = {"config": {"seed": 1, "sources": [{"name": "a", "seeds": 2}], "same": 0}}
    storage.claim(tmp_path, record)
    storage.claim(tmp_path, record)
    with pytest.raises(ResumeError) as caught:
        storage.claim(tmp_path, {"config": {"seed": 2, "sources": [{"name": "a", "seeds": 3}], "same": 0}})
    message = str(caught.value)
    assert "config.seed: 1 -> 2" in message
    assert "config.sources[0].seeds: 2 -> 3" in message
    assert "same" not in message
    assert storage.claimed(tmp_path) == record


def test_sections_are_claimed_one_after_the_other(tmp_path: Path) -> None:
    assert storage.claimed(tmp_path) == {}
    storage.claim(tmp_path, {"config": {"seed": 1}})
    storage.claim(tmp_path, {"inputs": {"policy": "m 1", "data": "d"}})
    storage.claim(tmp_path, {"inputs": {"data": "d", "policy": "m 1"}})
    with pytest.raises(ResumeError, match=r'inputs\.policy: "m 1" -> "m 2"'):
        storage.claim(tmp_path, {"inputs": {"policy": "m 2", "data": "d"}})
    assert storage.claimed(tmp_path) == {"config": {"seed": 1}, "inputs": {"policy": "m 1", "data": "d"}}


def test_free_keys_are_replaced_and_the_others_compared(tmp_path: Path) -> None:
    storage.claim(tmp_path, {"config": {"train": {"rate": 1}, "seed": 1}})
    storage.claim(tmp_path, {"config": {"train": {"rate": 2}, "seed": 1}}, free={"config.train"})
    assert storage.claimed(tmp_path) == {"config": {"train": {"rate": 2}, "seed": 1}}
    with pytest.raises(ResumeError, match=r"config\.seed: 1 -> 2"):
        storage.claim(tmp_path, {"config": {"train": {"rate": 3}, "seed": 2}}, free={"config.train"})
    with pytest.raises(ResumeError, match=r"config\.train\.rate: 2 -> 3"):
        storage.claim(tmp_path, {"config": {"train": {"rate": 3}, "seed": 1}})


def test_differences_name_leaves() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert storage.differences(old, new) == ["a.c: 2 -> 4", "d: 3 -> null", "e: null -> 5"]
    assert storage.differences(old, new, free={"a", "e"}) == ["d: 3 -> null"]


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ResumeError, match=r"README\.md but no run\.json"):
        storage.claim(tmp_path, {"stage": "rank"}, writes=storage.STAGE_FILES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize("name", storage.EARLIER_RECORDS)
def test_a_folder_of_an_earlier_version_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ResumeError, match=rf"{name} but no run\.json.*can be read.*another folder"):
        storage.claim(tmp_path, {"config": {}})


def test_versions_are_noted_and_never_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage.claim(tmp_path, {"config": {}})
    storage.write_json(tmp_path / "versions.json", storage.read_json(tmp_path / "versions.json") | {"torch": "0.1"})
    storage.claim(tmp_path, {"config": {}})
    assert 'torch: "0.1" -> ' in caplog.text


def test_what_a_killed_process_left_is_removed_but_not_what_a_running_one_writes(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    names = [f".x.json.{socket.gethostname()}-{process}.tmp" for process in (ended.pid, os.getpid())]
    elsewhere = ".x.json.another-machine-1.tmp"
    for name in (*names, elsewhere):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / name).write_bytes(b"")
    storage.claim(tmp_path, {"config": {}})
    assert {entry.name for entry in (tmp_path / "parts").iterdir()} == {names[1], elsewhere}


def test_unfinished_and_wrong_stages_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="not a finished stage"):
        storage.recorded_parts(tmp_path, "generate")
    part = storage.write_part(tmp_path, "part-00000", TABLE)
    storage.finish_run(tmp_path, "generate", [part], rows=3, counts={})
    assert storage.recorded_parts(tmp_path, "generate")[1] == [part]
    with pytest.raises(DataError, match="'generate', expected 'score'"):
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

"""Every verb that makes results refuses a folder that another process holds, before it loads anything."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
import yaml

from alignkit.cli import main

RED = {"red": {"reward": "mine_for_commands:Red"}}
PAINTER = {"model": "mine_for_commands:Painter"}
CONFIGS = {
    "rank": {"candidates": "candidates", "scores": "scores", "out": "OUT"},
    "evaluate": {
        "base": PAINTER,
        "tuned": {**PAINTER, "options": {"k": 1}},
        "prompts": {"file": "prompts.txt"},
        "rewards": RED,
        "out": "OUT",
    },
    "train sft": {"model": "org/name", "data": "data", "output_dir": "OUT"},
    "run": {
        "out": "OUT",
        "prompts": {"file": "prompts.txt"},
        "generators": {"painter": PAINTER},
        "rewards": RED,
        "policy": "painter",
        "generate": {"sources": [{"name": "painter", "seeds_per_prompt": 2}]},
        "score": {"rewards": ["red"]},
        "train": {"max_steps": 1},
    },
}


@pytest.mark.parametrize("verb", ["generate", "score", *CONFIGS])
def test_a_held_folder_is_refused(work: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = work / "OUT"
    out.mkdir()
    config = Path(f"{verb}.yaml")
    text = config.read_text(encoding="utf-8") if config.is_file() else yaml.safe_dump(CONFIGS[verb])
    config.write_text(text.replace("out: candidates", "out: OUT").replace("out: scores", "out: OUT"), encoding="utf-8")
    with (out / "lock.json").open("w", encoding="utf-8") as lock:
        lock.write(json.dumps({"host": "here", "pid": 12, "since": "2026-01-01T00:00:00Z"}))
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)  # another open file is another holder, even in this process
        assert main([*verb.split(), "--config", str(config)]) == 2
    assert "OUT' is in use by another process (host here, pid 12, since 2026" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["lock.json"]

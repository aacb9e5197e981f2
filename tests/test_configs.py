"""Every file in configs/ is what its first line says: the command there parses it and plans the work."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from alignkit import cli

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert {"demo.yaml", "demo_short.yaml", "rankdpo_sd3.yaml", "sft.yaml"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_first_line_runs_the_file(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    mark, program, *words = shlex.split(first)
    assert (mark, program) == ("#", "alignkit")
    assert f"configs/{path.name}" in words
    before = set(ROOT.iterdir())
    assert cli.main([*words, "--dry-run"]) == 0
    assert "what would be done" in capsys.readouterr().out
    assert set(ROOT.iterdir()) == before

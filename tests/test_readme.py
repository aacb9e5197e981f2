"""Every command in README.md is read by the program, and its downloads are the files that its recipes name."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from alignkit import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
LINES = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
INLINE = [shlex.split(" ".join(text.split())) for text in re.findall(r"`(alignkit [a-z]+ [^`|.]*?--[^`]+)`", TEXT)]
COMMANDS = [words[1:] for words in [*LINES, *INLINE] if words[:1] == ["alignkit"]]


def downloaded(words: list[str]) -> Path:
    """What `hf download REPO [FILE] --local-dir FOLDER` or `curl -L --output-dir FOLDER -O URL` makes."""
    if words[0] == "curl":
        return Path(words[words.index("--output-dir") + 1], words[-1].rpartition("/")[2])
    return Path(words[-1], *words[3 : words.index("--local-dir")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder in which README's downloads and commands are done, as far as the names of their results go."""
    work = tmp_path_factory.mktemp("readme")
    for words in LINES:
        if words[0] in ("hf", "curl"):
            place = work / downloaded(words)
            if place.suffix:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            else:
                shutil.copytree(ROOT / "configs" / "models" / "sd35_medium", place)
    for result in ("demo/ranked", "stages/candidates", "stages/scores"):
        (work / "runs" / result).mkdir(parents=True)
    (work / "FOLDER").mkdir()
    shutil.copy(ROOT / "configs" / "demo.yaml", work)
    return work


def test_there_are_commands_and_nothing_unknown():
    assert len(COMMANDS) >= 9
    assert {words[0] for words in LINES} == {"make", "alignkit", "hf", "curl"}
    targets = [words[1] for words in LINES if words[0] == "make"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}: " in makefile for target in targets)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_dry_run_misses_nothing(words, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    dry_run = [] if {"--help", "--dry-run"} & set(words) else ["--dry-run"]
    assert cli.main([*words, *dry_run]) == 0
    printed = capsys.readouterr().out
    assert "NOT THERE YET" not in printed
    assert sorted(folder.rglob("*")) == before


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert {"docs/add_a_method.md", "docs/glossary.md", "docs/security.md", "docs/report.png"} <= set(links)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_real_run_downloads_its_model_once():
    """The recipe names the folder of README's download, and no other generator."""
    recipe = (ROOT / "configs" / "rankdpo_sd3.yaml").read_text(encoding="utf-8")
    (generators,) = re.findall(r"^generators:\n((?:  .*\n)+)", recipe, flags=re.MULTILINE)
    assert re.findall(r"model: (\S+?)[,}]", generators) == ["models/sd3"]
    assert Path("models/sd3") in [downloaded(words) for words in LINES if words[0] == "hf"]

"""A config can name code, which a dry run must not import: configs come from other people too."""

from __future__ import annotations

import sys

import pytest

from alignkit import cli
from alignkit.errors import UnknownNameError
from alignkit.resolve import require_known, resolve

CODE = "module_of_a_config"
PROMPTS = f"prompts: {{source: '{CODE}:prompts', count: 2}}\n"
MODELS = f"generators: {{a: {{model: '{CODE}:a'}}}}\n"
REWARDS = f"rewards: {{r: {{reward: '{CODE}:r'}}}}\n"
CONFIGS = {
    "generate": PROMPTS + MODELS + "generate: {sources: [{name: a, seeds_per_prompt: 2}]}\nout: out\n",
    "score": REWARDS + "score: {rewards: [r]}\ncandidates: candidates\nout: out\n",
    "evaluate": PROMPTS + REWARDS + f"base: {{model: '{CODE}:a'}}\ntuned: {{model: '{CODE}:b'}}\nout: out\n",
}


SOURCES = "sources: [{name: a, seeds_per_prompt: 2, sampling: {height: 8, width: 8}}]"
POLICY = PROMPTS + MODELS + REWARDS + "policy: a\nout: out\n"
SYNPIC = POLICY + f"generate: {{{SOURCES}}}\nscore: {{rewards: [r]}}\n"
OWN = f"method: '{CODE}:METHOD'\ntrain: {{my_key: [1, two]}}\n"
ARMS = f"arms: {{a: {{method: '{CODE}:METHOD', train: {{my_key: 1}}}}, b: {{train: {{beta: 2.0}}}}}}\ntable: table.md\n"
METHODS_OF_CONFIGS = {
    "run": SYNPIC + OWN,
    "run on data": POLICY + OWN + "data: {path: rows, root: '.'}\n",
    "run on prompts": POLICY + OWN,
    "ladder": SYNPIC + ARMS,
    f"train {CODE}:METHOD": "model: m/n\ndata: rows\ndata_root: '.'\noutput_dir: out\nmy_key: 1\n",
    f"train {CODE}:METHOD on prompts": f"model: m/n\n{PROMPTS}output_dir: out\nmy_key: 1\n",
}


@pytest.mark.parametrize("case", METHODS_OF_CONFIGS)
def test_a_dry_run_imports_no_method_of_the_config(case, tmp_path, monkeypatch, capsys):
    """Its keys are shown as they are, and a word says that they were not checked."""
    (tmp_path / f"{CODE}.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    (tmp_path / "job.yaml").write_text(METHODS_OF_CONFIGS[case], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = case.partition(" on ")[0].split()
    assert cli.main([*words, "--config", "job.yaml", "--dry-run"]) == 0, capsys.readouterr().err
    assert CODE not in sys.modules
    text = capsys.readouterr().out
    assert f"method '{CODE}:METHOD' is your own: its keys are not checked in a dry run" in text
    assert "my_key:" in text
    with pytest.raises(SystemExit, match="imported"):
        cli.main([*words, "--config", "job.yaml"])


def test_a_dry_run_of_a_name_of_no_method(tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(SYNPIC + "method: 'module.:x'\n", encoding="utf-8")
    assert cli.main(["run", "--config", str(tmp_path / "job.yaml"), "--dry-run"]) == 2
    assert "unknown method 'module.:x'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", CONFIGS)
def test_a_dry_run_imports_no_code_of_the_config(verb, tmp_path, monkeypatch, capsys):
    (tmp_path / f"{CODE}.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    (tmp_path / "job.yaml").write_text(CONFIGS[verb], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main([verb, "--config", "job.yaml", "--dry-run"]) == 0, capsys.readouterr().err
    assert CODE not in sys.modules


@pytest.mark.parametrize("name", ["", "a", ":a", "a:", "a.:b", ".a:b", "a b:c", "http://x", "a:b:c", "a:b.c"])
def test_names_that_are_no_code(name):
    for check in (require_known, resolve):
        with pytest.raises(UnknownNameError, match="unknown reward"):
            check(name, {"known": "json:loads"}, kind="reward")
    require_known("known", {"known": "json:loads"}, kind="reward")
    require_known("not_there.at_all:name", {}, kind="reward")

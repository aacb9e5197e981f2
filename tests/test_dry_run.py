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
    "generate": PROMPTS + MODELS + "generate: {sources: [{name: a, seeds: 2}]}\nout: out\n",
    "score": REWARDS + "score: {rewards: [r]}\ncandidates: candidates\nout: out\n",
    "evaluate": PROMPTS + REWARDS + f"base: {{model: '{CODE}:a'}}\ntuned: {{model: '{CODE}:b'}}\nout: out\n",
}


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

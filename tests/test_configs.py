"""Every file in configs/ is what its first line says: the command there parses it and plans the work."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest
import yaml

from alignkit import cli
from alignkit.commands.ladder_job import LadderJob
from alignkit.config import load

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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_config_of_a_dry_run_is_read_again(path, monkeypatch, capsys, tmp_path):
    """As a file of its own, it stands for the same job."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(path.read_text(encoding="utf-8").splitlines()[0])[2:]
    verb = words[: words.index("--config")]
    assert cli.main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed, encoding="utf-8")
    assert cli.main([*verb, "--config", str(again), "--dry-run"]) == 0
    second = capsys.readouterr().out
    assert yaml.safe_load(second) == yaml.safe_load(printed)  # 1.0 is 1
    assert second.partition("# what")[2] == printed.partition("# what")[2]


LADDERS = [path for path in FILES if path.read_text(encoding="utf-8").startswith("# alignkit ladder ")]


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.name)
def test_a_ladder_has_prompts_to_evaluate(path):
    job = load(LadderJob, file=path)
    assert len(job.judged(job.shares)) >= 0.9 * (job.evaluate_prompts or 1)


def test_a_dry_run_prints_the_keys_of_the_method_and_those_given(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["--config", "configs/demo.yaml", "--train.weight_decay", "0.1", "--dry-run"]
    assert cli.main(["run", *words]) == 0
    train = yaml.safe_load(capsys.readouterr().out)["train"]
    assert (train["beta"], train["weight_decay"], train["sft_weight"]) == (30, 0.1, 0.0)
    assert "adam_beta1" not in train


@pytest.mark.parametrize("name", ["rankdpo_sd3.yaml", "rankdpo_sdxl.yaml", "rankdpo_sd15.yaml"])
def test_published_recipes_judge_with_a_reward_of_another_make(name):
    """The paper's ensemble ranks or watches; the held-out reward is no CLIP and ranks nothing."""
    config = yaml.safe_load((ROOT / "configs" / name).read_text(encoding="utf-8"))
    kinds = {key: spec["reward"] for key, spec in config["rewards"].items()}
    ensemble = {"pick_score", "hps", "image_reward", "aesthetic", "clip_score"}
    assert set(kinds.values()) - {kinds[config["gold"]]} == ensemble
    assert kinds[config["gold"]] not in ensemble
    ranking = config.get("score", {}).get("rewards", sorted(set(kinds) - {config["gold"]}))
    assert {kinds[key] for key in ranking} == ensemble
    source = (ROOT / "rewards" / f"{kinds[config['gold']]}.py").read_text(encoding="utf-8")
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert "rewards.models.clip" not in imported

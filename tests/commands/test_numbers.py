"""Numbers of a config that no job can use are refused before any work."""

from __future__ import annotations

import pytest
import yaml

from alignkit import cli

GENERATE = {"sources": [{"name": "a", "seeds_per_prompt": 2, "sampling": {"height": 8, "width": 8}}]}
POLICY = {
    "out": "out",
    "prompts": {"file": "prompts.txt"},
    "generators": {"a": {"model": "m/n"}},
    "rewards": {"r": {"reward": "mine:Red"}},
    "policy": "a",
    "generate": GENERATE,
    "score": {"rewards": ["r"]},
}
VALIDATION = {"rewards": ["r"]}
JOBS = {
    "run": POLICY | {"validation": VALIDATION},
    "ladder": POLICY | {"arms": {"a": {}}, "table": "table.md", "validation": VALIDATION},
    "train rankdpo": {"model": "m/n", "data": "rows", "output_dir": "out"},
    "report": {"run": "out"},
}


@pytest.mark.parametrize(
    ("verb", "flag", "message"),
    [
        ("run", "--prompts.count=0", "count is 0; it must be at least 1"),
        ("run", "--validation.prompts=0", "prompts is 0; it must be at least 1"),
        ("run", "--validation.batch_size=-1", "batch_size is -1; it must be at least 1"),
        ("run", "--evaluate_prompts=0", "evaluate_prompts is 0; it must be at least 1"),
        ("run", "--report.gallery=-1", "gallery is -1; it must be at least 0"),
        ("report", "--gallery=-1", "gallery is -1; it must be at least 0"),
        ("train rankdpo", "--held_out=1", "held_out is 1.0; it must lie in [0, 1)"),
        ("train rankdpo", "--held_out=-0.1", "held_out is -0.1; it must lie in [0, 1)"),
        ("ladder", "--evaluate_from=-1", "evaluate_from is -1; it must be at least 0"),
        ("ladder", "--evaluate_prompts=0", "evaluate_prompts is 0; it must be at least 1"),
        ("ladder", "--workers=0", "workers is 0; it must be at least 1"),
        ("ladder", "--training_seeds=[]", "training_seeds is []; give at least one"),
        (
            "ladder",
            "--training_seeds=[0, -1]",
            "training_seeds is [0, -1]; give at least one, each from 0 to 2**32 - 1",
        ),
        (
            "ladder",
            "--training_seeds=[4294967296]",
            "training_seeds is [4294967296]; give at least one, each from 0 to 2**32 - 1",
        ),
    ],
)
def test_a_number_out_of_range_is_refused(verb, flag, message, tmp_path, capsys):
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(JOBS[verb]), encoding="utf-8")
    words = [*verb.split(), "--config", str(job), "--dry-run"]
    assert cli.main([*words, flag]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "flag"),
    [
        ("run", "--prompts.count=1"),
        ("run", "--evaluate_prompts=1"),
        ("report", "--gallery=0"),
        ("train rankdpo", "--held_out=0"),
        ("ladder", "--evaluate_from=0"),
        ("ladder", "--training_seeds=[0, 4294967295]"),
    ],
)
def test_the_ends_of_a_range_are_taken(verb, flag, tmp_path, capsys):
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(JOBS[verb]), encoding="utf-8")
    assert cli.main([*verb.split(), "--config", str(job), "--dry-run", flag]) == 0, capsys.readouterr().err

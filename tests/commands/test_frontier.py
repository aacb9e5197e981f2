"""`alignkit frontier`: mixtures of two random adapters in two spaces, read back and continued; wrong configs."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from peft import LoraConfig

from alignkit import cli
from alignkit.adapters import lora
from alignkit.commands.frontier import read_frontier

SAMPLING = {"height": 16, "width": 16, "steps": 2}


@pytest.fixture
def members(load, tmp_path):
    """Two adapters a training seed."""
    made = {}
    for name in ("one", "two"):
        made[name] = []
        for seed in (0, 1):
            generator = load("unet")
            lora.inject_config(
                generator.net, LoraConfig(r=2, lora_alpha=2, target_modules=list(generator.lora_targets))
            )
            rng = torch.Generator().manual_seed(10 * seed + len(made))
            with torch.no_grad():
                for key, weight in generator.net.named_parameters():
                    if "lora_" in key:
                        weight.copy_(0.3 * torch.randn(weight.shape, generator=rng))
            folder = tmp_path / f"{name}-{seed}"
            generator.save_adapter(folder)
            made[name].append(str(folder))
    return made


@pytest.fixture
def frontier(work, model_folders, members):
    def write(**changes):
        config = {
            "out": "front",
            "base": {"model": str(model_folders["unet"])},
            "members": members,
            "objectives": ["red", "dark"],
            "grid": 2,
            "prompts": {"file": "prompts.txt", "held_out": 0},
            "rewards": {name: {"reward": f"mine_for_commands:{name.title()}"} for name in ("red", "dark")},
            "evaluate": {"seeds_per_prompt": 1, "sampling": SAMPLING},
        }
        (work / "front.yaml").write_text(yaml.safe_dump(config | changes), encoding="utf-8")
        return ["frontier", "--config", "front.yaml"]

    return write


def test_a_front_in_two_spaces(work, frontier, capsys):
    assert cli.main(frontier()) == 0, capsys.readouterr().err
    points = work / "front" / "points"
    mixture = json.loads((points / "weights" / "0.5-0.5" / "seed-1" / "mixture" / "alignkit.json").read_text())
    assert mixture["weights"] == [0.5, 0.5]
    text = (work / "front" / "frontier.md").read_text(encoding="utf-8").replace("\\", "")
    assert text.count("\n| members | ") == 3  # two points, and their hypervolume
    assert text.count("\n| weights | ") == 4  # one point, its hypervolume, a barrier for each reward
    page = (work / "front" / "frontier.html").read_text(encoding="utf-8")
    assert page.count("<img") == 3 * 4  # prompts x (base, one, the mixture, two)
    again = read_frontier(work / "front")
    assert [point.name for point in again.points] == ["one", "two", "0.5-0.5"]
    assert (again.members, again.objectives) == (["one", "two"], ("red", "dark"))
    files = {file: file.stat().st_mtime_ns for file in points.rglob("*.parquet")}

    others = {"joint": {"model": yaml.safe_load((work / "front.yaml").read_text())["base"]["model"]}}
    assert cli.main(frontier(spaces=["weights", "prediction"], others=others)) == 0, capsys.readouterr().err
    after = {file: file.stat().st_mtime_ns for file in points.rglob("*.parquet")}
    assert files.items() < after.items()
    text = (work / "front" / "frontier.md").read_text(encoding="utf-8").replace("\\", "")
    assert "| prediction | 0.5-0.5 |" in text
    assert "| others | joint |  | +0.000 [+0.000, +0.000] | +0.000" in text
    assert cli.main(frontier(evaluate={"seeds_per_prompt": 2, "sampling": SAMPLING})) == 2
    assert "evaluate.seeds_per_prompt: 1 -> 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ["red"]}, "objectives: ['red']; give at least two rewards"),
        ({"objectives": ["red", "rde"]}, "objectives: no reward 'rde' under `rewards`. Did you mean 'red'"),
        ({"members": {"one": ["a"]}}, "members: one; a frontier mixes at least two"),
        ({"members": {"one": ["a"], "two": ["b", "c"]}}, "members have {'one': 1, 'two': 2} trainings"),
        ({"points": [[0.5, 0.3, 0.2]]}, "points: [0.5, 0.3, 0.2] has 3 weights for 2 members"),
        ({"spaces": ["noise"]}, "spaces"),
        ({"grid": 0}, "grid is 0"),
    ],
)
def test_wrong_configs_are_refused_before_any_work(work, frontier, changes, message, capsys):
    assert cli.main([*frontier(**changes), "--dry-run"]) == 2
    assert message in capsys.readouterr().err
    assert not (work / "front").exists()


def test_the_dry_run_says_what_is_missing(frontier, capsys):
    assert cli.main([*frontier(members={"one": ["nowhere"], "two": ["gone"]}), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "NOT THERE YET: nowhere (members)" in printed
    assert "evaluate 3 points" in printed

"""`alignkit frontier`: mixtures of two random adapters in two spaces, read back and continued; wrong configs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig
from random_adapters import shake

from alignkit import cli
from alignkit.adapters import lora
from alignkit.adapters.mixture import read_mixture
from alignkit.commands.frontier import FrontierJob, read_frontier
from alignkit.commands.ladder_job import LadderJob
from alignkit.commands.specs import GeneratorSpec, build_generator
from alignkit.config import build, read_tree
from alignkit.diffusion.tuned_steps import TunedSteps
from alignkit.evaluation.frontier import MEMBERS, OTHERS
from alignkit.generators.tuned_encoders import save_tuned
from alignkit.records import Sampling

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
        (work / "front.yaml").write_text(yaml.safe_dump(config | changes, sort_keys=False), encoding="utf-8")
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
    others["joint"] = [others["joint"]] * 2  # one for each training seed
    assert cli.main(frontier(spaces=["weights", "prediction"], others=others)) == 0, capsys.readouterr().err
    assert next(one for one in read_frontier(work / "front").points if one.space == OTHERS).result.runs == (0, 1)
    after = {file: file.stat().st_mtime_ns for file in points.rglob("*.parquet")}
    assert files.items() < after.items()
    text = (work / "front" / "frontier.md").read_text(encoding="utf-8").replace("\\", "")
    assert "| prediction | 0.5-0.5 |" in text
    assert "| others | joint |  | +0.000 [+0.000, +0.000] | +0.000" in text
    assert cli.main(frontier(evaluate={"seeds_per_prompt": 2, "sampling": SAMPLING})) == 2
    assert "evaluate.seeds_per_prompt: 1 -> 2" in capsys.readouterr().err


def test_members_alone_act_in_the_window_too(work, frontier, capsys):
    """The end points of a space with a window are evaluated in it; those of all steps are their own space."""
    told = frontier(spaces=["prediction"], window=[0.5, 1.0], points=[[0.5, 0.2]], any_sum=True)
    assert cli.main(told) == 0, capsys.readouterr().err
    again = read_frontier(work / "front")
    names = [(one.space, one.name) for one in again.points]
    expected = [(MEMBERS, "one"), (MEMBERS, "two")]
    expected += [("prediction", name) for name in ("1-0", "0-1", "0.5-0.5", "0.5-0.2")]
    assert names == expected
    record = read_mixture(work / "front/points/prediction/1-0/seed-0/mixture")
    assert (record.space, record.weights, record.window) == ("prediction", (1.0,), TunedSteps(0.5, 1.0))
    assert [one.name for one in again.of("prediction")] == ["1-0", "0-1", "0.5-0.5", "0.5-0.2"]
    whole, windowed = again.points[0].gains(("red",)), again.points[2].gains(("red",))
    assert abs(whole - windowed).max() > 1e-6


def test_whole_text_encoders_as_weights_and_as_embeddings(work, load, frontier, capsys):
    """One training seed of tuned encoders that act in the last half of the steps; half of each is a mixture of both."""
    for seed, name in enumerate(("one", "two")):
        generator = load("unet")
        generator.conditioner.unfreeze()
        shake(generator.conditioner.encoders["text_encoder"], seed, 0.1)
        generator.conditioner.window = TunedSteps(0.5, 1.0)
        save_tuned(generator, work / name)
    told = frontier(members={"one": ["one"], "two": ["two"]}, spaces=["weights", "embedding"], window=[0.5, 1.0])
    assert cli.main(told) == 0, capsys.readouterr().err
    again = read_frontier(work / "front")
    assert [one.name for one in again.of("weights")] == ["1-0", "0-1", "0.5-0.5"]
    assert [one.name for one in again.of("embedding")] == ["1-0", "0-1", "0.5-0.5"]
    gains = {(one.space, one.name): one.gains(("red", "dark")) for one in again.points}
    assert all(abs(gain).max() > 0 for gain in gains.values())
    assert abs(gains["embedding", "1-0"] - gains[MEMBERS, "one"]).max() > 0
    assert gains["weights", "1-0"] == pytest.approx(gains["embedding", "1-0"], abs=1e-6)
    assert cli.main(told) == 0, capsys.readouterr().err  # the soup in its mixture is recognised
    tuned = build_generator("one", GeneratorSpec(model=str(load("unet").pipeline.name_or_path), encoder=work / "one"))
    spec = GeneratorSpec(model=tuned.pipeline.name_or_path, adapter=work / "front/points/embedding/1-0/seed-0/mixture")
    images = [
        one.generate(["a cat"], [1], Sampling(guidance_scale=5.0, **SAMPLING))
        for one in (tuned, build_generator("one", spec))
    ]
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_what_a_killed_process_left_of_a_mixture_is_made_again(work, frontier, capsys):
    left = work / "front" / "points" / "weights" / "0.5-0.5" / "seed-0" / "mixture"
    left.mkdir(parents=True)
    (left / "pytorch_lora_weights.safetensors").write_bytes(b"half")
    assert cli.main(frontier()) == 0, capsys.readouterr().err
    assert read_mixture(left).weights == (0.5, 0.5)


def test_a_mixture_of_other_members_is_not_used(work, frontier, members, capsys):
    """Members in another order, and a member that was trained again."""
    assert cli.main(frontier(points=[[0.75, 0.25]])) == 0, capsys.readouterr().err
    swapped = {"two": members["two"], "one": members["one"]}
    assert cli.main(frontier(points=[[0.75, 0.25]], members=swapped)) == 2
    assert "0.5-0.5/seed-0/mixture' was made with other members than this config" in capsys.readouterr().err
    assert list(read_frontier(work / "front").members) == ["one", "two"]
    shutil.rmtree(members["two"][0])
    shutil.copytree(members["two"][1], members["two"][0])
    assert cli.main(frontier(points=[[0.75, 0.25]])) == 2
    assert "points/members/two/seed-0/mixture' was made with other members" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ["red"]}, "objectives: ['red']; give at least two rewards"),
        ({"objectives": ["red", "rde"]}, "objectives: no reward 'rde' under `rewards`. Did you mean 'red'"),
        ({"members": {"one": ["a"]}}, "members: one; a frontier mixes at least two"),
        ({"members": {"one": ["a"], "two": ["b", "c"]}}, "members have {'one': 1, 'two': 2} trainings"),
        ({"points": [[0.5, 0.3, 0.2]]}, "points: [0.5, 0.3, 0.2] has 3 weights for 2 members"),
        ({"points": [[0.5, 0.25]]}, "the weights [0.5, 0.25] sum to 0.75, not to 1"),
        ({"points": [[0, 0]], "any_sum": True}, "points: [0.0, 0.0] is the base itself"),
        ({"window": [0.5, 0.55], "spaces": ["prediction"]}, "window [0.5, 0.55) holds none of the 2 steps"),
        ({"base": {"model": "m", "adapter": "a"}}, "base: give a diffusers model without adapter and encoder"),
        ({"base": {"model": "m", "encoder": "a"}}, "base: give a diffusers model without adapter and encoder"),
        ({"members": {"one": ["a"], "../../../evil": ["b"]}}, "members: the name '../../../evil' becomes a folder"),
        ({"others": {"a/b": {"model": "m"}}}, "others: the name 'a/b' becomes a folder"),
        ({"spaces": ["noise"]}, "spaces"),
        ({"grid": 0}, "grid is 0"),
        ({"others": {"a": [{"model": "m"}] * 3}}, "others.a has 3 trainings; give one generator, or one for each of"),
        ({"others": {"a": {"modl": "m"}}}, "unknown key 'others.a.modl'"),
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


def test_without_moocore_no_point_is_made(work, frontier, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "moocore", None)
    assert cli.main(frontier()) == 2
    assert "pip install 'alignkit[frontier]'" in capsys.readouterr().err
    assert not (work / "front" / "points").exists()


def test_it_judges_on_prompts_that_no_sweep_has_chosen_by():
    """The tastes share their prompts with the sweep of reward gradients."""
    problems = []
    front = build(FrontierJob, read_tree([], Path("configs/frontier_tastes.yaml"), problems), problems)
    sweep = build(LadderJob, read_tree([], Path("configs/sweep_drf.yaml"), problems), problems)
    assert not problems
    asked, used = ({prompt.id for prompt in side} for side in (front.asked(), sweep.judged(sweep.shares)))
    assert (len(asked), len(used), asked & used) == (120, 120, set())

"""Rewards as verbs build them: towers shared, served ones counted, a composite's members part of its identity."""

from __future__ import annotations

import functools
import inspect
import pickle
import shutil

import pytest
import torch
import yaml
from chat_server import ChatServer, said

from alignkit import cli
from alignkit.commands import specs, stages
from alignkit.commands.doctor import rewards as doctor_rewards
from alignkit.commands.specs import GeneratorSpec, RewardBuilders, RewardSpec, ValidationConfig, build_reward
from alignkit.commands.training_data import TrainingData
from alignkit.errors import ConfigError
from alignkit.evaluation.paired import EvaluateConfig, evaluate
from alignkit.records import Prompt
from alignkit.resolve import resolve
from alignkit.trainers.reward_flow import RewardConfig
from rewards import REWARDS
from rewards.models.media import Preparation

PROMPTS = [Prompt.from_text(text) for text in ("a red circle", "two blue rings")]


def test_clip_rewards_of_one_verb_look_through_one_tower(clip_folder):
    spec = RewardSpec(reward="clip_score", options={"model": str(clip_folder)})
    other = RewardSpec(reward="pick_score", options={"model": str(clip_folder), "processor": str(clip_folder)})
    builders = pickle.loads(pickle.dumps(RewardBuilders({"one": spec, "two": other})))
    one, two = (builder() for builder in builders.values())
    assert one.clip.vision.tower is two.clip.vision.tower
    seen = []
    one.clip.vision.tower.register_forward_hook(lambda *_: seen.append(1))
    media = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    together = [reward(media, PROMPTS).total for reward in (one, two)]
    assert len(seen) == 1
    alone = [RewardBuilders({"x": s})["x"]()(media, PROMPTS).total for s in (spec, other)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_a_trained_reward_of_the_validation_is_loaded_once(clip_folder, monkeypatch, tmp_path):
    spec = RewardSpec(reward="clip_score", options={"model": str(clip_folder)})
    build, names, given = specs.build_reward, [], {}

    def stop(*_, **parts):
        given.update(parts)
        raise ConfigError("stopped before the training")

    monkeypatch.setattr(specs, "build_reward", lambda name, options: names.append(name) or build(name, options))
    monkeypatch.setattr(stages, "load_policy", lambda *_: None)
    monkeypatch.setattr(stages, "trainer_class", lambda _: stop)
    known = {"critic": spec, "other": RewardSpec(reward="saturation")}
    args = RewardConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False)
    data = TrainingData(kind="prompts", prompts=(PROMPTS, []))
    validation = functools.partial(ValidationConfig(rewards=["critic", "other"]).build, PROMPTS, known)
    policy = "policy", GeneratorSpec(model=str(clip_folder))
    with pytest.raises(ConfigError, match="stopped before"):
        stages.fit("any", policy, args, data, validation=validation, rewards={"critic": spec})
    assert sorted(names) == ["clip_score", "saturation"]
    assert given["validation"].rewards["critic"] is given["rewards"]["critic"]


def test_members_are_part_of_a_composites_identity(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    member = {"reward": "clip_score", "options": {"model": str(folder)}}
    spec = RewardSpec(reward="composite", options={"members": {"a": member}, "mode": "sum"})
    before = spec.identity
    assert before == spec.identity
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert before != spec.identity


def test_score_says_what_served_rewards_cost_and_a_second_run_asks_nothing(work, capsys):
    assert cli.main(["generate", "--config", "generate.yaml"]) == 0
    with ChatServer(lambda *_: said("Yes", {"Yes": -0.1, "No": -2.0})) as server:
        options = {"base_url": server.url, "model": "judge", "cache": "replies", "prices": [1.0, 2.0]}
        rewards = {"asked": {"reward": "served_yes_no", "options": options}}
        config = {"candidates": "candidates", "rewards": rewards, "score": {"rewards": ["asked"]}}
        for out, count in (("first", 9), ("second", 9)):
            (work / "score.yaml").write_text(yaml.safe_dump({**config, "out": out}), encoding="utf-8")
            assert cli.main(["score", "--config", "score.yaml"]) == 0, capsys.readouterr().err
            said_so = capsys.readouterr().out
            assert len(server.requests) == count
            assert "asked: 9 requests" in said_so
            assert ("9 cache hits" in said_so) == (out == "second")


@pytest.mark.parametrize("is_member", [False, True])
def test_scoring_with_a_cache_into_the_same_folder_continues(is_member, work, capsys):
    assert cli.main(["generate", "--config", "generate.yaml"]) == 0
    with ChatServer(lambda *_: said("Yes", {"Yes": -0.1, "No": -2.0})) as server:
        options = {"base_url": server.url, "model": "judge", "cache": "replies", "question": "Is it {prompt}?" * 100}
        asked = {"reward": "served_yes_no", "options": options}
        reward = {"reward": "composite", "options": {"members": {"a": asked}}} if is_member else asked
        config = {"candidates": "candidates", "rewards": {"x": reward}, "score": {"rewards": ["x"]}, "out": "scores"}
        (work / "score.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        for _ in range(2):
            assert cli.main(["score", "--config", "score.yaml"]) == 0, capsys.readouterr().err
        assert len(server.requests) == 9


@pytest.mark.parametrize("mode", ["vote", "running"])
def test_stages_refuse_rewards_whose_rows_depend_on_each_other(mode, work, capsys, tmp_path):
    assert cli.main(["generate", "--config", "generate.yaml"]) == 0
    how = {"mode": "vote"} if mode == "vote" else {"normalise": "running"}
    options = {"members": {"a": {"reward": "saturation"}}, **how}
    config = {"candidates": "candidates", "rewards": {"x": {"reward": "composite", "options": options}}}
    config |= {"score": {"rewards": ["x"]}, "out": "scores"}
    (work / "score.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert cli.main(["score", "--config", "score.yaml"]) != 0
    assert f"reward 'x': its {mode}" in capsys.readouterr().err
    spec = RewardSpec(reward="composite", options=options)
    with pytest.raises(ConfigError, match=f"its {mode}"):
        doctor_rewards.check(spec)
    with pytest.raises(ConfigError, match=f"its {mode}"):
        ValidationConfig(rewards=["x"]).build(PROMPTS, {"x": spec}, {})
    with pytest.raises(ConfigError, match=f"its {mode}"):  # before anything is drawn
        evaluate(
            None,
            None,
            PROMPTS,
            EvaluateConfig(),
            tmp_path,
            rewards={"x": RewardBuilders({"x": spec})["x"]()},
            gold=None,
        )


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        ("hps", {}, "needs the option 'model'. To get it: `hf download xswu/HPSv2 .*Its options: model, antialias, "),
        ("preference", {}, "needs the option 'model'. Its options: model, device"),
        (
            "aesthetic",
            {"head": "x", "haed": "y"},
            "has no option 'haed'. Did you mean 'head'.*Its options: model, head",
        ),
        ("saturation", {"zzz": 1}, "has no option 'zzz'. Its options: none"),
        ("vqa_score", {"model": "m", "frames": 8}, "reward 'vqa_score' has no option 'frames'. Its options: model, "),
        ("yes_no", {"model": "m", "modalty": "video"}, "reward 'yes_no' has no option 'modalty'"),
        ("served_yes_no", {"base_url": "http://h", "model": "m", "timout": 1}, "has no option 'timout'.*'timeout'"),
    ],
)
def test_options_are_checked_before_anything_is_built(reward, options, message):
    with pytest.raises(ConfigError, match=message):
        build_reward(reward, options)


def test_every_reward_that_needs_weights_says_how_to_get_them():
    silent = set()
    for name in REWARDS:
        parameters = inspect.signature(resolve(name, REWARDS, kind="reward")).parameters.values()
        if any(p.default is p.empty and p.kind != p.VAR_KEYWORD for p in parameters):
            with pytest.raises(ConfigError) as raised:
                build_reward(name, {})
            silent |= set() if "To get it: " in str(raised.value) else {name}
    assert silent == {"composite", "preference"}  # members, and what `alignkit` has trained itself


class Faulty:
    def __init__(self, size=1):
        self.size = size + None


def test_a_fault_inside_a_reward_is_not_taken_for_a_wrong_option():
    with pytest.raises(TypeError, match="unsupported operand"):
        build_reward(f"{__name__}:Faulty", {})


@pytest.mark.parametrize(("centre", "start"), [("down", 1), ("even", 2)])
def test_the_centre_of_an_odd_excess(centre, start):
    """Of 7 columns 4 stay: torchvision rounds 1.5 to even, transformers down."""
    columns = torch.arange(7.0).expand(1, 3, 4, 7) / 10
    cut = Preparation(4, "crop", mean=(0,) * 3, std=(1,) * 3, centre=centre)(columns)
    assert torch.equal(cut, columns[..., start : start + 4])

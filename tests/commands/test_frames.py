"""A number of frames that a video model would round ends a verb before any weight is there to be loaded."""

from __future__ import annotations

import shutil

import pytest
import yaml

from alignkit import cli

SAMPLING = {"steps": 1, "height": 32, "width": 32}
BAD, GOOD = SAMPLING | {"num_frames": 10}, SAMPLING | {"num_frames": 9}
REWARDS = {"motion": {"reward": "motion"}}
PROMPTS = {"file": "prompts.txt", "held_out": 0.5}
VALIDATION = {"rewards": ["motion"]}


def generating(sampling):
    return {"generate": {"sources": [{"name": "wan", "seeds_per_prompt": 2, "sampling": sampling}]}}


def running(sampling=GOOD, evaluated=GOOD, shown=GOOD, trained=9):
    return {
        "prompts": PROMPTS,
        "rewards": REWARDS,
        "policy": "wan",
        "score": {"rewards": ["motion"]},
        "evaluate": {"sampling": evaluated},
        "validation": VALIDATION | {"sampling": shown},
        "train": {"num_frames": trained},
        **generating(sampling),
    }


ARMS = {"arms": {"a": {}}, "table": "table.md"}
PAIR = {"prompts": PROMPTS, "rewards": REWARDS, "base": {}, "tuned": {"adapter": "adapter"}}
CASES = {
    "generate": ({"prompts": PROMPTS, **generating(BAD)}, "generate.sources, 'wan': num_frames"),
    "run": (running(BAD), "generate.sources, 'wan': num_frames"),
    "run evaluate": (running(evaluated=BAD), "evaluate.sampling.num_frames"),
    "run validation": (running(shown=BAD), "validation.sampling.num_frames"),
    "run train": (running(trained=10), "train.num_frames"),
    "ladder evaluate": (running(evaluated=BAD) | ARMS, "evaluate.sampling.num_frames"),
    "ladder validation": (running(shown=BAD) | ARMS, "validation.sampling.num_frames"),
    "ladder train": (running(trained=10) | ARMS, "arms.a: num_frames"),
    "evaluate": (PAIR | {"evaluate": {"sampling": BAD}}, "evaluate.sampling.num_frames"),
    "train sft": ({"data": "rows", "num_frames": 10}, "num_frames"),
    "train sft validation": (
        {"data": "rows", "prompts": PROMPTS, "rewards": REWARDS, "validation": VALIDATION | {"sampling": BAD}},
        "validation.sampling.num_frames",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_two_nearest_numbers_are_named_before_anything_is_loaded(
    case, model_folders, tmp_path, monkeypatch, capsys
):
    for file in ("model_index.json", "vae/config.json"):  # all that is needed to know
        (tmp_path / "wan" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(model_folders["wan"] / file, tmp_path / "wan" / file)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    config, key = CASES[case]
    config = {"out": "out", **config}
    words = case.split()[: 2 if case.startswith("train") else 1]
    if "base" in config:
        config |= {side: {"model": "wan", **config[side]} for side in ("base", "tuned")}
    else:
        config |= {"model": "wan"} if words[0] == "train" else {"generators": {"wan": {"model": "wan"}}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, "--config", "job.yaml"]) == 2
    assert f"{key} is 10; 'wan' takes 1 + 4 k: 9 or 13" in capsys.readouterr().err


def test_the_doctor_sizes_up_no_frames_that_do_not_exist(capsys):
    assert cli.main(["doctor", "--model", "configs/models/wan21_1_3b", "--num_frames", "48"]) == 2
    assert "num_frames is 48; 'configs/models/wan21_1_3b' takes 1 + 4 k: 45 or 49" in capsys.readouterr().err

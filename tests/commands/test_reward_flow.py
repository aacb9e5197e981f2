"""`alignkit train` and `alignkit run` with methods that train on rewards."""

from __future__ import annotations

import json

import pytest
import yaml

from alignkit import cli

ASKED = """
from alignkit.records import Scores
from mine_for_commands import Red


class Asked(Red):
    name = "asked"

    def __call__(self, media, prompts):
        counts = [len(prompt.metadata.get("questions", ())) for prompt in prompts]
        return Scores(media.new_tensor(counts).float())
"""
WORDS = [
    "--prompts.file=prompts.txt",
    "--prompts.held_out=0",
    "--rewards.red.reward=mine_for_commands:Red",
    "--out=mine",
]
HELD_OUT = ["--reward_weights.red=1", "--rewards.dark.reward=mine_for_commands:Dark", "--validation.rewards=[dark]"]
HELD_OUT += ["--eval_strategy=steps", "--eval_steps=1", "--save_strategy=steps", "--save_steps=1"]
SIZE = ["--height=16", "--width=16", "--sampling_steps=2", "--max_steps=1", "--per_device_train_batch_size=2"]


def test_a_training_on_a_reward(work, model_folders, capsys):
    command = ["train", "reward_flow", f"--model={model_folders['unet']}", *WORDS, *SIZE]
    assert cli.main([*command, "--reward_weights.red=2"]) == 0, capsys.readouterr().err
    assert (work / "mine" / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "reward_weights is missing"),
        (["--reward_weights.rde=1"], "reward_weights: no reward 'rde' under `rewards`. Did you mean 'red'"),
        (["--reward_weights.red=1", "--gradient_steps=last 9"], "'last 9'; the chain has 2 steps"),
        (["--reward_weights.red=1", "--gradient_step=last 1"], "unknown key 'gradient_step'"),
        ([*HELD_OUT, "--guard=drak"], "guard names 'drak', which is none of `validation.rewards`. Did you mean 'dark'"),
        (
            [*HELD_OUT, "--load_best_model_at_end=true", "--metric_for_best_model=eval_reward/dark"],
            "metric_for_best_model is 'eval_reward/dark', but the guard chooses the best checkpoint",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_the_dry_run(work, model_folders, words, message, capsys):
    command = ["train", "reward_flow", f"--model={model_folders['unet']}", *WORDS, *SIZE, *words, "--dry-run"]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


def test_gold_is_not_trained_on(work, capsys):
    """In a run; and a method on questions takes them as an existing dataset."""
    job = {
        "out": "run",
        "method": "drf",
        "prompts": {"file": "prompts.txt"},
        "generators": {"a": {"model": "mine_for_commands:Painter"}},
        "rewards": {"critic": {"reward": "mine_for_commands:Red"}},
        "policy": "a",
        "data": {"path": "questions.jsonl"},
    }
    (work / "run.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    assert cli.main(["run", "--config=run.yaml", "--dry-run"]) == 0
    assert "prompts with questions about them in questions.jsonl" in capsys.readouterr().out
    assert cli.main(["run", "--config=run.yaml", "--gold=critic", "--dry-run"]) == 2
    assert "gold is 'critic', which is also in train.reward_weights" in capsys.readouterr().err


def test_held_out_prompts_of_a_run_on_questions_have_questions_too(work, model_folders, capsys):
    """`asked` counts the questions that it gets; validation and evaluation both score with it."""
    (work / "asked_for_run.py").write_text(ASKED, encoding="utf-8")
    captions = ["a circle", "a ring", "two red rings", "a cross above a ring", "a blue circle", "a square"]
    (work / "captions.txt").write_text("\n".join(captions), encoding="utf-8")
    sampling = {"height": 16, "width": 16, "steps": 2}
    job = {
        "out": "run",
        "method": "drf",
        "prompts": {"file": "captions.txt", "held_out": 0.5},
        "generators": {"a": {"model": str(model_folders["unet"])}},
        "rewards": {"red": {"reward": "mine_for_commands:Red"}, "asked": {"reward": "asked_for_run:Asked"}},
        "policy": "a",
        "validation": {"rewards": ["asked"], "prompts": 1, "sampling": sampling},
        "train": {
            "reward_weights": {"red": 1},
            "height": 16,
            "width": 16,
            "sampling_steps": 2,
            "gradient_steps": "last 1",
            "max_steps": 1,
            "per_device_train_batch_size": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "guard": None,
        },
        "evaluate": {"seeds_per_prompt": 1, "sampling": sampling},
    }
    (work / "run.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    assert cli.main(["run", "--config=run.yaml"]) == 0, capsys.readouterr().err
    evaluation = json.loads((work / "run" / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    (asked,) = (result for result in evaluation["results"] if result["reward"] == "asked")
    assert asked["overall"]["base"]["mean"] >= 2
    log = json.loads((work / "run" / "train" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert max(entry.get("eval_reward/asked", 0) for entry in log) >= 2

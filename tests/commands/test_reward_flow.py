"""`alignkit train` and `alignkit run` with methods that train on rewards."""

from __future__ import annotations

import pytest
import yaml

from alignkit import cli

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

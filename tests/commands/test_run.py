"""`alignkit run` end to end on an untrained model, what may still change when it is given again, and what may not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import yaml

from alignkit import cli
from alignkit.evaluation.results import read_pairs

SAMPLING = {"height": 16, "width": 16, "steps": 2}


@pytest.fixture
def run(work, model_folders):
    """Writes run.yaml for a model folder of the test's own, and gives the command."""
    shutil.copytree(model_folders["unet"], work / "model")
    (work / "many.txt").write_text("\n".join(f"picture {number}" for number in range(12)), encoding="utf-8")

    def write(**changes):
        config = {
            "out": "run",
            "prompts": {"file": "many.txt", "held_out": 0.4},
            "generators": {"policy": {"model": "model"}, "painter": {"model": "mine_for_commands:Painter"}},
            "rewards": {"red": {"reward": "mine_for_commands:Red"}, "dark": {"reward": "mine_for_commands:Dark"}},
            "policy": "policy",
            "gold": "dark",
            "generate": {
                "sources": [{"name": n, "seeds_per_prompt": 1, "sampling": SAMPLING} for n in ("policy", "painter")]
            },
            "score": {"rewards": ["red"]},
            "train": {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.1},
            "evaluate": {"seeds_per_prompt": 1, "sampling": SAMPLING},
        } | changes
        (work / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return ["run", "--config", "run.yaml"]

    return write


def test_the_whole_job_and_giving_it_again(work, run, capsys):
    assert cli.main(run(train={"max_steps": 1, "eval_strategy": "steps"})) == 2
    assert "nothing is held out" in capsys.readouterr().err
    assert not (work / "run").exists()

    # Killed while training: settings of what is not made yet may change, the others may not.
    assert cli.main(run(train={"max_steps": 1, "lora_targets": ["nowhere"]})) == 2
    assert "none of the LoRA targets" in capsys.readouterr().err
    wrong = {"seeds_per_prompt": 1, "sampling": {**SAMPLING, "extra": {"eat": 0.5}}}
    assert cli.main(run(evaluate=wrong)) == 2
    assert "'eat' is no keyword of a StableDiffusionPipeline" in capsys.readouterr().err
    assert not any((work / "run" / "train").glob("checkpoint-*"))
    candidates = {path: path.stat().st_mtime_ns for path in (work / "run" / "candidates").rglob("*.parquet")}
    assert cli.main(run(score={"rewards": ["red"], "batch_size": 3})) == 2
    assert "score.batch_size" in capsys.readouterr().err
    assert cli.main(run()) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "--train.learning_rate 0.03" in said
    assert candidates == {path: path.stat().st_mtime_ns for path in candidates}
    result = work / "run" / "train" / "adapter"
    assert "paired gain" in (result / "README.md").read_text(encoding="utf-8")
    assert (work / "run" / "report.html").stat().st_size > 10_000

    # The command that `run` names next, and a report with another title.
    assert cli.main(["run", "--config", "run/config.yaml", "--report.title", "Again"]) == 0
    assert "Again" in (work / "run" / "report.html").read_text(encoding="utf-8")
    assert cli.main(run(train={"max_steps": 2})) == 2
    assert "train.max_steps: 1 -> 2" in capsys.readouterr().err


def test_other_weights_under_the_same_name_are_seen(work, run, model_folders, capsys):
    assert cli.main(run()) == 0, capsys.readouterr().err
    evaluate = {
        "base": {"model": "model"},
        "tuned": {"adapter": "run/train/adapter"},  # its model is the base's
        "prompts": {"file": "many.txt", "held_out": 0.4},
        "rewards": {"red": {"reward": "mine_for_commands:Red"}},
        "evaluate": {"seeds_per_prompt": 1, "sampling": SAMPLING},
        "out": "evaluated",
    }
    (work / "evaluate.yaml").write_text(yaml.safe_dump(evaluate), encoding="utf-8")
    assert cli.main(["evaluate", "--config", "evaluate.yaml"]) == 0, capsys.readouterr().err
    shutil.rmtree(work / "model" / "unet")
    shutil.copytree(model_folders["unet"] / "unet", work / "model" / "unet")
    weights = next((work / "model" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    for again in (run(), ["evaluate", "--config", "evaluate.yaml"]):
        assert cli.main(again) == 2
        assert re.search(r'inputs\.\S+: "content [0-9a-f]{16}.*" -> "content ', capsys.readouterr().err)


def test_a_saved_training_config_can_be_given_again(work, run, capsys):
    assert cli.main(run()) == 0, capsys.readouterr().err
    options = ["--data=run/ranked", "--held_out=0", "--max_steps=1", "--per_device_train_batch_size=2"]
    assert cli.main(["train", "rankdpo", "--model=model", "--out=mine", "--save_merged=true", *options]) == 0
    assert (work / "mine" / "merged" / "model_index.json").is_file()
    assert cli.main(["train", "rankdpo", "--config", "mine/config.yaml", "--dry-run"]) == 0, capsys.readouterr().err


def test_a_run_on_existing_data_leaves_out_the_prompts_that_it_evaluates(work, run, capsys):
    assert cli.main(run()) == 0, capsys.readouterr().err
    trained = datasets.load_dataset(str(work / "run" / "ranked"), split="train")["prompt"]
    run(out="second", data={"path": "run/ranked"}, prompts={"file": "many.txt", "held_out": 0.75})
    config = yaml.safe_load((work / "run.yaml").read_text(encoding="utf-8"))
    del config["generate"], config["score"]
    (work / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["run", "--config", "run.yaml"]) == 0, capsys.readouterr().err
    evaluated = {prompt.text for prompt in read_pairs(work / "second" / "evaluation").prompts}
    shared = len(evaluated & set(trained))
    assert 0 < shared < len(trained)
    assert f"{shared} training rows left out" in capsys.readouterr().out
    assert not (work / "second" / "candidates").exists()
    assert (work / "second" / "report.html").is_file()


def test_the_program_finds_modules_of_the_working_folder(work, monkeypatch):
    program = Path(sys.executable).with_name("alignkit")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    words = [program, "generate", "--config", "generate.yaml"]
    done = subprocess.run(words, check=False, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

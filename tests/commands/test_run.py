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
from full_disk import full_disk

from alignkit import cli
from alignkit.commands.specs import load_policy
from alignkit.evaluation.results import read_pairs
from data_pipelines import exporters

IMAGE = datasets.Image()
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


@pytest.fixture
def captioned(work, ranked_rows):
    """A config for `run`, and flags for `train`, of a training on captioned images that writes no checkpoint."""
    rows = [{"text": row["prompt"], "image": row["images"][0]} for row in ranked_rows(4)]
    features = datasets.Features({"text": datasets.Value("string"), "image": IMAGE})
    datasets.Dataset.from_list(rows, features=features).to_parquet(work / "images.parquet")
    train = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.1, "save_strategy": "no"}

    def words(verb, run):
        if verb == "train":
            flags = [f"--{key}={value}" for key, value in train.items()]
            return ["train", "sft", "--model=model", "--data=images.parquet", "--held_out=0", "--out=run", *flags]
        command = run(method="sft", data={"path": "images.parquet"}, train=train)
        config = yaml.safe_load((work / "run.yaml").read_text(encoding="utf-8"))
        del config["generate"], config["score"]
        (work / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return command

    return words


@pytest.mark.parametrize("verb", ["run", "train"])
def test_a_folder_deleted_during_the_training_is_an_error(work, run, captioned, monkeypatch, capsys, verb):
    """Without checkpoints too, where the training itself writes nothing; the same command then does it all."""
    words = captioned(verb, run)

    def load(*given):
        shutil.rmtree(work / "run")
        return load_policy(*given)

    with monkeypatch.context() as patch:
        patch.setattr("alignkit.commands.stages.load_policy", load)
        assert cli.main(words) == 2
    assert re.search(r"alignkit: 'run\S*' was deleted or moved during the training", capsys.readouterr().err)
    assert not list(work.glob("run/**/*.safetensors"))
    assert cli.main(words) == 0, capsys.readouterr().err
    assert list(work.glob("run/**/adapter/*.safetensors"))
    assert list(work.glob("run/config.yaml"))


def test_a_folder_deleted_during_an_export_is_an_error(work, ranked_rows, monkeypatch, capsys):
    rows = [{"prompt": r["prompt"], "chosen": r["images"][0], "rejected": r["images"][1]} for r in ranked_rows(2)]
    features = datasets.Features({"prompt": datasets.Value("string"), **dict.fromkeys(("chosen", "rejected"), IMAGE)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(work / "pairs.parquet")
    make_table = exporters._table

    def table(*given):
        shutil.rmtree(work / "out")
        return make_table(*given)

    words = ["export", "--data=pairs.parquet", "--out=out/pairs.parquet"]
    with monkeypatch.context() as patch:
        patch.setattr(exporters, "_table", table)
        assert cli.main(words) == 2
    assert re.search(r"alignkit: could not write 'out/pairs.parquet': .*No such file", capsys.readouterr().err)
    assert not (work / "out").exists()
    assert cli.main(words) == 0
    assert (work / "out" / "pairs.parquet").is_file()


def test_a_training_that_found_no_room_for_its_result_goes_on(work, run, captioned, capsys):
    """What is exported is taken for the result only when all of it is there."""
    words = captioned("train", run)
    for step in ("write", "close"):
        with full_disk(Path("run/adapter"), step):
            assert cli.main(words) == 2
        assert re.search(r"alignkit: could not write 'run/adapter.*make room on the disk", capsys.readouterr().err)
        assert not list(work.glob("run/adapter/*.safetensors"))
    assert cli.main(words) == 0, capsys.readouterr().err
    assert list(work.glob("run/adapter/*.safetensors"))


def test_the_program_finds_modules_of_the_working_folder(work, monkeypatch):
    program = Path(sys.executable).with_name("alignkit")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    words = [program, "generate", "--config", "generate.yaml"]
    done = subprocess.run(words, check=False, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

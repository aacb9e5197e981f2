"""The verbs compose the stages: a generator and rewards named in YAML go from prompts to a report page."""

from __future__ import annotations

import json

import pytest
import yaml
from clips import encoded, frames
from PIL import Image

from alignkit import cli


def test_from_prompts_to_a_page(work, capsys):
    for verb in ("generate", "score"):
        assert cli.main([verb, "--config", f"{verb}.yaml"]) == 0, capsys.readouterr().err
    assert cli.main(["rank", "--candidates=candidates", "--scores=scores", "--out=ranked", "--rank.held_out=0"]) == 0
    assert cli.main(["report", "--data", "ranked", "--out", "report.html"]) == 0
    assert json.loads((work / "ranked" / "statistics.json").read_text(encoding="utf-8"))["counts"]["train"] == 3
    assert "<!doctype html>" in (work / "report.html").read_text(encoding="utf-8")
    assert yaml.safe_load((work / "scores" / "config.yaml").read_text(encoding="utf-8"))["score"]["rewards"] == ["red"]


def test_another_model_under_the_same_name_is_refused(work, capsys):
    assert cli.main(["generate", "--config", "generate.yaml"]) == 0
    again = ["generate", "--config", "generate.yaml", "--generators.painter.model", "mine_for_commands:Other"]
    assert cli.main(again) == 2
    assert '"mine_for_commands:Painter" -> "mine_for_commands:Other"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["generate", "--config", "generate.yaml", "--generate.sources=[{name: panter, seeds_per_prompt: 2}]"],
            "'painter'?",
        ),
        (["score", "--config", "score.yaml", "--rewards.red.reward", "clip_scor"], "Did you mean 'clip_score'?"),
        (["score", "--config", "score.yaml", "--score.rewards", "[rd]"], "no reward 'rd' under `rewards`"),
        (["generate", "--config", "generate.yaml", "--generate.sources=[{name: painter}]"], "cannot be ranked"),
        (["generate", "--config", "generate.yaml", "--prompts.file", "absent.txt"], "absent.txt"),
    ],
)
def test_mistakes_in_names_are_told_before_any_work(work, words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (work / "candidates").exists()


def test_training_pushes_its_result_with_the_card(work, model_folders, uploads):
    config = yaml.safe_load((work / "generate.yaml").read_text(encoding="utf-8"))
    config["generate"]["sources"][0]["sampling"] = {"height": 16, "width": 16}
    (work / "generate.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for verb in ("generate", "score"):
        assert cli.main([verb, "--config", f"{verb}.yaml"]) == 0
    assert cli.main(["rank", "--candidates=candidates", "--scores=scores", "--out=ranked", "--rank.held_out=0"]) == 0
    options = ["--max_steps=1", "--per_device_train_batch_size=2", "--push_to_hub=true", "--out=mine"]
    model = f"--model={model_folders['flow']}"
    assert cli.main(["train", "rankdpo", model, "--data=ranked", "--held_out=0", *options]) == 0
    assert uploads[-1]["repo_id"] == "someone/mine"
    assert "flow aligned with RankDPO" in (work / uploads[-1]["folder_path"] / "README.md").read_text(encoding="utf-8")


def test_a_folder_of_captioned_clips_trains_a_video_model(work, model_folders, capsys):
    """The strip of frames and the export are there; an evaluation refuses a reward of images."""
    (work / "clips").mkdir()
    names = [f"{number}.mkv" for number in range(3)]
    for number, name in enumerate(names):
        (work / "clips" / name).write_bytes(encoded(frames(5, 16, 16, number)))
    lines = [json.dumps({"file_name": name, "text": f"a clip of {name}"}) for name in names]
    (work / "clips" / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    sampling = {"steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "num_frames": 5}
    config = {
        "prompts": {"file": "prompts.txt", "held_out": 0.6},
        "rewards": {"red": {"reward": "mine_for_commands:RedVideo"}},
        "validation": {"rewards": ["red"], "prompts": 1, "sampling": sampling},
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    (work / "clips.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    model = f"--model={model_folders['wan']}"
    options = ["--max_steps=1", "--per_device_train_batch_size=1", "--held_out=0", "--out=mine", "--bf16=true"]
    assert cli.main(["train", "sft", "--config=clips.yaml", model, "--data=clips", *options]) == 0
    (strip,) = (work / "mine" / "validation").glob("*.png")
    with Image.open(strip) as picture:
        assert picture.size == (5 * 16, 16)
    assert (work / "mine" / "adapter" / "pytorch_lora_weights.safetensors").is_file()

    told = {"steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16}
    told = {
        "base": {"model": str(model_folders["wan"])},
        "tuned": {"adapter": "mine/adapter"},
        "evaluate": {"sampling": told},
    }
    told |= {"prompts": config["prompts"], "out": "judged"}
    told |= {"rewards": {"red": {"reward": "mine_for_commands:Red"}}}
    (work / "evaluate.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    capsys.readouterr()
    assert cli.main(["evaluate", "--config=evaluate.yaml"]) == 2
    assert "reward 'red' scores images, but here are videos" in capsys.readouterr().err


def test_a_failed_first_attempt_may_be_corrected_and_a_moved_folder_continued(work, capsys):
    """Also with other values of what has not been used yet, and with absolute instead of relative paths."""
    assert cli.main(["generate", "--config", "generate.yaml"]) == 0
    wrong = yaml.safe_load((work / "score.yaml").read_text(encoding="utf-8"))
    wrong["rewards"]["red"]["options"] = {"typo": 1}
    wrong["score"]["batch_size"] = 2
    (work / "wrong.yaml").write_text(yaml.safe_dump(wrong), encoding="utf-8")
    assert cli.main(["score", "--config", "wrong.yaml"]) == 2
    assert "has no option 'typo'" in capsys.readouterr().err
    assert cli.main(["score", "--config", "score.yaml"]) == 0, capsys.readouterr().err
    (work / "scores").rename(work / "moved")
    again = ["--out", str(work / "moved"), "--candidates", str(work / "candidates")]
    assert cli.main(["score", "--config", "score.yaml", *again]) == 0, capsys.readouterr().err
    assert cli.main(["score", "--config", "wrong.yaml", *again]) == 2
    assert "config.batch_size: 32 -> 2" in capsys.readouterr().err


def test_generate_goes_on_without_images_that_a_checker_replaced(work, capsys):
    with (work / "mine_for_commands.py").open("a", encoding="utf-8") as module:
        module.write("""

from alignkit.errors import FlaggedError


class Checked(Painter):
    def generate(self, prompts, seeds, sampling):
        flags = ["dog" in prompt for prompt in prompts]
        raise FlaggedError("unsafe", pixels=super().generate(prompts, seeds, sampling), flags=flags)
""")
    given = ["--config", "generate.yaml", "--generators", "{painter: {model: 'mine_for_commands:Checked'}}"]
    assert cli.main(["generate", *given]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "2 prompts, 6 images in candidates" in text
    assert "3 images were flagged as unsafe by a safety checker; their prompts (1) are left out: candidates" in text
    assert len((work / "candidates" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()) == 3

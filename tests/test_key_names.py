"""Names that users know from TRL and diffusers stand for alignkit's keys; old names are refused with the new one."""

from __future__ import annotations

from dataclasses import fields

import pytest
import yaml
from trl import ModelConfig

from alignkit import cli
from alignkit.key_names import ALIASES, REFUSED, RENAMED

TRAIN = ["train", "rankdpo", "--data", "rows", "--out", "made", "--dry-run"]
SAMPLING = {"steps": 7, "height": 8, "width": 8}


def plan(*words: str, capsys) -> dict:
    assert cli.main(list(words)) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_every_key_of_trls_model_config_is_known():
    """Ours under the same name, an alias, or refused with what to do."""
    same = {"dtype", "lora_alpha", "lora_dropout"}
    assert {field.name for field in fields(ModelConfig)} <= same | set(ALIASES) | set(REFUSED)


def test_a_config_of_trl_means_the_same_as_ours(capsys):
    theirs = ["--model_name_or_path", "m/n", "--lora_r", "4", "--lora_target_modules", "to_q", "to_k", "--use_peft"]
    theirs += ["--load_in_4bit", "--load_in_8bit", "false", "--lora_alpha", "8", "--lora_dropout", "0.05"]
    ours = ["--model=m/n", "--lora_rank=4", "--lora_targets=[to_q, to_k]", "--quantize=nf4", "--lora_alpha=8"]
    assert plan(*TRAIN, *theirs, capsys=capsys) == plan(*TRAIN, *ours, "--lora_dropout=0.05", capsys=capsys)


def test_no_peft_means_full_fine_tuning(capsys):
    shown = plan(*TRAIN, "--model=m/n", "--use_peft", "false", capsys=capsys)
    assert shown["train"]["full_finetune"] is True
    assert shown["quantize"] is None


def test_names_of_diffusers_in_every_section(tmp_path, capsys):
    source = {"name": "a", "num_images_per_prompt": 3}
    theirs = {"num_inference_steps": 7, "frame_rate": 12, "height": 8, "width": 8}
    config = {"prompts": {"file": "p.txt"}, "generators": {"a": {"pretrained_model_name_or_path": "m/n"}}}
    config |= {"output_dir": "made", "generate": {"sources": [{**source, "sampling": theirs}]}}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    shown = plan("generate", "--config", str(path), "--dry-run", capsys=capsys)
    (made,) = shown["generate"]["sources"]
    assert (made["seeds_per_prompt"], made["sampling"]["steps"], made["sampling"]["fps"]) == (3, 7, 12)
    assert (shown["out"], shown["generators"]["a"]["model"]) == ("made", "m/n")


def test_output_dir_of_a_run_and_of_a_training(tmp_path, capsys):
    words = ["run", "--config", "configs/demo.yaml", "--out", "elsewhere", "--dry-run"]
    assert cli.main(words) == 0
    assert "report: elsewhere/report.html" in capsys.readouterr().out
    path = tmp_path / "saved.yaml"
    path.write_text("model: m/n\ndata: rows\ntrain: {output_dir: old, beta: 7}\n", encoding="utf-8")
    saved = ["train", "rankdpo", "--config", str(path), "--dry-run"]
    assert plan(*saved, capsys=capsys)["train"]["output_dir"] == "old"
    shown = plan(*saved, "--out", "new", capsys=capsys)["train"]
    assert (shown["output_dir"], shown["beta"]) == ("new", 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*TRAIN, "--model=m/n", "--model_name_or_path=x/y"],
            "'model_name_or_path' is the same key as 'model'; keep one",
        ),
        ([*TRAIN, "--model=m/n", "--output_dir=x"], "'output_dir' is the same key as 'out'; keep one"),
        ([*TRAIN, "--model=m/n", "--load_in_4bit=maybe"], "load_in_4bit must be true or false, not 'maybe'"),
        ([*TRAIN, "--model=m/n", "--use_dora"], "unknown key 'use_dora'. Pass a LoraConfig of peft to the trainer"),
        ([*TRAIN[:4], "--model=m/n", "--dry-run"], "key 'out' is missing"),
        (["doctor", "--frames=9"], "unknown key 'frames'. It is called 'num_frames' here; rename it."),
        (["ladder", "--config=configs/ladder.yaml", "--seeds=[1]"], "It is called 'training_seeds'"),
        (["run", "--config=configs/demo.yaml", "--evaluate.run_seed=3"], "It is called 'seed'"),
        (
            ["run", "--config=configs/demo.yaml", "--generate.sources=[{name: unet, seeds: 2}]"],
            "'seeds_per_prompt' here; rename",
        ),
        ([*TRAIN, "--model=m/n", "--batch_size=3"], "It is called 'per_device_train_batch_size' here; rename it."),
        ([*TRAIN, "--model=m/n", "--zzz=3"], "unknown key 'zzz'. `--help` lists the keys."),
        (["run", "--config=configs/demo.yaml", "--train.output_dir=x"], "remove train.output_dir"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_no_name_is_both_accepted_and_refused():
    assert not set(ALIASES) & {*REFUSED, *RENAMED}
    assert not set(ALIASES.values()) & {*ALIASES, *REFUSED, *RENAMED}

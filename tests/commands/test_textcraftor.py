"""Tuned text encoders in the verbs: trained, evaluated against their base, named in configs, sized up."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from random_adapters import shake

from alignkit import cli
from alignkit.commands.doctor import memory
from alignkit.commands.doctor.main import DoctorJob, planned_model, setup_of
from alignkit.commands.specs import GeneratorSpec, build_generator, load_policy, tuned_spec
from alignkit.diffusion.tuned_steps import TunedSteps
from alignkit.generators.tuned_encoders import save_tuned
from alignkit.records import Sampling

SIZE = ["--height=16", "--width=16", "--sampling_steps=5", "--guidance_scale=2", "--max_steps=1", "--bf16=false"]
TRAIN = ["train", "textcraftor", "--rewards.red.reward=mine_for_commands:Red", "--reward_weights.red=1", "--out=mine"]
TRAIN += ["--per_device_train_batch_size=2", "--guard=null", "--learning_rate=1e-2", *SIZE]
PROMPTS = ["--prompts.file=prompts.txt", "--prompts.held_out=0"]


def test_trained_and_evaluated_with_its_window(work, model_folders, capsys):
    """The base side is the same model without its tuned encoders."""
    model = str(model_folders["unet"])
    assert cli.main([*TRAIN, f"--model={model}", *PROMPTS]) == 0, capsys.readouterr().err
    result = work / "mine" / "encoder"
    assert f"--tuned.encoder {result.relative_to(work)}" in capsys.readouterr().out
    assert json.loads((result / "alignkit.json").read_text())["window"] == [0.4, 1.0]
    assert (result / "text_encoder" / "config.json").is_file()
    words = ["evaluate", f"--base.model={model}", f"--tuned.encoder={result}", *PROMPTS, "--out=evaluation"]
    words += ["--rewards.red.reward=mine_for_commands:Red", "--evaluate.sampling.steps=5"]
    words += ["--evaluate.sampling.height=16", "--evaluate.sampling.width=16", "--evaluate.sampling.guidance_scale=2"]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert (work / "evaluation" / "evaluation.json").is_file()

    base = GeneratorSpec(model=model)
    tuned = tuned_spec(base, result)
    assert (tuned.encoder, tuned.adapter, tuned.model) == (result, None, model)
    assert tuned.identity != base.identity
    assert GeneratorSpec(model=model, encoder=Path("gone")).absent == ["gone"]
    sampling = Sampling(steps=5, guidance_scale=2.0, height=16, width=16)
    images = [one.generate(["a cat"], [1], sampling) for one in (load_policy("a", tuned), build_generator("a", base))]
    assert not torch.equal(*images)
    mixed = build_generator("a", replace(base, adapter=result))  # the record is that of a mixture
    torch.testing.assert_close(mixed.generate(["a cat"], [1], sampling), images[0], rtol=1e-4, atol=1e-5)


def test_candidates_are_drawn_with_tuned_encoders(work, model_folders, load, capsys):
    """`encoder` in `generate`: beside the base, with the same seeds, candidates differ, in the window's steps alone."""
    generator, model = load("unet"), str(model_folders["unet"])
    generator.conditioner.unfreeze()
    shake(generator.conditioner.encoders["text_encoder"], 1, 0.1)
    generator.conditioner.window = TunedSteps(0.5, 1.0)
    save_tuned(generator, work / "encoder")
    sampling = {"height": 16, "width": 16, "steps": 2, "guidance_scale": 2.0}
    sources = [{"name": name, "seeds_per_prompt": 1, "sampling": sampling} for name in ("plain", "tuned")]
    config = {
        "out": "drawn",
        "prompts": {"file": "prompts.txt", "count": 1},
        "generators": {"plain": {"model": model}, "tuned": {"model": model, "encoder": "encoder"}},
        "generate": {"sources": sources},
    }
    (work / "drawn.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert cli.main(["generate", "--config", "drawn.yaml"]) == 0, capsys.readouterr().err
    (row,) = pq.read_table(next((work / "drawn").rglob("*.parquet"))).to_pylist()
    told = Sampling(height=16, width=16, steps=2, guidance_scale=2.0)
    for number, source in enumerate((load("unet"), load("unet", encoder=work / "encoder"))):
        expected = source.generate([row["prompt"]], [row["seeds"][number]], told)[0]
        pixels = np.array(Image.open(io.BytesIO(row["images"][number]["bytes"])))
        found = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        assert (found - expected).abs().max() <= 1 / 255


def test_a_denoiser_on_tuned_encoders(work, model_folders, load, capsys):
    """Text and denoiser: the card names both, and what the base of its scores is."""
    generator = load("unet")
    generator.conditioner.unfreeze()
    shake(generator.conditioner.encoders["text_encoder"], 1, 0.1)
    generator.conditioner.window = TunedSteps(0.5, 1.0)
    save_tuned(generator, work / "encoder")
    sampling = {"height": 16, "width": 16, "steps": 2}
    job = {
        "out": "run",
        "method": "reward_flow",
        "prompts": {"file": "prompts.txt", "held_out": 0.5},
        "generators": {"a": {"model": str(model_folders["unet"]), "encoder": "encoder"}},
        "rewards": {"red": {"reward": "mine_for_commands:Red"}},
        "policy": "a",
        "train": {"reward_weights": {"red": 1}, "sampling_steps": 2, "max_steps": 1, "bf16": False, "guard": None},
        "evaluate": {"seeds_per_prompt": 1, "sampling": sampling},
    }
    job["train"] |= {"height": 16, "width": 16, "gradient_steps": "last 1", "per_device_train_batch_size": 1}
    (work / "run.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    assert cli.main(["run", "--config=run.yaml"]) == 0, capsys.readouterr().err
    card = (work / "run" / "train" / "adapter" / "README.md").read_text(encoding="utf-8")
    model = model_folders["unet"]
    assert f'load_generator("{model}", encoder="encoder", adapter="path/to/this/folder")' in card
    assert "The base is the model with the text encoders in `encoder`." in card
    assert "load_lora_weights" not in card


@pytest.mark.parametrize("section", ["evaluate", "validation"])
def test_a_window_without_a_step_is_said_before_the_training(work, model_folders, section, capsys):
    """The last of 25 steps is none of 2."""
    few, many = ({"height": 16, "width": 16, "steps": steps} for steps in (2, 25))
    job = {
        "out": "run",
        "method": "textcraftor",
        "prompts": {"file": "prompts.txt", "held_out": 0.5},
        "generators": {"a": {"model": str(model_folders["unet"])}},
        "rewards": {name: {"reward": f"mine_for_commands:{name.title()}"} for name in ("red", "dark")},
        "policy": "a",
        "validation": {"rewards": ["dark"], "prompts": 1, "sampling": few if section == "validation" else many},
        "train": {"reward_weights": {"red": 1}, "gradient_steps": "last 1", "tuned_steps": "last 1", "guard": None},
        "evaluate": {"sampling": few if section == "evaluate" else many},
    }
    job["train"] |= {"height": 16, "width": 16, "max_steps": 1, "bf16": False}
    (work / "run.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    assert cli.main(["run", "--config=run.yaml"]) == 2
    assert "window [0.96, 1) holds none of the 2 steps" in capsys.readouterr().err
    assert not (work / "run" / "train" / "encoder").exists()


def test_the_direct_variant_takes_a_dataset(work, model_folders, capsys):
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 80).convert("RGB").save(buffer, "PNG")
    rows = {"prompt": ["a cat", "a dog"], "image": [{"bytes": buffer.getvalue(), "path": None}] * 2}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    data.to_parquet(work / "rows.parquet")
    words = [*TRAIN, f"--model={model_folders['unet']}", "--variant=direct", "--data=rows.parquet", "--held_out=0"]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert (work / "mine" / "encoder" / "text_encoder").is_dir()


def test_what_does_not_fit_is_said_in_the_dry_run(work, model_folders, capsys):
    words = [*TRAIN, f"--model={model_folders['unet']}", *PROMPTS, "--dry-run"]
    assert cli.main([*words, "--tuned_steps=last 0"]) == 2
    assert "with at least one step" in capsys.readouterr().err
    assert cli.main([*words, "--encoders=[text_encoder]", "--full_finetune=false"]) == 0
    assert "train a LoRA of rank 16 of text_encoder of" in capsys.readouterr().out


def test_the_doctor_counts_the_encoders():
    """All weights of CLIP in float32 with AdamW and the frozen copy; a LoRA on it is next to nothing."""
    job = DoctorJob(method="textcraftor", model=Path("configs/models/sd15"), full_finetune=True, dtype="float16")
    model = planned_model(job.model)
    held = memory.weights(model, setup_of(job, model))
    clip, net = model.stored("text_encoder"), model.stored("unet")
    assert (held["trained weights, gradients, AdamW"], held["frozen reference copy"]) == (16 * clip, 4 * clip)
    assert held["denoiser weights"] == 2 * net
    less = memory.weights(model, setup_of(replace(job, full_finetune=False), model))
    assert (less["trained weights, gradients, AdamW"], less["frozen reference copy"]) == (0, 0)
    assert memory.run_of(setup_of(job, model)).dtype == "float16"

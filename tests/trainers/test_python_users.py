"""What a user of diffusers and PEFT has in hand is enough: a path, a loaded pipeline, a LoraConfig."""

from __future__ import annotations

import diffusers
import pytest
import torch
from peft import LoraConfig

import alignkit
from alignkit.errors import AdapterError, ConfigError, UnknownNameError
from alignkit.generators.families.stable_diffusion import StableDiffusion
from alignkit.trainers.rankdpo import RankDPOConfig, RankDPOTrainer


@pytest.fixture
def args(tmp_path):
    def build(**changes):
        options = {"max_steps": 2, "learning_rate": 1e-2, "beta": 100.0, "use_cpu": True, "bf16": False}
        options |= {"disable_tqdm": True, "save_strategy": "no", "output_dir": str(tmp_path / "run"), "lora_rank": 2}
        return RankDPOConfig(**options | changes)

    return build


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_paths_pipelines_and_generators_train_alike(args, model_folders, ranked_rows):
    folder = model_folders["unet"]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    generator = alignkit.wrap(diffusers.StableDiffusionPipeline.from_pretrained(folder))
    models = [str(folder), folder, pipeline, generator]
    found = [losses(RankDPOTrainer(model, args(), ranked_rows(4))) for model in models]
    # Loaded from a folder, convolutions run in another memory layout, which rounds otherwise.
    assert all(other == pytest.approx(found[0], rel=1e-4) for other in found[1:])
    assert found[2] == found[3]


def test_a_wrapped_pipeline_is_the_users_own(model_folders):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model_folders["unet"])
    generator = alignkit.wrap(pipeline, name="mine")
    assert type(generator) is StableDiffusion
    assert generator.pipeline is pipeline
    assert generator.name == "mine"
    assert alignkit.wrap(pipeline).name == model_folders["unet"].name
    with pytest.raises(UnknownNameError, match="is a Linear, a pipeline class without a family"):
        alignkit.wrap(torch.nn.Linear(1, 1))


def test_a_lora_config_is_used_as_it_is(args, model_folders, ranked_rows, tmp_path):
    """Rank, alpha, targets, dropout and start; the config's keys lora_* have no effect, and the card names it."""
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["to_q", "to_v"], lora_dropout=0.25)
    trainer = RankDPOTrainer(model_folders["unet"], args(lora_targets=["to_k"]), ranked_rows(4), peft_config=config)
    used = trainer.generator.net.peft_config["default"]
    assert (used.r, used.lora_alpha, used.lora_dropout, used.init_lora_weights) == (3, 12, 0.25, True)
    trained = trainer._trainable()
    assert {name.split(".lora_")[0].split(".")[-1] for name in trained} == {"to_q", "to_v"}
    assert {min(value.shape) for value in trained.values()} == {3}
    trainer.train()
    trainer.export(tmp_path / "out")
    loaded = alignkit.load_generator(model_folders["unet"], adapter=tmp_path / "out", device="cpu")
    again = loaded.net.peft_config["default"]
    assert (again.r, again.lora_alpha) == (3, 12)
    assert "lora_alpha: 12" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_share_that_is_trained_is_printed_once(args, load, ranked_rows, capsys):
    net = load("unet").net
    layers = [part for name, part in net.named_modules() if name.endswith((".to_q", ".to_v"))]
    share = sum(part.weight.numel() for part in layers) / sum(weight.numel() for weight in net.parameters())
    trainer = RankDPOTrainer(load("unet"), args(lora_targets=["to_q", "to_v"]), ranked_rows(2))
    trainer.train()
    printed = capsys.readouterr().err
    assert printed.count("LoRA 'default' on unet: ") == 1
    assert f": {len(layers)} of " in printed
    assert f" {share:.1%} of {sum(weight.numel() for weight in net.parameters()):,} parameters; it adds " in printed
    RankDPOTrainer(load("unet"), args(full_finetune=True), ranked_rows(2))
    assert "parameters of unet are trained" in capsys.readouterr().err


def test_without_targets_it_goes_on_the_familys_attention(args, model_folders, ranked_rows):
    config = LoraConfig(r=2)
    configured = RankDPOTrainer(model_folders["unet"], args(), ranked_rows(2), peft_config=config)
    plain = RankDPOTrainer(model_folders["unet"], args(), ranked_rows(2))
    assert configured._trainable().keys() == plain._trainable().keys()
    assert config.target_modules is None  # the user's own object


@pytest.mark.parametrize(
    ("options", "full", "message"),
    [
        ({}, True, "peft_config and full_finetune exclude each other"),
        ({"use_dora": True}, False, "more than a plain LoRA"),
        ({"target_modules": ["nowhere"]}, False, "none of the LoRA targets"),
    ],
)
def test_configs_that_cannot_be_used(args, load, ranked_rows, options, full, message):
    with pytest.raises((ConfigError, AdapterError), match=message):
        RankDPOTrainer(load("unet"), args(full_finetune=full), ranked_rows(2), peft_config=LoraConfig(r=2, **options))


def test_an_adapter_needs_no_lora_config(args, load, ranked_rows):
    generator = load("unet")
    generator.add_lora(2, None, None, 0.0)
    with pytest.raises(ConfigError, match="the model carries an adapter, so peft_config has no use"):
        RankDPOTrainer(generator, args(), ranked_rows(2), peft_config=LoraConfig(r=2))

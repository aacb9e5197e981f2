"""The memory estimate: headers are counted exactly, and what saves memory lowers the total."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from tiny_families import IMAGES
from torch._subclasses.fake_tensor import FakeTensorMode

from alignkit.commands import memory
from alignkit.errors import DataError

TARGETS = ("to_q", "to_k")


@pytest.fixture
def folder(tmp_path):
    """A diffusers folder with a two-block transformer of width 8 and a small VAE."""
    for name, config, tensors in (
        (
            "transformer",
            {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "patch_size": 2, "sample_size": 16},
            {"blocks.0.to_q.weight": torch.zeros(8, 8), "blocks.0.to_k.weight": torch.zeros(8, 4)},
        ),
        ("vae", {"block_out_channels": [4, 4, 4]}, {"w": torch.zeros(10)}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, tmp_path / name / "model.safetensors")
    return tmp_path


SETUP = memory.Setup(
    height=64,
    width=64,
    batch=2,
    candidates=4,
    lora_rank=3,
    lora_targets=TARGETS,
    full_finetune=False,
    needs_reference=True,
    weight_bytes=2,
    compute_bytes=2,
)


def test_parts_by_hand(folder):
    parts = memory.parts(memory.read_model(folder), SETUP)
    assert parts["denoiser weights"] == (64 + 32) * 2
    assert parts["text encoders and VAE"] == 10 * 2
    assert parts["trained weights, gradients, AdamW"] == 3 * ((8 + 8) + (8 + 4)) * 16
    tokens = (64 // 4) ** 2 // 4 + memory.TEXT_TOKENS
    assert parts["activations (estimate)"] == 2 * memory.JOINT_BLOCK["lora"] * tokens * 8 * (2 * 4) * 2


def test_full_tuning_keeps_a_reference(folder):
    parts = memory.parts(memory.read_model(folder), replace(SETUP, full_finetune=True))
    assert parts["frozen reference copy"] == 96 * 4  # float32, as the trained weights are
    assert parts["trained weights, gradients, AdamW"] == 96 * 16


def test_low_memory_holds_one_candidate(folder):
    model = memory.read_model(folder)
    ratio = memory.activations(model, SETUP) / memory.activations(model, replace(SETUP, low_memory=True))
    assert ratio == SETUP.candidates


def test_every_variant_lowers_the_total(folder):
    model = memory.read_model(folder)
    totals = {name: memory.total(model, setup) for name, setup in memory.variants(SETUP).items()}
    asked = totals.pop("as asked")
    assert len(totals) == 3
    assert all(total < asked for total in totals.values())
    assert totals["both"] == min(totals.values())


@pytest.mark.parametrize("kept", [0, 4, 40, -8])
def test_a_truncated_file_is_named(folder, kept):
    path = folder / "transformer" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"transformer/model\.safetensors.*copy it again"):
        memory.read_model(folder)


def _kept(build, inputs):
    """Bytes that autograd keeps of a forward pass of a full-size network, counted without any memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = build().train()
        weights = {parameter.untyped_storage()._cdata for parameter in net.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(**inputs())
    return sum(size for size, _ in kept.values())


def test_activations_of_sd15_and_sd3_against_autograd():
    """SD 1.5 at 512 px and SD3 at 1024 px, all weights trained, float32, one picture."""
    one = replace(SETUP, height=512, width=512, batch=1, candidates=1, full_finetune=True, compute_bytes=4)
    unet = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
    counted = _kept(
        lambda: UNet2DConditionModel(**unet),
        lambda: {
            "sample": torch.empty(1, 4, 64, 64),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.empty(1, 77, 768),
        },
    )
    kinds = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    model = memory.Model({}, "unet", {**unet, "down_block_types": kinds}, vae={"block_out_channels": [1, 1, 1, 1]})
    assert memory.activations(model, one) == pytest.approx(counted, rel=0.1)

    joint = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64}
    sizes = {"joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048}
    counted = _kept(
        lambda: SD3Transformer2DModel(sample_size=128, pos_embed_max_size=192, **joint, **sizes),
        lambda: {
            "hidden_states": torch.empty(1, 16, 128, 128),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.empty(1, memory.TEXT_TOKENS, 4096),
            "pooled_projections": torch.empty(1, 2048),
        },
    )
    model = memory.Model({}, "transformer", {**joint, "patch_size": 2}, vae={"block_out_channels": [1, 1, 1, 1]})
    assert memory.activations(model, replace(one, height=1024, width=1024)) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("family", list(IMAGES))
def test_every_family_is_read(load, model_folders, family):
    """Ratio, LoRA parameters and parameters as in the loaded generator; an estimate comes of it."""
    generator = load(family)
    model = memory.read_model(model_folders[family])
    assert model.vae_ratio == generator.spatial_ratio
    assert model.parameters(model.denoiser) == sum(t.numel() for t in generator.net.state_dict().values())
    setup = replace(SETUP, lora_targets=generator.lora_targets)
    assert memory.activations(model, setup) > 0
    generator.add_lora(3, None, None, 0.0)
    assert memory.lora_parameters(model, setup) == sum(p.numel() for p in generator.net.parameters() if p.requires_grad)

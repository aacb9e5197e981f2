"""The cost of a training: shapes from headers and configs, one step on the meta device against a real one, by hand."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from tiny_families import FAMILIES
from torch import nn

from alignkit.adapters import lora
from alignkit.commands.doctor import memory
from alignkit.commands.doctor.dry_step import Ledger, Run, dry_step, encoding_bytes, network_inputs
from alignkit.commands.doctor.model_shapes import Model, read_model
from alignkit.errors import ConfigError, DataError, UnknownNameError
from alignkit.generators.description import LatentSize

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SETUP = memory.Setup(
    height=32,
    width=32,
    frames=1,
    batch=2,
    candidates=4,
    lora_rank=3,
    lora_targets=TARGETS,
    full_finetune=False,
    needs_reference=True,
    dtype="float32",
    bf16=False,
)


@pytest.fixture(scope="module")
def model(model_folders):
    """The tiny SD3."""
    return read_model(model_folders["flow"])


def without_weights(folder, target):
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_read_and_run(load, model_folders, family, tmp_path):
    """Headers and configs tell the same; ratio, parameters and LoRA parameters are the loaded generator's."""
    generator = load(family)
    model = read_model(model_folders[family])
    bare = read_model(without_weights(model_folders[family], tmp_path / "bare"))
    assert bare.shapes[model.denoiser] == model.shapes[model.denoiser]
    assert {part: bare.stored(part) for part in bare.shapes} == {part: model.stored(part) for part in model.shapes}
    assert model.vae_ratio == generator.spatial_ratio
    assert model.stored(model.denoiser) == sum(t.numel() for t in generator.net.state_dict().values())
    assert model.denoiser_parameters() == sum(t.numel() for t in generator.net.parameters())
    setup = replace(SETUP, lora_targets=generator.lora_targets)
    assert min(memory.operations(model, setup)[name] for name in ("forward", "reference")) > 0
    assert memory.parts(model, setup)["activations"] > 0
    generator.add_lora(3, None, None, 0.0)
    trained = sum(p.numel() for p in generator.net.parameters() if p.requires_grad)
    assert memory.lora_parameters(model, setup.lora_targets, 3) == trained


@pytest.mark.parametrize("kept", [0, 4, 40, -8])
def test_a_truncated_file_is_named(model_folders, kept, tmp_path):
    shutil.copytree(model_folders["flow"], tmp_path / "flow")
    path = next((tmp_path / "flow" / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"transformer/.*safetensors.*copy it again"):
        read_model(tmp_path / "flow")


def test_an_unknown_class_is_named():
    model = Model("P", {}, "transformer", "NoSuchNet", {}, {})
    with pytest.raises(UnknownNameError, match="diffusers as installed has no class 'NoSuchNet'"):
        model.blank_denoiser()
    with pytest.raises(UnknownNameError, match="doctor does not know the inputs of a NoSuchNet"):
        _ = model.family
    known = replace(model, denoiser_class="FluxTransformer2DModel")  # of a pipeline that is in no table
    assert known.family.origin.label == "FLUX.1"


# --- one step -------------------------------------------------------------------------------------------------------


def test_operations_of_a_lora_layer_by_hand():
    """y = W x + B A x on n rows; no gradient for x and W, hence none of their products in the backward."""
    rows, width, out, rank = 5, 7, 11, 2
    net = nn.Sequential(nn.Linear(width, out, bias=False))
    lora.inject(net, rank=rank, targets=["0"])
    x = torch.randn(rows, width)
    with Ledger([x, *net.parameters()]) as ledger:
        y = net(x)
        assert ledger.flops == 2 * rows * (width * out + width * rank + rank * out)
        forward = ledger.flops
        y.sum().backward()
    gradient_of_b, gradient_of_ax, gradient_of_a = rank * out, out * rank, width * rank
    assert ledger.flops - forward == 2 * rows * (gradient_of_b + gradient_of_ax + gradient_of_a)


def test_operations_of_a_transformer_by_hand(load, model):
    """The tiny SD3's forward: 2 rows in out of every linear layer, 4 heads T^2 d of its two joint attentions."""
    generator = load("flow")
    generator.add_lora(3, None, None, 0.0)
    counted = []

    def count(layer, given, output):
        kernel = layer.weight[0].numel()  # in, or in times the window of the patch embedding
        places = output.numel() // output.shape[-1 if isinstance(layer, nn.Linear) else 1]
        counted.append(2 * places * layer.weight.shape[0] * kernel)

    for layer in generator.net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    generator.net(**network_inputs(type(generator), generator.net, LatentSize(1, 1, 8, 8)))
    tokens = 4 * 4 + 77 + 256
    attention = 2 * 4 * 2 * tokens**2 * 8
    run = Run(16, 16, 1, "float32", bf16=False, lora_rank=3, lora_targets=tuple(generator.lora_targets))
    assert dry_step(model, run).forward_flops == sum(counted) + attention


def real_step(family, net, size):
    """Peak bytes of a real pass on the CPU."""
    given = network_inputs(family, net, size)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    known = [*net.parameters(), *net.buffers(), *given.values(), *(p.grad for p in net.parameters())]
    with Ledger(known) as ledger:
        (net(**given, return_dict=False)[0].float() - 0).square().mean().backward()
    return ledger.peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["unet", "flow", "sana"])
def test_the_peak_is_that_of_a_real_step(load, model_folders, family, checkpointing):
    """Of three pictures, in float32: real tensors with real lifetimes against those of the meta device."""
    generator = load(family)
    generator.add_lora(3, None, None, 0.0)
    generator.net.train()
    if checkpointing:
        generator.net.enable_gradient_checkpointing()
    ratio, pictures = generator.spatial_ratio, 3
    peak = real_step(type(generator), generator.net, LatentSize(pictures, 1, 32 // ratio, 32 // ratio))
    setup = replace(SETUP, lora_targets=generator.lora_targets, batch=1, candidates=3)
    setup = replace(setup, activation_checkpointing=checkpointing)
    told = memory.parts(read_model(model_folders[family]), setup)["activations"]
    assert told == pytest.approx(peak, rel=0.1)


def test_a_size_that_the_network_refuses_is_named(model):
    with pytest.raises(
        ConfigError, match=r"SD3Transformer2DModel does not take 512x512, 1 frames: .*pos_embed_max_size"
    ):
        memory.total(model, replace(SETUP, height=512, width=512))


def test_autocast_copies_frozen_float32_weights_once_for_all_pictures(model):
    """In bf16 the graph keeps 2 bytes of every frozen weight that a product needs; loaded in bf16, none."""
    run = Run(32, 32, 1, "float32", bf16=True, lora_rank=3, lora_targets=TARGETS)
    copied, plain = (dry_step(model, replace(run, dtype=dtype)).shared_bytes for dtype in ("float32", "bfloat16"))
    assert 0.9 < (copied - plain) / (2 * model.denoiser_parameters()) <= 1
    cost = dry_step(model, run)
    assert cost.peak_bytes(5) - cost.peak_bytes(4) == cost.picture_bytes


# --- the whole ------------------------------------------------------------------------------------------------------


def test_parts_by_hand(model):
    parts = memory.parts(model, replace(SETUP, dtype="bfloat16"))
    others = sum(model.stored(name) for name in model.shapes if name != "transformer")
    assert parts["denoiser weights"] == 2 * model.stored("transformer")
    assert parts["text encoders and VAE"] == 2 * others
    assert parts["trained weights, gradients, AdamW"] == 16 * memory.lora_parameters(model, TARGETS, 3)
    assert memory.total(model, replace(SETUP, dtype="bfloat16")) == sum(parts.values())


def test_full_tuning_keeps_a_reference(model):
    parts = memory.parts(model, replace(SETUP, full_finetune=True))
    stored = model.stored("transformer")
    assert parts["denoiser weights"] == 0
    assert parts["frozen reference copy"] == stored * 4  # float32, as the trained weights are
    assert parts["trained weights, gradients, AdamW"] == stored * 16


def test_low_memory_holds_one_candidate_and_repeats_its_forward(model):
    plain, low = SETUP, replace(SETUP, low_memory=True)
    shared = 4 * memory.parts(model, low)["activations"] - memory.parts(model, plain)["activations"]
    assert 0 <= shared <= 0.01 * memory.parts(model, plain)["activations"]
    forward = memory.operations(model, plain)["forward"]
    assert sum(memory.operations(model, low).values()) == sum(memory.operations(model, plain).values()) + forward
    ready = memory.operations(model, replace(SETUP, precompute_reference=True))
    assert sum(ready.values()) == sum(memory.operations(model, plain).values()) - forward


def test_the_fewest_switches_that_fit(model):
    totals = {names: memory.total(model, choice) for names, choice in memory.switches(SETUP)}
    assert len(totals) == 8
    assert max(totals.values()) == totals[()]
    enough = int(totals[()] / (1 - memory.FREE)) + 1
    assert memory.what_fits(model, SETUP, enough) == ((), totals[()])
    one = min((amount, names) for names, amount in totals.items() if len(names) == 1)
    narrow = int(one[0] / (1 - memory.FREE)) + 1
    names, amount = memory.what_fits(model, SETUP, narrow)
    assert len(names) == 1
    assert memory.fits(amount, narrow)
    assert not memory.fits(totals[()], narrow)
    assert memory.what_fits(model, SETUP, 10) is None


def test_what_is_on_or_means_nothing_is_no_switch(model):
    sft = replace(SETUP, candidates=1, dtype="bfloat16", bf16=True)
    assert [names for names, _ in memory.switches(sft)] == [(), ("activation_checkpointing: true",)]


def test_filling_the_latents_cache_is_counted(load, model_folders):
    """The VAE's activations are those of two real images at once, and the stage counts where it is the peak."""
    model, vae = read_model(model_folders["flow"]), load("flow").pipeline.vae
    setup = replace(SETUP, batch=1, candidates=2, lora_rank=1)
    run = memory.run_of(setup)
    with torch.no_grad(), Ledger([*vae.parameters(), *vae.buffers()]) as ledger:
        vae.encode(torch.zeros(2, 3, 32, 32), return_dict=False)
    assert encoding_bytes(model, run) == pytest.approx(ledger.peak, rel=0.1)
    assert encoding_bytes(model, replace(run, dtype="bfloat16")) == pytest.approx(
        encoding_bytes(model, run) / 2, rel=0.01
    )
    assert memory.total(model, setup) == max(sum(memory.parts(model, setup).values()), memory.encoding(model, setup))
    weights = sum(model.stored(name) for name in model.shapes) * 4
    added = 4 * memory.lora_parameters(model, TARGETS, 1)
    assert memory.encoding(model, setup) == weights + added + encoding_bytes(model, run)
    assert memory.encoding(model, replace(setup, caches_latents=False)) == 0

"""Adapters of every family in other people's hands: ComfyUI's keys, text encoders, files of other families.

`generate` is the vanilla pipeline (test_conformance.py), so a second generator whose pipeline loads a file with its own
`load_lora_weights`, or whose weights are changed by hand, is the witness.
"""

from __future__ import annotations

import re

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers
from random_adapters import stir
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES

from alignkit.adapters import comfyui, exports, lora
from alignkit.errors import AdapterError
from alignkit.generators import load_generator
from alignkit.generators.families.wan import Wan
from alignkit.records import Sampling

PROMPTS, SEEDS = ["a red circle", "two blue rings on a gray background"], (5, 6)
CLOSE = 1e-4  # largest pixel difference, float32
UNETS, KNOWN = ("unet", "lcm", "sdxl"), ("flow", "flux", "pixart", "qwen_image")
WANS = {"wan", "wan_tokens", "wan_high", "wan_low"}
TEXT_FAMILIES = ("unet", "lcm", "sdxl", "flow", "flux")
WIDE = ["to_q", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"]


def draw(generator, family):
    side = FAMILIES[family].side
    told = Sampling(steps=2, guidance_scale=3.0, height=side, width=side)
    return generator.generate(PROMPTS, SEEDS, told)


@pytest.fixture
def tune(load):
    """Generators with an adapter whose alpha is not its rank and that changes pictures."""

    def make(family, targets=None, size=0.3):
        generator = load(family)
        generator.add_lora(3, 7.0, targets, 0.0)
        stir(generator.net, size)
        return generator

    return make


def comfyui_file(generator, folder):
    generator.save_adapter(folder)
    return folder / "comfyui" / f"{generator.name}.safetensors"


def deltas(file, prefix):
    """What a loader adds to the weights: up down alpha / rank, by the names after `prefix`."""
    state = load_file(file)
    assert all(key.startswith(prefix) for key in state)
    names = [key.removesuffix(".alpha") for key in state if key.endswith(".alpha")]
    assert len(state) == 3 * len(names)
    pairs = {name: (state[name + lora.DOWN], state[name + lora.UP], state[name + ".alpha"]) for name in names}
    return {name.removeprefix(prefix): up @ down * (alpha / len(down)) for name, (down, up, alpha) in pairs.items()}


def add(net, changes):
    with torch.no_grad():
        for name, change in changes.items():
            net.get_submodule(name).weight.add_(change)


# --- ComfyUI --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets"), [*((name, None) for name in (*UNETS, "flux", "qwen_image")), ("unet", WIDE)]
)
def test_diffusers_reads_the_comfyui_file(load, tune, family, targets, tmp_path):
    """Through its own converters of kohya's and ComfyUI's keys: alpha, convolutions and the time layers are in it."""
    tuned, other = tune(family, targets, 0.1 if targets else 0.3), load(family)
    file = comfyui_file(tuned, tmp_path)
    base = draw(other, family)
    other.pipeline.load_lora_weights(file)
    assert (draw(other, family) - draw(tuned, family)).abs().max() <= CLOSE
    assert (draw(tuned, family) - base).abs().max() > 20 * CLOSE


@pytest.mark.parametrize("family", KNOWN)
def test_comfyui_reads_diffusers_names_of_these(load, tune, family, tmp_path):
    tuned, other = tune(family), load(family)
    prefix = "diffusion_model." if family == "qwen_image" else "transformer."
    add(other.net, deltas(comfyui_file(tuned, tmp_path), prefix))
    assert (draw(other, family) - draw(tuned, family)).abs().max() <= CLOSE


@pytest.mark.parametrize(
    "targets", [None, ["to_k", "to_out.0"], ["to_q", *(f"feed_forward.linear_{n}" for n in (1, 2, 3)), "norm1.linear"]]
)
def test_comfyui_reads_luminas_own_names(load, tune, targets, tmp_path):
    """Its fused projections split row by row; all other names through diffusers' converter of original checkpoints."""
    tuned, other = tune("lumina2", targets), load("lumina2")
    original = {}
    for name, change in deltas(comfyui_file(tuned, tmp_path), "diffusion_model.").items():
        if not name.endswith("attention.qkv"):
            original[f"{name}.weight"] = change
            continue
        block = other.net.get_submodule(name.replace("attention.qkv", "attn"))
        sizes = [layer.out_features for layer in (block.to_q, block.to_k, block.to_v)]
        names = [name.replace("qkv", f"to_{part}.weight") for part in "qkv"]
        original |= dict(zip(names, change.split(sizes), strict=True))
    changes = convert_lumina2_to_diffusers(original)
    add(other.net, {name.removesuffix(".weight"): change for name, change in changes.items()})
    assert (draw(other, "lumina2") - draw(tuned, "lumina2")).abs().max() <= CLOSE


def test_comfyui_reads_wans_own_names(tmp_path):
    net = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
    )
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    lora.inject(net, rank=2, targets=targets, alpha=6.0)
    stir(net)
    file = comfyui.export({"transformer": net}, tmp_path / "wan.safetensors", {"transformer": Wan.comfyui})
    theirs = diffusers.WanPipeline.lora_state_dict(file)
    ours = {f"transformer.{path}": 3 * up @ down for path, (down, up, _) in exports.layer_weights(net).items()}
    assert {key.split(".lora_")[0] for key in theirs} == set(ours)
    for path, change in ours.items():
        torch.testing.assert_close(theirs[path + lora.UP] @ theirs[path + lora.DOWN], change)


def test_a_family_or_layer_without_keys_gets_no_file(tune, tmp_path, caplog):
    assert not comfyui_file(tune("sana"), tmp_path / "sana").exists()
    assert not caplog.records
    assert not comfyui_file(tune("flow", ["to_q", "proj_out"]), tmp_path / "flow").exists()
    assert "no file for ComfyUI: it has no key for 'proj_out' of SD3Transformer2DModel" in caplog.text


@pytest.mark.parametrize("family", [*UNETS, *KNOWN])
def test_our_load_reads_the_comfyui_file(load, tune, family, tmp_path):
    tuned = tune(family)
    again = load(family, adapter=comfyui_file(tuned, tmp_path))
    assert torch.equal(draw(again, family), draw(tuned, family))


# --- text encoders --------------------------------------------------------------------------------------------------


@pytest.fixture
def tune_text(load):
    """Generators with an adapter on the network and another on the text encoders."""

    def make(family):
        generator = load(family)
        generator.add_lora(3, 7.0, None, 0.0)
        generator.add_text_lora(2, 5.0, None, 0.0)
        stir(generator.model)
        return generator

    return make


def conditioning(generator):
    with torch.no_grad():
        return generator.encode_prompts(PROMPTS).tensors


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_text_encoders_learn_and_the_reference_does_not_see_it(load, tune_text, family):
    base, tuned = conditioning(load(family)), tune_text(family)
    assert any(not torch.equal(value, base[name]) for name, value in conditioning(tuned).items())
    with tuned.reference():
        assert all(torch.equal(value, base[name]) for name, value in conditioning(tuned).items())
    trainable = {name for name, parameter in tuned.model.named_parameters() if parameter.requires_grad}
    encoders = {f"trained_encoders.{name}." for name in tuned.lora_encoders}
    assert all("lora_" in name for name in trainable)
    assert all(any(name.startswith(encoder) for name in trainable) for encoder in encoders)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_others_load_the_text_encoders_too(load, tune_text, family, tmp_path):
    """The vanilla pipeline from our export, our own load from both layouts, and the merged weights: one picture."""
    tuned, vanilla = tune_text(family), load(family)
    tuned.save_adapter(tmp_path)
    picture = draw(tuned, family)
    vanilla.pipeline.load_lora_weights(tmp_path)
    assert (draw(vanilla, family) - picture).abs().max() <= CLOSE
    for layout in (".", "peft"):
        assert torch.equal(draw(load(family, adapter=tmp_path / layout), family), picture)
    with tuned.reference():
        assert torch.equal(draw(tuned, family), draw(load(family), family))
    tuned.save_merged(tmp_path / "merged")
    assert tuned.model.trained_encoders.keys() == tuned.lora_encoders.keys()
    assert (draw(load_generator(tmp_path / "merged", device="cpu"), family) - picture).abs().max() <= CLOSE
    tuned.merge_adapter()
    assert not tuned.adapted
    assert (draw(tuned, family) - picture).abs().max() <= CLOSE


@pytest.mark.parametrize("family", UNETS)
def test_the_comfyui_file_holds_the_text_encoders(load, tune_text, family, tmp_path):
    """By kohya's names, which diffusers' converter reads; joint models have no such converter (next test)."""
    tuned, vanilla = tune_text(family), load(family)
    vanilla.pipeline.load_lora_weights(comfyui_file(tuned, tmp_path))
    assert (draw(vanilla, family) - draw(tuned, family)).abs().max() <= CLOSE


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_our_load_reads_them_from_the_comfyui_file(load, tune_text, family, tmp_path):
    file = comfyui_file(tune_text(family), tmp_path)
    prefixes = {key.split("_text_model_encoder_layers_")[0] for key in load_file(file) if key.startswith("lora_te")}
    assert prefixes == {f"lora_te{number}" for number, _ in enumerate(load(family).lora_encoders, 1)}
    assert torch.equal(draw(load(family, adapter=file), family), draw(tune_text(family), family))


def test_an_adapter_of_text_encoders_alone(load, tmp_path):
    tuned = load("unet")
    tuned.add_text_lora(2, 5.0, None, 0.0)
    stir(tuned.model)
    tuned.save_adapter(tmp_path)
    assert torch.equal(draw(load("unet", adapter=tmp_path), "unet"), draw(tuned, "unet"))


def test_text_encoder_keys_are_those_of_published_files(tune_text, tmp_path):
    """Older versions of transformers know no others."""
    tune_text("sdxl").save_adapter(tmp_path)
    keys = load_file(tmp_path / lora.DIFFUSERS_FILE)
    for tower in ("text_encoder", "text_encoder_2"):
        assert f"{tower}.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight" in keys


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(TEXT_FAMILIES)))
def test_a_pipeline_whose_loader_knows_no_text_encoder(load, family):
    with pytest.raises(AdapterError, match=r"the LoRA loader of a \w+Pipeline knows no text encoder"):
        load(family).add_text_lora(2, None, None, 0.0)


# --- files that do not fit ------------------------------------------------------------------------------------------


def test_a_file_of_another_family_says_what_it_is_for(load, tune, tmp_path):
    """All pairs of families; the U-Nets of SD and LCM, and all Wans, take each other's adapters, by right."""
    folders = {family: tmp_path / family for family in FAMILIES}
    for family, folder in folders.items():
        tune(family).save_adapter(folder)
    said = {"flow": "Stable Diffusion 3", "flux": "FLUX.1", "pixart": "PixArt", "sana": "SANA"}
    said |= {"lumina2": "Lumina-Image 2.0", "qwen_image": "Qwen-Image", "z_image": "Z-Image", "dreamlite": "DreamLite"}
    said |= {"cogvideox": "CogVideoX", "ltx": "LTX-Video", "hunyuan": "HunyuanVideo", "anyflow": "AnyFlow"}
    said |= dict.fromkeys(WANS, "Wan")
    for family in FAMILIES:
        generator = load(family)
        base = draw(generator, family)
        for other, folder in folders.items():
            if other == family or any({family, other} <= kin for kin in ({"unet", "lcm"}, WANS)):
                continue
            for file in (folder / lora.DIFFUSERS_FILE, folder / "peft"):
                with pytest.raises(AdapterError) as caught:
                    generator.load_adapter(file)
                message = str(caught.value)
                assert str(file) in message
                assert said.get(other, "a U-Net (Stable Diffusion") in message
                assert "give an adapter that was trained on this one" in message
        assert torch.equal(draw(generator, family), base)  # nothing of a refused file stays


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_without_our_mark_is_told_by_its_keys(load, tune, family, tmp_path):
    """Files of other trainers: the network's class stands nowhere in them."""
    said = {"flux": "FLUX.1", "lumina2": "Lumina-Image 2.0", "flow": "joint attention", "qwen_image": "joint attention"}
    said |= dict.fromkeys(("pixart", "sana", "ltx"), "cross-attention")
    said |= {"z_image": "Z-Image", "cogvideox": "CogVideoX", "hunyuan": "HunyuanVideo"}
    said |= dict.fromkeys((*WANS, "anyflow"), "Wan or AnyFlow")
    tune(family).save_adapter(tmp_path)
    save_file(load_file(tmp_path / lora.DIFFUSERS_FILE), tmp_path / "plain.safetensors")
    other = load("flow" if family in (*UNETS, "dreamlite") else "unet")
    with pytest.raises(AdapterError, match=rf"belongs to another model family, .*{said.get(family, 'a U-Net')}"):
        other.load_adapter(tmp_path / "plain.safetensors")


def test_a_kohya_file_with_other_names_is_refused(load, tune, tmp_path):
    """SDXL in kohya's own U-Net, and a U-Net's file for a transformer."""
    file = comfyui_file(tune("sdxl"), tmp_path)
    with pytest.raises(AdapterError, match=r"holds no 'transformer\.\*'.* weights: it belongs to another model family"):
        load("flow").load_adapter(file)
    with pytest.raises(AdapterError, match=r"has another shape, \[3, 64\] instead of \[3, 32\]"):
        load("unet").load_adapter(file)
    state = {re.sub("down_blocks_0", "input_blocks_1", key): value for key, value in load_file(file).items()}
    save_file(state, tmp_path / "sgm.safetensors")
    with pytest.raises(AdapterError, match=r"'lora_unet_input_blocks_1.*' names none of its layers"):
        load("sdxl").load_adapter(tmp_path / "sgm.safetensors")


@pytest.mark.parametrize(("width", "said"), [(768, "Stable Diffusion 1.x"), (1024, "2.x"), (2048, "SDXL")])
def test_a_u_net_is_told_by_the_text_it_looks_at(load, width, said, tmp_path):
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    save_file({path + lora.DOWN: torch.zeros(2, width), path + lora.UP: torch.zeros(16, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=rf"does not fit this model: .* It was made for .*{said}"):
        load("unet").load_adapter(tmp_path / "x.safetensors")

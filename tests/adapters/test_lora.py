"""LoRA: an exact reference switch, and exports that draw the same picture through other people's loaders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file

from alignkit.adapters import lora
from alignkit.errors import AdapterError, MissingFileError
from alignkit.generators import load_generator
from alignkit.records import Sampling

PROMPTS, SEEDS = ["a red circle", "two blue rings"], [3, 4]
SAMPLING = Sampling(steps=2, guidance_scale=3.0, height=16, width=16)
CLOSE = 1e-4  # largest pixel difference, float32


@pytest.fixture(params=["unet", "flow"])
def family(request):
    return request.param


@pytest.fixture
def tuned(load, family):
    """A generator with an adapter whose alpha is not its rank and that changes pictures."""
    generator = load(family)
    generator.add_lora(rank=3, alpha=7.0, targets=None, dropout=0.0)
    stir(generator, 0.3)
    return generator


def stir(generator, size):
    """Random adapter weights."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in generator.net.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=rng))


def draw(generator):
    return generator.generate(PROMPTS, SEEDS, SAMPLING)


def draw_vanilla(pipeline, family):
    pipeline.set_progress_bar_config(disable=True)
    extra = {"max_sequence_length": 16} if family == "flow" else {}
    return pipeline(
        PROMPTS,
        negative_prompt=["", ""],
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=2,
        guidance_scale=3.0,
        height=16,
        width=16,
        output_type="pt",
        **extra,
    ).images.float()


def prediction(generator):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, *generator.latent_shape(16, 16), generator=rng)
    with torch.no_grad():
        return generator.predict(x, torch.tensor([0.3, 0.8]), generator.encode_prompts(PROMPTS))


def test_a_fresh_adapter_changes_nothing(load, family):
    generator = load(family)
    base = prediction(generator)
    generator.add_lora(rank=2, alpha=None, targets=None, dropout=0.0)
    assert torch.equal(prediction(generator), base)
    trainable = [name for name, p in generator.net.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_both_streams_of_a_joint_block_are_adapted(load):
    generator = load("flow")
    generator.add_lora(rank=2, alpha=None, targets=None, dropout=0.0)
    names = {name.split(".lora_A")[0] for name, _ in generator.net.named_parameters() if "lora_A" in name}
    assert {"transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj"} <= names


def test_reference_is_the_base_model_exactly(tuned, load, family):
    base = prediction(load(family))
    before = prediction(tuned)
    with tuned.reference():
        assert torch.equal(prediction(tuned), base)
    assert torch.equal(prediction(tuned), before)
    assert (before - base).abs().max() > 1e-3


def test_reference_ends_with_an_error_inside(tuned):
    before = prediction(tuned)
    with pytest.raises(KeyError), tuned.reference():
        raise KeyError
    assert torch.equal(prediction(tuned), before)
    assert all(p.requires_grad for name, p in tuned.net.named_parameters() if "lora_" in name)


def test_a_frozen_copy_is_a_reference_too(load, family):
    generator = load(family)
    base = prediction(generator)
    generator.model.freeze_copy()
    names = set(generator.model.state_dict())
    with torch.no_grad():
        for parameter in generator.net.parameters():
            parameter.mul_(1.1)
    with generator.reference():
        assert torch.equal(prediction(generator), base)
    assert (prediction(generator) - base).abs().max() > 1e-3
    assert names == {f"net.{name}" for name in generator.net.state_dict()}  # the copy is no part of the model


def test_the_vanilla_pipeline_loads_the_export(tuned, family, model_folders, tmp_path):
    tuned.save_adapter(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(model_folders[family])
    base = draw_vanilla(pipeline, family)
    pipeline.load_lora_weights(tmp_path)
    picture = draw_vanilla(pipeline, family)
    assert (picture - draw(tuned)).abs().max() <= CLOSE
    assert (picture - base).abs().max() > 100 * CLOSE


def test_a_lora_on_convolutions_and_time_layers_is_exported_too(load, model_folders, tmp_path):
    """The wide targets of configs/ladder.yaml: the vanilla pipeline draws the same, and so does the merged network."""
    generator = load("unet")
    wide = ["to_q", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"]
    generator.add_lora(2, None, wide, 0.0)
    stir(generator, 0.1)
    generator.save_adapter(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(model_folders["unet"])
    base = draw_vanilla(pipeline, "unet")
    pipeline.load_lora_weights(tmp_path)
    picture = draw(generator)
    assert (draw_vanilla(pipeline, "unet") - picture).abs().max() <= CLOSE
    assert (picture - base).abs().max() > 100 * CLOSE
    generator.merge_adapter()
    assert (draw(generator) - picture).abs().max() <= CLOSE


def test_peft_loads_the_peft_folder(tuned, load, family, tmp_path):
    tuned.save_adapter(tmp_path)
    other = load(family)
    expected = prediction(tuned)
    other.model.net = PeftModel.from_pretrained(other.net, tmp_path / "peft")
    torch.testing.assert_close(prediction(other), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [".", "peft"])
def test_our_load_reads_both_layouts(tuned, family, model_folders, tmp_path, layout):
    tuned.save_adapter(tmp_path)
    again = load_generator(model_folders[family], adapter=tmp_path / layout, device="cpu")
    assert torch.equal(prediction(again), prediction(tuned))
    again.save_adapter(tmp_path / "again")
    first, second = (load_file(folder / lora.DIFFUSERS_FILE) for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_merged_weights_draw_the_same_picture(tuned, family, tmp_path):
    tuned.save_merged(tmp_path)
    merged = load_generator(tmp_path, device="cpu")
    assert not lora.lora_layers(merged.net)
    assert (draw(merged) - draw(tuned)).abs().max() <= CLOSE
    assert lora.lora_layers(tuned.net)  # the tuned one keeps its adapter


def test_a_folded_adapter_draws_the_same_picture(tuned, family, model_folders, tmp_path):
    tuned.save_adapter(tmp_path)
    folded = load_generator(model_folders[family], adapter=tmp_path, device="cpu")
    folded.merge_adapter()
    assert not lora.lora_layers(folded.net)
    assert (draw(folded) - draw(tuned)).abs().max() <= CLOSE
    folded.merge_adapter()  # nothing is left to fold


def test_a_negated_adapter_undoes_the_merge(tuned, family, model_folders, tmp_path):
    base = draw(load_generator(model_folders[family]))
    lora.negate(tuned.net)
    tuned.save_adapter(tmp_path / "back")
    lora.negate(tuned.net)
    tuned.merge_adapter()
    assert (draw(tuned) - base).abs().max() > 0.01
    tuned.load_adapter(tmp_path / "back")
    assert (draw(tuned) - base).abs().max() <= CLOSE


def test_rank_stabilised_adapters_keep_their_scale(tuned, family, model_folders, tmp_path):
    """What the stored config says beyond rank and alpha counts too: rsLoRA scales by alpha / sqrt(rank)."""
    tuned.save_adapter(tmp_path)
    config = tmp_path / "peft" / lora.PEFT_CONFIG
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": True}))
    again = load_generator(model_folders[family], adapter=tmp_path / "peft", device="cpu")
    scales = {layer.scaling[lora.NAME] for layer in lora.lora_layers(again.net)}
    assert list(scales) == [pytest.approx(7 / 3**0.5)]


# --- adapters that do not fit ---------------------------------------------------------------------------------------


def test_no_matching_target_is_an_error(load):
    with pytest.raises(AdapterError, match=r"none of the LoRA targets .*to_nowhere.* names a layer of UNet2D"):
        load("unet").add_lora(rank=2, alpha=None, targets=["to_nowhere"], dropout=0.0)


def test_an_adapter_of_another_family_is_an_error(load, model_folders, tmp_path):
    unet = load("unet")
    unet.add_lora(rank=2, alpha=None, targets=None, dropout=0.0)
    unet.save_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"holds no 'transformer\.\*' weights: it belongs to another model family"):
        load_generator(model_folders["flow"], adapter=tmp_path, device="cpu")
    with pytest.raises(AdapterError, match=r"does not fit this model|none of the LoRA targets"):
        load_generator(model_folders["flow"], adapter=tmp_path / "peft", device="cpu")


def _rewrite(folder: Path, change) -> None:
    file = folder / lora.DIFFUSERS_FILE
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {k.replace("to_q", "to_elsewhere"): v for k, v in s.items() if "to_q" in k}, "to_elsewhere"),
        (
            lambda s: {k.replace("lora_A", "down"): v for k, v in s.items() if "lora_A" in k},
            "only the diffusers, PEFT and kohya",
        ),
        (lambda s: {k: v for i, (k, v) in enumerate(s.items()) if i}, "does not fit this model: without weights"),
        (lambda s: {k: v[:, :2].contiguous() if "lora_A" in k else v for k, v in s.items()}, "has another shape"),
        (lambda s: {f"other.{k}": v for k, v in s.items()}, "belongs to another model family"),
    ],
)
def test_zero_or_partial_matches_are_errors(load, model_folders, tmp_path, change, said):
    unet = load("unet")
    unet.add_lora(rank=2, alpha=None, targets=None, dropout=0.0)
    unet.save_adapter(tmp_path)
    _rewrite(tmp_path, change)
    with pytest.raises(AdapterError, match=said):
        load_generator(model_folders["unet"], adapter=tmp_path, device="cpu")


def test_a_file_without_metadata_loads_at_scale_one(load, model_folders, tmp_path):
    """Other trainers write no metadata; alpha = rank is what diffusers assumes as well."""
    unet = load("unet")
    unet.add_lora(rank=2, alpha=None, targets=None, dropout=0.0)
    unet.save_adapter(tmp_path)
    _rewrite(tmp_path, lambda state: state)
    again = load_generator(model_folders["unet"], adapter=tmp_path, device="cpu")
    assert {layer.scaling[lora.NAME] for layer in lora.lora_layers(again.net)} == {1.0}


def test_no_adapter_to_load_or_export(load, tmp_path):
    with pytest.raises(MissingFileError, match="no adapter in"):
        load("unet").load_adapter(tmp_path)

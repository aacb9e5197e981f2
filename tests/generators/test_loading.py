"""Pipelines with a component left out, and pipelines that the user has loaded."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import tiny_families
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

from alignkit.errors import ConfigError, FlaggedError, MissingFileError, UnknownNameError
from alignkit.generators import load_generator, wrap
from alignkit.generators.rollout import denoise
from alignkit.records import Sampling

PROMPTS, SEEDS = ["a red circle", "two blue rings on a gray background"], (5, 6)
SAMPLING = Sampling(steps=2, guidance_scale=3.0, height=16, width=16)


@pytest.fixture(params=["null entries", "missing folders"])
def without_t5(request, model_folders, tmp_path):
    """An SD3 folder without T5: saved so by diffusers, or with the folders removed."""
    folder = shutil.copytree(model_folders["flow"], tmp_path / "sd3")
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    if request.param == "null entries":
        index = json.loads((folder / "model_index.json").read_text())
        index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_sd3_without_t5(without_t5, caplog):
    """diffusers' own pixels and zeros in place of T5's states; only a missing folder gives a warning."""
    generator = load_generator(without_t5, device="cpu")
    is_missing = json.loads((without_t5 / "model_index.json").read_text())["tokenizer_3"][0] is not None
    assert ("text_encoder_3 of" in caplog.text) == is_missing
    pipeline = DiffusionPipeline.from_pretrained(without_t5, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    sources = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    arguments = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    expected = pipeline(PROMPTS, generator=sources, **arguments)[0]
    pixels = generator.generate(PROMPTS, SEEDS, SAMPLING)
    assert (pixels - expected).abs().max() <= 1e-4
    states = generator.encode_prompts(PROMPTS).tensors["encoder_hidden_states"]
    clip_tokens = generator.pipeline.tokenizer.model_max_length
    assert states[:, :clip_tokens].abs().max() > 0
    assert states.shape[1] > clip_tokens
    assert not states[:, clip_tokens:].any()
    with torch.no_grad():
        latents = denoise(generator, generator.encode_prompts(PROMPTS), SEEDS, SAMPLING)
    assert (generator.decode(latents) - pixels).abs().max() <= 1e-4
    assert set(generator.conditioner.encoders) == {"text_encoder", "text_encoder_2"}


def test_a_part_that_is_needed_stays_needed(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["flow"], tmp_path / "sd3")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(MissingFileError, match="text_encoder_2/"):
        load_generator(folder)
    (folder / "text_encoder_3" / "model.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"text_encoder_3/\*\.safetensors"):
        load_generator(folder)


def test_a_loaded_pipeline_becomes_a_generator(load):
    pipeline = tiny_families.build("flow")
    generator = wrap(pipeline)
    assert generator.pipeline is pipeline
    assert generator.net is pipeline.transformer
    assert type(generator) is type(load("flow"))
    expected = load("flow").generate(PROMPTS, SEEDS, SAMPLING)
    assert (generator.generate(PROMPTS, SEEDS, SAMPLING) - expected).abs().max() <= 1e-4
    assert wrap(pipeline, "mine").name == "mine"


def test_a_wrapped_pipeline_has_its_folders_name(model_folders):
    pipeline = DiffusionPipeline.from_pretrained(model_folders["unet"])
    assert wrap(pipeline).name == model_folders["unet"].name


# --- safety checkers ------------------------------------------------------------------------------------------------


def checker():
    """A safety checker that flags every image: each similarity is above a threshold of -2."""
    parts = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**parts, "image_size": 16, "patch_size": 8}
    made = StableDiffusionSafetyChecker(CLIPConfig(text_config=parts, vision_config=vision, projection_dim=8))
    made.concept_embeds_weights.data.fill_(-2)
    made.special_care_embeds_weights.data.fill_(-2)
    made.concept_embeds.data.normal_()
    made.special_care_embeds.data.normal_()
    return made


def checked_pipeline():
    parts = tiny_families.build("unet").components
    small = {"shortest_edge": 16}
    extractor = CLIPImageProcessorPil(size=small, crop_size={"height": 16, "width": 16})
    return StableDiffusionPipeline(**parts | {"safety_checker": checker(), "feature_extractor": extractor})


def test_images_are_not_blacked_out(load, tmp_path, caplog):
    """A folder is loaded without its safety checker; that of a user's pipeline is off while images are generated."""
    expected = load("unet").generate(PROMPTS, SEEDS, SAMPLING)
    pipeline = checked_pipeline()
    sources = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    blacked = pipeline(PROMPTS, generator=sources, num_inference_steps=1, height=16, width=16, output_type="pt")
    assert blacked.nsfw_content_detected == [True, True]
    assert not blacked[0].any()
    safety_checker = pipeline.safety_checker
    caplog.clear()
    assert (wrap(pipeline).generate(PROMPTS, SEEDS, SAMPLING) - expected).abs().max() <= 1e-4
    assert pipeline.safety_checker is safety_checker
    assert "safety" not in caplog.text
    pipeline.save_pretrained(tmp_path / "checked")
    generator = load_generator(tmp_path / "checked", device="cpu")
    assert generator.pipeline.safety_checker is None
    assert caplog.text.count("safety checker of") == 1
    assert (generator.generate(PROMPTS, SEEDS, SAMPLING) - expected).abs().max() <= 1e-4


def test_images_that_a_pipeline_replaces_are_refused(load, monkeypatch):
    generator = load("unet")
    monkeypatch.setattr(generator.pipeline, "run_safety_checker", lambda image, *_: (0 * image, [False, True]))
    message = rf"'unet': its pipeline replaced 1 of 2 images as unsafe.*\['{PROMPTS[1]}'\]"
    with pytest.raises(FlaggedError, match=message) as raised:
        generator.generate(PROMPTS, SEEDS, SAMPLING)
    again = pickle.loads(pickle.dumps(raised.value))  # workers of a ladder send it to their parent
    assert (str(again), again.flags, again.pixels.shape) == (str(raised.value), (False, True), (2, 3, 16, 16))


def test_pipelines_that_cannot_be_wrapped():
    pipeline = tiny_families.build("unet")
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    with pytest.raises(UnknownNameError, match=r"is a StableDiffusionImg2ImgPipeline, .*Known: .*add_a_generator"):
        wrap(other)
    with pytest.raises(ConfigError, match=r"a StableDiffusionPipeline takes no \['expert'\]"):
        wrap(pipeline, expert="transformer_2")

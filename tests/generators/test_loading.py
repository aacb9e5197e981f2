"""Pipelines with a component left out, and pipelines that the user has loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_families
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline

from alignkit.errors import ConfigError, MissingFileError, UnknownNameError
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


def test_pipelines_that_cannot_be_wrapped():
    pipeline = tiny_families.build("unet")
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    with pytest.raises(UnknownNameError, match=r"is a StableDiffusionImg2ImgPipeline, .*Known: .*add_a_generator"):
        wrap(other)
    with pytest.raises(ConfigError, match=r"a StableDiffusionPipeline takes no \['expert'\]"):
        wrap(pipeline, expert="transformer_2")

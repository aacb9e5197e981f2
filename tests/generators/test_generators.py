"""What one family shows for all: extras of the call, prediction types, records, and folders that cannot be used."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from alignkit.errors import AdapterError, ConfigError, DataError, MissingFileError, UnknownNameError
from alignkit.generators import load_generator
from alignkit.records import Conditioning, Sampling

PROMPTS = ["a red circle", "two blue rings on a gray background", "a cross above a ring"]
SAMPLING = Sampling(steps=3, guidance_scale=3.0, height=16, width=16, negative_prompt="a green square")


def test_sampling_extras_reach_the_pipeline(load):
    generator = load("flow")
    shifted = generator.generate(PROMPTS, (5, 6, 7), Sampling(**{**_fields(SAMPLING), "extra": {"mu": None}}))
    assert torch.equal(shifted, generator.generate(PROMPTS, (5, 6, 7), SAMPLING))
    with pytest.raises(ConfigError, match="'no_such_option' is no keyword of a StableDiffusion3Pipeline"):
        generator.generate(PROMPTS, (5, 6, 7), Sampling(**{**_fields(SAMPLING), "extra": {"no_such_option": 1}}))


def _fields(sampling):
    return json.loads(sampling.to_json())


def test_the_target_follows_the_schedulers_prediction_type(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["unet"], tmp_path / "v")
    config = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text()) | {"prediction_type": "v_prediction"}
    config.write_text(json.dumps(values))
    generator = load_generator(folder, device="cpu")
    rng = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=rng)
    t = generator.sample_t(2, rng)
    steps = (t * 1000).round().long() - 1
    theirs = generator.pipeline.scheduler.get_velocity(x0, noise, steps)
    torch.testing.assert_close(generator.target(x0, noise, t), theirs)


# --- conditioning records -------------------------------------------------------------------------------------------


def test_conditioning_drop_and_repeat():
    rows, null = torch.arange(12.0).reshape(3, 2, 2), -torch.ones(1, 2, 2)
    cond = Conditioning({"a": rows}, {"a": null})
    dropped = cond.drop(torch.tensor([True, False, True])).tensors["a"]
    assert torch.equal(dropped, torch.stack([null[0], rows[1], null[0]]))
    assert torch.equal(cond.unconditional().tensors["a"], null.expand(3, 2, 2))
    assert torch.equal(cond.repeat(2).tensors["a"], rows[[0, 0, 1, 1, 2, 2]])
    assert torch.equal(cond.rows([2, 0]).tensors["a"], rows[[2, 0]])
    assert len(cond) == 3
    assert torch.equal(cond.repeat(2).null["a"], null)


# --- folders that cannot be used ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("unet/diffusion_pytorch_model.safetensors", r"unet/\*.safetensors"),
        ("unet/config.json", "unet/config.json"),
        ("vae", "vae/"),
        ("tokenizer", "tokenizer/"),
        ("model_index.json", "model_index.json is missing"),
    ],
)
def test_an_incomplete_folder_names_what_is_missing(model_folders, tmp_path, gone, named):
    folder = shutil.copytree(model_folders["unet"], tmp_path / "m")
    target = folder / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(MissingFileError, match=named):
        load_generator(folder)


def test_every_missing_file_is_named_at_once(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["flow"], tmp_path / "m")
    shutil.rmtree(folder / "vae")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(folder / "transformer" / "part-1.safetensors")
    with pytest.raises(MissingFileError, match=r"incomplete, missing: transformer/part-2\.safetensors, vae/; copy it"):
        load_generator(folder)


def test_a_model_that_the_hub_does_not_give(monkeypatch):
    def offline(_):
        raise OSError("offline")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", offline)
    with pytest.raises(MissingFileError, match=r"cannot be read from the hub: check the name .* \(offline\)"):
        load_generator("org/name")


def test_other_unusable_folders(model_folders, tmp_path):
    with pytest.raises(MissingFileError, match="no model folder"):
        load_generator(tmp_path / "nowhere")
    folder = shutil.copytree(model_folders["unet"], tmp_path / "m")
    index = folder / "model_index.json"
    text = index.read_text()
    index.write_text(text.replace("StableDiffusionPipeline", "StableDiffusionZPipeline"))
    with pytest.raises(UnknownNameError, match=r"StableDiffusionZ.*Known: StableDiffusionPipeline, .*add_a_gen"):
        load_generator(folder)
    index.write_text(text[:40])
    with pytest.raises(DataError, match="no valid JSON"):
        load_generator(folder)


def test_no_reference_without_an_adapter(load):
    generator = load("unet")
    with (
        pytest.raises(AdapterError, match="neither an adapter nor a frozen copy; call `add_lora`"),
        generator.reference(),
    ):
        pass


def test_an_option_that_no_adapter_takes(model_folders):
    with pytest.raises(ConfigError, match=r"a WanPipeline takes no \['experts'\] among its options"):
        load_generator(model_folders["wan_high"], options={"experts": "transformer_2"})


def test_an_expert_that_is_not_there(model_folders):
    with pytest.raises(ConfigError, match="'wan' has no transformer_2"):
        load_generator(model_folders["wan"], options={"expert": "transformer_2"})


@pytest.mark.parametrize(("family", "low", "high"), [("wan_high", 0.875, 1.0), ("wan_low", 0.0, 0.875)])
def test_an_expert_is_trained_on_its_own_times(load, family, low, high):
    t = load(family).noise_schedule.sample_t(500, torch.Generator().manual_seed(0))
    assert t.shape == (500,)
    assert low <= t.min() < t.max() <= high


def test_the_guide_shows_the_adapter_as_it_is():
    root = Path(__file__).parents[2]
    source = (root / "alignkit/generators/families/z_image.py").read_text(encoding="utf-8")
    code = source.split("from __future__ import annotations\n\n")[1]
    assert code in (root / "docs/add_a_generator.md").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 100


def test_a_vae_that_overflows_in_half_precision(load, monkeypatch):
    """Told of once; codes in float32 from then on, and stays what it was for the pipeline."""
    generator = load("sdxl")
    expected = generator.encode(torch.ones(1, 3, 16, 16) / 2)
    vae = generator.pipeline.vae.half()
    real = type(vae).encode

    def encode(self, pixels):
        coded = real(self, pixels)
        if pixels.dtype == torch.float16:
            coded.latent_dist.mean = coded.latent_dist.mean + torch.inf
        return coded

    monkeypatch.setattr(type(vae), "encode", encode)
    with pytest.warns(UserWarning, match="the VAE of 'sdxl' overflows in float16"):
        first = generator.encode(torch.ones(1, 3, 16, 16) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = generator.encode(torch.ones(1, 3, 16, 16) / 2)
    torch.testing.assert_close(first, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(first, second)
    assert vae.dtype == torch.float16


@pytest.mark.parametrize("family", ["z_image", "anyflow"])
def test_times_and_lengths_survive_a_bf16_network(load, family, monkeypatch):
    """Cached conditioning is float32: nothing that counts may be rounded on its way to the network."""
    generator = load(family)
    generator.net.to(torch.bfloat16)
    prompt = "a " * 150
    shape = generator.latent_shape(16, 16, 5 if family == "anyflow" else 1)
    cond = generator.encode_prompts([prompt]).map(torch.Tensor.float)
    seen = []
    note = lambda _, args, named: seen.append((args, named))  # noqa: E731
    handle = generator.net.register_forward_pre_hook(note, with_kwargs=True)
    t, end = torch.tensor([0.999]), torch.tensor([0.9985])
    with torch.no_grad():
        generator.guided(generator.model, torch.zeros(1, *shape), (t, end), cond, 0.0)
    handle.remove()
    (args, named), *_ = seen
    if family == "anyflow":
        assert named["r_timestep"].flatten()[0].item() == pytest.approx(998.5)
    else:
        (states,) = args[2]
        told = generator.pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)[0][0]
        assert len(states) == len(told) > 300


def test_a_part_that_is_never_used_needs_neither_weights_nor_torchvision(model_folders, tmp_path):
    """DreamLite's published folders hold a multimodal processor, for editing."""
    folder = shutil.copytree(model_folders["dreamlite"], tmp_path / "published")
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen3VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "processor").mkdir()
    (folder / "processor" / "preprocessor_config.json").write_text("{}")
    assert load_generator(folder, device="cpu").pipeline.processor is None

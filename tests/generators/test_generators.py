"""A generator is the vanilla pipeline seen through a narrower door: same pictures, same conditioning, same latents."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from alignkit.errors import AdapterError, DataError, MissingFileError, UnknownNameError
from alignkit.generators import GENERATORS, load_generator
from alignkit.protocols import Generator
from alignkit.records import Conditioning, Sampling
from alignkit.resolve import resolve

FAMILIES = ["unet", "flow"]
PROMPTS = ["a red circle", "two blue rings on a gray background", "a cross above a ring"]
SAMPLING = Sampling(steps=3, guidance_scale=3.0, height=16, width=16, negative_prompt="a green square")


def vanilla(folder, **extra):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for part in {"unet", "vae"} & set(pipeline.components):
        pipeline.components[part].to(memory_format=torch.channels_last)  # another layout rounds differently
    return pipeline(
        prompt=PROMPTS,
        negative_prompt=["a green square"] * 3,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)],
        num_inference_steps=3,
        guidance_scale=3.0,
        height=16,
        width=16,
        output_type="pt",
        **extra,
    ).images


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def batch(generator, count=2):
    rng = torch.Generator().manual_seed(1)
    shape = (count, *generator.latent_shape(16, 16))
    x0, noise = (torch.randn(shape, generator=rng) for _ in range(2))
    return x0, noise, generator.sample_t(count, rng)


def test_every_family_in_the_table_fits_the_seam(load, family):
    assert isinstance(load(family), Generator)
    assert all(resolve(name, GENERATORS, kind="generator").component for name in GENERATORS)


def test_generate_is_the_vanilla_pipeline(load, family, model_folders):
    """Bit for bit: sampling is never ours."""
    extra = {"max_sequence_length": 16} if family == "flow" else {}
    pictures = load(family).generate(PROMPTS, (5, 6, 7), SAMPLING)
    assert torch.equal(pictures, vanilla(model_folders[family], **extra).float())
    assert pictures.shape == (3, 3, 16, 16)
    assert 0 <= pictures.min() < pictures.max() <= 1


def test_each_picture_depends_on_its_own_prompt_and_seed(load, family):
    """Alone or in company, whatever the global generator did before; other batch sizes round differently."""
    generator = load(family)
    together = generator.generate(PROMPTS, (5, 6, 7), SAMPLING)
    torch.manual_seed(99)
    alone = torch.cat([generator.generate([p], [s], SAMPLING) for p, s in zip(PROMPTS, (5, 6, 7), strict=True)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    other = generator.generate(PROMPTS[:1], [8], SAMPLING)
    assert (other - together[:1]).abs().max() > 0.01


def test_sampling_extras_reach_the_pipeline(load):
    generator = load("flow")
    shifted = generator.generate(PROMPTS, (5, 6, 7), Sampling(**{**_fields(SAMPLING), "extra": {"mu": None}}))
    assert torch.equal(shifted, generator.generate(PROMPTS, (5, 6, 7), SAMPLING))
    with pytest.raises(TypeError, match="no_such_option"):
        generator.generate(PROMPTS, (5, 6, 7), Sampling(**{**_fields(SAMPLING), "extra": {"no_such_option": 1}}))


def _fields(sampling):
    return json.loads(sampling.to_json())


def test_sampling_leaves_the_training_mode_as_it_was(load, family):
    generator = load(family)
    generator.net.train()
    generator.generate(PROMPTS[:1], [5], SAMPLING)
    assert generator.net.training


def test_conditioning_is_the_pipelines(load, family):
    generator = load(family)
    cond = generator.encode_prompts(PROMPTS)
    if family == "unet":
        rows, _ = generator.pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)
        assert torch.equal(cond.tensors["encoder_hidden_states"], rows)
        assert set(cond.tensors) == {"encoder_hidden_states"}
    else:
        rows, _, pooled, _ = generator.pipeline.encode_prompt(
            PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False, max_sequence_length=16
        )
        assert torch.equal(cond.tensors["encoder_hidden_states"], rows)
        assert torch.equal(cond.tensors["pooled_projections"], pooled)
    empty = generator.encode_prompts([""])
    assert all(torch.equal(cond.null[name], empty.tensors[name]) for name in cond.tensors)


def test_conditioning_carries_gradients(load, family):
    generator = load(family)
    tower = generator.pipeline.text_encoder
    sum(tensor.sum() for tensor in generator.encode_prompts(PROMPTS).tensors.values()).backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in tower.parameters())


def test_codec_scale_and_shift(load, family):
    """latents = (posterior mode - shift) * scale, as diffusers' own training scripts have it, and back."""
    generator = load(family)
    vae, pixels = generator.pipeline.vae, torch.rand(2, 3, 16, 16)
    shift = {"unet": 0.0, "flow": 0.1}[family]
    with torch.no_grad():
        raw = vae.encode(pixels * 2 - 1).latent_dist.mode()
        latents = generator.encode(pixels)
        torch.testing.assert_close(latents, (raw - shift) * 0.7)
        expected = (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(generator.decode(latents), expected, rtol=0, atol=1e-5)
    assert tuple(latents.shape[1:]) == generator.latent_shape(16, 16)


def test_codec_is_differentiable(load, family):
    generator = load(family)
    pixels = torch.rand(1, 3, 16, 16, requires_grad=True)
    generator.decode(generator.encode(pixels)).sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_a_perfect_predictor_has_no_error(load, family):
    """The network that returned the target would give the picture back: x_t - sigma * eps or x_t - t * u."""
    generator = load(family)
    x0, noise, t = batch(generator)
    x_t, target = generator.add_noise(x0, noise, t), generator.target(x0, noise, t)
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in generator.noise_schedule.coefficients(t))
    clean = (x_t - sigma * target) / (alpha if family == "unet" else 1)
    torch.testing.assert_close(clean, x0, rtol=1e-3, atol=1e-3)


def test_predict_is_the_network_at_its_own_time(load, family):
    generator = load(family)
    x0, noise, _ = batch(generator)
    t = torch.tensor([0.25, 0.5])
    cond = generator.encode_prompts(PROMPTS[:2])
    with torch.no_grad():
        ours = generator.predict(generator.add_noise(x0, noise, t), t, cond)
        x_t = generator.add_noise(x0, noise, t)
        times = torch.tensor([249, 499]) if family == "unet" else torch.tensor([250.0, 500.0])
        theirs = generator.net(x_t, timestep=times, **cond.tensors).sample
    assert torch.equal(ours, theirs)


def test_the_target_follows_the_schedulers_prediction_type(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["unet"], tmp_path / "v")
    config = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(config.read_text()) | {"prediction_type": "v_prediction"}
    config.write_text(json.dumps(values))
    generator = load_generator(folder, device="cpu")
    x0, noise, t = batch(generator)
    steps = (t * 1000).round().long() - 1
    theirs = generator.pipeline.scheduler.get_velocity(x0, noise, steps)
    torch.testing.assert_close(generator.target(x0, noise, t), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float32_inputs_meet_a_network_of_another_precision(load, family, dtype):
    generator = load(family)
    x0, noise, t = batch(generator)
    cond = generator.encode_prompts(PROMPTS[:2])
    generator.net.to(dtype)
    with torch.no_grad():
        assert generator.predict(generator.add_noise(x0, noise, t), t, cond).dtype == dtype


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


def test_other_unusable_folders(model_folders, tmp_path):
    with pytest.raises(MissingFileError, match="no model folder"):
        load_generator(tmp_path / "nowhere")
    folder = shutil.copytree(model_folders["unet"], tmp_path / "m")
    index = folder / "model_index.json"
    text = index.read_text()
    index.write_text(text.replace("StableDiffusionPipeline", "StableDiffusionXLPipeline"))
    with pytest.raises(UnknownNameError, match=r"StableDiffusionXLPipeline.*Did you mean 'StableDiffusion"):
        load_generator(folder)
    index.write_text(text[:40])
    with pytest.raises(DataError, match="no valid JSON"):
        load_generator(folder)


def test_no_reference_without_an_adapter(load):
    generator = load("unet")
    with pytest.raises(AdapterError, match="neither an adapter nor a frozen copy"), generator.reference():
        pass

"""What every family must show: it is the vanilla pipeline seen through a narrower door.

Same pictures, same conditioning, same latents, same calls of the network, and adapters that others can load.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import tiny_families
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from tiny_families import FAMILIES, kl_codec

from alignkit.adapters import lora
from alignkit.diffusion.conversions import convert, split
from alignkit.diffusion.schedules import expand
from alignkit.generators import GENERATORS
from alignkit.protocols import ImageSource
from alignkit.records import Sampling
from alignkit.resolve import resolve

PROMPTS = ["a red circle", "two blue rings on a gray background", "a cross above a ring"]
SEEDS = (5, 6, 7)
CLOSE = 1e-4  # largest pixel difference, float32


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


def sampling(family, **changes):
    side, frames = FAMILIES[family].side, FAMILIES[family].frames or 1
    size = {"height": side, "width": side, "num_frames": frames}
    return Sampling(**{"steps": 3, "guidance_scale": 3.0, **size, **changes})


def open_pipeline(folder, family):
    return DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(FAMILIES[family].without))


def vanilla(folder, family, prompts=PROMPTS, *, pipeline=None, **extra):
    """The pipeline's own pictures, one prompt after the other where it takes no more."""
    pipeline = pipeline or open_pipeline(folder, family)
    pipeline.set_progress_bar_config(disable=True)
    for part in {"unet", "vae"} & set(pipeline.components):
        if all(weight.dim() < 5 for weight in pipeline.components[part].parameters()):
            pipeline.components[part].to(memory_format=torch.channels_last)  # another layout rounds differently
    side, frames = FAMILIES[family].side, FAMILIES[family].frames
    arguments = {
        "prompt": list(prompts),
        "generator": [torch.Generator().manual_seed(seed) for seed in SEEDS[: len(prompts)]],
        "num_inference_steps": 3,
        "height": side,
        "width": side,
        "output_type": "pt",
        **({"num_frames": frames} if frames else {}),
        "true_cfg_scale" if family == "qwen_image" else "guidance_scale": 3.0,
        **FAMILIES[family].arguments,
        **extra,
    }
    if FAMILIES[family].alone:
        each = ("prompt", "generator", "negative_prompt")
        rows = [
            {key: value[i] if key in each else value for key, value in arguments.items()} for i in range(len(prompts))
        ]
        return torch.cat([pipeline(**row)[0] for row in rows]).float()
    return pipeline(**arguments)[0].float()


def latent_shape(generator, family):
    side = FAMILIES[family].side
    return generator.latent_shape(side, side, FAMILIES[family].frames or 1)


def clips(family, count=2):
    """Random pixels of the family's size."""
    side, frames = FAMILIES[family].side, FAMILIES[family].frames
    return torch.rand(count, *([frames] if frames else []), 3, side, side)


def batch(generator, family, count=2):
    rng = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, count, *latent_shape(generator, family), generator=rng)
    return x0, noise, generator.sample_t(count, rng)


def test_every_pipeline_in_the_table_is_tried_here():
    tried = {type(tiny_families.FAMILIES[name].build()).__name__ for name in FAMILIES}
    assert tried == set(GENERATORS)
    assert all(resolve(name, GENERATORS, kind="generator").component for name in GENERATORS)


# --- sampling -------------------------------------------------------------------------------------------------------


def test_generate_is_the_vanilla_pipeline(load, family, model_folders):
    """Bit for bit: sampling is never ours."""
    generator = load(family)
    assert isinstance(generator, ImageSource)
    pictures = generator.generate(PROMPTS, SEEDS, sampling(family))
    assert torch.equal(pictures, vanilla(model_folders[family], family))
    assert pictures.shape == clips(family, 3).shape
    assert 0 <= pictures.min() < pictures.max() <= 1


def test_a_negative_prompt_reaches_the_pipeline(load, family, model_folders):
    told = sampling(family, negative_prompt="a green square")
    pictures = load(family).generate(PROMPTS, SEEDS, told)
    assert torch.equal(pictures, vanilla(model_folders[family], family, negative_prompt=["a green square"] * 3))


def test_each_picture_depends_on_its_own_prompt_and_seed(load, family):
    """Alone or in company, whatever the global generator did before; other batch sizes round differently."""
    generator, told = load(family), sampling(family)
    together = generator.generate(PROMPTS, SEEDS, told)
    torch.manual_seed(99)
    alone = torch.cat([generator.generate([p], [s], told) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    torch.testing.assert_close(alone, together, rtol=0, atol=CLOSE)
    other = generator.generate(PROMPTS[:1], [8], told)
    assert (other - together[:1]).abs().max() > 0.01


def test_sampling_leaves_the_training_mode_as_it_was(load, family):
    generator = load(family)
    generator.net.train()
    generator.generate(PROMPTS[:1], [5], sampling(family))
    assert generator.net.training


# --- conditioning ---------------------------------------------------------------------------------------------------


def test_conditioning_is_the_pipelines(load, family):
    generator = load(family)
    ours, theirs = generator.encode_prompts(PROMPTS), FAMILIES[family].texts(generator.pipeline, PROMPTS)
    assert set(ours.tensors) == set(theirs) == set(ours.null)
    assert all(torch.equal(ours.tensors[name], theirs[name]) for name in theirs)
    assert all(ours.null[name].shape == (1, *theirs[name].shape[1:]) for name in theirs)


def test_conditioning_carries_gradients(load, family):
    """To the encoders that are trained, and to no other part of the pipeline."""
    generator = load(family)
    assert not any(tensor.requires_grad for tensor in generator.encode_prompts(PROMPTS).tensors.values())
    generator.conditioner.unfreeze(["text_encoder"])
    states = generator.encode_prompts(PROMPTS).tensors.values()
    sum(tensor.sum() for tensor in states if tensor.is_floating_point()).backward()
    trained = dict(generator.pipeline.text_encoder.named_parameters())
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained.values())
    frozen = [part for name, part in generator.conditioner.encoders.items() if name != "text_encoder"]
    parts = [*frozen, generator.net]
    assert all(parameter.grad is None for part in parts for parameter in part.parameters())


# --- codec ----------------------------------------------------------------------------------------------------------


def test_codec_scale_and_shift(load, family):
    """The latents that the family's network was trained on, and back."""
    generator, pixels = load(family), clips(family)
    with torch.no_grad():
        expected, picture = (FAMILIES[family].codec or kl_codec())(generator.pipeline, pixels)
        latents = generator.encode(pixels)
        torch.testing.assert_close(latents, expected)
        torch.testing.assert_close(generator.decode(latents), (picture / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert tuple(latents.shape[1:]) == latent_shape(generator, family)


def test_codec_is_differentiable(load, family):
    generator, pixels = load(family), clips(family).requires_grad_()
    generator.decode(generator.encode(pixels)).sum().backward()
    assert pixels.grad.abs().sum() > 0


# --- network --------------------------------------------------------------------------------------------------------


def calls_of(net):
    """Records the network's calls by argument name, in whatever way it is called."""
    seen = []

    def note(module, given, named):
        names = [name for name in inspect.signature(module.forward).parameters if name not in named]
        seen.append(copy.deepcopy({**dict(zip(names, given, strict=False)), **named}))

    return seen, net.register_forward_pre_hook(note, with_kwargs=True)


def flat(arguments, prefix=""):
    for name, value in arguments.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield from flat({str(index): entry for index, entry in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield prefix + name, value


def test_the_network_is_called_as_the_pipeline_does(load, family):
    """The pipeline's first call, without classifier-free guidance, and ours on the same noise: equal inputs.

    Packing, size embeddings, time scales, masks and embedded guidance are all in it.
    """
    generator, kind = load(family), FAMILIES[family]
    prompts = PROMPTS[:1] if kind.alone else PROMPTS
    seen, handle = calls_of(generator.net)
    generator.generate(prompts, SEEDS[: len(prompts)], sampling(family, guidance_scale=kind.guidance))
    theirs = {name: value[1:] if kind.alone else value for name, value in flat(seen[0])}  # [negative, prompt]
    seen.clear()
    shape = latent_shape(generator, family)
    grid = generator.grid(3, shape)
    noise = [generator.initial_noise(shape, torch.Generator().manual_seed(seed)) for seed in SEEDS[: len(prompts)]]
    x_t = theirs["hidden_states"] if kind.late else torch.cat(noise)
    times = grid.times(int((grid.t < 0.875).nonzero()[0]) if kind.late else 0, x_t)
    with torch.no_grad():
        cond = generator.encode_prompts(prompts)
        prediction = generator.guided(generator.model, x_t, times, cond, kind.guidance)
    handle.remove()
    ours = dict(flat(seen[0]))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].float(), value.float().expand_as(ours[name]), rtol=1e-6, atol=0, msg=name)
    assert prediction.shape == x_t.shape
    if family != "anyflow":  # there `predict` is told one time, a solver two
        with torch.no_grad():
            assert torch.equal(generator.predict(x_t, times[0], cond), prediction)


def test_a_perfect_predictor_has_no_error(load, family):
    """The network that returned the target would give picture and noise back, whatever its prediction is."""
    generator = load(family)
    x0, noise, _ = batch(generator, family, 3)
    t = torch.tensor([0.1, 0.5, 0.9])
    x_t, target = generator.add_noise(x0, noise, t), generator.target(x0, noise, t)
    alpha, sigma = (expand(value, x0) for value in generator.noise_schedule.coefficients(t))
    clean, implied = split(generator.prediction, target, x_t, alpha, sigma)
    torch.testing.assert_close(clean, x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(implied, noise, rtol=1e-2, atol=1e-2)
    back = convert("sample", generator.prediction, clean, x_t, alpha, sigma)
    torch.testing.assert_close(back, target, rtol=1e-2, atol=1e-2)


def test_noise_is_added_as_the_scheduler_does(load, family):
    generator = load(family)
    x0, noise, _ = batch(generator, family)
    scheduler = generator.pipeline.scheduler
    if generator.prediction == "flow":
        t = scheduler.timesteps[[200, 700]] / 1000
        theirs = scheduler.scale_noise(x0, scheduler.timesteps[[200, 700]], noise)
    else:
        t = torch.tensor([0.2, 0.7])
        theirs = scheduler.add_noise(x0, noise, torch.tensor([199, 699]))
        if "sigmas" in vars(scheduler):  # k-diffusion's form, x0 + sigma eps, scaled before each call
            _, sigma = generator.noise_schedule.coefficients(t)
            alpha = (1 - sigma**2).sqrt()
            theirs = theirs * expand(alpha, theirs)
    torch.testing.assert_close(generator.add_noise(x0, noise, t).to(theirs), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_float32_inputs_meet_a_network_of_another_precision(load, family, dtype):
    generator = load(family)
    x0, noise, t = batch(generator, family)
    cond = generator.encode_prompts(PROMPTS[:2])
    generator.net.to(dtype)
    with torch.no_grad():
        assert generator.predict(generator.add_noise(x0, noise, t), t, cond).dtype == dtype


# --- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(load, family):
    """A generator with an adapter whose alpha is not its rank and that changes pictures."""
    generator = load(family)
    generator.add_lora(rank=3, alpha=7.0, targets=None, dropout=0.0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in generator.net.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return generator


def test_lora_is_in_every_block(tuned):
    """Every block of attention, whichever list of the network it stands in."""
    kinds = ("Attention", "JointTransformerBlock", "FluxSingleTransformerBlock", "FluxTransformerBlock")
    blocks = [module for module in tuned.net.modules() if type(module).__name__.endswith(kinds)]
    assert blocks
    assert all(lora.lora_layers(block) for block in blocks)


def test_reference_is_the_base_model(load, tuned, family):
    x0, noise, t = batch(tuned, family)
    cond, base = tuned.encode_prompts(PROMPTS[:2]), load(family)
    with torch.no_grad(), tuned.reference():
        assert torch.equal(tuned.predict(x0 + noise, t, cond), base.predict(x0 + noise, t, cond))
    with torch.no_grad():
        assert not torch.equal(tuned.predict(x0 + noise, t, cond), base.predict(x0 + noise, t, cond))


def test_others_load_the_export(tuned, family, model_folders, tmp_path):
    """The vanilla pipeline, or PEFT where it has no LoRA loader, draws the tuned picture; so do the merged weights."""
    tuned.save_adapter(tmp_path / "adapter")
    pipeline = open_pipeline(model_folders[family], family)
    base = vanilla(None, family, pipeline=pipeline)
    if tuned.component in getattr(pipeline, "_lora_loadable_modules", ()):
        pipeline.load_lora_weights(tmp_path / "adapter", **FAMILIES[family].loading)
    else:
        net = PeftModel.from_pretrained(pipeline.components[tuned.component], tmp_path / "adapter" / "peft")
        pipeline.register_modules(**{tuned.component: net.merge_and_unload()})
    picture = tuned.generate(PROMPTS, SEEDS, sampling(family))
    assert (vanilla(None, family, pipeline=pipeline) - picture).abs().max() <= CLOSE
    assert (picture - base).abs().max() > 20 * CLOSE
    tuned.save_merged(tmp_path / "merged")
    assert (vanilla(tmp_path / "merged", family) - picture).abs().max() <= CLOSE

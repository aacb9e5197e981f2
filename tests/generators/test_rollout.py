"""The differentiable chain draws the vanilla pipeline's picture, and its gradients are those of the plain chain."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from tiny_families import FAMILIES

from alignkit.errors import ConfigError
from alignkit.generators.rollout import denoise
from alignkit.records import Sampling

PROMPTS = ["a red circle", "two blue rings on a gray background"]
SEEDS = (5, 6)
CLOSE = 1e-4  # largest pixel difference, float32


def sampling(family, **changes):
    kind = FAMILIES[family]
    size = {"height": kind.side, "width": kind.side, "num_frames": kind.frames or 1}
    return Sampling(**{"steps": 3, "guidance_scale": 3.0, **size, **changes})


def drawn(generator, told):
    with torch.no_grad():
        latents = denoise(generator, generator.encode_prompts(PROMPTS), SEEDS, told)
        return generator.decode(latents)


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return request.param


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 1.0}, {"negative_prompt": "a green square"}])
def test_a_chain_is_the_pipelines_picture(load, family, changes):
    """With and without guidance, and away from a negative prompt."""
    generator, told = load(family), sampling(family, **changes)
    picture = generator.generate(PROMPTS, SEEDS, told)
    assert (drawn(generator, told) - picture).abs().max() <= CLOSE


def test_checkpointing_changes_no_gradient(load, family):
    """Of network and conditioning; the conditioning's is what a text encoder is tuned with."""
    ends = []
    for checkpointed in (False, True):
        generator = load(family)
        torch.manual_seed(0)
        generator.add_lora(rank=2, alpha=None, targets=None, dropout=0.0)
        weights = [weight for name, weight in generator.net.named_parameters() if "lora_B" in name]
        generator.conditioner.unfreeze()
        cond = generator.encode_prompts(PROMPTS)
        latents = denoise(generator, cond, SEEDS, sampling(family, steps=2), checkpointed=checkpointed)
        states = cond.tensors["encoder_hidden_states"]
        ends.append(torch.autograd.grad(latents.square().sum(), [*weights, states], allow_unused=True))
    assert sum(grad is not None and bool(grad.abs().sum() > 0) for grad in ends[0]) > 0.6 * len(ends[0])
    assert ends[0][-1].abs().sum() > 0
    for plain, repeated in zip(*ends, strict=True):
        assert (plain is None) == (repeated is None)
        if plain is not None:
            torch.testing.assert_close(plain, repeated, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (DDIMScheduler, {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}),
        (DDIMScheduler, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
        (EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
        (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_other_spacings(load, kind, changes, prediction):
    """Steps, ends and the first noise's size are the scheduler's own, for eps and v."""
    generator = load("unet")
    if prediction == "epsilon" and changes.get("rescale_betas_zero_snr"):
        pytest.skip("eps says nothing where there is no signal")
    config = {**generator.pipeline.scheduler.config, "prediction_type": prediction, **changes}
    generator.pipeline.scheduler = kind.from_config(config)
    generator.prediction = prediction
    generator.noise_schedule = type(generator.noise_schedule)(generator.pipeline.scheduler.alphas_cumprod)
    told = sampling("unet", steps=4)
    picture = generator.generate(PROMPTS, SEEDS, told)
    assert (drawn(generator, told) - picture).abs().max() <= CLOSE


def test_another_solver_gets_the_first_order_step(load):
    """PNDM, which Stable Diffusion comes with: the chain is DDIM's on its config."""
    generator, told = load("unet"), sampling("unet")
    config = dict(generator.pipeline.scheduler.config)
    generator.pipeline.scheduler = DDIMScheduler.from_config(config, timestep_spacing="leading")
    expected = drawn(generator, told)
    generator.pipeline.scheduler = PNDMScheduler.from_config(config, timestep_spacing="leading")
    assert torch.equal(drawn(generator, told), expected)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}, "leading or trailing"),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}, "leading or trailing"),
        (DDIMScheduler, {"clip_sample": True}, "clips samples"),
    ],
)
def test_what_no_chain_can_follow_is_an_error(load, kind, changes, message):
    generator = load("unet")
    generator.pipeline.scheduler = kind.from_config({**generator.pipeline.scheduler.config, **changes})
    with pytest.raises(ConfigError, match=message):
        drawn(generator, sampling("unet", steps=5))


def test_clips_have_one_frame_more_than_a_multiple(load):
    with pytest.raises(ConfigError, match=r"num_frames is 6; 'wan' takes 1 \+ 4 k: 5 or 9"):
        load("wan").latent_shape(16, 16, 6)

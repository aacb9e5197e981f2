"""Pairs of latents from a tiny Wan: against diffusers' video-to-video pipeline, and what a pair depends on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import tiny_families
import torch
from clips import frames
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanVideoToVideoPipeline
from PIL import Image
from tiny_families.parts import TOKENS
from tiny_families.videos import VIDEOS

from alignkit.errors import ConfigError, NumericsError
from alignkit.generators import wrap
from alignkit.generators.pairs import RolloutPairs, start_of
from alignkit.generators.rollout import denoise
from alignkit.pairs import PairMaker, PairRequest
from alignkit.records import Sampling

SAMPLING = Sampling(steps=6, guidance_scale=3.0, height=16, width=16, num_frames=5)
CLIP = frames(5, 16, 16)
TOLERANCE = 2e-6  # relative, of latents in float32 against diffusers at equal sigmas


@pytest.fixture(scope="module")
def wan():
    return tiny_families.build("wan")


@pytest.fixture(scope="module")
def maker(wan):
    return RolloutPairs(wrap(wan, "tiny"), SAMPLING)


def request_with(**changes):
    return PairRequest(**{"prompt": "two red rings", "seeds": (5, 6), "etas": (0.7, 0.7), **changes})


def diffusers_latents(wan, seed, strength, sampling=SAMPLING):
    """Of the video-to-video pipeline, which gets the text states of the plain one: its own encoding needs `ftfy`."""
    parts = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipeline = WanVideoToVideoPipeline(**{name: wan.components[name] for name in parts})
    pipeline.set_progress_bar_config(disable=True)
    states = [
        wan.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=TOKENS)[0]
        for text in ("two red rings", sampling.negative_prompt)
    ]
    return pipeline(
        video=[Image.fromarray(picture) for picture in CLIP],
        prompt_embeds=states[0],
        negative_prompt_embeds=states[1],
        height=16,
        width=16,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        strength=strength,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames


def relative(first, second):
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("strength", [0.2, 0.7, 0.99])
def test_step_index_is_the_strength_of_diffusers(wan, maker, strength):
    """Each copy is the video-to-video pipeline's own result for its seed; the VAE's rounding is in it too."""
    pair = maker.make(request_with(etas=(strength, strength), meaning="step_index"), CLIP)
    for seed, copy in zip((5, 6), pair.latents, strict=True):
        assert relative(copy, diffusers_latents(wan, seed, strength)[0]) < TOLERANCE
    grid = maker.generator.grid(6, (4, 2, 4, 4))
    assert pair.sigma_starts == (float(grid.sigma[6 - int(6 * strength)]),) * 2


def test_sigma_on_the_grid_is_the_same_chain(wan, maker):
    """At equal sigmas the two meanings agree with each other and with diffusers."""
    sigma = float(maker.generator.grid(6, (4, 2, 4, 4)).sigma[2])
    pair = maker.make(request_with(etas=(sigma, sigma)), CLIP)
    assert pair.sigma_starts == (pytest.approx(sigma, abs=1e-7),) * 2
    assert relative(pair.latents[0], diffusers_latents(wan, 5, 4 / 6 + 1e-6)[0]) < TOLERANCE


def test_negative_prompts_are_those_of_diffusers(wan):
    sampling = Sampling(
        steps=4, guidance_scale=4.0, height=16, width=16, num_frames=5, negative_prompt="three green crosses"
    )
    pair = RolloutPairs(wrap(wan), sampling).make(request_with(etas=(0.5, 0.5), meaning="step_index"), CLIP)
    assert relative(pair.latents[0], diffusers_latents(wan, 5, 0.5, sampling)[0]) < TOLERANCE


def test_sigma_between_two_steps_is_the_start_itself(maker):
    """The formula written out: noise to sigma, one Euler step to the next sigma of the grid, then the grid's steps."""
    generator, eta = maker.generator, 0.7
    grid = generator.grid(6, (4, 2, 4, 4))
    rest = grid.sigma[grid.sigma < eta]
    assert len(rest)
    assert not torch.isclose(grid.sigma, torch.tensor(eta)).any()
    sigmas = torch.cat([torch.tensor([eta]), rest, torch.zeros(1)])
    pixels = torch.from_numpy(CLIP).permute(0, 3, 1, 2)[None] / 255
    with torch.no_grad():
        noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(6))
        x = (1 - eta) * generator.encode(pixels) + eta * noise
        cond = generator.encode_prompts(["two red rings"])
        for now, then in itertools.pairwise(sigmas):
            velocity, free = (generator.predict(x, now[None], c) for c in (cond, cond.unconditional()))
            x = x + (then - now) * (free + 3.0 * (velocity - free))
    pair = maker.make(request_with(), CLIP)
    assert pair.sigma_starts == (pytest.approx(0.7, abs=1e-7),) * 2
    assert relative(pair.latents[1:], x) < TOLERANCE


def test_a_start_below_the_last_step_is_one_step_to_the_end(maker):
    grid = maker.generator.grid(6, (4, 2, 4, 4))
    tail = start_of(grid, 0.005, "sigma")
    assert [float(value) for value in (tail.sigma[0], tail.sigma_next[0], tail.t[0])] == pytest.approx(
        [0.005, 0, 0.005]
    )
    assert len(start_of(grid, 0.999999, "sigma")) == 6
    with pytest.raises(ConfigError, match=r"eta 0.1 of 6 steps leaves no step"):
        start_of(grid, 0.1, "step_index")


def test_discrete_times_start_at_the_next_step():
    """CogVideoX's times are training steps: the start lies at or below eta, and the row says where."""
    maker = RolloutPairs(wrap(tiny_families.build("cogvideox")), SAMPLING)
    pair = maker.make(request_with(etas=(0.8, 0.8)), CLIP)
    grid = maker.generator.grid(6, maker.generator.latent_shape(16, 16, 5))
    assert pair.sigma_starts[0] == float(grid.from_sigma(0.8).sigma[0]) <= 0.8
    assert pair.latents.shape == (2, *maker.generator.latent_shape(16, 16, 5))


@pytest.mark.parametrize("family", VIDEOS)
@pytest.mark.parametrize("meaning", ["sigma", "step_index"])
def test_every_video_family_makes_pairs(family, meaning):
    """With as many frames as asked for, for each of the first valid numbers of frames of the family's codec."""
    generator = wrap(tiny_families.build(family))
    for count in (1 + generator.frame_step, 1 + 2 * generator.frame_step):
        maker = RolloutPairs(generator, replace(SAMPLING, steps=4, num_frames=count, height=32, width=32))
        pair = maker.make(request_with(meaning=meaning, etas=(0.9, 0.9)), frames(count, 32, 32))
        assert maker.decode(pair.latents).shape == (2, count, 32, 32, 3)
        assert not torch.equal(*pair.latents)
    with pytest.raises(ConfigError, match=rf"takes 1 \+ {generator.frame_step} k"):
        RolloutPairs(generator, replace(SAMPLING, num_frames=2 + generator.frame_step))


def test_latent_frames_that_are_decoded_in_pairs():
    """CogVideoX decodes an even number of latent frames to other frames than were encoded: such clips are refused."""
    generator = wrap(tiny_families.build("cogvideox"))
    vae = generator.pipeline.vae
    assert generator.frame_step == generator.temporal_ratio * vae.num_latent_frames_batch_size == 4
    with torch.no_grad():
        assert vae.decode(torch.zeros(1, 4, 2, 4, 4)).sample.shape[2] == 4  # of three frames
    with pytest.raises(ConfigError, match=r"num_frames is 3; .* takes 1 \+ 4 k: 1 or 5"):
        generator.latent_shape(16, 16, 3)


def test_what_a_pair_depends_on(maker):
    """Equal requests give equal bits, whatever came between; each copy depends on its own seed."""
    first = maker.make(request_with(), CLIP).latents
    other = maker.make(request_with(seeds=(5, 7)), CLIP).latents
    again = maker.make(request_with(), CLIP).latents
    assert torch.equal(first, again)
    assert torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[0], first[1])
    assert not first.requires_grad


def test_weights_and_schedule_are_all_that_the_latents_depend_on(maker):
    """Another shift of the schedule, another number of steps, the other expert of a model of two."""
    found = {maker.schedule, RolloutPairs(maker.generator, replace(SAMPLING, steps=7)).schedule}
    shifted = tiny_families.build("wan")
    shifted.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    other = RolloutPairs(wrap(shifted, "tiny"), SAMPLING)
    assert other.weights == maker.weights
    assert len({*found, other.schedule}) == 3
    experts = tiny_families.build("wan_high")
    before = RolloutPairs(wrap(experts, "tiny"), SAMPLING).weights
    with torch.no_grad():
        next(experts.transformer_2.parameters()).add_(1)
    assert RolloutPairs(wrap(experts, "tiny"), SAMPLING).weights != before


def test_lower_eta_keeps_more_of_the_real_clip(maker):
    pixels = torch.from_numpy(CLIP).permute(0, 3, 1, 2)[None] / 255
    with torch.no_grad():
        clean = maker.generator.encode(pixels)
    distances = [
        float((maker.make(request_with(etas=(eta, eta)), CLIP).latents - clean).norm()) for eta in (0.1, 0.5, 0.9)
    ]
    assert distances == sorted(distances)


def test_full_generations_real_clips_and_different_etas(maker):
    """eta 1 is `denoise` of the same seeds, eta 0 the real clip; copies of different etas are chains of their own."""
    full = maker.make(request_with(etas=(1.0, 1.0)), None)
    cond = maker.generator.encode_prompts(["two red rings"] * 2)
    with torch.no_grad():
        expected = denoise(maker.generator, cond, (5, 6), SAMPLING)
        clean = maker.generator.encode(torch.from_numpy(CLIP).permute(0, 3, 1, 2)[None] / 255)
    assert torch.equal(full.latents, expected)
    assert full.sigma_starts == (1.0, 1.0)
    mixed = maker.make(request_with(etas=(0.0, 0.7)), CLIP)
    assert torch.equal(mixed.latents[:1], clean)
    assert relative(mixed.latents[1], maker.make(request_with(), CLIP).latents[1]) < TOLERANCE  # another batch size
    assert mixed.sigma_starts == (0.0, pytest.approx(0.7))
    with pytest.raises(ConfigError, match="needs one"):
        maker.make(request_with(), None)


def test_decoded_clips_are_the_codecs(maker):
    pair = maker.make(request_with(), CLIP)
    with torch.no_grad():
        pixels = maker.generator.decode(pair.latents)
    shown = maker.decode(pair.latents)
    assert shown.shape == (2, 5, 16, 16, 3)
    assert np.abs(shown - pixels.movedim(2, -1).numpy() * 255).max() <= 0.51
    assert isinstance(maker, PairMaker)


def test_a_second_order_scheduler_gives_first_order_pairs(wan, maker):
    """UniPC, Wan's own default, is replaced by Euler with its shift; diffusers itself then differs, visibly."""
    pipeline = tiny_families.build("wan")
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    chosen = request_with(etas=(0.7, 0.7), meaning="step_index")
    ours = RolloutPairs(wrap(pipeline), SAMPLING).make(chosen, CLIP).latents[0]
    theirs = diffusers_latents(pipeline, 5, 0.7)[0]
    assert relative(ours, maker.make(chosen, CLIP).latents[0]) < 1e-2  # sigmas of the two schedulers differ a little
    assert 1e-4 < relative(ours, theirs) < 0.2


def test_what_makes_no_pairs(wan):
    with pytest.raises(ConfigError, match="makes images"):
        RolloutPairs(wrap(tiny_families.build("unet")), Sampling())
    with pytest.raises(ConfigError, match=r"sampling\.extra: max_sequence_length"):
        RolloutPairs(wrap(wan), Sampling(num_frames=5, extra={"max_sequence_length": 4}))
    with pytest.raises(ConfigError, match="num_frames is 6"):
        RolloutPairs(wrap(wan), Sampling(num_frames=6))
    broken = RolloutPairs(wrap(tiny_families.build("wan")), SAMPLING)
    with torch.no_grad():
        next(broken.generator.net.parameters()).fill_(torch.nan)
    with pytest.raises(NumericsError, match="NaN or infinite latents for 'two red rings'"):
        broken.make(request_with(), CLIP)

"""What a generator refuses to sample with, before it generates."""

from __future__ import annotations

import pytest
import tiny_families

from alignkit.errors import ConfigError
from alignkit.generators.families.ltx_video import LTXVideo
from alignkit.generators.frames import require_known_frames
from alignkit.protocols import require_sampling
from alignkit.records import Sampling

GOOD = {"steps": 1, "height": 16, "width": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": {"eat": 0.5}}, "'eat' is no keyword of a StableDiffusionPipeline.*Did you mean 'eta'"),
        ({"extra": {"generator": 1}}, "'generator' is no keyword"),
        ({"height": 21}, "height is 21; .* takes multiples of 2: 20 or 22"),
        ({"width": 1}, "width is 1; .* takes multiples of 2: 2"),
        ({"num_frames": 5}, "num_frames is 5; 'unet' makes images: leave it out"),
    ],
)
def test_what_the_pipeline_does_not_take_is_refused(load, changes, message):
    with pytest.raises(ConfigError, match=message):
        load("unet").generate(["a red circle"], [1], Sampling(**{**GOOD, **changes}))


def test_keywords_of_the_pipeline_pass(load):
    generator = load("unet")
    plain, eta = (
        generator.generate(["a red circle"], [1], Sampling(**GOOD, extra=extra)) for extra in ({}, {"eta": 0.0})
    )
    assert plain.equal(eta)


@pytest.mark.parametrize("name", tiny_families.VIDEOS)
def test_frames_that_a_video_pipeline_would_round_are_refused_loaded_or_not(name, load, model_folders):
    generator, folder = load(name), model_folders[name]
    step = generator.temporal_ratio * generator.latent_group
    refused = (
        rf"num_frames is 4; '{name}' takes 1 \+ {step} k: {1 if step > 2 else 3} or {1 + step if step > 2 else 5}$"
    )
    with pytest.raises(ConfigError, match=f"sampling: {refused}"):
        require_sampling(generator, Sampling(num_frames=4, height=32, width=32))
    with pytest.raises(ConfigError, match=refused):
        require_known_frames(4, "num_frames", folder, name)
    for frames in (1, 1 + step, 1 + 2 * step):
        require_sampling(generator, Sampling(num_frames=frames, height=32, width=32))
        require_known_frames(frames, "num_frames", folder, name)


def test_the_ratios_that_a_config_says_win():
    """LTX-Video 0.9.5: four blocks, three of which halve the frames."""
    blocks = {"patch_size": 4, "patch_size_t": 1, "spatio_temporal_scaling": [True] * 4}
    assert LTXVideo.vae_ratios(blocks | {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}) == (32, 8)
    assert LTXVideo.vae_ratios(blocks | {"spatio_temporal_scaling": [True, True, True, False]}) == (32, 8)


@pytest.mark.parametrize("name", ["num_frames", "height", "guidance_scale"])
def test_keys_of_the_sampling_are_not_hidden_in_extra(name):
    with pytest.raises(ConfigError, match=f"sampling.extra: {name} is a key of `sampling` itself"):
        Sampling(extra={name: 10})

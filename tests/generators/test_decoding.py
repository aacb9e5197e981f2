"""Checkpointed decoding: the pixels and gradients of the plain VAE, to the last bit, in memory that does not grow."""

from __future__ import annotations

import copy
import functools
import weakref

import diffusers
import pytest
import tiny_families
import torch
from torch.autograd.graph import saved_tensors_hooks

from alignkit.errors import ConfigError
from alignkit.generators import wrap
from alignkit.generators.decoding import Decoding, decode_checkpointed


def residual_wan():
    """The VAE of Wan 2.2 TI2V: another upsampling of the first latent frame, and pixels in patches."""
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True]}
    packed = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 8}
    return diffusers.AutoencoderKLWan(**sizes, **packed, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


@functools.cache
def pipeline_of(name):
    return tiny_families.build(name)


@functools.cache
def vae_of(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return residual_wan() if name == "wan 2.2" else pipeline_of(name).vae


def generator_of(name):
    """With a VAE of its own."""
    vae = copy.deepcopy(vae_of(name))
    pipeline_of(name).register_modules(vae=vae)
    return wrap(pipeline_of(name))


def latents_of(name, frames=5, dtype=torch.float32):
    source = torch.Generator().manual_seed(1)
    shape = (2, 4, 4, 4) if name in ("sdxl", "sana") else (2, 4, frames, 4, 4)
    return torch.randn(shape, generator=source, dtype=dtype).requires_grad_()


def plain(vae, raw):
    time = torch.zeros(len(raw)) if vae.config.get("timestep_conditioning") else None
    return (vae.decode(raw) if time is None else vae.decode(raw, time)).sample


def checkpointed(vae, raw, **options):
    return decode_checkpointed(vae, raw, plain, Decoding(**options))


def result(decode, vae, latents):
    """Pixels, and the gradient of a weighted sum of them."""
    pixels = decode(vae, latents)
    weights = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2), dtype=pixels.dtype)
    (gradient,) = torch.autograd.grad((pixels * weights).sum(), latents)
    assert gradient.abs().sum() > 0
    return pixels.detach(), gradient


def assert_same(vae, latents, **options):
    ours = result(functools.partial(checkpointed, **options), vae, latents)
    for mine, theirs in zip(ours, result(plain, vae, latents), strict=True):
        assert torch.equal(mine, theirs)


CACHED = ["wan", "wan 2.2", "qwen_image"]


@pytest.mark.parametrize("name", [*CACHED, "cogvideox", "ltx", "hunyuan", "sdxl", "sana"])
def test_pixels_and_gradients_are_those_of_the_plain_vae(name):
    vae = copy.copy(vae_of(name))
    before = dict(vars(vae))
    checkpointed(vae, latents_of(name)).sum().backward()
    assert vars(vae) == before
    assert_same(vae, latents_of(name))


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("options", [{"cache_on_cpu": True}, {"segment": 2}, {"segment": 2, "cache_on_cpu": True}])
def test_segments_and_caches_on_the_cpu_change_nothing(name, options):
    assert_same(vae_of(name), latents_of(name, 3), **options)


@pytest.mark.parametrize("name", ["wan 2.2", "sdxl"])
def test_in_tiles_and_rows(name):
    vae = copy.deepcopy(vae_of(name))
    vae.enable_slicing()
    assert_same(vae, latents_of(name, 3), **({"segment": 2} if name in CACHED else {}))
    vae.enable_tiling()
    vae.tile_sample_min_height = vae.tile_sample_min_width = 24
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 16
    vae.tile_sample_min_size, vae.tile_latent_min_size = 4, 2
    assert not torch.equal(plain(vae, latents_of(name, 2)), plain(vae_of(name), latents_of(name, 2)))
    assert_same(vae, latents_of(name, 2))
    tiled = plain(vae, latents_of(name, 2))
    vae.disable_tiling()
    assert torch.equal(checkpointed(vae, latents_of(name, 2), tiles=True), tiled)
    assert not vae.use_tiling


@pytest.mark.parametrize("segment", [1, 2])
def test_a_frozen_vae_in_half_precision_and_under_autocast(segment):
    vae = copy.deepcopy(vae_of("wan")).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(vae, latents_of("wan", 3), segment=segment)
    assert_same(vae.bfloat16(), latents_of("wan", 3, torch.bfloat16), segment=segment)


def saved_bytes(decode, frames):
    """What `decode` of Wan keeps for its backward pass, weights left out."""
    vae, sizes = vae_of("wan"), []
    weights = {weight.data_ptr() for weight in vae.parameters()}

    def note(tensor):
        sizes.append(0 if tensor.data_ptr() in weights else tensor.nbytes)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        decode(vae, latents_of("wan", frames))
    return sum(sizes)


def bytes_per_latent_frame(**options):
    decode = functools.partial(checkpointed, **options) if options else plain
    return saved_bytes(decode, 6) - saved_bytes(decode, 5)


def test_a_latent_frame_adds_its_caches_and_no_activations():
    """And its pixels, which the VAE clamps, and itself, before and after the VAE's first convolution."""
    vae, caches = vae_of("wan"), []

    def note(module, inputs, named, result):
        caches.append(sum(entry.nbytes for entry in named["feat_cache"] if isinstance(entry, torch.Tensor)))

    handle = vae.decoder.register_forward_hook(note, with_kwargs=True)
    pixels, latent = plain(vae, latents_of("wan"))[:, :, -4:].nbytes, latents_of("wan", 1).nbytes
    handle.remove()
    assert bytes_per_latent_frame(segment=1) == caches[-1] + pixels + 2 * latent
    assert bytes_per_latent_frame(cache_on_cpu=True) == pixels + latent
    assert bytes_per_latent_frame() > 8 * caches[-1]


def test_segments_keep_one_cache_each():
    """6 latent frames: with 1, 2 and 5 borders between segments or calls."""
    halves, thirds, each = (saved_bytes(functools.partial(checkpointed, segment=size), 6) for size in (3, 2, 1))
    assert 0 < 4 * (thirds - halves) <= each - halves


def most_live_bytes(decode, frames):
    """The most bytes of results of Wan's modules that live at once in the backward pass."""
    vae, live, most = copy.deepcopy(vae_of("wan")), 0, 0

    def note(module, inputs, result):
        nonlocal live, most
        live += result.nbytes
        most = max(most, live)
        weakref.finalize(result, forget, result.nbytes)

    def forget(size):
        nonlocal live
        live -= size

    for module in vae.decoder.modules():
        if module is not vae.decoder:
            module.register_forward_hook(note)
    pixels, most = decode(vae, latents_of("wan", frames)), 0
    pixels.square().sum().backward()
    return most or live


@pytest.mark.parametrize("segment", [1, 2])
def test_activations_of_one_latent_frame_live_in_the_backward_pass(segment):
    few, many = (most_live_bytes(functools.partial(checkpointed, segment=segment), frames) for frames in (4, 6))
    assert 0 < many == few


@pytest.mark.parametrize(("family", "frames"), [("wan", 3), ("wan", [6, 1]), ("cogvideox", 3), ("ltx", [2, 9])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frames_are_slices_of_the_whole_video(family, frames, dtype):
    generator = generator_of(family)
    generator.pipeline.vae.to(dtype)
    latents = latents_of(family)
    whole, some = (generator.decode(latents, Decoding(frames=chosen)) for chosen in (None, frames))
    assert torch.equal(some, whole[:, :frames] if isinstance(frames, int) else whole[:, frames])
    assert torch.equal(whole, generator.decode(latents))


@pytest.mark.parametrize(("family", "calls"), [("wan", 3), ("cogvideox", 1), ("ltx", 1)])
def test_later_latent_frames_are_not_decoded(family, calls):
    """Frame 5 of Wan needs 3 latent frames of 5; CogVideoX decodes 3 latent frames of 5 in its first call."""
    generator, seen = generator_of(family), []
    generator.pipeline.vae.decoder.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        generator.decode(latents_of(family), Decoding(frames=[4] if family == "cogvideox" else [5]))
    assert len(seen) == calls


def test_the_gradient_of_a_vae_that_overflowed_in_float16():
    generator = generator_of("sdxl")
    generator.pipeline.vae.half()
    latents = (1e5 * latents_of("sdxl")).detach().requires_grad_()
    with pytest.warns(UserWarning, match="overflows in float16"):
        pixels = generator.decode(latents, Decoding())
    generator.pipeline.vae.float()
    expected = generator.pipeline.vae.decode(latents / generator.pipeline.vae.config.scaling_factor).sample
    gradients = [torch.autograd.grad(image.sum(), latents)[0] for image in (pixels, (expected / 2 + 0.5).clamp(0, 1))]
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("ltx", {"segment": 2}, "AutoencoderKLLTXVideo has none"),
        ("sdxl", {"cache_on_cpu": True}, "AutoencoderKL has none"),
        ("wan", {"frames": [17]}, r"frames is \[17\]; the video has 17 frames"),
        ("wan", {"frames": 0}, "frames is 0"),
        ("sdxl", {"frames": 1}, "'.*' makes images"),
        ("wan", {"segment": 0}, "segment is 0"),
        ("wan", {"tiles": True, "segment": 2}, "this VAE decodes in tiles"),
    ],
)
def test_what_a_vae_cannot_do_is_refused(family, options, says):
    with pytest.raises(ConfigError, match=says):
        generator_of(family).decode(latents_of(family), Decoding(**options))


def test_segments_and_tiles_are_not_combined():
    vae = copy.deepcopy(vae_of("sdxl"))
    del vae.use_tiling
    with pytest.raises(ConfigError, match="AutoencoderKL does not decode in tiles"):
        checkpointed(vae, latents_of("sdxl"), tiles=True)
    vae = copy.deepcopy(vae_of("wan"))
    vae.enable_tiling()
    with pytest.raises(ConfigError, match="segment is 2, and this VAE decodes in tiles"):
        checkpointed(vae, latents_of("wan"), segment=2)

"""Qwen's processors in torch: equal to the library's on PIL pictures, to plain loops on clips, to published rules."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from alignkit.errors import ConfigError, DataError, MissingFileError
from rewards.models.patches import Patches, read_patches, sample_frames

SETTINGS = {
    "qwen2_vl": {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 56 * 84},
    "qwen3_vl": {
        "patch_size": 16,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": 64 * 64, "longest_edge": 96 * 128},
    },
    "sandbox": {"patch_size": 8, "size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}},
}


def config(kind="qwen2_vl", patch=14):
    tower = SimpleNamespace(patch_size=patch, spatial_merge_size=2, temporal_patch_size=2)
    return SimpleNamespace(model_type=kind, vision_config=tower)


def folder(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return str(tmp_path)


def picture(height, width, contrast):
    """Edges, slopes and noise; of full contrast they are harder on rounding and overshoot than photographs."""
    y, x = np.mgrid[:height, :width]
    slopes = np.stack([x * 255 // width, y * 255 // height, (x // 5 + y // 7) % 2 * 255], axis=-1)
    noise = np.random.default_rng(0).integers(0, 256, slopes.shape)
    drawn = np.where((x > y)[..., None], slopes, noise)
    return Image.fromarray((128 + contrast * (drawn - 128)).astype(np.uint8))


def tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double() / 255


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["whole", "nested"])
def test_pictures_become_what_the_library_makes_of_them(name, kind, tmp_path):
    stored = SETTINGS[name]
    files = {"preprocessor_config": stored} if kind == "whole" else {"processor_config": {"image_processor": stored}}
    patches = read_patches(folder(tmp_path, **files), config("qwen3_vl", stored["patch_size"]), video=False)
    side = 2 * stored["patch_size"]
    sizes = [(2 * side, 2 * side), (3 * side + 5, 2 * side - 3), (300, 410), (16, 21)]
    for (height, width), contrast in [*((size, 0.6) for size in sizes), (sizes[0], 1), (sizes[2], 1), (sizes[3], 1)]:
        # Pillow 13 takes the height first for sizes[1], which shows where overshoot is cut: not at contrast 0.6
        shown = picture(height, width, contrast)
        expected = Qwen2VLImageProcessorPil(**stored)([shown], return_tensors="pt")
        for eight_bit in (False, True):
            values, grid = patches(tensor(shown), eight_bit=eight_bit)
            assert torch.equal(grid, expected["image_grid_thw"])
            levels = (values - expected["pixel_values"]).abs().max() * max(patches.std) * 255
            is_same_size = (height, width) == tuple(grid[0, 1:].mul(stored["patch_size"]).tolist())
            # PIL rounds its weights and each direction's result
            assert levels <= (1e-3 if is_same_size else 2.1), (height, width, eight_bit)


@pytest.mark.parametrize("frames", [2, 5])
def test_clips_are_cut_as_plain_loops_cut_them(frames):
    patches = Patches(patch=2, min_pixels=4, max_pixels=4096)
    clips = torch.rand(2, frames, 3, 8, 12, dtype=torch.float64)
    values, grids = patches(clips)
    padded = [[clip[min(f, frames - 1)] for f in range(frames + frames % 2)] for clip in clips]
    rows = [
        [
            (clip[2 * t + k][c, (2 * y + dy) * 2 + py, (2 * x + dx) * 2 + px] - patches.mean[c]) / patches.std[c]
            for c in range(3)
            for k in range(2)
            for py in range(2)
            for px in range(2)
        ]
        for clip in padded
        for t in range(len(clip) // 2)
        for y in range(2)
        for x in range(3)
        for dy in range(2)
        for dx in range(2)
    ]
    torch.testing.assert_close(values, torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)
    assert grids.tolist() == [[len(padded[0]) // 2, 4, 6]] * 2


def published_clip_size(frames, height, width, factor, bounds):
    """Qwen3-VL's rule for clips, as its video processor states it."""
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    rows, columns = (round(side / factor) * factor for side in (height, width))
    volume, (least, most) = round(frames / 2) * 2, bounds
    if volume * rows * columns > most:
        beta = math.sqrt(frames * height * width / most)
        return tuple(max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    if volume * rows * columns < least:
        beta = math.sqrt(least / (frames * height * width))
        return tuple(math.ceil(side * beta / factor) * factor for side in (height, width))
    return rows, columns


def test_clips_get_the_size_of_their_family(tmp_path):
    stored = {"patch_size": 16, "size": {"shortest_edge": 4096, "longest_edge": 25165824}}
    third = read_patches(folder(tmp_path, video_preprocessor_config=stored), config("qwen3_vl", 16), video=True)
    for frames, height, width in [(2, 20, 300), (3, 17, 18), (81, 480, 832), (600, 480, 832), (9, 31, 33)]:
        assert third.size(height, width, frames) == published_clip_size(frames, height, width, 32, (4096, 25165824))
    second = read_patches(folder(tmp_path / "..", preprocessor_config={"patch_size": 14}), config(), video=True)
    assert (second.min_pixels, second.max_pixels) == (128 * 28 * 28, 28 * 28 * 768)  # Qwen2VLVideoProcessor's own
    assert second.size(480, 832, 81) == second.size(480, 832, 16) == (476, 840)
    assert second.size(100, 100, 16) == (336, 336)  # ceil(100 * sqrt(100352) / 100 / 28) * 28


def test_capped_clips_get_smaller_with_their_length(tmp_path):
    """28 * 28 * 0.9 * 128000 * 2 / 768 = 235200 pixels a frame for Qwen2-VL, 25165824 / 600 = 41943 for Qwen3-VL."""
    capped = {"patch_size": 14, "cap_pixels_per_frame": True}
    second = read_patches(folder(tmp_path, preprocessor_config=capped), config(), video=True)
    assert second.size(720, 1280, 768) == (336, 644)  # floor(720 / sqrt(720 * 1280 / 235200) / 28) = 12, alike 23
    assert second.size(720, 1280, 16) == (560, 1008)
    capped = {**capped, "patch_size": 16, "size": {"shortest_edge": 4096, "longest_edge": 25165824}}
    third = read_patches(folder(tmp_path, preprocessor_config=capped), config("qwen3_vl", 16), video=True)
    assert third.size(480, 832, 600) == published_clip_size(600, 480, 832, 32, (4096, 41943 * 600))
    assert third.size(1440, 2560, 4) == published_clip_size(4, 1440, 2560, 32, (4096, 768 * 1024 * 4))


def test_a_folder_without_a_processor_or_with_anothers_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"no preprocessor_config\.json"):
        read_patches(str(tmp_path), config(), video=False)
    with pytest.raises(ConfigError, match=r"\(16, 2, 2\), its vision tower takes \(14, 2, 2\)"):
        read_patches(folder(tmp_path, preprocessor_config={"patch_size": 16}), config(), video=False)
    with pytest.raises(DataError, match="200 times"):
        Patches().size(10, 2100)
    with pytest.raises(DataError, match="clip of 1 frames"):
        Patches(whole_clip=True).size(64, 64, 1)


def test_frames_are_sampled_evenly_with_both_ends():
    clips = torch.arange(9.0).reshape(1, 9, 1, 1, 1).expand(2, 9, 3, 4, 4)
    assert sample_frames(clips, 4)[0, :, 0, 0, 0].tolist() == [0, 3, 5, 8]
    with pytest.raises(DataError, match="10 frames of a clip of 9"):
        sample_frames(clips, 10)

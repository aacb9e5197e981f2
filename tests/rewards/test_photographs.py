"""The tensor path against the PIL path on real photographs: how far pixels differ, in levels of 255, and scores."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_clips
import tiny_vlm
import torch
from PIL import Image, ImageDraw
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from alignkit.records import Prompt
from rewards.clip_score import ClipScore
from rewards.models.media import CLIP_STD, Preparation, quantised
from rewards.models.patches import Patches
from rewards.models.vlm import VlmCritic
from rewards.photographs import CAPTIONS, photographs

PHOTOGRAPHS = photographs()
SPREAD = torch.tensor(CLIP_STD).reshape(3, 1, 1) * 255  # normalised values to levels of 255


def picture(name):
    return Image.fromarray((PHOTOGRAPHS[name].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def levels(prepared, wanted):
    """Mean and largest difference [.., 3, H, W] in levels of 255."""
    off = ((prepared - torch.as_tensor(np.asarray(wanted))) * SPREAD).abs()
    return off.mean().item(), off.max().item()


def rendered(kind, height, width):
    """Hard edges, where overshoot is largest: lines of text, or black and white noise."""
    if kind == "noise":
        bits = np.random.default_rng(0).integers(0, 2, (height, width, 1), np.uint8) * 255
        return Image.fromarray(bits.repeat(3, axis=2))
    page = Image.new("RGB", (width, height), "white")
    for row in range(0, height, 14):
        ImageDraw.Draw(page).text((3, row), "The quick brown fox jumps over the lazy dog. " * 5, fill="black")
    return page


def tensor(shown):
    return torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None] / 255


DRAWN = [("text", 300, 410), ("text", 640, 480), ("noise", 256, 256), ("noise", 640, 480)]


@pytest.mark.parametrize("shown", [*map(picture, PHOTOGRAPHS), *(rendered(*one) for one in DRAWN)])
def test_cropped_as_clip_crops(shown):
    """PIL's rounding is all that differs: 1.1 levels at most. One pass would differ by 5 to 68."""
    wanted = CLIPImageProcessorPil()(shown, return_tensors="np")["pixel_values"]
    mean, largest = levels(Preparation(224)(tensor(shown)), wanted)
    print(shown.size, f"{mean:.2f} and at most {largest:.2f} levels")
    assert mean < 0.4
    assert largest < 1.1
    assert levels(Preparation(224, passes="float")(tensor(shown)), wanted)[1] > 4


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_half_precision_is_resampled_in_float32(fit):
    media = PHOTOGRAPHS["coffee"][None].bfloat16()
    assert torch.equal(Preparation(224, fit)(media), Preparation(224, fit)(media.float()))
    assert torch.equal(quantised(media), quantised(media.float()))
    assert torch.equal(Patches()(media)[0], Patches()(media.float())[0])


def test_a_line_is_padded_to_a_square():
    assert Preparation(8, "pad")(torch.rand(1, 3, 2, 40)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_cut_into_patches_as_qwen_cuts(name):
    out = Qwen2VLImageProcessorPil()(images=[picture(name)], return_tensors="pt")
    patches, grids = Patches()(PHOTOGRAPHS[name][None])
    assert torch.equal(grids, out["image_grid_thw"])
    spread = SPREAD.reshape(1, 3, 1)
    off = ((patches - out["pixel_values"]).reshape(len(patches), 3, -1) * spread).abs()
    assert off.mean() < 0.4
    assert off.max() < 1.1


def test_scores_of_float_and_stored_pixels_are_close(tmp_path):
    """Between 8-bit values, as a decoder leaves them: three quarters of the size."""
    tiny_clips.clip().save_pretrained(tmp_path / "clip")
    tiny_clips.tokenizer().save_pretrained(tmp_path / "clip")
    clip = ClipScore(str(tmp_path / "clip"))
    critic = VlmCritic(str(tiny_vlm.save("qwen2_5_vl", tmp_path / "vlm")))
    floats, stored = [], []
    for name, photograph in PHOTOGRAPHS.items():
        media = torch.nn.functional.interpolate(photograph[None], scale_factor=0.75, mode="bicubic", antialias=True)
        media, prompts = media.clamp(0, 1), [Prompt.from_text(CAPTIONS[name])]
        question = [f"Is this {CAPTIONS[name]}?"]
        for values, pixels in ((floats, media), (stored, quantised(media))):
            values.append([clip(pixels, prompts).total.item(), critic.margins(pixels, question).item()])
        assert (media != quantised(media)).any()
    floats, stored = torch.tensor(floats), torch.tensor(stored)
    assert (floats - stored).abs().max(0).values.tolist() == pytest.approx([0, 0], abs=0.05)
    assert (floats - stored).abs().max() > 0
    assert (floats.std(0) > (floats - stored).abs().max(0).values).all()  # 8 bits change less than pictures do

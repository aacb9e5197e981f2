"""Human Preference Score v2 and v2.1: a CLIP ViT-H/14 tuned on rankings (Wu et al., arXiv 2306.09341)."""

from __future__ import annotations

from dataclasses import replace

from rewards.models.clip import LAION_H, Clip, ClipReward


class Hps(ClipReward):
    """The cosine, about 0.27 (v2) or 0.30 (v2.1); comparable within one prompt and one version only.

    model: `HPS_v2_compressed.pt` or `HPS_v2.1_compressed.pt` in open_clip's names (`hf download xswu/HPSv2
    HPS_v2.1_compressed.pt --local-dir FOLDER`), or a CLIPModel folder made of one.
    antialias: True resamples as torchvision does with floats since 0.17. The package pins no version; with those of
        2023, when it was published, large images were resampled without antialiasing: False gives those scores.
    As published, the longest side is scaled to 224 and the rest is black; floats are resampled in one pass and may
    exceed [0, 1].
    """

    licence = "Apache-2.0"
    source = "https://arxiv.org/abs/2306.09341"
    get = "`hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir FOLDER` fetches them"
    native_range = (-1.0, 1.0)
    name = "hps"

    def __init__(
        self,
        model: str,
        *,
        antialias: bool = True,
        processor: str = LAION_H,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.clip = Clip(model, name=self.name, processor=processor, get=self.get, device=device, dtype=dtype)
        passes = "float" if antialias else "aliased"
        self.clip.preparation = replace(self.clip.preparation, fit="pad", passes=passes)

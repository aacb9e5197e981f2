"""Bytes on disk of a latents cache, from shapes alone: conditioning with every row, and once a prompt as it is stored.

    python benchmarks/cache_size.py [--models sdxl sd35_medium flux1_dev] [--rows 100000] [--rows_a_prompt 10]
        [--candidates 4] [--side 1024]

Models are those of configs/models, on the meta device. One JSON line each, in GB of 10^9 bytes, for an encoder in
float32 and in bfloat16. Not counted: zeros that a family pads with, which LZ4 makes vanish (of SD3's CLIP states half
of the channels).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from alignkit.commands.doctor.model_shapes import read_model
from alignkit.generators.description import LatentSize

CONFIGS = Path(__file__).parent.parent / "configs" / "models"
CONDITIONING = ("encoder_hidden_states", "pooled_projections", "text_embeds")


def numbers(name: str, side: int) -> tuple[int, int]:
    """Numbers in the latents of one image and in the conditioning of one prompt."""
    model = read_model(CONFIGS / name)
    places = side // model.vae_ratio
    with torch.device("meta"):
        inputs = model.family.network_inputs(model.blank_denoiser().config, LatentSize(1, 1, places, places))
    flat = inputs | inputs.get("added_cond_kwargs", {})
    cond = sum(flat[key].numel() for key in CONDITIONING if isinstance(flat.get(key), Tensor))
    return model.vae["latent_channels"] * places**2, cond


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sdxl", "sd35_medium", "flux1_dev"])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rows_a_prompt", type=int, default=10)
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--side", type=int, default=1024)
    chosen = parser.parse_args()
    for name in chosen.models:
        latents, cond = numbers(name, chosen.side)
        images, prompts = chosen.rows * chosen.candidates * latents, chosen.rows * cond
        found = {
            f"{precision}_gb": {
                "with every row": round(size * (images + prompts) / 1e9, 1),
                "once a prompt": round(size * (images + prompts / chosen.rows_a_prompt) / 1e9, 1),
            }
            for precision, size in (("float32", 4), ("bfloat16", 2))
        }
        settings = {key: value for key, value in vars(chosen).items() if key != "models"}
        print(json.dumps({"model": name, **found, "settings": settings}))


if __name__ == "__main__":
    main()

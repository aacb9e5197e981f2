"""The calls that diffusers' Diffusion-DPO script for SDXL makes in a step, as a bare loop of its own. Part of
`against_diffusers`.

Written from the method (Diffusion-DPO, Wallace et al., arXiv 2311.12908, eq. 14) and from which calls the script makes:
both images are decoded and encoded by the VAE in float32 in each step (a sample of the posterior), the prompt by both
text encoders; both images of a pair get one noise and one timestep; policy and reference are the U-Net with its
adapter on and off. Not here: accelerate, trackers, checkpoints, random flips.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
VAE_IMAGES = 8  # that the VAE encodes in one call
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """Settings of both sides; `side` in pixels, `batch` in pairs."""

    batch: int
    side: int
    rank: int
    learning_rate: float
    beta: float
    seed: int
    bf16: bool


class Bare:
    """A model folder, its pairs, and a LoRA that `step` trains on the next batch of them."""

    def __init__(self, model: Path, data: Path, settings: Settings, cache: Path) -> None:
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(settings.seed)
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(model)
        self.noise = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
        self._place()
        rank = settings.rank
        self.unet: Any = self.pipeline.unet
        self.unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
        )
        self.unet.train()
        self.trained = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=settings.learning_rate, weight_decay=0.01)
        self.schedule = get_scheduler("constant", self.optimizer)
        rows = datasets.load_dataset(str(data), split="train", cache_dir=str(cache))
        # A function of tokenizers alone: `datasets` hashes all objects in it, which takes ten seconds for networks.
        words = {name: self.pipeline.components[name] for name in ("tokenizer", "tokenizer_2")}
        self.rows = rows.with_transform(partial(_columns, words, settings.side))
        self.loader = DataLoader(self.rows, batch_size=settings.batch, shuffle=True, collate_fn=stacked)
        self._batches = self._endless()

    def _place(self) -> None:
        """Frozen parts on the device; all but the VAE in bfloat16 if `bf16` is set."""
        for name, part in self.pipeline.components.items():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).to(self.device)
                if self.settings.bf16 and name != "vae":
                    part.to(torch.bfloat16)

    def _endless(self) -> Iterator[Batch]:
        while True:
            yield from self.loader

    # --- a step ---

    @torch.no_grad()
    def latents(self, batch: Batch, *, sample: bool = True) -> Tensor:
        """[2 B, 4, h, w], winners first; of each posterior a sample, or its mode."""
        pixels, vae = torch.cat(batch["pixels"].to(self.device).chunk(2, dim=1)), self.pipeline.vae
        posteriors = [vae.encode(part).latent_dist for part in pixels.split(VAE_IMAGES)]
        encoded = torch.cat([one.sample() if sample else one.mode() for one in posteriors])
        return (encoded * vae.config.scaling_factor).to(self.unet.dtype)

    @torch.no_grad()
    def condition(self, batch: Batch) -> dict[str, Any]:
        """The U-Net's text and size inputs for [2 B] images."""
        states = []
        for name, words in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
            output = self.pipeline.components[name](batch[words].to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
        side, dtype = self.settings.side, self.unet.dtype
        sizes = [[*size, *corner, side, side] for size, corner in batch["size"].tolist()]
        time_ids = torch.tensor(sizes, device=self.device, dtype=dtype).repeat(2, 1)
        return {
            "encoder_hidden_states": torch.cat(states, -1).to(dtype).repeat(2, 1, 1),
            "added_cond_kwargs": {"text_embeds": output[0].to(dtype).repeat(2, 1), "time_ids": time_ids},
        }

    def loss(self, latents: Tensor, noise: Tensor, timesteps: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """Mean of -log sigmoid(-beta/2 (delta_winner - delta_loser)); both images share noise and timesteps [B]."""
        noise, timesteps = noise.repeat(2, 1, 1, 1), timesteps.repeat(2)
        x_t = self.noise.add_noise(latents, noise, timesteps)

        def errors() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
                predicted = self.unet(x_t, timesteps, **condition).sample
            wide = torch.promote_types(predicted.dtype, torch.float32)
            return (predicted.to(wide) - noise.to(wide)).square().flatten(1).mean(1)

        policy = errors()
        self.unet.disable_adapters()
        with torch.no_grad():
            reference = errors()
        self.unet.enable_adapters()
        winner, loser = (policy - reference).chunk(2)
        return -functional.logsigmoid(-0.5 * self.settings.beta * (winner - loser)).mean()

    def step(self) -> float:
        """One step on the next batch; its loss."""
        batch = next(self._batches)
        latents, count = self.latents(batch), self.noise.config.num_train_timesteps
        noise = torch.randn_like(latents[: len(latents) // 2])
        timesteps = torch.randint(count, (len(noise),), device=self.device)
        loss = self.loss(latents, noise, timesteps, self.condition(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save(self, folder: Path) -> None:
        """The LoRA in diffusers' layout."""
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet))
        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=state)

    def steps(self, epochs: int) -> int:
        """The number of steps of `epochs`."""
        return epochs * math.ceil(len(self.rows) / self.settings.batch)


def stacked(items: Sequence[Mapping[str, Any]]) -> Batch:
    """Rows as one batch."""
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}


def _columns(tokenizers: Mapping[str, Any], side: int, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    pairs = zip(rows["jpg_0"], rows["jpg_1"], rows["label_0"], strict=True)
    both = [_pair(*pair, side=side) for pair in pairs]
    columns: dict[str, list[Any]] = {"pixels": [pixels for pixels, _ in both], "size": [facts for _, facts in both]}
    for name, words in tokenizers.items():
        options = {"truncation": True, "padding": "max_length", "max_length": words.model_max_length}
        columns[name] = list(words(list(rows["caption"]), return_tensors="pt", **options).input_ids)
    return columns


def _pair(first: bytes, second: bytes, label: float, *, side: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Pixels [6, side, side] in [-1, 1], winner first; the first image's (height, width) and the crop's corner."""
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in (first, second)]
    images[1] = images[1].resize(images[0].size)
    tensors = [torch.from_numpy(np.array(image)).movedim(-1, 0) / 255 for image in images]
    both = torch.cat(tensors if label else tensors[::-1])
    height, width = both.shape[1:]
    scale = side / min(height, width)
    if scale != 1:
        size = [round(height * scale), round(width * scale)]
        both = functional.interpolate(both[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (round((length - side) / 2) for length in both.shape[1:])
    cropped = both[:, top : top + side, left : left + side]
    return cropped * 2 - 1, [(height, width), (top, left)]

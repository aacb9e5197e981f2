"""The autoencoder of the sandbox's clips: how it is trained, first on single frames, then on short crops of clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils.data import Dataset
from transformers import set_seed

from alignkit.sandbox import film_models, films, recipes
from alignkit.sandbox.film_captions import random_spec
from alignkit.seeds import derive_seed

FAULTY = 0.3  # share of the clips that have local faults, which the codec must reproduce as well
OBJECTS = 1.0  # weight of the pixels of objects, beside 1 for all
KL = 5e-7


@dataclass(frozen=True, slots=True)
class Stage(recipes.Recipe):
    """One training on crops of `frames` frames; `crowd` is the largest number of objects, 0 for clips with captions."""

    frames: int = 1
    crowd: int = 0


# Single frames are learnt first: they cost a ninth of a crop. Of 5 frames the second latent frame could repeat what the
# first holds, so crops have more.
STAGES = (
    Stage(steps=1_300, batch=16, learning_rate=3e-3, seed=301, frames=1, crowd=6),
    Stage(steps=2_500, batch=16, learning_rate=3e-3, seed=302, frames=1, crowd=6),
    Stage(steps=1_200, batch=6, learning_rate=1e-3, seed=303, frames=9, crowd=6),
    Stage(steps=1_200, batch=4, learning_rate=1e-3, seed=304, frames=17),
)


def to_tensor(frames: np.ndarray) -> Tensor:
    """[F, H, W, 3] -> [F, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))


class Crops(Dataset[dict[str, Tensor]]):
    """The crops of a stage; number i is a function of (the stage's seed, i)."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __len__(self) -> int:
        return self.stage.scenes

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        stage = self.stage
        rng = np.random.default_rng(derive_seed("film-crop", stage.seed, index))
        most = stage.crowd
        film = films.crowd(int(rng.integers(2, most + 1)), rng) if most else films.compose(random_spec(rng), rng)
        if rng.random() < FAULTY:
            film = films.glitch(film, 2, rng)
        start = int(rng.integers(films.FRAMES - stage.frames + 1))
        return {"pixels": to_tensor(films.render(film, rng, start, start + stage.frames))}


class VaeObjective(recipes.Objective):
    """Reconstruction (L1 + 2 MSE, objects weighted) and, with a small weight, the KL from the unit normal."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        target = (pixels * 2 - 1).transpose(1, 2)
        posterior = self.vae.encode(target).latent_dist
        error = self.vae.decode(posterior.sample()).sample.float() - target
        ground = target[..., :1, :1]  # no object reaches the corner
        weight = 1 + OBJECTS * ((target - ground).abs().amax(1, keepdim=True) > 0.1)
        error = ((error.abs() + 2 * error.square()) * weight).mean()
        return {"loss": error + KL * posterior.kl().mean()}


@torch.no_grad()
def set_statistics(vae: AutoencoderKLWan, clips: int = 64) -> None:
    """Write mean and standard deviation of each latent channel into the config, from clips without faults."""
    rng = np.random.default_rng(derive_seed("film-statistics"))
    shown = [to_tensor(films.render(films.compose(random_spec(rng), rng), rng)) for _ in range(clips)]
    latents = torch.cat([vae.encode(clip[None].transpose(1, 2) * 2 - 1).latent_dist.mode() for clip in shown])
    rounded = {"latents_mean": latents.mean((0, 2, 3, 4)), "latents_std": latents.std((0, 2, 3, 4))}
    vae.register_to_config(**{name: np.round(values.double().numpy(), 4).tolist() for name, values in rounded.items()})


def train_vae(out: Path, work: Path, stages: Sequence[Stage] = STAGES) -> AutoencoderKLWan:
    """Train the autoencoder into `out`; continues where it was stopped."""
    set_seed(stages[0].seed)
    vae = film_models.vae()
    for number, stage in enumerate(stages, start=1):
        recipes.fit(VaeObjective(vae), Crops(stage), stage, work / f"stage-{number}")
        if stage.frames == 1:
            film_models.inflate(vae)
    set_statistics(vae.eval())
    vae.half().save_pretrained(out)
    return vae

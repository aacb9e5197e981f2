"""The video generator of the sandbox: how its transformer and text encoder are trained, and how its policy is made.

The loss is that of `flow.py`, with Wan's shifted times, plus the cross-entropy of two linear classifiers that read the
tokens of the middle block: which object is at a place and latent frame, and how it moves. They are not stored. The
first stage sees the first latent frames of each clip alone: colours and shapes are learnt there, at a small part of the
cost of whole clips. The last stage trains a LoRA on clips with local faults (`films.glitch`): the result is the policy,
and the LoRA with the opposite sign is its `clean_adapter`, as of the image generators.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import set_seed

from alignkit.adapters.fingerprint import base_of
from alignkit.diffusion.schedules import FlowSchedule
from alignkit.generators import load_generator, wrap
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.sandbox import film_models, films, generators, recipes
from alignkit.sandbox.clips import DIRECTIONS
from alignkit.sandbox.film_captions import random_spec, word
from alignkit.sandbox.film_vae import to_tensor
from alignkit.sandbox.flow import CAPTION_DROPOUT, PLACES, collate
from alignkit.seeds import derive_seed
from alignkit.storage import write_atomic

KINDS = 1 + len(films.SHAPES) * len(films.COLORS)  # the ground, or a shape with its colour
MOTIONS = 2 + len(DIRECTIONS) * len(films.SPEEDS)  # the ground, a still object, or a direction with a speed
PART = 500  # clips of one file of latents
MEMORY = 0.998  # of the running average of the weights
LONG = 500  # steps from which compiling pays


@dataclass(frozen=True, slots=True)
class Stage(recipes.Recipe):
    """One training on the first `latent_frames` of each clip."""

    latent_frames: int = 9


CLIPS = 8_000
CLEAN = (
    Stage(steps=3_000, batch=48, learning_rate=1e-3, seed=311, warmup=200, latent_frames=2),
    Stage(steps=5_000, batch=16, learning_rate=8e-4, seed=312, warmup=200),
)
POLICY_CLIPS = 3_000
POLICY = recipes.Recipe(steps=1_800, batch=16, learning_rate=1e-3, seed=313)
POLICY_FAULTS = 3.0  # a clip on average
RANK = 16
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


class Clips:
    """`size` captioned clips with `faults` local faults on average; number i is a function of (seed, i)."""

    def __init__(self, size: int, seed: int, faults: float = 0.0) -> None:
        self.size, self.seed, self.faults = size, seed, faults

    def _source(self, index: int) -> np.random.Generator:
        return np.random.default_rng(derive_seed("film", self.seed, index))

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """The caption of clip `index` in a wording that `rng` chooses."""
        return word(random_spec(self._source(index)), rng)

    def clip(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The clip [33, 3, 32, 32], and for each latent frame and place [9, 4, 4] the object's kind and motion."""
        rng = self._source(index)
        spec = random_spec(rng)
        film = films.compose(spec, rng)
        kinds = [1 + films.SHAPES.index(shape) * len(films.COLORS) + films.COLORS.index(c) for shape, c in spec.kinds]
        motions = [1] * len(kinds)
        if spec.direction is not None:
            way = list(DIRECTIONS).index(spec.direction) * len(films.SPEEDS)
            motions[0] = 2 + way + list(films.SPEEDS).index(str(spec.speed))
        places = films.cells(film)
        labels = [torch.from_numpy(np.array([0, *values])[places]) for values in (kinds, motions)]
        if self.faults:
            film = films.glitch(film, self.faults, rng)
        return to_tensor(films.render(film, rng)), labels[0], labels[1]

    @torch.no_grad()
    def encoded(self, generator: PipelineGenerator, work: Path) -> dict[str, Tensor]:
        """`latents` [N, C, 9, 4, 4], `kinds` and `motions` [N, 9, 4, 4] of all clips, stored in parts in `work`.

        The names of the parts change with what they depend on: seed, faults and VAE.
        """
        parts, made_of = [], f"{self.seed}-{self.faults:g}-{base_of(generator.pipeline.vae)}"
        for start in tqdm(range(0, self.size, PART), desc="encode clips", unit="part"):
            file = work / f"clips-{made_of}-{start:06d}.safetensors"
            if not file.is_file():
                rows = map(self.clip, range(start, min(start + PART, self.size)))
                pixels, kinds, motions = (torch.stack(column) for column in zip(*rows, strict=True))
                latents = torch.cat([generator.encode(some).half() for some in pixels.split(10)]).contiguous()
                write_atomic(file, save({"latents": latents, "kinds": kinds.byte(), "motions": motions.byte()}))
            parts.append(load_file(file))
        whole = {}
        for name in parts[0]:
            whole[name] = torch.cat([part[name] for part in parts])
        return whole


class Noised(Dataset[dict[str, Any]]):
    """`size` training items: clip, time, noise and a caption, sometimes empty; each is a function of its index."""

    def __init__(self, clips: Clips, encoded: dict[str, Tensor], size: int, latent_frames: int) -> None:
        self.clips, self.encoded, self.size, self.latent_frames = clips, encoded, size, latent_frames

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(derive_seed("film-item", self.clips.seed, self.latent_frames, index))
        chosen = int(rng.integers(self.clips.size))
        latents = self.encoded["latents"][chosen, :, : self.latent_frames].float()
        source = torch.Generator().manual_seed(int(rng.integers(2**31)))
        is_dropped = rng.random() < CAPTION_DROPOUT
        return {
            "latents": latents,
            "kinds": self.encoded["kinds"][chosen, : self.latent_frames].long().flatten(),
            "motions": self.encoded["motions"][chosen, : self.latent_frames].long().flatten(),
            "noise": torch.randn(latents.shape, generator=source),
            "t": FlowSchedule(film_models.SHIFT).sample_t(1, source)[0],
            "prompt": "" if is_dropped else self.clips.caption(chosen, rng),
        }


class FilmObjective(recipes.Objective):
    """The loss of the module docstring on a batch; trains the transformer, the text encoder and the classifiers.

    `average` holds the running average of the first two.
    """

    def __init__(self, generator: PipelineGenerator) -> None:
        super().__init__()
        encoder = generator.pipeline.text_encoder.encoder  # shares its embeddings with the whole, so it is enough
        self.parts = nn.ModuleList([generator.net, encoder]).requires_grad_(True)
        self.average = AveragedModel(self.parts, multi_avg_fn=get_ema_multi_avg_fn(MEMORY)).requires_grad_(False)
        width = generator.net.config.num_attention_heads * generator.net.config.attention_head_dim
        self.classifiers = nn.ModuleList([nn.Linear(width, KINDS), nn.Linear(width, MOTIONS)])
        self._generator = generator  # no module, so it adds no parameters here
        self.middle = len(generator.net.blocks) // 2
        generator.net.blocks[self.middle].register_forward_pre_hook(self._keep_tokens)

    def _keep_tokens(self, _block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._tokens = inputs[0]

    def forward(self, prompts: list[str], kinds: Tensor, motions: Tensor, **noised: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.average.update_parameters(self.parts)
        error = flow_error(self._generator, prompts, **noised)
        tokens = functional.layer_norm(self._tokens, self._tokens.shape[-1:]).flatten(0, 1)
        named = [
            functional.cross_entropy(classifier(tokens), labels.flatten())
            for classifier, labels in zip(self.classifiers, (kinds, motions), strict=True)
        ]
        return {"loss": error + PLACES * torch.stack(named).sum()}

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the averaged weights into the generator."""
        self.parts.load_state_dict(copy.deepcopy(self.average.module.state_dict()))


class PolicyObjective(recipes.Objective):
    """The flow loss alone, for the LoRA of the policy."""

    def __init__(self, generator: PipelineGenerator) -> None:
        super().__init__()
        self.net, self._generator = generator.net, generator

    def forward(self, prompts: list[str], kinds: Tensor, motions: Tensor, **noised: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - rows carry them
        return {"loss": flow_error(self._generator, prompts, **noised)}


def flow_error(generator: PipelineGenerator, prompts: list[str], latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """E |v(x_t, t, prompt) - (noise - x0)|^2 of a batch."""
    prediction = generator.predict(generator.add_noise(latents, noise, t), t, generator.conditioner(prompts))
    return (prediction.float() - generator.target(latents, noise, t)).square().mean()


def _compile(net: Any, recipe: recipes.Recipe) -> None:
    """Compile the blocks for a long training where there is a compiler; the results differ by rounding."""
    if recipe.steps >= LONG and shutil.which("g++"):
        net.compile_repeated_blocks(dynamic=False)


def train_clean(
    models_dir: Path, out: Path, work: Path, stages: Sequence[Stage] = CLEAN, clips: int = CLIPS
) -> PipelineGenerator:
    """Train `film_clean` into `out`, on the latents of `models_dir / "film_vae"`; continues where it was stopped."""
    seed = stages[0].seed
    set_seed(seed)
    vae = AutoencoderKLWan.from_pretrained(models_dir / "film_vae", dtype=torch.float32)
    generator = wrap(film_models.pipeline(vae), name="film_clean")
    world = Clips(clips, seed)
    encoded = world.encoded(generator, work)
    objective = FilmObjective(generator)
    for number, stage in enumerate(stages, start=1):
        if stage is stages[-1]:  # compiled for few tokens it was not faster
            _compile(generator.net, stage)
        items = Noised(world, encoded, stage.scenes, stage.latent_frames)
        recipes.fit(objective, items, stage, work / f"stage-{number}", collate)
    objective.take_average()
    generators.store(generator, out, torch.float16)
    return generator


def train_policy(
    models_dir: Path, out: Path, work: Path, recipe: recipes.Recipe = POLICY, clips: int = POLICY_CLIPS
) -> PipelineGenerator:
    """Train `film` into `out`: a LoRA on `models_dir / "film_clean"`, merged, and its negative as `clean_adapter`."""
    set_seed(recipe.seed)
    generator = load_generator(models_dir / "film_clean", name="film", dtype=torch.float32)
    world = Clips(clips, recipe.seed, POLICY_FAULTS)
    encoded = world.encoded(generator, work)
    generator.add_lora(RANK, None, LORA_LAYERS, 0.0)
    _compile(generator.net, recipe)
    whole = encoded["latents"].shape[2]
    recipes.fit(PolicyObjective(generator), Noised(world, encoded, recipe.scenes, whole), recipe, work, collate)
    generators.merge_policy(generator, out)
    generators.store(generator, out, generators.FP8)
    return generator

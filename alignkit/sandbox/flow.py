"""The first flow generator of the sandbox: its transformer and its text encoders are trained together.

The loss is that of a rectified flow, E |v(x_t, t, prompt) - (noise - x0)|^2, with t from a logit-normal density (arXiv
2403.03206), plus the cross-entropy of a linear classifier that reads the image tokens of the middle block and names the
object at each place of the image. A loss at an intermediate layer makes transformers learn faster (arXiv 2410.06940);
here it also trains the text encoders on shapes, colours, numbers and places. The classifier is not stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import set_seed

from alignkit.generators import wrap
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.sandbox import generators, recipes
from alignkit.sandbox.captions import parse, random_caption
from alignkit.sandbox.clips import covers
from alignkit.sandbox.scenes import PALETTE, SHAPES, compose, render
from alignkit.sandbox.worlds import to_tensor
from alignkit.seeds import derive_seed
from alignkit.storage import write_atomic

SCENES = 24_000
FLOW = recipes.Recipe(steps=12_000, batch=32, learning_rate=8e-4, seed=210, warmup=200)
CAPTION_DROPOUT = 0.1
PLACES = 0.3  # weight of the classifier's loss
KINDS = 1 + len(SHAPES) * len(PALETTE)  # the ground, or a shape with its colour


class Scenes:
    """`size` captioned images; number i is a function of (seed, i)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def _source(self, index: int) -> np.random.Generator:
        return np.random.default_rng(derive_seed("flow-scene", self.seed, index))

    def caption(self, index: int) -> str:
        """The caption of image `index`."""
        return random_caption(self._source(index))

    def image(self, index: int) -> tuple[Tensor, Tensor]:
        """The image [3, 64, 64], and for each of its 8 x 8 patches [64] the kind of its object; 0 is the ground."""
        rng = self._source(index)
        scene = compose(parse(random_caption(rng)), rng)
        kinds = [
            1 + SHAPES.index(thing.shape) * len(PALETTE) + list(PALETTE).index(thing.color) for thing in scene.things
        ]
        labels = np.array([0, *kinds])[covers(scene)]
        return to_tensor(render(scene, rng)), torch.from_numpy(labels).flatten()

    @torch.no_grad()
    def encoded(self, generator: PipelineGenerator, file: Path) -> dict[str, Tensor]:
        """Latents [N, 4, 16, 16] and labels [N, 64] of all images; computed once and stored in `file`."""
        if not file.is_file():
            latents, labels = [], []
            for start in tqdm(range(0, self.size, 16), desc="encode scenes", unit="batch"):
                rows = [self.image(index) for index in range(start, min(start + 16, self.size))]
                latents.append(generator.encode(torch.stack([pixels for pixels, _ in rows])).half())
                labels.append(torch.stack([kinds for _, kinds in rows]).byte())
            write_atomic(file, save({"latents": torch.cat(latents).contiguous(), "labels": torch.cat(labels)}))
        return load_file(file)


class Noised(Dataset[dict[str, Any]]):
    """`size` training items: scene, time, noise and a caption, sometimes empty; each is a function of its index."""

    def __init__(self, scenes: Scenes, encoded: Mapping[str, Tensor], size: int) -> None:
        self.scenes, self.encoded, self.size = scenes, encoded, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(derive_seed("flow-item", self.scenes.seed, index))
        chosen = int(rng.integers(self.scenes.size))
        latents = self.encoded["latents"][chosen].float()
        is_dropped = rng.random() < CAPTION_DROPOUT
        return {
            "latents": latents,
            "labels": self.encoded["labels"][chosen].long(),
            "noise": torch.from_numpy(rng.standard_normal(latents.shape, np.float32)),
            "t": torch.tensor(rng.normal()).sigmoid().float(),
            "prompt": "" if is_dropped else self.scenes.caption(chosen),
        }


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Items as a batch; prompts stay a list of texts."""
    prompts = [row.pop("prompt") for row in rows]
    return {**torch.utils.data.default_collate(rows), "prompts": prompts}


class FlowObjective(recipes.Objective):
    """The loss of the module docstring on a batch; trains the transformer, both CLIP towers and the classifier."""

    def __init__(self, generator: PipelineGenerator) -> None:
        super().__init__()
        self.net = generator.net.requires_grad_(True)
        towers = [generator.pipeline.text_encoder, generator.pipeline.text_encoder_2]
        self.towers = nn.ModuleList(towers).requires_grad_(True)
        width = self.net.inner_dim
        self.places = nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, KINDS))
        self._generator = generator  # no module, so it adds no parameters here
        middle = self.net.transformer_blocks[len(self.net.transformer_blocks) // 2]
        middle.register_forward_hook(self._keep_tokens)

    def _keep_tokens(self, _block: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        self._tokens = outputs[1]  # of the image; the first are those of the text

    def forward(
        self, latents: Tensor, labels: Tensor, noise: Tensor, t: Tensor, prompts: list[str]
    ) -> dict[str, Tensor]:
        generator = self._generator
        prediction = generator.predict(generator.add_noise(latents, noise, t), t, generator.conditioner(prompts))
        error = (prediction.float() - generator.target(latents, noise, t)).square().mean()
        named = functional.cross_entropy(self.places(self._tokens).float().flatten(0, 1), labels.flatten())
        return {"loss": error + PLACES * named}


def train_flow(
    models_dir: Path, out: Path, work: Path, recipe: recipes.Recipe = FLOW, scenes: int = SCENES
) -> PipelineGenerator:
    """Train `flow_clean` into `out`, on the latents of `models_dir / "vae"`; continues where it was stopped."""
    set_seed(recipe.seed)
    generator = wrap(generators.build_flow(AutoencoderKL.from_pretrained(models_dir / "vae")), name="flow_clean")
    world = Scenes(scenes, recipe.seed)
    encoded = world.encoded(generator, work / "scenes.safetensors")
    items = Noised(world, encoded, recipe.scenes)
    recipes.fit(FlowObjective(generator), items, recipe, work, collate)
    generators.store(generator, out, generators.FP8)
    return generator

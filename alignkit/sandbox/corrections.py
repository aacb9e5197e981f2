"""A LoRA that corrects the sandbox's vision-language model on generated images.

The model learns from rendered scenes (`interviews.py`). Generated images more often have extra objects, objects
that touch, blurred edges, and shapes that are none of the known ones. Half of the rows here are images of the sandbox's
generators, with the same kinds of question and one more, the number of all objects. The answers are read from the
pixels, as the verifier reads them; whether an image shows its caption is never asked, because that is gold's verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, set_seed

from alignkit.generators import load_generator
from alignkit.records import Sampling, texts
from alignkit.sandbox import questions
from alignkit.sandbox.captions import parse, prompts
from alignkit.sandbox.gold import look
from alignkit.sandbox.interviews import Interview, Interviews, Patchify, answer_loss, image_row, read, with_noise
from alignkit.sandbox.questions import COUNTS, Question, Subject, number_of_all
from alignkit.sandbox.recipes import Objective, Recipe, fit
from alignkit.sandbox.scenes import SHAPES, SIZE, Scene, Thing, render
from alignkit.seeds import derive_seed
from alignkit.storage import write_atomic

RECIPE = Recipe(steps=400, batch=32, learning_rate=5e-4, seed=117)
RANK = 16
LAYERS = r".*\.(attn\.qkv|attn\.proj|[qkvo]_proj|(gate|up|down)_proj)"
QUESTIONS = 10  # most a subject
NEAR = 0.9  # as in `questions.Subject`
BATCH = 32


@dataclass(frozen=True, slots=True)
class Source:
    """`count` images of the generator `name`."""

    name: str
    count: int
    steps: int
    guidance_scale: float


SOURCES = (
    Source("unet", 1600, 8, 1.0),
    Source("unet", 400, 8, 2.5),
    Source("flow", 800, 12, 1.0),
    Source("flow", 400, 12, 2.5),
)


@dataclass(frozen=True, slots=True)
class Generated:
    """An image [3, H, W], what is asked about it, and the number of its objects.

    The subject has the objects of known shape. `is_known`: there are no others, and a shape is absent; else only the
    number of all objects has a certain answer.
    """

    image: Tensor
    about: Subject
    number: int
    is_known: bool

    @classmethod
    def of(cls, image: Tensor, caption: str) -> Generated | None:
        """What `image`, made for `caption`, shows; None without objects and with more than five."""
        seen = look(image.permute(1, 2, 0).numpy())
        if not 1 <= len(seen) <= max(COUNTS):
            return None
        things = tuple(
            Thing(thing.shape, thing.color, thing.x, thing.y, float(np.sqrt(thing.area / np.pi)))
            for thing in seen
            if thing.shape is not None
        )
        about = Subject(Scene(things, parse(caption).background or ""), caption, is_shown=False, near=NEAR)
        is_known = len(things) == len(seen) and not {thing.shape for thing in things} >= {*SHAPES}
        return cls(image, about, len(seen), is_known)

    def asked(self, rng: np.random.Generator) -> list[Question]:
        """Questions with certain answers, at most QUESTIONS."""
        others = questions.ask(self.about, rng, QUESTIONS) if self.is_known else []
        chosen = [question for question in others if question.kind != "caption"]
        return [*chosen[: QUESTIONS - 1], number_of_all(self.number, rng)]


def draw(folder: Path, source: Source, seed: int, cache: Path) -> list[Generated]:
    """Images of the generator in `folder`; those with no or too many objects are left out.

    All images are kept in the file `cache`.
    """
    asked = prompts(source.count, seed=seed)
    if not cache.exists():
        generator = load_generator(str(folder))
        sampling = Sampling(steps=source.steps, guidance_scale=source.guidance_scale, height=SIZE, width=SIZE)
        seeds = [derive_seed("corrections", seed, prompt.id) for prompt in asked]
        parts = [slice(start, start + BATCH) for start in range(0, len(asked), BATCH)]
        bar = tqdm(parts, desc=f"images of {source.name}")
        made = [generator.generate(texts(asked[part]), seeds[part], sampling) for part in bar]
        write_atomic(cache, save_tensors({"images": (torch.cat(made).cpu() * 255).round().byte().contiguous()}))
    images = load_file(cache)["images"].float() / 255
    rows = (Generated.of(image, prompt.text) for image, prompt in zip(images, asked, strict=True))
    return [row for row in rows if row is not None]


class Corrections(Dataset[dict[str, Any]]):
    """Rows in the form of `Interviews`.

    Of four rows, two are generated images, one is a rendered scene whose number of objects is asked too, and one is a
    row of `Interviews`.
    """

    def __init__(self, size: int, seed: int, generated: Sequence[Generated]) -> None:
        self.size, self.seed, self.generated = size, seed, generated
        self.rendered = Interviews(size, seed, QUESTIONS, near=NEAR)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index % 4 == 3:
            return self.rendered[index]
        rng = np.random.default_rng(derive_seed("correction", self.seed, index))
        if index % 4 == 1:
            about = questions.subject(rng, NEAR)
            asked = questions.ask(about, rng, QUESTIONS - 1)
            asked.append(number_of_all(len(about.scene.things), rng))
            return image_row(about, with_noise(render(about.scene, rng), rng), asked)
        chosen = self.generated[int(rng.integers(len(self.generated)))]
        return image_row(chosen.about, chosen.image, chosen.asked(rng))


class Answers(Objective):
    """Cross-entropy of the answers, averaged over questions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vlm = model

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        seen = self.vlm.model.visual(batch["patches"], grid_thw=batch["grids"]).pooler_output
        hidden = read(self.vlm, seen, batch["ids"], batch["groups"], batch["positions"])[-1]
        return {"loss": answer_loss(self.vlm, hidden, batch["targets"], batch["weights"])}


def train_corrections(
    patchify: Patchify,
    models: Mapping[str, Path],
    out: Path,
    work: Path,
    *,
    recipe: Recipe = RECIPE,
    sources: Sequence[Source] = SOURCES,
) -> None:
    """Train the LoRA on the model `models["vlm"]` and save it as PEFT does; `models` has the generators too.

    `patchify` is an argument because this package does not import `rewards`.
    """
    generated = [
        row
        for number, source in enumerate(sources)
        for row in draw(models[source.name], source, recipe.seed + number, work / f"images-{number}.safetensors")
    ]
    set_seed(recipe.seed)
    words = AutoTokenizer.from_pretrained(models["vlm"])
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(models["vlm"], dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    tuned.peft_config["default"].base_model_name_or_path = "sandbox:vlm"
    rows = Corrections(recipe.scenes, recipe.seed, generated)
    fit(Answers(tuned.get_base_model()), rows, recipe, work / "train", Interview(words, model, patchify))
    tuned.half().save_pretrained(out, save_embedding_layers=False)  # else it looks for the model on the hub
    (out / "README.md").unlink()  # PEFT's card, which names the model by its path

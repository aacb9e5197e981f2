"""How long the sandbox's own trainings take on this machine. A progress bar, then one JSON line.

    python benchmarks/training_times.py [--steps 30] [--only clip unet ...]

Every recipe is begun twice, with few steps and with `--steps` more, and generators once more with more scenes (they
render and encode those before the first step); what is in between is the price of a step and of a scene, and the
recipe's own numbers make minutes of them. A stage of `unet` is begun from a random network of the same kind and the
heads from a reader that has learnt nothing: what is in the weights takes no time. `bf16` says whether the trainings
compute in bf16 autocast, which they do where the hardware is faster with it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import alignkit.sandbox
from alignkit.precision import fast_bf16
from alignkit.sandbox import film, film_vae, flow, generators, interviews, recipes
from alignkit.sandbox.vlm import CUTTING
from rewards.models.patches import Patches
from rewards.preference import PreferenceConfig, PreferenceModel

WEIGHTS = Path(alignkit.sandbox.__file__).parent / "weights"
FEW, SCENES = 5, 640
STAGED: dict[str, tuple[Callable[..., Any], Sequence[recipes.Recipe]]] = {
    "vae": (recipes.train_vae, recipes.VAE),
    "clip": (lambda out, work, stages: recipes.train_clip(out, work, *stages), (recipes.CLIP,)),
    "reader": (partial(recipes.train_reader, PreferenceModel, PreferenceConfig), recipes.READER),
    "film_vae": (film_vae.train_vae, film_vae.STAGES),
    "vlm": (partial(interviews.train_vlm, Patches(**CUTTING)), interviews.STAGES),
}


def seconds(train: Callable[[Path, Path], Any]) -> float:
    """How long one training takes, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train(Path(folder) / "out", Path(folder) / "work")
        return time.perf_counter() - start


def staged(name: str, steps: int) -> float:
    """Seconds that the whole recipe takes; its images are drawn as they are seen."""
    train, stages = STAGED[name]
    total = 0.0
    for stage in stages:
        few, many = (seconds(partial(train, stages=(replace(stage, steps=n),))) for n in (FEW, FEW + steps))
        total += few + (many - few) / steps * (stage.steps - FEW)
    return total


def head(name: str, steps: int, folder: Path) -> float:
    """Seconds that a preference head takes."""
    reader = folder / "reader"
    if not reader.is_dir():
        recipes.train_reader(
            PreferenceModel, PreferenceConfig, reader, folder / "work", (replace(recipes.READER[0], steps=1),)
        )
    recipe = recipes.HEADS[name]
    begin = partial(recipes.train_head, name, PreferenceModel, reader)
    few, many = (seconds(partial(begin, recipe=replace(recipe, steps=n))) for n in (FEW, FEW + steps))
    return few + (many - few) / steps * (recipe.steps - FEW)


def generator(name: str, steps: int, folder: Path) -> float:
    """Seconds that one stage of a generator takes, its scenes rendered and encoded."""
    recipe = generators.RECIPES[name]
    recipe = replace(recipe, start=name if recipe.adapter else "new unet")

    def begin(n: int, scenes: int) -> float:
        return seconds(partial(_train, name, folder, replace(recipe, steps=n, scenes=scenes)))

    few, many, more = begin(FEW, SCENES), begin(FEW + steps, SCENES), begin(FEW, 3 * SCENES)
    rest = generators.RECIPES[name]
    return few + (many - few) / steps * (rest.steps - FEW) + (more - few) / (2 * SCENES) * (rest.scenes - SCENES)


# How each of these is trained: with which stages, on how many scenes or clips, and the keyword of that number.
ENCODED: dict[str, tuple[Callable[..., Any], Sequence[recipes.Recipe], int, str]] = {
    "flow_clean": (flow.train_flow, (flow.FLOW,), flow.SCENES, "scenes"),
    "film_clean": (film.train_clean, film.CLEAN, film.CLIPS, "clips"),
    "film": (film.train_policy, (film.POLICY,), film.POLICY_CLIPS, "clips"),
}


def encoded(name: str, steps: int, folder: Path) -> float:
    """Seconds that a generator takes which is trained on latents, its scenes or clips rendered and encoded."""
    train, stages, scenes, unit = ENCODED[name]

    def begin(stage: recipes.Recipe, n: int, count: int) -> float:
        short = replace(stage, steps=n)
        given: dict[str, Any] = {"stages": (short,)} if name == "film_clean" else {"recipe": short}
        return seconds(partial(train, folder, **given, **{unit: count}))

    few = [begin(stage, FEW, SCENES) for stage in stages]
    many = [begin(stage, FEW + steps, SCENES) for stage in stages]
    rest = (begin(stages[0], FEW, 3 * SCENES) - few[0]) / (2 * SCENES) * (scenes - SCENES)
    each = [(after - before) / steps for before, after in zip(few, many, strict=True)]
    trained = sum(took * stage.steps for took, stage in zip(each, stages, strict=True)) - each[0] * FEW
    return few[0] + trained + rest


def untrained_video(folder: Path) -> None:
    """The models that `film_clean` and `film` start from, after one step."""
    if not (folder / "film_vae").is_dir():
        stages = [replace(film_vae.STAGES[0], steps=1)]
        film_vae.train_vae(folder / "film_vae", folder / "work" / "film_vae", stages)
        stage = replace(film.CLEAN[0], steps=1, batch=1)
        film.train_clean(folder, folder / "film_clean", folder / "work" / "film_clean", [stage], clips=1)


def _train(name: str, models: Path, recipe: generators.GeneratorRecipe, out: Path, work: Path) -> None:
    generators.train_generator(name, models, out, work, recipe)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", default=[*STAGED, *recipes.HEADS, *ENCODED, *generators.RECIPES])
    options = parser.parse_args()
    minutes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        (folder / "vae").symlink_to(WEIGHTS / "unet" / "vae")
        for name in ("unet", "flow"):
            (folder / name).symlink_to(WEIGHTS / name)
        for name in (bar := tqdm(options.only)):
            bar.set_description(name)
            if name in STAGED:
                took = staged(name, options.steps)
            elif name in ENCODED:
                if name.startswith("film"):
                    untrained_video(folder)
                took = encoded(name, options.steps, folder)
            else:
                took = (head if name in recipes.HEADS else generator)(name, options.steps, folder)
            minutes[name] = round(took / 60, 1)
    without = round(sum(took for name, took in minutes.items() if name != "vlm") / 60, 2)
    found = {"minutes": minutes, "hours_without_vlm": without}
    print(json.dumps(found | {"bf16": fast_bf16(), "threads": torch.get_num_threads(), "steps": options.steps}))


if __name__ == "__main__":
    main()

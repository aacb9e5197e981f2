"""How long the sandbox's own trainings take on this machine. A progress bar, then one JSON line.

    python benchmarks/training_times.py [--steps 30] [--only clip unet ...] [--faster 4]

Every recipe is begun twice, with few steps and with `--steps` more, and generators once more with more scenes (they
render and encode those before the first step); what is in between is the price of a step and of a scene, and the
recipe's own numbers make minutes of them. A stage of `unet` is begun from a random network of the same kind and the
heads from a reader that has learnt nothing: what is in the weights takes no time.

The profiler adds up how long products of matrices, convolutions and attention take, which is what bf16 autocast makes
faster on cores that know bf16. `hours_if_faster` is what is left of the hours where these are `--faster` times as fast
and all else is as slow as it is here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import alignkit.sandbox
from alignkit.sandbox import generators, interviews, recipes
from alignkit.sandbox.vlm import CUTTING
from rewards.patches import Patches
from rewards.preference import PreferenceConfig, PreferenceModel

WEIGHTS = Path(alignkit.sandbox.__file__).parent / "weights"
FEW, SCENES = 5, 640
STAGED: dict[str, tuple[Callable[..., Any], Sequence[recipes.Recipe]]] = {
    "vae": (recipes.train_vae, recipes.VAE),
    "clip": (lambda out, work, stages: recipes.train_clip(out, work, *stages), (recipes.CLIP,)),
    "reader": (partial(recipes.train_reader, PreferenceModel, PreferenceConfig), recipes.READER),
    "vlm": (partial(interviews.train_vlm, Patches(**CUTTING)), interviews.STAGES),
}


# What autocast lowers and oneDNN or MKL computes; each named where its time is spent, none within another.
PRODUCTS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::mkldnn_convolution",
        "aten::convolution_backward",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    }
)
Cost = NDArray[np.float64]  # [2]: seconds in all, and seconds of them in PRODUCTS


def cost(train: Callable[[Path, Path], Any]) -> Cost:
    """How long one training takes, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, profile(activities=[ProfilerActivity.CPU]) as seen:
        start = time.perf_counter()
        train(Path(folder) / "out", Path(folder) / "work")
        took = time.perf_counter() - start
    spent = sum(row.self_cpu_time_total for row in seen.key_averages() if row.key in PRODUCTS)
    return np.array([took, spent / 1e6])


def staged(name: str, steps: int) -> Cost:
    """What the whole recipe takes; its pictures are drawn as they are seen."""
    train, stages = STAGED[name]
    total = np.zeros(2)
    for stage in stages:
        few, many = (cost(partial(train, stages=(replace(stage, steps=n),))) for n in (FEW, FEW + steps))
        total += few + (many - few) / steps * (stage.steps - FEW)
    return total


def head(name: str, steps: int, folder: Path) -> Cost:
    """What a preference head takes."""
    reader = folder / "reader"
    if not reader.is_dir():
        recipes.train_reader(
            PreferenceModel, PreferenceConfig, reader, folder / "work", (replace(recipes.READER[0], steps=1),)
        )
    recipe = recipes.HEADS[name]
    begin = partial(recipes.train_head, name, PreferenceModel, reader)
    few, many = (cost(partial(begin, recipe=replace(recipe, steps=n))) for n in (FEW, FEW + steps))
    return few + (many - few) / steps * (recipe.steps - FEW)


def generator(name: str, steps: int, folder: Path) -> Cost:
    """What one stage of a generator takes, its scenes rendered and encoded."""
    recipe = generators.RECIPES[name]
    if not recipe.start.startswith("new "):
        recipe = replace(recipe, start="unet" if recipe.adapter else "new unet")

    def begin(n: int, scenes: int) -> Cost:
        return cost(partial(_train, name, folder, replace(recipe, steps=n, scenes=scenes)))

    few, many, more = begin(FEW, SCENES), begin(FEW + steps, SCENES), begin(FEW, 3 * SCENES)
    rest = generators.RECIPES[name]
    return few + (many - few) / steps * (rest.steps - FEW) + (more - few) / (2 * SCENES) * (rest.scenes - SCENES)


def _train(name: str, models: Path, recipe: generators.GeneratorRecipe, out: Path, work: Path) -> None:
    generators.train_generator(name, models, out, work, recipe)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--faster", type=float, default=4.0)
    parser.add_argument("--only", nargs="+", default=[*STAGED, *recipes.HEADS, *generators.RECIPES])
    options = parser.parse_args()
    costs: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        (folder / "vae").symlink_to(WEIGHTS / "unet" / "vae")
        (folder / "unet").symlink_to(WEIGHTS / "unet")
        for name in (bar := tqdm(options.only)):
            bar.set_description(name)
            if name in STAGED:
                costs[name] = staged(name, options.steps)
            else:
                costs[name] = (head if name in recipes.HEADS else generator)(name, options.steps, folder)
    print(json.dumps(summary(costs, options.faster) | {"steps": options.steps}))


def summary(costs: Mapping[str, Cost], faster: float) -> dict[str, Any]:
    """What is printed: minutes a model, its share in products, and the hours of all but `vlm`."""
    together = sum((both for name, both in costs.items() if name != "vlm"), np.zeros(2)) / 3600
    return {
        "minutes": {name: round(took / 60, 1) for name, (took, _) in costs.items()},
        "share_in_products": {name: round(spent / took, 2) for name, (took, spent) in costs.items()},
        "hours_without_vlm": round(together[0], 2),
        "hours_if_faster": round(together[0] - together[1] * (1 - 1 / faster), 2),
        "faster": faster,
    }


if __name__ == "__main__":
    main()

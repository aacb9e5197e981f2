"""How well rewards rank generated images as gold does. One JSON line for each reward.

    python benchmarks/agreement.py [--model sandbox:unet] [--adapter FOLDER] [--prompts 150] [--seeds 4]
        [--steps 8] [--guidance_scale 1] [--extra_weight 1] [--twins] [--whole] [--number_of_all]
        [--critic_adapter FOLDER]

The images are the generator's own, of prompts that no other benchmark uses. `auc` is the probability that an image that
gold accepts scores higher than one which it rejects (ties count half): over all images, by category, and `same_prompt`,
over the pairs of one prompt alone, which is what training on that prompt can use. 0.5 is chance. The reward `aspects`
is the sum over the questions of `alignkit.sandbox.aspects`; its lines named `aspects/KIND` are the mean over the
questions of one kind, on the images of prompts that have such questions.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from tqdm import tqdm

from alignkit.aspects import Rules
from alignkit.generators import load_generator
from alignkit.protocols import Reward
from alignkit.records import Prompt, Sampling, texts
from alignkit.sandbox.aspects import GrammarWriter
from alignkit.sandbox.captions import prompts
from alignkit.sandbox.gold import GoldReward
from alignkit.seeds import derive_seed
from alignkit.shipped import model_path
from rewards.clip_score import ClipScore
from rewards.preference import PreferenceReward
from rewards.vqa_score import VqaScore
from rewards.yes_no import YesNo

BATCH = 32
Floats = NDArray[np.float64]


def auc(scores: Floats, verdicts: Floats) -> float:
    """Mann-Whitney's U of the accepted over the rejected, divided by the number of pairs; NaN without pairs."""
    finite = np.isfinite(scores)
    scores, accepted = scores[finite], verdicts[finite] > 0.5
    ones, zeros = int(accepted.sum()), int((~accepted).sum())
    if not ones * zeros:
        return float("nan")
    return float((rankdata(scores)[accepted].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def within(scores: Floats, verdicts: Floats, seeds: int) -> float:
    """The same over pairs of one prompt; rows are ordered by prompt."""
    higher = total = 0.0
    for own, right in zip(scores.reshape(-1, seeds), verdicts.reshape(-1, seeds) > 0.5, strict=True):
        gaps = own[right][:, None] - own[~right][None]
        gaps = gaps[np.isfinite(gaps)]
        higher += float((gaps > 0).sum() + 0.5 * (gaps == 0).sum())
        total += gaps.size
    return higher / total if total else float("nan")


def with_questions(asked: Sequence[Prompt], writer: GrammarWriter) -> list[Prompt]:
    """The prompts with the questions of the grammar."""
    drafts = writer.write(asked, Rules(("alignment",), 99), [[]] * len(asked))
    pairs = zip(asked, drafts, strict=True)
    return [replace(prompt, metadata={**prompt.metadata, "questions": own.questions}) for prompt, own in pairs]


@torch.no_grad()
def scored(reward: Reward, images: torch.Tensor, asked: Sequence[Prompt]) -> dict[str, Floats]:
    """Total and parts [images] by name; NaN where an image has no such part."""
    found: dict[str, Floats] = {}
    for start in tqdm(range(0, len(images), BATCH), desc=reward.name):
        part = slice(start, start + BATCH)
        scores = reward(images[part], asked[part])
        for name, values in {"": scores.total, **scores.parts}.items():
            column = found.setdefault(name, np.full(len(images), np.nan))
            column[part] = values.double().numpy()
    return found


def by_kind(parts: dict[str, Floats]) -> dict[str, Floats]:
    """Mean of the parts of one kind of question: object, color, count, all, relation, no (absent), whole."""
    kinds: dict[str, list[Floats]] = defaultdict(list)
    for name, values in parts.items():
        if name and "/" not in name:
            kinds[name.split("_")[0]].append(values)
    means = {}
    for kind, columns in kinds.items():
        stacked = np.stack(columns)
        count = np.isfinite(stacked).sum(0)
        means[kind] = np.where(count > 0, np.nansum(stacked, 0) / np.maximum(count, 1), np.nan)
    return means


def generated(chosen: argparse.Namespace, asked: list[Prompt], seeds: list[int]) -> torch.Tensor:
    """One image [3, H, W] for each prompt and seed."""
    sampling = Sampling(chosen.steps, chosen.guidance_scale, 64, 64)
    generator = load_generator(model_path(chosen.model), adapter=chosen.adapter)
    parts = [slice(start, start + BATCH) for start in range(0, len(asked), BATCH)]
    bar = tqdm(parts, desc=chosen.model)
    return torch.cat([generator.generate(texts(asked[part]), seeds[part], sampling) for part in bar])


def main() -> None:
    """Generate, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sandbox:unet")
    parser.add_argument("--adapter")
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--extra_weight", type=float, default=1.0)
    parser.add_argument("--twins", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--number_of_all", action="store_true")
    parser.add_argument("--critic_adapter", help="a LoRA on the critic, as sandbox:vlm_corrections")
    chosen = parser.parse_args()
    writer = GrammarWriter(
        whole=chosen.whole,
        twins=chosen.twins,
        number_of_all=chosen.number_of_all,
        extra_weight=chosen.extra_weight,
    )
    distinct = with_questions(prompts(chosen.prompts, seed=91), writer)
    asked = [prompt for prompt in distinct for _ in range(chosen.seeds)]
    seeds = [derive_seed("agreement", prompt.id, number) for prompt in distinct for number in range(chosen.seeds)]
    images = generated(chosen, asked, seeds)
    verdicts = GoldReward()(images, asked).total.double().numpy()
    categories = np.array([prompt.metadata["category"] for prompt in asked])
    adapter = chosen.critic_adapter and model_path(chosen.critic_adapter)
    rewards: dict[str, Reward] = {
        "aspects": YesNo(model_path("sandbox:vlm"), adapter=adapter),
        "vqa": VqaScore(model_path("sandbox:vlm"), adapter=adapter),
        "clip": ClipScore(model_path("sandbox:clip")),
        "careful": PreferenceReward(model_path("sandbox:careful")),
    }
    for name, reward in rewards.items():
        columns = scored(reward, images, asked)
        lines = {name: columns[""]}
        if name == "aspects":
            lines |= {f"aspects/{kind}": values for kind, values in by_kind(columns).items()}
        for label, values in lines.items():
            masks = {str(own): categories == own for own in np.unique(categories)}
            shares = {"auc": auc(values, verdicts), "same_prompt": within(values, verdicts, chosen.seeds)}
            shares |= {own: auc(values[mask], verdicts[mask]) for own, mask in masks.items()}
            shares |= {"gold": float(verdicts.mean())}
            line = {
                "reward": label,
                **{key: None if np.isnan(share) else round(share, 3) for key, share in shares.items()},
            }
            print(json.dumps({**line, "images": int(np.isfinite(values).sum())}), flush=True)


if __name__ == "__main__":
    main()

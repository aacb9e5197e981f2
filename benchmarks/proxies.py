"""What each proxy of the sandbox can tell apart. One JSON line.

    python benchmarks/proxies.py [--count 100]

For every category, `count` captions with two rendered scenes each: one that shows the caption, one that contradicts it
as `scenes.contradict` does. The number is the share of pairs in which the proxy prefers the right one; 0.5 is chance.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import alignkit.sandbox
from alignkit.protocols import Reward
from alignkit.records import Prompt
from alignkit.sandbox.captions import bodies, parse
from alignkit.sandbox.scenes import CATEGORIES, compose, contradict, render
from alignkit.sandbox.worlds import to_tensor
from alignkit.seeds import derive_seed
from rewards.clip_score import ClipScore
from rewards.preference import PreferenceReward
from rewards.vqa_score import VqaScore


def pairs(category: str, count: int) -> tuple[list[Prompt], torch.Tensor, torch.Tensor]:
    """Prompts, images that show them [count, 3, H, W], and images that contradict them."""
    rng, pool = np.random.default_rng(derive_seed("proxies", category)), bodies(category)
    texts = [pool[int(rng.integers(len(pool)))] for _ in range(count)]
    specs = [(parse(text), contradict(parse(text), rng)) for text in texts]
    right, wrong = ([to_tensor(render(compose(pair[side], rng), rng)) for pair in specs] for side in (0, 1))
    return [Prompt.from_text(text) for text in texts], torch.stack(right), torch.stack(wrong)


@torch.no_grad()
def accuracy(reward: Reward, count: int) -> dict[str, float]:
    """Share of pairs in which the faithful image scores higher, by category."""
    shares = {}
    for category in tqdm(CATEGORIES, desc=reward.name):
        prompts, right, wrong = pairs(category, count)
        shares[category] = float((reward(right, prompts).total > reward(wrong, prompts).total).float().mean())
    return shares


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    count = parser.parse_args().count
    weights = Path(alignkit.sandbox.__file__).parent / "weights"
    rewards: list[Reward] = [ClipScore(str(weights / "clip"))]
    rewards += [PreferenceReward(str(weights / name)) for name in ("careful", "showy")]
    rewards += [VqaScore(str(weights / "vlm"))]
    answer = {reward.name: accuracy(reward, count) for reward in rewards}
    print(json.dumps({"question": "does the proxy prefer the faithful picture", "pairs_per_category": count, **answer}))


if __name__ == "__main__":
    main()

"""How often the sandbox's vision-language model answers right, per kind of question. Prints one JSON line.

    python benchmarks/answers.py --model FOLDER [--subjects 600] [--seed 999]

Held-out scenes, clips and pairs of images (another seed than training's), answers read greedily; yes/no questions are
balanced, so 0.5 is chance for those and for pairs.
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from alignkit.sandbox.vlm import CUTTING
from alignkit.sandbox.vlm_accuracy import accuracy
from rewards.models.patches import Patches


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder that `alignkit sandbox train vlm` made")
    parser.add_argument("--subjects", type=int, default=600)
    parser.add_argument("--seed", type=int, default=999)
    options = parser.parse_args()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(options.model)
    found = accuracy(model, words, Patches(**CUTTING), subjects=options.subjects, seed=options.seed)
    shares = {kind: round(share, 3) for kind, (share, _) in found.items()}
    total = sum(asked for _, asked in found.values())
    shares["all"] = round(sum(share * asked for share, asked in found.values()) / total, 3)
    print(json.dumps({"model": options.model, "right": shares, "asked": {kind: n for kind, (_, n) in found.items()}}))


if __name__ == "__main__":
    main()

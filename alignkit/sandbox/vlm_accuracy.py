"""How often the sandbox's vision-language model answers right."""

from __future__ import annotations

from collections import defaultdict

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from alignkit.sandbox.interviews import Interview, Interviews, Patchify, read


@torch.no_grad()
def accuracy(
    model: Qwen2_5_VLForConditionalGeneration,
    words: Qwen2Tokenizer,
    patchify: Patchify,
    *,
    subjects: int = 600,
    seed: int = 999,
) -> dict[str, tuple[float, int]]:
    """(share of right answers, number of questions) per kind of question on held-out scenes and clips, greedy answers.

    An answer is right if each of its tokens is the likeliest one after the right tokens before it. This is equal to
    greedy generation of the whole answer.
    """
    rows, collate = Interviews(subjects, seed, count=10), Interview(words, model, patchify)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, subjects, 50):
        chosen = [rows[index] for index in range(start, min(start + 50, subjects))]
        batch = collate(chosen)
        seen = model.model.visual(batch["patches"], grid_thw=batch["grids"]).pooler_output
        hidden = read(model, seen, batch["ids"], batch["groups"], batch["positions"])[-1]
        hits = model.lm_head(hidden).argmax(-1) == batch["targets"]
        for row, groups, hit, targets in zip(chosen, batch["groups"], hits, batch["targets"], strict=True):
            for number, question in enumerate(row["questions"], start=1):
                own = (groups == number) & (targets >= 0)
                right[question.kind].append(bool(hit[own].all()))
    return {kind: (sum(hits) / len(hits), len(hits)) for kind, hits in sorted(right.items())}

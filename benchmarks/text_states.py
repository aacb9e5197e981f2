"""What the states of a text encoder hold: a linear reader of shape, colour, count and place. One JSON line.

    python benchmarks/text_states.py FOLDER [--encoder text_encoder] [--prompts 6000]

FOLDER is a pipeline folder of the sandbox. Prompts of the caption grammar are encoded; for each question a multinomial
logistic regression is fitted on the prompts of two thirds of the bodies and tested on those of the others, so it never
sees a tested body in training. Its input is the mean of the token states that the generator reads (`tokens`), or the
pooled embedding (`pooled`). Beside the share of right answers stand those of the same architecture with random weights
(`random`) and of the most frequent answer (`frequent`).

Questions: shape and colour of the first object, count, place (the relation of the first object to the second), and
whose colour (the colour of the second object in "a red circle and a blue ring": the words alone do not tell it).
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from alignkit.sandbox.captions import parse, random_caption
from alignkit.sandbox.scenes import Spec

QUESTIONS: dict[str, Callable[[Spec], Any]] = {
    "shape": lambda spec: spec.kinds[0][0],
    "colour": lambda spec: spec.kinds[0][1],
    "count": lambda spec: len(spec.kinds) if spec.category == "counting" else None,
    "place": lambda spec: spec.relation,
    "whose colour": lambda spec: spec.kinds[1][1] if spec.category == "color_attr" else None,
}
PENALTY = 1e-4  # of the squared weights


@torch.no_grad()
def states(encoder: CLIPTextModelWithProjection, tokens: Tensor) -> dict[str, Tensor]:
    """`tokens` and `pooled` [N, D], standardised."""
    found: dict[str, list[Tensor]] = {"tokens": [], "pooled": []}
    for batch in tqdm(tokens.split(256), desc="encode", unit="batch"):
        output = encoder(batch, output_hidden_states=True)
        found["tokens"].append(output.hidden_states[-2].mean(1))
        found["pooled"].append(output.text_embeds)
    joined = {name: torch.cat(parts).double() for name, parts in found.items()}
    return {name: (value - value.mean(0)) / (value.std(0) + 1e-6) for name, value in joined.items()}


def read(features: Tensor, answers: Tensor, is_test: Tensor) -> float:
    """The share of right answers of a logistic regression from features [N, D], on the rows of `is_test` [N]."""
    rows = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    weights = rows.new_zeros(rows.shape[1], int(answers.max()) + 1, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = functional.cross_entropy(rows[~is_test] @ weights, answers[~is_test]) + PENALTY * weights.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return float(((rows[is_test] @ weights).argmax(1) == answers[is_test]).double().mean())


def answers_of(specs: Sequence[Spec], question: str) -> tuple[list[int], Tensor]:
    """The prompts that the question can be asked of, and the number of each one's answer."""
    found = [(row, answer) for row, spec in enumerate(specs) if (answer := QUESTIONS[question](spec)) is not None]
    numbers = {answer: number for number, answer in enumerate(sorted({answer for _, answer in found}))}
    return [row for row, _ in found], torch.tensor([numbers[answer] for _, answer in found])


def body(spec: Spec) -> str:
    """What the caption says, whatever its prefix and ground."""
    return json.dumps([spec.category, spec.kinds, spec.relation])


def measure(folder: Path, part: str, count: int, seed: int = 1) -> dict[str, Any]:
    """The answers to all questions by both encoders and both kinds of states."""
    rng = np.random.default_rng(seed)
    prompts = [random_caption(rng) for _ in range(count)]
    specs = [parse(prompt) for prompt in prompts]
    is_test = torch.tensor([zlib.crc32(body(spec).encode()) % 3 == 0 for spec in specs])
    tokenizer = AutoTokenizer.from_pretrained(folder / part.replace("text_encoder", "tokenizer"))
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    learned = CLIPTextModelWithProjection.from_pretrained(folder / part, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    encoders = {"learned": learned, "random": CLIPTextModelWithProjection(learned.config).eval()}
    found = {name: states(encoder, tokens) for name, encoder in encoders.items()}
    result: dict[str, Any] = {"model": str(folder), "encoder": part, "prompts": count}
    for question in tqdm(QUESTIONS, desc="questions"):
        rows, answers = answers_of(specs, question)
        tested = is_test[rows]
        most = Counter(answers[tested].tolist()).most_common(1)[0][1]
        shares = {"frequent": round(most / int(tested.sum()), 3)}
        for name, features in found.items():
            shares |= {
                f"{name} {kind}": round(read(value[rows], answers, tested), 3) for kind, value in features.items()
            }
        result[question] = shares
    return result


def main() -> None:
    """Parse the arguments and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--encoder", default="text_encoder")
    parser.add_argument("--prompts", type=int, default=6000)
    chosen = parser.parse_args()
    print(json.dumps(measure(chosen.folder, chosen.encoder, chosen.prompts)))


if __name__ == "__main__":
    main()

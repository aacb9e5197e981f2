"""Agreement of the gradients of different batches, for each choice of the steps with gradients. JSON lines.

    python benchmarks/gradient_agreement.py [--rewards careful showy] [--settings "last 3" ...] [--batches 8]
        [--prompts 8]

TextCraftor on `sandbox:flow`: a LoRA on both text encoders, before its first step, with the settings of
configs/sweep_textcraftor.yaml.

`cosine`: mean over all pairs of batches; 0 if the gradients have nothing in common. `error`: its standard error, as if
the pairs were independent. `norm`: mean norm of the gradient of a batch. `common`: norm of the part that all batches
have in common, the root of the mean product of two batches (0 if that is negative). `seconds`: CPU seconds a batch.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from typing import Any

import torch
from textcraftor_step import trainer_of
from torch import Tensor

from alignkit.commands.specs import build_reward
from alignkit.sandbox.captions import prompts
from alignkit.shipped import model_path
from alignkit.trainers.data import collate
from alignkit.trainers.textcraftor import TextCraftorTrainer

ALL = {"gradient_steps": "all"}
CUT = ALL | {"coupling": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "first 1": {"gradient_steps": "first 1"},
    "first 3": {"gradient_steps": "first 3"},
    "last 3": {"gradient_steps": "last 3"},
    "last 60%, tuned in these": {"gradient_steps": "last 60%", "tuned_steps": "last 60%"},
    "refl, 20%-100%": {"estimator": "refl", "early_end": "20%-100%"},
    "all": ALL,
    "all, 6 steps": ALL | {"sampling_steps": 6},
    "all, coupling 0": CUT,
    "all, coupling 0, 6 steps": CUT | {"sampling_steps": 6},
    "all, coupling 0, 6 steps, guidance 1": CUT | {"sampling_steps": 6, "guidance_scale": 1.0},
}
REWARDS = {
    "careful": ("preference", {"model": "sandbox:careful"}),
    "showy": ("preference", {"model": "sandbox:showy"}),
    "clip": ("clip_score", {"model": "sandbox:clip"}),
    "saturation": ("saturation", {}),
}


def build(reward: str, folder: str, batch: int, batches: int, settings: dict[str, Any]) -> TextCraftorTrainer:
    """A trainer before its first step."""
    kind, options = REWARDS[reward]
    keys: dict[str, Any] = {
        "full_finetune": False,
        "lora_rank": 16,
        "lora_targets": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        "as_sampled": True,
        "sampling_steps": 12,
        "guidance_scale": 2.5,
        "height": 64,
        "width": 64,
        "max_steps": batches,
        "per_device_train_batch_size": batch,
    }
    scored = build_reward(kind, {name: model_path(value) for name, value in options.items()})
    asked = prompts(batch * batches, seed=31)
    return trainer_of("sandbox:flow", folder, {reward: scored}, asked, **{**keys, **settings})


def gradients(trainer: TextCraftorTrainer, batch: int, batches: int) -> Tensor:
    """[batches, weights]: the gradient of each batch."""
    rows = []
    for start in range(0, batch * batches, batch):
        items = collate([trainer.train_dataset[start + number] for number in range(batch)])
        trainer.method_loss(trainer.model, items).loss.mean().backward()
        named = sorted(trainer.model.named_parameters())
        rows.append(torch.cat([weight.grad.flatten() for _, weight in named if weight.grad is not None]))
        trainer.model.zero_grad()
    return torch.stack(rows)


def agreement(found: Tensor) -> dict[str, float]:
    """Cosine, its error, norm and common part of gradients [batches, weights]."""
    products, norms = found @ found.T, found.norm(dim=1)
    upper = torch.triu_indices(len(found), len(found), offset=1)
    cosines = (products / torch.outer(norms, norms))[upper[0], upper[1]]
    common = products[upper[0], upper[1]].mean().clamp_min(0).sqrt()
    values = {"cosine": cosines.mean(), "error": cosines.std() / math.sqrt(len(cosines))}
    return {name: round(float(value), 4) for name, value in {**values, "norm": norms.mean(), "common": common}.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", default=["careful", "showy"], choices=list(REWARDS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8, help="in a batch")
    chosen = parser.parse_args()
    for reward in chosen.rewards:
        for name in chosen.settings:
            with tempfile.TemporaryDirectory() as folder:
                trainer = build(reward, folder, chosen.prompts, chosen.batches, SETTINGS[name])
                start = time.process_time()
                found = agreement(gradients(trainer, chosen.prompts, chosen.batches))
            seconds = round((time.process_time() - start) / chosen.batches, 2)
            print(json.dumps({"reward": reward, "steps": name, **found, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()

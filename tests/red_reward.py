"""A reward of the red channel, and settings for short trainings on it."""

from __future__ import annotations

import torch

from alignkit.records import Scores

PROMPTS = ["a red circle", "two blue rings", "a green square", "a cross"]
STEPS = 3
TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "lora_rank": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
}
CHAIN = {
    "reward_weights": {"red": 1.0},
    "sampling_steps": STEPS,
    "guidance_scale": 2.0,
    "height": 16,
    "width": 16,
}
SETTINGS = TRAINING | CHAIN


class Red:
    """A curved function of the red channel, so that its gradient differs from pixel to pixel."""

    name, modality, needs_prompt, differentiable = "red", "image", False, True
    comparable_across_prompts, native_range, licence, source = True, (-1.0, 1.0), "Apache-2.0", "here"

    def __call__(self, media, prompts):
        return Scores(torch.sin(3 * media[:, 0]).mean((1, 2)) - media[:, 1:].square().mean((1, 2, 3)))

"""One training run described by a job file; the kill and two-process tests run this as a program, others call `train`.

A job: model, rows (a dataset saved to disk), settings of the config, and optionally held_out, kill_at (step), validate.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from alignkit.generators import load_generator
from alignkit.records import Prompt, Sampling, Scores
from alignkit.trainers.rankdpo import RankDPOConfig, RankDPOTrainer
from alignkit.trainers.validation import Validation


class Brightness:
    """A reward that anyone can check: the mean of all pixels."""

    name = "brightness"

    def __call__(self, media: Tensor, prompts: Any) -> Scores:
        return Scores(media.mean((1, 2, 3)))


class Killed(TrainerCallback):
    """SIGKILL at the end of step `at`, before it is saved."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def build(job: dict[str, Any]) -> RankDPOTrainer:
    generator = load_generator(job["model"], device="cpu")
    rows = datasets.load_from_disk(job["rows"])
    count = job.get("held_out", 0)
    train = rows.select(range(len(rows) - count))
    held_out = rows.select(range(len(rows) - count, len(rows))) if count else None
    validation = None
    if job.get("validate"):
        prompts = [Prompt.from_text(text) for text in ("a red circle", "a blue ring")]
        validation = Validation(prompts, Sampling(2, 2.0, 16, 16), {"brightness": Brightness()})
    arguments = RankDPOConfig(**job["settings"])
    options = {"callbacks": [Killed(job["kill_at"])]} if "kill_at" in job else {}
    return RankDPOTrainer(generator, arguments, train, held_out, validation=validation, **options)


def train(job: dict[str, Any], *, resume: str | bool | None = None) -> RankDPOTrainer:
    trainer = build(job)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def main(job_file: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", ResourceWarning)
    job = json.loads(job_file.read_text())
    trainer = train(job)
    if trainer.is_world_process_zero():
        weights = {name: value.detach().contiguous() for name, value in trainer._trainable().items()}
        save_file(weights, job_file.with_suffix(".safetensors"))
        job_file.with_suffix(".log").write_text(json.dumps(trainer.state.log_history))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

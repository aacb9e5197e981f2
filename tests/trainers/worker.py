"""One training run described by a job file; the kill and two-process tests call `main` in a process of its own, others
`train`.

A job: model, rows (a dataset saved to disk), settings of the config, and optionally held_out, kill_at (step), validate
(a number of prompts), resume (a checkpoint), export (a folder), method (config and trainer as module:attribute), path
(a folder to import them from).
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
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from alignkit.generators import load_generator
from alignkit.records import Prompt, Sampling, Scores
from alignkit.resolve import resolve
from alignkit.trainers.rankdpo import RankDPOTrainer
from alignkit.trainers.sharding import gather, is_sharded
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


class ShardedOnCPU(RankDPOTrainer):
    """accelerate shards (FSDP2) on accelerators alone; with the same plugin torch shards on CPUs as well."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True


PROMPTS = ("a red circle", "a blue ring", "a green square", "a cross above a ring")
RANKDPO = ["alignkit.trainers.rankdpo:RankDPOConfig", "alignkit.trainers.rankdpo:RankDPOTrainer"]
COUNTS = {"encoded": 0, "generated": 0, "reference": 0}  # of this process


def count_work(generator: Any) -> None:
    """Note in COUNTS what the generator is asked to do."""
    encode, generate = generator.encode, generator.generate

    def counted_encode(pixels: Tensor) -> Tensor:
        COUNTS["encoded"] += len(pixels)
        return encode(pixels)

    def counted_generate(prompts: Any, *rest: Any) -> Tensor:
        COUNTS["generated"] += len(prompts)
        return generate(prompts, *rest)

    def count_reference(model: Any, inputs: Any) -> None:
        COUNTS["reference"] += len(inputs[0]) if model._is_reference else 0

    generator.encode, generator.generate = counted_encode, counted_generate
    generator.model.register_forward_pre_hook(count_reference)


def build(job: dict[str, Any]) -> Any:
    sys.path[:0] = [job["path"]] if "path" in job else []
    config, trainer = (resolve(name, {}, kind="class") for name in job.get("method", RANKDPO))
    generator = load_generator(job["model"], device="cpu")
    count_work(generator)
    rows = datasets.load_from_disk(job["rows"])
    count = job.get("held_out", 0)
    train = rows.select(range(len(rows) - count))
    held_out = rows.select(range(len(rows) - count, len(rows))) if count else None
    validation = None
    if job.get("validate"):
        prompts = [Prompt.from_text(text) for text in PROMPTS[: job["validate"]]]
        validation = Validation(prompts, Sampling(2, 2.0, 16, 16), {"brightness": Brightness()})
    arguments = config(**job["settings"])
    options = {"callbacks": [Killed(job["kill_at"])]} if "kill_at" in job else {}
    trainer = ShardedOnCPU if arguments.fsdp else trainer
    return trainer(generator, arguments, train, held_out, validation=validation, **options)


def train(job: dict[str, Any], *, resume: str | bool | None = None) -> Any:
    trainer = build(job)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def run(job: dict[str, Any], name: Path) -> None:
    """Train one job; the first process writes its weights and its log beside `name`."""
    trainer = train(job, resume=job.get("resume"))
    if "export" in job:
        trainer.export(Path(job["export"]))
    print("sharded" if is_sharded(trainer.generator.net) else "whole")
    weights = gather(trainer._trainable())  # all processes take part
    if trainer.is_world_process_zero():
        save_file({k: v.contiguous() for k, v in weights.items()}, name.with_suffix(".safetensors"))
        name.with_suffix(".log").write_text(json.dumps(trainer.state.log_history))
    print(f"\nbest {trainer.state.best_model_checkpoint}")
    print(json.dumps(COUNTS))


def main(job_file: Path) -> None:
    warnings.simplefilter("error", ResourceWarning)
    jobs = json.loads(job_file.read_text())
    for number, job in enumerate(jobs if isinstance(jobs, list) else [jobs]):
        run(job, job_file.with_stem(f"{job_file.stem}-{number}") if number else job_file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        # Not by the interpreter's own end: gloo's destructor waits for its thread, which may wait for the interpreter.
        os._exit(0)

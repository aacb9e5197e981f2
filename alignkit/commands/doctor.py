"""`alignkit doctor`: versions, devices, optional parts, and whether a model and a method will fit in memory."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from alignkit.commands import memory
from alignkit.commands.shared import Verb, execute
from alignkit.errors import ConfigError
from alignkit.provenance import versions

OPTIONAL = {
    "torchvision": "not needed",
    "bitsandbytes": "8-bit AdamW: optim: adamw_bnb_8bit",
    "xformers": "not needed; torch's own attention is used",
    "deepspeed": "ZeRO training: deepspeed: FILE.json",
    "tensorboard": "curves: report_to: tensorboard",
    "trackio": "curves: report_to: trackio",
    "wandb": "curves: report_to: wandb",
    "vllm": "served judges",
    "ray": "candidates for millions of prompts on a cluster",
    "av": "reading and writing videos",
}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorJob:
    """Look at this machine, and at a training that is planned on it.

    model: a diffusers folder; with it, peak memory is estimated from its headers.
    method: rankdpo or sft.
    resolution: side of the pictures; default: the model's own.
    batch: prompts a step and device.
    candidates: pictures a prompt (K).
    dtype: the precision of the frozen weights.
    bf16: whether the step computes in bf16 (autocast).
    """

    model: Path | None = None
    method: Literal["rankdpo", "sft"] = "rankdpo"
    resolution: int | None = None
    batch: int = 1
    candidates: int = 4
    lora_rank: int = 16
    full_finetune: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    bf16: bool = False
    gradient_checkpointing: bool = False
    low_memory: bool = False

    def __post_init__(self) -> None:
        if min(self.batch, self.candidates, self.lora_rank, self.resolution or 1) < 1:
            raise ConfigError("batch, candidates, lora_rank and resolution must be at least 1")


def part_state(name: str) -> str:
    """`absent`, `present`, or `BROKEN: why`. Imports the part: one that is installed may still not load."""
    if importlib.util.find_spec(name) is None:
        return "absent"
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"BROKEN: {reason[0]}; pip uninstall {name} (it is optional)"
    return "present"


def devices() -> dict[str, int]:
    """Bytes of memory by device, the one that training would use first."""
    import torch

    found = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[f"cuda:{index} {properties.name}"] = properties.total_memory
    machine = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=True)
    return {**found, f"cpu, {cores} cores, {torch.get_num_threads()} threads": machine.total}


def machine_lines() -> list[str]:
    """Versions, devices and optional parts, as printed."""
    from alignkit.precision import fast_bf16

    lines = ["versions", *(f"  {name:<14}{version}" for name, version in versions().items()), "", "devices"]
    lines += [f"  {name}: {size / memory.GIB:.1f} GiB" for name, size in devices().items()]
    lines.append(f"  bf16: {'fast' if fast_bf16() else 'slower than fp32 on this hardware; it stays off by default'}")
    lines += ["", "optional parts"]
    for name, use in OPTIONAL.items():
        state = part_state(name)
        lines.append(f"  {name:<14}{state}{'' if state.startswith('BROKEN') else f' ({use})'}")
    return lines


def setup_of(job: DoctorJob, model: memory.Model, lora_targets: Sequence[str]) -> memory.Setup:
    """The job as numbers, with the model's own resolution where none is given."""
    side = job.resolution or int(model.config.get("sample_size") or 64) * model.vae_ratio
    return memory.Setup(
        height=side,
        width=side,
        batch=job.batch,
        candidates=job.candidates if job.method == "rankdpo" else 1,
        lora_rank=job.lora_rank,
        lora_targets=tuple(lora_targets),
        full_finetune=job.full_finetune,
        needs_reference=job.method == "rankdpo",
        weight_bytes=_BYTES[job.dtype],
        compute_bytes=2 if job.bf16 else _BYTES[job.dtype],
        gradient_checkpointing=job.gradient_checkpointing,
        low_memory=job.low_memory,
    )


def memory_lines(job: DoctorJob) -> list[str]:
    """The estimate as a small table, and what to switch on. Raises MissingFileError naming missing component files."""
    from alignkit.generators import GENERATORS, read_model_index
    from alignkit.resolve import resolve

    if job.model is None:
        return []
    if not job.model.is_dir():
        advice = f"a hub id is downloaded first: hf download {job.model} --local-dir FOLDER"
        raise ConfigError(f"'{job.model}' is no local folder; {advice}")
    class_name = read_model_index(str(job.model))["_class_name"]
    model = memory.read_model(job.model)
    setup = setup_of(job, model, resolve(class_name, GENERATORS, kind="generator").lora_targets)
    device, limit = next(iter(devices().items()))
    size = f"{setup.width}x{setup.height}, {setup.batch} x {setup.candidates} pictures a step"
    lines = [f"peak memory of {job.method} on {job.model.name}, {size}"]
    lines += [f"  {name:<36}{amount / memory.GIB:9.2f} GiB" for name, amount in memory.parts(model, setup).items()]
    totals = {name: memory.total(model, choice) for name, choice in memory.variants(setup).items()}
    lines += ["", f"total, on {device} with {limit / memory.GIB:.1f} GiB"]
    for name, amount in totals.items():
        lines.append(f"  {name:<36}{amount / memory.GIB:9.2f} GiB  {_verdict(amount, limit)}")
    return [*lines, "", _advice(totals, limit)]


def _verdict(amount: float, limit: int) -> str:
    return "fits" if amount < 0.9 * limit else "does not fit"


def _advice(totals: dict[str, float], limit: int) -> str:
    fitting = [name for name, amount in totals.items() if _verdict(amount, limit) == "fits"]
    if not fitting:
        return "nothing fits: lower batch, resolution or candidates, use dtype: bfloat16, or shard (FSDP, DeepSpeed)"
    return "it fits as asked" if fitting[0] == "as asked" else f"switch on {fitting[0]}"


def _work(job: DoctorJob) -> None:
    if job.model is None:
        print("\n".join(machine_lines()))
        print("\nmemory of a training: alignkit doctor --model FOLDER --method rankdpo")
    else:
        print("\n".join(memory_lines(job)))


def _plan(job: DoctorJob) -> list[str]:
    return [f"read the headers of {job.model}" if job.model else "look at versions, devices and optional parts"]


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = "Show versions, devices and optional parts; with --model, estimate the peak memory of a training."
    execute(Verb("doctor", summary, lambda *_: DoctorJob, _plan, _work), argv)

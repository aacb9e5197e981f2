"""`alignkit doctor`: versions, devices, optional parts, memory of a planned training, trial of a reward or judge."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from alignkit.claims import versions
from alignkit.commands.doctor import memory
from alignkit.commands.doctor.critic_plan import CriticPlan
from alignkit.commands.doctor.model_shapes import Model, read_model
from alignkit.commands.methods import DEFAULT_METHOD, config_class, trainer_class
from alignkit.commands.specs import JudgeSpec, RewardSpec, require_known
from alignkit.commands.verb import Verb, execute
from alignkit.errors import ConfigError, require_at_least
from alignkit.generators.frames import require_frames
from alignkit.generators.table import GENERATORS
from alignkit.shipped import model_path, shipped_file
from alignkit.trainers import METHODS

if TYPE_CHECKING:
    from alignkit.commands.doctor.stages import Chain

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
RANKS = (8, 16, 32, 64, 128)
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorJob:
    """Look at this machine, at a training that is planned on it, at a reward, or at a judge.

    model: a diffusers folder, with weights or with configs alone (configs/models has published ones); with it, sizes,
        operations and peak memory of a training are printed.
    method: a name in the table of methods, or 'package.module:attribute' of your own.
    resolution: side of the images; default: the model's own.
    num_frames: frames of a video; default: what the family's pipeline generates, 1 for images.
    batch: prompts a step and device.
    candidates: images or videos a prompt (K), for a method on ranked candidates.
    dtype: the precision of the frozen weights.
    bf16: whether the step computes in bf16 (autocast).
    precompute_reference: whether reference errors are there already.
    guidance_scale: of the chains of a method that follows reward gradients.
    unconditional_gradient: whether their unconditional call carries gradients too.
    decode_frames: of a video, decode and score only the first frames, this many; default: all.
    decode_cache_on_cpu: keep what a causal video VAE caches in the memory of the CPU.
    decode_tiles: decode in spatial tiles.
    critic: the vision-language model that scores; without it no reward is counted.
    reward: a name in the table of rewards, or 'package.module:attribute' of your own; it is loaded and tried on three
        shipped photographs, where the right captions must win.
    judge: a name in the table of judges, or 'package.module:attribute' of your own; tried in the same way.
    options: keywords for the constructor of the reward or judge, such as the model folder.
    """

    model: Path | None = None
    method: str = DEFAULT_METHOD
    resolution: int | None = None
    num_frames: int | None = None
    batch: int = 1
    candidates: int = 4
    lora_rank: int = 16
    full_finetune: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    bf16: bool = False
    precompute_reference: bool = False
    activation_checkpointing: bool = False
    low_memory: bool = False
    guidance_scale: float = 5.0
    unconditional_gradient: bool = True
    decode_frames: int | None = None
    decode_cache_on_cpu: bool = False
    decode_tiles: bool = False
    critic: CriticPlan | None = None
    reward: str | None = None
    judge: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reward is None and self.judge is None and self.options:
            raise ConfigError("options are those of a reward or judge; name it with --reward or --judge")
        if sum(value is not None for value in (self.model, self.reward, self.judge)) > 1:
            raise ConfigError("give --model, --reward or --judge, one at a time")
        require_known(self.method, METHODS, kind="method")
        counts = {"batch": self.batch, "candidates": self.candidates, "lora_rank": self.lora_rank}
        sizes = {"resolution": self.resolution, "num_frames": self.num_frames, "decode_frames": self.decode_frames}
        require_at_least(1, {**counts, **sizes})


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
    lines += [f"  {name}: {size / GIB:.1f} GiB" for name, size in devices().items()]
    lines.append(f"  bf16: {'fast' if fast_bf16() else 'slower than fp32 on this hardware; it stays off by default'}")
    lines += ["", "optional parts"]
    for name, use in OPTIONAL.items():
        state = part_state(name)
        lines.append(f"  {name:<14}{state}{'' if state.startswith('BROKEN') else f' ({use})'}")
    return lines


def setup_of(job: DoctorJob, model: Model) -> memory.Setup:
    """The job as numbers, with the model's own size and LoRA targets."""
    family, trainer = model.family, trainer_class(job.method)
    candidates = job.candidates if trainer.candidates is None else trainer.candidates
    side = int(model.config.get("sample_size") or 128) * model.vae_ratio
    height, width, frames = family.default_size or (side, side, 1)
    if job.num_frames is not None:
        frames, step = job.num_frames, model.vae_frames * family.latent_group
        require_frames(frames, "num_frames", str(job.model), modality=family.modality, step=step)
    return memory.Setup(
        height=job.resolution or height,
        width=job.resolution or width,
        frames=frames,
        batch=job.batch,
        candidates=candidates,
        lora_rank=job.lora_rank,
        lora_targets=tuple(family.lora_targets),
        full_finetune=job.full_finetune,
        needs_reference=trainer.needs_reference,
        dtype=job.dtype,
        bf16=job.bf16,
        precompute_reference=job.precompute_reference,
        activation_checkpointing=job.activation_checkpointing,
        low_memory=job.low_memory and candidates > 1,
        caches_latents=trainer.parking is not None,
        trained_encoders=model.default_encoders if trainer.trains_encoders else (),
    )


def planned_model(folder: Path) -> Model:
    """The model of a local or shipped folder. Raises what `load_generator` raises for it, but not for NaN weights."""
    folder = shipped_file(Path(model_path(str(folder))))
    if not folder.is_dir():
        advice = f"a hub id is downloaded first: hf download {folder} --local-dir FOLDER"
        raise ConfigError(f"'{folder}' is no local folder; {advice}")
    return read_model(folder)


def model_lines(job: DoctorJob, folder: Path) -> list[str]:
    """Sizes, operations and memory of the planned training, and what it fits in."""
    model = planned_model(folder)
    setup = setup_of(job, model)
    blocks = [_size_lines(folder.name, model), *([] if setup.trained_encoders else [_lora_lines(model, setup)])]
    if follows_rewards(job.method):
        blocks += _stage_blocks(job, model, setup)
    elif job.critic is not None:
        raise ConfigError(f"critic: the method {job.method} has none; leave it out, or name another --method")
    else:
        blocks += [_operation_lines(model, setup), _memory_lines(job.method, model, setup)]
        blocks += [_card_lines(functools.partial(_verdict, model, setup))]
    notes = config_class(job.method).model_defaults(str(folder))
    blocks += [["defaults that depend on the model", *(f"  {note}" for note in notes.values())]] if notes else []
    return [line for block in blocks for line in [*block, ""]][:-1]


def _row(name: str, value: str) -> str:
    return f"  {name:<38}{value}"


def _size_lines(name: str, model: Model) -> list[str]:
    fixed = model.stored(model.denoiser) - model.denoiser_parameters()
    note = f"; {fixed / 1e6:.1f}M fixed positions besides" if fixed else ""
    sizes = {part: model.stored(part) for part in model.shapes} | {model.denoiser: model.denoiser_parameters()}
    notes = {model.denoiser: note}
    lines = [_row(part, f"{count / 1e6:9.1f}M{notes.get(part, '')}") for part, count in sizes.items()]
    return [f"parameters of {name}, a {model.pipeline}", *lines, *_family_lines(model.pipeline)]


def _family_lines(pipeline: str) -> list[str]:
    """What training needs beside the folder, where no family of the table loads it."""
    if pipeline in GENERATORS:
        return []
    return [
        f"no family of this version loads a {pipeline}: training needs one of your own, `family: package.module:Class`",
        "(docs/add_a_generator.md)",
    ]


def _lora_lines(model: Model, setup: memory.Setup) -> list[str]:
    ranks = sorted({*RANKS, setup.lora_rank})
    counts = {rank: memory.lora_parameters(model, setup.lora_targets, rank) for rank in ranks}
    lines = [_row(f"rank {rank}", f"{count / 1e6:9.2f}M") for rank, count in counts.items()]
    return [*textwrap.wrap(f"LoRA parameters, on {', '.join(setup.lora_targets)}", 100), *lines]


def _operation_lines(model: Model, setup: memory.Setup) -> list[str]:
    counts = memory.operations(model, setup)
    counts["all"] = sum(counts.values())
    thing = "image" if setup.frames == 1 else f"video of {setup.frames} frames"
    size = f"{setup.width}x{setup.height}"
    return [
        f"operations of a training step for one {thing} of {size} (a multiply-add is two; matrix products,",
        "convolutions and attention; backward: gradients of inputs and of what is trained)",
        *(_row(name, f"{count / 1e12:9.2f} TFLOP") for name, count in counts.items()),
    ]


def _memory_lines(method: str, model: Model, setup: memory.Setup) -> list[str]:
    amounts = memory.parts(model, setup)
    amounts["all"] = sum(amounts.values())
    if setup.caches_latents:
        amounts["before it, filling the latents cache"] = memory.encoding(model, setup)
    count = f"{setup.batch} x {setup.candidates} {'images' if setup.frames == 1 else 'videos'}"
    precision = f"frozen weights in {setup.dtype}{', autocast to bf16' if setup.bf16 else ''}"
    return [
        f"peak memory of {method}, {count} a step, {precision} (GB: 10^9 bytes)",
        *(_row(name, f"{amount / memory.GB:9.2f} GB") for name, amount in amounts.items()),
    ]


def _card_lines(verdict: Callable[[int], str]) -> list[str]:
    """What `verdict` says of the bytes of each GPU."""
    here, capacity = next(iter(devices().items()))
    cards = {f"{size} GB GPU": size * memory.GB for size in memory.CARDS}
    cards[f"here: {here.split(',')[0]}, {capacity / memory.GB:.0f} GB"] = capacity
    free = f"{memory.FREE:.0%} of a GPU's memory is left free"
    return [f"what fits ({free})", *(_row(name, verdict(int(size))) for name, size in cards.items())]


def _verdict(model: Model, setup: memory.Setup, capacity: int) -> str:
    found = memory.what_fits(model, setup, capacity)
    if found is None:
        return "does not fit: lower batch, candidates or resolution, or shard (FSDP, DeepSpeed)"
    names, amount = found
    return f"with {', '.join(names)}: {amount / memory.GB:.1f} GB" if names else "fits as asked"


# --- reward gradients -----------------------------------------------------------------------------------------------


def follows_rewards(method: str) -> bool:
    """Whether a method follows the gradients of rewards through denoising chains, which take memory in stages."""
    from alignkit.trainers.reward_flow import RewardConfig

    return issubclass(config_class(method), RewardConfig)


def chain_of(job: DoctorJob, setup: memory.Setup, model: Model) -> Chain:
    """The job's chains; what it does not say is as in the method's defaults."""
    from alignkit.commands.doctor.dry_step import Guidance
    from alignkit.commands.doctor.stages import Chain
    from alignkit.generators.decoding import Decoding

    defaults = config_class(job.method)
    is_called_once = job.guidance_scale <= model.family.unguided or model.family.guidance is not None
    both = Guidance.BOTH if job.unconditional_gradient else Guidance.CONDITIONAL
    return Chain(
        setup,
        states=2 * defaults.sampling_steps,
        guidance=Guidance.NONE if is_called_once else both,
        decoding=Decoding(job.decode_frames, cache_on_cpu=job.decode_cache_on_cpu, tiles=job.decode_tiles),
        critic=job.critic,
    )


def _stage_blocks(job: DoctorJob, model: Model, setup: memory.Setup) -> list[list[str]]:
    """Peak memory by stage, and what fits."""
    from alignkit.commands.doctor import stages

    chain = chain_of(job, setup, model)
    held, (largest, amount) = stages.resident(model, chain), stages.peak(model, chain)
    rows = {**held, **{f"then {name}": stages.stage(model, chain, name) for name in stages.STAGES}}
    size = f"{setup.width}x{setup.height}{f', {setup.frames} frames' if setup.frames > 1 else ''}"
    scored = "with the critic" if job.critic else "rewards not counted (name a critic with --critic.model)"
    lines = [
        f"peak memory of {job.method}, {size}, batch {setup.batch}, {scored} (GB: 10^9 bytes)",
        *(_row(name, f"{value / memory.GB:9.2f} GB") for name, value in rows.items()),
        _row(f"the peak, {largest}", f"{amount / memory.GB:9.2f} GB"),
    ]

    def verdict(capacity: int) -> str:
        keys, at, needed = stages.what_fits(model, chain, capacity)
        with_keys = f"with {', '.join(keys)}: " if keys else ""
        result = f"{with_keys}{needed / memory.GB:.1f} GB, at {at}"
        if memory.fits(needed, capacity):
            return result
        return f"does not fit ({result}): lower the resolution or num_frames, or shard (FSDP, DeepSpeed)"

    forward, backward = stages.step_operations(model, chain)
    operations = {"without gradients": forward, "with gradients (run twice forward)": 2 * forward + backward}
    lines_of_step = [_row(name, f"{count / 1e12:9.2f} TFLOP") for name, count in operations.items()]
    return [["operations of a denoising step of one chain", *lines_of_step], lines, _card_lines(verdict)]


def _work(job: DoctorJob) -> None:
    if job.reward is not None:
        from alignkit.commands.doctor import rewards as doctor_rewards

        doctor_rewards.check(RewardSpec(reward=job.reward, options=job.options))
    elif job.judge is not None:
        from alignkit.commands.doctor import judges as doctor_judges

        doctor_judges.check(JudgeSpec(judge=job.judge, options=job.options))
    elif job.model is None:
        print("\n".join(machine_lines()))
        print(f"\nmemory of a training: alignkit doctor --model FOLDER --method {DEFAULT_METHOD}")
        print("a reward on photographs: alignkit doctor --reward clip_score --options.model FOLDER")
    else:
        print("\n".join(model_lines(job, job.model)))


def _plan(job: DoctorJob) -> list[str]:
    if job.reward is not None:
        spec = RewardSpec(reward=job.reward, options=job.options)
        return [f"load the reward {spec.reward} and score three photographs with right and wrong captions"]
    if job.judge is not None:
        spec_of_judge = JudgeSpec(judge=job.judge, options=job.options)
        return [f"load the judge {spec_of_judge.judge} and compare three photographs under each other's captions"]
    if job.model is None:
        return ["look at versions, devices and optional parts"]
    planned_model(job.model)
    return [f"size up {job.model}: read its headers or configs, and run one step of it on the meta device"]


def main(argv: Sequence[str]) -> None:
    """The verb."""
    summary = (
        "Show versions, devices and optional parts; with --model, size up a training: operations, memory, what fits; "
        "with --reward or --judge, try it on photographs."
    )
    execute(Verb("doctor", summary, lambda *_: DoctorJob, _plan, _work), argv)

"""Peak memory of reward gradients by stage: one denoising step, decoding, a critic; and what lowers the largest.

The stages follow each other in the backward pass, so the peak is what is held during all of them plus the largest
stage.
Deliberately not here: rewards other than the critic, whose networks are small beside it, and sharding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from alignkit.commands.doctor import memory
from alignkit.commands.doctor.critic_plan import CriticPlan
from alignkit.commands.doctor.dry_media import (
    critic_numbers,
    critic_stage,
    decoding_stage,
    has_cache,
    has_tiles,
    latent_numbers,
)
from alignkit.commands.doctor.dry_step import Cost, Guidance, dry_step
from alignkit.commands.doctor.model_shapes import Model
from alignkit.generators.decoding import Decoding

STEP, DECODING, CRITIC, OPTIMIZER = "a denoising step", "decoding", "the critic", "the optimizer step"
STAGES = (CRITIC, DECODING, STEP, OPTIMIZER)  # in the order of the backward pass
FEW_FRAMES = 8  # of a clip that a critic reads, where memory is short
GAIN = 0.99  # a switch is named where it lowers the peak at least to this share


@dataclass(frozen=True, slots=True)
class Chain:
    """What decides the cost of reward gradients.

    setup: of the network; its batch is the number of chains.
    states: how many of a chain's states and predictions are kept, at most two for each step.
    critic_is_elsewhere: whether the critic is on a device of its own.
    quantized: whether the frozen network is in nf4.
    """

    setup: memory.Setup
    states: int
    guidance: Guidance
    decoding: Decoding  # of its frames a number, or all
    critic: CriticPlan | None = None
    critic_is_elsewhere: bool = False
    quantized: bool = False

    @property
    def size(self) -> tuple[int, int, int]:
        """(height, width, frames)."""
        return self.setup.height, self.setup.width, self.setup.frames

    @property
    def critic_here(self) -> CriticPlan | None:
        """The critic, if it is on the device of the generator."""
        return None if self.critic_is_elsewhere else self.critic


def resident(model: Model, chain: Chain) -> dict[str, int]:
    """Bytes that are held during every stage, by name."""
    held = memory.weights(model, chain.setup)
    if chain.quantized:
        # nf4: matrices in 4 bits with a float32 for each 64 numbers, all else in bfloat16
        matrices = sum(math.prod(shape) for shape in model.shapes[model.denoiser].values() if len(shape) == 2)
        held["denoiser weights"] = matrices * 9 // 16 + (model.stored(model.denoiser) - matrices) * 2
    if critic := chain.critic_here:
        held["critic weights"] = critic_numbers(critic) * memory.BYTES[critic.dtype]
    states = chain.states * chain.setup.batch * latent_numbers(model, chain.size)
    return {**held, "states of the chain": states * 4}


def stage(model: Model, chain: Chain, name: str) -> int:
    """Bytes that a stage of `STAGES` takes beside `resident`."""
    batch = chain.setup.batch
    if name == OPTIMIZER:
        return 0  # its moments are in `resident`, and the fused AdamW makes nothing else
    if name == STEP:
        return _step(model, chain).peak_bytes(batch)
    decoded = decoding_stage(model, chain.size, chain.setup.dtype, chain.decoding)
    if name == DECODING:
        return batch * decoded.peak
    is_video = model.family.modality == "video"
    frames = [chain.decoding.frames or chain.setup.frames] if is_video else []
    pixels = (batch, *frames, 3, *chain.size[:2])
    critic = chain.critic_here
    return batch * decoded.kept + (critic_stage(critic, pixels) if critic else 0)


def _step(model: Model, chain: Chain) -> Cost:
    return dry_step(model, replace(memory.run_of(chain.setup), chain=chain.guidance))


def step_operations(model: Model, chain: Chain) -> tuple[int, int]:
    """Operations of the forward and of the backward pass of one denoising step of one chain."""
    cost = _step(model, chain)
    return cost.forward_flops, cost.backward_flops


def peak(model: Model, chain: Chain) -> tuple[str, int]:
    """The stage with the peak, and all bytes then."""
    name = max(STAGES, key=lambda name: stage(model, chain, name))
    return name, stage(model, chain, name) + sum(resident(model, chain).values())


# --- what fits ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Switch:
    """A key of the config that saves memory: its text, the stages that it changes, and fields of a part of `Chain`."""

    key: str
    stages: tuple[str, ...]
    part: str
    changes: dict[str, Any]

    def on(self, chain: Chain) -> Chain:
        """The chain with it."""
        parts: dict[str, Any] = {"setup": chain.setup, "decoding": chain.decoding, "critic": chain.critic}
        changes = {self.part: replace(parts[self.part], **self.changes)} if self.part else self.changes
        return replace(chain, **changes)


# Those that leave the gradient as it is come first, what costs time after what does not.
SWITCHES = (
    Switch("dtype: bfloat16, bf16: true", STAGES, "setup", {"dtype": "bfloat16", "bf16": True}),
    Switch("critic options.dtype: bfloat16", STAGES, "critic", {"dtype": "bfloat16"}),
    Switch("critic options.checkpointing: true", (CRITIC,), "critic", {"checkpointing": True}),
    Switch("activation_checkpointing: true", (STEP,), "setup", {"activation_checkpointing": True}),
    Switch("decode_cache_on_cpu: true", (CRITIC, DECODING), "decoding", {"cache_on_cpu": True}),
    Switch("critic options.device: another GPU", STAGES, "", {"critic_is_elsewhere": True}),
    Switch("full_finetune: false", STAGES, "setup", {"full_finetune": False}),
    Switch("quantize: nf4", STAGES, "", {"quantized": True}),
    Switch("decode_tiles: true", (DECODING,), "decoding", {"tiles": True}),
    Switch(f"critic options.frames: {FEW_FRAMES}", (CRITIC,), "critic", {"frames": FEW_FRAMES}),
    Switch("unconditional_gradient: false", (STEP,), "", {"guidance": Guidance.CONDITIONAL}),
)


def what_fits(model: Model, chain: Chain, capacity: int) -> tuple[tuple[str, ...], str, int]:
    """The switches, taken one by one for the stage with the peak, until `chain` fits in `capacity` bytes.

    Gives also the stage with the peak then and its bytes, which are too many where no switch is left.
    """
    keys: list[str] = []
    name, amount = peak(model, chain)
    while not memory.fits(amount, capacity):
        found = next(_steps_down(model, chain, name, amount), None)
        if found is None:
            break
        key, chain = found
        keys.append(key)
        name, amount = peak(model, chain)
    return tuple(keys), name, amount


def _steps_down(model: Model, chain: Chain, name: str, amount: int) -> Iterator[tuple[str, Chain]]:
    """The switches that lower the stage `name`, whose bytes are `amount`, with the chain as each of them makes it."""
    for switch in SWITCHES:
        if name in switch.stages and _is_open(model, chain, switch):
            lower = switch.on(chain)
            if stage(model, lower, name) + sum(resident(model, lower).values()) < GAIN * amount:
                yield switch.key, lower


def _is_open(model: Model, chain: Chain, switch: Switch) -> bool:
    """Whether a switch means anything for this chain; one that is on already lowers nothing."""
    critic = chain.critic_here
    if "critic" in switch.key and critic is None:
        return False
    if "dtype" in switch.changes:
        return (critic if critic and switch.part == "critic" else chain.setup).dtype == "float32"
    if "frames" in switch.changes:
        return (critic.frames or chain.setup.frames) > FEW_FRAMES if critic else False
    if switch.part == "decoding":
        return has_cache(model) if "cache_on_cpu" in switch.changes else has_tiles(model)
    if "quantized" in switch.changes:
        return not chain.setup.tunes_denoiser and chain.setup.dtype != "float32"
    return "guidance" not in switch.changes or chain.guidance is Guidance.BOTH

"""Peak memory and operations of a training: weights counted from the folder, the step measured on the meta device.

Sizes are decimal gigabytes, as in the names of GPUs. Deliberately not here: sharding over several devices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from alignkit.commands.doctor.model_shapes import Model

GB = 10**9
CARDS = (24, 48, 80, 141)  # GB
FREE = 0.1  # share of a GPU's memory that is left to its libraries and to the allocator's rounding
ADAM_BYTES = 4 + 4 + 8  # fp32 weight, gradient and two moments of a trained parameter
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Setup:
    """What decides the cost of a training; `dtype` is the frozen weights', `bf16` says whether the step autocasts."""

    height: int
    width: int
    frames: int
    batch: int
    candidates: int
    lora_rank: int
    lora_targets: tuple[str, ...]
    full_finetune: bool
    needs_reference: bool
    dtype: str
    bf16: bool
    precompute_reference: bool = False
    activation_checkpointing: bool = False
    low_memory: bool = False
    caches_latents: bool = True
    trained_encoders: tuple[str, ...] = ()  # text encoders that are trained in place of the denoiser

    @property
    def tunes_denoiser(self) -> bool:
        """Whether all weights of the denoiser are trained."""
        return self.full_finetune and not self.trained_encoders

    @property
    def images_in_graph(self) -> int:
        """Pictures whose activations are held at once."""
        return self.batch * (1 if self.low_memory else self.candidates)


def parts(model: Model, setup: Setup) -> dict[str, int]:
    """Bytes of every part of the peak, by name."""
    return {**weights(model, setup), "activations": _cost(model, setup).peak_bytes(setup.images_in_graph)}


def weights(model: Model, setup: Setup) -> dict[str, int]:
    """Bytes of all weights and of what belongs to those that are trained, by name."""
    denoiser, size = model.stored(model.denoiser), BYTES[setup.dtype]
    others = sum(model.stored(name) for name in model.shapes if name != model.denoiser)
    if setup.trained_encoders:
        full = sum(model.stored(name) for name in setup.trained_encoders) if setup.full_finetune else 0
        return {
            "denoiser weights": denoiser * size,
            "other text encoders and VAE": (others - full) * size,
            "frozen reference copy": full * 4,
            "trained weights, gradients, AdamW": full * ADAM_BYTES,  # those of a LoRA are below a per cent of this
        }
    trained = denoiser if setup.full_finetune else lora_parameters(model, setup.lora_targets, setup.lora_rank)
    copy = setup.full_finetune and setup.needs_reference
    return {
        "denoiser weights": 0 if setup.full_finetune else denoiser * size,
        "text encoders and VAE": others * size,
        "frozen reference copy": denoiser * 4 if copy else 0,
        "trained weights, gradients, AdamW": trained * ADAM_BYTES,
    }


def total(model: Model, setup: Setup) -> int:
    """Bytes at the peak: of the step, or of filling the latents cache before it."""
    return max(sum(parts(model, setup).values()), encoding(model, setup))


def encoding(model: Model, setup: Setup) -> int:
    """Bytes at the peak while the latents cache is filled: all weights, no gradients yet, the VAE's activations."""
    from alignkit.commands.doctor.dry_step import encoding_bytes

    if not setup.caches_latents:
        return 0
    held = weights(model, setup)
    trained = held.pop("trained weights, gradients, AdamW") * 4 // ADAM_BYTES
    return sum(held.values()) + trained + encoding_bytes(model, run_of(setup))


def operations(model: Model, setup: Setup) -> dict[str, int]:
    """Operations of one training step for one of its images, by what they are for; a multiply-add is two."""
    cost = _cost(model, setup)
    reference = setup.needs_reference and not setup.precompute_reference
    return {
        "forward": cost.forward_flops,
        "backward, with what is checkpointed": cost.backward_flops,
        "reference": cost.forward_flops if reference else 0,
        "second forward of low_memory": cost.forward_flops if setup.low_memory else 0,
    }


def lora_parameters(model: Model, targets: tuple[str, ...], rank: int) -> int:
    """rank * (in + out) over the target layers."""
    suffixes = tuple(f"{target}.weight" for target in targets)
    shapes = [shape for name, shape in model.shapes[model.denoiser].items() if name.endswith(suffixes)]
    return sum(rank * (shape[0] + math.prod(shape[1:])) for shape in shapes)


def _cost(model: Model, setup: Setup) -> Any:
    from alignkit.commands.doctor.dry_step import dry_step

    return dry_step(model, run_of(setup))


def run_of(setup: Setup) -> Any:
    """What the setup's forward and backward pass runs with, a `dry_step.Run`."""
    from alignkit.commands.doctor.dry_step import Run

    return Run(
        height=setup.height,
        width=setup.width,
        frames=setup.frames,
        dtype="float32" if setup.tunes_denoiser else setup.dtype,
        bf16=setup.bf16,
        lora_rank=0 if setup.tunes_denoiser else setup.lora_rank,
        lora_targets=setup.lora_targets,
        checkpointing=setup.activation_checkpointing,
    )


# --- what fits ------------------------------------------------------------------------------------------------------


def fits(amount: int, capacity: int) -> bool:
    """Whether so many bytes leave enough of a GPU's memory free."""
    return amount < (1 - FREE) * capacity


def switches(setup: Setup) -> Iterator[tuple[tuple[str, ...], Setup]]:
    """The setup as asked, then with what saves memory switched on: one thing, two, all that are not on already."""
    half = "dtype: bfloat16, bf16: true"
    choices: dict[str, dict[str, Any]] = {
        half: {"dtype": "bfloat16", "bf16": True},
        "activation_checkpointing: true": {"activation_checkpointing": True},
        "low_memory: true": {"low_memory": setup.candidates > 1},
    }
    off = {name: change for name, change in choices.items() if replace(setup, **change) != setup}
    if setup.dtype != "float32":
        off.pop(half, None)
    for count in range(len(off) + 1):
        for names in itertools.combinations(off, count):
            changes = {key: value for name in names for key, value in off[name].items()}
            yield names, replace(setup, **changes)


def what_fits(model: Model, setup: Setup, capacity: int) -> tuple[tuple[str, ...], int] | None:
    """The fewest switches that make `setup` fit in `capacity` bytes and its peak then; None where none do."""
    for names, choice in switches(setup):
        amount = total(model, choice)
        if fits(amount, capacity):
            return names, amount
    return None

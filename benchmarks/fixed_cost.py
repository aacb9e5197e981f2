"""The fixed cost of a training step on SDXL's structure: what is paid whatever is computed. Part of `rankdpo_step`."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from alignkit.adapters import lora
from alignkit.adapters.module_tree import ModuleTree
from alignkit.generators.denoiser import Denoiser
from alignkit.generators.families.stable_diffusion_xl import StableDiffusionXL

CONFIGS = Path(__file__).parents[1] / "configs" / "models"


def fixed_cost(repeats: int = 15) -> dict[str, Any]:
    """CPU milliseconds a step that a network of SDXL's structure with a LoRA costs beside all computing.

    The network is SDXL's U-Net with all its modules, but narrow. Caches are cold, as after a forward pass. `walks` are
    the same uses by torch's and diffusers' own walks over the module tree.
    """
    config = json.loads((CONFIGS / "sdxl" / "unet" / "config.json").read_text(encoding="utf-8"))
    config |= {"block_out_channels": [32, 64, 64], "attention_head_dim": [1, 2, 2], "cross_attention_dim": 32}
    config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32}
    net: Any = UNet2DConditionModel.from_config(config)
    lora.inject(net, rank=4, targets=StableDiffusionXL.lora_targets)
    model = Denoiser(SimpleNamespace(), net)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def reference() -> None:
        with model.as_reference():
            pass

    def walked_reference() -> None:
        with lora.disabled(lora.lora_layers(model)):
            pass

    ours: dict[str, Callable[[], Any]] = {
        "reference": lambda: model.has_reference and reference(),
        "train": model.train,
        "zero_grad": model.zero_grad,
        "clipping": ModuleTree(model).parameters,
        "precision, reference and policy": lambda: [model._dtype(net) for _ in range(2)],  # noqa: SLF001
    }
    walks: dict[str, Callable[[], Any]] = {
        "reference": lambda: (lora.lora_layers(model), lora.lora_layers(model), walked_reference()),
        "train": lambda: nn.Module.train(model),
        "zero_grad": lambda: nn.Module.zero_grad(model),
        "clipping": lambda: list(model.parameters()),
        "precision, reference and policy": lambda: [net.dtype for _ in range(6)],
    }
    found = {"modules": len(list(model.modules()))}
    for name, uses in (("lists_ms", ours), ("walks_ms", walks)):
        taken = {use: round(1000 * _cold_seconds(run, repeats), 2) for use, run in uses.items()}
        found[name] = {**taken, "all": round(sum(taken.values()), 2)}
    return found


def _cold_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median CPU seconds of `run` with other data in the processor's caches."""
    other, taken = torch.zeros(2**24), []
    for _ in range(repeats):
        other.add_(1)
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return statistics.median(taken)

"""`torch.compile` of the denoisers, for sampling. Not here: compiled training (`torch_compile` of Trainer)."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError

if TYPE_CHECKING:
    from alignkit.generators.pipeline import PipelineGenerator


def compile_denoisers(generator: PipelineGenerator) -> None:
    """Compile each denoiser: its repeated blocks if they hold most of its parameters, else all of it.

    The first call with a shape compiles: half a minute to some minutes. Samples differ from those of the plain network
    by rounding. Call it after adapters are merged: switching one compiles again. Raises ConfigError on a CPU without a
    C++ compiler.
    """
    if generator.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ConfigError("compile: true needs a C++ compiler on a CPU: install g++, or remove the key")
    for part in generator.pipeline.components.values():
        if type(part) is not type(generator.net):
            continue
        if _share_of_blocks(part) > 0.5:
            part.compile_repeated_blocks()  # one compiled block serves all: seconds instead of minutes
        else:
            part.compile()


def _share_of_blocks(net: Any) -> float:
    """The share of all parameters that lies in blocks which diffusers compiles as one."""
    kinds = net._repeated_blocks  # noqa: SLF001 - diffusers has no public name for it
    blocks = [module for module in net.modules() if type(module).__name__ in kinds]
    held = sum(weight.numel() for block in blocks for weight in block.parameters())
    return held / sum(weight.numel() for weight in net.parameters())

"""Work and weights over processes: who does which part of a job, and weights that live in shards (FSDP2).

For files whole tensors are put together, for sampling and export a whole network. What touches weights is collective:
each process calls it, whoever writes the file. Left out: DeepSpeed ZeRO-3, which shards in a way of its own and is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType, PartialState, init_empty_weights
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from alignkit.adapters import lora
from alignkit.errors import ConfigError

FSDP2, ZERO3 = 2, 3

if TYPE_CHECKING:
    from alignkit.generators.pipeline import PipelineGenerator


@dataclass(frozen=True)
class Ranks:
    """This process among those of a job; the default is a job of one process."""

    rank: int = 0
    world: int = 1

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.world > 1:
            PartialState().wait_for_everyone()

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in the order of their ranks, on every process."""
        return list(gather_object(items)) if self.world > 1 else items

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on every process."""
        return broadcast_object_list([value])[0] if self.world > 1 else value


def settle_layout(accelerator: Accelerator, *, asked: bool) -> None:
    """Keep FSDP2 from rounding what the model is called with: times in bf16 are other times.

    Raise ConfigError where weights would be saved wrongly, or FSDP, `asked` for, would silently not be used.

    DDP, FSDP2 and DeepSpeed's ZeRO 1 and 2 are known: their trained weights can be told apart and made whole.
    """
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if asked and not is_fsdp:
        raise ConfigError(f"fsdp shards over accelerators; this is {accelerator.distributed_type.value}. Remove fsdp")
    if is_fsdp and accelerator.state.fsdp_plugin.fsdp_version != FSDP2:
        raise ConfigError("FSDP version 1 flattens adapters into the frozen weights; set fsdp_config.version to 2")
    if is_fsdp and accelerator.state.fsdp_plugin.mixed_precision_policy is not None:
        sharding = accelerator.state.fsdp_plugin
        sharding.mixed_precision_policy = replace(sharding.mixed_precision_policy, cast_forward_inputs=False)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == ZERO3:
        raise ConfigError("DeepSpeed's ZeRO 3 is not supported; use stage 1 or 2, or fsdp, which shards weights too")


def is_sharded(module: nn.Module) -> bool:
    """Whether any weight of `module` lives in shards."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each tensor, detached, on its own device."""
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for name, t in tensors.items()}


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy `value` into `parameter`, or this process's part of it into its shard."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


@contextmanager
def whole(generator: PipelineGenerator) -> Iterator[None]:
    """Within it the generator's network is an ordinary one: itself, or a copy put together from all shards."""
    net = generator.net
    if not is_sharded(net):
        yield
        return
    generator.put_net(_whole_copy(net))
    try:
        yield
    finally:
        generator.put_net(net)


def _whole_copy(net: Any) -> nn.Module:
    state = gather(net.state_dict())
    with init_empty_weights(include_buffers=False):
        twin: Any = type(net).from_config(net.config)
        if lora.lora_layers(net):
            lora.inject_like(twin, net)
    twin.load_state_dict(state, assign=True)
    trainable = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in trainable)
    return twin.to(next(iter(state.values())).device).train(net.training)

"""One of two processes that tune a text encoder: its gradients under DDP or FSDP2, written to a file."""

from __future__ import annotations

from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from alignkit.generators import load_generator

PROMPTS = ("a red circle", "two blue rings on a gray background")


def loss_of(cond):
    """A loss of the prompts' states and of the null condition."""
    return cond.tensors["encoder_hidden_states"].square().mean() + cond.null["encoder_hidden_states"].mean()


def main(model, store, out, rank):
    """Each rank encodes its own prompt; afterwards all hold the mean of the gradients."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    conditioner = load_generator(model, device="cpu").conditioner
    conditioner.unfreeze()
    for kind in ("ddp", "fsdp"):
        conditioner.zero_grad()
        if kind == "ddp":
            wrapped = DistributedDataParallel(conditioner)
        else:
            for module in [m for m in conditioner.modules() if type(m).__name__ in conditioner._no_split_modules]:
                fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
            wrapped = fully_shard(conditioner, mesh=init_device_mesh("cpu", (2,)))
        loss_of(wrapped([PROMPTS[rank]])).backward()
        grads = {name: p.grad for name, p in conditioner.named_parameters() if p.grad is not None}
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
        save_file({name: g.contiguous().clone() for name, g in whole.items()}, f"{out}/{kind}-{rank}.safetensors")
    distributed.destroy_process_group()

"""One training step of a denoiser at full size without its numbers: what it costs in operations and in memory.

The network stands on the meta device (shapes and types, no storage) and runs forward and backward there, with its LoRA,
autocast and checkpointing as the trainer has them. Nothing is estimated from formulas but
the operations of each matrix product, convolution and fused attention. Deliberately not here: weights, gradients and
optimizer state (`memory` counts them), workspaces of the card's libraries, and the allocator's rounding.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    conv1d,
    conv2d,
    conv3d,
    group_norm,
    interpolate,
    layer_norm,
    linear,
    rms_norm,
    scaled_dot_product_attention,
    softmax,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from alignkit.adapters import lora
from alignkit.commands.doctor.model_shapes import Model, blank
from alignkit.errors import ConfigError
from alignkit.generators.description import FamilyDescription, LatentSize
from alignkit.trainers.latents import IMAGES_A_CALL, PIXELS_A_CALL

# What CUDA's autocast runs in bf16, and of what it runs in float32 the functions whose tensors are large.
_BF16 = {linear, conv1d, conv2d, conv3d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.baddbmm}
_CPU = torch.device("cpu")
_TO_COPY = torch.ops.aten._to_copy.default  # noqa: SLF001 - what `Tensor.cpu` dispatches to
_FLOAT32 = {layer_norm, group_norm, rms_norm, softmax, interpolate, Tensor.softmax, Tensor.pow, torch.pow, torch.rsqrt}


class Guidance(Enum):
    """The network's calls in a step of a denoising chain, whose state has a gradient too."""

    NONE = "one call"
    CONDITIONAL = "two calls, the unconditional one without gradients"
    BOTH = "two calls"


@dataclass(frozen=True, slots=True)
class Run:
    """What one picture's (or video's) forward and backward pass runs with; lora_rank 0 trains all weights.

    chain: a step of a denoising chain, as it is repeated in the backward pass; None: a step on given latents.
    """

    height: int
    width: int
    frames: int
    dtype: str
    bf16: bool
    lora_rank: int
    lora_targets: tuple[str, ...]
    checkpointing: bool = False
    chain: Guidance | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations an image (a multiply-add is two) and bytes that the pass's tensors hold at their peak: so many a
    image, and copies of weights, in another precision, that all share.
    """

    forward_flops: int
    backward_flops: int
    picture_bytes: int
    shared_bytes: int

    def peak_bytes(self, pictures: int) -> int:
        """The peak of so many images in one graph."""
        return self.shared_bytes + pictures * self.picture_bytes


@functools.cache
def dry_step(model: Model, run: Run) -> Cost:
    """The cost of `run` on the model's denoiser; a remembered one comes at once.

    Raises ConfigError for a size that the network refuses, UnknownNameError for a class without a family.
    """
    family = model.family
    net = _network(model, run.dtype, run.lora_rank, run.lora_targets)
    if run.checkpointing:
        net.enable_gradient_checkpointing(functools.partial(_checkpoint, run.bf16, family.tokens))
    else:
        net.disable_gradient_checkpointing()
    frames = (run.frames - 1) // model.vae_frames + 1
    height, width = (side // model.vae_ratio for side in (run.height, run.width))
    with torch.device("meta"):
        given = network_inputs(family, net, LatentSize(1, frames, height, width))
        card = _Card(run.bf16, family.tokens)
        if run.chain:
            given["sample" if "sample" in given else "hidden_states"].requires_grad_()
        with Ledger([*net.parameters(), *net.buffers(), *tree_leaves(given)]) as ledger:
            with card:
                # A step that is repeated ends at its last kept tensor, so a call without gradients takes nothing then.
                with torch.set_grad_enabled(run.chain is Guidance.BOTH):
                    unconditional = 0.0 if run.chain in (None, Guidance.NONE) else _predict(net, given, run)
                prediction = _predict(net, given, run) - unconditional
            forward = ledger.flops
            (prediction - torch.zeros_like(prediction)).square().mean().backward()
    shared = 0 if run.checkpointing else card.copied  # a checkpointed block lets go of its copies
    return Cost(forward, ledger.flops - forward, ledger.peak - shared, shared)


@functools.cache
def encoding_bytes(model: Model, run: Run) -> int:
    """Peak bytes of the VAE's activations while the latents cache is filled, in the precision of the frozen weights.

    The trainer encodes at most two images at once, of more than a megapixel one, and of videos one. 0 without
    a config of the VAE.
    """
    vae = blank("diffusers", model.vae["_class_name"], model.vae) if "_class_name" in model.vae else None
    if vae is None:
        return 0
    vae = nn.Module.to(vae, vars(torch)[run.dtype]).eval()  # diffusers' own `to` warns of float32 modules
    is_video = model.vae_frames > 1
    count = 1 if is_video or run.height * run.width > PIXELS_A_CALL else IMAGES_A_CALL
    has_time = any(len(shape) == 5 for shape in model.shapes["vae"].values())  # image families may have a video VAE
    axes = (count, 3, *((run.frames,) if has_time else ()), run.height, run.width)
    ledger = Ledger([*vae.parameters(), *vae.buffers()])
    with torch.device("meta"), torch.no_grad(), ledger, _Card(False, 1):
        vae.encode(torch.empty(axes, dtype=vars(torch)[run.dtype]), return_dict=False)
    return ledger.peak


def network_inputs(family: type[FamilyDescription], net: Any, size: LatentSize) -> dict[str, Any]:
    """The family's `network_inputs` in the precision of `net`; times stay in float32, as the trainer passes them."""
    times = ("timestep", "r_timestep", "t")
    tensors = family.network_inputs(net.config, size)

    def cast(value: Any) -> Any:
        return value.to(net.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {key: value if key in times else tree_map(cast, value) for key, value in tensors.items()}


def _predict(net: Any, given: dict[str, Any], run: Run) -> Tensor:
    try:
        output = net(**given, return_dict=False)[0]
        return (torch.stack(output) if isinstance(output, list) else output).float()
    except (ValueError, RuntimeError) as error:
        size = f"{run.width}x{run.height}, {run.frames} frames"
        raise ConfigError(f"{type(net).__name__} does not take {size}: {error}") from error


@functools.cache
def _network(model: Model, dtype: str, rank: int, targets: tuple[str, ...]) -> Any:
    """The denoiser as the trainer has it: what is trained is in float32 and its gradient lies ready, what is frozen in
    `dtype`, less the modules that diffusers keeps in float32.
    """
    net = model.blank_denoiser()
    with torch.device("meta"):
        if rank:
            missing = lora.unmatched(net, targets)  # a network cut to one block may lack a layer
            lora.inject(net, rank=rank, targets=[target for target in targets if target not in missing])
        kept = set(net._keep_in_fp32_modules or ())  # noqa: SLF001 - what from_pretrained reads
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            is_float = tensor.requires_grad or kept.intersection(name.split("."))
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if is_float else vars(torch)[dtype])
            if tensor.requires_grad:
                tensor.grad = torch.zeros_like(tensor)
    return net.train()


def _checkpoint(bf16: bool, tokens: int, block: Any, *given: Any) -> Any:  # noqa: FBT001 - bound by partial
    """diffusers' own, less random states, which a meta device has not; `backward` runs outside of function modes."""
    contexts = lambda: (nullcontext(), _Card(bf16, tokens))  # noqa: E731
    return checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


class _Card(TorchFunctionMode):
    """What a CUDA card does and the meta device does not: autocast, and attention as one fused kernel, masks or not.

    `copied` counts the bytes of weights that autocast made a copy of. Lumina's network reads from a mask how many text
    tokens are in use; a meta tensor has no values, so all `tokens` are.
    """

    def __init__(self, bf16: bool, tokens: int) -> None:  # noqa: FBT001
        super().__init__()
        self.bf16, self.tokens, self.copied = bf16, tokens, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.tolist:
            return [self.tokens] * len(args[0])
        is_attention = function is scaled_dot_product_attention
        if self.bf16 and (is_attention or function in _BF16 or function in _FLOAT32):
            dtype = torch.float32 if function in _FLOAT32 else torch.bfloat16
            args, kwargs = tree_map(functools.partial(self._cast, dtype), (args, kwargs))
        return _fused_attention(*args, **kwargs) if is_attention else function(*args, **kwargs)

    def _cast(self, dtype: torch.dtype, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if isinstance(value, nn.Parameter):
            self.copied += value.numel() * dtype.itemsize
        return value.to(dtype)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within it attention is one fused kernel, in forward and backward passes, also where they are repeated."""
    functional = torch.nn.functional
    functional.scaled_dot_product_attention = _fused_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = scaled_dot_product_attention


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of [B, heads, tokens, channels] without its matrix."""
    if enable_gqa:  # heads share keys and values, which the kernel below has not
        flash = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        scores = (*query.shape[:-1], key.shape[-2])
        attn_mask = torch.empty((), dtype=query.dtype, device=query.device).expand(scores)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention  # noqa: SLF001 - the one kernel that takes masks
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


class Ledger(TorchDispatchMode):
    """Operations of what runs within it, and the peak bytes of the tensors made there, each storage once; `known` are
    the tensors that were there before. What leaves the meta device for the CPU's memory no longer counts.
    """

    def __init__(self, known: Iterable[Any]) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._known = {_name(tensor) for tensor in known if isinstance(tensor, Tensor)}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is _TO_COPY and args[0].is_meta and (kwargs or {}).get("device") == _CPU:
            return torch.empty((), dtype=args[0].dtype).expand(args[0].shape)  # no storage, as on the meta device
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and _name(tensor) not in self._known:
                self._note(tensor)
        if function.overloadpacket in flop_registry:
            self.flops += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=output)
        return output

    def _note(self, tensor: Tensor) -> None:
        name = _name(tensor)
        if name not in self._sizes:
            storage = tensor.untyped_storage()
            self._sizes[name] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, name)

    def _forget(self, name: int) -> None:
        self.live -= self._sizes.pop(name)


def _name(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # noqa: SLF001 - the one name of a storage while it lives

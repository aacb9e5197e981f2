"""Canonical bytes: fingerprints of weights, and safetensors files that are equal for equal contents.

A fingerprint is a SHA-256 over the name, shape, precision and exact value of every tensor, names sorted. Adapters are
left out and the names of wrapped layers are those of the plain network, so adapters, devices, memory layouts and
sharding do not change it. It reads all weights: about a second for each GB.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignkit.adapters.tensor_files import Layout, write_stream

BASE_KEY = "base_fingerprint"  # metadata key of an adapter's file: JSON, `base_of` by component name
QUANTIZED = "quantized"


def fingerprint(*modules: nn.Module | None, dtype: torch.dtype | None = None) -> str:
    """16 hex digits for the exact weights of `modules` without their adapters; None counts as no module.

    Floating-point tensors are hashed in `dtype`, by default each in its own: a model loaded in another precision then
    has another fingerprint. Quantised tensors are hashed as the values that they stand for.
    """
    states = []
    for module in modules:
        state = {} if module is None else module.state_dict()
        base = {key.replace(".base_layer", ""): value for key, value in state.items() if "lora_" not in key}
        states.append({key: value for key, value in base.items() if isinstance(value, Tensor)})  # quantisers add others
    return fingerprint_of(states, dtype)


def weights_of(*modules: nn.Module) -> str:
    """16 hex digits for all tensors of `modules`, their adapters too, each in its own precision."""
    whole = nn.ModuleList(modules).state_dict()
    return fingerprint_of([{key: value for key, value in whole.items() if isinstance(value, Tensor)}])


def fingerprint_of(states: Sequence[Mapping[str, Tensor]], dtype: torch.dtype | None = None) -> str:
    """`fingerprint` of modules that have these state dicts; each tensor is asked for once."""
    digest = hashlib.sha256()
    for number, state in enumerate(states):
        for name in sorted(state):
            plain = _plain(state[name], dtype)
            digest.update(f"{number} {name} {plain.dtype} {list(plain.shape)}".encode())
            digest.update(memoryview(plain.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]


def _plain(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` as an ordinary contiguous one on the CPU, floating point in `dtype`."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if type(tensor) not in (Tensor, nn.Parameter):  # torchao's classes
        tensor = tensor.dequantize()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.cpu().contiguous()


def base_of(net: nn.Module) -> str:
    """`PRECISION:FINGERPRINT` of a network's base weights; `quantized` alone for weights in fewer bits.

    PRECISION is that of most weights; all floating-point weights are hashed in it, the few that a loader keeps in
    float32 too.
    """
    sizes: Counter[str] = Counter()
    for name, parameter in net.named_parameters():
        if "lora_" not in name:
            is_plain = type(parameter.data) in (Tensor, DTensor) and parameter.is_floating_point()
            sizes[str(parameter.dtype).removeprefix("torch.") if is_plain else QUANTIZED] += parameter.numel()
    if QUANTIZED in sizes or not sizes:
        return QUANTIZED
    precision = sizes.most_common(1)[0][0]
    return f"{precision}:{fingerprint(net, dtype=vars(torch)[precision])}"


def is_other_base(net: nn.Module, base: str) -> bool | None:
    """Whether `net` has other base weights than those that `base` (of `base_of`) names.

    The weights are compared in the precision of `base`. Where they cannot be (a quantised side, or a network in a lower
    precision than `base`) the answer is None.
    """
    precision, _, expected = base.partition(":")
    present = {parameter.dtype for name, parameter in net.named_parameters() if "lora_" not in name}
    stored = vars(torch).get(precision)
    if not expected or not isinstance(stored, torch.dtype) or not present:
        return None
    are_plain = all(type(parameter.data) in (Tensor, DTensor) for parameter in net.parameters())
    holds = all(dtype.is_floating_point and torch.promote_types(dtype, stored) == dtype for dtype in present)
    return fingerprint(net, dtype=stored) != expected if are_plain and holds else None


def save_canonical(state: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes depend on its content alone; the library's order of metadata is random.

    Atomically (see `storage.atomic_file`); the parent folder is made.
    """
    layouts = {key: Layout(value.dtype, tuple(value.shape)) for key, value in state.items()}
    write_stream(file, layouts, state.__getitem__, metadata)

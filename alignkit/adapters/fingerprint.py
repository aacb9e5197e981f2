"""Canonical bytes: fingerprints of weights, and safetensors files that are equal for equal contents.

A fingerprint is a SHA-256 over the name, shape, precision and exact value of every tensor, names sorted. Adapters are
left out and the names of wrapped layers are those of the plain network, so adapters, devices, memory layouts and
sharding do not change it. It reads all weights: about a second for each GB.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignkit.storage import write_atomic

BASE_KEY = "base_fingerprint"  # metadata key of an adapter's file: JSON, `base_of` by component name
QUANTIZED = "quantized"
_ALIGNMENT = 8  # bytes; the length of a safetensors header is a multiple of it


def fingerprint(*modules: nn.Module | None, dtype: torch.dtype | None = None) -> str:
    """16 hex digits for the exact weights of `modules` without their adapters; None counts as no module.

    Floating-point tensors are hashed in `dtype`, by default each in its own: a model loaded in another precision then
    has another fingerprint. Quantised tensors are hashed as the values that they stand for.
    """
    digest = hashlib.sha256()
    for number, module in enumerate(modules):
        state = {} if module is None else module.state_dict()
        base = {key.replace(".base_layer", ""): value for key, value in state.items() if "lora_" not in key}
        for name in sorted(base):
            if isinstance(base[name], Tensor):  # quantisers may store other states
                plain = _plain(base[name], dtype)
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


def is_other_base(net: nn.Module, base: str) -> bool:
    """Whether `net` certainly has other base weights than those that `base` (of `base_of`) names.

    The weights are compared in the precision of `base`. Where they cannot be (a quantised side, or a network in a lower
    precision than `base`) the answer is False.
    """
    precision, _, expected = base.partition(":")
    present = {parameter.dtype for name, parameter in net.named_parameters() if "lora_" not in name}
    stored = vars(torch).get(precision)
    if not expected or not isinstance(stored, torch.dtype) or not present:
        return False
    are_plain = all(type(parameter.data) in (Tensor, DTensor) for parameter in net.parameters())
    holds = all(dtype.is_floating_point and torch.promote_types(dtype, stored) == dtype for dtype in present)
    return are_plain and holds and fingerprint(net, dtype=stored) != expected


def save_canonical(state: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with keys and metadata in sorted order; the library's own order of metadata is random.

    Atomically (see `storage.atomic_file`); the parent folder is made.
    """
    raw = save({key: state[key] for key in sorted(state)}, metadata=dict(metadata))
    length = int.from_bytes(raw[:_ALIGNMENT], "little")
    header = json.loads(raw[_ALIGNMENT : _ALIGNMENT + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    write_atomic(file, len(text).to_bytes(_ALIGNMENT, "little") + text + raw[_ALIGNMENT + length :])

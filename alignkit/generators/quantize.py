"""A frozen network in 8 or 4 bits, by diffusers' own quantisers; what is trained on it is a LoRA in full precision.

Text encoders and VAE stay as they are: in training they run once, before the first step. Deliberately not here: weights
that are trained or merged, which need all their bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from alignkit.errors import ConfigError, UnknownNameError, nearest


def _int8(_: torch.dtype) -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _nf4(dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


# Name -> the package that does it, and its config.
QUANTIZERS: dict[str, tuple[str, Callable[[torch.dtype], Any]]] = {
    "int8": ("torchao", _int8),
    "nf4": ("bitsandbytes", _nf4),
}


def quantizers(name: str, components: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """The quantisation config of each of `components`, computing in `dtype`, for its `from_pretrained`.

    Raises UnknownNameError for another name than those of `QUANTIZERS`, ConfigError where the package or a
    GPU that it needs is missing.
    """
    if name not in QUANTIZERS:
        raise UnknownNameError(f"unknown quantize '{name}'.{nearest(name, QUANTIZERS)}")
    package, config = QUANTIZERS[name]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"quantize: {name} needs the package {package}: pip install {package}")
    if name == "nf4" and not torch.cuda.is_available():
        raise ConfigError("quantize: nf4 needs a CUDA device; int8 runs everywhere")
    return {component: config(dtype) for component in components}

"""Which arithmetic is fast here. bf16 without hardware for it is emulated: on such a CPU it is far slower than fp32."""

from __future__ import annotations

import torch


def fast_bf16(*, use_cpu: bool = False) -> bool:
    """Whether bf16 autocast is faster than fp32: a GPU that supports it, or a CPU with AVX512-BF16 or AMX."""
    if torch.cuda.is_available() and not use_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and (  # noqa: SLF001 - torch has no public question for it
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    )

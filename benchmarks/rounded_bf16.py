"""Run `alignkit` with bfloat16 products computed in float32 and rounded, for processors without bfloat16 units.

    python benchmarks/rounded_bf16.py ladder --config configs/demo_proof.yaml --out runs/demo_proof_bf16
        --table runs/demo_bf16.md --arms '{bf16: {train: {bf16: true}}}'

A bfloat16 unit multiplies bfloat16 numbers, accumulates in float32 and rounds the result to bfloat16. On a processor
without one, torch does the same about fifteen times slower than float32. Here the inputs of convolutions and matrix
products are converted to float32, which is exact, and the result is rounded. So the numbers are those of a bfloat16
unit up to the order of summation, and the speed is that of float32. Everything else runs in bfloat16 as it would.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map

PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
}


def _is_bf16(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


class RoundedBf16(TorchDispatchMode):
    """Computes bfloat16 products on the CPU in float32 and rounds the results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        kwargs = kwargs or {}
        if func not in PRODUCTS or not tree_any(_is_bf16, (args, kwargs)):
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda v: v.float() if _is_bf16(v) else v, (args, kwargs))
        result = func(*args, **kwargs)
        return tree_map(lambda v: v.bfloat16() if isinstance(v, torch.Tensor) else v, result)


if __name__ in ("__main__", "__mp_main__"):  # the worker processes of a ladder import this file under the second name
    RoundedBf16().__enter__()

if __name__ == "__main__":
    from alignkit.cli import main

    sys.exit(main())

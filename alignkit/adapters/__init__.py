"""LoRA adapters: injection, files of other programs, soups. Importing this package loads no torch."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {"soup": "alignkit.adapters.mixing", "with_alphas": "alignkit.adapters.mixing"}

__all__ = [*_EXPORTS]  # noqa: PLE0604 - the lazy names are strings by construction


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return vars(importlib.import_module(_EXPORTS[name]))[name]
    raise AttributeError(f"module 'alignkit.adapters' has no attribute '{name}'")

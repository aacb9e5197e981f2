"""alignkit: preference data, preference alignment and reward tuning for text-to-image and text-to-video models.

Importing this package loads no torch; public names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from alignkit.trainers import METHODS

__version__ = "0.1.0"

_CLASSES = [target.split(":") for method in METHODS.values() for target in (method.config, method.trainer)]
_EXPORTS = {
    "load_generator": "alignkit.generators",
    "wrap": "alignkit.generators",
    "AlignTrainer": "alignkit.trainers.base",
    "AlignConfig": "alignkit.trainers.config",
    "OfflineTrainer": "alignkit.trainers.offline",
    "OfflineConfig": "alignkit.trainers.config",
    "Prompt": "alignkit.records",
    "Sampling": "alignkit.records",
    **{name: module for module, name in _CLASSES},
}

__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604 - the lazy names are strings by construction


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return vars(importlib.import_module(_EXPORTS[name]))[name]
    raise AttributeError(f"module 'alignkit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Published weight files as tensors, and modules that take them strictly: nothing missing, nothing left over.

No pickle is run: safetensors, or PyTorch files read with `weights_only=True`. Not here: what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from alignkit.errors import DataError, MissingFileError

CONVERT = (
    "where its code is installed and you trust it, write the tensors alone: "
    "`m = torch.load(FILE, weights_only=False); safetensors.torch.save_model(m, 'weights.safetensors')`"
)


def read_tensors(path: str, *, name: str, get: str) -> dict[str, Tensor]:
    """Every tensor of a .safetensors or PyTorch file, on the CPU; a `state_dict` inside is unwrapped.

    `name` is the reward's, `get` tells how to come by the file. Raises MissingFileError with `get`, DataError where the
    file is damaged, holds pickled code (with how to convert it elsewhere) or holds no tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"{name}: no weights '{path}'; {get}")
    try:
        stored = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except torch.serialization.pickle.UnpicklingError as error:
        raise DataError(
            f"{name}: '{path}' is damaged or holds pickled code, which is not run here; {CONVERT}"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise DataError(f"{name}: '{path}' is no readable weight file, fetch it again ({get}): {error}") from error
    while isinstance(stored, dict) and isinstance(stored.get("state_dict"), dict):
        stored = stored["state_dict"]
    tensors = {key: value for key, value in stored.items() if isinstance(value, Tensor)} if stored else {}
    if not tensors:
        raise DataError(f"{name}: '{path}' holds no tensors; {get}")
    return tensors


def require_same(missing: Collection[str], unexpected: Collection[str], *, name: str, path: str) -> None:
    """DataError naming up to three keys of each kind, unless both are empty."""
    if missing or unexpected:
        faults = [
            f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise DataError(f"{name}: '{path}' is not this model's weights: {'; '.join(faults)}")


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], *, name: str, path: str) -> None:
    """Give `module` exactly these tensors. Raises DataError for missing and unexpected keys and for other shapes."""
    own = module.state_dict()
    require_same(set(own) - set(tensors), set(tensors) - set(own), name=name, path=path)
    for key, value in own.items():
        if value.shape != tensors[key].shape:
            shapes = f"{list(tensors[key].shape)}, expected {list(value.shape)}"
            raise DataError(f"{name}: '{path}': {key} is {shapes}; these weights go with another backbone")
    module.load_state_dict(tensors)

"""Published weight files: found in a folder or on the hub, read without pickled code, mapped onto a module strictly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import ConfigError, DataError, MissingFileError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

DTYPES = ("float64", "float32", "bfloat16", "float16")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that an option names. Raises ConfigError for another word than those of `DTYPES`."""
    import torch

    if name not in DTYPES:
        raise ConfigError(f"dtype '{name}' is unknown.{nearest(name, DTYPES)}")
    return vars(torch)[name]


def find_file(model: str, names: Sequence[str], advice: str) -> Path:
    """`model` itself where it is a file, else the first of `names` in that folder or hub repository.

    With an index on the hub the files that it names are fetched too. Raises MissingFileError that ends in `advice`, how
    to get the file.
    """
    from transformers.utils import cached_file

    if Path(model).is_file():
        return Path(model)
    for name in names:
        try:
            path = Path(cached_file(model, name))
        except OSError:
            continue
        for part in _parts(path) if name.endswith(".index.json") and not Path(model).is_dir() else ():
            cached_file(model, part)
        return path
    raise MissingFileError(f"'{model}' is no file, nor a folder or hub id with {' or '.join(names)}; {advice}")


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors, a torch state dict or the index (.json) of several, on the CPU.

    Raises DataError for a file that is damaged or holds more than tensors.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix == ".json":
        return {key: value for part in _parts(path) for key, value in read_state(path.parent / part).items()}
    if not path.is_file():
        raise MissingFileError(f"{path} is named by its index and not there; get the whole folder")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, RuntimeError, torch.serialization.pickle.UnpicklingError) as error:
        raise DataError(f"{path} is damaged or holds more than tensors; get it again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(f"{path} is no plain state dict: name -> tensor")
    return state


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """`state` becomes the weights of `module`, in its own dtype, and nothing is left over or missing.

    Raises DataError naming some of the missing, unexpected and misshapen keys.
    """
    wanted = {key: value.shape for key, value in module.state_dict().items()}
    faults = {
        "missing": wanted.keys() - state.keys(),
        "unexpected": state.keys() - wanted.keys(),
        "of another shape": {key for key in wanted.keys() & state.keys() if wanted[key] != state[key].shape},
    }
    found = [f"{len(keys)} {fault} ({_some(keys)})" for fault, keys in faults.items() if keys]
    if found:
        raise DataError(f"{where}: weights do not fit: {'; '.join(found)}. Is it the published file of this model?")
    module.load_state_dict(state, assign=True)


def shape_of(state: Mapping[str, Tensor], key: str, where: str) -> torch.Size:
    """The shape of a tensor that says how large the network is. Raises DataError where it is missing."""
    if key not in state:
        raise DataError(f"{where}: weights do not fit: no {key} among {_some(state)}")
    return state[key].shape


def _parts(index: Path) -> list[str]:
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

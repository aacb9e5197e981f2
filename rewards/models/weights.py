"""Published weight files: finding them in a folder or hub repository, reading without pickled code, strict loading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError, MissingFileError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WRAPPERS = ("state_dict", "model")
CONVERT = (
    "where its code is installed and you trust it, write the tensors alone: "
    "`m = torch.load(FILE, weights_only=False); safetensors.torch.save_model(m, 'weights.safetensors')`"
)
NO_WEIGHTS = ("position_ids", "num_batches_tracked")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype `name`. Raises ConfigError for a name that is not in `DTYPES`."""
    import torch

    if name not in DTYPES:
        raise ConfigError(f"dtype '{name}' is unknown.{nearest(name, DTYPES)}")
    return vars(torch)[name]


def find_file(model: str, names: Sequence[str], advice: str) -> Path:
    """`model` itself if it is a file, else the first of `names` in that folder or hub repository.

    For an index on the hub, the files that it lists are fetched too. Raises MissingFileError that ends in `advice`, how
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


def read_state(path: str | Path, *, owner: str, advice: str = "get it again") -> dict[str, Tensor]:
    """All tensors of a .safetensors file, a torch state dict or the index (.json) of several files, on the CPU.

    If the file has a dict under "state_dict" or "model", as training programs write it, that dict is returned. Raises
    MissingFileError for a missing file, DataError for one that is damaged or holds pickled code, which is not run.
    Messages name `owner`, the reward, and end in what to do.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if path.suffix == ".json" and path.is_file():
        return {key: value for part in _parts(path) for key, value in _part(path, part, owner, advice).items()}
    if not path.is_file():
        raise MissingFileError(f"{owner}: no weights '{path}'; {advice}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except torch.serialization.pickle.UnpicklingError as error:
        raise DataError(
            f"{owner}: '{path}' is damaged or holds pickled code, which is not run here; {CONVERT}"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise DataError(f"{owner}: '{path}' is no readable file of weights; {advice}: {error}") from error
    while isinstance(state, dict) and (inner := [state[key] for key in WRAPPERS if isinstance(state.get(key), dict)]):
        state = inner[0]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(f"{owner}: '{path}' is no plain state dict, name -> tensor; {CONVERT}")
    return state


def _part(index: Path, name: str, owner: str, advice: str) -> dict[str, Tensor]:
    if not (index.parent / name).is_file():
        raise MissingFileError(f"{owner}: '{index.parent / name}' is named by its index and not there; get all files")
    return read_state(index.parent / name, owner=owner, advice=advice)


def require_same(
    where: str, *, missing: Collection[str] = (), unexpected: Collection[str] = (), misshapen: Collection[str] = ()
) -> None:
    """Raises DataError naming up to three keys of each kind, unless all are empty."""
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    named = [f"{len(keys)} {fault} ({_some(keys)})" for fault, keys in faults.items() if keys]
    if named:
        raise DataError(f"{where}: weights do not fit: {'; '.join(named)}. Is it the published file of this model?")


def load_whole(kind: Any, model: str, owner: str, *, beside: tuple[str, ...] = (), **options: Any) -> Any:
    """`kind.from_pretrained(model)` with an error for missing, unexpected and misshapen weights.

    transformers itself only warns and gives missing weights random values. Ignored keys: positions and batch counters,
    which old files store, names that begin with one of `beside`, and those that the class itself ties or ignores.
    `options` go to `from_pretrained`; with a `state_dict` among them `model` is a name for errors only. Raises
    DataError naming `owner` and some keys, OSError for a missing model.
    """
    place = None if "state_dict" in options else model
    network, info = kind.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    left = {key for key in info["unexpected_keys"] if not key.endswith(NO_WEIGHTS) and not key.startswith(beside)}
    misshapen = {f"{key} {list(given)} for {list(own)}" for key, given, own in info["mismatched_keys"]}
    require_same(f"{owner}: '{model}'", missing=info["missing_keys"], unexpected=left, misshapen=misshapen)
    return network


def with_adapter(network: Any, folder: str, owner: str) -> Any:
    """`network` with the LoRA of PEFT in `folder` merged into it.

    Raises MissingFileError where the folder has no such LoRA in safetensors, DataError where its weights do not fit.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    weights = Path(folder) / "adapter_model.safetensors"
    if not (weights.parent / "adapter_config.json").is_file():
        raise MissingFileError(f"{owner}: adapter '{folder}' has no adapter_config.json; name a folder that PEFT wrote")
    state = read_state(weights, owner=owner, advice="save the adapter with PEFT, as safetensors")
    where = f"{owner}: adapter '{folder}'"
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:  # what PEFT raises for a file that is no config of its own
        raise DataError(f"{where}: adapter_config.json is no config of PEFT: {error}") from error
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{where} is of the kind {config.peft_type}; only a LoRA can be merged")
    config.base_model_name_or_path = None  # PEFT warns where the base was trained under another path
    try:
        tuned = get_peft_model(network, config)
    except ValueError as error:  # its layers are not in this model
        raise DataError(f"{where} is for another model: {error}") from error
    own = {key: value.shape for key, value in get_peft_model_state_dict(tuned).items()}
    misshapen = [key for key in own.keys() & state.keys() if own[key] != state[key].shape]
    require_same(where, missing=own.keys() - state.keys(), unexpected=state.keys() - own.keys(), misshapen=misshapen)
    set_peft_model_state_dict(tuned, state)
    return tuned.merge_and_unload()


def content_of(network: nn.Module, settings: Any) -> str:
    """16 hex digits for the exact weights of `network` (names, shapes, dtypes, values) and for JSON `settings`.

    It reads all weights: about a second a GB.
    """
    import torch

    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
        digest.update(memoryview(plain.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Assign `state` as the weights of `module`, in the dtype of `state`.

    Raises DataError naming some of the missing, unexpected and misshapen keys.
    """
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    shaped = {key for key in shapes.keys() & state.keys() if shapes[key] != state[key].shape}
    misshapen = {f"{key} {list(state[key].shape)} for {list(shapes[key])}" for key in shaped}
    missing, unexpected = shapes.keys() - state.keys(), state.keys() - shapes.keys()
    require_same(where, missing=missing, unexpected=unexpected, misshapen=misshapen)
    module.load_state_dict(dict(state), assign=True)


def shape_of(state: Mapping[str, Tensor], key: str, where: str) -> torch.Size:
    """The shape of a tensor that determines the network's size. Raises DataError if it is missing."""
    if key not in state:
        raise DataError(f"{where}: weights do not fit: no {key} among {_some(state)}")
    return state[key].shape


def _parts(index: Path) -> list[str]:
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

"""The components of a pipeline folder, loaded so that files fill every weight and nothing is left over.

The libraries give a weight that no file has random or uninitialised numbers and only warn. On the meta device the same
reading needs no memory: the doctor does that.
"""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignkit.errors import DataError, MissingFileError, UnknownNameError
from alignkit.generators.folders import Weights, component_names, find_weights

# What files may hold beside the weights: positions and counters that a class computes itself, and a language model's
# head where the class has none.
_COMPUTED = ("position_ids", "inv_freq", "num_batches_tracked")
_HEAD = "lm_head."
_FAULTS = (OSError, TypeError, ValueError, LookupError, RuntimeError, SafetensorError, StrictDataclassError)
_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
_CONVERT = (
    'if you trust it, write its tensors alone, in its folder: python -c "import torch; from safetensors.torch import '
    "save_file; w = torch.load('{name}', weights_only=False); save_file({{k: v.contiguous().clone() for k, v in "
    "w.items() if isinstance(v, torch.Tensor)}}, '{target}', {{'format': 'pt'}})\" and remove '{name}'"
)


def component_class(library: str, name: str) -> Any:
    """The class of an entry of the index. Raises UnknownNameError where the installed library lacks it."""
    try:
        return simple_get_class_obj(library, name)
    except AttributeError as error:
        raise UnknownNameError(f"{library} as installed has no class '{name}'; a newer one may") from error


def is_network(kind: Any) -> bool:
    """Whether a component's class has weights."""
    return isinstance(kind, type) and issubclass(kind, (ModelMixin, PreTrainedModel))


def load_networks(
    folder: Path, index: Mapping[str, Any], dtype: torch.dtype, quantizers: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Every component with weights that `index` names, in `dtype`, and the variants of those that have no other files.

    `quantizers` are quantisation configs by component. Raises DataError as `load_network` does.
    """
    networks, variants = {}, {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None or not is_network(kind := component_class(*entry)):
            continue
        stored = require_weights(folder / name, entry[0])
        if stored.variant:
            variants[name] = stored.variant
        require_finite(stored)
        networks[name] = load_network(folder / name, kind, stored, dtype, quantization_config=quantizers.get(name))
    return networks, variants


def assemble(folder: str, index: Mapping[str, Any], unused: Collection[str], networks: Mapping[str, Any]) -> Any:
    """The diffusers pipeline of `networks` and what else `index` names: tokenizers, scheduler, processors.

    Components of `unused` and those that were left out are None. Raises MissingFileError for a tokenizer without its
    vocabulary, DataError for components that cannot be read or do not make up the pipeline, UnknownNameError for a
    pipeline class that diffusers lacks.
    """
    kind = index["_class_name"]
    component_class("diffusers", kind)
    named = {name: index[name] for name in component_names(index)}
    for name, entry in named.items():
        if entry[0] is not None:
            _require_vocabulary(Path(folder) / name, component_class(*entry))
    given = dict.fromkeys([*unused, *(name for name, entry in named.items() if entry[0] is None)])
    settings = {"requires_safety_checker": False} if "safety_checker" in index else {}
    try:
        return DiffusionPipeline.from_pretrained(folder, **given, **settings, **networks)
    except (OSError, TypeError, ValueError, LookupError) as error:
        raise DataError(
            f"'{folder}': no {kind} can be made of its files: {type(error).__name__}: {error}; copy the folder again"
        ) from error


def _require_vocabulary(folder: Path, kind: Any) -> None:
    """The library makes a tokenizer without its vocabulary, which then reads every word as unknown."""
    if not isinstance(kind, type) or not issubclass(kind, PreTrainedTokenizerBase):
        return
    others = dict(kind.vocab_files_names)
    whole = others.pop("tokenizer_file", "tokenizer.json")
    missing = [file for file in others.values() if not (folder / file).is_file()]
    if not (folder / whole).is_file() and (missing or not others):
        names = ", ".join(f"{folder.name}/{file}" for file in missing) or f"{folder.name}/{whole}"
        raise MissingFileError(f"model folder '{folder.parent}' is incomplete, missing: {names}; copy it again")


def require_weights(folder: Path, library: str) -> Weights:
    """`find_weights`, and that no adapter stands in for them. Raises DataError."""
    if library != "diffusers" and (folder / "adapter_config.json").exists():
        raise DataError(f"'{folder}' holds an adapter (adapter_config.json): merge it into the weights, or remove it")
    stored = find_weights(folder, library)
    if stored is None:
        raise DataError(f"'{folder}' has no weights; copy it again")
    return stored


def load_network(folder: Path, kind: Any, stored: Weights, dtype: torch.dtype, **options: Any) -> nn.Module:
    """`kind.from_pretrained`, where the files fill every weight and have none left.

    Tied weights need one of their names; positions, counters and the head of a language model may be left over. Raises
    DataError naming files and keys that are missing, left over or of another shape, and for files or a config that
    cannot be read.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if stored.variant:
        given["variant"] = stored.variant
    try:
        network, report = kind.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=stored.is_safe,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **given,
        )
    except _FAULTS as error:
        reason = str(error).strip() or type(error).__name__
        raise DataError(
            f"{_names(stored)}: no {kind.__name__} can be loaded with the config.json beside it: {reason}; copy the "
            "component's folder again"
        ) from error
    _require_same(kind, stored, report)
    return network  # type: ignore[no-any-return]


def load_shapes(folder: Path, library: str, name: str) -> nn.Module:
    """The network on the meta device after the checks of `load_network`; no number is read, so NaN is not seen."""
    stored = require_weights(folder, library)
    dtype = stored_dtype(stored)
    kind = component_class(library, name)
    return load_network(folder, kind, stored, dtype, device_map={"": "meta"}).requires_grad_(False)


def stored_dtype(stored: Weights) -> torch.dtype:
    """The precision of a tensor of the last file, for another one would be converted number by number.

    Raises DataError for a file that cannot be read.
    """
    dtype = torch.float32
    for file in stored.files:
        if not stored.is_safe:
            _unpickled(file)
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                dtype = _HALVES.get(opened.get_slice(names[0]).get_dtype(), dtype) if names else dtype
        except (OSError, SafetensorError) as error:
            raise _damaged(file, error) from error
    return dtype


def is_computed(name: str) -> bool:
    """Whether a file may have the weight `name` or not: the class computes it, or has no use for it."""
    return name.endswith(_COMPUTED) or name.startswith(_HEAD)


def _require_same(kind: Any, stored: Weights, report: Mapping[str, Any]) -> None:
    left_over = [key for key in report["unexpected_keys"] if not is_computed(key)]
    shapes = [f"{key} {list(given)} for {list(own)}" for key, given, own in report["mismatched_keys"]]
    faults = {
        "missing": report["missing_keys"],
        "left over": left_over,
        "of another shape": shapes,
        "unreadable": report.get("error_msgs") or (),
    }
    named = [f"{len(keys)} {fault} ({_some(keys)})" for fault, keys in faults.items() if keys]
    if named:
        raise DataError(
            f"{_names(stored)}: the weights do not fit the {kind.__name__} of its config.json: {'; '.join(named)}. "
            "Copy the component's folder again, all files from one model"
        )


def _names(stored: Weights) -> str:
    more = len(stored.files) - 1
    return f"'{stored.files[0]}'" + (f" and {more} more files" if more else "")


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# --- numbers --------------------------------------------------------------------------------------------------------


def require_finite(stored: Weights) -> None:
    """DataError naming file and tensors where a weight is NaN or infinite.

    Each file is read once, by sums (0.15 s a GB on one core); what is read stays in the machine's file cache for the
    loading that follows.
    """
    for file in stored.files:
        bad = [name for name, tensor in _tensors(file) if not _is_finite(tensor)]
        if bad:
            raise DataError(
                f"'{file}' has NaN or infinite weights in {len(bad)} tensors ({_some(bad)}): the file is damaged, or "
                "the training that wrote it failed; get it again"
            )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no arithmetic
        tensor = tensor.float()
    # A sum shows any NaN or infinite number; only where it is not finite itself does each number need a look.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix != ".safetensors":
        yield from _unpickled(file).items()
        return
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error


def _unpickled(file: Path) -> dict[str, Tensor]:
    """A .bin file by torch's reader of tensors alone; whatever else it holds is refused, not run."""
    try:
        state = torch.load(file, "cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except torch.serialization.pickle.UnpicklingError as error:
        target = f"{file.stem.removeprefix('pytorch_')}.safetensors"
        advice = _CONVERT.format(name=file.name, target=target)
        raise DataError(f"'{file}' is damaged or holds pickled code, which is not run here; {advice}") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise _damaged(file, error) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"'{file}' is no plain state dict (name -> tensor); save the model again as safetensors")
    return state


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(f"'{file}' is truncated or no file of weights ({error}); copy it again")

"""Weights on disk, one tensor at a time: safetensors files as a mapping, and a file written as its tensors come.

Nothing is kept between two accesses, so a computation over whole models holds only the tensors that it works on.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignkit.errors import DataError
from alignkit.storage import atomic_file

_ALIGNMENT = 8  # bytes; the length of a safetensors header is a multiple of it
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Layout:
    """Precision and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files (a model's shards) by name; each access reads one from the disk.

    Opening reads the headers alone. Raises DataError for a file that is damaged or no safetensors file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._places: dict[str, tuple[Path, str]] = {}  # by a tensor's name: its file, and its name there
        self._layouts: dict[str, Layout] = {}
        self._opened = ExitStack()
        self._handles: dict[Path, Any] = {}
        for file in self.files:
            self._open(file)

    def _open(self, file: Path) -> None:
        if file.suffix != ".safetensors":
            raise DataError(f"'{file}' is no safetensors file; a mixture reads no others, save the model again as one")
        try:
            handle = self._opened.enter_context(safe_open(file, framework="pt"))
            for name in handle.keys():  # noqa: SIM118 - it is no mapping
                part = handle.get_slice(name)
                self._layouts[name] = Layout(DTYPES[part.get_dtype()], tuple(part.get_shape()))
                self._places[name] = (file, name)
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"'{file}' is truncated or no file of weights ({error}); copy it again") from error
        self._handles[file] = handle

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        tensor: Tensor = self._handles[file].get_tensor(stored)
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise DataError(
                f"'{file}': '{stored}' holds NaN or infinite values. The file is damaged or its training "
                "diverged; use an earlier checkpoint or copy it again"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def layout(self, name: str) -> Layout:
        """Precision and shape of a tensor, from the header."""
        return self._layouts[name]

    def select(self, names: Mapping[str, str]) -> StoredTensors:
        """The same files, with those tensors alone that are values of `names`, under its keys."""
        selected = copy.copy(self)
        vars(selected)["_places"] = {new: self._places[name] for new, name in names.items()}
        vars(selected)["_layouts"] = {new: self._layouts[name] for new, name in names.items()}
        return selected


def layout_of(tensors: Mapping[str, Tensor], name: str) -> Layout:
    """Precision and shape of `tensors[name]`, without reading it where it is on disk."""
    if isinstance(tensors, StoredTensors):
        return tensors.layout(name)
    return Layout(tensors[name].dtype, tuple(tensors[name].shape))


def write_stream(
    file: Path, layouts: Mapping[str, Layout], tensor: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file of the tensors in `layouts`, asking `tensor(name)` for one at a time.

    Equal contents give equal bytes. Atomic: after an error there is no file. Raises StorageError for a full disk.
    """
    # Wide elements first, as the library itself orders them, so that every tensor is aligned.
    names = sorted(layouts, key=lambda name: (-layouts[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        start, end = end, end + layouts[name].dtype.itemsize * math.prod(layouts[name].shape)
        dtype = _NAMES[layouts[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(layouts[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with atomic_file(file) as handle:
        handle.write(len(text).to_bytes(_ALIGNMENT, "little") + text)
        for name in names:
            value = tensor(name)
            if Layout(value.dtype, tuple(value.shape)) != layouts[name]:
                raise ValueError(f"'{name}', {value.dtype} {list(value.shape)}, was announced as {layouts[name]}")
            handle.write(memoryview(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
            del value  # before the next one is made

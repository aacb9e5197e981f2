"""Whether two rewards share weights. A guard that uses the network of a trained reward makes the same errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLED = 64  # values of a weight that are compared
_OPAQUE = (str, bytes, type, ModuleType, FunctionType, MethodType)


def shared_weights(one: Any, other: Any) -> int:
    """How many weights of `one` are weights of `other` as well, equal in shape and in values; biases are left out.

    Weights are those of the modules and tensors that the objects hold, at any depth. 64 values of each are compared, in
    bfloat16, so that two precisions of one model are recognised. Weights whose values are all equal do not count. Not
    seen: a model that is not in this process (a served one), and quantised copies.
    """
    return len(_keys(one) & _keys(other))


def _keys(owner: Any) -> set[tuple[Any, ...]]:
    keys = set()
    for weight in _weights(owner):
        flat = weight.detach().flatten()
        places = torch.linspace(0, len(flat) - 1, _SAMPLED, dtype=torch.float64).long()
        values = tuple(flat[places.to(flat.device)].bfloat16().tolist())
        if len(set(values)) > 1:
            keys.add((tuple(weight.shape), *values))
    return keys


def _weights(owner: Any) -> Iterator[Tensor]:
    """The matrices and kernels that `owner` holds."""
    todo, seen = [owner], set()
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, _OPAQUE):
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            yield from (parameter for parameter in item.parameters() if parameter.dim() > 1 and not parameter.is_meta)
        elif isinstance(item, Tensor):
            if item.dim() > 1 and item.is_floating_point() and not item.is_meta:
                yield item
        elif isinstance(item, Mapping):
            todo += item.values()
        elif isinstance(item, list | tuple | set):
            todo += item
        else:
            todo += _attributes(item)


def _attributes(item: Any) -> Iterator[Any]:
    """Values of the attributes of `item`, those in slots too."""
    if type(item).__dictoffset__:
        yield from vars(item).values()
    for kind in type(item).__mro__:
        for slot in vars(kind).values():
            if isinstance(slot, MemberDescriptorType):
                with suppress(AttributeError):  # a slot without a value
                    yield slot.__get__(item)

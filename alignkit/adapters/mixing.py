"""Soups of weights: exact weighted sums of what several trainings changed (Ramé et al. 2023, rewarded soups).

A LoRA changes a weight by (alpha / rank) B A, so a soup of LoRAs must be the sum of those products. PEFT's
`add_weighted_adapter(combination_type="linear")` sums the factors instead and adds cross terms: two equal adapters at
weights 0.5 and 0.5 give twice the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.adapters.lora import DOWN, UP
from alignkit.adapters.plain import DORA_ENDS, require_plain
from alignkit.errors import AdapterError

ALPHA = ".alpha"
_LAYOUTS = ((DOWN, UP), (".lora_down.weight", ".lora_up.weight"))  # PEFT's and diffusers', kohya's

State = Mapping[str, Tensor]


def soup(state_dicts: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """The state dict whose weights, or whose changes of the weights, are sum_i weights[i] state_dicts[i].

    LoRA state dicts (`PATH.lora_A.weight`, `PATH.lora_B.weight`, or kohya's names) give one LoRA of rank sum r_i and
    scale 1 whose change B A of every layer is the weighted sum of the members' changes; a layer that a member lacks
    counts as unchanged there. A member's scale is alpha / rank with `PATH.alpha`, else 1: use `with_alphas` for an
    adapter whose config has alpha or rsLoRA. The result is in float32 at least.

    Other state dicts (full weights) are summed in float64 tensor by tensor; they must have the same names and shapes.
    Weights are used as they are: for full weights they usually sum to 1. Raises AdapterError naming the member and the
    key for DoRA, for LoRA mixed with full weights, and for shapes or names that do not fit.
    """
    if not state_dicts or len(state_dicts) != len(weights):
        raise AdapterError(f"soup: {len(state_dicts)} state dicts and {len(weights)} weights; give one weight for each")
    for number, weight in enumerate(weights):
        if not math.isfinite(weight):
            raise AdapterError(f"soup: the weight of member {number} is {weight}; give finite numbers")
    layouts = [_layout(state, number) for number, state in enumerate(state_dicts)]
    for number, layout in enumerate(layouts):
        if layout != layouts[0]:
            raise AdapterError(f"soup: member {number} has another layout than member 0; convert one of them")
    if layouts[0] is None:
        return _sum_of_weights(state_dicts, weights)
    return _sum_of_changes(state_dicts, weights, layouts[0])


def with_alphas(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A LoRA state dict under PEFT names with `PATH.alpha` for every layer, from PEFT's LoraConfig values.

    rsLoRA's scale alpha / sqrt(rank) is written as the alpha that gives it. Raises AdapterError for DoRA and other
    configs that are no plain LoRA.
    """
    require_plain(config, "soup: an adapter's config", "Train or export a plain LoRA")
    pattern = config.get("alpha_pattern") or {}
    result = dict(state)
    for key, down in state.items():
        if key.endswith(DOWN):
            path, rank = key.removesuffix(DOWN), len(down)
            ends = [name for name in pattern if path == name or path.endswith(f".{name}")]
            alpha = pattern[ends[0]] if ends else config.get("lora_alpha", rank)
            result[path + ALPHA] = torch.tensor(float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0))
    return result


def _layout(state: State, number: int) -> tuple[str, str] | None:
    """The ends of the names of down and up weights; None for full weights."""
    if not state:
        raise AdapterError(f"soup: member {number} is empty")
    for key in state:
        if key.endswith(DORA_ENDS):
            raise AdapterError(f"soup: member {number} is a DoRA ('{key}'), whose change is no product of two matrices")
    for down, up in _LAYOUTS:
        paths = [key.removesuffix(down) for key in state if key.endswith(down)]
        if paths:
            known = {path + end for path in paths for end in (down, up, ALPHA)}
            required = {path + up for path in paths}
            if state.keys() - known or required - state.keys():
                problem = min((state.keys() - known) | (required - state.keys()))
                raise AdapterError(f"soup: '{problem}' of member {number} does not belong to a plain LoRA")
            return down, up
    return None


def _sum_of_weights(state_dicts: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    first = state_dicts[0]
    for number, state in enumerate(state_dicts):
        different = sorted(first.keys() ^ state.keys()) or [k for k in first if first[k].shape != state[k].shape]
        if different:
            raise AdapterError(f"soup: members 0 and {number} differ in the names or shapes of '{different[0]}'")
    result = {}
    for key, value in first.items():
        members = [state[key] for state in state_dicts]
        if value.is_floating_point():
            total = sum(weight * member.double() for weight, member in zip(weights, members, strict=True))
            result[key] = torch.as_tensor(total).to(_dtype(members))
        elif all(torch.equal(member, value) for member in members):
            result[key] = value.clone()
        else:
            raise AdapterError(f"soup: '{key}' holds integers that differ between members; they cannot be averaged")
    return result


def _sum_of_changes(state_dicts: Sequence[State], weights: Sequence[float], ends: tuple[str, str]) -> dict[str, Tensor]:
    down_end, up_end = ends
    names = [key.removesuffix(down_end) for state in state_dicts for key in state if key.endswith(down_end)]
    result = {}
    for path in dict.fromkeys(names):
        downs, ups = [], []
        for state, weight in zip(state_dicts, weights, strict=True):
            if path + down_end in state:
                down, up = state[path + down_end], state[path + up_end]
                alpha = float(state[path + ALPHA]) if path + ALPHA in state else float(len(down))
                downs.append(down)
                ups.append(up.double() * (weight * alpha / len(down)))
        shapes = {(down.shape[1:], up.shape[:1]) for down, up in zip(downs, ups, strict=True)}
        if len(shapes) > 1:
            raise AdapterError(f"soup: members have different shapes at '{path}'; they belong to different models")
        dtype = torch.promote_types(_dtype([*downs]), torch.float32)
        result[path + down_end] = torch.cat([down.to(dtype) for down in downs])
        result[path + up_end] = torch.cat(ups, dim=1).to(dtype)
    return result


def _dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype

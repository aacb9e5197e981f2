"""Soups of weights: exact weighted sums of what several trainings changed (Ramé et al. 2023, rewarded soups).

A LoRA changes a weight by (alpha / rank) B A, so a soup of LoRAs must be the sum of those products. PEFT's
`add_weighted_adapter(combination_type="linear")` sums the factors instead and adds cross terms: two equal adapters at
weights 0.5 and 0.5 give twice the adapter. With rsLoRA its result is too large by the root of the new rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from alignkit.adapters.lora import DOWN, UP, longest_first
from alignkit.adapters.low_rank import Lost, factorised, product, truncated
from alignkit.adapters.merging import CLOSE, Merge, Method, combine
from alignkit.adapters.plain import DORA_ENDS, require_finite, require_plain
from alignkit.adapters.tensor_files import layout_of
from alignkit.errors import AdapterError
from alignkit.escape import get_logger

logger = get_logger(__name__)
ALPHA = ".alpha"
_LAYOUTS = ((DOWN, UP), (".lora_down.weight", ".lora_up.weight"))  # PEFT's and diffusers', kohya's

# Of adapters in other layouts, or of other kinds: LoHa, LoKr, OFT, IA3. They must not count as full weights.
_ADAPTER_KEYS = re.compile(r"(^|[._])(lora[._]|hada_|lokr_|b?oft_|ia3_)", re.IGNORECASE)

State = Mapping[str, Tensor]


def soup(
    state_dicts: Sequence[State],
    weights: Sequence[float],
    *,
    method: Method = "linear",
    density: float = 1.0,
    seed: int = 0,
    rank: int | None = None,
    base: State | None = None,
    any_sum: bool = False,
) -> dict[str, Tensor]:
    """The state dict whose weights, or whose changes of the weights, are sum_i weights[i] state_dicts[i].

    LoRA state dicts (`PATH.lora_A.weight`, `PATH.lora_B.weight`, or kohya's names) give one LoRA of rank sum r_i and
    scale 1 whose change B A of every layer is the weighted sum of the members' changes; a layer that a member lacks
    counts as unchanged there. With `rank` the sum is approximated by its largest singular values, and the relative
    error is logged. A member's scale is alpha / rank with `PATH.alpha`, else 1: use `with_alphas` for an adapter whose
    config has alpha or rsLoRA. The result is in float32 at least.

    Other state dicts (full weights) must have the same names and shapes; sums are computed in float64. With `base` the
    result is base + sum_i weights[i] (state_dicts[i] - base): for weights that sum to 1 the same as without.

    Weights sum to 1, unless `any_sum` allows otherwise or the method is wise_ft. `method`, `density` and `seed` are
    those of `merging.Merge`; TIES and DARE need `rank` for LoRAs and `base` for full weights. Raises AdapterError
    naming the member and the key for DoRA, for LoRA mixed with full weights, for NaN or infinite values, for shapes or
    names that do not fit, and for a LoRA that shares no layer with another; ConfigError for what the method cannot
    take.
    """
    if not state_dicts or len(state_dicts) != len(weights):
        raise AdapterError(f"soup: {len(state_dicts)} state dicts and {len(weights)} weights; give one weight for each")
    for number, weight in enumerate(weights):
        if not math.isfinite(weight):
            raise AdapterError(f"soup: the weight of member {number} is {weight}; give finite numbers")
    merge = Merge(method, density, seed)
    merge.check(weights, any_sum=any_sum)
    for number, state in enumerate(state_dicts):
        require_finite(state, f"soup: member {number}")
    layouts = [lora_ends(state, f"member {number}") for number, state in enumerate(state_dicts)]
    for number, layout in enumerate(layouts):
        if layout != layouts[0]:
            raise AdapterError(f"soup: member {number} has another layout than member 0; convert one of them")
    if layouts[0] is None:
        members = [Full(state) for state in state_dicts]
        mixed = WeightSoup(members, weights, merge, base)
        return {name: mixed.weight(name) for name in mixed.names}
    members_of_lora = [Lora.of(state, layouts[0]) for state in state_dicts]
    for number, member in enumerate(members_of_lora):
        others = [other.layers for other in members_of_lora if other is not member]
        if others and not any(member.layers.keys() & layers.keys() for layers in others):
            raise AdapterError(
                f"soup: member {number} shares no layer with another ('{min(member.layers)}', '{min(others[0])}'); "
                "give all members the same names of layers, with the same prefix"
            )
    return soup_of_loras(members_of_lora, weights, merge, rank, ends=layouts[0])[0]


def with_alphas(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A LoRA state dict under PEFT names with `PATH.alpha` for every layer, from PEFT's LoraConfig values.

    Patterns of alpha match as in `lora.load`: by PEFT's function, longer ones first. rsLoRA's scale alpha / sqrt(rank)
    is written as the alpha that gives it. Raises AdapterError for DoRA and other configs that are no plain LoRA.
    """
    require_plain(config, "soup: an adapter's config", "Train or export a plain LoRA")
    pattern = longest_first(config.get("alpha_pattern") or {})
    result = dict(state)
    for key, down in state.items():
        if key.endswith(DOWN):
            path, rank = key.removesuffix(DOWN), len(down)
            alpha = pattern.get(get_pattern_key(list(pattern), path), config.get("lora_alpha", rank))
            result[path + ALPHA] = torch.tensor(float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0))
    return result


def lora_ends(state: State, label: str) -> tuple[str, str] | None:
    """The ends of the names of down and up weights; None for full weights.

    Raises AdapterError naming the member `label` for DoRA and other adapters that are no plain LoRA in these layouts.
    """
    if not state:
        raise AdapterError(f"soup: {label} is empty")
    for key in state:
        if key.endswith(DORA_ENDS):
            raise AdapterError(
                f"soup: {label} is a DoRA ('{key}'), whose change is no product of two matrices; train it again as a "
                "plain LoRA, or merge it into the base"
            )
    for down, up in _LAYOUTS:
        paths = [key.removesuffix(down) for key in state if key.endswith(down)]
        if paths:
            known = {path + end for path in paths for end in (down, up, ALPHA)}
            required = {path + up for path in paths}
            if state.keys() - known or required - state.keys():
                problem = min((state.keys() - known) | (required - state.keys()))
                raise AdapterError(f"soup: '{problem}' of {label} does not belong to a plain LoRA")
            return down, up
    for key in state:
        if _ADAPTER_KEYS.search(key):
            raise AdapterError(
                f"soup: '{key}' of {label} is an adapter's, in a layout that is not known; give a plain LoRA with the "
                f"names {' and '.join(_LAYOUTS[0])} (peft.get_peft_model_state_dict), or kohya's"
            )
    return None


# --- LoRAs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lora:
    """A member that is a LoRA: down, up and scale by the path of the layer."""

    layers: Mapping[str, tuple[Tensor, Tensor, float]]

    @classmethod
    def of(cls, state: State, ends: tuple[str, str] = (DOWN, UP)) -> Lora:
        """The LoRA of a state dict; see `soup` for its scale."""
        layers = {}
        for path in [key.removesuffix(ends[0]) for key in state if key.endswith(ends[0])]:
            down, up = state[path + ends[0]], state[path + ends[1]]
            alpha = float(state[path + ALPHA]) if path + ALPHA in state else float(len(down))
            layers[path] = (down, up, alpha / len(down))
        return cls(layers)

    def change(self, path: str, shape: Sequence[int]) -> Tensor:
        """The change of a layer's weight of `shape`, float64; 0 where it has none."""
        if path not in self.layers:
            return torch.zeros(*shape, dtype=torch.float64)
        down, up, scale = self.layers[path]
        return product(down, up).mul_(scale)


def soup_of_loras(
    members: Sequence[Lora],
    weights: Sequence[float],
    merge: Merge,
    rank: int | None = None,
    *,
    ends: tuple[str, str] = (DOWN, UP),
) -> tuple[dict[str, Tensor], float]:
    """One LoRA of scale 1 as a state dict, and its relative error: 0 unless it was cut to `rank`."""
    paths = dict.fromkeys(path for member in members for path in member.layers)
    if rank is None and not merge.is_linear:
        raise AdapterError(
            f"soup: what {merge.method} makes of LoRAs is no product of two factors; give the rank of the result, or "
            "write full weights"
        )
    if rank is not None and rank < 1:
        raise AdapterError(f"soup: rank is {rank}; it must be at least 1")
    result, lost = {}, Lost()
    for path in paths:
        layers = [member.layers[path] for member in members if path in member.layers]
        shapes = {(down.shape[1:], up.shape[:1]) for down, up, _ in layers}
        if len(shapes) > 1:
            raise AdapterError(f"soup: members have different shapes at '{path}'; they belong to different models")
        dtype = torch.promote_types(_dtype([down for down, *_ in layers]), torch.float32)
        if not merge.is_linear:
            shape = (len(layers[0][1]), *layers[0][0].shape[1:])
            changes = [partial(member.change, path, shape) for member in members]
            down, up, cut = factorised(combine(changes, weights, merge, path).expand(shape), rank or 1)
        else:
            down, up = _stacked(path, members, weights)
            down, up, cut = truncated(down, up, rank) if rank is not None and len(down) > rank else (down, up, Lost())
        lost += cut
        result[path + ends[0]], result[path + ends[1]] = down.to(dtype).contiguous(), up.to(dtype).contiguous()
    if rank is not None:
        logger.info("soup: cut to rank %d, with a relative error of %.3g in the Frobenius norm", rank, lost.share)
    return result, lost.share


def _stacked(path: str, members: Sequence[Lora], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """sum_i w_i s_i B_i A_i as one product: downs below each other, ups beside each other with their factors."""
    downs, ups = [], []
    for member, weight in zip(members, weights, strict=True):
        if path in member.layers:
            down, up, scale = member.layers[path]
            downs.append(down)
            ups.append(up.double() * (weight * scale))
    dtype = torch.promote_types(_dtype(downs), torch.float32)
    return torch.cat([down.to(dtype) for down in downs]), torch.cat(ups, dim=1)


# --- full weights ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Full:
    """A member that has all weights."""

    weights: State


class WeightSoup:
    """Full weights of a mixture, computed one at a time by `weight(name)`.

    Members have all weights or are LoRAs, whose layers go by the names of weights without their end `.weight`; a LoRA
    needs the base. The result has the names of the base, else of the first member, and the widest precision of those
    with all weights. Raises AdapterError for names or shapes that differ between them, without reading any.
    """

    def __init__(
        self, members: Sequence[Full | Lora], weights: Sequence[float], merge: Merge, base: State | None = None
    ) -> None:
        self._members, self._weights, self._merge, self._base = members, weights, merge, base
        given: list[tuple[str, State]] = [] if base is None else [("the base", base)]
        given += [(f"member {n}", one.weights) for n, one in enumerate(members) if isinstance(one, Full)]
        self._states = [state for _, state in given]
        self.names = list(self._states[0])
        if base is None and not merge.is_linear:
            raise AdapterError(f"soup: {merge.method} works on changes of full weights, so it needs their base")
        for label, state in given[1:]:
            self._require_same(given[0], (label, state))

    def _require_same(self, first: tuple[str, State], other: tuple[str, State]) -> None:
        one, two = first[1], other[1]
        different = sorted(one.keys() ^ two.keys())
        different = different or [name for name in one if layout_of(one, name).shape != layout_of(two, name).shape]
        if different:
            raise AdapterError(
                f"soup: {first[0]} and {other[0]} differ in the names or shapes of '{different[0]}'; give members of "
                "one base model"
            )

    def dtype(self, name: str) -> torch.dtype:
        """The precision of a weight of the result."""
        dtypes = [layout_of(state, name).dtype for state in self._states]
        return _widest(dtypes)

    def weight(self, name: str) -> Tensor:
        """One weight of the result. Raises AdapterError for integers that differ between members."""
        if not self.dtype(name).is_floating_point:
            value = self._states[0][name]
            if not all(torch.equal(state[name], value) for state in self._states[1:]):
                raise AdapterError(
                    f"soup: '{name}' holds integers that differ between members; they cannot be averaged"
                )
            return value.clone()
        if not self._merge.is_linear:
            base = self._states[0][name].double()
            changes = [partial(_change, member, name, base) for member in self._members]
            return (base + combine(changes, self._weights, self._merge, name)).to(self.dtype(name))
        total = torch.zeros(layout_of(self._states[0], name).shape, dtype=torch.float64)
        for weight, term in self._terms(name):
            total.add_(term().double(), alpha=weight)
        return total.to(self.dtype(name))

    def _terms(self, name: str) -> list[tuple[float, Callable[[], Tensor]]]:
        """Factors that are not 0 and what they multiply; a mixture's end points are then exact."""
        terms: list[tuple[float, Callable[[], Tensor]]] = []
        path = name.removesuffix(".weight")
        whole = 0.0
        for weight, member in zip(self._weights, self._members, strict=True):
            if isinstance(member, Full):
                terms.append((weight, partial(member.weights.__getitem__, name)))
                whole += weight
            elif path in member.layers:
                terms.append((weight, partial(member.change, path, layout_of(self._states[0], name).shape)))
        if self._base is not None and abs(1 - whole) > CLOSE:
            terms.insert(0, (1 - whole, partial(self._base.__getitem__, name)))
        return [(weight, value) for weight, value in terms if weight != 0]


def _change(member: Full | Lora, name: str, base: Tensor) -> Tensor:
    """A member's change of one weight, float64."""
    if isinstance(member, Full):
        return member.weights[name].double() - base
    return member.change(name.removesuffix(".weight"), base.shape)


def _dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return _widest([tensor.dtype for tensor in tensors])


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The precision that holds all; float32 for those of 8 bits, which are for storage and would lose small changes."""
    wide = [torch.float32 if dtype.is_floating_point and dtype.itemsize == 1 else dtype for dtype in dtypes]
    return reduce(torch.promote_types, wide)

"""LoRA through PEFT on a bare network or text encoder: inject, switch, load, merge.

One network may carry several named adapters. The reference policy is the network with all adapters off (`disabled`).
A target that matches nothing is an error; diffusers would only warn. Files are read in `lora_files` and written in
`exports`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import CLIPTextModel

from alignkit.adapters.plain import require_loadable, require_plain
from alignkit.errors import AdapterError, nearest
from alignkit.escape import get_logger

if TYPE_CHECKING:
    from torch import Tensor

logger = get_logger(__name__)

NAME = "default"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
TEXT_LEVEL = "text_model."  # a level above CLIP's encoder, which CLIPTextModel lost in version 5 of transformers
PEFT_PREFIX = "base_model.model."
_ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


# --- which adapters a network carries ---------------------------------------------------------------------------------


def lora_layers(net: nn.Module, name: str | None = None) -> list[LoraLayer]:
    """The layers that carry the adapter `name`, or any adapter."""
    layers = [module for module in net.modules() if isinstance(module, LoraLayer)]
    return layers if name is None else [layer for layer in layers if name in layer.scaling]


def adapter_names(net: nn.Module) -> list[str]:
    """The names of the network's adapters, active or not."""
    return list(dict.fromkeys(name for layer in lora_layers(net) for name in layer.scaling))


def require_adapter(net: nn.Module, name: str) -> None:
    """Raise AdapterError, with the known names, unless `net` carries the adapter `name`."""
    known = adapter_names(net)
    if name not in known:
        raise AdapterError(f"{type(net).__name__} has no adapter '{name}'; its adapters: {', '.join(known) or 'none'}")


def active_weights(net: nn.Module) -> dict[str, float]:
    """The weight of every active adapter; 1 is the adapter as it was trained."""
    weights = {}
    for layer in lora_layers(net):
        for name in layer.active_adapters:
            if name in layer.scaling:
                weights[name] = layer.scaling[name] / (own_scale(layer, name) or 1.0)
    return weights


def activate(net: nn.Module, weights: Mapping[str, float]) -> None:
    """Make exactly the adapters of `weights` active, each times its weight; an empty mapping switches all off.

    Which adapters are trained stays as it is. Raises AdapterError for an unknown name or a weight that is not finite.
    """
    for name, weight in weights.items():
        require_adapter(net, name)
        if not math.isfinite(weight):
            raise AdapterError(f"the weight of adapter '{name}' is {weight}; give a finite number")
    for layer in lora_layers(net):
        layer._active_adapter = list(weights)  # noqa: SLF001 - PEFT's set_adapter also makes them trainable
        for name, weight in weights.items():
            layer.set_scale(name, weight)


def trainable_adapters(net: nn.Module) -> set[str]:
    """The adapters with parameters that require gradients."""
    trained = set()
    for layer in lora_layers(net):
        trained |= {name for name in layer.scaling if any(p.requires_grad for p in _parameters(layer, name))}
    return trained


def set_trainable(net: nn.Module, names: Collection[str]) -> None:
    """Let exactly the adapters of `names` require gradients. A trainable adapter that is off receives none."""
    for layer in lora_layers(net):
        for name in layer.scaling:
            layer.set_requires_grad(name, name in names)


@contextmanager
def disabled(layers: Iterable[LoraLayer]) -> Iterator[None]:
    """Within it all adapters of `layers` are off, so the network is the base model exactly.

    Unlike PEFT's enable_adapters it leaves requires_grad alone: a frozen adapter stays frozen afterwards.
    """
    # In `vars`: PEFT's setter changes requires_grad, and torch's is slow on thousands of layers.
    states = [vars(layer) for layer in layers]
    before = [state["_disable_adapters"] for state in states]
    for state in states:
        state["_disable_adapters"] = True
    try:
        yield
    finally:
        for state, was_disabled in zip(states, before, strict=True):
            state["_disable_adapters"] = was_disabled


def own_scale(layer: LoraLayer, name: str) -> float:
    """The scale that an adapter was trained with: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    rank = layer.r[name]
    return float(layer.lora_alpha[name] / (math.sqrt(rank) if layer.use_rslora.get(name) else rank))


def _parameters(layer: LoraLayer, name: str) -> list[nn.Parameter]:
    dicts = [vars(layer)["_modules"].get(part) for part in layer.adapter_layer_names]
    present = [part[name] for part in dicts if part is not None and name in part]
    return [parameter for part in present for parameter in part.parameters()]


# --- injection --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a network an adapter covers: layers with weights, parameters in them, and what the adapter adds."""

    layers: int
    all_layers: int
    parameters: int
    all_parameters: int
    added: int

    def __str__(self) -> str:
        share = self.parameters / max(1, self.all_parameters)
        count = f"{self.layers} of {self.all_layers} layers"
        return f"{count}, {share:.1%} of {self.all_parameters:,} parameters; it adds {self.added:,}"


def inject(
    net: Any,
    *,
    rank: int,
    targets: Sequence[str],
    alpha: float | None = None,
    dropout: float = 0.0,
    name: str = NAME,
) -> Coverage:
    """Freeze `net` and put a LoRA of `rank` on every layer whose name ends in one of `targets`.

    alpha defaults to rank (scale 1). The start is gaussian / zero, so the first forward is the base model's.
    Raises AdapterError as `inject_config` does.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
    return inject_config(net, config, name=name)


def inject_config(net: Any, config: LoraConfig, *, name: str = NAME) -> Coverage:
    """Freeze `net` and put the LoRA that PEFT's `config` describes on it, active with weight 1 and trainable.

    Other adapters keep their weights and stay trainable or frozen. Returns and logs what the adapter covers. Raises
    AdapterError for a target that matches no layer, for a config that is more than a plain LoRA (DoRA) or changes the
    base weights (PiSSA), and for a name in use.
    """
    require_plain(config.to_dict(), f"the LoRA config of {type(net).__name__}", "Train a plain LoRA")
    if isinstance(config.target_modules, list | set | tuple):
        missing = unmatched(net, sorted(config.target_modules))
        if missing:
            raise _no_layer(net, missing, len(config.target_modules))
    _add(net, config, name)
    covered = coverage(net, name)
    logger.info("LoRA '%s' on %s: %s", name, type(net).__name__, covered)
    return covered


def unmatched(net: nn.Module, targets: Iterable[str]) -> list[str]:
    """The targets that match no layer of `net`: neither a whole name nor its end after a dot."""
    paths = [f".{path}" for path, _ in net.named_modules()]
    return [target for target in targets if not any(path.endswith(f".{target}") for path in paths)]


def _no_layer(net: nn.Module, missing: Sequence[str], count: int) -> AdapterError:
    ends: dict[str, None] = {}
    for path, module in net.named_modules():
        if isinstance(module, _ADAPTABLE):
            parts = path.split(".")
            ends |= dict.fromkeys(".".join(parts[-size:]) for size in (1, 2) if not parts[-size:][0].isdigit())
    hints = "".join(nearest(target, ends) for target in missing[:3] if ends)
    which = f"none of the LoRA targets {list(missing)} names" if len(missing) == count else None
    return AdapterError(
        f"{which or f'LoRA targets without a layer: {list(missing)}; each must name'} a layer of "
        f"{type(net).__name__}.{hints} Give ends of module names, e.g. to_q, to_k, to_v, to_out.0"
    )


def _add(net: Any, config: LoraConfig, name: str, *, trainable: bool = True) -> None:
    """Freeze the base, add an adapter to `net` beside those that it carries, and make it active."""
    if name in adapter_names(net):
        raise AdapterError(f"{type(net).__name__} already has an adapter '{name}'; give another name or remove it")
    weights, trained = active_weights(net), trainable_adapters(net)
    net.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # several adapters are wanted
        try:
            if isinstance(net, PeftAdapterMixin):
                net.add_adapter(config, adapter_name=name)
            else:  # PixArt's network, for one
                inject_adapter_in_model(config, net, adapter_name=name)
        except ValueError as error:
            if "not found in the base model" not in str(error):
                raise
            targets = config.target_modules
            raise _no_layer(net, [targets] if isinstance(targets, str) else sorted(targets or ()), 1) from error
    activate(net, {**weights, name: 1.0})
    set_trainable(net, trained | ({name} if trainable else set()))


def coverage(net: nn.Module, name: str) -> Coverage:
    """What adapter `name` covers of `net`: layers, and parameters of the base in them."""
    layers = lora_layers(net, name)
    base = [parameter for key, parameter in net.named_parameters() if "lora_" not in key]
    adapted = [parameter for layer in layers for parameter in layer.get_base_layer().parameters()]
    all_layers = [
        key for key, part in net.named_modules() if isinstance(part, _ADAPTABLE) and ".lora_" not in f".{key}"
    ]
    added = [parameter for layer in layers for parameter in _parameters(layer, name)]
    counts = [sum(parameter.numel() for parameter in group) for group in (adapted, base, added)]
    return Coverage(len(layers), len(all_layers), *counts)


def inject_like(net: Any, other: Any) -> None:
    """Put adapters of the kinds that `other` carries on `net`, with weights of their own."""
    for name in adapter_names(other):
        _add(net, copy.deepcopy(other.peft_config[name]), name)
    activate(net, active_weights(other))
    set_trainable(net, trainable_adapters(other))


# --- weights ----------------------------------------------------------------------------------------------------------


def adapter_state(net: nn.Module, name: str = NAME) -> dict[str, Tensor]:
    """LoRA weights of the adapter `name` under PEFT names (`….lora_A.weight`), contiguous copies on the CPU."""
    require_adapter(net, name)
    state = get_peft_model_state_dict(net, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}


def lost_level(part: nn.Module) -> bool:
    """Whether `part` is a CLIP text encoder without the level that published keys have."""
    return isinstance(part, CLIPTextModel) and "text_model" not in dict(part.named_children())


# --- loading ----------------------------------------------------------------------------------------------------------


def load(
    net: Any,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    where: str,
    origin: Callable[[], str],
    name: str = NAME,
    trainable: bool = True,
) -> None:
    """Inject the adapter of `state` (PEFT names) and `config` (LoraConfig values) as `name`, active with weight 1.

    Where `config` has no alpha, alpha is each layer's rank (scale 1). Raises AdapterError, naming the file `where` and
    its `origin()`, for weights without a layer, of another shape, NaN or infinite, and for what is no plain LoRA; `net`
    then stays as it was.
    """
    ranks = {key.removesuffix(DOWN): value.shape[0] for key, value in state.items() if key.endswith(DOWN)}
    require_loadable(state, config, where)
    if not ranks:
        raise AdapterError(f"{where} holds no '*{DOWN}'; only the diffusers, PEFT and kohya layouts load")
    missing = unmatched(net, sorted(ranks))
    if missing:
        raise AdapterError(
            f"{where} does not fit this model: it has no layer '{missing[0]}'. It was made for {origin()}"
        )
    _add(net, _stored_config(ranks, config), name, trainable=trainable)
    problem = _misfit(adapter_state(net, name), state)
    if problem:
        remove(net, name)
        raise AdapterError(f"{where} does not fit this model: {problem}. It was made for {origin()}")
    set_peft_model_state_dict(net, dict(state), adapter_name=name)


def _stored_config(ranks: Mapping[str, int], config: Mapping[str, Any]) -> LoraConfig:
    """The LoraConfig of an adapter with `ranks` by layer; values of `config` come first."""
    rank = max(ranks.values())
    alphas: dict[str, float] = {}
    if set(ranks.values()) != {rank} and "lora_alpha" not in config:
        alphas |= ranks
    alphas |= config.get("alpha_pattern") or {}
    guess = {"r": rank, "lora_alpha": rank, "target_modules": sorted(ranks)}
    if set(ranks.values()) != {rank}:
        guess["rank_pattern"] = longest_first(ranks)
    known = {field.name for field in fields(LoraConfig) if field.init}
    values = {key: value for key, value in config.items() if key in known and value is not None}
    return LoraConfig(**{**guess, **values, "alpha_pattern": longest_first(alphas)})


def longest_first(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT takes the first pattern that is an end of a layer's name, so longer ones must come first."""
    return {path: pattern[path] for path in sorted(pattern, key=lambda path: (-len(path), path))}


def _misfit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    if expected.keys() != state.keys():
        missing, extra = sorted(expected.keys() - state)[:2], sorted(state.keys() - expected)[:2]
        return f"without weights {missing}, unknown {extra}"
    for key, value in expected.items():
        if value.shape != state[key].shape:
            return f"'{key}' has another shape, {list(state[key].shape)} instead of {list(value.shape)}"
    return None


# --- removal and merging ----------------------------------------------------------------------------------------------


def remove(net: Any, name: str = NAME) -> None:
    """Take the adapter `name` off; what was merged stays in the weights. Raises AdapterError for an unknown name."""
    require_adapter(net, name)
    for layer in lora_layers(net):
        layer._active_adapter = [other for other in layer.active_adapters if other != name]  # noqa: SLF001
        layer.merged_adapters = [other for other in layer.merged_adapters if other != name]
        if name in layer.scaling:
            layer.delete_adapter(name)
    del net.peft_config[name]
    if net.peft_config:
        return
    if isinstance(net, PeftAdapterMixin):
        net.unload_lora()
        return
    recurse_remove_peft_layers(net)
    del net.peft_config


def merge(net: Any, name: str | None = None) -> None:
    """Fold the adapter `name`, by default every active one, into the weights with its weight, and remove it.

    Other adapters stay on. A network without an adapter stays as it is.
    """
    names = list(active_weights(net)) if name is None else [name]
    for layer in lora_layers(net):
        folded = [one for one in names if one in layer.scaling]
        if folded:
            layer.merge(adapter_names=folded)
    for one in names:
        remove(net, one)


def negate(net: Any, name: str = NAME) -> None:
    """Turn the adapter's sign: on a network that it was merged into, it then gives back the network before."""
    require_adapter(net, name)
    for layer in lora_layers(net, name):
        layer.lora_B[name].weight.data.neg_()

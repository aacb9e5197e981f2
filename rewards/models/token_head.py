"""A small head on a vision-language model's hidden states at special tokens, as in HPSv3 and VideoReward.

Their checkpoints hold a whole fine-tuned Qwen2-VL model and `rm_head.*`, in the key layout of transformers 4.45
(`model.*`, `visual.*`), merged or with PEFT's names (`base_model.model.*` with `lora_A`, `lora_B`); missing and
unexpected keys are errors. Both were trained without multimodal positions: their forward calls the language model
directly, so tokens are numbered 0, 1, 2, ... on every axis. Not here: adapters stored apart from the base model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import DataError
from rewards.models.media import precise
from rewards.models.vision_language import VisionLanguage, freeze, load
from rewards.models.weights import load_strictly, read_state, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD = "rm_head."
_PEFT = "base_model.model."
_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


class TokenHead:
    """A Qwen2-VL model with `head` on the hidden states at `tokens`; `state`: weights as `read_state` returns them.

    `model`: folder or hub id of the original Qwen2-VL, for its config, tokenizer and processor only. `tokens` are added
    to the tokenizer in their order, as in training.
    """

    def __init__(
        self,
        model: str,
        state: Mapping[str, Tensor],
        head: nn.Module,
        tokens: Sequence[str],
        *,
        owner: str,
        device: str,
        dtype: str,
        rate: float = 2.0,
        bounds: tuple[int | None, int | None] = (None, None),
        checkpointing: bool = False,
    ) -> None:
        names = {name: _renamed(name) for name in state if not name.startswith((HEAD, "lm_head."))}
        weights = {new: state[old].to(torch_dtype(dtype)) for old, new in names.items()}
        network, tokenizer, patches = load(
            model, lambda config: _built(config, weights, owner), owner=owner, bounds=bounds
        )
        tokenizer.add_tokens(list(tokens), special_tokens=True)
        self._ids = tokenizer.convert_tokens_to_ids(list(tokens))
        if max(self._ids) >= network.config.text_config.vocab_size:
            raise DataError(f"'{model}': its tokenizer has more tokens than the checkpoint embeds; another Qwen2-VL?")
        freeze(network, device, checkpointing=checkpointing)
        own = {name.removeprefix(HEAD): value for name, value in state.items() if name.startswith(HEAD)}
        load_strictly(head, own, f"{owner}: {HEAD}*")
        self._head = head.to(device).eval().requires_grad_(False)
        self._reader = VisionLanguage(network, tokenizer, patches, rate=rate, plain_positions=True)

    def __call__(self, media: Tensor, texts: Sequence[str], *, eight_bit: bool = False) -> Tensor:
        """The head's outputs [B, tokens, out] for media with their own texts, differentiable to the pixels.

        Raises DataError unless a text has each special token exactly once: a prompt must not contain them.
        """
        import torch

        encoded = self._reader.see(media, eight_bit=eight_bit)
        rows = [self._reader.tokens(encoded, text) for text in texts]
        for index, row in enumerate(rows):
            if any(row.count(token) != 1 for token in self._ids):
                raise DataError(
                    f"row {index}: each reward token must be there once; its prompt holds one: {texts[index]!r}"
                )
        spots = [(index, row.index(token)) for index, row in enumerate(rows) for token in self._ids]
        states = precise(self._reader.read(encoded, range(len(rows)), rows, spots))
        with torch.autocast(states.device.type, enabled=False):
            return self._head.to(states.dtype)(states).unflatten(0, (len(rows), len(self._ids)))


def read_unwrapped(path: Path, *, owner: str) -> dict[str, Tensor]:
    """Tensors of a weight file, without PEFT's prefix; raises what `read_state` raises."""
    return {name.removeprefix(_PEFT): value for name, value in read_state(path, owner=owner).items()}


def merge_adapters(state: Mapping[str, Tensor], alpha: float, *, rank_stabilised: bool = False) -> dict[str, Tensor]:
    """W + scale B A for every adapted weight of a PEFT state dict (LoRA, arXiv 2106.09685), in float32.

    scale = alpha / r, or alpha / sqrt(r) if `rank_stabilised` (arXiv 2312.03732). Raises DataError where A, B or the
    base weight is missing.
    """
    merged = {name.replace(_BASE, "."): value for name, value in state.items() if ".lora_" not in name}
    halves = [name for name in state if ".lora_" in name]
    for name in halves:
        up, target = name.replace(_DOWN, _UP), name.replace(_DOWN, ".").replace(_UP, ".")
        if target not in merged or up not in state or up.replace(_UP, _DOWN) not in state:
            raise DataError(
                f"'{name}': the checkpoint lacks the other half of the adapter (lora_A or lora_B) or the base weight "
                f"'{target}'; download it again"
            )
        if name != up:
            down, rank = state[name].float(), len(state[name])
            scale = alpha / (rank**0.5 if rank_stabilised else rank)
            merged[target] = (merged[target].float() + scale * (state[up].float() @ down)).to(merged[target].dtype)
    return merged


def _renamed(name: str) -> str:
    """The key in the base model of transformers 5 for a key of transformers 4.45 or later."""
    if name.startswith(("model.visual.", "model.language_model.")):
        return name.removeprefix("model.")
    return f"language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _built(config: Any, weights: Mapping[str, Tensor], owner: str) -> nn.Module:
    """The base model with exactly these weights; its vocabulary size is that of their embedding."""
    from transformers import AutoModel
    from transformers.initialization import no_init_weights

    words = weights.get("language_model.embed_tokens.weight")
    if words is None:
        raise DataError(
            f"{owner}: the checkpoint has no 'model.embed_tokens.weight'; is it a whole Qwen2-VL reward model?"
        )
    config.text_config.vocab_size = len(words)
    with no_init_weights():
        network = AutoModel.from_config(config, dtype=words.dtype)
    load_strictly(network, weights, f"{owner}: the checkpoint")
    return network

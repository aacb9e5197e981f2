"""Qwen's vision-language models, differentiable: hidden states of pixels and texts, without the stock processor.

Covers the Qwen2-VL, Qwen2.5-VL and Qwen3-VL classes of transformers (arXiv 2409.12191, 2502.13923, 2511.21631). The
vision tower runs once for each medium, for any number of texts about it, and its (deep-stacked) features are given
to every text, so gradients add up exactly. Not here: answers and heads (`vlm`, `token_head`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from alignkit.errors import ConfigError, DataError, MissingFileError
from rewards.models.patches import Patches, read_json, read_patches

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN = "<|im_start|>user\n{seen}{text}<|im_end|>\n<|im_start|>assistant\n"  # where a folder has no chat template


@dataclass(frozen=True, slots=True)
class Seen:
    """B media after the vision tower: `features[b]` and `deep[layer][b]` [tokens, D], grids [B, 3] of patches."""

    kind: str  # "image" or "video"
    features: Sequence[Tensor]
    deep: Sequence[Sequence[Tensor]] | None
    grids: Tensor
    frames: int


class VisionLanguage:
    """A frozen model with its tokenizer and patches.

    `network`: the base model (without the head that predicts words). `rate`: frames per second of clips as they are
    given; Qwen2.5-VL counts its time axis with it, Qwen3-VL writes time stamps. `plain_positions`: number the tokens
    0, 1, 2, ... on all axes rather than by position and time, as some reward models were trained.
    """

    def __init__(
        self, network: Any, tokenizer: Any, patches: dict[str, Patches], *, rate: float, plain_positions: bool = False
    ) -> None:
        if not rate > 0:
            raise ConfigError(f"clips of {rate} frames per second; give the rate at which frames follow each other")
        self.network, self.tokenizer, self.patches, self.rate = network, tokenizer, patches, rate
        self.plain_positions = plain_positions
        config = network.config
        ids = config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id
        self._image, self._video, self._start, self._end = tokenizer.convert_ids_to_tokens(list(ids))
        self._stamps = config.model_type.startswith("qwen3")
        self._seconds = config.model_type.startswith("qwen2_5")

    def see(self, media: Tensor, *, eight_bit: bool = False) -> Seen:
        """Media [B, 3, H, W] or clips [B, F, 3, H, W] in [0, 1] through the vision tower, with gradient.

        `eight_bit`: rounded as the stock processor does with 8-bit files; then without gradient.
        """
        kind = "video" if media.dim() == 5 else "image"
        patches, grids = self.patches[kind](media.to(self.network.device), eight_bit=eight_bit)
        encode = self.network.get_video_features if kind == "video" else self.network.get_image_features
        output = encode(patches, grids, return_dict=True)
        deep = output.deepstack_features if self._stamps else None
        frames = media.shape[1] if kind == "video" else 1
        return Seen(kind, output.pooler_output, deep, grids, frames)

    def tokens(self, seen: Seen, text: str) -> list[int]:
        """Token ids of a user's turn with one medium of `seen` and `text`, up to the start of the answer."""
        marker = self._image if seen.kind == "image" else self._video
        if self.tokenizer.chat_template:
            content = [{"type": seen.kind}, {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            written = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            written = _PLAIN.format(seen=self._start + marker + self._end, text=text)
        whole = self._start + marker + self._end
        if written.count(whole) != 1 or written.count(marker) != 1:
            raise DataError(f"the turn has not exactly one '{whole}': a broken chat template, or the text holds it")
        time, rows, columns = seen.grids[0].tolist()
        count = rows * columns // self.patches[seen.kind].merge ** 2
        if seen.kind == "video" and self._stamps:
            frame = self._start + marker * count + self._end
            written = written.replace(
                whole, "".join(f"<{stamp:.1f} seconds>{frame}" for stamp in self._times(time, seen.frames))
            )
        else:
            written = written.replace(marker, marker * count * time)
        return self.tokenizer(written).input_ids

    def _times(self, steps: int, frames: int) -> list[float]:
        """Qwen3-VL's time stamps: the mean time of each step's first and last frame (at most the clip's last)."""
        each = self.patches["video"].temporal
        ends = [(min(step * each, frames - 1), min(step * each + each - 1, frames - 1)) for step in range(steps)]
        return [(first / self.rate + last / self.rate) / 2 for first, last in ends]

    def read(
        self, seen: Seen, media: Sequence[int], rows: Sequence[Sequence[int]], spots: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Last hidden states [len(spots), D] at `spots`, pairs of (row, position), of token rows about media.

        Row i is about medium `media[i]`. Rows are padded at the end; with causal attention padding does not change the
        states before it. States are selected before any head, as `logits_to_keep` does.
        """
        import torch

        output = self.network(**self._inputs(seen, media, rows), use_cache=False)
        row, position = (torch.tensor(part, device=self.network.device) for part in zip(*spots, strict=True))
        return output.last_hidden_state[row, position]

    def continuation(
        self, seen: Seen, medium: int, row: Sequence[int], pick: Callable[[Tensor], int], limit: int
    ) -> list[int]:
        """At most `limit` token ids that follow `row`, a row of tokens about medium `medium`; no gradient.

        `pick` chooses the next id from the last hidden state [1, D]. An end of turn or of text ends it and is left out.
        Each token costs one position: keys and values of those before it are kept. Not for `plain_positions`.
        """
        import torch

        network, found = self.network, list[int]()
        ends = {self.tokenizer.eos_token_id, *self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])}
        mode = network.training
        network.eval()  # activation checkpointing works in train() and keeps no keys and values
        try:
            with torch.no_grad():
                output = network(**self._inputs(seen, [medium], [row]), use_cache=True)
                while len(found) < limit and (token := pick(output.last_hidden_state[:, -1])) not in ends:
                    found.append(token)
                    ids = torch.tensor([[token]], device=network.device)
                    output = network(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
        finally:
            network.train(mode)
        return found

    def _inputs(self, seen: Seen, media: Sequence[int], rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The keywords of a call of the network for token rows about media, padded at the end."""
        import torch

        device, config = self.network.device, self.network.config
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *([row[-1]] * (longest - len(row)))] for row in rows], device=device)
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        given: dict[str, Any] = {f"{seen.kind}_grid_thw": seen.grids[list(media)], "mm_token_type_ids": kinds}
        if self.plain_positions:
            given["position_ids"] = torch.arange(longest, device=device).expand(3, len(rows), -1)
        if self._seconds and seen.kind == "video":
            step = self.patches["video"].temporal / self.rate
            given["second_per_grid_ts"] = torch.full((len(rows),), step, device=device)
        deep = seen.deep and [[layer[index] for index in media] for layer in seen.deep]
        features = SimpleNamespace(pooler_output=[seen.features[index] for index in media], deepstack_features=deep)
        return {"input_ids": ids, "mm_encoder_outputs": {seen.kind: features}, **given}


def load(model: str, build: Callable[[Any], Any], *, owner: str, bounds: tuple[int | None, int | None]) -> Any:
    """(what `build(config)` returns, tokenizer, patches) of a model folder or hub id.

    `bounds`: least and most pixels a frame, None for those of the folder.
    Raises MissingFileError naming `owner` and the folder if it is missing, ConfigError for another family of models.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model)
        if not config.model_type.startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl")):
            raise ConfigError(
                f"{owner}: '{model}' is a {config.model_type}; Qwen2-VL, Qwen2.5-VL and Qwen3-VL can be read"
            )
        config.text_config.attention_dropout = 0.0  # activation checkpointing needs train(), which would enable dropout
        built, tokenizer = build(config), AutoTokenizer.from_pretrained(model)
    except OSError as error:
        raise MissingFileError(f"{owner}: '{model}' is no model folder here and no hub id: {error}") from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = (read_json(model, "chat_template.json") or {}).get("chat_template")
    patches = {kind: read_patches(model, config, video=kind == "video") for kind in ("image", "video")}
    given = {name: value for name, value in zip(("min_pixels", "max_pixels"), bounds, strict=True) if value is not None}
    return built, tokenizer, {kind: replace(cut, **given) for kind, cut in patches.items()}


def freeze(network: Any, device: str, *, checkpointing: bool) -> Any:
    """`network` on `device`, frozen; with `checkpointing` in train() mode with all dropout off."""
    from torch import nn

    network = network.to(device).eval().requires_grad_(False)
    if checkpointing:
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        network.activation_checkpointing_enable({"use_reentrant": False})
        network.disable_input_require_grads()  # else pixels without gradient would get a graph
        network.train()
    return network

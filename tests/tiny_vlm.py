"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL folders with a byte-level tokenizer, as the hub lays them out."""

from __future__ import annotations

import json
from pathlib import Path

import torch

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
]
TEMPLATE = (
    "<|im_start|>system\nBe fair.<|im_end|>\n{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def slope(reward, pixels, prompts, row, gradient):
    """(the reward of `row` by central differences along the sign of `gradient`, the same by `gradient`)."""
    step = 1e-3 * gradient.sign()
    with torch.no_grad():
        ends = [reward(pixels + sign * step, prompts).total[row] for sign in (1, -1)]
    return ((ends[0] - ends[1]) / 2e-3).item(), gradient.abs().sum().item()


def tokenizer(words=("Yes", "No", "yes", "no")):
    """Bytes and a few words, then Qwen's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair for word in words for pair in _merges(word)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*letters, *("".join(pair) for pair in merges)]))}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges))))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_tokens(SPECIAL, special_tokens=True)
    return fast


def _merges(word):
    return [(word[:end], word[end]) for end in range(1, len(word))]


def config(kind, patch=4, heads=2, width=16):
    """A configuration of `kind` with two layers, merging 2 x 2 patches of `patch` pixels."""
    from transformers import AutoConfig

    words = tokenizer()
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, words.convert_tokens_to_ids(SPECIAL[3:]), strict=True))
    rope = {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {"vocab_size": len(words), "hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2}
    text |= {"num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": width // heads}
    text |= {"rope_parameters": rope, "rope_scaling": rope, "tie_word_embeddings": False}
    text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    tower = {"depth": 2, "num_heads": 2, "patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if kind == "qwen2_vl":
        tower |= {"embed_dim": width, "hidden_size": width, "mlp_ratio": 2}
    else:
        tower |= {"hidden_size": width, "out_hidden_size": width, "intermediate_size": 24}
    if kind == "qwen2_5_vl":
        tower |= {"window_size": 4 * patch, "fullatt_block_indexes": [1], "tokens_per_second": 4}
    if kind == "qwen3_vl":
        tower |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return AutoConfig.for_model(kind, text_config=text, vision_config=tower, **ids)


def save(kind, folder, *, template=True, bounds=(8 * 8, 32 * 32), dtype=torch.float32):
    """An ordinary folder: weights, tokenizer, preprocessor_config.json (and the clips' one of Qwen3-VL)."""
    from transformers import AutoModelForImageTextToText

    folder = Path(folder)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForImageTextToText.from_config(config(kind), dtype=dtype)
        for parameter in model.parameters():  # the library's start is nearly blind to pictures
            torch.nn.init.normal_(parameter, std=0.25 if parameter.dim() > 1 else 0.1)
    model.save_pretrained(folder)
    words = tokenizer()
    words.chat_template = TEMPLATE if template else None
    words.save_pretrained(folder)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if kind == "qwen3_vl" else {}
    stored = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, **half}
    size = {"size": {"shortest_edge": bounds[0], "longest_edge": bounds[1]}}
    (folder / "preprocessor_config.json").write_text(json.dumps(stored | size))
    if kind == "qwen3_vl":
        clip = {"size": {"shortest_edge": 4 * bounds[0], "longest_edge": 4 * bounds[1]}}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(stored | clip))
    return folder


def exact_norms(monkeypatch):
    """Norms in the dtype of the model; the library's compute in float32 whatever it is."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for place in ("qwen2_vl.{}.Qwen2VL", "qwen2_5_vl.{}.Qwen2_5_VL", "qwen3_vl.{}.Qwen3VLText"):
        name = place.format(f"modeling_{place.partition('.')[0]}")
        monkeypatch.setattr(f"transformers.models.{name}RMSNorm.forward", norm)

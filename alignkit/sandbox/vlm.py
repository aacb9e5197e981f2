"""The sandbox's vision-language model: a small Qwen2.5-VL that answers questions about scenes and clips.

Real classes at small size, trained from scratch by `interviews.py`. Its answers are good but not perfect, so that a
generator can exploit them as it exploits large critics. How a reward reads its answers: `rewards.models.vlm`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from alignkit.sandbox import clips, questions
from alignkit.sandbox.captions import NUMBERS, PREFIXES, _plural, bodies
from alignkit.sandbox.models import byte_pairs
from alignkit.sandbox.scenes import BACKGROUNDS, CATEGORIES, PALETTE, SHAPES, SIZE

PATCH, MERGE, TEMPORAL = 8, 2, 2
TOKENS_PER_SECOND = 4  # one step of time for each pair of frames at 8 frames a second
HALF = (0.5, 0.5, 0.5)
PROCESSOR = "Qwen2_5_VLProcessor"
# How media are cut into patches, as `rewards.models.patches.Patches` takes it.
CUTTING: dict[str, Any] = {
    "patch": PATCH,
    "merge": MERGE,
    "temporal": TEMPORAL,
    "min_pixels": SIZE * SIZE,
    "max_pixels": SIZE * SIZE,
    "mean": HALF,
    "std": HALF,
}
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _words() -> list[str]:
    """Every piece into which the tokenizer's rule splits the questions and answers."""
    inner = {word for category in CATEGORIES for body in bodies(category) for word in body.split()}
    inner |= {word for prefix in PREFIXES for word in prefix.split()} | {*BACKGROUNDS, "on", "background", *NUMBERS}
    inner |= {*questions.COUNTS.values(), *clips.DIRECTIONS, *map(_plural, SHAPES)}
    others = "there a the number of is moving way color many are does picture show shows this figure better answer or"
    inner |= {*others.split(), "Please", "Answer", "Yes", "No", "yes", "no", "first", "second"}
    starts = {"Is", "Does", "Which", "What", "How", "Yes", "No", "yes", "no", "first", "second", "user", "assistant"}
    answers = {*questions.COUNTS.values(), *clips.DIRECTIONS, *PALETTE, "a", *NUMBERS}
    return sorted({f"Ġ{word}" for word in inner} | starts | answers | {'Ġ"', '"?', "Ċ"})


def tokenizer() -> Qwen2Tokenizer:
    """Qwen's byte-level tokenizer in which every word of the sandbox is one token and any other text is bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = byte_pairs(_words())
    names = dict.fromkeys([*sorted(ByteLevel.alphabet()), *map("".join, merges)])
    vocabulary = {name: index for index, name in enumerate(names)}
    made = Qwen2Tokenizer(vocab=vocabulary, merges=merges, unk_token=None, model_max_length=1024)
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    made.chat_template = CHAT_TEMPLATE
    return made


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] in ('video', 'video_url') -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""


def vlm(words: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Six vision blocks on 8 x 8 patches of 8 pixels, four language layers on 4 x 4 merged patches.

    The rotary frequencies are divided between the axes otherwise than at full size: with the usual shares, neighbouring
    columns of so small an image differ by a rotation of a thousandth of a radian, too little to separate left from
    right. A smaller base solves that too, but leaves no low frequency, which attention from a word to its object at any
    distance needs: with it the model did not learn which colour belongs to which object.
    """
    code = {name: words.convert_tokens_to_ids(name) for name in SPECIAL}
    vision = {
        "depth": 6,
        "hidden_size": 160,
        "intermediate_size": 416,
        "num_heads": 5,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "tokens_per_second": TOKENS_PER_SECOND,
        "window_size": SIZE,
        "fullatt_block_indexes": list(range(6)),
        "out_hidden_size": 192,
    }
    text = {
        "vocab_size": len(words),
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 12], "rope_theta": 10000.0},
        "bos_token_id": None,
        "eos_token_id": code["<|im_end|>"],
        "pad_token_id": code["<|endoftext|>"],
    }
    ends = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    ends |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {name: code[token] for name, token in ends.items()}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def save(model: Qwen2_5_VLForConditionalGeneration, words: Qwen2Tokenizer, out: Path) -> None:
    """Write model, tokenizer and preprocessor configs, from which an AutoProcessor can be built."""
    model.half().save_pretrained(out)
    words.save_pretrained(out)
    tokenizing = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    stored = {
        "size": {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE},
        "image_mean": HALF,
        "image_std": HALF,
    }
    stored |= {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": TEMPORAL, "processor_class": PROCESSOR}
    files = {
        "tokenizer_config.json": tokenizing | {"processor_class": PROCESSOR},
        "preprocessor_config.json": stored | {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": stored | {"video_processor_type": "Qwen2VLVideoProcessor", "fps": clips.FPS},
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

"""Warns once per generator about prompts that exceed the token limit. diffusers logs this on every call, or not at all.

Of several text encoders the one with the highest limit decides: SD3's and FLUX's CLIP read 77 tokens, T5 more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)
SHOWN = 200  # characters of what is lost


def warn_of_cuts(
    tokenizers: Mapping[str, Any],
    window: Callable[[Any], tuple[str, int]],
    name: str,
    prompts: Sequence[str],
) -> bool:
    """Warn if every text encoder truncates some of `prompts`; returns whether it warned.

    `tokenizers` are the pipeline's, by component name. `window` gives, for a tokenizer, the prefix that the pipeline
    writes before a prompt and the number of tokens it keeps. `name` is the model's name in the message.
    """
    if not tokenizers:
        return False
    windows = {part: window(tokenizer) for part, tokenizer in tokenizers.items()}
    limits = {part: windows[part][1] - tokenizers[part].num_special_tokens_to_add() for part in windows}
    longest = max(limits, key=limits.__getitem__)
    prefix, kept = windows[longest]
    texts = list(dict.fromkeys(prompts))
    lost = cuts(tokenizers[longest], [prefix + text for text in texts], limits[longest])
    if not lost:
        return False
    others = ", ".join(f"{other} {size}" for other, (_, size) in windows.items() if other != longest)
    beside = f" (beside it {others})" if others else ""
    first = lost[0] if len(lost[0]) <= SHOWN else f"{lost[0][:SHOWN]}..."
    logger.warning(
        "%d of %d prompts are longer than the %d tokens that '%s' of '%s' reads%s; what comes after is not seen. "
        "The first of them loses '%s'",
        len(lost),
        len(texts),
        kept,
        longest,
        name,
        beside,
        first,
    )
    return True


def cuts(tokenizer: Any, texts: Sequence[str], room: int) -> list[str]:
    """What is lost of those `texts` that have more than `room` tokens of their own."""
    tokens = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return [tokenizer.decode(row[room:]).strip() for row in tokens if len(row) > room]


def quiet(pipeline: Any) -> None:
    """Silence what `pipeline` and its tokenizers say of long prompts themselves."""
    for kind in type(pipeline).__mro__:
        logging.getLogger(kind.__module__).addFilter(_is_other)
    for tokenizer in tokenizers_of(pipeline).values():
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True


def tokenizers_of(pipeline: Any) -> dict[str, Any]:
    """The tokenizers of `pipeline` whose text encoder is there too, by component name."""
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    names = [name for name in parts if name.startswith("tokenizer")]
    return {name: parts[name] for name in names if name.replace("tokenizer", "text_encoder", 1) in parts}


def _is_other(record: logging.LogRecord) -> bool:
    return "input was truncated because" not in str(record.msg)

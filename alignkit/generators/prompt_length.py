"""Warns once per generator about prompts that exceed the token limit. diffusers logs this on every call, or not at all.

Of several text encoders the one with the highest limit decides: SD3's and FLUX's CLIP read 77 tokens, T5 more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignkit.escape import get_logger

logger = get_logger(__name__)
SHOWN = 200  # characters of what is lost
TOGETHER = 1000  # texts tokenised in one call


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
    lengths = count_tokens(tokenizers[longest], [prefix + text for text in texts], limits[longest])
    long = [text for text, length in zip(texts, lengths, strict=True) if length > limits[longest]]
    if not long:
        return False
    lost = lost_end(tokenizers[longest], prefix + long[0], limits[longest])
    others = ", ".join(f"{other} {size}" for other, (_, size) in windows.items() if other != longest)
    beside = f" (beside it {others})" if others else ""
    first = lost if len(lost) <= SHOWN else f"{lost[:SHOWN]}..."
    logger.warning(
        "%d of %d prompts are longer than the %d tokens that '%s' of '%s' reads%s; what comes after is not seen. "
        "The first of them loses '%s'",
        len(long),
        len(texts),
        kept,
        longest,
        name,
        beside,
        first,
    )
    return True


def count_tokens(tokenizer: Any, texts: Sequence[str], room: int) -> list[int]:
    """The number of tokens of each text without special ones; for texts that fit into `room`, an upper bound.

    The bound is the sum over a text's words, each tokenised once for all texts: tokens do not cross words, or are fewer
    where they do. Only texts beyond it are tokenised.
    """
    words = list({word for text in texts for word in text.split()})
    sizes = dict(zip(words, _lengths(tokenizer, [f" {word}" for word in words]), strict=True))
    counts = [sum(map(sizes.__getitem__, text.split())) for text in texts]
    long = [row for row, count in enumerate(counts) if count > room]
    for row, length in zip(long, _lengths(tokenizer, [texts[row] for row in long]), strict=True):
        counts[row] = length
    return counts


def _lengths(tokenizer: Any, texts: list[str]) -> list[int]:
    lengths: list[int] = []
    for start in range(0, len(texts), TOGETHER):
        batch = texts[start : start + TOGETHER]
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            backend.no_truncation()  # the call before may have set a limit
            backend.no_padding()
            lengths += map(len, backend.encode_batch_fast(batch, add_special_tokens=False))
        else:
            lengths += map(len, tokenizer(batch, add_special_tokens=False, verbose=False).input_ids)
    return lengths


def lost_end(tokenizer: Any, text: str, room: int) -> str:
    """What of `text` comes after its first `room` tokens."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return tokenizer.decode(tokens[room:]).strip()  # type: ignore[no-any-return]


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

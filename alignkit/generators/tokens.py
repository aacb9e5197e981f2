"""Prompts longer than the text encoders read: said once a generator, in place of the pipelines' line a call or nothing.

Of several text encoders the one that reads most decides: SD3's and FLUX's CLIP see 77 tokens where T5 sees all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignkit.generators.base import PipelineGenerator

logger = logging.getLogger(__name__)
SHOWN = 200  # characters of what is lost


def warn_of_cuts(generator: PipelineGenerator, prompts: Sequence[str]) -> bool:
    """Warn if any of `prompts` is cut for every text encoder; whether it was so."""
    tokenizers = _tokenizers(generator.pipeline)
    if not tokenizers:
        return False
    windows = {name: generator.text_window(tokenizer) for name, tokenizer in tokenizers.items()}
    rooms = {name: window[1] - tokenizers[name].num_special_tokens_to_add() for name, window in windows.items()}
    name = max(rooms, key=rooms.__getitem__)
    texts = list(dict.fromkeys(prompts))
    lost = cuts(tokenizers[name], [windows[name][0] + text for text in texts], rooms[name])
    if not lost:
        return False
    others = ", ".join(f"{other} {window[1]}" for other, window in windows.items() if other != name)
    logger.warning(
        "%d of %d prompts are longer than the %d tokens that '%s' of '%s' reads%s; what comes after is not seen. "
        "The first of them loses '%s'",
        *(len(lost), len(texts), windows[name][1], name, generator.name, f" (beside it {others})" if others else ""),
        lost[0] if len(lost[0]) <= SHOWN else f"{lost[0][:SHOWN]}...",
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
    for tokenizer in _tokenizers(pipeline).values():
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True


def _tokenizers(pipeline: Any) -> dict[str, Any]:
    named = {name: part for name, part in pipeline.components.items() if name.startswith("tokenizer")}
    return {name: part for name, part in named.items() if part is not None}


def _is_other(record: logging.LogRecord) -> bool:
    return "input was truncated because" not in str(record.msg)

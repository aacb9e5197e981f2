"""JSON from a server or a file, parsed within bounds, so that no reply can exhaust memory or the stack.

Bounded here: nesting, the number of arrays and objects, the digits of an integer. Refused: NaN, Infinity and numbers
that overflow to them, and an object with a duplicate key. The caller must bound the length of the text.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

_MOST_NESTED = 32
_MOST_CONTAINERS = 200_000  # 20 alternatives with their bytes for each of 4096 tokens
_MOST_DIGITS = 20  # a 64-bit integer and its sign
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{\]}]', re.DOTALL)


def parse_json(text: str) -> Any:
    """The value of `text`; ValueError naming the bound that it exceeds, or the place where it is not JSON."""
    _check_containers(text)
    return json.loads(
        text,
        object_pairs_hook=_object_without_duplicates,
        parse_int=_bounded_integer,
        parse_float=_finite_number,
        parse_constant=_refuse_constant,
    )


def _check_containers(text: str) -> None:
    """Before parsing, because the parser recurses."""
    depth = count = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in ("[", "{"):
            depth, count = depth + 1, count + 1
        elif match[0] in ("]", "}"):
            depth -= 1
        if depth > _MOST_NESTED or count > _MOST_CONTAINERS:
            raise ValueError(f"JSON with more than {_MOST_NESTED} levels or {_MOST_CONTAINERS} arrays and objects")


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("an object has a duplicate key")
    return members


def _bounded_integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer has more than {_MOST_DIGITS} characters")
    return int(digits)


def _finite_number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is too large for a float")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

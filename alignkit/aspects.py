"""Yes/no questions about a prompt: the records that writers, checks and critics share.

A writer turns a prompt into a `Draft`: the facts that it found in the prompt, and questions that each cover some of
them. The stage `data_pipelines.aspects` checks and stores drafts; the rewards `yes_no` and `explanation` ask the
questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

from alignkit.errors import ConfigError, DataError
from alignkit.records import Prompt

ASPECTS = ("alignment", "physics", "quality")
FACTS = ("object", "attribute", "count", "relation", "extra")  # extra: nothing else is in the image
_KEYS = ("name", "aspect", "text", "negated", "weight", "answer")


@dataclass(frozen=True, slots=True)
class Question:
    """`text`: yes is good. `negated`: the opposite question, for which no is good. At least one of them is given.

    `answer` is the wished answer in words: `explanation` reads it, `yes_no` does not. `{prompt}` in all three is
    replaced by the prompt. `weight` is above 0. Any `aspect` is allowed here, and those of `ASPECTS` in the stage.
    """

    text: str = ""
    weight: float = 1.0
    negated: str = ""
    name: str = ""
    aspect: str = ""
    answer: str = ""

    @classmethod
    def of(cls, given: str | Mapping[str, Any] | Question) -> Question:
        """From a text, or from a mapping with the fields' names, of which those with null count as left out.

        Raises ConfigError for other keys, values of other types, no text, or a weight not above 0.
        """
        if not isinstance(given, str | Mapping | Question):
            raise ConfigError(f"question {given!r}: it is a text or has {', '.join(_KEYS)}")
        if isinstance(given, Mapping):
            unknown = set(given) - set(_KEYS)
            if unknown:
                raise ConfigError(f"question {dict(given)}: it has {', '.join(_KEYS)}; {unknown} is unknown")
            # datasets fills the keys that some questions of a file lack with null
            question = cls(**{key: value for key, value in given.items() if value is not None})
        else:
            question = cls(given) if isinstance(given, str) else given
        for key, value in asdict(question).items():
            if key != "weight" and not isinstance(value, str):
                raise ConfigError(f"question '{question.text}': its {key} is {value!r}; give a text")
        weight: Any = question.weight
        if not (isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf):
            raise ConfigError(f"question '{question.text}': its weight is {weight!r}; give a number above 0")
        if not (question.text or question.negated):
            raise ConfigError(f"question {given!r}: at least text or negated is not empty")
        return question

    def asked(self, prompt: str) -> list[str]:
        """The texts to ask: `text`, then `negated`, less one that is empty."""
        return [text.replace("{prompt}", prompt) for text in (self.text, self.negated) if text]


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that a prompt states; `kind` is one of `FACTS`, `text` is in the prompt's words ("red circle")."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Draft:
    """What a writer wrote for one prompt.

    covers: for each question the indices of the facts that it is about.
    problems: why there is no usable draft (no reply, a prompt that the writer cannot read); empty otherwise.
    is_failed: whether that is a failure of the server that may pass.
    """

    facts: Sequence[Fact] = ()
    questions: Sequence[Question] = ()
    covers: Sequence[Sequence[int]] = ()
    problems: Sequence[str] = ()
    is_failed: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of a draft: one question or more for each of `aspects`, none for others, at most `max_questions`."""

    aspects: Sequence[str]
    max_questions: int


@runtime_checkable
class QuestionWriter(Protocol):
    """Writes questions: a parser of a grammar, or a served language model. It is also `Reporting` if it has costs."""

    def write(self, prompts: Sequence[Prompt], rules: Rules, complaints: Sequence[Sequence[str]]) -> Sequence[Draft]:
        """One draft a prompt, in order. `complaints`: for each prompt what was wrong with its last draft, or nothing.

        A writer may ignore complaints. Raises ServerError if the server cannot be used.
        """
        ...


def named(given: Sequence[str | Mapping[str, Any] | Question]) -> list[Question]:
    """Questions with distinct names: their own, or question_1, question_2, ..."""
    questions = [Question.of(one) for one in given]
    questions = [replace(q, name=q.name or f"question_{number}") for number, q in enumerate(questions, 1)]
    if len({q.name for q in questions}) != len(questions):
        raise ConfigError(f"two questions have the same name: {', '.join(q.name for q in questions)}")
    return questions


def questions_of(prompt: Prompt) -> list[Question]:
    """Those in the prompt's metadata, with distinct names; none where it brings none.

    Raises DataError naming the prompt for what is no list of questions.
    """
    given = prompt.metadata.get("questions")
    if given is None:
        return []
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise DataError(f"prompt '{prompt.text}': its questions are {given!r}; give a list of texts or mappings")
    try:
        return named(given)
    except ConfigError as error:
        raise DataError(f"prompt '{prompt.text}': {error}") from error

"""Yes/no questions about a prompt: the records that writers, checks and critics share.

A writer turns a prompt into a `Draft`: the facts that it found in the prompt, and questions that each cover some of
them. The stage `data_pipelines.aspects` checks and stores drafts; the rewards `yes_no` and `explanation` ask the
questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from alignkit.errors import ConfigError
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
        """From a text, or from a mapping with the fields' names; ConfigError for other keys or a weight not above 0."""
        if isinstance(given, str | Question):
            question = cls(given) if isinstance(given, str) else given
        else:
            unknown = set(given) - set(_KEYS)
            if unknown or not (given.get("text") or given.get("negated")):
                raise ConfigError(
                    f"question {dict(given)}: it has {', '.join(_KEYS)}, and at least text or negated is not empty; "
                    f"{unknown or 'none'} is unknown"
                )
            question = cls(**{key: value for key, value in given.items() if key != "answer" or value})
        if not question.weight > 0:
            raise ConfigError(f"question '{question.text}': its weight is {question.weight}; give more than 0")
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
    """

    facts: Sequence[Fact] = ()
    questions: Sequence[Question] = ()
    covers: Sequence[Sequence[int]] = ()
    problems: Sequence[str] = ()


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

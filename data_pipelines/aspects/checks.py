"""What is wrong with a draft of questions, in sentences that a language model can act on.

The words that mark negation and choice are those of English; other languages need checks of their own.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from alignkit.aspects import FACTS, Draft, Fact, Question, Rules

_PLAIN = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")  # curly quotes and apostrophes
_QUOTED = re.compile(r"""\"[^"]*"|(?<!\w)'(?:[^']|(?<=\w)'(?=\w))*'(?!\w)""")
_FIRST = re.compile(r"(is|are|was|were|do|does|did|has|have|had|can|could|will|would|should)\b", re.IGNORECASE)
_NEGATION = re.compile(
    r"\b(no|not|never|none|nobody|nothing|nowhere|neither|nor|without|lacks?|lacking|absent|missing|\w+n't)\b"
)
_NO_CONTENT = re.compile(rf"or|{_NEGATION.pattern}")  # words of a fact that no question may have
_SUFFIX = re.compile(r"\?\s*(?:(?:please )?answer (?:with )?yes or no\.?)?$", re.IGNORECASE)
_ARTICLES = ("a", "an", "the")
_STOP = {
    "and",
    "with",
    "that",
    "this",
    "has",
    "have",
    "is",
    "are",
    "be",
    "of",
    "to",
    "it",
    "its",
    "1",
    "there",
    "exactly",
}
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_SAME = {word: str(number) for number, word in enumerate(_NUMBERS, 1)} | {"single": "1", "pair": "2", "couple": "2"}
_SAME |= {"men": "man", "women": "woman", "people": "person", "children": "child", "feet": "foot", "teeth": "tooth"}
_EXACT = ("attribute", "count", "relation")  # facts of which every word matters


def problems_of(draft: Draft, rules: Rules) -> list[str]:
    """Everything that is wrong with `draft`, a sentence each; empty for a good one.

    Checked: each question can be answered with yes or no, is phrased positively (its negated twin is the opposite),
    and is asked once; there are at most `rules.max_questions`; every aspect of `rules.aspects` has one; every fact is
    covered by questions that have its words in text or negated: of an attribute, a count or a relation all but
    negations and "or", one of an object or where only the opposite is asked ("extra" facts have no words of the
    prompt).
    """
    if draft.problems:
        return list(draft.problems)
    if not draft.questions:
        return ["there is no question; write at least one"]
    found = [*_count_problems(draft, rules), *_repeated(draft.questions)]
    for question in draft.questions:
        found += _question_problems(question, rules)
    return [*found, *_uncovered(draft)]


def _count_problems(draft: Draft, rules: Rules) -> Iterator[str]:
    questions = draft.questions
    if len(questions) > rules.max_questions:
        yield f"there are {len(questions)} questions; write at most {rules.max_questions}"
    present = {question.aspect for question in questions}
    for aspect in rules.aspects:
        if aspect not in present:
            yield f"no question has the aspect '{aspect}'; write at least one"
    names = Counter(question.name for question in questions)
    for name, count in names.items():
        if count > 1:
            yield f"{count} questions have the name '{name}'; give each its own"


def _question_problems(question: Question, rules: Rules) -> Iterator[str]:
    shown = question.text or question.negated
    if not question.name or question.name.startswith("aspect/"):
        yield f"'{shown}': its name is '{question.name}'; give it a short one"
    if question.aspect not in rules.aspects:
        yield f"'{shown}': its aspect is '{question.aspect}'; use {' or '.join(rules.aspects)}"
    if not (question.weight > 0 and math.isfinite(question.weight)):
        yield f"'{shown}': its weight is {question.weight}; give a number above 0"
    if not shown:
        yield "a question has no text"
    for text in filter(None, (question.text, question.negated)):
        yield from _form_problems(text)
    if negation := _NEGATION.search(_bare(question.text).casefold()):
        yield (
            f"'{question.text}': '{negation[0]}' is a negation; ask so that yes is the good answer, or leave text "
            "empty and ask the opposite in negated"
        )


def _form_problems(text: str) -> Iterator[str]:
    """Whether `text` is one question that yes or no answers."""
    body = _bare(text)
    if not body.endswith("?") or body.count("?") != 1:
        yield f"'{text}': it must be one question that ends with a question mark"
    if not _FIRST.match(body):
        yield f"'{text}': it must begin with a word such as Is, Are, Does or Has, so that yes or no answers it"
    if re.search(r"\bor\b", body.casefold()):
        yield f"'{text}': it offers a choice ('or'), which yes or no does not answer; ask about one of them"


def _bare(text: str) -> str:
    """A question without what it quotes, and without "Answer yes or no." after it."""
    return _SUFFIX.sub("?", _QUOTED.sub('""', text.translate(_PLAIN)).strip())


def _repeated(questions: Sequence[Question]) -> Iterator[str]:
    texts = [text for question in questions for text in (question.text, question.negated) if text]
    first: dict[str, str] = {}
    for text in texts:
        key = " ".join(map(_stem, _words(text)))
        if key in first:
            yield f"'{text}' repeats '{first[key]}'; ask it once"
        first.setdefault(key, text)


def _uncovered(draft: Draft) -> Iterator[str]:
    """Facts of an unknown kind, numbers of facts that are none, and facts without a question about them."""
    if len(draft.covers) != len(draft.questions):
        yield f"{len(draft.covers)} lists of facts for {len(draft.questions)} questions; give one for each"
        return
    for question, numbers in zip(draft.questions, draft.covers, strict=True):
        for number in numbers:
            if not 0 <= number < len(draft.facts):
                yield f"'{question.text or question.negated}' covers fact {number}; there are {len(draft.facts)} facts"
    for number, fact in enumerate(draft.facts):
        if fact.kind not in FACTS:
            yield f"fact '{fact.text}' is of the kind '{fact.kind}'; known kinds: {', '.join(FACTS)}"
        about = [q for q, numbers in zip(draft.questions, draft.covers, strict=True) if number in numbers]
        if not about:
            yield f"no question covers the {fact.kind} '{fact.text}'; ask about it"
            continue
        yield from _unlike(fact, about)


def _unlike(fact: Fact, about: Sequence[Question]) -> Iterator[str]:
    """Words of the fact that the questions about it lack."""
    stop = _STOP - {"1"} if fact.kind == "count" else _STOP
    words = [word for word in _words(fact.text) if word not in stop and not _NO_CONTENT.fullmatch(word)]
    own = {_stem(word): word for word in words}
    used = set(map(_stem, _words(" ".join(f"{question.text} {question.negated}" for question in about))))
    lacking = [word for stem, word in own.items() if stem not in used]
    if fact.kind in _EXACT and all(question.text for question in about):
        if lacking:
            yield f"no question that covers the {fact.kind} '{fact.text}' has its words {', '.join(lacking)}; use them"
    elif fact.kind != "extra" and own and len(lacking) == len(own):
        yield f"no question that covers the {fact.kind} '{fact.text}' uses any of its words; use the prompt's words"


def _words(text: str) -> list[str]:
    """Words in lower case without articles and quotes; numbers as digits."""
    words = re.findall(r"\w+(?:'\w+)*", text.translate(_PLAIN).casefold())
    return [_SAME.get(word, word) for word in words if word not in _ARTICLES]


def _stem(word: str) -> str:
    """The same for the forms "box" and "boxes", "run" and "running" of an English word; not always a word."""
    word = word.removesuffix("'s")
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if re.fullmatch(r"\w*[aeiouy]\w*ing", word):  # not "ring" or "string"
        word = re.sub(r"([^aeioulsz])\1$", r"\1", word.removesuffix("ing"))
    if len(word) > 3:
        word = word.removesuffix("e")
    return re.sub(r"v$", "f", re.sub(r"i$", "y", word))

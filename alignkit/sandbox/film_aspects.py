"""Questions about captions of clips, in the forms that the sandbox's VLM was trained on.

It was trained on other clips: 64 x 64 pixels, more shapes and colours, other captions (`clips.py`). There is no
question about speed, because it was not trained on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alignkit.aspects import Draft, Fact, Question, Rules
from alignkit.errors import DataError
from alignkit.records import Prompt
from alignkit.sandbox.captions import _plural
from alignkit.sandbox.film_captions import parse
from alignkit.sandbox.films import SHAPES, FilmSpec
from alignkit.sandbox.questions import COLOR, COUNTS, MOVING, NUMBER, OBJECT, WAY

_EXTRA = Fact("extra", "anything else")
Entry = tuple[Question, Fact]  # a question and the fact that it covers


class FilmWriter:
    """Writes questions of the aspect alignment about captions of clips; it needs no model. A `QuestionWriter`."""

    def write(self, prompts: Sequence[Prompt], rules: Rules, complaints: Sequence[Sequence[str]]) -> list[Draft]:  # noqa: ARG002
        """A draft a prompt; for a text outside the grammar one with a problem."""
        return [_draft(prompt.text) for prompt in prompts]


def _draft(caption: str) -> Draft:
    try:
        entries = [*_entries(parse(caption))]
    except DataError as error:
        return Draft(problems=[str(error)])
    facts = list(dict.fromkeys(fact for _, fact in entries))
    covers = [[facts.index(fact)] for _, fact in entries]
    return Draft(facts, [question for question, _ in entries], covers)


def _entries(spec: FilmSpec) -> Iterator[Entry]:
    """Each object with its colour and number, what moves and where, and absent shapes; of the last no is good."""
    for number, (shape, color) in enumerate(spec.kinds):
        described = Fact("object", f"{color} {shape}")
        yield _question(f"object_{shape}", OBJECT.format(described.text)), described
        yield _question(f"color_{shape}", COLOR.format(shape, color)), described
        yield _question(f"count_{shape}", NUMBER.format(_plural(shape), COUNTS[1])), _EXTRA
        if spec.direction is None or number:
            text, fact = MOVING.format(shape), Fact("attribute", f"{shape} still")
            yield _question(f"still_{shape}", negated=text), fact
        else:
            fact = Fact("attribute", f"{shape} moving {spec.direction}")
            yield _question(f"moves_{shape}", MOVING.format(shape)), fact
            yield _question(f"way_{shape}", WAY.format(shape, spec.direction)), fact
    absent = [shape for shape in SHAPES if shape not in dict(spec.kinds)]
    for shape in absent:
        yield _question(f"no_{shape}", negated=OBJECT.format(shape), weight=1 / len(absent)), _EXTRA


def _question(name: str, text: str = "", *, negated: str = "", weight: float = 1.0) -> Question:
    return Question(text, weight, negated, name, "alignment")

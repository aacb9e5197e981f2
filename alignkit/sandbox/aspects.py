"""Questions about sandbox captions, from the grammar and in the forms that the sandbox's VLM was trained on.

Gold rejects an image with one object too many, so each caption also gets questions about other objects: the number of
each shape, and the other shapes, which must be absent, or the number of all objects, which the VLM answers with its
corrections alone (`corrections.py`). There are no questions about the colour of all counted objects, because the VLM
was not trained on such questions. The background has none, because gold does not check it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from alignkit.aspects import Draft, Fact, Question, Rules
from alignkit.errors import ConfigError, DataError
from alignkit.records import Prompt
from alignkit.sandbox.captions import _plural, parse
from alignkit.sandbox.questions import ALL, COLOR, COUNTS, NUMBER, OBJECT, RELATION, SHOWS
from alignkit.sandbox.scenes import PALETTE, SHAPES, Spec

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_EXTRA = Fact("extra", "anything else")
Entry = tuple[Question, list[Fact]]  # a question and the facts that it covers


class GrammarWriter:
    """Writes questions of the aspect alignment; it needs no model. A `QuestionWriter`.

    whole: adds VQAScore's question about the whole caption.
    twins: adds the opposite question where there is one: the other side, one more object, the colour of the other
        object.
    number_of_all: asks for the number of all objects in the place of the absent shapes.
    extra_weight: the weight that all questions about absent shapes have together, that of the number of all objects,
        and that of all about absent colours; any other question has 1.
    """

    def __init__(
        self, *, whole: bool = False, twins: bool = False, number_of_all: bool = False, extra_weight: float = 1.0
    ) -> None:
        if not extra_weight > 0:
            raise ConfigError(f"extra_weight is {extra_weight}; give more than 0")
        self.whole, self.twins, self.number_of_all, self.extra_weight = whole, twins, number_of_all, extra_weight

    def write(self, prompts: Sequence[Prompt], rules: Rules, complaints: Sequence[Sequence[str]]) -> list[Draft]:  # noqa: ARG002
        """A draft a prompt; for a text outside the grammar one with a problem."""
        return [self._draft(prompt.text) for prompt in prompts]

    def _draft(self, caption: str) -> Draft:
        try:
            spec = parse(caption)
        except DataError as error:
            advice = "for free text set `writer` to 'served' (a language model) or your own 'package.module:attribute'"
            return Draft(problems=[f"{error}; {advice}"])
        entries = [*self._about_objects(spec), *self._about_relation(spec), *self._about_others(spec)]
        facts = list(dict.fromkeys(fact for _, covered in entries for fact in covered))
        if self.whole:
            entries.append((_question("whole", SHOWS.format(caption)), facts))
        covers = [list(map(facts.index, covered)) for _, covered in entries]
        return Draft(facts, [question for question, _ in entries], covers)

    def _about_objects(self, spec: Spec) -> Iterator[Entry]:
        """Each object, its colour and the number of its shape."""
        kinds = list(dict.fromkeys(spec.kinds))
        is_count = len(kinds) < len(spec.kinds)
        for shape, color in kinds:
            described = f"{color} {shape}" if color else shape
            facts = [Fact("object", shape), *([Fact("attribute", described)] if color else [])]
            other_colors = [other for _, other in kinds if color and other != color]
            twin = OBJECT.format(f"{other_colors[0]} {shape}") if self.twins and other_colors else ""
            yield _question(f"object_{shape}", OBJECT.format(described), twin), facts
            if color and not is_count:  # "the circle" is one circle
                yield _question(f"color_{shape}", COLOR.format(shape, color)), facts[1:]
            number = spec.kinds.count((shape, color))
            more = NUMBER.format(_plural(shape), COUNTS[number + 1]) if self.twins else ""
            covered = Fact("count", f"{COUNTS[number]} {_plural(shape)}") if is_count else _EXTRA
            yield _question(f"count_{shape}", NUMBER.format(_plural(shape), COUNTS[number]), more), [covered]

    def _about_relation(self, spec: Spec) -> Iterator[Entry]:
        if spec.relation:
            (first, _), (second, _) = spec.kinds
            text = RELATION.format(first, spec.relation, second)
            opposite = RELATION.format(first, _OPPOSITE[spec.relation], second) if self.twins else ""
            fact = Fact("relation", f"{first} {spec.relation} {second}")
            yield _question("relation", text, opposite), [fact]

    def _about_others(self, spec: Spec) -> Iterator[Entry]:
        """About objects that the caption does not name, and about other colours of counted objects."""
        if self.number_of_all:
            text = NUMBER.format(ALL, COUNTS[len(spec.kinds)])
            yield Question(text, self.extra_weight, name="all", aspect="alignment"), [_EXTRA]
        else:
            named = {shape for shape, _ in spec.kinds}
            yield from self._absent([shape for shape in SHAPES if shape not in named], _EXTRA)
        (shape, color), *more = spec.kinds
        if color and (shape, color) in more:
            others = [f"{other} {shape}" for other in PALETTE if other != color]
            yield from self._absent(others, Fact("attribute", f"{color} {shape}"))

    def _absent(self, things: Sequence[str], fact: Fact) -> Iterator[Entry]:
        for thing in things:
            text, name = OBJECT.format(thing), f"no_{thing.replace(' ', '_')}"
            weight = self.extra_weight / len(things)
            yield Question(negated=text, weight=weight, name=name, aspect="alignment"), [fact]


def _question(name: str, text: str, negated: str = "") -> Question:
    return Question(text, 1.0, negated, name, "alignment")

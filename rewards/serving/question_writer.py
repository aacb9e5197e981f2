"""A served language model that writes yes/no questions about prompts (`alignkit.aspects.QuestionWriter`).

The words of the request are a text file that users edit; a JSON schema fixes the form of the reply, which vLLM and
OpenAI-compatible servers enforce (`response_format`). The types of a reply are checked here, the content of
its questions by `data_pipelines.aspects`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.aspects import FACTS, Draft, Fact, Question, Rules
from alignkit.errors import ConfigError
from alignkit.records import Prompt
from alignkit.resolve import construct
from rewards.serving.bounded_json import parse_json
from rewards.serving.chat_client import ChatClient, Report
from rewards.serving.messages import text_part, user
from rewards.serving.reply_cache import Reply

_PLACES = ("{prompt}", "{aspects}", "{max_questions}")
_FAILED = "the server gave no reply"
_REFUSED = "the server refuses this prompt for good, because of a content filter or its length; see the log"
_ANSWERS = """

Give every question an "answer" too: what someone who looks at a good image or video would reply to "text", in one
sentence with the details that can be seen."""
_REJECTED = "Your last answer for this prompt was rejected:\n{problems}\nWrite a better one."


class ServedWriter:
    """Facts and questions of a served language model.

    template: a UTF-8 text file, the request; `{prompt}`, `{aspects}` and `{max_questions}` in it are replaced, the
        first of them must be there. configs/aspects/questions.txt is shipped; copy it and change the copy.
    max_tokens: of one reply; a reply that is cut off counts as none.
    answers: also asks for the wished answer to each question, in words, as the reward `explanation` reads it.
    client: options of `ChatClient` (cache, concurrency, timeout, api_key_env ...); ConfigError for unknown ones.
    """

    get = (
        "`vllm serve FOLDER --served-model-name NAME` gives base_url and model; template: configs/aspects/questions.txt"
    )

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        template: str,
        max_tokens: int = 2048,
        answers: bool = False,
        **client: Any,
    ) -> None:
        self._template = read_template(Path(template)) + (_ANSWERS if answers else "")
        self._max_tokens, self._answers = max_tokens, answers
        options = {"base_url": base_url, "model": model, **client}
        self.client: ChatClient = construct(ChatClient, options, what="question writer")

    def write(self, prompts: Sequence[Prompt], rules: Rules, complaints: Sequence[Sequence[str]]) -> list[Draft]:
        """A draft a prompt; one with a problem for a reply that failed or is not of the schema.

        Complaints about a reply are added to the request, so it differs from the one before and from its cached reply.
        Raises ServerError if the server cannot be used (`ChatClient.ask`).
        """
        pairs = zip(prompts, complaints, strict=True)
        requests = [self._request(prompt, rules, problems) for prompt, problems in pairs]
        refused: set[int] = set()
        replies = self.client.ask(requests, label="aspects", refused=refused)
        return [
            Draft(problems=[_REFUSED]) if place in refused else _draft(reply) for place, reply in enumerate(replies)
        ]

    def report(self) -> Report:
        """Cost so far."""
        return self.client.report()

    def _request(self, prompt: Prompt, rules: Rules, complaints: Sequence[str]) -> dict[str, Any]:
        text = self._template.replace("{aspects}", ", ".join(rules.aspects))
        text = text.replace("{max_questions}", str(rules.max_questions)).replace("{prompt}", prompt.text)
        rejected = [problem for problem in complaints if problem not in (_FAILED, _REFUSED)]  # the model said nothing
        if rejected:
            listed = "\n".join(f"- {problem}" for problem in rejected)
            text = f"{text}\n\n{_REJECTED.format(problems=listed)}"
        schema = {"name": "questions", "strict": True, "schema": reply_schema(rules, answers=self._answers)}
        form = {"type": "json_schema", "json_schema": schema}
        return {
            "messages": user([text_part(text)]),
            "temperature": 0,
            "max_tokens": self._max_tokens,
            "response_format": form,
        }


def read_template(path: Path) -> str:
    """The text of a template. Raises ConfigError for a file that cannot be read, or lacks `{prompt}`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"template '{path}' cannot be read ({error}); give a UTF-8 text file, such as configs/aspects/questions.txt"
        ) from error
    if _PLACES[0] not in text:
        raise ConfigError(f"template '{path}' lacks {_PLACES[0]}; known places: {', '.join(_PLACES)}")
    return text


def reply_schema(rules: Rules, *, answers: bool = False) -> dict[str, Any]:
    """The JSON schema of a reply: facts of the prompt, and questions with the numbers of the facts that they cover."""
    text, number = {"type": "string"}, {"type": "integer", "minimum": 0}
    fact = {"kind": {"type": "string", "enum": list(FACTS)}, "text": text}
    question = {
        "name": text,
        "aspect": {"type": "string", "enum": list(rules.aspects)},
        "text": text,
        "negated": text,
        "facts": {"type": "array", "items": number},
        **({"answer": text} if answers else {}),
    }
    questions = {"type": "array", "items": _closed(question), "minItems": 1, "maxItems": rules.max_questions}
    return _closed({"facts": {"type": "array", "items": _closed(fact)}, "questions": questions})


def _closed(properties: Mapping[str, Any]) -> dict[str, Any]:
    """An object with these members, all of them and no other."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _draft(reply: Reply | None) -> Draft:
    if reply is None:
        return Draft(problems=[_FAILED], is_failed=True)
    if reply.is_cut_off:
        return Draft(problems=["the reply was cut off at max_tokens; write fewer or shorter questions"])
    try:
        value = parse_json(reply.text)
        facts = [
            Fact(_member(entry, "kind", str), _member(entry, "text", str)) for entry in _member(value, "facts", list)
        ]
        entries = [_question(entry) for entry in _member(value, "questions", list)]
    except ValueError as error:
        return Draft(problems=[f"the reply is not of the schema: {error}"])
    questions, covers = zip(*entries, strict=True) if entries else ((), ())
    return Draft(facts, questions, covers)


def _question(entry: Any) -> tuple[Question, list[int]]:
    """A question and the numbers of its facts."""
    names = (
        "name",
        "aspect",
        "text",
        "negated",
        *(["answer"] if isinstance(entry, dict) and "answer" in entry else []),
    )
    named = {name: _member(entry, name, str) for name in names}
    numbers = _member(entry, "facts", list)
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"'facts' of a question is {numbers}; give whole numbers")
    return Question(**named), numbers


def _member(record: Any, name: str, kind: type) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if isinstance(value, kind):
        return value
    raise ValueError(f"'{name}' is missing or no {kind.__name__}")

"""The served writer against a real server on loopback: its request, its reply's form, another try, the cache."""

from __future__ import annotations

import json

import pytest
from chat_server import ChatServer, failed, said

from alignkit.aspects import FACTS, Draft, Fact, Question, Rules
from alignkit.errors import ConfigError, ServerError
from alignkit.records import Prompt
from alignkit.shipped import configs
from data_pipelines.aspects import AspectsConfig, checked_drafts
from rewards.serving.question_writer import ServedWriter, reply_schema

RULES = Rules(("alignment", "quality"), 4)
TEMPLATE = configs() / "aspects" / "questions.txt"
REPLY = {
    "facts": [{"kind": "object", "text": "two {aspects} dogs"}],
    "questions": [
        {"name": "dogs", "aspect": "alignment", "text": "Are there dogs?", "negated": "", "facts": [0]},
        {"name": "sharp", "aspect": "quality", "text": "Is it sharp?", "negated": "Is it blurred?", "facts": []},
    ],
}
DRAFT = Draft(
    (Fact("object", "two {aspects} dogs"),),
    (
        Question("Are there dogs?", name="dogs", aspect="alignment"),
        Question("Is it sharp?", 1.0, "Is it blurred?", "sharp", "quality"),
    ),
    ((0,), ()),
)
PROMPT = Prompt.from_text("two {aspects} dogs")


def writer(server, **options):
    return ServedWriter(server.url, "tiny", template=str(TEMPLATE), **{"backoff": 0.01, "retries": 0} | options)


def plain(draft):
    return Draft(*(tuple(part) for part in (draft.facts, draft.questions, map(tuple, draft.covers), draft.problems)))


def test_the_request_has_the_prompt_the_rules_and_the_schema():
    with ChatServer(lambda *_: said(json.dumps(REPLY))) as server:
        (draft,) = writer(server).write([PROMPT], RULES, [()])
    assert plain(draft) == DRAFT
    (request,) = server.requests
    text = request["messages"][0]["content"][0]["text"]
    assert text.rstrip().endswith("Prompt: two {aspects} dogs")  # what a prompt holds is not replaced
    assert "Then write at most 4 questions. The allowed aspects are: alignment, quality." in text
    assert (request["temperature"], request["response_format"]["type"]) == (0, "json_schema")
    schema = request["response_format"]["json_schema"]
    assert (schema["strict"], schema["schema"]) == (True, reply_schema(RULES))
    question = schema["schema"]["properties"]["questions"]["items"]
    assert question["properties"]["aspect"]["enum"] == ["alignment", "quality"]
    assert question["required"] == ["name", "aspect", "text", "negated", "facts"]
    assert schema["schema"]["properties"]["facts"]["items"]["properties"]["kind"]["enum"] == list(FACTS)


def test_answers_are_asked_for_where_they_are_wished():
    entries = [{**entry, "answer": "Two dogs."} for entry in REPLY["questions"]]
    with ChatServer(lambda *_: said(json.dumps(REPLY | {"questions": entries}))) as server:
        (draft,) = writer(server, answers=True).write([PROMPT], RULES, [()])
    assert [question.answer for question in draft.questions] == ["Two dogs.", "Two dogs."]
    (request,) = server.requests
    assert 'Give every question an "answer" too' in request["messages"][0]["content"][0]["text"]
    question = request["response_format"]["json_schema"]["schema"]["properties"]["questions"]["items"]
    assert question["required"][-1] == "answer"


def changed(**changes):
    return said(json.dumps(REPLY | changes))


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (failed(500), "the server gave no reply"),
        (failed(400), "the server refuses this prompt for good"),
        (said("", finish="content_filter"), "the server refuses this prompt for good"),
        (said("{", finish="length"), "cut off at max_tokens"),
        (said("Here are some questions"), "not of the schema"),
        (said('["a"]'), "'facts' is missing or no list"),
        (changed(facts=[{"kind": 1, "text": "dogs"}]), "'kind' is missing or no str"),
        (changed(questions=[{**REPLY["questions"][0], "facts": ["0"]}]), "give whole numbers"),
        (changed(questions=["Are there dogs?"]), "'name' is missing or no str"),
        (changed(questions=[]), None),
    ],
)
def test_a_reply_that_is_no_draft_is_a_problem(answer, problem):
    with ChatServer(lambda *_: answer) as server:
        (draft,) = writer(server).write([PROMPT], RULES, [()])
    assert draft.questions == () if problem is None else problem in draft.problems[0]
    assert draft.is_failed == (problem == "the server gave no reply")


def test_a_rejected_draft_is_asked_for_again_and_both_replies_are_cached(tmp_path):
    """The second request says why; a repetition sends nothing."""
    bad = REPLY | {"questions": [{**REPLY["questions"][0], "text": "How many dogs are there?"}, REPLY["questions"][1]]}

    def script(request, _):
        told = "was rejected" in request["messages"][0]["content"][0]["text"]
        return said(json.dumps(REPLY if told else bad))

    config = AspectsConfig(aspects=RULES.aspects, max_questions=4)
    with ChatServer(script) as server:
        for _ in range(2):
            (result,) = checked_drafts([PROMPT], config, writer(server, cache=str(tmp_path), identity="w"))
            assert (plain(result.draft), result.problems, result.attempts) == (DRAFT, [], 2)
    assert len(server.requests) == 2
    told = server.requests[1]["messages"][0]["content"][0]["text"]
    assert "- 'How many dogs are there?': it must begin with a word such as Is" in told


@pytest.mark.parametrize("status", [503, 400])
def test_a_request_that_failed_is_sent_again_as_it_was(status):
    """The model said nothing that could be rejected. A failure that may pass ends the stage; a refusal does not."""
    with ChatServer(lambda *_: failed(status)) as server:
        if status == 503:
            with pytest.raises(ServerError, match="1 of 1 prompts got no questions in 2 attempts"):
                checked_drafts([PROMPT], AspectsConfig(attempts=2), writer(server))
        else:
            (result,) = checked_drafts([PROMPT], AspectsConfig(attempts=2), writer(server))
            assert "refuses this prompt" in result.problems[0]
    assert len(server.requests) == 2
    assert server.requests[0] == server.requests[1]


def test_what_cannot_work_is_said(tmp_path):
    lacking = tmp_path / "lacking.txt"
    lacking.write_text("Write questions.", encoding="utf-8")
    for template, message in ((lacking, r"lacks \{prompt\}"), (tmp_path / "absent.txt", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            ServedWriter("http://127.0.0.1:9/v1", "tiny", template=str(template))
    with pytest.raises(ConfigError, match="question writer has no option 'cach'"):
        ServedWriter("http://127.0.0.1:9/v1", "tiny", template=str(TEMPLATE), cach="x")
    with ChatServer(lambda *_: failed(401)) as server, pytest.raises(ServerError, match="vllm serve"):
        writer(server).write([PROMPT], RULES, [()])

"""Nothing in a reply or in a cached file is trusted: wrong types, huge numbers, deep nesting, replies cut short."""

from __future__ import annotations

import hashlib
import json
import os
import random

import pytest
from chat_server import Answer, ChatServer, said

from rewards.serving.bounded_json import parse_json
from rewards.serving.chat_client import ChatClient
from rewards.serving.reply_cache import Reply, ReplyCache

GOOD = json.loads(said("yes", {"yes": -0.5}).body)
QUESTION = {"messages": [{"role": "user", "content": "is it red?"}], "logprobs": True}


def client(url, **options):
    return ChatClient(url, "tiny", **{"timeout": 60.0, "backoff": 0.0, "rng": random.Random(0)} | options)


def changed(*path, value):
    """A good reply with another value at `path`, as bytes."""
    reply = json.loads(json.dumps(GOOD))
    place = reply
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(reply).encode()


FIRST = ("choices", 0, "logprobs", "content", 0, "top_logprobs")
VALUE = (*FIRST, 0, "logprob")
LOGPROB = b'"logprob": -0.5'
BAD = {
    "arrays in arrays": b"[" * 200_000,
    "arrays that are closed": b"[" * 200_000 + b"]" * 200_000,
    "objects in objects": b'{"a":' * 200_000,
    "many arrays": b"[" + b"[]," * 200_000 + b"[]]",
    "a logprob of 400 digits": changed(*VALUE, value=-(10**400)),
    "a logprob beyond floats": said("yes", {"yes": -0.5}).body.replace(LOGPROB, b'"logprob": -1e999'),
    "a logprob of minus infinity": changed(*VALUE, value=float("-inf")),
    "a logprob of NaN": changed(*VALUE, value=float("nan")),
    "a positive logprob": changed(*VALUE, value=5.0),
    "a logprob as text": changed(*VALUE, value="-0.5"),
    "a logprob as a truth value": changed(*VALUE, value=False),
    "a token as a number": changed(*FIRST, 0, "token", value=7),
    "a token without end": changed(*FIRST, 0, "token", value="x" * 5000),
    "no alternatives": changed(*FIRST, value=None),
    "an alternative as a number": changed(*FIRST, value=[3]),
    "alternatives without end": changed(*FIRST, value=[{"token": "a", "logprob": -1.0}] * 1000),
    "tokens as an object": changed("choices", 0, "logprobs", "content", value={"0": 1}),
    "a token's record as a number": changed("choices", 0, "logprobs", "content", value=[1]),
    "10^400 tokens": changed("usage", "prompt_tokens", value=10**400),
    "10^12 tokens": changed("usage", "completion_tokens", value=10**12),
    "negative tokens": changed("usage", "prompt_tokens", value=-1),
    "tokens as text": changed("usage", "prompt_tokens", value="12"),
    "tokens as a truth value": changed("usage", "prompt_tokens", value=True),
    "usage as a list": changed("usage", value=[1]),
    "choices as an object": changed("choices", value={"0": {}}),
    "a choice as a number": changed("choices", value=[1]),
    "a message as a list": changed("choices", 0, "message", value=["yes"]),
    "a text as parts": changed("choices", 0, "message", "content", value=[{"type": "text", "text": "yes"}]),
    "a long text": changed("choices", 0, "message", "content", value="x" * 300_000),
    "a key twice": said("yes", {"yes": -0.5}).body.replace(b'"content": "yes"', b'"content": "no", "content": "yes"'),
    "no reason of its end": changed("choices", 0, "finish_reason", value=None),
    "a reason that is a number": changed("choices", 0, "finish_reason", value=3),
    "abort": changed("choices", 0, "finish_reason", value="abort"),
    "error": changed("choices", 0, "finish_reason", value="error"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_replies_are_retried_and_not_cached(kind, tmp_path, caplog):
    good = said("yes", {"yes": -0.5})
    with ChatServer(lambda _, number: Answer(BAD[kind]) if number < 4 else good) as server:
        options = {"retries": 1, "cache": tmp_path, "identity": "revision 1"}
        assert client(server.url, **options).ask([QUESTION]) == [None]
        assert not list(tmp_path.rglob("*.json"))
        asked = client(server.url, **options | {"retries": 2})
        assert asked.ask([QUESTION]) == [Reply("yes", (("yes", -0.5),), (100, 2))]
    report = asked.report()
    assert (report.attempts, report.retries, report.failures) == (3, 2, 0)
    assert "no chat completion" in caplog.text
    assert len(caplog.text) < 1500


def test_what_servers_really_send_is_read():
    """Absent usage, null usage, brackets and quotes in texts, a probability rounded above one, 64-bit integers."""
    text = 'a "[[[[" \\ [' + "[" * 500
    for change in ({"usage": None}, {"usage": {}}, {"usage": {"prompt_tokens": None}}, {"created": 2**63, "x": [[[]]]}):
        body = json.loads(changed("choices", 0, "message", "content", value=text)) | change
        tokens = (100, 2) if "usage" not in change else (0, 0)
        assert Reply.from_body(json.dumps(body)) == Reply(text, (("yes", -0.5),), tokens)
    assert Reply.from_body(changed(*VALUE, value=1e-6).decode()).first == (("yes", 1e-6),)


def test_json_of_unfinished_texts_is_an_error():
    for text in ('"', '"\\', '{"a": "b', "", "[1", "\ufeff{}", "1e5000", "-Infinity"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)


# --- how a reply ended ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [False, True])
def test_replies_cut_off_are_cached_where_that_is_their_normal_end(allowed, tmp_path):
    with ChatServer(lambda *_: said("yes", {"yes": -0.5}, finish="length")) as server:
        options = {"cache": tmp_path, "identity": "revision 1"}
        for _ in range(2):
            (reply,) = client(server.url, **options).ask([QUESTION], allow_cut_off=allowed)
            assert reply == Reply("yes", (("yes", -0.5),), (100, 2), is_cut_off=True)
        assert len(server.requests) == (1 if allowed else 2)
        assert len(list(tmp_path.rglob("*.json"))) == (1 if allowed else 0)
        client(server.url, **options).ask([QUESTION])  # a cut-off reply in the cache does not serve this use
        assert len(server.requests) == (2 if allowed else 3)


@pytest.mark.parametrize("finish", ["content_filter", "tool_calls", "?" * 5000])
def test_other_ends_fail_at_once(finish, tmp_path, caplog):
    with ChatServer(lambda *_: said("yes", {"yes": -0.5}, finish=finish)) as server:
        assert client(server.url, cache=tmp_path).ask([QUESTION]) == [None]
    assert len(server.requests) == 1
    assert f"finish_reason {finish[:50]}" in caplog.text
    assert len(caplog.text) < 1000
    assert not list(tmp_path.rglob("*.json"))


# --- what is read back ----------------------------------------------------------------------------------------------


def stored(key, record):
    """A file as the cache writes it, with a valid checksum."""
    canonical = json.dumps([key, record], sort_keys=True, separators=(",", ":"))
    return json.dumps({"reply": record, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}).encode()


KEY = "a" * 64
RECORD = {"text": "yes", "first": [["yes", -0.5]], "tokens": [100, 2], "is_cut_off": False}
FOREIGN = {
    "no record": [],
    "a field too many": RECORD | {"more": 1},
    "a field too few": {name: value for name, value in RECORD.items() if name != "is_cut_off"},
    "a text that is a number": RECORD | {"text": 1},
    "a long text": RECORD | {"text": "x" * 300_000},
    "first as text": RECORD | {"first": "ab"},
    "first of triples": RECORD | {"first": [["yes", -0.5, 1]]},
    "a positive logprob": RECORD | {"first": [["yes", 3.0]]},
    "one count of tokens": RECORD | {"tokens": [1]},
    "negative tokens": RECORD | {"tokens": [-1, 2]},
    "an end that is a number": RECORD | {"is_cut_off": 0},
}


def test_a_file_as_the_cache_writes_it_is_read(tmp_path):
    cache = ReplyCache(tmp_path)
    cache.put(KEY, Reply("yes", (("yes", -0.5),), (100, 2)))
    (path,) = tmp_path.rglob("*.json")
    assert path.read_bytes() == stored(KEY, RECORD)
    assert cache.get(KEY) == Reply("yes", (("yes", -0.5),), (100, 2))
    assert cache.damaged == 0


@pytest.mark.parametrize("kind", [*FOREIGN, "of another key", "too large", "deep", "a pipe"])
def test_foreign_files_are_skipped_and_counted(kind, tmp_path, caplog):
    path = tmp_path / KEY[:2] / f"{KEY}.json"
    path.parent.mkdir()
    if kind == "a pipe":  # opening it would wait for a writer for ever
        os.mkfifo(path)
    elif kind in FOREIGN:
        path.write_bytes(stored(KEY, FOREIGN[kind]))
    else:
        large = stored(KEY, RECORD) + b" " * (5 << 20)
        path.write_bytes({"of another key": stored("b" * 64, RECORD), "too large": large, "deep": b"[" * 10**5}[kind])
    cache = ReplyCache(tmp_path)
    assert [cache.get(KEY) for _ in range(3)] == [None] * 3
    assert cache.damaged == 3
    assert caplog.text.count(str(path)) == 1  # the log names the first only
    cache.put(KEY, Reply("no"))
    assert cache.get(KEY) == Reply("no")


def test_the_largest_reply_can_be_read_back(tmp_path):
    """Each character is escaped as six bytes."""
    reply = Reply("\u20ac" * 2**18, tuple(("\u20ac" * 1024, -float(n)) for n in range(128)), (10**9, 10**9))
    cache = ReplyCache(tmp_path)
    cache.put(KEY, reply)
    assert cache.get(KEY) == reply


def test_the_report_counts_skipped_files(tmp_path):
    with ChatServer(lambda *_: said("yes", {"yes": -0.5})) as server:
        client(server.url, cache=tmp_path, identity="x").ask([QUESTION])
        (path,) = tmp_path.rglob("*.json")
        path.write_bytes(b"{}")
        asked = client(server.url, cache=tmp_path, identity="x")
        asked.ask([QUESTION])
    assert asked.report().damaged_cache_files == 1
    assert "1 damaged cache files" in str(asked.report())

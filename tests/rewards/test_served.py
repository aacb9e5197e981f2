"""The client against a real server on loopback that fails in every way: what passes is tried again, nothing twice."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import random
import socket
import threading
import time
from email.utils import formatdate

import pytest
from chat_server import Answer, ChatServer, failed, said

from alignkit.errors import ConfigError, ServerError, StorageError
from rewards.serving.chat_client import ChatClient
from rewards.serving.http_exchange import requested_wait
from rewards.serving.reply_cache import Reply, ReplyCache, content_key

FAIL_SAFE = 60.0  # seconds; no test waits so long unless something is broken


def client(url, **options):
    return ChatClient(url, "tiny", **{"timeout": FAIL_SAFE, "backoff": 0.01, "rng": random.Random(0)} | options)


def question(text="is it red?"):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0}


def in_turn(*answers):
    """The n-th request gets the n-th answer, later ones the last."""
    return lambda request, number: answers[min(number, len(answers) - 1)]


def test_a_request_carries_model_and_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with ChatServer(in_turn(said("yes"))) as server:
        (reply,) = client(server.url.removesuffix("/v1"), api_key_env="MY_KEY", extra={"top_k": 1}).ask([question()])
    assert reply == Reply("yes", (), (100, 2))
    assert server.requests == [{"model": "tiny", **question(), "top_k": 1}]
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert server.headers[0]["path"] == "/v1/chat/completions"


PASSING = {
    "500": failed(500, "out of memory"),
    "503 while it loads": failed(503),
    "429": failed(429),
    "cut off": Answer(said("yes").body, keep=40),
    "cut off before a byte": Answer(said("yes").body, keep=0),
    "whole, but half a JSON": Answer(said("yes").body[:40]),
    "a page": Answer(b"<html>hello</html>"),
    "a list": Answer(b"[1, 2]"),
    "no choices": Answer(b'{"choices": []}'),
    "a choice without text": Answer(b'{"choices": [{"message": {"content": null}}]}'),
    "bytes that are no text": Answer(bytes(range(128, 256))),
    "a NaN": Answer(said("yes", {"yes": float("nan")}).body),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_tried_again(fault):
    with ChatServer(in_turn(PASSING[fault], PASSING[fault], said("yes"))) as server:
        asked = client(server.url)
        assert [reply.text for reply in asked.ask([question()])] == ["yes"]
    report = asked.report()
    assert (report.attempts, report.retries, report.failures) == (3, 2, 0)


@pytest.mark.parametrize("fault", PASSING)
def test_what_never_passes_is_an_error_that_helps(fault):
    """One request alone may be at fault; ten in a row, of several calls, are the server's."""
    with ChatServer(in_turn(PASSING[fault])) as server:
        asked = client(server.url, retries=1)
        assert [asked.ask([question(str(n))]) for n in range(9)] == [[None]] * 9
        with pytest.raises(ServerError) as raised:
            asked.ask([question()])
    assert len(server.requests) == 20
    assert all(part in str(raised.value) for part in (server.url, "'tiny'", "vllm serve", "give a cache folder"))


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_refusals_are_not_repeated(status):
    message = "the model `tiny` does not exist"
    with (
        ChatServer(in_turn(failed(status, message))) as server,
        pytest.raises(ServerError, match=f"{status}: {message}"),
    ):
        client(server.url).ask([question()])
    assert len(server.requests) == 1


def test_an_answer_between_failures_keeps_the_run():
    """A row that is asked alone, such as one of a resumed run, is given up and not the run."""
    with ChatServer(lambda _, number: said("yes") if number == 9 else failed(400, "too long")) as server:
        asked = client(server.url)
        replies = [asked.ask([question(str(n))])[0] for n in range(18)]
        assert [n for n, reply in enumerate(replies) if reply] == [9]
        asked.ask([question("18")])
        with pytest.raises(ServerError, match="too long"):
            asked.ask([question("19")])


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    asked = client(f"http://127.0.0.1:{port}", retries=2, concurrency=1)
    with pytest.raises(ServerError, match=f"127.0.0.1:{port}/v1 .*no server answers there .*refused"):
        asked.ask([question(str(n)) for n in range(50)])
    report = asked.report()
    assert (report.attempts, report.failures) == (3, 1)  # requests that wait for a thread are not sent


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BLOCK = b"x" * 60_000


def endless(first, block=BLOCK, pause=0.0):
    """`first`, then `block` for as long as the client reads, or until the fail-safe."""
    yield first
    for _ in range(int(FAIL_SAFE / pause) if pause else 10**6):
        time.sleep(pause)
        yield block


SLOW = {
    "silent": None,
    "a byte of the headers at a time": lambda: endless(HEAD + b"X: ", b"x", 0.02),
    "a byte of the body at a time": lambda: endless(HEAD + b"Content-Length: 100000\r\n\r\n", b" ", 0.02),
    "a byte of a body without length": lambda: endless(HEAD + b"\r\n" + said("yes").body, b" ", 0.02),
}


@pytest.mark.parametrize("kind", SLOW)
def test_the_time_limit_is_for_the_whole_answer(kind, caplog):
    """The server sends for a minute, so that the client returns at all is due to its limit."""

    def script(*_):
        if SLOW[kind] is None:
            server.stopped.wait(FAIL_SAFE)
        return Answer(raw=SLOW[kind]() if SLOW[kind] else iter([b""]))

    with ChatServer(script) as server:
        start = time.monotonic()
        assert client(server.url, timeout=0.2, retries=0).ask([question()]) == [None]
        assert time.monotonic() - start >= 0.2
    assert "no answer within 0.2 s" in caplog.text


def test_the_time_limit_holds_for_a_tls_handshake(caplog):
    def serve(listener):
        sock, _ = listener.accept()
        with sock, contextlib.suppress(OSError):
            for block in endless(b"\x16\x03\x03\x40\x00", b"\0", 0.02):  # a record of 16 KiB
                sock.sendall(block)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        assert client(url, timeout=0.2, retries=0).ask([question()]) == [None]
        thread.join()
    assert "no answer within 0.2 s" in caplog.text


def test_an_answer_that_is_late_is_requested_again(monkeypatch):
    """The first timer acts when the server has the request, later ones never."""
    arrived = threading.Event()

    class TimerOfFirstRequest:
        def __init__(self, seconds, action, arguments):
            assert seconds == FAIL_SAFE
            self._thread = threading.Thread(target=lambda: arrived.wait(FAIL_SAFE) and action(*arguments), daemon=True)

        def start(self):
            if not arrived.is_set():
                self._thread.start()

        def cancel(self):
            pass

    def script(_, number):
        if number == 0:
            arrived.set()
            server.stopped.wait(FAIL_SAFE)
        return said("yes")

    monkeypatch.setattr("rewards.serving.http_exchange.Timer", TimerOfFirstRequest)
    with ChatServer(script) as server:
        asked = client(server.url)
        assert [reply.text for reply in asked.ask([question()])] == ["yes"]
    report = asked.report()
    assert (report.attempts, report.retries, report.failures, len(server.requests)) == (2, 1, 0, 2)


ENDLESS = {
    "header lines": lambda: endless(HEAD, b"X: " + BLOCK + b"\r\n"),
    "one header line": lambda: endless(HEAD + b"X: "),
    "a status line": lambda: endless(b"HTTP/1.1 200 "),
    "interim answers": lambda: endless(b"", b"HTTP/1.1 100 Continue\r\nX: " + BLOCK + b"\r\n\r\n"),
    "a body": lambda: endless(HEAD + b"\r\n"),
    "a body with a length": lambda: endless(HEAD + b"Content-Length: 2400000000\r\n\r\n"),
    "a body with an impossible length": lambda: endless(HEAD + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n"),
    "chunks": lambda: endless(CHUNKED, b"ea60\r\n" + BLOCK + b"\r\n"),
    "a chunk": lambda: endless(CHUNKED + b"f" * 400 + b"\r\n"),
    "chunk extensions": lambda: endless(CHUNKED, b"1;" + BLOCK + b"\r\nx\r\n"),
    "trailers": lambda: endless(CHUNKED + b"0\r\n", b"X: " + BLOCK + b"\r\n"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_answers_without_end_are_not_read_to_the_end(kind, caplog):
    """4 MiB are read; buffers of the system may hold some more of what was sent."""
    with ChatServer(lambda *_: Answer(raw=ENDLESS[kind]())) as server:
        assert client(server.url, retries=0).ask([question()]) == [None]
    assert server.sent < 40 << 20
    assert "the answer could not be read" in caplog.text


@pytest.mark.parametrize("status", [400, 401])
def test_a_long_error_is_read_and_quoted_in_part(status, caplog):
    head = f"HTTP/1.1 {status} no\r\n\r\n".encode()
    with ChatServer(lambda *_: Answer(raw=endless(head, b"a\x1b[31m\r\n" * 9000))) as server:
        try:
            assert client(server.url).ask([question()]) == [None]
            text = caplog.text
        except ServerError as error:
            text = str(error)
    assert len(server.requests) == 1
    assert f"it answered {status}: a [31m  a [31m" in text
    assert "\x1b" not in text
    assert len(text) < 1000


MALFORMED = {
    "no size of a chunk": CHUNKED + b"zz\r\n",
    "a negative chunk": CHUNKED + b"-5\r\n",
    "a chunk that breaks off": CHUNKED + b"5\r\nx",
    "no HTTP": b"hello",
    "a status that is no number": b"HTTP/1.1 abc\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_http_is_retried(kind):
    answers = Answer(raw=iter([MALFORMED[kind]])), said("yes")
    with ChatServer(in_turn(*answers)) as server:
        asked = client(server.url)
        assert [reply.text for reply in asked.ask([question()])] == ["yes"]
    assert asked.report().attempts == 2


def test_redirects_are_not_followed(monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with ChatServer(in_turn(said("yes"))) as other:
        moved = failed(307, "moved", Location=f"{other.url}/chat/completions")
        with ChatServer(in_turn(moved)) as server, pytest.raises(ServerError, match=r"307: moved .*not followed"):
            client(server.url, api_key_env="MY_KEY").ask([question()])
    assert (len(server.requests), other.requests, other.listings) == (1, [], 0)


def test_retry_after_is_honoured():
    with ChatServer(in_turn(failed(429, Retry_After="1"), said("yes"))) as server:
        start = time.monotonic()
        client(server.url).ask([question()])
    assert time.monotonic() - start >= 1.0
    tomorrow = failed(429, Retry_After="86400")
    with ChatServer(in_turn(tomorrow)) as server, pytest.raises(ServerError, match="wants no request for 86400 s"):
        client(server.url).ask([question()])


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("", 0.0),
        ("7", 7.0),
        ("-7", 0.0),
        ("9" * 400, float("inf")),
        ("\u00b2", 0.0),
        ("soon", 0.0),
        ("Mon, 01 Jan 99999999999 00:00:00 GMT", 0.0),
        (formatdate(1_000_002, usegmt=True), 2.0),
        (formatdate(999_998, usegmt=True), 0.0),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, wait):
    assert requested_wait(value, now=1_000_000.0) == wait


def test_waits_are_drawn_from_doubling_ranges(monkeypatch):
    """Full jitter: uniform on [0, backoff 2^n], from the generator that was given."""
    drawn = []

    class Drawing(random.Random):
        def uniform(self, low, high):
            drawn.append((low, high))
            return 0.0

    with ChatServer(in_turn(failed(500))) as server:
        client(server.url, retries=3, backoff=20.0, rng=Drawing()).ask([question()])
    assert drawn == [(0, 20.0), (0, 30.0), (0, 30.0)]


def test_one_bad_request_among_good_ones_is_none(caplog):
    def script(request, _):
        return failed(400, "too long") if "7" in str(request["messages"]) else said("yes")

    with ChatServer(script) as server, caplog.at_level(logging.WARNING):
        asked = client(server.url, concurrency=1)
        replies = asked.ask([question(str(n)) for n in range(9)])
    assert [n for n, reply in enumerate(replies) if reply is None] == [7]
    assert "too long" in caplog.text
    assert asked.report().failures == 1


def test_a_server_that_breaks_down_ends_the_call(tmp_path):
    options = {"cache": tmp_path, "identity": "revision 1"}
    with ChatServer(lambda _, number: said("yes") if number < 5 else failed(500)) as server:
        with pytest.raises(ServerError, match="answered 500"):
            client(server.url, concurrency=1, retries=0, **options).ask([question(str(n)) for n in range(99)])
        assert len(server.requests) == 5 + 10  # the thread that saw the tenth failure sends nothing more
    with ChatServer(in_turn(said("no"))) as server:
        replies = client(server.url, **options).ask([question(str(n)) for n in range(99)])
    assert sum(reply.text == "yes" for reply in replies) == 5  # what was told before the end is kept


def test_as_many_at_once_as_allowed():
    """Three requests meet at the server, and while they wait there, no fourth comes."""
    meeting, fourth = threading.Barrier(3, timeout=FAIL_SAFE), threading.Event()

    def script(_, number):
        if number < 3:
            meeting.wait()
            fourth.wait(0.2)
        else:
            fourth.set()
        return said("yes")

    with ChatServer(script) as server:
        client(server.url, concurrency=3).ask([question(str(n)) for n in range(12)])
    assert server.most == 3


def test_equal_requests_are_one():
    with ChatServer(in_turn(said("yes"))) as server:
        assert len(client(server.url).ask([question()] * 5)) == 5
    assert len(server.requests) == 1


def test_a_restart_repeats_nothing(tmp_path):
    requests = [question(str(n)) for n in range(6)]
    with ChatServer(lambda request, _: said(request["messages"][0]["content"], {"yes": -0.5})) as server:
        first = client(server.url, cache=tmp_path).ask(requests[:4])
        again = client(server.url, cache=tmp_path)
        replies = again.ask(requests)
    assert len(server.requests) == 6
    assert replies[:4] == first
    assert [reply.text for reply in replies] == list("012345")
    assert again.report().cache_hits == 4


def test_a_cache_of_known_weights_needs_no_server(tmp_path):
    with ChatServer(in_turn(said("yes"))) as server:
        replies = client(server.url, cache=tmp_path, identity="revision 1").ask([question()])
        assert server.listings == 0
    away = client("http://127.0.0.1:1", cache=tmp_path, identity="revision 1")
    assert away.ask([question()]) == replies


@pytest.mark.parametrize("told", [[{"id": "tiny", "root": "/models/{}"}], [{"id": "tiny", "root": "tiny"}], None])
def test_other_weights_under_one_name_are_asked_again(told, tmp_path):
    """Where weights come from is asked once a client; a server that does not say keeps its replies for itself."""
    servers = []
    for name in ("a", "b"):
        models = json.loads(json.dumps(told).replace("{}", name))
        with ChatServer(in_turn(said(name)), models) as server:
            asked = client(server.url, cache=tmp_path)
            assert [asked.ask([question()])[0].text for _ in range(2)] == [name] * 2
            servers.append((server.listings, len(server.requests)))
    assert servers == [(1, 1)] * 2


def test_equal_weights_on_another_port_are_not_asked_again(tmp_path):
    """`created` is the time of the question, as vLLM gives it."""
    for created in (1, 2):
        models = [{"id": "other", "root": "x"}, {"id": "tiny", "root": "/models/a", "parent": None, "created": created}]
        with ChatServer(in_turn(said("yes")), models) as server:
            client(server.url, cache=tmp_path).ask([question()])
        assert len(server.requests) == (created == 1)


def test_a_cached_reply_that_cannot_be_opened_is_asked_for_again(tmp_path, caplog):
    cache, key = ReplyCache(tmp_path), "a" * 64
    (tmp_path / "aa").mkdir()
    (tmp_path / "aa" / f"{key}.json").symlink_to(f"{key}.json")  # a loop
    assert cache.get(key) is None
    assert "cannot be read" in caplog.text
    cache.put(key, Reply("yes"))
    assert cache.get(key) == Reply("yes")


@pytest.mark.parametrize(
    "change", [{"temperature": 1}, {"messages": []}, {"model": "other"}, {"identity": "revision 2"}]
)
def test_the_key_is_the_content(change):
    request = {"model": "tiny", **question()}
    body = {name: value for name, value in change.items() if name != "identity"}
    assert content_key(request) == content_key(dict(reversed(request.items())))
    assert content_key(request) != content_key(request | body, change.get("identity", ""))


@pytest.mark.parametrize("damage", [b"", b"{", b'{"reply": {}, "sha256": ""}', b"[]", b"\xff\xfe", "yes->no"])
def test_damaged_replies_are_named_and_asked_for_again(damage, tmp_path, caplog):
    with ChatServer(in_turn(said("yes"))) as server:
        client(server.url, cache=tmp_path).ask([question()])
        (path,) = tmp_path.rglob("*.json")
        path.write_bytes(path.read_bytes().replace(b"yes", b"no") if damage == "yes->no" else damage)
        assert client(server.url, cache=tmp_path).ask([question()])[0].text == "yes"
        assert str(path) in caplog.text
        assert client(server.url, cache=tmp_path).ask([question()])[0].text == "yes"
    assert len(server.requests) == 2
    assert [found.name for found in tmp_path.rglob("*.*")] == [path.name]


def _write(folder, seed):
    cache = ReplyCache(folder)
    for number in range(40):
        cache.put(f"{number:064d}", Reply(f"{number} of {seed}" * 200))
        assert cache.get(f"{number:064d}") is not None  # whole, whoever wrote it


def test_processes_share_a_cache(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_write, args=(tmp_path, seed)) for seed in range(2)]
    for worker in workers:
        worker.start()
    _write(tmp_path, 2)
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with ChatServer(in_turn(said("yes"))) as server, pytest.raises(StorageError, match="could not write"):
        client(server.url, cache=tmp_path / "file").ask([question()])


def test_the_key_stays_secret(tmp_path, monkeypatch, caplog):
    """Also where the server says it: in an answer, in an error, in what is no HTTP at all."""
    monkeypatch.setenv("MY_KEY", "s3cret")
    options = {"api_key_env": "MY_KEY", "cache": tmp_path, "retries": 0}
    escaped = said("your key is s3cret", {"s3cret": -0.5}).body.replace(b"s3cret", b"s3\\u0063ret")
    with ChatServer(in_turn(Answer(escaped), failed(401, "bad s3cret"), Answer(b"s3cret"))) as server:
        assert client(server.url, **options).ask([question()]) == [Reply("your key is ***", (("***", -0.5),), (100, 2))]
        with pytest.raises(ServerError) as raised:
            client(server.url, **options).ask([question("a")])
        assert client(server.url, **options).ask([question("b")]) == [None]
    for text in (str(raised.value), caplog.text):
        assert "***" in text
        assert "s3cret" not in text + str(raised.value.__cause__)
    assert not any(b"s3cret" in path.read_bytes() for path in tmp_path.rglob("*.json"))
    assert "s3cret" not in repr(vars(client(server.url, **options))["cache"].__dict__)


def test_the_report_counts_tokens_and_cost(tmp_path):
    with ChatServer(in_turn(said("yes", tokens=(1000, 10)))) as server:
        asked = client(server.url, cache=tmp_path, prices=(2.0, 50.0))
        asked.ask([question("a"), question("b")])
        asked.ask([question("a"), question("c")])
    report = asked.report({"malformed": 1})
    assert (report.requests, report.cache_hits, report.prompt_tokens, report.completion_tokens) == (4, 1, 3000, 30)
    assert report.cost == pytest.approx((3000 * 2 + 30 * 50) / 1e6)
    assert report.seconds > 0
    assert all(part in str(report) for part in ("4 requests", "1 abstained (malformed)", "cost 0.0075"))


def test_log_probabilities_that_are_missing_are_the_servers_fault(tmp_path):
    with ChatServer(in_turn(said("yes"))) as server, pytest.raises(ServerError, match="no log-probabilities"):
        client(server.url, cache=tmp_path).ask([question() | {"logprobs": True}])
    assert len(server.requests) == 1
    assert not list(tmp_path.rglob("*.json"))


def test_an_answer_without_a_token_is_no_fault_of_the_server():
    choice = {"message": {"content": ""}, "logprobs": {"content": []}, "finish_reason": "stop"}
    silent = Answer(json.dumps({"choices": [choice]}).encode())
    with ChatServer(lambda _, number: silent if number == 1 else said("yes", {"yes": -0.5})) as server:
        requests = [question(str(n)) | {"logprobs": True} for n in range(3)]
        replies = client(server.url, concurrency=1).ask(requests)
    assert [reply.first for reply in replies] == [(("yes", -0.5),), (), (("yes", -0.5),)]
    assert replies[1].margin(["yes"], ["no"]) != replies[1].margin(["yes"], ["no"])  # NaN


def test_settings_that_cannot_work(monkeypatch):
    monkeypatch.setenv("BAD_KEY", "two\nlines")
    secret = ("http://me:pass@host/v1", "http://:pass@host", "http://host/v1?key=pass", "http://host/v1#pass")
    ports = ("http://host:99999", "http://host:0/v1", "http://host:pass/v1", "http://[::1/v1")
    with pytest.raises(ServerError, match="no server answers there"):  # a host name that cannot be encoded
        client("http://host..name", retries=0).ask([question()])
    for url in ("127.0.0.1:8000", "ftp://host", "http://", "http://ho st/v1", "http://host/v\n1", *secret, *ports):
        with pytest.raises(ConfigError) as raised:
            client(url)
        assert "pass" not in f"{raised.value} {raised.value.__cause__}"
    for options in ({"concurrency": 0}, {"timeout": 0.0}, {"retries": -1}, {"prices": (1.0,)}):
        with pytest.raises(ConfigError):
            client("http://127.0.0.1:1", **options)
    for variable in ("NO_SUCH_KEY", "BAD_KEY"):
        with pytest.raises(ConfigError, match=variable):
            client("http://127.0.0.1:1", api_key_env=variable)


def test_margins_sum_over_the_ways_to_write_a_word():
    import math

    listed = {"Yes": 0.3, " yes": 0.2, "YES": 0.1, "▁no": 0.25, "maybe": 0.05}
    reply = Reply("Yes", tuple((token, math.log(p)) for token, p in listed.items()))
    assert reply.margin(["yes"], ["no"]) == pytest.approx(math.log(0.6 / 0.25))
    assert reply.margin(["no"], ["never"]) == pytest.approx(math.log(0.25 / 0.05))  # unlisted: as the last that is
    assert math.isnan(reply.margin(["blue"], ["green"]))
    choice = {"message": {"content": "x"}, "finish_reason": "stop"}
    assert Reply.from_body(json.dumps({"choices": [choice]})) == Reply("x")

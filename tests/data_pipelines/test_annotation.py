"""The server of `alignkit annotate` by plain HTTP: frames, votes and their undo, annotators, and what is refused."""

from __future__ import annotations

import http.client
import json
import re
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from annotating import ask, request, served, vote

from alignkit.errors import ConfigError, DataError
from data_pipelines.annotation import Annotators, Pairs, Server, server
from data_pipelines.annotation.pairs import packed
from data_pipelines.dense import LabelConfig, label_pairs
from data_pipelines.dense.votes import Vote, append_votes, read_votes


@pytest.fixture(scope="module")
def pairs(pairs_folder):
    return Pairs(pairs_folder)


@pytest.fixture
def running(pairs, tmp_path):
    with served(pairs, tmp_path) as started:
        yield started


# --- votes ----------------------------------------------------------------------------------------------------------


def test_a_vote_is_for_the_clip_that_was_on_that_side(running, pairs, tmp_path):
    """It is in the file when the answer comes; sides differ between annotators and between pairs."""
    shown = {}
    for name in ("anna", "ben", "carl"):
        for number, row in enumerate(pairs.rows):
            clips = [request(running, f"/api/clips/{row.id}/{side}?annotator={name}")[1] for side in ("left", "right")]
            first, second = map(packed, pairs.clips(number))
            shown[name, row.id] = left = clips.index(first)  # the copy on the left
            assert clips[1 - left] == second
            choice = ("left", "right", "tie")[number % 3]
            assert vote(running, name, row, 1, choice) == {}
            (last,) = read_votes(tmp_path, name)[-1:]
            assert last.place == (row.id, 1)
            assert last.label == {"left": 1 - 2 * left, "right": 2 * left - 1, "tie": 0}[choice]
            assert last.details == {"left": left}
    assert {shown["anna", row.id] for row in pairs.rows} == {0, 1}
    assert len({tuple(shown[name, row.id] for row in pairs.rows) for name in ("anna", "ben", "carl")}) > 1


def test_an_annotator_resumes(pairs, tmp_path, running):
    """In a session of a new server, also with another seed: what counts is the clip, not the side."""
    vote(running, "anna", pairs.rows[0], 0, "left")
    vote(running, "anna", pairs.rows[0], 0, "right")
    vote(running, "anna", pairs.rows[2], 3, "tie")
    expected = [[None] * 4 for _ in range(4)]
    expected[0][0], expected[2][3] = "right", "tie"
    for options in ({}, {"seed": 1}, {"seed": 2}, {"seed": 3}):
        again = Annotators(pairs, tmp_path, **options)
        if again.copy("anna", pairs.rows[0], "left") != running.annotators.copy("anna", pairs.rows[0], "left"):
            expected[0][0] = "left"
        assert again.choices("anna") == expected
        expected[0][0] = "right"
    session = ask(running, "/api/session?annotator=anna")
    assert [item["choices"] for item in session["pairs"]] == expected
    assert session["pairs"][1]["segments"] == [[0, 4], [4, 8], [8, 12], [12, 16]]
    assert session["pairs"][1]["fps"] == 8
    assert ask(running, "/api/session?annotator=ben")["pairs"][0]["choices"] == [None] * 4
    assert ask(running, "/api/start") == {"pairs": 4, "segments": 16, "only": None, "annotators": {"anna": 2}}


def test_undo(running, pairs, tmp_path):
    """The last vote first, to what it had replaced; the file keeps all that happened."""
    row, other = pairs.rows[:2]
    for where, segment, choice in [(row, 0, "left"), (row, 0, "tie"), (other, 2, "right")]:
        vote(running, "anna", where, segment, choice)
    vote(running, "ben", row, 0, "tie")
    taken = [ask(running, "/api/undo", {"annotator": "anna"}) for _ in range(4)]
    assert taken == [
        {"pair": other.id, "segment": 2, "choice": None},
        {"pair": row.id, "segment": 0, "choice": "left"},
        {"pair": row.id, "segment": 0, "choice": None},
        {},
    ]
    assert read_votes(tmp_path, "anna") == []
    assert len((tmp_path / "votes" / "anna.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    assert len(read_votes(tmp_path, "ben")) == 1


def test_undo_after_a_restart(running, pairs, tmp_path):
    for segment in (1, 0):
        vote(running, "anna", pairs.rows[0], segment, "tie")
    again = Annotators(pairs, tmp_path)
    assert [again.undo("anna") for _ in range(3)] == [(pairs.rows[0], 0, None), (pairs.rows[0], 1, None), None]
    assert again.choices("anna")[0] == [None] * 4


def test_agreement_is_that_of_people(running, pairs, tmp_path):
    """alpha of [1 1] [1 -1] [0 0] is 1 - 5 * 2 / (36 - (3**2 + 1 + 2**2)); a judge's votes do not count."""
    known = {"alpha": None, "annotators": 0, "shared": 0}
    assert ask(running, "/api/agreement") == known
    row = pairs.rows[0]
    sides = {name: running.annotators.copy(name, row, "left") for name in ("anna", "ben")}
    for name, labels in {"anna": (1, 1, 0), "ben": (1, -1, 0)}.items():
        for segment, label in enumerate(labels):
            choice = "tie" if label == 0 else ("left", "right")[(label < 0) ^ sides[name]]
            vote(running, name, row, segment, choice)
    append_votes(tmp_path, "judge", [Vote(row.id, segment, -1, "judge") for segment in range(3)])
    assert ask(running, "/api/agreement") == {"alpha": pytest.approx(1 - 10 / 22), "annotators": 2, "shared": 3}
    assert ask(running, "/api/start")["annotators"] == {"anna": 3, "ben": 3}


def test_votes_become_labels(running, pairs, tmp_path):
    """By `label_pairs`, whatever the sides: the first copy is the better one in the first segment of each pair."""
    for row in pairs.rows:
        better = "left" if running.annotators.copy("anna", row, "left") == 0 else "right"
        for segment, choice in enumerate((better, "tie", "tie", "tie")):
            vote(running, "anna", row, segment, choice)
    label_pairs(pairs.folder, LabelConfig(), tmp_path / "labelled", build_labellers={}, votes_dirs=[tmp_path])
    tables = [pq.read_table(file, columns=["labels"]) for file in sorted((tmp_path / "labelled" / "data").iterdir())]
    assert [labels for table in tables for labels in table["labels"].to_pylist()] == [[1, 0, 0, 0]] * 4


def test_a_vote_that_cannot_be_written_does_not_count(running, pairs, tmp_path):
    (tmp_path / "votes").write_bytes(b"a file")
    body = {"annotator": "anna", "pair": pairs.rows[0].id, "segment": 0, "choice": "tie"}
    (tmp_path / "votes").unlink()
    assert ask(running, "/api/session?annotator=anna")["annotator"] == "anna"
    (tmp_path / "votes").write_bytes(b"a file")
    status, answer = request(running, "/api/vote", body)
    assert status == 507
    assert "make room on the disk" in json.loads(answer)["error"]
    assert running.annotators.choices("anna")[0][0] is None
    assert running.annotators.undo("anna") is None


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:8765"}, 200),
        ({"Host": "localhost"}, 200),
        ({"Host": "evil.example"}, 421),  # a name that its owner lets lead here
        ({"Host": "localhost.evil.example:80"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://localhost:81"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
    ],
)
def test_requests_of_other_pages(headers, status, running, pairs):
    body = {"annotator": "anna", "pair": pairs.rows[0].id, "segment": 0, "choice": "tie"}
    assert request(running, "/api/vote", body, **headers)[0] == status
    assert request(running, "/api/start", **headers)[0] == status


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pair": "0123456789abcdef"}, "is not here"),
        ({"pair": ["x"]}, "pair is ['x']; give a text"),
        ({"segment": 4}, "segments 0 to 3"),
        ({"segment": -1}, "segments 0 to 3"),
        ({"segment": True}, "segments 0 to 3"),
        ({"segment": "0"}, "segments 0 to 3"),
        ({"choice": "A"}, "choices are left, right and tie"),
        ({"choice": None}, "choice is None; give a text"),
        ({"annotator": "../anna"}, "no name of a labeller"),
        ({"annotator": ""}, "no name of a labeller"),
        ({"annotator": 3}, "annotator is 3; give a text"),
    ],
)
def test_votes_that_are_none(changes, message, running, pairs, tmp_path):
    body = {"annotator": "anna", "pair": pairs.rows[0].id, "segment": 0, "choice": "tie"} | changes
    status, answer = request(running, "/api/vote", body)
    assert status == 422
    assert message in json.loads(answer)["error"]
    assert not (tmp_path / "votes").exists()


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{}", {"Content_Type": "text/plain"}, 415),  # what a form of another page may send
        (b"[]", {}, 400),
        (b"{", {}, 400),
        (b"[" * 4000, {}, 400),
        (b" " * 4097, {}, 413),
        (b"{}", {"Content_Length": "-1"}, 411),
        (b"{}", {"Content_Length": "9" * 12}, 411),
        (b"2\r\n{}\r\n0\r\n\r\n", {"Transfer_Encoding": "chunked"}, 411),
    ],
)
def test_bodies_are_bounded(body, headers, status, running):
    assert request(running, "/api/undo", body, **headers)[0] == status


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/../../etc/passwd",
        "/page.html",
        "/api/clips/../../run.json/left?annotator=anna",
        "/api/clips/%2e%2e%2frun.json/left?annotator=anna",
        "/api/clips/0123456789abcdef/left?annotator=anna",
        "/api/vote",
        "//evil.example/",
    ],
)
def test_paths_name_no_files(path, running):
    assert request(running, path)[0] == 404


def test_other_methods_and_names(running, pairs, tmp_path):
    assert request(running, "/", method="PUT")[0] == 501
    assert request(running, "/api/start", {})[0] == 404
    assert request(running, "/api/session?annotator=..%2Fanna")[0] == 422
    assert request(running, "/api/session?" + "a=1&" * 9)[0] == 400
    assert request(running, "http://[/", Host="localhost")[0] == 400
    assert request(running, f"/api/clips/{pairs.rows[0].id}/left")[0] == 422
    with served(pairs, tmp_path, only="anna") as own:
        assert ask(own, "/api/start")["annotators"] == {"anna": 0}
        assert request(own, "/api/session?annotator=anna")[0] == 200
        assert b"for the annotator 'anna'" in request(own, "/api/session?annotator=ben")[1]
    with pytest.raises(DataError, match="no name of a labeller"):
        Annotators(pairs, tmp_path, only="a/b")


def test_the_name_of_a_judge_is_refused(running, pairs, tmp_path):
    append_votes(tmp_path, "vlm", [Vote(pairs.rows[0].id, 0, 1, "vlm", {"answers": ["first", "second"]})])
    body = {"annotator": "vlm", "pair": pairs.rows[0].id, "segment": 0, "choice": "tie"}
    status, reply = request(running, "/api/vote", body)
    assert status == 422
    assert b"'vlm' has votes that were not given on this page" in reply
    assert len(read_votes(tmp_path, "vlm")) == 1


def test_annotators_in_memory_are_bounded(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.annotation.annotators.MOST_ANNOTATORS", 2)
    known = Annotators(pairs, tmp_path)
    for name in ("a", "b", "a"):
        known.choices(name)
    with pytest.raises(DataError, match="2 annotators have begun"):
        known.choices("c")


def test_connections_are_bounded(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 2)
    with served(pairs, tmp_path) as running:
        held = [http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=60) for _ in range(2)]
        for connection in held:
            connection.request("GET", "/api/start")
            assert connection.getresponse().read()
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            request(running, "/api/start")
        for connection in held:
            connection.request("GET", "/api/start")
            assert connection.getresponse().read()
            connection.close()


def test_a_port_that_is_taken(running):
    with pytest.raises(ConfigError, match=f"port {running.server_port} cannot be used"):
        Server(running.annotators, running.server_port)


def test_the_page_loads_nothing_from_elsewhere(running):
    connection = http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    text, headers = answer.read().decode(), answer.headers
    connection.close()
    assert re.findall(r"https?://[^'\"]+", text) == ["http://www.w3.org/2000/svg"]  # a namespace
    assert not re.search(r"\son\w+=|style=|innerHTML|insertAdjacentHTML|\beval\b", text)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers


def test_prompts_are_shown_as_they_are(pairs, tmp_path):
    """Controls that would reorder the text are escapes."""
    changed = Pairs(pairs.folder)
    changed.rows[0] = replace(changed.rows[0], prompt="a <b>\u202ecat")
    with served(changed, tmp_path) as running:
        assert ask(running, "/api/session?annotator=a")["pairs"][0]["prompt"] == r"a <b>\u202ecat"

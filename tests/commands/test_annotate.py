"""`alignkit annotate` as a program: it serves until it is ended, and a kill loses no vote."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import moving_pairs
import pytest

from alignkit import cli
from data_pipelines.dense.votes import read_votes


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs")
    moving_pairs.write(out, 1, videos=True)
    return out


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_votes_outlive_the_program(pairs, tmp_path, end):
    """Killed right after the answer; an interrupt is the usual end, with a summary."""
    words = ["annotate", "--pairs", str(pairs), "--out", str(tmp_path), "--port", "0", "--annotator", "anna"]
    program = subprocess.Popen(
        [sys.executable, "-m", "alignkit", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ},
        # A job in a shell's background ignores interrupts, and so would the program.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    try:
        line = program.stdout.readline()
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", line)
        assert line.startswith("1 pairs, 4 segments; open ")
        (pair,) = ask(f"{url}api/session?annotator=anna")["pairs"]
        assert ask(f"{url}api/vote", {"annotator": "anna", "pair": pair["id"], "segment": 2, "choice": "tie"}) == {}
        program.send_signal(end)
        told, _ = program.communicate(timeout=60)
    finally:
        program.kill()
        program.communicate()
    (vote,) = read_votes(tmp_path)
    assert (vote.place, vote.label, vote.labeller) == ((pair["id"], 2), 0, "anna")
    if end == signal.SIGINT:
        assert program.returncode == 0
        assert f"votes are in {tmp_path / 'votes'}; labelled segments: anna 1" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "key 'pairs' is missing"),
        (["--pairs", "absent"], "'absent' is not a finished stage 'dense-pairs'"),
        (["--pairs", "absent", "--port", "70000"], "port is 70000; give a number below 65536"),
        (["--pairs", "absent", "--annotator", "a b"], "'a b' is no name of a labeller"),
    ],
)
def test_mistakes_are_one_message(words, message, capsys):
    assert cli.main(["annotate", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_served(pairs, capsys):
    before = sorted(pairs.rglob("*"))
    assert cli.main(["annotate", "--pairs", str(pairs), "--dry-run"]) == 0
    assert f"shows the pairs in {pairs} and writes votes to {pairs / 'votes'}" in capsys.readouterr().out
    assert sorted(pairs.rglob("*")) == before

"""The program: it answers at once, and ends every command with a clean message and a telling exit code."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from alignkit import __version__, cli
from alignkit.errors import DataError
from alignkit.resolve import resolve

ROOT = Path(__file__).parent.parent
GENERATE = """\
out: {out}
prompts: {{file: prompts.txt}}
generators: {{a: {{model: ./models/a}}}}
generate: {{sources: [{{name: a, seeds_per_prompt: 2}}]}}
"""


def program(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alignkit", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ})


def test_help_answers_at_once():
    """Processor time of the fastest of three: the clock on the wall also counts what else the machine does."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "train rankdpo" in program("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5


@pytest.mark.parametrize("verb", ["generate", "score", "rank", "evaluate", "report", "doctor", "run", "train sft"])
def test_every_verb_lists_its_keys(verb, capsys):
    assert cli.main([*verb.split(), "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: alignkit {verb} ")
    assert told.count("  --") >= 5


def test_help_tells_type_default_and_meaning(capsys):
    cli.main(["train", "rankdpo", "--help"])
    told = capsys.readouterr().out
    assert "--beta  float or null  [None]" in told
    assert "--lora_rank  int  [16]" in told
    assert "--data  path  (required)" in told
    assert "ranked dataset" in told


@pytest.mark.parametrize("verb", list(cli.COMMANDS))
def test_every_verb_of_the_table_exists(verb):
    assert callable(resolve(cli.COMMANDS[verb][0], {}, kind="command"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generat"], "unknown command 'generat'. Did you mean 'generate'?"),
        (["train", "rankdp"], "unknown command 'train rankdp'. Did you mean 'train rankdpo'?"),
        (["doctor", "--modle", "x"], "unknown key 'modle'. Did you mean 'model'?"),
        (["doctor", "--config", "absent.yaml"], "config file 'absent.yaml' does not exist"),
        (["doctor", "--config=a.yaml", "--config=b.yaml"], "--config is given 2 times"),
        (["doctor", "--config"], "--config needs a file"),
        (["report"], "nothing to report"),
    ],
)
def test_a_mistake_is_one_clean_message(words, message, capsys):
    assert cli.main(words) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert "Traceback" not in told.err
    assert told.out == ""


def test_a_family_of_verbs_is_listed(capsys):
    assert cli.main(["train"]) == 0
    told = capsys.readouterr().out
    assert "train sft" in told
    assert "generate" not in told


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def _raise(error: BaseException):
    def main(argv):
        raise error

    return main


def test_traceback_is_shown_on_demand(monkeypatch, capsys):
    monkeypatch.setattr("alignkit.commands.doctor.main.main", _raise(DataError("row 3 of x is empty")))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "alignkit: row 3 of x is empty\n"
    with pytest.raises(DataError):
        cli.main(["doctor", "--traceback"])


def test_interrupt_says_how_to_continue(monkeypatch, capsys):
    monkeypatch.setattr("alignkit.commands.doctor.main.main", _raise(KeyboardInterrupt()))
    assert cli.main(["doctor", "--model", "a b"]) == 130
    assert "alignkit doctor --model 'a b'" in capsys.readouterr().err


def test_dry_run_loads_no_torch_and_writes_nothing(tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text(GENERATE.format(out=tmp_path / "out"), encoding="utf-8")
    code = (
        "import sys; from alignkit.cli import main; "
        f"code = main(['generate', '--config', {str(config)!r}, '--dry-run']); "
        "sys.exit(code or ('torch' in sys.modules and 9))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate 2 candidates (a x 2) for all prompts of prompts.txt" in done.stdout
    assert "NOT THERE YET: ./models/a" in done.stdout
    assert not (tmp_path / "out").exists()


CAUSES = [(errno.ENOSPC, "make room"), (errno.EACCES, "permissions"), (errno.EIO, "")]


@pytest.mark.parametrize(("number", "says"), CAUSES)
def test_known_causes_of_a_library_are_clear_and_others_keep_their_traceback(monkeypatch, capsys, number, says):
    def fail(*_):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr(cli, "_dispatch", fail)
    if says:
        assert cli.main(["run"]) == 2
        assert re.search(rf"^alignkit: .*'some/file'; .*{says}.*run the same command again$", capsys.readouterr().err)
    with pytest.raises(OSError, match="some/file"):
        cli.main(["run", *(["--traceback"] if says else [])])


@pytest.mark.parametrize(("own", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_do_not_spin_unless_the_user_wants_it(monkeypatch, own, expected):
    """Set before anything imports torch; what the user has set stays."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    code = (
        "import os, sys; from alignkit import cli; assert 'torch' not in sys.modules; cli.main(['--version']);"
        "assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == expected

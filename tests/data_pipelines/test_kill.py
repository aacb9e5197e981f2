"""SIGKILL at many moments: run again, the folders hold the bytes of an unbroken run. And memory that stays flat."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
KILLS = 6  # moments by each of two calls

# The child imports once and forks a fresh process for every run, before anything starts a thread.
CHILD = """
import json, os, resource, signal, sys, time
sys.path[:0] = json.loads(sys.argv[1])
import datasets, pyarrow.parquet, torch
from pathlib import Path
import conftest
from alignkit.records import Sampling
from data_pipelines import synpic


def stages(base, rows, size, kill_at, moment):
    real, calls = getattr(os, moment), 0

    def dying(*arguments):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(os, moment, dying)
    torch.set_num_threads(1)
    base, sampling = Path(base), Sampling(height=size, width=size)
    sources = [synpic.SourceConfig(name="dull", seeds_per_prompt=2, sampling=sampling),
               synpic.SourceConfig(name="bright", sampling=sampling)]
    config = conftest.generate_config(sources=sources, part_size=rows if rows < 10 else 10)
    synpic.generate_and_score(conftest.make_prompts(rows), config, conftest.SCORE, (base / "c", base / "s"),
                              build_sources=conftest.SOURCES, build_rewards=conftest.REWARDS)
    synpic.rank_candidates(base / "c", base / "s", synpic.RankConfig(held_out=0.3), base / "r")
    return calls, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


for line in sys.stdin:
    job = json.loads(line)
    after = job.pop("after")
    sys.stdout.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(stages(**job)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    if after:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)  # a finished child is still there to be waited for
    with os.fdopen(reader) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    print(json.dumps({"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, "told": told}), flush=True)
"""


@dataclass(frozen=True)
class Runner:
    process: subprocess.Popen[str]

    def __call__(
        self, base: Path, *, rows: int = 30, size: int = 8, kill_at: int = 0, moment: str = "fsync", after: float = 0.0
    ) -> Any:
        job = {"base": str(base), "rows": rows, "size": size, "kill_at": kill_at, "moment": moment, "after": after}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["signal"], json.loads(answer["told"] or "null")


@pytest.fixture(scope="module")
def runner() -> Any:
    paths = json.dumps([str(HERE), str(HERE.parent), str(HERE.parents[1])])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHILD, paths], **pipes) as process:
        yield Runner(process)
        process.stdin.close()


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_and_run_again_gives_the_same_bytes(runner: Runner, world: Any, tmp_path: Path, moment: str) -> None:
    _, (calls, _) = runner(tmp_path / "whole", moment=moment)
    whole = world.snapshot(tmp_path / "whole")
    assert calls > KILLS
    for kill_at in {1 + number * (calls - 1) // (KILLS - 1) for number in range(KILLS)}:
        base = tmp_path / str(kill_at)
        assert runner(base, moment=moment, kill_at=kill_at)[0] == signal.SIGKILL
        assert runner(base, moment=moment)[0] == 0
        assert world.snapshot(base) == whole, f"killed at {moment} number {kill_at} of {calls}"


def test_killed_at_random_instants(runner: Runner, world: Any, tmp_path: Path) -> None:
    start = time.monotonic()
    runner(tmp_path / "whole")
    seconds, whole = time.monotonic() - start, world.snapshot(tmp_path / "whole")
    instants = random.Random(0)
    deaths = []
    for number in range(6):
        base = tmp_path / str(number)
        after = instants.uniform(0.02, 0.9) * seconds
        deaths.append(runner(base, after=after)[0])
        assert runner(base)[0] == 0
        assert world.snapshot(base) == whole, f"killed after {after:.3f} of {seconds:.3f} s"
    assert deaths.count(signal.SIGKILL) >= 3  # on a busy machine some finish first


def test_killed_again_and_again_still_ends(runner: Runner, world: Any, tmp_path: Path) -> None:
    runner(tmp_path / "whole")
    deaths = [runner(tmp_path / "often", kill_at=count)[0] for count in (3, 8, 15, 20, 0)]
    assert deaths == [signal.SIGKILL] * 4 + [0]
    assert world.snapshot(tmp_path / "often") == world.snapshot(tmp_path / "whole")


def test_memory_does_not_grow_with_the_prompts(runner: Runner, tmp_path: Path) -> None:
    _, (_, few) = runner(tmp_path / "few", rows=50, size=64)
    _, (_, many) = runner(tmp_path / "many", rows=800, size=64)
    written = sum(path.stat().st_size for path in (tmp_path / "many/c/data").iterdir())
    assert written > 20e6
    assert (many - few) * 1024 < 0.5 * written

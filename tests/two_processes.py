"""Runs tests/trainers/worker.py in a process of its own, or in two that train together.

The processes are forked from one that has imported torch, diffusers and the trainers, so they start at once.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

PATIENCE = 900  # seconds, on a busy machine
WORKER = Path(__file__).parent / "trainers" / "worker.py"


def run_script(script, arguments, out, environment):
    """The body of a process: `main` of the file `script`, its output in the file `out`."""
    import torch

    os.environ.update(environment)
    with Path(out).open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(1)
    runpy.run_path(script)["main"](*arguments)


@functools.cache
def server():
    """The context whose processes are forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_families", "alignkit.trainers.rankdpo", "alignkit.trainers.reward_flow"])
    with pytest.MonkeyPatch.context() as patch:  # the server finds modules by this alone
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(WORKER.parents[2])]))
        forkserver.ensure_running()
    return context


def start_script(script, arguments, out, **environment):
    """`main(*arguments)` of the file `script` in a process that prints into the file `out`."""
    process = server().Process(target=run_script, args=(str(script), arguments, str(out), environment))
    process.start()
    return process


def ended(process):
    """The exit status of a process, after its end."""
    process.join(PATIENCE)
    if process.is_alive():  # the end of the tests would wait for it
        process.kill()
    return process.exitcode


def start(tmp_path, job, rank=0, world=1, port=0):
    """worker.py as a process of one thread, as one of `world` processes."""
    file = tmp_path / f"job-{rank}.json"
    file.write_text(json.dumps(job))
    environment = {}
    if world > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return start_script(WORKER, [file], tmp_path / f"out-{rank}.txt", **environment)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(tmp_path, job):
    """The job in two processes; the logged history of the first. What each prints is in out-RANK.txt."""
    port = _free_port()
    processes = [start(tmp_path, job, rank, 2, port) for rank in range(2)]
    codes = [ended(process) for process in processes]
    assert codes == [0, 0], "".join((tmp_path / f"out-{rank}.txt").read_text()[-3000:] for rank in range(2))
    return json.loads((tmp_path / "job-0.log").read_text())


def counts(tmp_path, rank):
    """What a process of the last `run_two` did: encoded media, generated images, rows of reference errors."""
    return json.loads((tmp_path / f"out-{rank}.txt").read_text().strip().splitlines()[-1])

"""Runs tests/trainers/worker.py as a program: one process, or two that train together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

PATIENCE = 900  # seconds; importing torch alone takes long on a busy machine
WORKER = Path(__file__).parent / "trainers" / "worker.py"


def start(tmp_path, job, rank=0, world=1, port=0):
    """worker.py as a program of one thread, as one of `world` processes."""
    file = tmp_path / f"job-{rank}.json"
    file.write_text(json.dumps(job))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    if world > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with (tmp_path / f"out-{rank}.txt").open("w") as out:
        return subprocess.Popen([sys.executable, str(WORKER), str(file)], env=environment, stdout=out, stderr=out)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(tmp_path, job):
    """The job in two processes; the logged history of the first. What each prints is in out-RANK.txt."""
    port = _free_port()
    processes = [start(tmp_path, job, rank, 2, port) for rank in range(2)]
    codes = [process.wait(timeout=PATIENCE) for process in processes]
    assert codes == [0, 0], "".join((tmp_path / f"out-{rank}.txt").read_text()[-3000:] for rank in range(2))
    return json.loads((tmp_path / "job-0.log").read_text())


def counts(tmp_path, rank):
    """What a process of the last `run_two` did: encoded media, generated images, rows of reference errors."""
    return json.loads((tmp_path / f"out-{rank}.txt").read_text().strip().splitlines()[-1])

"""A running annotation server, and what tests ask of it by plain HTTP."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.annotation import Annotators, Pairs, Server


@contextlib.contextmanager
def served(pairs: Pairs, votes: Path, **options: Any) -> Iterator[Server]:
    with Server(Annotators(pairs, votes, **options), 0) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield running
        finally:
            running.shutdown()


def request(running: Server, path: str, body: Any = None, method: str = "", **headers: str) -> tuple[int, bytes]:
    """Status and body; `body` is sent as JSON, bytes as they are. Underlines in names of headers stand for hyphens."""
    connection = http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kind = {} if body is None else {"Content-Type": "application/json"}
    given = kind | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if body is None else "POST"), path, data, given)
    answer = connection.getresponse()
    try:
        return answer.status, answer.read()
    finally:
        connection.close()


def ask(running: Server, path: str, body: Any = None) -> Any:
    status, answer = request(running, path, body)
    assert status == 200, answer
    return json.loads(answer)


def vote(running, name, row, segment, choice):
    return ask(running, "/api/vote", {"annotator": name, "pair": row.id, "segment": segment, "choice": choice})


def images(data: bytes) -> np.ndarray:
    """Frames as the page takes them apart."""
    stream, found = io.BytesIO(data), []
    while head := stream.read(4):
        found.append(np.asarray(Image.open(io.BytesIO(stream.read(struct.unpack("<I", head)[0])))))
    return np.stack(found)

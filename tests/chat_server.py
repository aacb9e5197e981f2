"""A real HTTP server on loopback that speaks the chat API, and misbehaves as a test says."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass
class Answer:
    """What goes over the wire: a status, headers and the first `keep` bytes of a body; or the blocks of `raw` alone."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    keep: int | None = None
    raw: Iterator[bytes] | None = None


def said(
    text: str, first: dict[str, float] | None = None, tokens: tuple[int, int] = (100, 2), finish: Any = "stop"
) -> Answer:
    """A chat completion; `first` are the alternatives of its first token, `finish` is why it ended."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    if first is not None:
        listed = [{"token": token, "logprob": value} for token, value in first.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": listed}]}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return Answer(json.dumps({"choices": [choice], "usage": usage}).encode())


def failed(status: int, message: str = "no", **headers: str) -> Answer:
    """An error as servers report it."""
    return Answer(json.dumps({"error": {"message": message}}).encode(), status, headers)


class ChatServer:
    """`script(request, n)` answers the n-th request; stores the requests, their headers and how many came at once.

    A request counts from when it has been read until its answer begins, so it lies within the time that the client
    counts. models: what it lists as served; without it, it has no such list. sent: bytes of `Answer.raw`. stopped: set
    at the end; a script that hangs waits for it.
    """

    def __init__(self, script: Callable[[dict[str, Any], int], Answer], models: list[dict[str, Any]] | None = None):
        self.script, self.requests, self.headers = script, [], []
        self.models, self.listings = models, 0
        self.now = self.most = self.sent = 0
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def _enter(self, request: dict[str, Any], headers: dict[str, str]) -> int:
        with self._lock:
            self.requests.append(request)
            self.headers.append(headers)
            self.now += 1
            self.most = max(self.most, self.now)
            return len(self.requests) - 1

    def _leave(self) -> None:
        with self._lock:
            self.now -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.listings += 1
                listed = Answer(json.dumps({"object": "list", "data": outer.models}).encode())
                self._send(listed if outer.models and self.path == "/v1/models" else failed(404))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                number = outer._enter(request, dict(self.headers) | {"path": self.path})
                try:
                    answer = outer.script(request, number)
                finally:
                    outer._leave()
                with contextlib.suppress(OSError):  # the client went away
                    self._send_raw(answer.raw) if answer.raw else self._send(answer)

            def _send(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body[: answer.keep])

            def _send_raw(self, blocks: Iterator[bytes]) -> None:
                for block in blocks:
                    self.wfile.write(block)
                    outer.sent += len(block)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

"""A real HTTP server on loopback that speaks the chat API, and misbehaves as a test says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass
class Answer:
    """What goes over the wire: a status, headers and a body; `keep` bytes of it, `drip` seconds before each byte."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    keep: int | None = None
    drip: float = 0.0


def said(text: str, first: dict[str, float] | None = None, tokens: tuple[int, int] = (100, 2)) -> Answer:
    """A chat completion; `first` are the alternatives of its first token."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if first is not None:
        listed = [{"token": token, "logprob": value} for token, value in first.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": listed}]}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return Answer(json.dumps({"choices": [choice], "usage": usage}).encode())


def failed(status: int, message: str = "no", **headers: str) -> Answer:
    """An error as servers report it."""
    return Answer(json.dumps({"error": {"message": message}}).encode(), status, headers)


class ChatServer:
    """`script(request, n)` answers the n-th request; keeps the requests, their headers and how many ran at once.

    models: what it lists as served; without it, it has no such list.
    """

    def __init__(self, script: Callable[[dict[str, Any], int], Answer], models: list[dict[str, Any]] | None = None):
        self.script, self.requests, self.headers = script, [], []
        self.models, self.listings = models, 0
        self.now = self.most = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
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
                    self._send(outer.script(request, number))
                except OSError:
                    pass  # the client went away
                finally:
                    outer._leave()

            def _send(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                for start in range(0, len(answer.body[: answer.keep]), 1 if answer.drip else 1 << 20):
                    time.sleep(answer.drip)
                    self.wfile.write(answer.body[: answer.keep][start : start + (1 if answer.drip else 1 << 20)])
                    self.wfile.flush()

            def log_message(self, *_: object) -> None:
                pass

        return Handler

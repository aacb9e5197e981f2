"""The page and its requests, on loopback, with the standard library.

    GET  /                                              the page
    GET  /api/start                                     annotators so far, number of pairs and segments
    GET  /api/session?annotator=NAME                    all pairs with this annotator's choices
    GET  /api/agreement                                 Krippendorff's alpha
    GET  /api/clips/PAIR/left?annotator=NAME            frames, see pairs.py
    POST /api/vote {annotator, pair, segment, choice}   a choice; {} when it is on the disk
    POST /api/undo {annotator}                          the last vote is taken back

Other web pages in the same browser can send requests too. They are refused: a request must name this machine as its
host (so that no other name leads here), come from this origin where it names one, and carry JSON to write, which a
page of another origin may only send after a question that is not answered here. A request has a bounded body, names
pairs by their id, and no file. Every user of the machine can reach the page.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from alignkit.errors import ConfigError, DataError, NumericsError, StorageError
from alignkit.escape import get_logger, to_terminal
from data_pipelines.annotation.annotators import Annotators
from data_pipelines.annotation.pairs import packed

logger = get_logger(__name__)

LOOPBACK = "127.0.0.1"
MOST_CONNECTIONS = 32
LARGEST_BODY = 4096  # bytes of a request
IDLE = 30.0  # seconds without a byte until a connection is closed
KEPT_PAIRS = 2  # encoded, in memory: the one on the page and the next one
_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")
_CLIP = re.compile(r"/api/clips/([0-9a-f]{16})/(left|right)")


class Refused(Exception):  # noqa: N818 - no fault of the server
    """A request that is answered with `status` and a message."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves `annotators` on 127.0.0.1 at `port`; 0 takes a free one. Raises ConfigError where the port is taken."""

    daemon_threads = True

    def __init__(self, annotators: Annotators, port: int) -> None:
        self.annotators = annotators
        self.page, self.policy = _page()
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._encoding = threading.Lock()
        self._encoded = functools.lru_cache(KEPT_PAIRS)(self._encode)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise ConfigError(f"port {port} cannot be used: {error.strerror}; give another, or --port 0") from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def clip(self, number: int, copy: int) -> bytes:
        """The encoded frames of a clip; a pair is decoded once, one pair at a time."""
        with self._encoding:
            return self._encoded(number)[copy]

    def _encode(self, number: int) -> tuple[bytes, ...]:
        return tuple(map(packed, self.annotators.pairs.clips(number)))

    def process_request(self, request: Any, client_address: Any) -> None:
        """As the base class; a connection beyond `MOST_CONNECTIONS` is closed at once."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base class."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the name is the base class's
        """A browser that goes away while it is answered is no fault; others are logged, with their traceback."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            logger.error("a request failed:\n%s", traceback.format_exc())


def _page() -> tuple[bytes, str]:
    """The page and its content security policy, which names its script and its style by their hashes."""
    page = importlib.resources.files(__package__).joinpath("page.html").read_bytes()
    hashes = []
    for tag in (b"script", b"style"):
        (inside,) = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, flags=re.DOTALL)
        hashes.append(base64.b64encode(hashlib.sha256(inside).digest()).decode())
    return page, (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Handler(BaseHTTPRequestHandler):
    """One connection; requests on it come one after the other."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = IDLE
    server_version, sys_version = "alignkit", ""

    def setup(self) -> None:
        """As the base class; small answers are sent at once."""
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self) -> None:
        """The page, or JSON, or a clip."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A vote, or its undo."""
        self._answer(self._post)

    def _answer(self, work: Callable[[], tuple[bytes, str]]) -> None:
        """What `work` returns (body and type), or its error as JSON."""
        try:
            self._require_own_origin()
            body, kind = work()
            self._send(HTTPStatus.OK, body, kind)
        except Refused as error:
            self.close_connection = True  # a body may not have been read
            self._send(error.status, *_json({"error": str(error)}))
        except (DataError, ConfigError, NumericsError) as error:  # of the request, or of a pair that cannot be shown
            self._send(HTTPStatus.UNPROCESSABLE_ENTITY, *_json({"error": str(error)}))
        except StorageError as error:
            logger.warning("%s", error)
            self._send(HTTPStatus.INSUFFICIENT_STORAGE, *_json({"error": str(error)}))

    def _require_own_origin(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "open the page by the address that the program printed")
        is_foreign = self.headers.get("Origin", f"http://{hosts[0]}") != f"http://{hosts[0]}"
        is_foreign |= self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        if is_foreign and (self.command, self.path) != ("GET", "/"):  # a link to the page itself may be anywhere
            raise Refused(HTTPStatus.FORBIDDEN, "a request of another page")

    def _get(self) -> tuple[bytes, str]:
        annotators = self.server.annotators
        try:
            url = urlsplit(self.path)
            name = parse_qs(url.query, max_num_fields=4).get("annotator", [""])[0]
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"the address cannot be read: {error}") from error
        if url.path == "/":
            return self.server.page, "text/html; charset=utf-8"
        if url.path == "/api/start":
            pairs = annotators.pairs
            known = {"pairs": len(pairs.rows), "segments": pairs.segments, "only": annotators.only}
            return _json(known | {"annotators": annotators.progress()})
        if url.path == "/api/agreement":
            return _json(annotators.agreement())
        if url.path == "/api/session":
            return _json({"annotator": name, "pairs": self._pairs(name)})
        if match := _CLIP.fullmatch(url.path):
            number = annotators.pairs.numbers.get(match[1])
            if number is not None:
                copy = annotators.copy(name, annotators.pairs.rows[number], match[2])
                return self.server.clip(number, copy), "application/octet-stream"
        raise Refused(HTTPStatus.NOT_FOUND, "nothing is here")

    def _pairs(self, name: str) -> list[Mapping[str, Any]]:
        """What the page needs of each pair. Control characters of a prompt are shown as escapes."""
        annotators, pairs = self.server.annotators, list[Mapping[str, Any]]()
        for row, choices in zip(annotators.pairs.rows, annotators.choices(name), strict=True):
            known = {"id": row.id, "fps": row.fps, "segments": row.segments, "choices": choices}
            pairs.append(known | {"prompt": to_terminal(row.prompt)})
        return pairs

    def _post(self) -> tuple[bytes, str]:
        work = {"/api/vote": self._vote, "/api/undo": self._undo}.get(self.path)
        if work is None:
            raise Refused(HTTPStatus.NOT_FOUND, "nothing is here")
        return _json(work(self._body()))

    def _body(self) -> Mapping[str, Any]:
        """The JSON object of a request, read only when its length is stated and small."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not re.fullmatch(r"\d{1,9}", length):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "state the length of the body")
        if int(length) > LARGEST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {LARGEST_BODY} bytes")
        try:
            value = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "the body is no JSON object")
        return value

    def _vote(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        annotators, pair = self.server.annotators, _text(body, "pair")
        if pair not in annotators.pairs.numbers:
            raise DataError(f"the pair {pair!r:.40} is not here; load the page again")
        row = annotators.pairs.rows[annotators.pairs.numbers[pair]]
        annotators.vote(_text(body, "annotator"), row, body.get("segment"), _text(body, "choice"))
        return {}

    def _undo(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        undone = self.server.annotators.undo(_text(body, "annotator"))
        if undone is None:
            return {}
        row, segment, choice = undone
        return {"pair": row.id, "segment": segment, "choice": choice}

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": self.server.policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base class's
        logger.debug("%s", format % args)


def _json(value: Mapping[str, Any]) -> tuple[bytes, str]:
    return json.dumps(value).encode(), "application/json"


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise DataError(f"{name} is {value!r:.40}; give a text")
    return value

"""One HTTP request to a chat server, bounded in time and in bytes: the text of its answer, or an error.

A server is not trusted: it may send without end, byte by byte, or invalid data. Everything that it sends (status line,
interim answers, headers, chunk sizes, body) counts towards one limit of bytes, and one timer shuts the connection.
Redirects are not followed, so neither the request nor the key reaches another host. Messages quote what a server sends
only through `Endpoint.quote`: short, printable, without the key.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from threading import Timer
from typing import Any
from urllib.parse import SplitResult, urlsplit

from alignkit.errors import ConfigError
from rewards.serving.bounded_json import parse_json

_MOST_BYTES = 4 << 20  # of an answer, headers included; a long one with log-probabilities has some 100 KiB
_MOST_ERROR_BYTES = 64 << 10  # of the body of an error
_MOST_QUOTED = 300  # characters of what a server sent
_TEMPORARY = {408, 409, 425, 429}  # besides 5xx: another attempt may succeed
_NOT_IMPLEMENTED = http.HTTPStatus.NOT_IMPLEMENTED
_REQUEST_AT_FAULT = {400, 413, 415, 422}  # this request is wrong (too long, too many images); others may succeed
_LONGEST_REQUESTED_WAIT = 600.0  # seconds; a server that wants more cannot be used in this run


class AttemptError(Exception):
    """A failed attempt: whether to try again, whether it ends the run, seconds to wait as the server requests."""

    def __init__(self, message: str, *, again: bool = True, fatal: bool = False, wait: float = 0.0) -> None:
        super().__init__(message)
        self.again, self.fatal, self.wait = again, fatal, wait


class Call:
    """State shared by the threads of one call: whether it is over, why, and the connections to shut when it ends."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.cause: AttemptError | None = None
        self._open: set[socket.socket] = set()

    @contextlib.contextmanager
    def holding(self, sock: socket.socket) -> Iterator[None]:
        """Within this context the end of the call shuts `sock`; at once if the call is over already."""
        self._open.add(sock)
        if self.over.is_set():
            _shut(sock)
        try:
            yield
        finally:
            self._open.discard(sock)

    def require_open(self) -> None:
        """Raises AttemptError once the call is over."""
        if self.over.is_set():
            raise AttemptError("the call is over", again=False)

    def end(self, cause: AttemptError | None = None) -> None:
        """Stop all threads that wait or read; the first `cause` is stored."""
        self.cause = self.cause or cause
        self.over.set()
        for sock in tuple(self._open):
            _shut(sock)


class TooManyBytesError(OSError):
    """A server sent more bytes than the limit for an answer."""


class _BoundedStream(io.RawIOBase):
    """Reads `raw` until `most` bytes have come, then raises TooManyBytesError."""

    def __init__(self, raw: io.RawIOBase, most: int) -> None:
        self._raw, self._most, self._left = raw, most, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self._raw.readinto(buffer)
        self._left -= count or 0
        if self._left < 0:
            raise TooManyBytesError(f"more than {self._most} bytes")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _BoundedResponse(http.client.HTTPResponse):
    """A response that counts every byte of the connection."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        raw: Any = self.fp.detach()
        self.fp = io.BufferedReader(_BoundedStream(raw, _MOST_BYTES))

    def body(self) -> str:
        """The whole body as text. Raises TooManyBytesError, or IncompleteRead where it breaks off."""
        content = self.read(_MOST_BYTES)  # a size, since without one a false Content-Length would be allocated
        if self.length:
            raise http.client.IncompleteRead(content, self.length)
        return content.decode("utf-8", errors="replace")

    def error_body(self) -> str:
        """The beginning of the body as text, "" where it cannot be read."""
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            return self.read(_MOST_ERROR_BYTES).decode("utf-8", errors="replace")
        return ""


class Endpoint:
    """Where a server is, the key for it, and the limit of one request.

    base_url, api_key_env, timeout: as `rewards.serving.chat_client.ChatClient` takes them.

    Raises ConfigError for an address or a key that cannot be used.
    """

    def __init__(self, base_url: str, api_key_env: str | None, timeout: float) -> None:
        self._address = _address(base_url)
        self.url = self._address.geturl()
        self.timeout = timeout
        self._key = _api_key(api_key_env)
        self._tls = ssl.create_default_context() if self._address.scheme == "https" else None

    def exchange(self, method: str, path: str, body: bytes | None, call: Call) -> str:
        """The text of an answer with status 200. Raises AttemptError for every other outcome."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        with self._connection(call) as (connection, is_late):
            try:
                if isinstance(connection.sock, ssl.SSLSocket):
                    connection.sock.do_handshake()
                connection.request(method, f"{self._address.path}/{path}", body, headers)
                response: Any
                with connection.getresponse() as response:
                    is_good = response.status == http.HTTPStatus.OK
                    text = response.body() if is_good else response.error_body()
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a negative chunk size
                if is_late.is_set() or isinstance(error, TimeoutError):
                    raise AttemptError(f"no answer within {self.timeout:g} s") from None
                reason = self.quote(f"{type(error).__name__}: {error}")
                is_tls = isinstance(error, ssl.SSLError)
                raise AttemptError(f"the answer could not be read ({reason})", fatal=is_tls) from None
        if is_good and is_late.is_set():  # a body without a length ends where the timer shut the connection
            raise AttemptError(f"no answer within {self.timeout:g} s")
        if not is_good:
            raise self._refusal(response.status, response.getheader("Retry-After", ""), text)
        return str(text)

    def hide(self, text: str) -> str:
        """`text` without the key, which a server may repeat."""
        for form in {self._key, json.dumps(self._key)[1:-1]} - {""}:
            text = text.replace(form, "***")
        return text

    def quote(self, text: str) -> str:
        """`text` from a server as messages show it: without the key, printable and short."""
        return "".join(c if c.isprintable() else " " for c in self.hide(text)[:_MOST_QUOTED])

    @contextlib.contextmanager
    def _connection(self, call: Call) -> Iterator[tuple[http.client.HTTPConnection, threading.Event]]:
        """An open connection that is shut at the time limit, whatever it waits for; the event says that it was."""
        host, port = self._address.hostname or "", self._address.port
        connection: http.client.HTTPConnection
        if self._tls:
            connection = http.client.HTTPSConnection(host, port, context=self._tls)
        else:
            connection = http.client.HTTPConnection(host, port)
        connection.response_class = _BoundedResponse
        is_late = threading.Event()
        try:
            sock = socket.create_connection((connection.host, connection.port), self.timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:  # the handshake comes later, within the time limit
                sock = self._tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        except (OSError, UnicodeError) as error:  # UnicodeError: a host name that cannot be encoded
            raise AttemptError(f"no server answers there ({error})", fatal=True) from error
        connection.sock = sock
        timer = Timer(self.timeout, _shut_late, (sock, is_late))
        timer.daemon = True
        timer.start()
        try:
            with call.holding(sock):
                yield connection, is_late
        finally:
            timer.cancel()
            connection.close()

    def _refusal(self, status: int, retry_after: str, text: str) -> AttemptError:
        """The error of an answer with another status than 200."""
        is_server_error = status >= http.HTTPStatus.INTERNAL_SERVER_ERROR and status != _NOT_IMPLEMENTED
        is_temporary = status in _TEMPORARY or is_server_error
        wait = requested_wait(retry_after, time.time()) if is_temporary else 0.0
        message = f"it answered {status}: {self.quote(_error_message(text))}"
        if http.HTTPStatus.MULTIPLE_CHOICES <= status < http.HTTPStatus.BAD_REQUEST:
            message += " (redirects are not followed)"
        if wait > _LONGEST_REQUESTED_WAIT:
            return AttemptError(f"{message}; it wants no request for {wait:.0f} s", again=False, fatal=True)
        is_fatal = not is_temporary and status not in _REQUEST_AT_FAULT
        return AttemptError(message, again=is_temporary, fatal=is_fatal, wait=wait)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS sockets must keep their state for the thread that reads


def _shut_late(sock: socket.socket, is_late: threading.Event) -> None:
    is_late.set()
    _shut(sock)


def requested_wait(value: str, now: float) -> float:
    """Seconds of a Retry-After header at the time `now` (seconds since 1970); 0 for one that cannot be read.

    The header gives seconds or a date: RFC 9110, section 10.2.3.
    """
    try:
        if value.strip().isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def _error_message(text: str) -> str:
    """The message inside an error body, or the whole body."""
    with contextlib.suppress(ValueError):
        body = parse_json(text)
        error = body.get("error", body) if isinstance(body, dict) else body
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return str(error["message"])
    return text


def _address(base_url: str) -> SplitResult:
    """`base_url` taken apart, with `/v1` where it has no path."""
    try:
        address = urlsplit(base_url.rstrip("/"))
        is_valid = address.port is None or address.port > 0  # reading it raises for one that is no number
    except ValueError:
        raise ConfigError("base_url is no http(s)://host:port/v1: its port or host cannot be read") from None
    is_printable = base_url.isprintable() and " " not in base_url
    is_plain = is_printable and not (address.query or address.fragment or "@" in address.netloc)
    if address.scheme not in ("http", "https") or not (address.hostname and is_valid and is_plain):
        shown = f"{address.scheme}://{address.hostname}"  # no more of it: the rest may hold a secret
        raise ConfigError(f"base_url at '{shown}' is no plain http(s)://host:port/v1; set a key through api_key_env")
    return address if address.path else address._replace(path="/v1")


def _api_key(variable: str | None) -> str:
    """The key in the environment variable, "" without one."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise ConfigError(f"api_key_env: the environment variable '{variable}' is not set; export it or leave it out")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"api_key_env: '{variable}' has characters that no key has: beyond ASCII, or line breaks")
    return key

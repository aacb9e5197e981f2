"""A client of servers that speak the OpenAI chat API: vLLM first, `transformers serve` and hosted models as well.

Requests go out from a bounded number of threads. Each has a total time limit, so a server that sends byte by byte
cannot hold it. Temporary errors (connection refused, 5xx, 429, timeout, invalid reply) are retried with jitter; other
4xx are not. Replies are cached by content (`rewards.serving.reply_cache`). Only the standard library; JSON alone.
Left out: streaming, proxies, redirects, connections kept open (a picture's answer takes far longer than a handshake).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from tqdm import tqdm

from alignkit.errors import ConfigError, ServerError
from rewards.serving.reply_cache import NoLogprobsError, Reply, ReplyCache, content_key

Answer = TypeVar("Answer")
_LOG = logging.getLogger(__name__)
_PASSING = {408, 409, 425, 429}  # besides 5xx: worth another attempt
_NOT_IMPLEMENTED = http.HTTPStatus.NOT_IMPLEMENTED
_OWN_FAULT = {400, 413, 415, 422}  # this request's fault (too long, a picture too many); others may do better
_LONGEST_WAIT = 30.0  # seconds between attempts by ourselves
_LONGEST_REQUESTED_WAIT = 600.0  # seconds; a server that wants more has to be asked another day
_FAILURES_IN_A_ROW = 10
_SHOWN_BYTES = 300  # of a server's message
_BAR_AFTER = 5.0  # seconds


class _FaultError(Exception):
    """One attempt failed: whether another may help, whether it ends the run, seconds the server asked to wait."""

    def __init__(self, message: str, *, again: bool = True, fatal: bool = False, wait: float = 0.0) -> None:
        super().__init__(message)
        self.again, self.fatal, self.wait = again, fatal, wait


@dataclass(frozen=True, slots=True)
class Report:
    """What asking has cost so far; `cost` in the currency of the prices, None without; seconds of wall time."""

    requests: int
    cache_hits: int
    attempts: int
    retries: int
    failures: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cost: float | None
    abstentions: Mapping[str, int]

    def __str__(self) -> str:
        """One line: `cost` and each kind of abstention only where there are any."""
        parts = {name: value for name, value in asdict(self).items() if name not in ("seconds", "cost", "abstentions")}
        parts |= {f"abstained ({reason})": count for reason, count in sorted(self.abstentions.items())}
        cost = "" if self.cost is None else f", cost {self.cost:.4g}"
        counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in parts.items() if value)
        return f"{counts or 'nothing asked'}, {self.seconds:.1f} s{cost}"


class _Call:
    """What the threads of one `ask` share: whether it is over, and the connections to shut when it is."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._open: set[socket.socket] = set()

    @contextlib.contextmanager
    def holding(self, sock: socket.socket) -> Iterator[None]:
        """Within it the end of the call shuts `sock`, and at once if that has come."""
        self._open.add(sock)
        if self.over.is_set():
            _shut(sock)
        try:
            yield
        finally:
            self._open.discard(sock)

    def end(self) -> None:
        """Nobody waits, begins or reads any longer."""
        self.over.set()
        for sock in tuple(self._open):
            _shut(sock)


class ChatClient:
    """Asks one model of one server.

    base_url: `http://host:port/v1`; without a path, `/v1` is added.
    model: the name it is served under.
    api_key_env: the environment variable that holds the key, for servers that want one; the key itself is never
        written to the cache, the log or an error.
    concurrency: requests under way at once; a batching server is fastest with many.
    timeout: seconds for one attempt as a whole.
    retries: attempts after the first; before the n-th, a wait drawn from [0, min(backoff 2^n, 30)] seconds
        (full jitter), and no less than what `Retry-After` says.
    cache: folder of replies; None keeps nothing.
    identity: what tells weights of one name apart there, such as a revision. Without it the server is asked once where
        its weights come from (`root` in its list of models); where it does not say, replies are kept for this base_url
        alone. Weights exchanged under one path need another identity. With it the cache is read without a server.
    extra: fields added to each request, such as {"chat_template_kwargs": {"enable_thinking": False}}.
    prices: per million tokens, (read, written), for the report.
    rng: draws the jitter.

    Raises ConfigError for settings that cannot work.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
        cache: Path | str | None = None,
        identity: str = "",
        extra: Mapping[str, Any] | None = None,
        prices: Sequence[float] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._address = _address(base_url)
        self.url = self._address.geturl()
        if concurrency < 1 or timeout <= 0 or retries < 0 or (prices is not None and len(prices) != 2):
            raise ConfigError(
                f"a client of {base_url} needs concurrency >= 1, timeout > 0, retries >= 0 and two prices, got "
                f"{concurrency}, {timeout}, {retries} and {prices}"
            )
        self.model, self.identity, self.extra, self.prices = model, identity, dict(extra or {}), prices
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.backoff = backoff
        self.cache = ReplyCache(Path(cache)) if cache is not None else None
        self._key = _api_key(api_key_env)
        self._rng = rng or random.Random()
        self._slots = threading.BoundedSemaphore(concurrency)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        self._failed_in_a_row = 0

    def ask(self, requests: Sequence[Mapping[str, Any]], *, label: str = "asking") -> list[Reply | None]:
        """Replies of chat requests (`messages` and sampling parameters), in order; equal ones are asked once.

        None stands for a request that failed every attempt; each is logged. Raises ServerError naming the URL and what
        to do where the server cannot be reached, refuses the key or the model, gives no log-probabilities at all that
        were asked for, or fails ten requests in a row, of this call and those before. What was answered before is in
        the cache. A bar with the time left appears after five seconds.
        """
        bodies = [{"model": self.model, **request, **self.extra} for request in requests]
        call, start = _Call(), time.monotonic()
        if self.cache and not self.identity:
            self.identity = self._weights(call)
        keys = [content_key(body, self.identity) for body in bodies]
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                given = dict(zip(keys, bodies, strict=True))
                futures = {pool.submit(self._reply, key, body, call): key for key, body in given.items()}
                replies = self._gathered(futures, label)
            finally:  # also when a fault or Ctrl-C ends the call: what waits does not begin
                pool.shutdown(wait=False, cancel_futures=True)
                call.end()
                self._count(requests=len(requests))
                self._seconds += time.monotonic() - start
        return [replies[key] for key in keys]

    def report(self, abstentions: Mapping[str, int] | None = None) -> Report:
        """The cost since this client was made, with `abstentions` of whoever asked by reason."""
        names = ("requests", "cache_hits", "attempts", "retries", "failures", "prompt_tokens", "completion_tokens")
        with self._lock:
            counts = {name: self._counts[name] for name in names}
        used = counts["prompt_tokens"], counts["completion_tokens"]
        cost = sum(n * price for n, price in zip(used, self.prices, strict=True)) / 1e6 if self.prices else None
        return Report(**counts, seconds=self._seconds, cost=cost, abstentions=dict(abstentions or {}))

    def failure(self, message: str) -> ServerError:
        """An error that names the server and says how to get one that works."""
        return ServerError(
            f"{self.url} (model '{self.model}'): {message}. Start one with `vllm serve FOLDER --served-model-name "
            f"{self.model} --host 127.0.0.1 --port 8000`, or give base_url and model of one that runs; answers so far "
            f"are {'kept in ' + repr(str(self.cache.folder)) if self.cache else 'not kept: give a cache folder'}"
        )

    def _gathered(self, futures: Mapping[Future[Reply], str], label: str) -> dict[str, Reply | None]:
        replies: dict[str, Reply | None] = {}
        bar = tqdm(as_completed(futures), total=len(futures), desc=label, unit="request", delay=_BAR_AFTER, leave=False)
        for future in bar:
            try:
                replies[futures[future]] = future.result()
            except _FaultError as fault:
                self._count(failures=1)
                self._failed_in_a_row += 1
                if fault.fatal or self._failed_in_a_row >= _FAILURES_IN_A_ROW:
                    raise self.failure(str(fault)) from fault
                replies[futures[future]] = None
                _LOG.warning("%s: a request was given up: %s", self.url, fault)
        return replies

    def _reply(self, key: str, body: Mapping[str, Any], call: _Call) -> Reply:
        if self.cache and (known := self.cache.get(key)):
            self._count(cache_hits=1)
            return known
        sent, logprobs = json.dumps(body).encode(), bool(body.get("logprobs"))
        reply = self._persistent(lambda: self._attempt(sent, call, logprobs=logprobs), call)
        self._failed_in_a_row = 0
        self._count(prompt_tokens=reply.tokens[0], completion_tokens=reply.tokens[1])
        if self.cache:
            self.cache.put(key, reply)
        return reply

    def _weights(self, call: _Call) -> str:
        """Where the served weights come from as the server tells it, else its URL.

        `created` does not tell: vLLM gives the time of the question. A `root` that only repeats the name is no news.
        """
        try:
            text, _ = self._persistent(lambda: self._exchange("GET", "models", None, call), call)
            listed = json.loads(text)["data"]
            (card,) = (card for card in listed if card["id"] == self.model)
            root, parent = card["root"], card.get("parent")
        except (_FaultError, ValueError, LookupError, TypeError, AttributeError):
            return self.url
        return f"root={root} parent={parent}" if root and root != self.model else self.url

    def _persistent(self, attempted: Callable[[], Answer], call: _Call) -> Answer:
        """Attempts until one is answered."""
        attempt = 0
        while True:
            try:
                with self._slots:
                    return attempted()
            except _FaultError as fault:
                if not fault.again or attempt == self.retries:
                    raise
                with self._lock:
                    drawn = self._rng.uniform(0, min(self.backoff * 2**attempt, _LONGEST_WAIT))
                if call.over.wait(max(drawn, fault.wait)):
                    raise
                self._count(retries=1)
                attempt += 1

    def _attempt(self, body: bytes, call: _Call, *, logprobs: bool) -> Reply:
        self._count(attempts=1)
        text, is_late = self._exchange("POST", "chat/completions", body, call)
        try:
            return Reply.from_body(text, needs_logprobs=logprobs)
        except NoLogprobsError as error:
            advice = "it gives no log-probabilities, which this needs; vLLM does"
            raise _FaultError(advice, again=False, fatal=True) from error
        except ValueError as error:
            late = f" after {self.timeout:g} s" if is_late else ""
            raise _FaultError(f"no chat completion{late} ({error}): {text[:_SHOWN_BYTES]!r}") from error

    def _exchange(self, method: str, path: str, body: bytes | None, call: _Call) -> tuple[str, bool]:
        """The text of a good answer, and whether the time was up while it came."""
        with self._connection(call) as (connection, is_late):
            try:
                connection.request(method, f"{self._address.path}/{path}", body, self._headers())
                response = connection.getresponse()
                text = self._hidden(response.read().decode("utf-8", errors="replace"))
            except (OSError, http.client.HTTPException) as error:
                late = f"no answer within {self.timeout:g} s"
                broke = self._hidden(f"the answer broke off: {error!r}")
                raise _FaultError(late if is_late.is_set() else broke) from None
        if response.status != http.HTTPStatus.OK:
            raise _refusal(response.status, response.getheader("Retry-After", ""), text)
        return text, is_late.is_set()

    @contextlib.contextmanager
    def _connection(self, call: _Call) -> Iterator[tuple[http.client.HTTPConnection, threading.Event]]:
        """An open connection that is shut when the time is up, whatever it waits for; the event says so."""
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._address.hostname or "", self._address.port, timeout=self.timeout)
        is_late = threading.Event()
        try:
            connection.connect()
        except OSError as error:
            raise _FaultError(f"no server answers there ({error})", fatal=True) from error
        timer = threading.Timer(self.timeout, lambda sock=connection.sock: (is_late.set(), _shut(sock)))
        timer.daemon = True
        timer.start()
        try:
            with call.holding(connection.sock):
                yield connection, is_late
        finally:
            timer.cancel()
            connection.close()

    def _headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})

    def _hidden(self, text: str) -> str:
        """`text` without the key, which a server may repeat in its messages."""
        return text.replace(self._key, "***") if self._key else text

    def _count(self, **more: int) -> None:
        with self._lock:
            self._counts.update(more)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it ended in this moment
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS sockets must keep their state for the thread that reads


def _refusal(status: int, retry_after: str, text: str) -> _FaultError:
    passing = status in _PASSING or (status >= http.HTTPStatus.INTERNAL_SERVER_ERROR and status != _NOT_IMPLEMENTED)
    wait = _requested_wait(retry_after) if passing else 0.0
    message = f"it answered {status}: {_server_message(text)}"
    if wait > _LONGEST_REQUESTED_WAIT:
        return _FaultError(f"{message}; it wants no request for {wait:.0f} s", again=False, fatal=True)
    return _FaultError(message, again=passing, fatal=not passing and status not in _OWN_FAULT, wait=wait)


def _requested_wait(value: str) -> float:
    """Seconds of a Retry-After header, given as seconds or as a date; 0 without one."""
    try:
        if value.strip().isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _server_message(text: str) -> str:
    """The message inside an error body, or its beginning."""
    with contextlib.suppress(ValueError):
        body = json.loads(text)
        error = body.get("error", body) if isinstance(body, dict) else body
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return str(error["message"])[:_SHOWN_BYTES]
    return repr(text[:_SHOWN_BYTES])


def _address(base_url: str) -> SplitResult:
    """`base_url` taken apart, with `/v1` where it has no path."""
    try:
        address = urlsplit(base_url.rstrip("/"))
        is_valid = address.port is None or address.port > 0  # reading it raises for one that is no number
    except ValueError:
        raise ConfigError("base_url is no http(s)://host:port/v1: its port or host cannot be read") from None
    is_plain = not (address.query or address.fragment or "@" in address.netloc)
    if address.scheme not in ("http", "https") or not (address.hostname and is_valid and is_plain):
        shown = f"{address.scheme}://{address.hostname}"  # no more of it: the rest may hold a secret
        raise ConfigError(f"base_url at '{shown}' is no plain http(s)://host:port/v1; a key comes by api_key_env")
    return address if address.path else address._replace(path="/v1")


def _api_key(variable: str | None) -> str:
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key.strip():
        raise ConfigError(f"api_key_env: the environment variable '{variable}' is not set; export it or leave it out")
    if not key.strip().isascii() or not key.strip().isprintable():
        raise ConfigError(f"api_key_env: '{variable}' holds something that is no key: letters beyond ASCII, or lines")
    return key.strip()

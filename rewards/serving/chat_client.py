"""A client of servers with the OpenAI chat API: mainly vLLM; also `transformers serve` and hosted models.

Requests go out from a bounded number of threads. Each has a total time limit and a limit of bytes
(`rewards.serving.http_exchange`). Temporary errors (connection refused, 5xx, 429, timeout, invalid reply) are retried
with jitter; other 4xx are not. Complete replies are cached by content (`rewards.serving.reply_cache`). Only the
standard library; JSON alone. Left out: streaming, proxies, redirects, connections kept open.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from alignkit.errors import ConfigError, ServerError
from alignkit.escape import get_logger, to_line
from rewards.serving.bounded_json import parse_json
from rewards.serving.http_exchange import AttemptError, Call, Endpoint
from rewards.serving.reply_cache import NoLogprobsError, Reply, ReplyCache, UnusableReplyError, content_key

Result = TypeVar("Result")
_LOG = get_logger(__name__)
_LONGEST_BACKOFF = 30.0  # seconds between attempts, unless the server wants more
_FAILURES_IN_A_ROW = 10
_BAR_AFTER = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class Report:
    """What the requests have cost so far; `cost` in the currency of the prices, None without; seconds of wall time."""

    requests: int
    cache_hits: int
    damaged_cache_files: int
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
        return f"{counts or 'no requests'}, {self.seconds:.1f} s{cost}"


class ChatClient:
    """Sends requests to one model of one server.

    base_url: `http://host:port/v1`; without a path, `/v1` is added.
    model: the name it is served under.
    api_key_env: the environment variable that holds the key, for servers that want one; the key itself is never
        written to the cache, the log or an error.
    concurrency: requests sent at the same time; a batching server is fastest with many.
    timeout: seconds for one attempt as a whole; connecting has the same limit of its own.
    retries: attempts after the first; before the n-th, a random wait from [0, min(backoff 2^n, 30)] seconds
        (full jitter), and no less than what `Retry-After` requests.
    cache: folder of replies; None stores nothing.
    identity: distinguishes weights of one name in the cache, such as a revision. Without it the client requests the
        origin of the weights once (`root` in the server's list of models); if the server has none, replies are stored
        for this base_url alone. Other weights under the same path need another identity. With it the cache can be
        read without a server.
    extra: fields added to each request, such as {"chat_template_kwargs": {"enable_thinking": False}}.
    prices: per million tokens, (read, written), for the report.
    rng: source of the jitter.

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
        self._endpoint = Endpoint(base_url, api_key_env, timeout)
        self.url = self._endpoint.url
        if concurrency < 1 or timeout <= 0 or retries < 0 or (prices is not None and len(prices) != 2):
            raise ConfigError(
                f"a client of {base_url} needs concurrency >= 1, timeout > 0, retries >= 0 and two prices, got "
                f"{concurrency}, {timeout}, {retries} and {prices}"
            )
        self.model, self.identity, self.extra, self.prices = model, identity, dict(extra or {}), prices
        self.concurrency, self.retries, self.backoff = concurrency, retries, backoff
        self.cache = ReplyCache(Path(cache)) if cache is not None else None
        self._rng = rng or random.Random()
        self._slots = threading.BoundedSemaphore(concurrency)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        self._failed_in_a_row = 0

    def ask(
        self,
        requests: Sequence[Mapping[str, Any]],
        *,
        label: str = "requests",
        allow_cut_off: bool = False,
        refused: set[int] | None = None,
    ) -> list[Reply | None]:
        """Replies of chat requests (`messages` and sampling parameters), in order; equal ones are sent once.

        allow_cut_off: a reply that ends at `max_tokens` is as good as one that the model ended, such as a first token.
        Otherwise it is returned (`Reply.is_cut_off`) and not cached.
        refused: gets the places of the failed requests that would fail again (a content filter, a text that is too
        long).

        None stands for a request that failed every attempt; each is logged. Raises ServerError naming the URL and what
        to do where the server cannot be reached, refuses the key or the model, gives no log-probabilities at all that
        were requested, or fails ten requests in a row, of this call and those before. Replies received before that are
        in the cache. A bar with the time left appears after five seconds.
        """
        bodies = [{"model": self.model, **request, **self.extra} for request in requests]
        call, start = Call(), time.monotonic()
        if self.cache and not self.identity:
            self.identity = self._served_weights(call)
        keys = [content_key(body, self.identity) for body in bodies]
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                distinct = dict(zip(keys, bodies, strict=True))
                futures = {
                    pool.submit(self._reply, key, body, call, allow_cut_off=allow_cut_off): key
                    for key, body in distinct.items()
                }
                replies, lost = self._gather(futures, call, label)
            finally:  # also when an error or Ctrl-C ends the call: requests that wait are not sent
                pool.shutdown(wait=False, cancel_futures=True)
                call.end()
                self._count(requests=len(requests))
                self._seconds += time.monotonic() - start
        if refused is not None:
            refused.update(place for place, key in enumerate(keys) if key in lost)
        return [replies[key] for key in keys]

    def report(self, abstentions: Mapping[str, int] | None = None) -> Report:
        """The cost since this client was made, with the caller's `abstentions` by reason."""
        names = ("requests", "cache_hits", "attempts", "retries", "failures", "prompt_tokens", "completion_tokens")
        with self._lock:
            counts = {name: self._counts[name] for name in names}
        tokens = counts["prompt_tokens"], counts["completion_tokens"]
        cost = sum(n * price for n, price in zip(tokens, self.prices, strict=True)) / 1e6 if self.prices else None
        totals = {**counts, "damaged_cache_files": self.cache.damaged if self.cache else 0}
        return Report(**totals, seconds=self._seconds, cost=cost, abstentions=dict(abstentions or {}))

    def failure(self, message: str) -> ServerError:
        """An error that names the server and how to start one."""
        return ServerError(
            f"{self.url} (model '{self.model}'): {message}. Start one with `vllm serve FOLDER --served-model-name "
            f"{self.model} --host 127.0.0.1 --port 8000`, or give base_url and model of one that runs; replies so far "
            f"are {'stored in ' + repr(str(self.cache.folder)) if self.cache else 'not stored: give a cache folder'}"
        )

    def _gather(
        self, futures: Mapping[Future[Reply], str], call: Call, label: str
    ) -> tuple[dict[str, Reply | None], set[str]]:
        """The replies by the request's key, and the keys of those that would fail again."""
        replies: dict[str, Reply | None] = {}
        lost: set[str] = set()
        shown = {"desc": to_line(label), "unit": "request", "delay": _BAR_AFTER, "leave": False}
        bar = tqdm(as_completed(futures), total=len(futures), **shown)
        for future in bar:
            try:
                replies[futures[future]] = future.result()
            except AttemptError as error:
                if call.cause:
                    raise self.failure(str(call.cause)) from call.cause
                replies[futures[future]] = None
                if not error.again:
                    lost.add(futures[future])
                _LOG.warning("%s: a request failed every attempt: %s", self.url, error)
        return replies, lost

    def _reply(self, key: str, body: Mapping[str, Any], call: Call, *, allow_cut_off: bool) -> Reply:
        """The reply from the cache or the server. An error that ends the run ends the call here, in its own thread."""
        cached = self.cache.get(key) if self.cache else None
        if cached and (allow_cut_off or not cached.is_cut_off):
            self._count(cache_hits=1)
            return cached
        content, logprobs = json.dumps(body).encode(), bool(body.get("logprobs"))
        try:
            reply = self._persist(lambda: self._attempt(content, call, logprobs=logprobs), call)
        except AttemptError as error:
            self._count_failure(error, call)
            raise
        self._failed_in_a_row = 0
        self._count(prompt_tokens=reply.tokens[0], completion_tokens=reply.tokens[1])
        if self.cache and (allow_cut_off or not reply.is_cut_off):
            self.cache.put(key, reply)
        return reply

    def _count_failure(self, error: AttemptError, call: Call) -> None:
        if call.over.is_set():  # its connection was shut, which is no failure of the server
            return
        with self._lock:
            self._counts["failures"] += 1
            self._failed_in_a_row += 1
            ends_call = error.fatal or self._failed_in_a_row >= _FAILURES_IN_A_ROW
        if ends_call:
            call.end(error)

    def _served_weights(self, call: Call) -> str:
        """The origin of the served weights as the server states it, else the server's URL.

        `created` does not help: vLLM gives the time of the request. A `root` equal to the name identifies nothing.
        """
        try:
            text = self._persist(lambda: self._endpoint.exchange("GET", "models", None, call), call)
            cards = parse_json(text)["data"]
            (card,) = (card for card in cards if card["id"] == self.model)
            root, parent = card["root"], card.get("parent")
        except (AttemptError, ValueError, LookupError, TypeError, AttributeError):
            return self.url
        return f"root={root} parent={parent}" if root and root != self.model else self.url

    def _persist(self, attempted: Callable[[], Result], call: Call) -> Result:
        """Attempts until one succeeds or no more are allowed."""
        attempt = 0
        while True:
            try:
                with self._slots:
                    call.require_open()
                    return attempted()
            except AttemptError as error:
                if not error.again or attempt == self.retries:
                    raise
                with self._lock:
                    wait = self._rng.uniform(0, min(self.backoff * 2**attempt, _LONGEST_BACKOFF))
                if call.over.wait(max(wait, error.wait)):
                    raise
                self._count(retries=1)
                attempt += 1

    def _attempt(self, body: bytes, call: Call, *, logprobs: bool) -> Reply:
        self._count(attempts=1)
        text = self._endpoint.exchange("POST", "chat/completions", body, call)
        try:
            reply = Reply.from_body(text, needs_logprobs=logprobs)
        except NoLogprobsError:
            advice = "it gives no log-probabilities, which this needs; vLLM does"
            raise AttemptError(advice, again=False, fatal=True) from None
        except UnusableReplyError as error:
            raise AttemptError(self._endpoint.quote(str(error)), again=False) from None
        except ValueError as error:
            quoted = self._endpoint.quote(text)
            raise AttemptError(f"no chat completion ({self._endpoint.quote(str(error))}): {quoted}") from None
        hide = self._endpoint.hide
        return replace(reply, text=hide(reply.text), first=tuple((hide(token), value) for token, value in reply.first))

    def _count(self, **more: int) -> None:
        with self._lock:
            self._counts.update(more)

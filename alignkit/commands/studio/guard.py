"""What a server on loopback refuses: other host names, requests of other pages; and what its page may load.

Other web pages in the same browser can send requests to this machine, and a host name of theirs can lead here. An ASGI
middleware, so it stands before all that Gradio serves.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")
# Gradio's own page needs its inline scripts and evaluates templates; nothing may come from another origin.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Guard:
    """Answers 421 for another host name and 403 for another page; adds the headers of safety to all other answers."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = refused({name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]})
        if scope["type"] != "http" or refusal:  # Gradio has no web sockets
            start = {"type": "http.response.start", "status": refusal or 403, "headers": []}
            await send(start)
            await send({"type": "http.response.body", "body": b"open the page by the address that the program printed"})
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self._app(scope, receive, send_guarded)


def refused(headers: MutableMapping[str, str]) -> int | None:
    """The status of a request with these headers, by their names in lower case; None for one that is answered."""
    host = headers.get("host", "")
    if not _HOST.fullmatch(host):
        return 421
    if headers.get("origin", f"http://{host}") != f"http://{host}":
        return 403
    is_link = headers.get("sec-fetch-mode") == "navigate"  # a link to the page may be anywhere
    is_foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    return 403 if is_foreign and not is_link else None

"""What every request passes first: the names under which the page may be reached, the sites that may call it, and sizes.

A page of another site cannot read or write here. It would send its own `Origin`; and if it had its own name resolve to this
machine (DNS rebinding), that name would be the `Host`.
"""

import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

LARGEST_BODY = 256 * 1024  # bytes: the longest texts, were each of their characters escaped
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class OriginGuard:
    """Wraps an ASGI application.

    Args:
        app: what it guards.
        names: host names under which the page is reached, besides localhost and loopback addresses.
        addresses: whether any IP address will do as `Host`: it cannot be rebound.
    """

    def __init__(self, app: Application, names: frozenset[str] = frozenset(), addresses: bool = False) -> None:
        self.app, self.names, self.addresses = app, names | {"localhost"}, addresses

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes on what is not refused, and adds the headers."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        refusal = self._refusal(scope["method"], _headers(scope))
        if refusal:
            return await _refuse(send_guarded, *refusal)
        return await self.app(scope, receive, send_guarded)

    def _refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason, if the request is not for the application."""
        host = headers.get("host", "")
        if not self._is_ours(host):
            return 421, f"This page is not reached under the name {host!r}: whoever started it can add it by --name."
        origin = headers.get("origin")
        if (origin is not None and _netloc(origin) != host) or headers.get("sec-fetch-site") == "cross-site":
            return 403, "Requests from other sites are refused."
        if method not in ("GET", "HEAD"):
            length = headers.get("content-length", "")
            if not length.isdecimal():
                return 411, "A request says how long it is."
            if int(length) > LARGEST_BODY:
                return 413, f"A request has {LARGEST_BODY} bytes at most."
            if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return 415, "A request is JSON."
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if set(host) & set("@/?#"):  # more than a name and a port
            return False
        if name in self.names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.addresses or address.is_loopback


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _headers(scope: Message) -> dict[str, str]:
    """Headers by name; of one that stands twice, both, which then is nothing that is allowed."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

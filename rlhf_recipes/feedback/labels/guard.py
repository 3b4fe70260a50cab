"""Host, origin and size of requests, and the security headers of responses.

Requests of another site carry its `Origin`, or its `Host` if that name resolves to this machine (DNS rebinding).
"""

import ipaddress
import re
from collections.abc import Iterable

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_BODY = 256 * 1024  # bytes: the longest texts, with every character escaped
_TOO_LARGE = f"A request has {MAX_BODY} bytes at most."
SECURITY_HEADERS = {
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
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:/?#@\[\]]+))(?::\d+)?")


class OriginGuard:
    """ASGI middleware; TrustedHostMiddleware knows neither addresses nor origins.

    Args:
        app: the application.
        names: host names of the page, besides localhost and loopback addresses.
        any_address: whether the host may be any IP address, which cannot be rebound.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str] = (), any_address: bool = False) -> None:
        self.app, self.any_address = app, any_address
        self.names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or reject a request."""
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise HTTPException(413, _TOO_LARGE)
            return message

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        rejection = self._reject(scope["method"], Headers(scope=scope))
        # Starlette answers a malformed range in plain text, and the page's files are small
        scope = scope | {"headers": [(name, value) for name, value in scope["headers"] if name != b"range"]}
        await (rejection or self.app)(scope, receive_limited, send_guarded)

    def _reject(self, method: str, headers: Headers) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_trusted(host):
            return _response(421, f"This page is not served under the name {host!r}: whoever started it can add --name.")
        if (origin is not None and origin.partition("://")[2] != host) or headers.get("sec-fetch-site") == "cross-site":
            return _response(403, "Requests from other sites are refused.")
        length = headers.get("content-length", "0" if method in ("GET", "HEAD") else "")
        if not length.isdecimal() or "transfer-encoding" in headers:
            return _response(411, "A request needs a content-length, and no transfer-encoding.")
        return _response(413, _TOO_LARGE) if int(length) > MAX_BODY else None

    def _is_trusted(self, host: str) -> bool:
        match = _HOST.fullmatch(host.lower())
        name = match and (match[1] or match[2])
        if not name or name in self.names:
            return bool(name)
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.any_address or address.is_loopback


def _response(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers={"connection": "close"})


class Protocol(H11Protocol):
    """HTTP/1.1 that answers what is not HTTP as it answers other mistakes."""

    def send_400_response(self, msg: str) -> None:
        """Answer and close the connection."""
        response = _response(400, msg)
        headers = [*response.raw_headers, *((name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items())]
        reply = (h11.Response(status_code=400, reason=b"Bad Request", headers=headers), h11.Data(data=bytes(response.body)))
        for event in (*reply, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

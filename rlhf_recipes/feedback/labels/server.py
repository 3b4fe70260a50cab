"""Listen for the page: on the loopback address, or elsewhere with a password."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterable

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.labels.store import Store

MIN_PASSWORD = 8
_INSTALL = "python -m pip install --constraint constraints.txt --editable '.[label]'"


def serve(store: Store, listener: socket.socket, password: str = "", names: Iterable[str] = ()) -> None:
    """Serve the page on a socket from `listen` until interrupted, and close it."""
    from rlhf_recipes.feedback.labels.app import make_server

    with listener:
        server = make_server(store, password, names, any_address=not _is_loopback(listener.getsockname()))
        print(f"Label at {url_of(listener)} (Ctrl-C ends; saved labels are safe)", flush=True)
        print(
            f"{store.overlap:.0%} of the prompts go to every labeller, each of the others to one: if you are alone, to you",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def listen(host: str, port: int, password: str = "") -> socket.socket:
    """Return a listening socket, of any free port if `port` is 0.

    Raises:
        RecipeError: if the extra `label` is not installed, nothing can listen there, or others could reach the page without a
            password.
    """
    try:
        import rlhf_recipes.feedback.labels.app  # noqa: F401
    except ImportError as error:
        raise RecipeError(f"The page needs the extra `label` (missing: {error.name}). Fix: in the clone, {_INSTALL}") from error
    if not 0 <= port <= 65535:  # the system would take it modulo 65536
        raise RecipeError(f"--port: {port}: not a port. Fix: give one from 0 to 65535")
    if password and (not password.isprintable() or len("".join(password.split())) < MIN_PASSWORD):
        raise RecipeError(f"--password-env: too weak a password. Fix: use {MIN_PASSWORD} printable characters besides blanks")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if not _is_loopback(address) and not password:
            raise RecipeError(
                f"--host: {host}: others could read and write labels there. Fix: name an environment variable with a password "
                "by --password-env, or listen on 127.0.0.1"
            )
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        problem = f"cannot listen on port {port} ({error.strerror})"
        raise RecipeError(f"--host: {host}: {problem}. Fix: give an address of this machine, and a free --port") from error


def _is_loopback(address: tuple) -> bool:
    return ipaddress.ip_address(address[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket, if possible one for other machines."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = _outward_address(listener.family) or host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _outward_address(family: socket.AddressFamily) -> str | None:
    """Return the address of this machine on its network, or None."""
    documentation = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"  # reserved addresses: nothing is sent to them
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((documentation, 9))
        return probe.getsockname()[0]
    return None

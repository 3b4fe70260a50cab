"""Where the page listens: on the loopback address, unless there is a password."""

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Iterable

from rlhf_recipes.core.errors import RecipeError
from rlhf_recipes.feedback.labels.store import Store

SHORTEST_PASSWORD = 8
_INSTALL = "python -m pip install --constraint constraints.txt --editable '.[label]'"


def serve(store: Store, listener: socket.socket, password: str = "", names: Iterable[str] = ()) -> None:
    """Serves the page until it is interrupted.

    Args:
        store: where groups come from and labels go.
        listener: from `listen`; closed at the end.
        password: what labellers must give.
        names: host names under which others reach the page.
    """
    from rlhf_recipes.feedback.labels.app import make_server

    with listener:
        server = make_server(store, password, names, addresses=not _is_loopback(listener.getsockname()))
        print(f"Label at {address_of(listener)} (Ctrl-C ends; what was saved is safe)", flush=True)
        print(f"Everyone is given {store.overlap:.0%} of the prompts, one labeller each of the others", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def listen(host: str, port: int, password: str = "") -> socket.socket:
    """A socket that listens; called before a store is opened, so that what cannot be served changes nothing.

    Args:
        host: address or name to listen on.
        port: to listen on; 0 for any that is free.
        password: of the page; needed where `host` is not a loopback address.

    Raises:
        RecipeError: if the extra `label` is not installed, nothing can listen there, or others could reach it without a
            password.
    """
    try:
        import rlhf_recipes.feedback.labels.app  # noqa: F401
    except ImportError as error:
        raise RecipeError(f"The page needs the extra `label` (there is no {error.name}). In the clone: {_INSTALL}") from error
    if not 0 <= port <= 65535:  # the system would take what is left of it by 65536
        raise RecipeError(f"--port {port}: there is no such port: give one from 0 to 65535")
    if password and len(password) < SHORTEST_PASSWORD:
        raise RecipeError(f"The password has {len(password)} letters: take {SHORTEST_PASSWORD} or more")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, OverflowError) as error:
        raise RecipeError(f"--host {host} --port {port}: no address to listen on ({error})") from error
    if not _is_loopback(address) and not password:
        raise RecipeError(
            f"--host {host}: others could reach the page there, and read and write labels: set a password in the environment "
            "and name its variable by --password-env, or listen on 127.0.0.1"
        )
    try:
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise RecipeError(f"--host {host} --port {port}: {_why_not(error)}") from error


def _is_loopback(address: tuple) -> bool:
    return ipaddress.ip_address(address[0]).is_loopback


def _why_not(error: Exception) -> str:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return "the port is in use, perhaps by another label.py: end that, or give another --port"
    if code == errno.EACCES:
        return "this user may not listen on that port: give a --port above 1023"
    return f"cannot listen there ({os.strerror(code) if code else error}): give an address of this machine"


def address_of(listener: socket.socket) -> str:
    """A URL of what listens; of what listens on all addresses, one that other machines can open too."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = _outward(listener.family) or host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _outward(family: socket.AddressFamily) -> str | None:
    """The address of this machine that others see; None where it is on no network."""
    documentation = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"  # nobody's: nothing is sent to it
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((documentation, 9))
        return probe.getsockname()[0]
    return None

"""Where the page listens: on the loopback address, unless there is a password."""

import contextlib
import errno
import ipaddress
import os
import socket
from collections.abc import Iterable

from rlhf_recipes.errors import RecipeError
from rlhf_recipes.labels.store import Store

SHORTEST_PASSWORD = 8
_INSTALL = "python -m pip install --constraint constraints.txt --editable '.[label]'"


def serve(store: Store, host: str, port: int, password: str = "", names: Iterable[str] = ()) -> None:
    """Serves the page until it is interrupted.

    Args:
        store: where groups come from and labels go.
        host: address or name to listen on.
        port: to listen on; 0 for any that is free.
        password: what labellers must give; needed where `host` is not a loopback address.
        names: host names under which others reach the page.

    Raises:
        RecipeError: if the extra `label` is not installed, there is no password where one is needed, or nothing can listen
            there.
    """
    try:
        from rlhf_recipes.labels.app import make_server
    except ImportError as error:
        raise RecipeError(f"The page needs the extra `label` (there is no {error.name}). In the clone: {_INSTALL}") from error
    listener, is_loopback = listen(host, port, password)
    with listener:
        server = make_server(store, password, names, addresses=not is_loopback)
        print(f"Label at {address_of(listener)} (Ctrl-C ends; what was saved is safe)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def listen(host: str, port: int, password: str) -> tuple[socket.socket, bool]:
    """A socket that listens, and whether on a loopback address.

    Raises:
        RecipeError: if nothing can listen there, or others could reach it without a password.
    """
    if password and len(password) < SHORTEST_PASSWORD:
        raise RecipeError(f"The password has {len(password)} letters: take {SHORTEST_PASSWORD} or more")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, OverflowError) as error:
        raise RecipeError(f"--host {host} --port {port}: no address to listen on ({error})") from error
    is_loopback = ipaddress.ip_address(address[0]).is_loopback
    if not is_loopback and not password:
        raise RecipeError(
            f"--host {host}: others could reach the page there, and read and write labels: set a password in the environment "
            "and name its variable by --password-env, or listen on 127.0.0.1"
        )
    try:
        return socket.create_server(address[:2], family=family), is_loopback
    except (OSError, OverflowError) as error:
        raise RecipeError(f"--host {host} --port {port}: {_why_not(error)}") from error


def _why_not(error: Exception) -> str:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return "the port is in use, perhaps by another label.py: end that, or give another --port"
    if code == errno.EACCES:
        return "this user may not listen on that port: give a --port above 1023"
    return f"cannot listen there ({os.strerror(code) if code else error}): give an address of this machine"


def address_of(listener: socket.socket) -> str:
    """The URL of what listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

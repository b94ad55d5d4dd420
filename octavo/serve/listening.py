"""Where a server listens: an address or a UNIX socket, with TLS or without."""

import ipaddress
import shlex
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import OctavoError


@dataclass(frozen=True)
class Tls:
    """A certificate with its chain, and its key where that is a file of its own (PEM)."""

    certificate: Path
    key: Path | None = None

    def check(self) -> None:
        """Raise OctavoError if the files do not make a server's certificate. One whose key has a password is refused:
        nobody is there to type it."""
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password=_none)
        except (OSError, ValueError) as error:  # ssl's own errors are OSErrors
            files = " and ".join(str(file) for file in (self.certificate, self.key) if file)
            why = "the key has a password" if isinstance(error, ValueError) else error.strerror or error
            raise OctavoError(f"TLS by {files} is not possible: {why}") from None


def _none() -> str:
    raise ValueError


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = getattr(error, "strerror", None) or error
        raise OctavoError(f"{host}:{port} cannot be served: {reason}; choose another --host or --port") from None
    return sock


def bind_unix(path: Path) -> socket.socket:
    """A UNIX socket. A file that a server which has ended left there is replaced; anything else there is refused."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket() and not _answers(path):
            path.unlink()
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise OctavoError(f"{path} cannot be served: {error.strerror or error}; choose another --uds") from None
    return sock


@contextmanager
def listening(sock: socket.socket) -> Iterator[socket.socket]:
    """Closes the socket in the end, and removes a UNIX socket's file."""
    path = sock.getsockname() if sock.family == socket.AF_UNIX else None
    with sock:
        try:
            yield sock
        finally:
            if path:
                Path(path).unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    """Whether somebody listens there."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def is_local(sock: socket.socket) -> bool:
    """Whether only programs of this machine reach it."""
    if sock.family == socket.AF_UNIX:
        return True
    return ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback


def url(sock: socket.socket, tls: bool = False) -> str:
    """The address, as clients on this machine name it."""
    if sock.family == socket.AF_UNIX:
        return f"unix:{sock.getsockname()}"
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def curl(sock: socket.socket, tls: bool, key: bool, chat: bool) -> str:
    """A first request, to be pasted into a shell."""
    unix = sock.family == socket.AF_UNIX
    where = ["--unix-socket", shlex.quote(sock.getsockname()), "http://localhost"] if unix else [url(sock, tls)]
    route, body = (
        ("chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}')
        if chat
        else ("completions", '{"prompt": "Once upon a time", "max_tokens": 64}')
    )
    *before, base = where
    parts: list[Any] = ["curl", *(["--insecure"] if tls else []), *before, f"{base}/v1/{route}"]
    parts += ["-H", "'Content-Type: application/json'"]
    if key:
        parts += ["-H", '"Authorization: Bearer $OCTAVO_API_KEY"']
    return " ".join([*parts, "-d", f"'{body}'"])

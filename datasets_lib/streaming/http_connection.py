"""Connections to servers that are not trusted: an answer has a deadline, and redirects have limits."""

from __future__ import annotations

import io
import ipaddress
import socket
import time
import urllib.request
from functools import partial
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from datasets_lib.errors import FileError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class Download:
    """Holds the limits of one answer with all its redirects: when it must have ended, and whom it may come from."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds
        self.began_public: bool | None = None

    def left(self) -> float:
        """Returns the seconds that are left; raises OSError if there are none."""
        if (left := self.end - time.monotonic()) > 0:
            return left
        raise TimeoutError(f"the server took longer than {self.seconds:.0f} s for a part")

    def check(self, address: str) -> None:
        """Raises OSError for a private address to which a public server has redirected."""
        public = is_public(address)
        if self.began_public is None:
            self.began_public = public
        if self.began_public and not public:
            raise FileError(f"the server redirects to {address}, an address that is not public")


def is_public(address: str) -> bool:
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_global


class TimedReads(io.RawIOBase):
    """Reads from a socket; each wait ends with the download's deadline, and none takes longer than the socket's."""

    def __init__(self, connected: socket.socket, download: Download) -> None:
        self.socket, self.download, self.longest = connected, download, connected.gettimeout()
        self.raw = connected.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        left = self.download.left()
        self.socket.settimeout(left if self.longest is None else min(left, self.longest))
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


class TimedSocket:
    """A connected socket as HTTPConnection uses it."""

    def __init__(self, connected: socket.socket, download: Download) -> None:
        self.connected, self.download = connected, download

    def makefile(self, mode: str) -> IO[bytes]:
        return io.BufferedReader(TimedReads(self.connected, self.download))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connected, name)


def _connection(kind: type[HTTPConnection], download: Download, host: str, **options: Any) -> HTTPConnection:
    connection = kind(host, **options)
    connect = connection.connect

    def timed() -> None:
        connect()
        download.check(connection.sock.getpeername()[0])
        connection.sock = TimedSocket(connection.sock, download)

    connection.connect = timed  # type: ignore[method-assign]  # urllib makes the connection, and nobody else
    return connection


class TimedHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens both schemes with the download's connections; being both, it takes the place of urllib's own handlers."""

    def __init__(self, download: Download) -> None:
        super().__init__()
        self.download = download

    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_connection, HTTPConnection, self.download), req)

    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(partial(_connection, HTTPSConnection, self.download), req)


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to the same scheme, or from http to https."""

    def redirect_request(self, req: urllib.request.Request, *rest: Any) -> urllib.request.Request | None:
        scheme = urlsplit(rest[-1]).scheme
        if scheme not in (req.type, "https"):
            raise FileError(f"the server redirects from {req.type} to {scheme}, which is not followed")
        return super().redirect_request(req, *rest)


def opener(seconds: float) -> urllib.request.OpenerDirector:
    """Returns what opens one URL and reads its answer in at most this many seconds."""
    download = Download(seconds)
    return urllib.request.build_opener(TimedHandler(download), Redirects)

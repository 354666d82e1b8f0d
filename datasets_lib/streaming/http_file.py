"""A file behind http or https, read in parts: what is not asked for is not transferred."""

from __future__ import annotations

import base64
import io
import urllib.error
import urllib.request
from http.client import HTTPResponse
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PART_BYTES = 4 << 20  # of one request
TIMEOUT_SECONDS = 60.0


class HttpFile(io.RawIOBase):
    """The bytes of a URL; every read is one request for a range. Raises OSError if the server has no such file.

    A server without ranges is an error too: each part would transfer the whole file. A user and password in the URL
    are sent as basic authorization, to that server alone.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        self.url, self.user = parts._replace(netloc=host).geturl(), unquote(user)
        self.place = 0
        with self._request(0, 0) as response:
            _, _, size = response.headers.get("Content-Range", "").partition("/")
        if response.status != 206 or not size.isdecimal():
            raise OSError("the server does not serve parts of files (no answer 206 to a Range)")
        self.size = int(size)

    def _request(self, first: int, last: int) -> HTTPResponse:
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={first}-{last}"})
        if self.user:
            encoded = base64.b64encode(self.user.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {encoded}")
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            raise OSError(f"the server answers {error.code} {error.reason}") from None  # the error holds the URL

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = max(start + offset, 0)
        return self.place

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        wanted = min(len(view), self.size - self.place)
        if wanted <= 0:
            return 0
        with self._request(self.place, self.place + wanted - 1) as response:
            part = response.read()
        if len(part) != wanted:
            raise OSError(f"the server sent {len(part)} of {wanted} bytes")
        view[:wanted] = part
        self.place += wanted
        return wanted


def open_url(url: str) -> IO[bytes]:
    """Open a URL for reading and seeking."""
    return io.BufferedReader(HttpFile(url), PART_BYTES)

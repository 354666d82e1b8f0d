"""A file behind http or https, read in parts: what is not asked for is not transferred."""

from __future__ import annotations

import base64
import io
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPResponse
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from datasets_lib.errors import FileError
from datasets_lib.streaming.http_connection import opener

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PART_BYTES = 4 << 20  # of one request
TIMEOUT_SECONDS = 60.0  # without an answer; a part may take this long and its bytes at the slowest rate
SLOWEST = 10_000  # bytes per second
SIZE_DIGITS = 18  # of a file: what has more is no size


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
        if response.status != 206 or not size.isdecimal() or len(size) > SIZE_DIGITS:
            raise FileError("the server does not serve parts of files (no answer 206 to a Range)")
        self.size = int(size)

    def _request(self, first: int, last: int) -> HTTPResponse:
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={first}-{last}"})
        if self.user:
            encoded = base64.b64encode(self.user.encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {encoded}")
        try:
            return opener(TIMEOUT_SECONDS + (last - first + 1) / SLOWEST).open(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            raise FileError(f"the server answers {error.code} {error.reason}") from None  # the error holds the URL
        except HTTPException as error:
            raise FileError(f"the server's answer cannot be read ({type(error).__name__}: {error})") from None

    def _read(self, first: int, wanted: int) -> bytes:
        """Downloads a part; raises OSError if the server sends another one, or more."""
        last = first + wanted - 1
        with self._request(first, last) as response:
            found = response.headers.get("Content-Range", "")
            if not found.startswith(f"bytes {first}-{last}/"):
                raise FileError(f"the server sent the part {found!r} and was asked for bytes {first}-{last}")
            try:
                part = response.read(wanted + 1)
            except HTTPException as error:
                raise FileError(f"the server's answer cannot be read ({type(error).__name__})") from None
        if len(part) != wanted:
            raise FileError(f"the server sent {len(part)} of {wanted} bytes" + " and more" * (len(part) > wanted))
        return part

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
        wanted = min(len(view), self.size - self.place, PART_BYTES)
        if wanted <= 0:
            return 0
        view[:wanted] = self._read(self.place, wanted)
        self.place += wanted
        return wanted


def open_url(url: str) -> IO[bytes]:
    """Open a URL for reading and seeking."""
    return io.BufferedReader(HttpFile(url), PART_BYTES)

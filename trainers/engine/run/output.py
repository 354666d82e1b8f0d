"""Standard output and error that outlive their reader: a closed pager or a full disk does not end a run."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

TEMPORARY = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)  # later writes may succeed


class LastingStream:
    """A text stream whose failing writes are left out; once nobody reads it, all are."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._try(lambda: self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno not in TEMPORARY:
                self._lead_nowhere()

    def settle(self) -> None:
        """Flushes what is buffered, or drops it: Python would end with an error of its own."""
        try:
            self.stream.flush()
        except OSError:
            self._lead_nowhere()

    def _lead_nowhere(self) -> None:
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the stream is used
        try:
            os.dup2(nowhere.fileno(), self.stream.fileno())
        except OSError:  # a stream without a descriptor, such as a notebook's
            self.stream = nowhere

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Keeps a failing standard output or error from ending the block, or the process after it."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # a stream that was closed from the start is None
        out, err = (LastingStream(stream or nowhere) for stream in (sys.stdout, sys.stderr))
        try:
            with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
                yield
        finally:
            out.settle()
            err.settle()

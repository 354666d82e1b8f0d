"""Calls a function in a forked process with limits, for files that could hang a process or fill the memory."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from confined import limit_memory


def run_limited(function, *arguments, seconds=60, gigabytes=4):
    """(exit code, output); the code is 70 for an exception, and None if the process had to be ended."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        child = os.fork()
        if child == 0:
            _call(log, gigabytes, function, arguments)
        end = time.monotonic() + seconds
        while (found := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
            time.sleep(0.01)
        if found[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(found[1]) if found[0] else None, log.read_text()


def _call(log, gigabytes, function, arguments):
    code = 70
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        logging.raiseExceptions = False  # libraries' handlers may hold a stream of a test that has ended
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        limit_memory(gigabytes << 30)
        code = function(*arguments) or 0
    except SystemExit as end:
        print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)

"""Runs what could hang, or fill the memory, in a forked process with limits."""

from __future__ import annotations

import multiprocessing
import os
import resource


def confined(function, *arguments, seconds=20, more_bytes=1 << 30):
    """The result of a function, or its error as text, from a process that may take this much more address space."""
    parent, child = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=(child, function, arguments, more_bytes), daemon=True
    )
    process.start()
    child.close()
    try:
        assert parent.poll(seconds), f"it takes longer than {seconds} s"
        return parent.recv()
    except EOFError:
        raise AssertionError("the process died") from None
    finally:
        process.kill()
        process.join()


def limit_memory(more_bytes):
    """Lets this process take this much more address space."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    size = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _run(pipe, function, arguments, more_bytes):
    limit_memory(more_bytes)
    try:
        found = function(*arguments)
    except (ValueError, OSError) as error:
        found = f"{type(error).__name__}: {error}"
    except BaseException as error:
        found = f"TRACEBACK {type(error).__name__}: {error}"[:2000]
    pipe.send(found)

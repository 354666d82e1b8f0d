"""One run at a time in a folder: a lock that the kernel takes back when its holder dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

NAME = ".lock"


def take(output_dir: Path, option: str = "base.output_dir") -> TextIO | None:
    """Locks the folder until the returned file is closed or this process ends; None where that is not supported.

    A POSIX lock: data workers that this process forks do not inherit it, so they cannot keep a dead run's folder
    locked. Raises ValueError with the holder's pid and host where another run has the folder.
    """
    file = (output_dir / NAME).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            print(f"WARNING: {output_dir} cannot be locked ({error}); see to it that only one run uses it", flush=True)
            file.close()
            return None
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(
            f"{option} = {output_dir}: in use by {holder}; wait for that run, stop it with kill -TERM, or choose "
            f"another {option}"
        ) from None
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file

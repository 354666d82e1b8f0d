"""Which exceptions are messages to the user, shown without a traceback, and which are bugs."""

from __future__ import annotations

import traceback

OWN_PACKAGES = ("__main__", "train", "trainers", "datasets_lib")


class Interrupted(BaseException):
    """A signal ended the run, after it was saved; `code` is the command's exit code.

    Not an Exception, like KeyboardInterrupt, so that nothing on the way catches it as an error to recover from.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text, code)  # both, so that it can be pickled
        self.text, self.code = text, code

    def __str__(self) -> str:
        return self.text


def is_message(error: BaseException) -> bool:
    """Whether diffloop itself raised it; what a library or a user's module raises keeps its traceback."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(names) and names[-1].split(".")[0] in OWN_PACKAGES

"""Which exceptions are messages to the user, shown without a traceback, and which are bugs."""

from __future__ import annotations

OWN_PACKAGES = ("__main__", "train", "trainers", "datasets_lib")


class Interrupted(BaseException):
    """A signal ended the run, after it was saved; `code` is the exit code of the command.

    Like KeyboardInterrupt no Exception, so that nothing on the way takes it for an error to recover from.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text, code)  # both, so that it can be pickled
        self.text, self.code = text, code

    def __str__(self) -> str:
        return self.text


def is_message(error: BaseException) -> bool:
    """Whether diffloop itself raised it; what a library or a user's module raises keeps its traceback."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in OWN_PACKAGES

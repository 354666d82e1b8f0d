"""Which exceptions are messages to the user, shown without a traceback, and which are bugs."""

from __future__ import annotations

OWN_PACKAGES = ("__main__", "train", "trainers", "datasets_lib")


def is_message(error: BaseException) -> bool:
    """Whether diffloop itself raised it; what a library or a user's module raises keeps its traceback."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in OWN_PACKAGES

"""Work of one process or of all, with a result or an error that every process gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from trainers.engine.messages import is_message

Result = TypeVar("Result")


def on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """What `action()` returns, or raises, on the main process, on every rank. Collective.

    An OSError of a library becomes one of ours: a full disk or a missing permission is no bug.
    """
    answer: list[Any] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            answer[0] = action()
        except Exception as error:
            failure = OSError(str(error)) if isinstance(error, OSError) and not is_message(error) else error
            shared = isinstance(failure, (OSError, ValueError))  # others may hold what cannot be sent
            answer[1] = failure if shared else RuntimeError(f"the main process failed: {error!r}")
    result, error = broadcast_object_list(answer)
    if error is not None:
        raise (failure or error) from None
    return result


def on_all(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """What `action()` returns on this rank; an error that one rank met is raised on every rank. Collective."""
    result, error = None, None
    try:
        result = action()
    except (OSError, ValueError) as failure:
        error = failure
    for found in gather_object([error]):
        if found is not None:
            raise error or found
    return result

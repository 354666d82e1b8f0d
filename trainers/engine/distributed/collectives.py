"""Runs actions on some processes or on all, and gives every process the result or the error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from datasets_lib.errors import FileError, InputError, UserError

Result = TypeVar("Result")


def run_on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Runs an action on the main process; every rank returns its result or raises its error. Collective."""
    [result] = run_on_ranks(accelerator, [0], action)
    return result


def run_on_ranks(
    accelerator: Accelerator, ranks: Sequence[int], action: Callable[[], Result], where: str = ""
) -> list[Result]:
    """Runs an action on some ranks; every rank returns their results or raises the first error. Collective.

    An OSError of a library becomes one of ours: a full disk or a missing permission is not a bug. `where` is put
    in front of our messages.
    """
    own = accelerator.process_index
    result, failure = _tried(action, where) if own in ranks else (None, None)
    sent = failure
    if failure is not None and not isinstance(failure, (OSError, ValueError)):
        sent = RuntimeError(f"process {own} failed: {failure!r}")  # others may not be serialisable
    results: list[Result] = []
    errors: list[Exception] = []
    for rank in ranks:  # one by one: a gather would send as much from each rank as the longest answer
        answer = [result, sent] if rank == own else [None, None]
        result_of_rank, error = broadcast_object_list(answer, from_process=rank)
        results.append(result_of_rank)
        if error is not None:
            errors.append(failure if failure is not None and rank == own else error)
    if errors:
        raise errors[0] from None
    return results


def _tried(action: Callable[[], Result], where: str) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        if isinstance(error, OSError):
            return None, FileError(f"{where}{error}") if where or not isinstance(error, UserError) else error
        return None, InputError(f"{where}{error}") if where and isinstance(error, UserError) else error


def run_on_all(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Runs an action on every rank and returns the own result; an error of one rank is raised on all. Collective."""
    results: list[Result] = []
    error: Exception | None = None
    try:
        results.append(action())
    except (OSError, ValueError) as failure:
        error = failure
    for found in gather_object([error]):
        if found is not None:
            raise error or found
    return results[0]

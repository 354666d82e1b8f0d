"""Work of some processes or of all, with a result or an error that every process gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from trainers.engine.config.errors import is_message

Result = TypeVar("Result")


def run_on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """What `action()` returns, or raises, on the main process, on every rank. Collective."""
    [result] = run_on_ranks(accelerator, [0], action)
    return result


def run_on_ranks(
    accelerator: Accelerator, ranks: Sequence[int], action: Callable[[], Result], where: str = ""
) -> list[Result]:
    """What `action()` returns on each of these ranks, on every rank; the first error is raised on all. Collective.

    An OSError of a library becomes one of ours: a full disk or a missing permission is no bug. The text of one of
    ours begins with `where`.
    """
    own = accelerator.process_index
    result, failure = _tried(action, where) if own in ranks else (None, None)
    results, errors = [], []
    for rank in ranks:  # one after the other: a gather would send as much from each rank as the longest answer
        answer = [result, _to_send(failure, rank)] if rank == own else [None, None]
        result_of_rank, error = broadcast_object_list(answer, from_process=rank)
        results.append(result_of_rank)
        errors += [failure if rank == own else error] if error is not None else []
    if errors:
        raise errors[0] from None
    return results


def _tried(action: Callable[[], Result], where: str) -> tuple[Result | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        if isinstance(error, OSError) and (where or not is_message(error)):
            return None, OSError(f"{where}{error}")
        if isinstance(error, ValueError) and where and is_message(error):
            return None, ValueError(f"{where}{error}")
        return None, error


def _to_send(failure: Exception | None, rank: int) -> Exception | None:
    if failure is None or isinstance(failure, (OSError, ValueError)):
        return failure
    return RuntimeError(f"process {rank} failed: {failure!r}")  # others may hold what cannot be sent


def run_on_all(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
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

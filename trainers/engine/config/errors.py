"""The end of a run that a signal asked for."""

from __future__ import annotations


class Interrupted(BaseException):
    """A signal ended the run, after it was saved; `code` is the command's exit code.

    Not an Exception, like KeyboardInterrupt, so that nothing on the way catches it as an error to recover from.
    """

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text, code)  # both, so that it can be pickled
        self.text, self.code = text, code

    def __str__(self) -> str:
        return self.text

"""The errors that a user can mend: their text says what, the value, what is allowed and what to do.

Only these are shown without a traceback. What a library raises over a user's file, folder, row or option is turned into
one of them where it is read; anything else is a bug, ours or another's.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user's, or something that they can mend."""


class InputError(UserError, ValueError):
    """A value, file, row or option that cannot be used."""


class FileError(UserError, OSError):
    """A file or folder that cannot be read or written."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or folder that is not there."""

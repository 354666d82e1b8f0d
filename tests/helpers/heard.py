"""Collects what libraries would print as warnings."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager

LOGGERS = ("diffusers", "transformers", "peft")


@contextmanager
def heard():
    """Yields a list that gets the texts of warnings: of Python's, of every kind, and of the libraries' loggers."""
    texts = []

    class Hears(logging.Handler):
        def emit(self, record):
            texts.append(record.getMessage())

    handler = Hears(logging.WARNING)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", DeprecationWarning)  # which Python shows to nobody
            warnings.showwarning = lambda message, *_, **__: texts.append(str(message))
            yield texts
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)

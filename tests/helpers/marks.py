"""Marks for the cases of parametrised tests."""

import pytest


def slow(*values):
    """A case that runs with --slow alone, because another one shows by default what the test is for."""
    return pytest.param(*values, marks=pytest.mark.slow)

"""Calls a script's main() with arguments."""

from __future__ import annotations

import sys


def run_script(script, *arguments):
    before, sys.argv = sys.argv, ["script", *map(str, arguments)]
    try:
        script.main()
    finally:
        sys.argv = before

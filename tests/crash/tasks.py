"""Task functions for the crash tests: in a module that takes no time to import, because every new worker does."""

from __future__ import annotations

from pathlib import Path


def number_of(src: Path) -> int:
    """Of an input that is called by a number."""
    return int(src.name)

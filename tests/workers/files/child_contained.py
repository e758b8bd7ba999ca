"""A second process for tests of containment: it swaps a directory and a symlink that leads out, without end."""

from __future__ import annotations

import os

from tests.workers.files.child import say


def swap_for_ever(base: str, outside: str) -> None:
    """Make ``<base>/way`` a directory, then a symlink to ``outside``, then the directory again, and so on."""
    os.chdir(base)
    os.symlink(outside, "link")
    n_swaps = 0
    while True:
        os.rename("way", "away")
        os.rename("link", "way")
        os.rename("way", "link")
        os.rename("away", "way")
        n_swaps += 1
        if n_swaps == 1:
            say("swapping")

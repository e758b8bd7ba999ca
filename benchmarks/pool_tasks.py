"""What the workers of ``bench_pools`` run besides ``ringpool.bench.tasks``."""

from __future__ import annotations

import os
import signal


def compute(iterations: int) -> int:
    """A fixed amount of computing."""
    total = 0
    for i in range(iterations):
        total += i & 1
    return total


def compute_or_die(task: tuple[int, bool]) -> int:
    """``compute``, or the end of this process."""
    iterations, dies = task
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(iterations)

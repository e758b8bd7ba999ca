"""What the workers of ``bench_pools`` run besides ``ringpool.bench.tasks``."""

from __future__ import annotations


def compute(iterations: int) -> int:
    """A fixed amount of computing."""
    total = 0
    for i in range(iterations):
        total += i & 1
    return total

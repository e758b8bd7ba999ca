"""What the workers of ``bench_pools`` run besides ``ringpool.bench.tasks``."""

from __future__ import annotations

import time
from typing import Any


def compute(iterations: int) -> int:
    """A fixed amount of computing."""
    total = 0
    for i in range(iterations):
        total += i & 1
    return total


def fields_of(record: dict[str, Any]) -> dict[str, Any]:
    """A small record of a small record."""
    return {"id": record["id"], "words": record["words"]}


def compute_timed(iterations: int) -> int:
    """The same; the CPU that it took, ns."""
    began_ns = time.thread_time_ns()
    compute(iterations)
    return time.thread_time_ns() - began_ns

"""What the workers of ``bench_pools`` run. Apart, so that a worker that replaces a dead one imports no peers."""

from __future__ import annotations

import hashlib
import os
import signal
from typing import Any

from ringpool import atomic_write


def no_op(item: Any) -> Any:
    """The task that costs nothing; its result shows that it was run."""
    return item


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


def copy_hashed(source: str) -> str:
    """Read a file of the tree ``in``, and write its content atomically to its place in the tree ``out``; its digest."""
    with open(source, "rb", buffering=0) as file:
        content = file.read()
    atomic_write(target_of(source), content, durability="atomic")
    return hashlib.sha256(content).hexdigest()


def target_of(source: str) -> str:
    return source.replace("/in/", "/out/", 1)

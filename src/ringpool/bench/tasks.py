"""What workers run while pools are compared. Apart, so that a worker that replaces a dead one imports no peers."""

from __future__ import annotations

import hashlib
from typing import Any

from ringpool.workers.files.atomic import atomic_write


def no_op(item: Any) -> Any:
    """The task that costs nothing; its result shows that it was run."""
    return item


def copy_hashed(source: str) -> str:
    """Read a file of the tree ``in``, and write its content atomically to its place in the tree ``out``; its digest."""
    with open(source, "rb", buffering=0) as file:
        content = file.read()
    atomic_write(target_of(source), content, durability="atomic")
    return hashlib.sha256(content).hexdigest()


def target_of(source: str) -> str:
    """Where ``copy_hashed`` writes what it has read from ``source``."""
    return source.replace("/in/", "/out/", 1)

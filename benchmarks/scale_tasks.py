"""What the workers of ``bench_scale`` and ``bench_faults`` run besides ``pool_tasks``.

Apart, so that a worker that replaces a dead one imports no peers.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from benchmarks.pool_tasks import compute

ONCE, ALWAYS = ".once", ".always"  # what the name of a deadly task ends in
FATE_NS = 1_000_000  # of CPU
PIECE_ITERATIONS = 500  # some 10 to 20 us


def negated(array: Any) -> Any:
    """A new array, as large as ``array``."""
    return -array


def live_or_die(name: str) -> int:
    """Compute for 1 ms of CPU, whatever the clock; or be killed: where ``name`` ends in ``.always``, and the first time
    where it ends in ``.once``. That there was a first time is kept as a file of that name. Raises ``OSError`` where it
    cannot be kept.
    """
    if name.endswith(ALWAYS) or (name.endswith(ONCE) and _is_first(name)):
        os.kill(os.getpid(), signal.SIGKILL)
    end_ns = time.thread_time_ns() + FATE_NS
    value = compute(PIECE_ITERATIONS)
    while time.thread_time_ns() < end_ns:
        compute(PIECE_ITERATIONS)
    return value


def _is_first(name: str) -> bool:
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True

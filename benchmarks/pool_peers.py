"""What is no pool, beside the pools of ``ringpool.bench.peers``.

Unpooled   forked processes that take blocks of a list from a shared counter, and send no results back
pipe       a byte to a forked process, and back
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

from benchmarks.bench_dispatch import Split

from ringpool.bench.peers import Call


class Unpooled:
    """Processes without a pool, forked, that take blocks of ``items`` from a shared counter."""

    def __init__(self, processes: int, call: Call, items: Sequence[Any], block: int) -> None:
        self._range = multiprocessing.get_context("fork").Array("q", 2)  # the next item, and where to stop

        def take_blocks(_number: str) -> None:
            bounds = self._range.get_obj()
            end = bounds[1]
            while True:
                with self._range.get_lock():
                    first = bounds[0]
                    bounds[0] = first + block
                if first >= end:
                    return
                for item in items[first : min(first + block, end)]:
                    call(item)

        self._split = Split(processes, [str(number) for number in range(processes)], take_blocks)
        self.close = self._split.close

    def run(self, _call: Call, items: Sequence[Any]) -> list[Any]:
        """Have the first of the items done, as many as ``items`` are. Raises ``RuntimeError`` where a process died."""
        self._range[:] = [0, len(items)]
        self._split.run()
        return []


@contextlib.contextmanager
def pipe(core: int | None = None) -> Generator[Callable[[], object]]:
    """A byte to a forked process, kept on ``core``, and back: two wake-ups, and nothing else."""
    there_read, there_write = os.pipe()
    back_read, back_write = os.pipe()

    def echo() -> None:
        os.close(there_write)  # so that the end of the parent, however it comes, ends this too
        if core is not None:
            os.sched_setaffinity(0, {core})
        while os.read(there_read, 1):
            os.write(back_write, b"r")

    process = multiprocessing.get_context("fork").Process(target=echo, daemon=True)
    process.start()
    os.close(there_read)
    os.close(back_write)

    def trip() -> bytes:
        os.write(there_write, b"t")
        return os.read(back_read, 1)

    try:
        yield trip
    finally:
        os.close(there_write)
        os.close(back_read)
        process.join()

"""A map whose items go one by one through a ``submit`` of somebody's own, as in ``concurrent.futures.Executor.map``.

    items --submit(fn, *item)--> futures --> results, in the order of items

For an executor of a class that has overridden it: to trace calls, to wrap them, to count them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from typing import Any


def results_by_submit(
    submit: Callable[..., Future[Any]],
    fn: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    *,
    timeout: float | None,
    buffersize: int | None,
    return_exceptions: bool,
) -> Iterator[Any]:
    """Results of ``fn`` of each item, as they are taken. Items are drawn and submitted at the call: all of them, or the
    first ``buffersize``, and then one for each result. ``timeout``: seconds from now, after which taking a result
    raises ``TimeoutError``. What the items or ``submit`` raise is raised where they are asked.
    """
    end_s = None if timeout is None else time.monotonic() + timeout
    items = zip(*iterables, strict=False)
    waiting = deque(submit(fn, *item) for item in islice(items, buffersize))

    def take_all() -> Iterator[Any]:
        try:
            while waiting:
                error = waiting[0].exception(None if end_s is None else end_s - time.monotonic())
                waiting.extend(submit(fn, *item) for item in islice(items, 1))
                if error is None:
                    yield waiting.popleft().result()
                elif return_exceptions:
                    yield waiting.popleft().exception()
                else:
                    waiting.popleft().result()
                del error  # its frames would keep this one
        finally:
            for future in waiting:
                future.cancel()

    return take_all()

"""What is imported first, with Ctrl-C, SIGTERM and SIGHUP held back until it is there.

While ``msgspec`` sets itself up, it takes any exception for an optional feature that is missing. A
``KeyboardInterrupt`` that comes then is lost, and the next decoder that is made is a segmentation fault (seen with
msgspec 0.22: 5 of 1,000 programs that were interrupted in their first half second). So the signals wait these few
milliseconds.

A signal that comes while a process is forked is handled by the first hook that CPython runs after that in the parent,
and what its handler raises is lost. The first one here does nothing that could be left undone.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
try:
    import msgspec as msgspec
finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask_before)


def after_fork() -> None:
    """In the parent."""


os.register_at_fork(after_in_parent=after_fork)

in_fork_server = False
imports_main_ahead = False  # in a fork server, for the workers
is_unguarded = False  # it has come to the making of a pool then
homes_used: set[str] = set()  # modules of which the program has had public names


class Unguarded(BaseException):
    """Ends the import of a main module, ahead of workers, that makes a pool; not for it to catch."""


def is_for_workers() -> bool:
    """Whether this process is a worker, of whatever pool, or a fork server that imports for workers: what only a
    coordinator needs is imported when it is needed.
    """
    return in_fork_server or is_importing_main() or _ask_process("parent_process") is not None


def is_importing_main() -> bool:
    """Whether this is a process of ``multiprocessing`` that is still importing the program's main module."""
    return getattr(_ask_process("current_process"), "_inheriting", False)  # as multiprocessing itself asks


def _ask_process(name: str) -> object:
    """What a function of ``multiprocessing.process`` returns; None, where that is not imported, or not yet to its end,
    by another thread: who comes of it has it.
    """
    function: Callable[[], object] | None = getattr(sys.modules.get("multiprocessing.process"), name, None)
    if function is None:
        return None
    try:
        return function()
    except NameError:
        return None

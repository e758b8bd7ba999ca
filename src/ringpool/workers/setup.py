"""What a worker does before its first task: forward its log records, and call the pool's initializer.

A ``Setup`` travels as an argument of the process: inherited by a fork, else pickled while the process is spawned, so
that locks and queues of ``multiprocessing`` may be among the initializer's arguments. What pickle cannot name, or the
worker would not find by its name, cloudpickle sends by value.
"""

from __future__ import annotations

import itertools
import logging
import pickle
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any, Protocol, cast

from ringpool.workers import calls

Initializer = Callable[..., object]
PARTS_MAX = 1000  # of the arguments of an initializer that are looked at, for locks
_UNNAMED = (pickle.PicklingError, AttributeError, TypeError)  # of what pickle cannot name
_WITH_LOCKS = {f"multiprocessing.{name}" for name in ("synchronize", "queues", "sharedctypes")}


class LogSender(Protocol):
    """What forwards log records, see ``logs``."""

    def install(self) -> None:
        """From now on."""
        ...

    def give_way(self) -> None:
        """No more, where the initializer has given the records another way."""
        ...


class InitializerFailure(Exception):  # noqa: N818  (its message is another error's traceback)
    """The initializer raised; ``args``: the exception in a line, and its traceback."""


class Setup:
    """``initializer(*initargs)``, or None, and ``sender`` of log records, or None."""

    def __init__(self, initializer: Initializer | None, initargs: tuple[Any, ...], sender: LogSender | None) -> None:
        self.sender = sender
        self._initializer = initializer
        self._initargs = initargs
        self._pickled: tuple[bytes, ...] = ()  # both, or each by itself

    def __getstate__(self) -> tuple[LogSender | None, tuple[bytes, ...]]:
        if self._initializer is None:
            return self.sender, ()
        both = self._initializer, self._initargs
        if calls.is_lost("__main__"):
            return self.sender, (_by_value(both),)
        try:
            return self.sender, (bytes(ForkingPickler.dumps(both)),)
        except _UNNAMED:  # what has a name goes by that: the main module's classes are one in a worker
            return self.sender, tuple(map(_pickle, both))

    def __setstate__(self, state: tuple[LogSender | None, tuple[bytes, ...]]) -> None:
        self.sender, self._pickled = state
        self._initializer, self._initargs = None, ()

    def apply(self) -> None:
        """In the worker. Raises ``InitializerFailure``."""
        if self.sender is not None:
            self.sender.install()
        try:
            if self._pickled:
                both: list[Any] = [calls.rebuild(each) for each in self._pickled]
                self._initializer, self._initargs = both if len(both) > 1 else both[0]
            if self._initializer is not None:
                self._initializer(*self._initargs)
        except BaseException as error:
            logging.getLogger("concurrent.futures").critical("Exception in initializer:", exc_info=True)
            text = "".join(traceback.format_exception(error))
            raise InitializerFailure("".join(traceback.format_exception_only(error)).strip(), text) from None
        self._initargs = ()
        if self.sender is not None:
            self.sender.give_way()


def _pickle(value: object) -> bytes:
    try:
        return bytes(ForkingPickler.dumps(value))
    except _UNNAMED:
        return _by_value(value)


def _by_value(value: object) -> bytes:
    from ringpool.workers import byvalue  # here, because most programs never need cloudpickle

    return byvalue.dumps(value)


def has_fork_lock(initargs: Iterable[Any]) -> bool:
    """Whether there is a lock among them that only a fork can have, or an event, queue or value with such a lock: its
    semaphore has no name. Or what holds one, among its items or attributes, as far as ``PARTS_MAX`` of these show.
    """
    waiting = deque(initargs)
    seen: set[int] = set()
    while waiting and len(seen) < PARTS_MAX:
        value = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind = cast("type[Any]", type(value))  # and not what it says of itself: a proxy may run anything then
        if issubclass(kind, dict):
            parts: Iterable[Any] = cast("Any", dict).values(value)
        elif issubclass(kind, (list, tuple, set, frozenset)):
            parts = value
        elif issubclass(kind, (type, ModuleType)):
            continue
        else:
            try:
                attributes: dict[str, Any] = object.__getattribute__(value, "__dict__")
            except AttributeError:
                continue
            if kind.__module__ in _WITH_LOCKS and getattr(attributes.get("_semlock"), "name", "") is None:
                return True
            parts = cast("Any", dict).values(attributes)
        waiting.extend(itertools.islice(parts, PARTS_MAX))
    return False

"""Pickles with the reducers that ``multiprocessing`` has beside pickle's own.

    a socket, a ``Connection``               its descriptor is sent; plain pickle refuses it, or sends the bare number
    what ``ForkingPickler.register`` knows   as its reducer says

Most values hold nothing of that, and ``pickle.dumps`` is three times as fast as a pickler with a table of reducers. So
that comes first, where only the standard library's own types are registered: those show by name in the pickle.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

Keep = Callable[[pickle.PickleBuffer], bool]
_PACKAGE = b"multiprocessing"  # whose types are registered by the standard library
_STANDARD = frozenset(("builtins", "array", "functools", "socket", _PACKAGE.decode()))
_SHARED = frozenset(("builtins", "array", "functools"))  # what is no more than pickle's own
# Private, and there is no other way to ask; 3.11 to 3.13 have it under this name.
_reducers: dict[type, Callable[[Any], Any]] = ForkingPickler._extra_reducers  # pyright: ignore


class NotSharedError(TypeError):
    """What is pickled once, for several workers, holds what only one of them can fetch: a descriptor, say."""


class _Seen:
    """How many reducers there were, and whether a program had registered one of them."""

    n = 0
    are_foreign = False


def table(*, is_shared: bool = False) -> dict[type, Callable[[Any], Any]]:
    """A ``dispatch_table`` of all reducers; ``is_shared``: for what several unpickle, see ``NotSharedError``."""
    if not is_shared:
        return {**copyreg.dispatch_table, **_reducers}
    refusing = {kind: reduce if kind.__module__ in _SHARED else _refuse for kind, reduce in _reducers.copy().items()}
    return {**copyreg.dispatch_table, **refusing}


def _refuse(value: object) -> Any:
    raise NotSharedError(f"one {type(value).__qualname__} cannot be sent to several workers")


def are_foreign() -> bool:
    """Whether the program has registered reducers of its own."""
    n = len(_reducers)
    if n != _Seen.n:
        _Seen.are_foreign = any(kind.__module__.partition(".")[0] not in _STANDARD for kind in _reducers.copy())
        _Seen.n = n
    return _Seen.are_foreign


def may_do_without(body: bytes) -> bool:
    """Whether what ``pickle.dumps`` has made is right without the table, where no reducers are foreign."""
    return body.find(_PACKAGE) < 0  # six times as fast as ``in``


def dumps(
    value: object, keep: Keep | None, buffers: list[memoryview] | None, protocol: int = 5, *, is_shared: bool = False
) -> bytes:
    """``value`` as bytes, with ``keep`` as its ``buffer_callback``, which puts buffers into ``buffers``. Raises what
    pickle raises: ``TypeError`` for what needs the table and shows it so, such as a socket: see ``dumps_by_table``.
    """
    if not are_foreign():
        body = pickle.dumps(value, protocol, buffer_callback=keep)
        if may_do_without(body):
            return body
        if buffers:
            buffers.clear()
    return dumps_by_table(value, keep, protocol, is_shared=is_shared)


def dumps_by_table(value: object, keep: Keep | None, protocol: int = 5, *, is_shared: bool = False) -> bytes:
    """The same, by the table. Each try takes a copy of a descriptor in ``value``, which stays until it is fetched."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol, buffer_callback=keep)
    pickler.dispatch_table = table(is_shared=is_shared)
    pickler.dump(value)
    return file.getvalue()

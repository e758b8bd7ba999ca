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
_reducers: dict[type, Callable[[Any], Any]] = ForkingPickler._extra_reducers  # pyright: ignore


class _Seen:
    """How many reducers there were, and whether a program had registered one of them."""

    n = 0
    are_foreign = False


def table() -> dict[type, Callable[[Any], Any]]:
    """A ``dispatch_table`` of all reducers."""
    return {**copyreg.dispatch_table, **_reducers}


def are_foreign() -> bool:
    """Whether the program has registered reducers of its own."""
    if len(_reducers) != _Seen.n:
        _Seen.are_foreign = any(kind.__module__.partition(".")[0] not in _STANDARD for kind in _reducers)
        _Seen.n = len(_reducers)
    return _Seen.are_foreign


def may_do_without(body: bytes) -> bool:
    """Whether what ``pickle.dumps`` has made is right without the table, where no reducers are foreign."""
    return body.find(_PACKAGE) < 0  # six times as fast as ``in``


def dumps(value: object, keep: Keep | None, buffers: list[memoryview] | None, protocol: int = 5) -> bytes:
    """``value`` as bytes, with ``keep`` as its ``buffer_callback``, which puts buffers into ``buffers``. Raises what
    pickle raises.
    """
    if not are_foreign():
        try:
            body = pickle.dumps(value, protocol, buffer_callback=keep)
        except TypeError:  # a socket, say
            body = _PACKAGE
        if may_do_without(body):
            return body
        if buffers:
            buffers.clear()
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol, buffer_callback=keep)
    pickler.dispatch_table = table()
    pickler.dump(value)
    return file.getvalue()

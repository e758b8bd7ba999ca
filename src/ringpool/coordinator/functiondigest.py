"""What is done to each file of a job, in 16 bytes: where they change, all files are done again.

    a parameter                                      by
    what msgspec knows: plain values, dataclasses    MessagePack, with mappings and sets in order
    text, numbers and paths of other classes         its repr, which is all of it
    anything else                                    its pickle: a repr may leave something out, or have an address

What MessagePack cannot hold, such as text that is not UTF-8 or an int of more than 64 bits, is taken part by part.
"""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable
from hashlib import blake2b
from numbers import Number
from pathlib import PurePath
from typing import Any, cast

import msgspec

_TOLD_BY_REPR = (str, Number, PurePath, range)


class _Pickler(pickle.Pickler):
    """Pickles sets in the order of what they hold: their own is another one in each process."""

    def persistent_id(self, obj: Any, /) -> Any:
        return sorted(map(_pickle_of, obj)) if type(obj) in (set, frozenset) else None


def _pickle_of(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, 5).dump(value)
    return file.getvalue()


def _told(value: object) -> str | bytes:
    """What stands for a value that msgspec has no notion of."""
    if isinstance(value, _TOLD_BY_REPR) and type(value).__repr__ is not object.__repr__:
        return repr(value)
    try:
        return blake2b(_pickle_of(value), digest_size=16).digest()
    except Exception:  # it cannot be pickled, or a set holds what holds it
        return repr(value)


_encode: Callable[[object], bytes] = functools.partial(msgspec.msgpack.encode, order="deterministic", enc_hook=_told)


def encode_sorted(value: object) -> bytes:
    """``value`` as bytes that are others when it has changed, and only then."""
    try:
        return _encode(value)
    except Exception:  # what MessagePack cannot hold, keys that are no text, a set of what has no order
        return _encode(_parts(value))


def _parts(value: object) -> list[object]:
    if isinstance(value, dict):
        items = cast("dict[object, object]", value).items()
        return ["mapping", *sorted(encode_sorted(key) + encode_sorted(one) for key, one in items)]
    if isinstance(value, set | frozenset):
        return ["set", *sorted(map(encode_sorted, cast("set[object]", value)))]
    if isinstance(value, list | tuple):
        return ["sequence", *map(encode_sorted, cast("list[object]", value))]
    return ["pickle", _pickle_of(value)]


def function_digest(name: str, source: str, parameters: dict[str, Any]) -> bytes:
    """What is done to each file, in 16 bytes: the function, by its name and its own source, and its parameters."""
    return blake2b(encode_sorted((name, source, parameters)), digest_size=16).digest()

"""Pickles of what pickle cannot name: classes and functions go by value, through cloudpickle."""

from __future__ import annotations

import functools
import io
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import cloudpickle

from ringpool.workers import reducers

_STATE_SETTER = 5  # where a reducer's tuple has it, see ``object.__reduce__``
_Base: type[pickle.Pickler] = cast("Any", cloudpickle).CloudPickler  # it has no types


def dumps(
    value: object, keep: Callable[[pickle.PickleBuffer], bool] | None = None, *, is_shared: bool = False
) -> bytes:
    """``value`` as bytes, with ``keep`` as its ``buffer_callback``; ``is_shared``: see ``reducers.table``. Raises what
    pickle raises.
    """
    file = io.BytesIO()
    _Pickler(file, 5, buffer_callback=keep, is_shared=is_shared).dump(value)
    return file.getvalue()


class _Pickler(_Base):
    """A class within a class or a function arrives with its whole name, by which ``byname`` may send it back. A class
    method goes as pickle sends it: by its name in its class. Its function is not found there as such, so cloudpickle
    would send that by value, with globals of its own. A memoryview is refused, as by pickle.
    """

    def __init__(self, *arguments: Any, is_shared: bool, **keywords: Any) -> None:
        own: Any = _Base.dispatch_table
        self.dispatch_table = ChainMap(own, reducers.table(is_shared=is_shared))  # before the base's, which reads it
        super().__init__(*arguments, **keywords)

    def reducer_override(self, obj: Any, /) -> Any:
        if type(obj) is memoryview:  # cloudpickle would send its bytes, and say nothing of format and shape
            raise TypeError("cannot pickle 'memoryview' object; send bytes of it, or the array that it shows")
        if type(obj) is MethodType and _is_named(obj.__self__) and getattr(obj.__self__, obj.__name__, None) == obj:
            return getattr, (obj.__self__, obj.__name__)
        reduced: Any = super().reducer_override(obj)
        if reduced is not NotImplemented and type(obj).__module__ == "_ctypes":
            raise pickle.PicklingError(f"Can't pickle {obj!r}: no module has this type of ctypes by its name")
        if not issubclass(type(obj), type) or obj.__qualname__ == obj.__name__:
            return reduced
        if reduced is NotImplemented or len(reduced) <= _STATE_SETTER:  # it goes by name
            return reduced
        return (*reduced[:_STATE_SETTER], functools.partial(set_state, reduced[_STATE_SETTER], obj.__qualname__))


def _is_named(owner: object) -> bool:
    """Whether it is a class that another process finds by its name."""
    if not isinstance(owner, type) or owner.__module__ == "__main__":
        return False
    found: object = sys.modules.get(owner.__module__)
    for name in owner.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is owner


def set_state(set_rest: Callable[[type, Any], object], name: str, made: type, state: Any) -> None:
    """Make a class what it was: as cloudpickle does, and its name."""
    set_rest(made, state)
    made.__qualname__ = name

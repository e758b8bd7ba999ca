"""Pickles of what pickle cannot name: classes and functions go by value, through cloudpickle.

a class                  its ``__slots__`` with it, and its whole name, by which ``byname`` may send it back
lru_cache, cache         what is cached, and how; the cache there is empty. By its name where that is found
cached_property          its function, and its name in its class
singledispatch           its functions
singledispatchmethod     its functions; what some releases of Python 3.13 cache there stays here
a class method           by its name in its class, as pickle sends it: cloudpickle would send its function by value,
                         with globals of its own
code                     the name of its file with it, which tracebacks and ``inspect.getsource`` need; cloudpickle
                         3.1.3 leaves it out
a memoryview             refused, as by pickle
"""

from __future__ import annotations

import abc
import functools
import io
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable
from types import CodeType, FunctionType, MethodType
from typing import Any, Protocol, cast

import cloudpickle

from ringpool.workers import calls, reducers

_STATE_SETTER = 5  # where a reducer's tuple has it, see ``object.__reduce__``
_CLASS_KEYWORDS = 3  # where cloudpickle's arguments for a class have what its namespace begins with
_FILENAME = 10  # where a code object's arguments have it
_METACLASSES = {type, abc.ABCMeta, type(Protocol)}  # others may make slots of their own, and so does NamedTuple
_Cached: type[Any] = type(functools.lru_cache(len))
_CachedProperty: type[Any] = functools.cached_property
_DispatchedMethod: type[Any] = functools.singledispatchmethod


@functools.singledispatch
def _dispatcher(_value: object) -> None:
    """As ``functools`` makes them, whose code is one for all."""


_DISPATCHER_CODE: object = cast("Any", _dispatcher).__code__
_MADE = vars(_dispatcher).keys() - {"__wrapped__"}
_COPIED = functools.WRAPPER_ASSIGNMENTS
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
    """Reduces what the module says; all else as cloudpickle does."""

    def __init__(self, *arguments: Any, is_shared: bool, **keywords: Any) -> None:
        own: Any = _Base.dispatch_table
        self.dispatch_table = ChainMap(own, reducers.table(is_shared=is_shared))  # before the base's, which reads it
        super().__init__(*arguments, **keywords)

    def reducer_override(self, obj: Any, /) -> Any:
        if type(obj) is memoryview:  # cloudpickle would send its bytes, and say nothing of format and shape
            raise TypeError("cannot pickle 'memoryview' object; send bytes of it, or the array that it shows")
        if type(obj) is MethodType and _is_named(obj.__self__) and getattr(obj.__self__, obj.__name__, None) == obj:
            return getattr, (obj.__self__, obj.__name__)
        if type(obj) is CodeType:
            return _reduce_code(obj)
        if type(obj) is _Cached and not _is_found(obj):
            return _reduce_cached(obj)
        if type(obj) is _CachedProperty:
            return _reduce_cached_property(obj)
        if type(obj) is _DispatchedMethod:
            return _reduce_dispatched_method(obj)
        reduced: Any = super().reducer_override(obj)
        if reduced is NotImplemented:
            return reduced
        if type(obj).__module__ == "_ctypes":
            raise pickle.PicklingError(f"Can't pickle {obj!r}: no module has this type of ctypes by its name")
        if type(obj) is FunctionType and obj.__code__ is _DISPATCHER_CODE:
            return _reduce_dispatcher(obj)
        return _reduce_class(obj, reduced) if issubclass(type(obj), type) else reduced


def _is_found(obj: Any) -> bool:
    """Whether another process finds it by its name."""
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", "")
    if calls.is_lost(module):
        return False
    found: object = sys.modules.get(module or "")
    for each in name.split("."):
        found = getattr(found, each, None)
    return found is obj


def _is_named(owner: object) -> bool:
    """Whether it is a class of a module other than the main one, which another process finds by its name."""
    return isinstance(owner, type) and owner.__module__ != "__main__" and _is_found(owner)


def _reduce_code(code: CodeType) -> Any:
    make, arguments = cast("Any", _Base.dispatch_table)[CodeType](code)
    return make, (*arguments[:_FILENAME], code.co_filename, *arguments[_FILENAME + 1 :])


# ---- classes ---------------------------------------------------------------------------------------------------------


def _reduce_class(kind: Any, reduced: Any) -> Any:
    """``reduced``: what cloudpickle makes of it."""
    if len(reduced) <= _STATE_SETTER:  # it goes by name
        return reduced
    make, arguments, state, _, _, set_rest = reduced
    if type(kind) in _METACLASSES and "__slots__" in vars(kind) and not issubclass(kind, tuple):
        # cloudpickle sets them when the class is made, and then its instances have a ``__dict__``
        keywords = {**arguments[_CLASS_KEYWORDS], "__slots__": kind.__slots__}
        arguments = (*arguments[:_CLASS_KEYWORDS], keywords, *arguments[_CLASS_KEYWORDS + 1 :])
    if kind.__qualname__ != kind.__name__:
        set_rest = functools.partial(set_state, set_rest, kind.__qualname__)
    return make, arguments, state, None, None, set_rest


def set_state(set_rest: Callable[[type, Any], object], name: str, made: type, state: Any) -> None:
    """Make a class what it was: as cloudpickle does, and its name."""
    set_rest(made, state)
    made.__qualname__ = name


# ---- what functools has made of a function ---------------------------------------------------------------------------
#
# A function may refer to what was made of it, and arrives before that has come to its end. So what ``functools`` copies
# from it goes along.


def _attributes(made: Any) -> dict[str, Any]:
    return {**made.__dict__}


def _reduce_cached(cached: Any) -> Any:
    attributes = _attributes(cached)
    del attributes["cache_parameters"]
    return make_cached, (cached.__wrapped__, cached.cache_parameters()), attributes


def make_cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Callable[..., Any]:
    """``function`` with an empty cache."""
    return functools.lru_cache(**parameters)(function)


def _reduce_cached_property(cached: Any) -> Any:
    attributes = _attributes(cached)
    attributes.pop("lock", None)  # it has one up to Python 3.11
    return functools.cached_property, (cached.func,), attributes


def _reduce_dispatched_method(method: Any) -> Any:
    attributes = _attributes(method)  # the dispatcher among them
    attributes.pop("_method_cache", None)  # weak references, in Python 3.13.0
    return functools.singledispatchmethod, (method.func,), attributes


def _reduce_dispatcher(dispatcher: Any) -> Any:
    attributes: dict[str, Any] = {name: getattr(dispatcher, name) for name in _COPIED if hasattr(dispatcher, name)}
    attributes |= {name: value for name, value in _attributes(dispatcher).items() if name not in _MADE}
    functions = dict(dispatcher.registry)
    return functools.singledispatch, (dispatcher.__wrapped__,), (functions, attributes), None, None, set_dispatcher


def set_dispatcher(made: Any, state: tuple[dict[type, Callable[..., Any]], dict[str, Any]]) -> None:
    """Make a function of ``functools.singledispatch`` what it was: ``state``: its functions by type, its attributes."""
    functions, attributes = state
    for kind, function in functions.items():
        made.register(kind, function)
    for name, value in attributes.items():
        setattr(made, name, value)

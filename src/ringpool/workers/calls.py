"""Calls: tasks that are any callable with any arguments, one by one or as vectors of a map.

    function blob   a pickled callable, that many tasks share; or none (id 0): then each payload brings its own
    PLAIN           msgpack: the positional arguments
    PICKLED         pickle: (arguments, keyword arguments), or (callable, arguments, keyword arguments) with id 0
    VECTOR          where the items are, see ``shm.vectors``

What pickle cannot name (lambdas, closures, functions of an interactive ``__main__``), cloudpickle sends by value; the
result is an ordinary pickle, so a reader does not see which of both it was. Arguments are pickled with protocol 5:
large buffers, such as those of NumPy arrays, lie in a blob and are mapped by the worker, read-only.
"""

from __future__ import annotations

import functools
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple, NoReturn

import msgspec

from ringpool.errors import add_note
from ringpool.shm.layout import INLINE_BYTES, Encoding, Form, ItemsEncoding
from ringpool.workers import reducers, values
from ringpool.workers.reducers import NotSharedError

_pack: Callable[[object], bytes] = msgspec.msgpack.Encoder().encode
_unpack: Callable[[bytes | memoryview], Any] = msgspec.msgpack.Decoder().decode
_SIZED = frozenset({str, bytes})
_PACKED_HEAD_BYTES = 5  # of a list of msgpack's, at most
_MSGPACK, _PICKLE = int(Encoding.MSGPACK), int(Encoding.PICKLE)
_UNSENT = "ringpool: neither pickle nor cloudpickle can send it to a worker; send what it is made of instead"
_GUARDED = (
    '; a worker imports the program\'s main module without what stands under `if __name__ == "__main__":`, so define '
    "it above that, at the top level of the module"
)


class Call(NamedTuple):
    """A call as bytes: its ``form`` (``Form``), and the payload, which may go into the record or into a blob."""

    form: int
    encoded: values.Encoded


# ---- callables -------------------------------------------------------------------------------------------------------


def is_by_name(function: object) -> bool:
    """Whether pickle sends ``function`` by its name, and a new process finds it by that."""
    if type(function) is FunctionType or (
        type(function) is BuiltinFunctionType and function.__self__ is sys.modules.get(function.__module__ or "")
    ):
        module, name = function.__module__, function.__qualname__
    else:
        return False
    return getattr(sys.modules.get(module or ""), name, None) is function and not is_lost(module)


def is_lost(module: str | None) -> bool:
    """Whether a module is a ``__main__`` that ``multiprocessing`` does not import in a new process: interactive, of
    ``python -c``, from standard input, or the ``__main__.py`` of a package, a directory or a zip file.
    """
    if module != "__main__":
        return False
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return spec.name.rpartition(".")[2] == "__main__"
    return not _is_file(main_file())


def main_file() -> str | None:
    """The file of the main module, if it has one.

    When a script has come to its end, the interpreter takes ``__file__`` from it, and only then calls what is to be
    called at exit: pools are drained after that. Until then what holds is what ``remember_main`` has seen. But not at
    the prompt of ``python -i``, where the module has more than its file.
    """
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None and main is _remembered.main() and not hasattr(sys, "ps1"):
        return _remembered.path
    return path


def remember_main() -> str | None:
    """Keep in mind what the file of the main module is, for ``main_file``; and that, where a new process is to import
    it: neither where it is a module that has a name, nor where there is no such file.

    Workers know the main module as ``__mp_main__``, and send its classes by that name. Here it is the one that was the
    main module when ``multiprocessing`` was imported: a launcher's, as ``coverage run`` is one. So it is told anew.
    """
    main = sys.modules["__main__"]
    if (path := main_file()) is not None:
        _remembered.path = path
        try:
            _remembered.main = weakref.ref(main)
        except TypeError:  # somebody has put there what is no module
            _remembered.main = lambda: main
    if getattr(sys.modules.get("__mp_main__"), "__name__", None) != "__mp_main__":  # this is no worker that has its own
        sys.modules["__mp_main__"] = main
    is_named = getattr(main, "__spec__", None) is not None
    return os.path.abspath(path) if path is not None and _is_file(path) and not is_named else None


class _Remembered:
    main: Callable[[], ModuleType | None] = staticmethod(lambda: None)  # weak: at exit, what nobody else has ends first
    path: str | None = None


_remembered = _Remembered()


@functools.lru_cache(maxsize=8)
def _is_file(path: str | None) -> bool:
    return path is not None and os.path.isfile(path)


def prepare(function: Callable[..., Any]) -> None:
    """Import what sends ``function`` by value, where that will be."""
    if not is_by_name(function):
        from ringpool.workers import byvalue as byvalue


def pickle_callable(function: Callable[..., Any]) -> bytes:
    """A callable as bytes, for any number of workers. Raises ``NotSharedError`` where only one could unpickle it, and
    what pickle raises, where cloudpickle cannot send it either.

    Where cloudpickle is there anyway, its ``register_pickle_by_value`` may have been called for the function's module.
    """
    if "cloudpickle" not in sys.modules and is_by_name(function):
        return pickle.dumps(function, 5)  # many programs never need cloudpickle
    return dumps(function, is_shared=True)


def apply(function: Callable[..., Any], *arguments: Any) -> Any:
    """For a callable that is sent with each of its calls."""
    return function(*arguments)


def dumps(
    value: object,
    buffers: list[memoryview] | None = None,
    *,
    is_shared: bool = False,
    buffer_bytes_min: float = values.OUT_OF_BAND_MIN_BYTES,
) -> bytes:
    """``value`` as bytes; where ``buffers`` is given, buffers of at least ``buffer_bytes_min`` bytes go there. Raises
    what pickle raises, noted.
    """
    keep = None if buffers is None else values.keeper(buffers, buffer_bytes_min)
    if not is_lost("__main__"):
        try:
            return reducers.dumps(value, keep, buffers, is_shared=is_shared)
        except NotSharedError:
            raise
        except Exception:
            if buffers:
                buffers.clear()
    from ringpool.workers import byvalue  # here, because most programs never need cloudpickle

    try:
        return byvalue.dumps(value, keep, is_shared=is_shared)
    except NotSharedError:
        raise
    except Exception as error:
        if _UNSENT not in getattr(error, "__notes__", ()):  # of what it holds
            add_note(error, _UNSENT)
        raise


# ---- one call --------------------------------------------------------------------------------------------------------


def encode_plain(arguments: tuple[Any, ...]) -> bytes | None:
    """The payload of form PLAIN of a call of a function known by an id, where there is one that fits a record; else
    None: use ``encode_call``. The short way for what most calls are.
    """
    try:
        body = _pack(arguments) if values.PLAIN.issuperset(map(type, arguments)) else None
    except (OverflowError, UnicodeEncodeError, TypeError):  # see encode_call; a class that cannot be hashed
        return None
    return body if body is not None and len(body) <= INLINE_BYTES else None


def encode_call(function: Callable[..., Any] | None, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Call:
    """A call as bytes; ``function`` None: the worker knows it by an id. Raises what pickle raises."""
    if function is None and not keywords and values.are_plain(arguments):
        try:
            return Call(Form.PLAIN, values.Encoded(_MSGPACK, _pack(arguments)))
        except (OverflowError, UnicodeEncodeError):
            pass  # an int beyond 64 bits, a str with surrogates
    whole = (arguments, keywords) if function is None else (function, arguments, keywords)
    buffers: list[memoryview] = []
    body = dumps(whole, buffers)
    return Call(Form.PICKLED, values.Encoded(_PICKLE, body, tuple(buffers)))


def decode_call(
    function: Callable[..., Any] | None, form: int, body: bytes | memoryview, buffers: list[memoryview] | None
) -> tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]]:
    """What ``encode_call`` encoded. Raises ``ArgumentTransportError``."""
    if form == Form.PLAIN:
        assert function is not None
        return function, _unpack(body), {}
    whole = rebuild(body, buffers)
    return whole if function is None else (function, *whole)


def rebuild(body: bytes | memoryview, buffers: list[memoryview] | None = None) -> Any:
    """What was pickled by this module. Raises ``ArgumentTransportError``."""
    try:
        return pickle.loads(body, buffers=buffers)
    except BaseException as error:  # unpickling may run anything, sys.exit too
        _refuse(error)


def _refuse(error: BaseException) -> NoReturn:
    """Raise ``ArgumentTransportError``, because of that."""
    reason = str(error)
    if isinstance(error, EOFError) and not reason:
        reason = "if it holds a connection or a socket: that can be fetched once, so such a call is not tried again"
    if isinstance(error, AttributeError) and "main__" in reason and sys.modules["__main__"].__name__ != "__main__":
        reason += _GUARDED  # multiprocessing has imported it, as "__mp_main__"
    from ringpool.errors import ArgumentTransportError  # here: no worker imports this at its start

    raise ArgumentTransportError(type(error).__qualname__, reason) from error


def encode_result(value: object) -> values.Encoded:
    """What a call returned, as bytes. Raises what pickle raises, with a note."""
    try:
        return values.encode(value)
    except BaseException as error:
        add_note(error, f"ringpool: the call's return value, of type {type(value).__qualname__}, cannot be pickled")
        raise


# ---- items of a vector -----------------------------------------------------------------------------------------------


def encode_items(items: list[Any], *, starred: bool, room_bytes: int = sys.maxsize) -> tuple[int, bytes, int]:
    """The first of the items, as many as ``room_bytes`` bytes have room for: their ``ItemsEncoding``, the bytes, and
    how many they are. ``starred``: each is a tuple of arguments. With one that cannot be sent it ends before that one.

    Items of plain types are encoded together. Others are pickled one by one, so that two items that share an object get
    one each, as they would by themselves, and one that cannot be rebuilt harms no other.
    """
    n = _n_plain(items, starred, room_bytes)
    while n is not None:
        try:
            body = _pack(items[:n])
        except (OverflowError, UnicodeEncodeError):
            break
        if len(body) <= room_bytes or not n:
            return (ItemsEncoding.PLAIN_STARRED if starred else ItemsEncoding.PLAIN), body, n
        n = min(n - 1, n * room_bytes // len(body))
    bodies: list[bytes] = []
    if not is_lost("__main__") and not reducers.are_foreign():
        bodies = _pickled(items, pickle.dumps, room_bytes)
    body = _pack(bodies)
    if not bodies or not reducers.may_do_without(body):
        bodies = _pickled(items, lambda item, _protocol: dumps(item), room_bytes)
        body = _pack(bodies)
    return (ItemsEncoding.PICKLED_STARRED if starred else ItemsEncoding.PICKLED), body, len(bodies)


def _n_plain(items: list[Any], starred: bool, room_bytes: int) -> int | None:
    """How many of the items may have room, by their texts and bytes: what is huge is not encoded only to be measured.
    None: they are not all of plain types.
    """
    try:
        kinds = set(map(type, chain.from_iterable(items) if starred else items))
    except TypeError:  # a class that cannot be hashed
        return None
    if not kinds <= values.PLAIN:
        return None
    if kinds.isdisjoint(_SIZED):
        return len(items)
    found = chain.from_iterable(items) if starred else items
    sizes = map(len, found) if kinds <= _SIZED else [len(value) for value in found if type(value) in _SIZED]
    if sum(sizes) <= room_bytes:
        return len(items)
    n_bytes = 0
    for n, item in enumerate(items):
        n_bytes += sum(len(value) for value in (item if starred else (item,)) if type(value) in _SIZED)
        if n_bytes > room_bytes:
            return n
    return len(items)


def _pickled(items: list[Any], encode: Callable[[Any, int], bytes], room_bytes: int) -> list[bytes]:
    """A pickle of each, as far as there is room, and up to one that cannot be pickled."""
    bodies: list[bytes] = []
    n_bytes = _PACKED_HEAD_BYTES
    try:
        for item in items:
            body = encode(item, 5)
            n_bytes += _PACKED_HEAD_BYTES + len(body)
            if n_bytes > room_bytes:
                break
            bodies.append(body)
    except BaseException as error:  # who comes to that one is told
        if not is_of_item(error):
            raise
    return bodies


def is_of_item(error: BaseException) -> bool:
    """Whether what pickling raised is the item's own; in the main thread, what is no ``Exception`` may be Ctrl-C."""
    return isinstance(error, Exception) or threading.current_thread() is not threading.main_thread()


def decode_items(
    function: Callable[..., Any], encoding: int, body: bytes | memoryview
) -> tuple[list[Any], Callable[[Any], Any]]:
    """The items of a vector, and what is to be called with each of them: it unpickles an item that is pickled."""
    items: list[Any] = _unpack(body)
    match encoding:
        case ItemsEncoding.PLAIN | ItemsEncoding.FILES:
            return items, function
        case ItemsEncoding.PLAIN_STARRED:
            return items, lambda item: function(*item)
        case ItemsEncoding.PICKLED:
            return items, _of_pickled(function)
        case _:
            return items, _of_pickled(lambda arguments: function(*arguments))


def _of_pickled(function: Callable[[Any], Any]) -> Callable[[bytes], Any]:
    loads = pickle.loads

    def call(item: bytes) -> Any:
        try:  # as in ``rebuild``; called once less, for each item
            found = loads(item)
        except BaseException as error:
            _refuse(error)
        return function(found)

    return call

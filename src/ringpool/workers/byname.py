"""Pickles of what a worker got by value, and sends back by name.

    coordinator --by value--> worker     a class of a ``__main__`` that workers cannot import, see ``calls``
    coordinator <--by name--- worker     an instance of it: the coordinator has the true class

For results that plain pickle refuses, and for nothing else.
"""

from __future__ import annotations

import io
import operator
import pickle
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

from ringpool.errors import RemoteError, words_of
from ringpool.workers import reducers


def dumps(value: object, keep: Callable[[pickle.PickleBuffer], bool] | None = None) -> bytes:
    """``value`` as bytes, with ``keep`` as its ``buffer_callback``. Raises what pickle raises."""
    return _dumps(value, keep)[0]


def _dumps(value: object, keep: Callable[[pickle.PickleBuffer], bool] | None = None) -> tuple[bytes, dict[str, object]]:
    file = io.BytesIO()
    pickler = _Pickler(file, 5, buffer_callback=keep)
    pickler.dump(value)
    return file.getvalue(), pickler.sent


class _Pickler(pickle.Pickler):
    """Sends classes and functions that say they are of ``__main__``, and are not those of this one, by their names.

    ``sent``: those, by name. What is local to a function has none, and of two of one name the second neither.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.sent: dict[str, object] = {}
        self.dispatch_table = reducers.table()

    def reducer_override(self, obj: Any, /) -> Any:
        if not (type(obj) is FunctionType or issubclass(type(obj), type)) or obj.__module__ != "__main__":
            return NotImplemented
        name: str = obj.__qualname__
        try:
            if of_main(name) is obj:
                return NotImplemented
        except AttributeError:
            pass
        if "<" in name or self.sent.setdefault(name, obj) is not obj:
            return NotImplemented
        return of_main, (name,)


def of_main(name: str) -> Any:
    """What this process's ``__main__`` has by a name, which may have dots. Raises ``AttributeError``."""
    try:
        return operator.attrgetter(name)(sys.modules["__main__"])
    except AttributeError:
        raise AttributeError(
            f"a worker sent {name} by its name, and __main__ has nothing of that name here; "
            "define it at the top level of __main__, or in a module"
        ) from None


# ---- exceptions ------------------------------------------------------------------------------------------------------


class ErrorByName:
    """Travels in the place of ``error``, and arrives as that; as ``words``, where its class is not found there.

    Raises what pickling it raises, and rebuilding it, which is tried here.
    """

    def __init__(self, error: BaseException, words: RemoteError) -> None:
        self._body, sent = _dumps(error)
        self._words = words
        trial = self._body if reducers.may_do_without(self._body) else _dumps(error)[0]  # see ``values.encode_error``
        require_error(_Unpickler(trial, sent).load())

    def __reduce__(self) -> tuple[Callable[..., BaseException], tuple[bytes, RemoteError]]:
        return rebuild_error, (self._body, self._words)


class _Unpickler(pickle.Unpickler):
    """Rebuilds where it was made what ``_Pickler`` made: the names are those of what was ``sent``."""

    def __init__(self, body: bytes, sent: dict[str, object]) -> None:
        super().__init__(io.BytesIO(body))
        self._sent = sent

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == (__name__, of_main.__name__):
            return self._sent.__getitem__
        return super().find_class(module_name, global_name)


def require_error(rebuilt: object) -> BaseException:
    """``rebuilt``; raises ``TypeError`` where it is no exception, whatever it says of itself."""
    if not issubclass(type(rebuilt), BaseException):
        raise TypeError(f"rebuilt, it is no exception but of type {type(rebuilt).__qualname__}")
    assert isinstance(rebuilt, BaseException)
    return rebuilt


def rebuild_error(body: bytes, words: RemoteError) -> BaseException:
    """The exception that is pickled in ``body``; ``words`` where it cannot be rebuilt, with a note that says why."""
    try:
        return require_error(pickle.loads(body))
    except Exception as error:
        words.add_note(f"ringpool: {words_of(error)}")
        return words

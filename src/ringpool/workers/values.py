"""How values travel between processes: payloads of task and result records.

    exactly None, bool, 64-bit int, float, str, bytes   msgpack
    everything else                                     pickle, protocol 5; so that a tuple stays a tuple
    more than 1,040 bytes of either                     a blob; large buffers lie in it as they are

A worker gets read-only views into the blob's mapping for out-of-band buffers, which lives as long as any of them;
whoever takes a result, views into a copy that can be written to.

A class that a worker got by value, because pickle could not name it, goes back by name, see ``byname``.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import NoneType, TracebackType
from typing import Any, NamedTuple, cast

import msgspec

from ringpool.errors import RemoteError, RingpoolError
from ringpool.shm import blobs
from ringpool.shm.layout import INLINE_BYTES, Encoding
from ringpool.workers import byname, reducers

OUT_OF_BAND_MIN_BYTES = 4096
PLAIN = frozenset({NoneType, bool, int, float, str, bytes})
_dumps = pickle.dumps
_FROM_BUFFER = b"frombuffer"  # in numpy's pickles, by whatever name of its module
_pack: Callable[[object], bytes] = msgspec.msgpack.Encoder().encode
_unpack: Callable[[bytes | memoryview], Any] = msgspec.msgpack.Decoder().decode
_MSGPACK, _PICKLE, _BLOB = int(Encoding.MSGPACK), int(Encoding.PICKLE), int(Encoding.BLOB)
# Not by attribute: a class may forbid that (a frozen dataclass), or hide it. TypeError for what is no exception.
_get_traceback: Callable[[BaseException], TracebackType | None] = vars(BaseException)["__traceback__"].__get__
_set_traceback: Callable[[object, TracebackType | None], None] = vars(BaseException)["__traceback__"].__set__
_set_cause: Callable[[object, BaseException | None], None] = vars(BaseException)["__cause__"].__set__


class Encoded(NamedTuple):
    """A value as bytes: ``encoding`` (``Encoding``, MSGPACK or PICKLE), ``body``, and out-of-band ``buffers``."""

    encoding: int
    body: bytes
    buffers: tuple[memoryview, ...] = ()

    @property
    def fits_record(self) -> bool:
        """Whether it fits a record; otherwise it goes into a blob."""
        return not self.buffers and len(self.body) <= INLINE_BYTES


def are_plain(found: Iterable[object]) -> bool:
    """Whether all are exactly of the types that travel as msgpack."""
    try:
        return PLAIN.issuperset(map(type, found))
    except TypeError:  # a class that cannot be hashed
        return False


def encode(value: object, buffer_bytes_min: float = OUT_OF_BAND_MIN_BYTES) -> Encoded:
    """``value`` as bytes, buffers of less than ``buffer_bytes_min`` in the body. Raises what pickle raises for it."""
    if are_plain((value,)):
        try:
            return Encoded(_MSGPACK, _pack(value))
        except (OverflowError, UnicodeEncodeError):
            pass  # an int beyond 64 bits, a str with surrogates (a path that is not UTF-8)
    large: list[memoryview] = []
    found: list[memoryview] = []
    keep = keeper(large, buffer_bytes_min, found)
    try:
        body = reducers.dumps(value, keep, large)
    except TypeError:
        large.clear()
        body = reducers.dumps_by_table(value, keep)
    except pickle.PicklingError:
        large.clear()
        body = byname.dumps(value, keep)  # raises the same, unless it was for that
    if any(buffer.readonly and type(buffer.obj).__module__ == "numpy" for buffer in found):
        # Of an argument, perhaps, which is read-only here. Protocol 5 would say so of the result; others copy it.
        with suppress(Exception):  # some know protocol 5 alone
            return Encoded(_PICKLE, reducers.dumps(value, None, None, protocol=4))
    return Encoded(_PICKLE, body, tuple(large))


def keeper(
    large: list[memoryview], bytes_min: float = OUT_OF_BAND_MIN_BYTES, found: list[memoryview] | None = None
) -> Callable[[pickle.PickleBuffer], bool]:
    """A ``buffer_callback`` that puts buffers of ``bytes_min`` bytes and more into ``large``; others stay in band. All
    go into ``found``, where that is given.
    """

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if found is not None:
            found.append(raw)
        if raw.nbytes < bytes_min:
            return True
        large.append(raw)
        return False

    return keep_in_band


def encode_inline(value: object) -> bytes | None:
    """``value`` as msgpack that fits a record, or None: the short way for what most tasks return."""
    try:
        body = _pack(value) if type(value) in PLAIN else None
    except (OverflowError, UnicodeEncodeError, TypeError):  # the last: a class that cannot be hashed
        return None
    return body if body is not None and len(body) <= INLINE_BYTES else None


def encode_short(value: object) -> bytes | None:
    """``value`` as a pickle, the same that ``encode`` makes, or None: the short way for small containers."""
    kind = type(value)
    if kind is not dict and kind is not list and kind is not tuple and kind is not set:
        return None
    try:
        body = _dumps(value, 5)
    except Exception:  # ``encode`` knows more ways, or says why not
        return None
    is_short = len(body) < OUT_OF_BAND_MIN_BYTES  # so has no buffer that would be out of band
    if not is_short or body.find(_FROM_BUFFER) >= 0:  # nor one that may be read-only
        return None
    return body if not reducers.are_foreign() and reducers.may_do_without(body) else None


def decode(encoding: int, body: bytes | memoryview, buffers: list[memoryview] | None = None) -> Any:
    """The value of an ``Encoded``. Raises whatever pickle raises for it."""
    return _unpack(body) if encoding == _MSGPACK else pickle.loads(body, buffers=buffers)


def write_blob(name: str, encoded: Encoded, spares: Sequence[str] = ()) -> int:
    """Make blob ``name`` of an encoded value, see ``blobs.write``. Raises ``SharedMemoryFullError``."""
    return blobs.write(name, Encoding(encoded.encoding), encoded.body, encoded.buffers, spares)


def encode_result(value: object) -> Encoded:
    """``encode`` for a task's return value. Raises ``ResultTransportError`` where it cannot travel."""
    try:
        return encode(value)
    except Exception as error:
        from ringpool.errors import ResultTransportError  # here, and above: no worker imports this at its start

        raise ResultTransportError(type(value).__qualname__, f"{type(error).__name__}: {error}") from error


def encode_error(error: BaseException) -> Encoded:
    """An exception with its traceback. One that cannot be pickled and rebuilt becomes a ``RemoteError`` in words."""
    text = _traceback_of(error)
    try:
        try:
            body = _dumps_error(error, text)
            # Many an exception can be pickled and not be rebuilt: find that out here, not in the collector. Its
            # descriptors can be fetched once, by the collector: this is tried with others.
            trial = body if reducers.may_do_without(body) else _dumps_error(error, text)
            byname.require_error(pickle.loads(trial)[0])
        except pickle.PicklingError:
            body = pickle.dumps((byname.ErrorByName(error, _in_words(error, text)), text), 5)
    except BaseException:  # pickling may run anything, sys.exit too
        body = pickle.dumps((_in_words(error, text), text), 5)
    return Encoded(_PICKLE, body)


def _dumps_error(error: BaseException, text: str) -> bytes:
    try:
        return _dumps_as_it_is(error, text)
    except RecursionError:  # of frames, it may be, which some programs have pickled as well (``tblib``)
        frames = [(each, _get_traceback(each)) for each in _all_of(error)]
        try:
            for each, _ in frames:
                _set_traceback(each, None)
            return _dumps_as_it_is(error, text)
        finally:
            for each, its_frames in frames:
                _set_traceback(each, its_frames)


def _dumps_as_it_is(error: BaseException, text: str) -> bytes:
    try:
        return reducers.dumps((error, text), None, None)
    except TypeError:
        return reducers.dumps_by_table((error, text), None)


def _all_of(error: BaseException) -> list[BaseException]:
    """It, what led to it, and the members of groups."""
    found: dict[int, BaseException] = {}
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in found:
            found[id(one)] = one
            waiting += [one.__cause__, one.__context__]
            if isinstance(one, BaseExceptionGroup):
                waiting += cast("BaseExceptionGroup[BaseException]", one).exceptions
    return list(found.values())


def _traceback_of(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except BaseException:  # it asks the exception for its length, among other things
        frames = "".join(traceback.format_tb(_get_traceback(error)))
        return f"Traceback (most recent call last):\n{frames}{type(error).__qualname__}: {_message(error)}\n"


def decode_error(value: tuple[BaseException, str]) -> BaseException:
    """The exception of ``encode_error``, with its traceback as its cause, as ``ProcessPoolExecutor`` has it.

    ``ResultTransportError`` where what was rebuilt here is no exception.
    """
    error, text = value
    try:
        _set_cause(error, _traceback_in_words(text))
    except TypeError as refusal:
        return undecodable(refusal, type(error).__qualname__)
    return error


def undecodable(error: BaseException, type_name: str) -> RingpoolError:
    """The error for a value that arrived as bytes and cannot be rebuilt here; why, with its traceback, as its cause."""
    from ringpool.errors import ResultTransportError

    refusal = ResultTransportError(type_name, f"it cannot be rebuilt here: {type(error).__name__}: {_message(error)}")
    refusal.__cause__ = _traceback_in_words(_traceback_of(error))  # the error itself would keep all of its frames
    return refusal


def _traceback_in_words(text: str) -> BaseException:
    """What is to be the cause of an error, and shown with it: of the class that ``ProcessPoolExecutor`` has for it."""
    from concurrent.futures.process import _RemoteTraceback as RemoteTraceback  # pyright: ignore[reportPrivateUsage]

    return RemoteTraceback(f'\n"""\n{text}"""')  # pyright: ignore[reportArgumentType]  (typeshed errs)


def _in_words(error: BaseException, text: str) -> RemoteError:
    return RemoteError(type(error).__qualname__, _message(error), text)


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as second:
        return f"<no message: {type(second).__name__}>"

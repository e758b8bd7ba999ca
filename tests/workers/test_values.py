"""Values: what arrives is what was sent, of the very same type; and what cannot travel is said in words."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import pickle
import secrets
import sys
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from concurrent.futures.process import _RemoteTraceback as RemoteTraceback
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ringpool.errors import RemoteError, ResultTransportError, WorkerDiedError
from ringpool.shm import blobs, owner, segment
from ringpool.shm.layout import INLINE_BYTES, Encoding
from ringpool.workers import values

Point = namedtuple("Point", "x y")
MSGPACK, PICKLE = int(Encoding.MSGPACK), int(Encoding.PICKLE)


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


@pytest.fixture
def blob() -> Iterator[str]:
    me = owner.this_process()
    stem = f"rp.{owner.pid_namespace()}.{me.pid}.{me.start}.{secrets.token_hex(4)}"
    yield f"{stem}.r1.0"
    segment.unlink(stem)
    assert not [name for name in os.listdir(segment.SHM_DIRECTORY) if stem in name]


def travel(value: object) -> Any:
    encoded = values.encode(value)
    return values.decode(encoded.encoding, encoded.body, list(encoded.buffers))


def same(left: Any, right: Any) -> bool:
    """Equal and of one type, all the way down; nan is nan, and -0.0 is not 0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (left.hex() == right.hex())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    return bool(left == right)


# ---- plain values ----------------------------------------------------------------------------------------------------

PLAIN = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63 - 1,
    2**64 - 1,
    -(2**63),
    0.0,
    -0.0,
    1e308,
    5e-324,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "text",
    "\0",
    "Gr\u00fc\u00dfe \U0001f600",
    b"",
    b"\0\xff",
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_a_plain_value_travels_as_msgpack_and_keeps_its_type(value: object) -> None:
    encoded = values.encode(value)
    assert encoded.encoding == MSGPACK
    assert encoded.fits_record
    assert values.encode_inline(value) == encoded.body
    assert same(travel(value), value)


@pytest.mark.parametrize(
    "value",
    [
        2**64,
        -(2**63) - 1,
        10**400,
        os.fsdecode(b"caf\xe9"),
        "\ud800",
        (),
        (1, (2, [3])),
        [1, (2,)],
        {"a": (1,), 2: b"x"},
        {1, 2},
        frozenset({1}),
        1j,
        bytearray(b"x"),
        Path("a/b"),
        Point(1, 2),
        Colour.RED,
        Text("x"),
        slice(1, 2),
        range(3),
        len,
        int,
        Ellipsis,
    ],
    ids=ascii,
)
def test_any_other_value_travels_by_pickle_and_keeps_its_type(value: object) -> None:
    assert values.encode(value).encoding == PICKLE
    assert values.encode_inline(value) is None
    assert same(travel(value), value)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary()
nested = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(nested)
def test_what_arrives_is_what_was_sent(value: object) -> None:
    assert same(travel(value), value)
    inline = values.encode_inline(value)
    assert inline is None or same(values.decode(MSGPACK, inline), value)


@pytest.mark.parametrize(("n", "fits"), [(INLINE_BYTES - 3, True), (INLINE_BYTES - 2, False)])
def test_a_value_fits_a_record_up_to_its_last_byte(n: int, fits: bool) -> None:
    value = b"x" * n  # msgpack spends three bytes on the length
    assert len(values.encode(value).body) == n + 3
    assert values.encode(value).fits_record == fits
    assert (values.encode_inline(value) is not None) == fits


# ---- buffers and blobs -----------------------------------------------------------------------------------------------


def test_a_large_buffer_is_not_copied_into_the_pickle() -> None:
    array = np.arange(100_000)
    encoded = values.encode([array, "and"])
    assert not encoded.fits_record
    assert len(encoded.body) < 1000
    [buffer] = encoded.buffers
    assert np.shares_memory(np.frombuffer(buffer, dtype=array.dtype), array)


def test_a_small_buffer_stays_in_the_pickle() -> None:
    small = np.arange(8)
    encoded = values.encode(small)
    assert encoded.fits_record
    assert encoded.buffers == ()
    assert np.array_equal(travel(small), small)


@pytest.mark.parametrize("n_bytes", [values.OUT_OF_BAND_MIN_BYTES - 8, values.OUT_OF_BAND_MIN_BYTES])
def test_the_limit_between_them_is_where_it_is_said_to_be(n_bytes: int) -> None:
    encoded = values.encode(np.zeros(n_bytes, dtype=np.uint8))
    assert bool(encoded.buffers) == (n_bytes >= values.OUT_OF_BAND_MIN_BYTES)


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(20_000, dtype=np.float32),
        np.arange(20_000).reshape(100, 200).T,
        np.arange(20_000)[::2],
        np.zeros((0, 5)),
        np.array(["a", "bc"] * 4000),
        np.array([1 + 2j] * 4000),
    ],
    ids=["floats", "transposed", "strided", "empty", "texts", "complex"],
)
def test_an_array_comes_back_from_a_blob_as_it_was(array: np.ndarray[Any, Any], writable: bool, blob: str) -> None:
    values.write_blob(blob, values.encode({"array": array}))
    found = values.decode(*blobs.read(blob, writable=writable))["array"]
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)
    if array.nbytes >= values.OUT_OF_BAND_MIN_BYTES and (array.flags.c_contiguous or array.flags.f_contiguous):
        assert found.flags.writeable == writable


@pytest.mark.parametrize(
    "value", ["x" * 5000, b"y" * 5000, ("z",) * 5000, 10**5000], ids=["str", "bytes", "tuple", "int"]
)
def test_a_large_value_comes_back_from_a_blob_and_keeps_its_type(value: object, blob: str) -> None:
    size_bytes = values.write_blob(blob, values.encode(value))
    assert size_bytes == os.stat(f"{segment.SHM_DIRECTORY}/{blob}").st_size
    assert same(values.decode(*blobs.take(blob)), value)
    assert not blobs.exists(blob)


# ---- what cannot travel ----------------------------------------------------------------------------------------------


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


@pytest.mark.parametrize(
    "value",
    [Unpicklable(), lambda: None, (i for i in ()), sys.stdout, memoryview(b"x")],
    ids=["its own refusal", "lambda", "generator", "open file", "memoryview"],
)
def test_a_return_value_that_cannot_be_pickled_is_said_in_words(value: object) -> None:
    with pytest.raises(ResultTransportError) as caught:
        values.encode_result(value)
    assert caught.value.type_name == type(value).__qualname__
    assert caught.value.__cause__ is not None
    assert type(caught.value.__cause__).__name__ in caught.value.reason


class PlainError(Exception):
    pass


class LockedError(Exception):
    def __init__(self) -> None:
        super().__init__("a lock hangs on it")
        self.hold = lambda: None


class NotRebuiltError(Exception):
    """Pickle takes it, and calls it with the wrong arguments when it rebuilds it: a very common mistake."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


class RaisesWhenRebuiltError(Exception):
    def __reduce__(self) -> Any:
        return int, ("no number",)


class NoneWhenRebuiltError(Exception):
    def __reduce__(self) -> Any:
        return type, (None,)


class ClassWhenRebuiltError(Exception):
    def __reduce__(self) -> Any:
        return "ClassWhenRebuiltError"


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class FrozenFactsError(Exception):
    code: int = 3


class UnchangingError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise ArithmeticError(name)


class CauselessError(Exception):
    __cause__ = property(lambda self: None)  # type: ignore[assignment]


class LengthlessError(Exception):
    def __len__(self) -> int:
        raise ArithmeticError("no length")


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError

    def __reduce__(self) -> Any:
        raise TypeError


def arrive(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as raised:
        encoded = values.encode_error(raised)
    assert encoded.encoding == PICKLE
    return values.decode_error(values.decode(encoded.encoding, encoded.body, []))


@pytest.mark.parametrize(
    "error",
    [
        PlainError("why", 1),
        ValueError("bad"),
        OSError(2, "No such file", "a/b"),
        KeyError("k"),
        SystemExit(3),
        KeyboardInterrupt(),
        StopIteration(4),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        WorkerDiedError(9, None, 1, "task", 2),
        ExceptionGroup("several", [ValueError("one"), PlainError("two")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_arrives_as_itself_with_the_traceback_of_the_worker(error: BaseException) -> None:
    found = arrive(error)
    assert type(found) is type(error)
    assert str(found) == str(error)
    if not isinstance(error, ExceptionGroup):
        assert found.args == error.args
    assert isinstance(found.__cause__, RemoteTraceback)
    assert str(found.__cause__).startswith('\n"""\n')
    assert "Traceback (most recent call last)" in str(found.__cause__)
    assert "in arrive" in str(found.__cause__)


def test_an_exception_that_has_a_reducer_of_multiprocessing_goes_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce(error: LockedError) -> tuple[type[ValueError], tuple[str]]:
        return ValueError, (f"{error} by its reducer",)

    monkeypatch.setitem(ForkingPickler._extra_reducers, LockedError, reduce)  # pyright: ignore
    error = arrive(LockedError())
    assert (type(error), error.args) == (ValueError, ("a lock hangs on it by its reducer",))


def test_the_facts_of_an_exception_arrive() -> None:
    found = arrive(OSError(2, "No such file", "a/b"))
    assert isinstance(found, FileNotFoundError)
    assert (found.errno, found.filename) == (2, "a/b")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LockedError(), "a lock hangs on it"),
        (NotRebuiltError(5, "bad"), "5: bad"),
        (RaisesWhenRebuiltError("it"), "it"),
        (NoneWhenRebuiltError("it"), "it"),
        (ClassWhenRebuiltError("it"), "it"),
        (FrozenFactsError(), ""),
        (SpeechlessError(), "<no message: ZeroDivisionError>"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_exception_that_cannot_travel_arrives_in_words(error: Exception, message: str) -> None:
    found = arrive(error)
    assert isinstance(found, RemoteError)
    assert found.type_name == type(error).__qualname__
    assert found.message == message
    assert "in arrive" in found.traceback
    assert "in arrive" in str(found.__cause__)
    assert message in str(found)


def test_a_local_exception_class_arrives_in_words() -> None:
    class LocalError(Exception):
        pass

    found = arrive(LocalError("here"))
    assert isinstance(found, RemoteError)
    assert found.message == "here"


class FramesError(Exception):
    """Pickled as tblib has exceptions pickled: with the traceback, frame by frame."""

    def __reduce__(self) -> Any:
        n_frames, frame = 0, self.__traceback__
        while frame is not None:
            n_frames, frame = n_frames + 1, frame.tb_next
        if n_frames > 50:
            raise RecursionError("maximum recursion depth exceeded while pickling an object")
        return type(self), (n_frames,)


def raise_deep(error: BaseException, n_frames: int) -> None:
    if n_frames:
        raise_deep(error, n_frames - 1)
    raise error


@pytest.mark.parametrize(("n_frames", "arrived"), [(3, 4), (60, 0)])
@pytest.mark.parametrize("of", ["itself", "cause", "member"])
def test_frames_that_are_pickled_as_well_are_left_out_where_they_are_too_many(
    n_frames: int, arrived: int, of: str
) -> None:
    """As a thousand are, of a RecursionError."""
    inner = FramesError()
    with pytest.raises(FramesError):
        raise_deep(inner, n_frames - 1)
    error: BaseException = inner
    if of == "cause":
        error = FramesError()
        error.__cause__ = inner
    elif of == "member":
        error = ExceptionGroup("several", [inner])
    before = inner.__traceback__
    found = values.decode_error(pickle.loads(values.encode_error(error).body))
    assert type(found) is type(error)
    assert inner.__traceback__ is before is not None
    if of == "itself":
        assert found.args == (arrived,)
        assert "in raise_deep" in str(found.__cause__)


def test_causes_and_notes_stand_in_the_traceback() -> None:
    error = PlainError("outer")
    error.__cause__ = ValueError("inner")
    error.add_note("and a note")
    found = arrive(error)
    assert type(found) is PlainError
    text = str(found.__cause__)
    assert "ValueError: inner" in text
    assert "direct cause of the following exception" in text
    assert "and a note" in text


def test_a_cause_that_cannot_be_pickled_does_no_harm() -> None:
    error = PlainError("outer")
    error.__cause__ = LockedError()
    found = arrive(error)
    assert type(found) is PlainError
    assert "a lock hangs on it" in str(found.__cause__)


def test_a_traceback_of_the_worker_can_travel_on() -> None:
    found = arrive(PlainError("why"))
    cause = found.__cause__
    assert isinstance(cause, RemoteTraceback)
    assert str(pickle.loads(pickle.dumps(cause))) == str(cause)


def test_bytes_that_cannot_be_rebuilt_here_are_said_in_words() -> None:
    error = values.undecodable(ModuleNotFoundError("No module named 'x'"), "Thing")
    assert isinstance(error, ResultTransportError)
    assert str(error) == (
        "the task's return value, of type Thing, cannot travel between processes: "
        "it cannot be rebuilt here: ModuleNotFoundError: No module named 'x'"
    )


@pytest.mark.parametrize("error", [FrozenError(), UnchangingError("it"), CauselessError("it")], ids=repr)
def test_an_exception_that_cannot_be_changed_arrives_as_itself(error: Exception) -> None:
    found = arrive(error)
    assert type(found) is type(error)
    if not isinstance(error, CauselessError):
        assert "in arrive" in str(found.__cause__)


def test_an_exception_that_cannot_be_printed_arrives_with_where_it_was_raised() -> None:
    found = arrive(LengthlessError("it"))
    assert type(found) is LengthlessError
    assert "in arrive" in str(found.__cause__)
    assert "LengthlessError: it" in str(found.__cause__)


@pytest.mark.parametrize("rebuilt", ["a text", ("a", "tuple"), ValueError, None], ids=repr)
def test_what_is_rebuilt_here_as_no_exception_is_an_error(rebuilt: Any) -> None:
    found = values.decode_error((rebuilt, "a traceback"))
    assert isinstance(found, ResultTransportError)
    assert found.type_name == type(rebuilt).__qualname__


@pytest.mark.parametrize(
    "value", [{"a": 1}, [1, [2, {3}]], (None, "x" * 4000), {1, 2}, {"b": bytes(3000)}, [np.float64(1)], []]
)
def test_the_short_way_makes_the_same(value: object) -> None:
    assert values.encode_short(value) == values.encode(value).body


@pytest.mark.parametrize(
    "value",
    [
        *(1, "text", b"bytes", None, OrderedDict(a=1), [bytes(5000)], [threading.Lock()]),
        *([np.ones(600)], [np.ones(2)], np.ones(2)),  # which may be read-only
    ],
)
def test_the_short_way_is_for_small_containers_that_pickle_alone_can_send(value: object) -> None:
    assert values.encode_short(value) is None

"""Calls and items as bytes: what arrives is what was sent, of the very same type; what cannot be sent says so."""

from __future__ import annotations

import functools
import inspect
import math
import multiprocessing
import operator
import os
import pickle
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, strategies as st
from tests.workers.test_values import PLAIN, Colour, Point, same

from ringpool.errors import ArgumentTransportError, RemoteError
from ringpool.shm import blobs, owner, segment
from ringpool.shm.layout import CHUNK_BYTES, Encoding, Form, ItemsEncoding
from ringpool.workers import calls, values
from ringpool.workers.values import OUT_OF_BAND_MIN_BYTES

WATCHDOG_S = 30.0

ROOT = Path(__file__).resolve().parents[2]
NOT_PLAIN = [2**64, -(2**63) - 1, "\ud800", (), [1], {"a": 1}, {1}, 1j, Point(1, 2), Colour.RED, bytearray(b"x"), len]


def call(*arguments: Any, **keywords: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What it was called with."""
    return arguments, keywords


def twice(value: Any) -> Any:
    return value, value


class Refuses:
    """It cannot be pickled."""

    def __reduce__(self) -> Any:
        raise LookupError("not me")


class Undone:
    """It can be pickled; unpickling calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.how = function, arguments

    def __reduce__(self) -> Any:
        return self.how


def interrupt() -> None:
    raise KeyboardInterrupt


class MuteError(Exception):
    """It has no message, and says so by an exception."""

    def __str__(self) -> str:
        raise RuntimeError


def raise_mute() -> None:
    raise MuteError


class Methods:
    def bound(self, value: int) -> int:
        return value + 1

    @classmethod
    def of_class(cls, value: int) -> int:
        return value + 2

    @staticmethod
    def static(value: int) -> int:
        return value + 3

    def __call__(self, value: int) -> int:
        return value + 4


def travel(
    arguments: tuple[Any, ...], keywords: dict[str, Any] | None = None, function: Callable[..., Any] | None = None
) -> Any:
    """Send a call, by the id of ``call`` where there is no function, and make it."""
    sent = calls.encode_call(function, arguments, keywords or {})
    decoded = calls.decode_call(
        None if function else call, sent.form, sent.encoded.body, list(sent.encoded.buffers) or None
    )
    return decoded[0](*decoded[1], **decoded[2])


@pytest.fixture
def blob() -> Iterator[str]:
    me = owner.this_process()
    stem = f"rp.{owner.pid_namespace()}.{me.pid}.{me.start}.{secrets.token_hex(4)}"
    yield blobs.payload_name(stem, 1)
    segment.unlink(stem)


# ---- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_arguments_of_a_known_function_travel_as_msgpack(value: object) -> None:
    sent = calls.encode_call(None, (value, 1, value), {})
    assert (sent.form, sent.encoded.encoding) == (Form.PLAIN, Encoding.MSGPACK)
    assert same(travel((value, 1, value)), ((value, 1, value), {}))


@pytest.mark.parametrize("value", NOT_PLAIN, ids=repr)
def test_other_arguments_travel_as_pickles(value: object) -> None:
    sent = calls.encode_call(None, (value, 1), {})
    assert (sent.form, sent.encoded.encoding) == (Form.PICKLED, Encoding.PICKLE)
    assert same(travel((value, 1)), ((value, 1), {}))


@pytest.mark.parametrize("function", [None, call], ids=["by its id", "with the call"])
@pytest.mark.parametrize("arguments", [(), (1,), ([1], "x")], ids=repr)
@pytest.mark.parametrize("keywords", [{}, {"function": 1, "arguments": (2,), "self": None}], ids=repr)
def test_a_call_is_made_as_it_was_meant(
    function: Callable[..., Any] | None, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    assert same(travel(arguments, keywords, function), (arguments, keywords))


def test_arguments_that_are_one_object_stay_one_in_a_call() -> None:
    shared: list[int] = []
    (first, second), _ = travel((shared, shared))
    assert first is second


def test_a_recursive_argument_arrives_as_such() -> None:
    loop: list[Any] = []
    loop.append(loop)
    (arrived,), _ = travel((loop,))
    assert arrived[0] is arrived


@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()), max_size=6))
def test_any_plain_arguments_arrive_as_they_were(arguments: list[Any]) -> None:
    assert same(travel(tuple(arguments)), (tuple(arguments), {}))


# ---- functions -------------------------------------------------------------------------------------------------------


def closure() -> Callable[[int], int]:
    add = 5
    return lambda value: value + add


FUNCTIONS = [
    (operator.neg, -1),
    (abs, 1),
    (functools.partial(operator.add, 6), 7),
    (Methods().bound, 2),
    (Methods.of_class, 3),
    (Methods.static, 4),
    (Methods(), 5),
    (lambda value: value + 7, 8),
    (closure(), 6),
    (functools.partial(closure()), 6),
    (str, "1"),
    ("x".__add__, None),
]


@pytest.mark.parametrize(
    ("function", "result"), FUNCTIONS, ids=lambda each: getattr(each, "__qualname__", type(each).__name__)
)
def test_anything_callable_travels(function: Callable[..., Any], result: object) -> None:
    argument = "y" if result is None else 1
    expected = "xy" if result is None else result
    assert travel((argument,), function=function) == expected
    assert calls.rebuild(calls.pickle_callable(function))(argument) == expected


def test_only_what_every_process_finds_under_its_name_goes_by_it() -> None:
    by_name = [call, twice, len, math.sqrt, os.getpid]
    others = [
        closure(),
        lambda: 0,
        Methods().bound,
        Methods.static,
        Methods.of_class,
        Methods(),
        Methods,
        functools.partial(call),
        [].append,
        functools.lru_cache(call),
    ]
    assert [function for function in by_name if not calls.is_by_name(function)] == []
    assert [function for function in others if calls.is_by_name(function)] == []


def test_code_that_goes_by_value_keeps_the_name_of_its_file() -> None:
    def outer() -> Callable[..., Any]:
        return lambda: 1

    made = calls.rebuild(calls.pickle_callable(outer))
    assert [made.__code__.co_filename, made().__code__.co_filename] == [__file__, __file__]
    assert inspect.getsource(made) == inspect.getsource(outer)
    assert made.__code__ == outer.__code__


def test_a_function_whose_name_is_anothers_goes_by_value() -> None:
    def call(value: int) -> int:
        return value + 100

    call.__module__, call.__qualname__ = __name__, "call"
    assert not calls.is_by_name(call)
    assert travel((1,), function=call) == 101


PROGRAM = """
import sys
from ringpool.workers import calls

base = 40

class Kind:
    value = 2

def add(kind):
    return base + kind.value

class Mark(Exception):
    pass

{body}
"""
SEND = """
assert not calls.is_by_name(add)
sent = calls.encode_call(add, (Kind(),), {})
sys.stdout.buffer.write(sent.encoded.body)
sys.stdout.flush()
"""


def interactive(how: list[str], text: str) -> bytes:
    """What a program whose ``__main__`` is no file writes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *(path or "." for path in sys.path)])}
    command = [sys.executable, *how]
    done = subprocess.run(command, input=text.encode(), env=environment, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@pytest.mark.parametrize("how", ["-c", "-"])
def test_a_function_of_a_main_that_is_no_file_is_sent_with_its_classes_and_globals(how: str) -> None:
    text = PROGRAM.format(body=SEND)
    body = interactive(["-c", text], "") if how == "-c" else interactive(["-"], text)
    function, arguments, keywords = calls.decode_call(None, Form.PICKLED, body, None)
    assert function(*arguments, **keywords) == 42


# ---- what cannot be sent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", [Refuses(), [Refuses()], open, (i for i in ())], ids=["it", "in it", "ok", "iter"])
def test_an_argument_that_cannot_be_pickled_raises_with_the_remedy(argument: object) -> None:
    if argument is open:
        assert travel((argument,))[0] == (argument,)
        return
    with pytest.raises((LookupError, TypeError)) as caught:
        calls.encode_call(None, (argument,), {})
    assert any("what it is made of" in note for note in caught.value.__notes__)


def test_a_function_that_cannot_be_pickled_raises_with_the_remedy() -> None:
    lock = Refuses()
    with pytest.raises(LookupError, match="not me") as caught:
        calls.pickle_callable(lambda: lock)
    assert any("what it is made of" in note for note in caught.value.__notes__)


def test_a_first_try_that_fails_leaves_no_buffers_behind() -> None:
    array = np.arange(5000)
    sent = calls.encode_call(lambda given: given, (array,), {})
    assert len(sent.encoded.buffers) == 1
    assert travel((array,), function=lambda given: given).sum() == array.sum()


@pytest.mark.parametrize(
    ("thing", "type_name", "reason"),
    [
        (Undone(sys.exit, 3), "SystemExit", "3"),
        (Undone(interrupt), "KeyboardInterrupt", ""),
        (Undone(int, "x"), "ValueError", "invalid literal"),
    ],
    ids=["exits", "interrupts", "raises"],
)
def test_an_argument_that_cannot_be_rebuilt_is_an_error_of_its_own(thing: Undone, type_name: str, reason: str) -> None:
    for function in (None, call):
        with pytest.raises(ArgumentTransportError) as caught:
            travel((thing,), function=function)
        assert caught.value.type_name == type_name
        assert reason in caught.value.reason
        assert type(caught.value.__cause__).__name__ == type_name
        assert same(vars(pickle.loads(pickle.dumps(caught.value))), vars(caught.value))


@pytest.mark.parametrize("body", [b"", b"no pickle", pickle.dumps(call)[:-5]], ids=["empty", "other", "cut"])
def test_bytes_that_are_no_pickle_are_an_error(body: bytes) -> None:
    with pytest.raises(ArgumentTransportError):
        calls.rebuild(body)


def test_a_result_that_cannot_be_pickled_says_of_what_type_it_was() -> None:
    with pytest.raises(LookupError, match="not me") as caught:
        calls.encode_result(Refuses())
    assert any("return value, of type Refuses" in note for note in caught.value.__notes__)


def test_a_result_whose_pickling_exits_says_so_too() -> None:
    class Exits:
        def __reduce__(self) -> Any:
            sys.exit(4)

    with pytest.raises(SystemExit) as caught:
        calls.encode_result([Exits()])
    assert any("return value, of type list" in note for note in caught.value.__notes__)


# ---- what goes back by name ------------------------------------------------------------------------------------------


def of_main(name: str, base: type = object) -> Any:
    """A class as a worker has it that got it by value."""
    return type(name.rpartition(".")[2], (base,), {"__module__": "__main__", "__qualname__": name})


def returned(value: object) -> Any:
    sent = calls.encode_result(value)
    return values.decode(sent.encoding, sent.body, list(sent.buffers) or None)


def raised(error: BaseException) -> BaseException:
    sent = values.encode_error(error)
    return values.decode_error(values.decode(sent.encoding, sent.body))


def test_an_instance_of_a_class_of_main_is_one_of_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "Kind", true := of_main("Kind"), raising=False)
    monkeypatch.setattr(true, "Inner", inner := of_main("Kind.Inner"), raising=False)
    array = np.arange(5000)
    found = returned([of_main("Kind")(), of_main("Kind.Inner")(), array, Point(1, 2)])
    assert [type(each) for each in found] == [true, inner, np.ndarray, Point]
    assert np.array_equal(found[2], array)
    assert type(returned(true())) is true


def test_an_exception_of_a_class_of_main_is_one_of_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    true = of_main("OwnError", ValueError)
    sent = of_main("OwnError", ValueError)("words of it")
    words = raised(sent)
    assert isinstance(words, RemoteError)
    assert (words.type_name, words.message) == ("OwnError", "words of it")
    assert "OwnError by its name" in words.__notes__[0]
    monkeypatch.setattr(sys.modules["__main__"], "OwnError", true, raising=False)
    error = raised(sent)
    assert (type(error), error.args) == (true, ("words of it",))
    assert "words of it" in str(error.__cause__)


def test_an_exception_of_a_class_of_main_brings_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = multiprocessing.Pipe()
    monkeypatch.setattr(sys.modules["__main__"], "OwnError", true := of_main("OwnError", ValueError), raising=False)
    with here, there:
        error = raised(of_main("OwnError", ValueError)("words of it", there))
        assert type(error) is true
        with error.args[1] as end:
            assert end.fileno() != there.fileno()
            end.send("well")
        assert here.poll(WATCHDOG_S)
        assert here.recv() == "well"
        there.send("still its own")
        assert here.recv() == "still its own"


def test_a_name_that_the_reader_does_not_have_says_so() -> None:
    with pytest.raises(AttributeError, match=r"a worker sent Kind\.Inner by its name"):
        returned(of_main("Kind.Inner")())


@pytest.mark.parametrize("name", ["make.<locals>.Kind", "<lambda>"])
def test_what_has_no_name_does_not_go_by_it(name: str) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)) as caught:
        calls.encode_result(of_main(name)())
    assert any("return value, of type" in note for note in caught.value.__notes__)


def test_two_classes_of_one_name_do_not_become_one() -> None:
    with pytest.raises(pickle.PicklingError, match="Kind"):
        calls.encode_result([of_main("Kind")(), of_main("Kind")()])


NESTED = """
class Inner(Kind):
    pass

Kind.Inner, Inner.__qualname__ = Inner, "Kind.Inner"

def make():
    class Local:
        pass
    return Local

sys.stdout.buffer.write(calls.encode_call(None, (Kind.Inner, Kind, make()), {}).encoded.body)
"""


def test_a_class_that_goes_by_value_keeps_its_whole_name() -> None:
    _, classes, _ = calls.decode_call(call, Form.PICKLED, interactive(["-c", PROGRAM.format(body=NESTED)], ""), None)
    assert [each.__qualname__ for each in classes] == ["Kind.Inner", "Kind", "make.<locals>.Local"]
    assert classes[1].Inner is classes[0]


# ---- arrays ----------------------------------------------------------------------------------------------------------


def test_a_large_array_goes_beside_the_pickle_and_a_small_one_within() -> None:
    large = np.arange(OUT_OF_BAND_MIN_BYTES, dtype="u1")
    small = large[:-1].copy()
    sent = calls.encode_call(None, (large, small, large), {"more": large * 2})
    assert [buffer.nbytes for buffer in sent.encoded.buffers] == [OUT_OF_BAND_MIN_BYTES] * 2
    assert len(sent.encoded.body) < 2 * OUT_OF_BAND_MIN_BYTES


@pytest.mark.parametrize("n_bytes", [OUT_OF_BAND_MIN_BYTES, 1 << 20], ids=["copied", "mapped"])
def test_an_array_is_read_only_in_the_worker_and_not_copied(blob: str, n_bytes: int) -> None:
    array = np.arange(n_bytes // 8)
    sent = calls.encode_call(None, (array, "beside"), {})
    values.write_blob(blob, sent.encoded)
    _, body, buffers = blobs.read(blob)
    _, arguments, _ = calls.decode_call(call, sent.form, body, buffers)
    arrived = arguments[0]
    assert np.array_equal(arrived, array)
    assert np.shares_memory(arrived, np.frombuffer(buffers[0], dtype=array.dtype))
    assert not arrived.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        arrived[0] = 1
    del buffers, body
    blobs.unlink(blob)
    assert np.array_equal(arrived, array)  # its mapping lives as long as it does


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 3)),
        np.asfortranarray(np.arange(4000.0).reshape(40, 100)),
        np.arange(8000)[::2],
        np.array(["a", None] * 3000, dtype=object),
        np.zeros(700, dtype=[("x", "i4"), ("y", "f8")]),
    ],
    ids=["empty", "Fortran", "strided", "objects", "records"],
)
def test_arrays_of_any_kind_arrive(blob: str, array: Any) -> None:
    sent = calls.encode_call(None, (array,), {})
    values.write_blob(blob, sent.encoded)
    _, body, buffers = blobs.read(blob)
    _, (arrived,), _ = calls.decode_call(call, sent.form, body, buffers)
    assert arrived.dtype == array.dtype
    assert np.array_equal(arrived, array)


# ---- items -----------------------------------------------------------------------------------------------------------


def run(items: list[Any], *, starred: bool, function: Callable[..., Any] = call) -> list[Any]:
    """Send items, and call with each of them."""
    encoding, body, n = calls.encode_items(items, starred=starred)
    assert n == len(items)
    arrived, call_one = calls.decode_items(function, int(encoding), body)
    assert len(arrived) == len(items)
    return [call_one(item) for item in arrived]


def test_plain_items_are_encoded_together() -> None:
    assert calls.encode_items(PLAIN, starred=False)[0] == ItemsEncoding.PLAIN
    assert same(run(PLAIN, starred=False), [((value,), {}) for value in PLAIN])
    starred = [(value, i) for i, value in enumerate(PLAIN)]
    assert calls.encode_items(starred, starred=True)[0] == ItemsEncoding.PLAIN_STARRED
    assert same(run(starred, starred=True), [(item, {}) for item in starred])


@pytest.mark.parametrize("value", NOT_PLAIN, ids=repr)
def test_among_others_each_item_is_a_pickle_of_its_own(value: object) -> None:
    items = [1, value, None]
    assert calls.encode_items(items, starred=False)[0] == ItemsEncoding.PICKLED
    assert same(run(items, starred=False), [((item,), {}) for item in items])
    starred = [(1, "a"), (value, 2), (None, None)]
    assert calls.encode_items(starred, starred=True)[0] == ItemsEncoding.PICKLED_STARRED
    assert same(run(starred, starred=True), [(item, {}) for item in starred])


def test_items_that_are_one_object_are_one_each_when_they_arrive() -> None:
    shared = [0]

    def append(given: list[int]) -> list[int]:
        given.append(1)
        return given

    assert run([shared, shared, shared], starred=False, function=append) == [[0, 1]] * 3
    assert run([(shared,), (shared,)], starred=True, function=append) == [[0, 1]] * 2


def test_within_one_item_what_is_one_object_stays_one() -> None:
    shared: list[int] = []
    (((first, second),), _), _ = run([(shared, shared), ()], starred=False)
    assert first is second


@pytest.mark.parametrize("starred", [False, True])
def test_an_item_that_cannot_be_rebuilt_harms_no_other(starred: bool) -> None:
    things: list[Any] = [1, Undone(sys.exit, 3), [2], Undone(interrupt), Undone(raise_mute), 3]
    encoding, body, _ = calls.encode_items([(item,) for item in things] if starred else things, starred=starred)
    arrived, call_one = calls.decode_items(call, int(encoding), body)
    for item, thing in zip(arrived, things, strict=True):
        if isinstance(thing, Undone):
            with pytest.raises((ArgumentTransportError, RuntimeError)):
                call_one(item)
        else:
            assert call_one(item) == ((thing,), {})


def test_items_end_before_one_that_cannot_be_pickled() -> None:
    assert calls.encode_items([(1,), Refuses(), 2], starred=False)[2] == 1
    assert calls.encode_items([Refuses(), 2], starred=False)[2] == 0


@pytest.mark.parametrize("starred", [False, True])
@pytest.mark.parametrize(
    "item", [0, "x" * 100, "\u20ac" * 100, b"y" * 5000, ["z" * 100], 1 << 80, ("a", 1), {"b": bytes(3000)}], ids=repr
)
def test_as_many_items_are_encoded_as_there_is_room_for(item: Any, starred: bool) -> None:
    items = [(item, 1)] * 200 if starred else [item] * 200
    for room in (0, 1, 10, 99, 100, 1000, 4999, 20_000, 1 << 20):
        _, body, n = calls.encode_items(items, starred=starred, room_bytes=room)
        assert n == 0 or len(body) <= room
        _, more, _ = calls.encode_items(items[: n + 1], starred=starred)
        assert n == 200 or len(more) + 20 + len(more) // 3 > room  # not much fewer than there might be


def test_closures_are_items_like_any_other() -> None:
    assert run([closure(), closure()], starred=False, function=lambda add: add(1)) == [6, 6]


def test_items_that_are_damaged_are_an_error() -> None:
    encoding, body, _ = calls.encode_items([1, 2, "three"], starred=False)
    with pytest.raises(msgspec.DecodeError):
        calls.decode_items(call, int(encoding), body[:-2])


@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()), max_size=20))
def test_any_plain_items_arrive_as_they_were(items: list[Any]) -> None:
    assert same(run(items, starred=False), [((item,), {}) for item in items])
    assert same(run([(item, 1) for item in items], starred=True), [((item, 1), {}) for item in items])


def test_large_items_are_in_the_pickle_for_a_vector_has_no_place_beside_it() -> None:
    array = np.arange(CHUNK_BYTES)
    _, body, _ = calls.encode_items([array, 1], starred=False)
    assert len(body) > array.nbytes
    assert np.array_equal(run([array, 1], starred=False)[0][0][0], array)

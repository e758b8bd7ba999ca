"""A worker's log records as messages, and what sends them: whole or with a note, and never waiting for ever."""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from ringpool.workers import logs
from ringpool.workers.logs import Outlet, decode, encode

WATCHDOG_S = 30.0
BYTES_MAX = 65_536


def record(text: object = "text", *arguments: object, **extra: object) -> logging.LogRecord:
    return logging.getLogger("a.b").makeRecord(
        "a.b", logging.WARNING, "/a/file.py", 7, text, arguments, None, "function", extra, None
    )


# ---- messages --------------------------------------------------------------------------------------------------------


def test_a_record_arrives_with_all_it_had() -> None:
    sent = record("%s and %d", "one", 2, user="me", items=[1, (2, 3)])
    got = decode(encode(sent, BYTES_MAX))
    assert got.getMessage() == "one and 2"
    for name in set(sent.__dict__) - {"msg", "args"}:
        assert getattr(got, name) == getattr(sent, name), name
    assert got.process == os.getpid()
    assert got.threadName == threading.current_thread().name


def test_a_connection_of_a_record_arrives_in_words() -> None:
    here, there = multiprocessing.Pipe()
    with here, there:
        got: Any = decode(encode(record(end=there, path=Path(multiprocessing.__file__)), BYTES_MAX))
        assert got.end == repr(there)
        assert got.path == Path(multiprocessing.__file__)


def test_a_traceback_arrives_as_text_and_is_printed_once() -> None:
    sent = record("it failed")
    try:
        raise LookupError("gone")
    except LookupError:
        sent.exc_info = sys.exc_info()
    expected = logging.Formatter("%(message)s").format(sent)
    sent.exc_text = None
    got = decode(encode(sent, BYTES_MAX))
    assert got.exc_info is None
    assert logging.Formatter("%(message)s").format(got) == expected
    assert expected.count("LookupError: gone") == 1


def test_a_record_is_left_as_it_was_for_other_handlers() -> None:
    argument = object()
    sent = record("%s", argument, lock=threading.Lock())
    before = dict(sent.__dict__)
    encode(sent, 200)
    assert sent.__dict__ == before


def test_percent_signs_of_a_formatted_message_stay() -> None:
    assert decode(encode(record("%d %%", 5), BYTES_MAX)).getMessage() == "5 %"


def test_names_of_files_that_are_no_utf8_arrive() -> None:
    name = os.fsdecode(b"caf\xe9")
    assert decode(encode(record("%s", name), BYTES_MAX)).getMessage() == name


class Loud:
    """It can be neither pickled nor printed."""

    def __reduce__(self) -> Any:
        raise OSError("not pickled")

    def __repr__(self) -> str:
        raise OSError("not printed")


def no_such_thing() -> None:
    raise ModuleNotFoundError("no module of that name here")


class Foreign:
    """Its reader has not what it needs."""

    def __reduce__(self) -> Any:
        return no_such_thing, ()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (threading.Lock(), "lock"),
        (lambda: None, "lambda"),
        (Loud(), "<Loud>"),
        (Foreign(), "cannot be read here: ModuleNotFoundError"),
    ],
    ids=["no pickle", "no name", "no words", "not here"],
)
def test_an_attribute_that_cannot_travel_costs_itself_alone(value: object, found: str) -> None:
    got = decode(encode(record("the text", good=[1], bad=value), BYTES_MAX))
    assert got.getMessage() == "the text"
    assert got.good == [1]  # type: ignore[attr-defined]
    assert found in got.bad  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [60_000, 70_000, 10_000_000])
def test_a_long_text_keeps_both_ends_and_says_what_is_cut(n: int) -> None:
    message = encode(record("first" + "x" * n + "last", small="kept"), BYTES_MAX)
    got = decode(message)
    text = got.getMessage()
    assert len(message) <= BYTES_MAX
    assert text.startswith("firstx")
    assert text.endswith("xlast")
    assert got.small == "kept"  # type: ignore[attr-defined]
    if n == 60_000:
        assert len(text) == n + 9, "whole, because it fits"
    else:
        assert "characters are cut here" in text
        assert len(text) > BYTES_MAX / 4, "most of the room is used"


def test_a_large_attribute_gives_way_to_a_note() -> None:
    got = decode(encode(record("the text", large=list(range(1_000_000))), BYTES_MAX))
    assert got.getMessage() == "the text"
    assert got.large.endswith("bytes is cut]")  # type: ignore[attr-defined]


def test_very_many_attributes_give_way_to_the_usual_ones() -> None:
    got = decode(encode(record("the text", **{f"a{i}": i for i in range(100_000)}), BYTES_MAX))
    assert got.getMessage() == "the text"
    assert got.lineno == 7
    assert not hasattr(got, "a0")


_texts = st.builds(
    lambda character, n: character * n, st.sampled_from(["x", "é", "\U0001f600", "\udce9"]), st.integers(0, 9_000)
)


@settings(max_examples=150, deadline=None)
@given(_texts, _texts, st.lists(_texts, max_size=30), st.binary(max_size=50), st.integers(2_000, 9_000))
def test_a_message_fits_whatever_the_record_holds(
    text: str, trace: str, extras: list[str], blob: bytes, bytes_max: int
) -> None:
    sent = record(text, blob=blob * 100, number=1 << 40_000, **{f"extra{i}": extra for i, extra in enumerate(extras)})
    sent.exc_text = trace
    message = encode(sent, bytes_max)
    assert len(message) <= bytes_max
    got = decode(message)
    assert (got.name, got.levelno, got.created) == (sent.name, sent.levelno, sent.created)
    assert got.getMessage()[:16] == text[:16]
    assert len(pickle.dumps(sent.__dict__)) > bytes_max - 500 or got.getMessage() == text, "cut without need"


# ---- the sending -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    receiving, sending = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with receiving, sending:
        yield receiving, sending


def read_all(receiving: socket.socket) -> list[logging.LogRecord]:
    """All that is there."""
    found: list[logging.LogRecord] = []
    try:
        while True:
            found.append(decode(receiving.recv(1 << 20, socket.MSG_DONTWAIT)))
    except BlockingIOError:
        return found


def test_records_come_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    outlet = Outlet(pair[1], BYTES_MAX)
    for i in range(20):
        outlet.handle(record("%d", i))
    assert [got.getMessage() for got in read_all(pair[0])] == [str(i) for i in range(20)]


def test_what_nobody_reads_is_lost_and_counted(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "PATIENCE_S", 0.01)
    outlet = Outlet(pair[1], BYTES_MAX)
    for i in range(1_000):
        outlet.handle(record("%d %s", i, "x" * 5_000))
    fitted = read_all(pair[0])
    assert [got.getMessage().split()[0] for got in fitted] == [str(i) for i in range(len(fitted))]
    assert 0 < len(fitted) < 1_000
    outlet.handle(record("room again"))
    outlet.handle(record("and again"))
    note, *rest = read_all(pair[0])
    assert note.name == "ringpool.workers"
    assert note.levelno == logging.WARNING
    assert note.getMessage().startswith(f"{1_000 - len(fitted)} log records of this process were lost")
    assert [got.getMessage() for got in rest] == ["room again", "and again"]
    assert capfd.readouterr().err.count("loses log records") == 1


def test_after_the_first_loss_nobody_waits_for_each_record(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    class Room:
        def poll(self, milliseconds: float) -> list[tuple[int, int]]:
            waits.append(milliseconds)
            return []

    monkeypatch.setattr(logs, "PATIENCE_S", 0.001)
    outlet = Outlet(pair[1], BYTES_MAX)
    monkeypatch.setattr(outlet, "_room", Room())
    while not outlet._n_lost:
        outlet.handle(record("x" * 5_000))
    waits.clear()
    for _ in range(100):
        outlet.handle(record("x" * 5_000))
    assert waits == []
    assert outlet._n_lost == 101


def test_a_sender_waits_for_a_slow_reader_and_loses_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    n = 500
    outlet = Outlet(pair[1], BYTES_MAX)
    found: list[logging.LogRecord] = []
    full = threading.Event()

    def read() -> None:
        assert full.wait(WATCHDOG_S)
        while len(found) < n:
            found.append(decode(pair[0].recv(1 << 20)))

    class Room:
        def poll(self, milliseconds: float) -> object:
            full.set()
            return room.poll(milliseconds)

    room, outlet._room = outlet._room, Room()  # type: ignore[assignment]
    reader = threading.Thread(target=read)
    reader.start()
    for i in range(n):
        outlet.handle(record("%d %s", i, "x" * 5_000))
    reader.join(WATCHDOG_S)
    assert full.is_set(), "it had to wait"
    assert [got.getMessage().split()[0] for got in found] == [str(i) for i in range(n)]


def test_a_record_that_cannot_be_formatted_costs_itself_alone(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    outlet = Outlet(pair[1], BYTES_MAX)
    outlet.handle(record("%d", "no number"))
    outlet.handle(record("next"))
    assert [got.getMessage() for got in read_all(pair[0])] == ["next"]
    assert "--- Logging error ---" in errors.getvalue()


def test_without_its_socket_a_warning_goes_to_standard_error(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    outlet = Outlet(pair[1], BYTES_MAX)
    pair[0].close()
    outlet.handle(record("a warning"))
    quiet = record("not said")
    quiet.levelno = logging.INFO
    outlet.handle(quiet)
    assert errors.getvalue() == "a warning\n"


def test_nothing_is_written_to_what_has_taken_the_sockets_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task has closed the descriptor, and opened another socket: that is not for log records."""
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    receiving, sending = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with receiving, sending, mine, other:
        outlet = Outlet(sending, BYTES_MAX)
        os.dup2(other.fileno(), sending.fileno())
        outlet.handle(record("a warning"))
        assert read_all(mine) == []
    assert errors.getvalue() == "a warning\n"


def test_a_closed_pool_sends_no_signal(tmp_path: Path) -> None:
    """A program that has SIGPIPE's default action would end by it."""
    program = """if True:
        import logging, signal, socket
        from ringpool.workers.logs import Outlet
        receiving, sending = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        logging.getLogger().addHandler(Outlet(sending, 10_000))
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        receiving.close()
        logging.warning("still here")
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True, check=False, timeout=WATCHDOG_S
    )
    assert (done.returncode, done.stderr) == (0, "still here\n")


def test_a_signal_handler_may_log_while_a_record_is_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    outlet = Outlet(pair[1], BYTES_MAX)
    before = signal.signal(signal.SIGALRM, lambda *_: outlet.handle(record("from the handler")))

    class Interrupting:
        def __str__(self) -> str:
            signal.raise_signal(signal.SIGALRM)
            return "interrupted"

    try:
        outlet.handle(record("%s", Interrupting()))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [got.getMessage() for got in read_all(pair[0])] == ["from the handler", "interrupted"]

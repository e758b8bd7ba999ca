"""The error log: every record whole or not at all, the newest ones, within its bound, from any number of writers."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.workers.files import child_store
from tests.workers.files.child import Child
from tests.workers.files.child_atomic import one_inode, synced, traced
from tests.workers.files.child_store import CausedError, log_bytes, log_directory

from ringpool.errors import AtomicWriteError, DurabilityError, ErrorLogError, LockTimeoutError
from ringpool.workers.files.errorlog import BYTES_MAX_MIN, HOUR_NS, ErrorLog
from ringpool.workers.files.errorrecord import HEADER_BYTES, MAGIC, RECORD_BYTES_MAX
from ringpool.workers.files.locks import PathLock
from ringpool.workers.files.oslayer import intercepted


@pytest.fixture
def log(tmp_path: Path) -> ErrorLog:
    return ErrorLog(tmp_path, durability="none")


def caught(error: BaseException) -> BaseException:
    """``error`` with a traceback."""
    try:
        raise error
    except BaseException as raised:
        return raised


class Incomparable:
    """As an array of numpy is: it has no truth value."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise ValueError

    def __str__(self) -> str:
        return "incomparable"


@pytest.mark.parametrize("value", [Path("/x"), [1], 1 << 70, float("nan"), bytearray(b"x"), Incomparable()])
def test_a_value_that_is_kept_as_text_is_not_clipped(value: object, log: ErrorLog) -> None:
    log.record(ValueError(), context={"value": value})
    (record,) = log
    assert not record.clipped


def test_the_path_is_left_out_of_the_most_common_where_it_is_a_word(log: ErrorLog) -> None:
    for path in ("a", "new\nline", "caf\udce9"):
        log.record(FileNotFoundError(errno.ENOENT, "banana", path))
    log.record(ValueError("a banana at a"), path="a")
    messages = {kind.message: kind.count for kind in log.summary().most_common}
    assert messages == {"[Errno 2] banana: '<path>'": 3, "<path> banana at <path>": 1}


def fill(log: ErrorLog, records: int) -> None:
    for number in range(records):
        log.record(CausedError("m" * (number * 37 % 300)), context={"number": number})


def numbers(log: ErrorLog) -> list[int]:
    return [record.context["number"] for record in log]


def segment(base: Path) -> Path:
    """The newest one."""
    return max(log_directory(base).glob("*.log"))


# ---- what a record tells ---------------------------------------------------------------------------------------------


def test_a_record_tells_what_where_when_and_by_whom(log: ErrorLog) -> None:
    error = caught(AtomicWriteError("in/a.txt", "rename", errno.ENOSPC, "No space left on device"))
    error.add_note("attempt 1 failed")
    context = {"task": 7, "share": 0.5, "last": True, "none": None, "raw": b"\xff\0", "name": "n"}
    log.record(error, context=context)
    [record] = log
    assert record.type == "ringpool.errors.AtomicWriteError"
    assert record.message == "in/a.txt: rename: No space left on device"
    assert (record.path, record.operation, record.errno) == ("in/a.txt", "rename", errno.ENOSPC)
    assert record.pid == os.getpid()
    assert record.context == context
    assert "in caught" in record.traceback
    assert "attempt 1 failed" in record.traceback
    assert not record.clipped


def test_a_plain_oserror_gives_its_path_and_the_caller_may_name_another(log: ErrorLog) -> None:
    error = FileNotFoundError(errno.ENOENT, "gone", "a")
    log.record(error)
    log.record(error, path=b"caf\xe9", operation="look")
    log.record(KeyError("k"))
    first, second, third = log
    assert (first.path, first.operation) == ("a", None)
    assert (second.path, second.path_bytes, second.operation) == ("caf\udce9", b"caf\xe9", "look")
    assert (third.path, third.errno, third.message) == (None, None, "'k'")


class HostileError(Exception):
    """Cannot be shown, and lies about itself."""

    errno = "no number"
    path = 3.5
    operation = object()

    def __str__(self) -> str:
        raise RuntimeError

    __repr__ = __str__


def no(*_: object) -> Any:
    raise KeyError("no")


@pytest.mark.parametrize("name", ["path", "filename", "operation", "errno"])
@pytest.mark.parametrize(
    "value",
    [
        property(no),
        type("Undecided", (), {"__bool__": no, "__str__": no})(),
        type("Nowhere", (os.PathLike,), {"__fspath__": no, "__str__": no})(),
    ],
    ids=["property", "bool", "fspath"],
)
def test_an_error_whose_attribute_cannot_be_looked_at_is_recorded_all_the_same(
    log: ErrorLog, name: str, value: object
) -> None:
    log.record(caught(type("BrittleError", (Exception,), {name: value})("x")))
    (found,) = log
    assert found.type.endswith("BrittleError")
    assert found.message == "x"
    assert found.errno is None
    assert "BrittleError" in found.traceback


def test_an_error_that_cannot_be_shown_is_recorded_all_the_same(log: ErrorLog) -> None:
    log.record(caught(HostileError()), context={"huge": 1 << 99, "object": HostileError(), "\ud800": "\udcff"})
    log.record(ValueError("surrogates \udcff \ud800"), path="\ud800")
    first, second = log
    assert "cannot be shown" in first.message
    assert first.context["huge"] == str(1 << 99)
    assert first.context["\\ud800"] == "\\udcff"
    assert first.errno is None
    assert second.message == "surrogates \\udcff \\ud800"


@pytest.mark.parametrize("bytes_max", [BYTES_MAX_MIN, 4 << 20])
def test_what_is_too_long_is_clipped_and_says_so(tmp_path: Path, bytes_max: int) -> None:
    log = ErrorLog(tmp_path, bytes_max=bytes_max, durability="none")
    wide = "\N{OLD ITALIC LETTER A}" * 100_000  # 4 bytes each
    context: dict[str, object] = {f"{number}{wide}": wide for number in range(100)}
    log.record(caught(CausedError(wide)), path=wide, operation=wide, context=context)
    log.record(CausedError("short"), context={"long": "v" * 5000})
    log.record(CausedError("short"))
    first, second, third = log
    assert (first.clipped, second.clipped, third.clipped) == (True, True, False)
    assert len(first.message) == 1000
    assert len(second.context["long"]) == 1000
    assert log_bytes(tmp_path) < min(RECORD_BYTES_MAX, bytes_max // 8) + 3000


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_records_come_in_order_from_either_end(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path, bytes_max=BYTES_MAX_MIN, durability="none")
    fill(log, 100)
    assert len(list(log_directory(tmp_path).glob("*.log"))) > 1
    assert numbers(log) == list(range(100))
    assert [record.context["number"] for record in reversed(log)] == list(range(99, -1, -1))
    records = log.records()
    next(records)
    assert next(records).context["number"] == 1


def test_a_segment_that_is_dropped_while_it_is_read_is_left_out(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path, bytes_max=BYTES_MAX_MIN, durability="none")
    fill(log, 100)
    records = log.records(newest_first=True)
    assert next(records).context["number"] == 99
    min(log_directory(tmp_path).glob("*.log")).unlink()
    rest = [record.context["number"] for record in records]
    assert rest == list(range(98, rest[-1] - 1, -1))
    assert rest[-1] > 0


def test_reading_a_log_that_is_not_there_gives_nothing_and_makes_nothing(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path)
    assert list(log) == []
    assert log.summary().count == 0
    assert log.summary().first_ns is None
    assert list(tmp_path.iterdir()) == []


def test_the_summary_counts_by_type_and_kind_and_the_last_hour(log: ErrorLog) -> None:
    for name in ("a", "b", "c"):
        log.record(FileNotFoundError(errno.ENOENT, "gone", name))
    for _ in range(5):
        log.record(KeyError("k"))
    first, last = (record.time_ns for record in (next(log.records()), next(log.records(newest_first=True))))
    summary = log.summary()
    assert summary.by_type == {"builtins.KeyError": 5, "builtins.FileNotFoundError": 3}
    assert list(summary.by_type) == ["builtins.KeyError", "builtins.FileNotFoundError"]
    assert [(kind.message, kind.count) for kind in summary.most_common] == [("'k'", 5), ("[Errno 2] gone: '<path>'", 3)]
    assert (summary.count, summary.last_hour, summary.skipped_bytes) == (8, 8, 0)
    assert (summary.first_ns, summary.last_ns) == (first, last)
    assert log.summary(first + HOUR_NS - 1).last_hour == 8
    assert log.summary(first + HOUR_NS).last_hour < 8
    later = log.summary(last + HOUR_NS)
    assert (later.count, later.last_hour, later.by_type_last_hour) == (8, 0, {})


# ---- the bound -------------------------------------------------------------------------------------------------------


def test_the_bound_holds_after_every_record_and_the_oldest_go_first(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path, bytes_max=BYTES_MAX_MIN, durability="none")
    descriptors = 0  # after the first record: its lock file may stay open
    for number in range(300):
        log.record(CausedError("b" * 1000), context={"number": number})
        assert log_bytes(tmp_path) <= BYTES_MAX_MIN
        descriptors = descriptors or len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) == descriptors
    kept = numbers(log)
    assert kept == list(range(kept[0], 300))
    assert kept[0] > 0
    assert log_bytes(tmp_path) > BYTES_MAX_MIN * 3 // 4


def test_a_smaller_bound_takes_hold_at_the_next_record(tmp_path: Path) -> None:
    fill(ErrorLog(tmp_path, durability="none"), 800)
    assert log_bytes(tmp_path) > BYTES_MAX_MIN
    small = ErrorLog(tmp_path, bytes_max=BYTES_MAX_MIN, durability="none")
    small.record(CausedError(), context={"number": 800})
    assert log_bytes(tmp_path) <= BYTES_MAX_MIN
    assert numbers(small)[-1] == 800


def test_a_bound_that_holds_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(BYTES_MAX_MIN)):
        ErrorLog(tmp_path, bytes_max=BYTES_MAX_MIN - 1)


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_a_record_torn_at_any_byte_is_skipped_and_cut_off_by_the_next(tmp_path: Path, log: ErrorLog) -> None:
    fill(log, 3)
    path = segment(tmp_path)
    whole = path.read_bytes()
    last = whole.rindex(MAGIC)
    for size in range(last + 1, len(whole)):
        path.write_bytes(whole[:size])
        assert numbers(log) == [0, 1]
        assert log.summary().skipped_bytes == size - last
        if size % 10 == 0 or size < last + 20:
            log.record(CausedError(), context={"number": 9})
            assert numbers(log) == [0, 1, 9]
            assert log.summary().skipped_bytes == 0


def test_a_first_record_that_is_torn_is_cut_off_too(tmp_path: Path, log: ErrorLog) -> None:
    fill(log, 1)
    os.truncate(segment(tmp_path), 30)
    log.record(CausedError(), context={"number": 9})
    assert numbers(log) == [9]
    assert log.summary().skipped_bytes == 0


def test_damage_costs_the_records_that_it_hit_and_no_others(tmp_path: Path, log: ErrorLog) -> None:
    fill(log, 10)
    path = segment(tmp_path)
    octets = bytearray(path.read_bytes())
    octets[len(octets) // 2] ^= 1
    path.write_bytes(octets)
    found = numbers(log)
    assert len(found) == 9
    assert HEADER_BYTES < log.summary().skipped_bytes < len(octets) // 5
    log.record(CausedError(), context={"number": 10})
    assert numbers(log) == [*found, 10]


def test_a_torn_record_of_the_largest_size_is_cut_off_too(tmp_path: Path, log: ErrorLog) -> None:
    large = {f"{number}": "v" * 1000 for number in range(100)}
    fill(log, 1)
    for _ in range(2):
        log.record(CausedError(), context={"number": 1} | large)
    size = log_bytes(tmp_path)
    assert size > 1.9 * RECORD_BYTES_MAX
    os.truncate(segment(tmp_path), size - 1)
    log.record(CausedError(), context={"number": 2})
    assert numbers(log) == [0, 1, 2]
    assert log.summary().skipped_bytes == 0


def test_a_short_look_at_the_end_cuts_nothing_off(log: ErrorLog) -> None:
    fill(log, 5)

    def shorten(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = call(*args, **kwargs)
        return result[:-10] if name == "pread" and len(result) > 100 else result

    with intercepted(shorten):
        log.record(CausedError(), context={"number": 5})
    assert numbers(log) == list(range(6))


def test_damage_without_an_end_is_left_to_readers_and_not_cut(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path, bytes_max=32 << 20, durability="none")
    fill(log, 3)
    with open(segment(tmp_path), "ab") as file:
        file.write(bytes(3 * RECORD_BYTES_MAX))
    log.record(CausedError(), context={"number": 9})
    assert numbers(log) == [0, 1, 2, 9]
    assert log.summary().skipped_bytes == 3 * RECORD_BYTES_MAX


def test_bytes_of_a_record_inside_another_are_never_one(tmp_path: Path, log: ErrorLog) -> None:
    fill(log, 1)
    inner = segment(tmp_path).read_bytes()
    log.record(CausedError(), context={"number": 1, "copy": inner[:1000]})
    path = segment(tmp_path)
    outer = path.read_bytes()
    assert outer.count(inner) == 2
    log.record(CausedError(), context={"number": 2})  # takes the end of the outer one for the end
    assert numbers(log) == [0, 1, 2]
    path.write_bytes(outer[:-1])
    assert numbers(log) == [0]
    os.rename(path, path.with_name(f"{5:016}.log"))
    assert numbers(log) == []


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_log_yields_only_what_was_recorded(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    log = ErrorLog(tmp_path, bytes_max=BYTES_MAX_MIN, durability="none")
    fill(log, 60)
    recorded = {record.context["number"]: record for record in log}
    assert len(recorded) == 60
    for path in log_directory(tmp_path).glob("*.log"):
        path.write_bytes(damaged(path.read_bytes(), chance))
    records = log.records()
    found = list(records)
    assert all(recorded[record.context["number"]] == record for record in found)
    assert [record.context["number"] for record in found] == sorted({record.context["number"] for record in found})
    assert records.read_bytes == log_bytes(tmp_path)
    assert (records.skipped_bytes == 0) == (len(found) == 60 and records.read_bytes == log.summary().log_bytes)
    log.record(CausedError(), context={"number": 60})
    assert numbers(log) == [*(record.context["number"] for record in found), 60]


def damaged(octets: bytes, chance: random.Random) -> bytes:
    """A few of: bytes changed, a piece cut out, repeated, zeroed, moved, the end cut, garbage or magic put in."""
    result = bytearray(octets)
    for _ in range(chance.randint(0, 4)):
        begin = chance.randrange(len(result) or 1)
        end = begin + chance.randint(1, 700)
        piece = result[begin:end]
        kind = chance.randrange(8)
        if kind == 0:
            for _ in range(5):
                result[chance.randrange(len(result))] = chance.randrange(256)
        elif kind == 1:
            del result[begin:end]
        elif kind == 2:
            result[begin:begin] = piece
        elif kind == 3:
            result[begin:end] = bytes(len(piece))
        elif kind == 4:
            del result[begin:end]
            at = chance.randrange(len(result) or 1)
            result[at:at] = piece
        elif kind == 5:
            del result[begin:]
        elif kind == 6:
            result[begin:begin] = chance.randbytes(50)
        else:
            result[begin:begin] = MAGIC * chance.randint(1, 20)
    return bytes(result)


# ---- writers, many and killed ----------------------------------------------------------------------------------------


def test_records_of_processes_and_threads_never_mix(tmp_path: Path) -> None:
    children = [Child(child_store.record_some, tmp_path, str(writer), "3", "60") for writer in range(2)]
    log = ErrorLog(tmp_path)
    seen = 0
    for child in children:
        with child:
            while child.process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(0.05)
                seen = max(seen, sum(record.type.endswith("CausedError") for record in log))
            child.succeed()
    by_writer: dict[str, list[int]] = {}
    for record in log:
        by_writer.setdefault(record.context["by"], []).append(record.context["number"])
    assert len(by_writer) == 6
    assert all(found == list(range(60)) for found in by_writer.values())
    assert log.summary().skipped_bytes == 0
    assert seen <= 360


def test_writers_killed_at_random_lose_no_record_that_they_had_finished(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path, bytes_max=64 << 20, durability="none")
    acknowledged: dict[str, int] = {}
    chance = random.Random(1)
    for round_ in range(2):
        children = {f"{round_}.{n}": Child(child_store.record_for_ever, tmp_path, f"{round_}.{n}") for n in range(2)}
        for name, child in children.items():
            with child:
                child.wait_for("0")
                for number in range(1, chance.randint(2, 40)):
                    child.wait_for(str(number))
                    acknowledged[name] = number
                child.kill()
    found: dict[str, list[int]] = {}
    for record in log:
        found.setdefault(record.context["by"], []).append(record.context["number"])
    for name, last in acknowledged.items():
        assert found[name] == list(range(len(found[name])))
        assert len(found[name]) > last
    log.record(CausedError(), context={"by": "me", "number": 0})
    assert log.summary().skipped_bytes == 0


def test_a_kill_at_any_call_leaves_the_record_whole_or_not_at_all(tmp_path: Path) -> None:
    with Child(child_store.die_at_every_call_of_record, tmp_path) as child:
        child.succeed()


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE])
def test_an_error_at_any_call_is_named_and_harms_no_record(tmp_path: Path, error: int) -> None:
    log = ErrorLog(tmp_path, durability="full")
    fill(log, 2)
    nth = 0
    failures: list[tuple[int | None, str]] = []
    while True:
        nth += 1
        seen: list[str] = []
        before = numbers(log)
        descriptors = len(os.listdir("/proc/self/fd"))
        try:
            with child_store.failing(nth, error, seen):
                log.record(CausedError(), context={"number": nth + 100})
        except ErrorLogError as failure:
            failures.append((failure.errno, failure.path))
            assert numbers(log) == before
        except DurabilityError:
            assert seen[nth - 1] == "fsync"
        else:
            assert numbers(log) == [*before, nth + 100]
        assert numbers(log)[: len(before)] == before
        assert log.summary().skipped_bytes == 0
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        if len(seen) < nth:
            break
    assert len(failures) > 8
    assert set(failures) == {(error, os.fspath(log_directory(tmp_path)))}


def test_a_short_write_is_completed_and_one_that_fails_leaves_nothing(tmp_path: Path, log: ErrorLog) -> None:
    fill(log, 1)
    full = False

    def shorten(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal full
        if name == "write":
            if full:
                raise OSError(errno.ENOSPC, "full")
            full = fails
            return call(args[0], args[1][:20])
        return call(*args, **kwargs)

    fails = False
    with intercepted(shorten):
        log.record(CausedError(), context={"number": 1})
    assert numbers(log) == [0, 1]
    size = log_bytes(tmp_path)
    fails = True
    with intercepted(shorten), pytest.raises(ErrorLogError, match="full"):
        log.record(CausedError(), context={"number": 2})
    assert log_bytes(tmp_path) == size


def test_a_signal_handler_may_record_in_the_middle_of_a_record(tmp_path: Path, log: ErrorLog) -> None:
    fill(log, 1)
    inside = False

    def interrupt(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal inside
        if name == "write" and not inside:
            inside = True
            log.record(CausedError(), context={"number": 1})
        return call(*args, **kwargs)

    with intercepted(interrupt):
        log.record(CausedError(), context={"number": 2})
    assert numbers(log) == [0, 1, 2]


def test_a_lock_that_is_not_had_in_time_is_an_error(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path, durability="none", timeout_s=0.01)
    fill(log, 1)
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with log._lock():  # pyright: ignore[reportPrivateUsage]
            holding.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert holding.wait(30)
        with pytest.raises(LockTimeoutError):
            log.record(CausedError())
        assert numbers(log) == [0]
    finally:
        done.set()
        holder.join()


def test_its_lock_is_never_one_of_the_callers_own(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path, durability="none", timeout_s=0)
    with PathLock(tmp_path / "a"):
        ours = {path.stat().st_ino for path in (tmp_path / ".ringpool/locks").iterdir()}
        fill(log, 1)
    theirs = {path.stat().st_ino for path in log_directory(tmp_path).glob(".ringpool/locks/*")}
    assert theirs
    assert not ours & theirs


@pytest.mark.parametrize("durability", ["none", "data", "full"])
def test_durability_is_an_fsync_of_the_record_and_of_the_name_of_a_new_segment(tmp_path: Path, durability: str) -> None:
    log = ErrorLog(tmp_path, durability=durability)
    (tmp_path / ".ringpool/errors").mkdir(parents=True)
    kinds: dict[int, str] = {}
    synced: list[str] = []

    def note(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = call(*args, **kwargs)
        if name == "open":
            kinds[result] = os.path.basename(os.fsdecode(args[0]))
        elif name == "fsync":
            synced.append(kinds[args[0]])
        elif name == "write":
            synced.append(name)
        return result

    with intercepted(note):
        fill(log, 2)
    name = f"{1:016}.log"
    expected = {"none": [[], []], "data": [[name], [name]], "full": [[name, "errors"], [name]]}[durability]
    assert synced == ["write", *expected[0], "write", *expected[1]]


def test_a_segment_that_has_got_the_inode_of_a_durable_one_is_synced(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path, durability="full")
    fill(log, 1)
    segment = log_directory(tmp_path) / f"{1:016}.log"
    with one_inode(segment):
        for _ in range(2):
            segment.unlink()
            fill(ErrorLog(tmp_path, durability="none"), 1)  # it is made by somebody else, who has promised nothing
            with traced() as trace:
                fill(log, 2)
            assert synced(trace) == ["write", "file", "directory", "write", "file"]


def test_a_failed_fsync_is_not_tried_again(tmp_path: Path) -> None:
    log = ErrorLog(tmp_path, durability="data")
    fill(log, 1)
    tries = 0

    def fail(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal tries
        if name == "fsync":
            tries += 1
            raise OSError(errno.EIO, "")
        return call(*args, **kwargs)

    with intercepted(fail), pytest.raises(DurabilityError):
        log.record(CausedError())
    assert tries == 1


def test_a_log_in_anothers_place_is_refused_by_name(tmp_path: Path, log: ErrorLog) -> None:
    log_directory(tmp_path).mkdir(parents=True)
    (log_directory(tmp_path) / f"{1:016}.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ErrorLogError, match=r"\.ringpool/errors"):
        log.record(CausedError())
    with pytest.raises(ErrorLogError):
        list(log)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o2775])
def test_who_may_write_in_the_base_may_write_to_the_log(tmp_path: Path, log: ErrorLog, mode: int) -> None:
    os.chmod(tmp_path, mode)
    mask = os.umask(0o077)
    try:
        log.record(ValueError())
    finally:
        os.umask(mask)
    directory = log_directory(tmp_path)
    assert stat.S_IMODE(os.stat(directory).st_mode) == mode
    writers = mode & 0o022
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in directory.glob("*.log")} == {0o600 | writers | writers << 1}


def test_a_link_in_the_place_of_a_log_has_nothing_done_to_what_it_leads_to(tmp_path: Path, log: ErrorLog) -> None:
    """As the owner of a ``.ringpool`` may put one there, just when another is to make the directory."""
    os.chmod(tmp_path, 0o777)
    victim = tmp_path / "victim"
    victim.mkdir(0o700)

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "mkdir" and os.fsencode(args[0]).endswith(b"/errors"):
            log_directory(tmp_path).symlink_to(victim)
        return call(*args, **kwargs)

    with intercepted(around), pytest.raises(ErrorLogError):
        log.record(ValueError())
    assert stat.S_IMODE(os.stat(victim).st_mode) == 0o700
    assert not [path for path in victim.iterdir() if path.suffix == ".log"]


def test_a_child_of_a_fork_records_too(tmp_path: Path, log: ErrorLog) -> None:
    fill(log, 1)
    program = (
        "import os, sys; from ringpool.workers.files.errorlog import ErrorLog\n"
        "log = ErrorLog(sys.argv[1], durability='none'); log.record(ValueError('before'), context={'number': 1})\n"
        "pid = os.fork()\n"
        "log.record(ValueError('after'), context={'number': 3 if pid else 2})\n"
        "if pid: assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, timeout=60)
    assert sorted(numbers(log)) == [0, 1, 2, 3]

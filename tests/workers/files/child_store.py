"""Second processes for the tests of store and error log, and the matrix that kills them at every system call.

for_each_death(action, prepare, check)
    nth = 1, 2, ...:   prepare(); a fork runs action() and is killed before its nth system call; check()
                       once more where that call is a write: killed when half of it is written
    ends when an action runs to its end
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.workers.files import naive
from tests.workers.files.child import listen, say

from ringpool.errors import FileOperationError
from ringpool.shm.status import FileStatusTable
from ringpool.workers.files.aiostore import AsyncFileStore
from ringpool.workers.files.errorlog import BYTES_MAX_MIN, ErrorLog
from ringpool.workers.files.locks import PathLock
from ringpool.workers.files.naming import is_staging_name
from ringpool.workers.files.objects import ContentAddress
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.resources import resource_stats
from ringpool.workers.files.store import FileStore
from ringpool.workers.files.transaction import FileTransaction, snapshot
from ringpool.workers.files.turns import DESCRIPTORS_MAX

NO_WRITE = 3


LOCK_CALLS = {"fcntl", "flock", "lock_descriptor", "unlock_descriptor"}  # their errors: test_locks.py


class CausedError(Exception):
    """What the children record."""


def for_each_death(action: Callable[[], Any], prepare: Callable[[], Any], check: Callable[[], Any]) -> int:
    """How often it was killed."""
    deaths = 0
    for nth in count(1):
        for torn in (False, True):
            prepare()
            status = _dies_at(nth, torn, action)
            if torn and os.waitstatus_to_exitcode(status) == NO_WRITE:
                continue
            check()
            if status == 0:
                return deaths
            assert os.WTERMSIG(status) == signal.SIGKILL, f"status {status} at call {nth}"
            deaths += 1
    raise AssertionError


def _dies_at(nth: int, torn: bool, action: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    left = nth

    def die(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            if torn:
                if name != "write":
                    os._exit(NO_WRITE)
                call(args[0], bytes(args[1])[: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    try:
        with intercepted(die):
            action()
        os._exit(0)
    finally:
        os._exit(1)


@contextmanager
def failing(nth: int, error: int, seen: list[str]) -> Iterator[None]:
    """The nth call fails; ``seen`` gets the names of all."""

    def fail(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(name)
        if len(seen) == nth and name not in LOCK_CALLS:
            if name == "close":
                call(*args, **kwargs)
            raise OSError(error, os.strerror(error))
        return call(*args, **kwargs)

    with intercepted(fail):
        yield


@contextmanager
def intercepted_write_error() -> Iterator[None]:
    """Every write fails when half of it is written."""

    def fail(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = call(args[0], bytes(args[1])[:1]) if name == "write" else call(*args, **kwargs)
        if name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return result

    with intercepted(fail):
        yield


# ---- the error log ---------------------------------------------------------------------------------------------------


def record_some(base: str, writer: str, threads: str, records: str) -> None:
    """Each thread records its number and that of the record."""

    def run(thread: int) -> None:
        log = ErrorLog(base, durability="none")
        for number in range(int(records)):
            log.record(CausedError("x" * (number % 200)), context={"by": f"{writer}.{thread}", "number": number})

    running = [threading.Thread(target=run, args=(thread,)) for thread in range(int(threads))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def record_for_ever(base: str, writer: str) -> None:
    """Says the number of each record that it has written."""
    log = ErrorLog(base, bytes_max=64 << 20, durability="none")
    for number in count():
        log.record(CausedError("y" * 3000), context={"by": writer, "number": number})
        say(str(number))


def die_at_every_call_of_record(base: str) -> None:
    """A first record; one more; one that needs a new segment; one that needs the oldest to go."""
    shapes: list[Callable[[], None]] = [
        lambda: None,
        lambda: _fill(base, 3),
        lambda: _fill_segment(base),
        lambda: _fill_up(base),
    ]
    for fill in shapes:
        _remove_log(base)
        fill()
        before = _numbers(base)
        kept = {path: path.read_bytes() for path in log_directory(base).glob("*.log")}

        def prepare(kept: dict[Path, bytes] = kept) -> None:
            _remove_log(base)
            for path, octets in kept.items():
                path.write_bytes(octets)

        def check(before: list[int] = before) -> None:
            _check_log(base, before)

        assert for_each_death(lambda: _log(base).record(CausedError(), context={"number": 10_000}), prepare, check) > 5


def _check_log(base: str, before: list[int]) -> None:
    """Of what there was, the newest part is there; the new record is there or not; the next one mends all."""
    found = _numbers(base)
    old = [number for number in found if number != 10_000]
    assert found in (old, [*old, 10_000])
    assert before[len(before) - len(old) :] == old
    assert len(before) - len(old) < 40, "more than the oldest segment is lost"
    assert log_bytes(base) <= BYTES_MAX_MIN
    _log(base).record(CausedError(), context={"number": 10_001})
    assert _numbers(base)[-1] == 10_001
    assert _log(base).summary().skipped_bytes == 0
    assert log_bytes(base) <= BYTES_MAX_MIN


def _log(base: str) -> ErrorLog:
    return ErrorLog(base, bytes_max=BYTES_MAX_MIN, durability="full")


def _numbers(base: str) -> list[int]:
    return [record.context["number"] for record in _log(base)]


def _fill(base: str, records: int) -> None:
    log = ErrorLog(base, bytes_max=BYTES_MAX_MIN, durability="none")
    for number in range(records):
        log.record(CausedError("z" * 900), context={"number": number})


def _fill_up(base: str) -> None:
    """The bound is all but reached: one more record, and the oldest segment has to go."""
    log = ErrorLog(base, bytes_max=BYTES_MAX_MIN, durability="none")
    for number in count():
        left = BYTES_MAX_MIN - log_bytes(base)
        if left < 200:
            return
        log.record(CausedError("z" * (900 if left > 3000 else 1)), context={"number": number})


def _fill_segment(base: str) -> None:
    """The newest segment is all but full: one more record needs a new one."""
    log = ErrorLog(base, bytes_max=BYTES_MAX_MIN, durability="none")
    for number in count():
        log.record(CausedError("z"), context={"number": number})
        if BYTES_MAX_MIN // 8 - log_bytes(base) < 100:
            return


def _remove_log(base: str) -> None:
    for path in log_directory(base).glob("*.log"):
        path.unlink()


def log_directory(base: str | os.PathLike[str]) -> Path:
    return Path(base, ".ringpool/errors")


def log_bytes(base: str | os.PathLike[str]) -> int:
    return sum(path.stat().st_size for path in log_directory(base).glob("*.log"))


# ---- the store -------------------------------------------------------------------------------------------------------


def die_at_every_call_of(base: str, name: str) -> None:
    """Before: a file and its neighbour. After each death: the old state or the new, and the store works on."""
    store = FileStore(base)
    operations: dict[str, tuple[Callable[[FileStore], object], dict[str, bytes]]] = {
        "write": (lambda store: store.write("a", b"new"), {"a": b"new"}),
        "append": (lambda store: store.append("a", b"+"), {"a": b"old+"}),
        "update": (lambda store: store.update("a", lambda old: old + b"*"), {"a": b"old*"}),
        "delete": (lambda store: store.delete("a"), {}),
        "rename": (lambda store: store.rename("a", "new/b"), {"new/b": b"old"}),
        "add": (lambda store: store.add(b"content"), {"a": b"old", ADDED.path: b"content"}),
    }
    operation, after = operations[name]
    neighbour = {"neighbour": b"untouched"}
    before = {"a": b"old"} | neighbour

    def remove_new() -> None:
        for path in ("new/b", ADDED.path):
            Path(base, path).unlink(missing_ok=True)

    def prepare() -> None:
        remove_new()
        for path, content in before.items():
            store.write(path, content, durability="atomic")

    def check() -> None:
        found = {path: store.read(path) for path in store.find("**")}
        assert found in (before, after | neighbour), found
        remove_new()
        store.write("a", b"works", durability="atomic")
        operation(store)

    assert for_each_death(lambda: operation(FileStore(base)), prepare, check) > 8


ADDED = ContentAddress(blake2b(b"content", digest_size=32).hexdigest(), 7)


def count_up(base: str, kind: str, workers: str, updates: str) -> None:
    """By threads or by tasks: each counts up, and appends."""

    def add_one(old: bytes) -> bytes:
        return b"%d" % (int(old) + 1)

    def run() -> None:
        store = FileStore(base, durability="atomic")
        for _ in range(int(updates)):
            store.update("n", add_one, missing=b"0")
            store.append("log", b".")

    async def run_async(store: AsyncFileStore) -> None:
        for _ in range(int(updates)):
            await store.update("n", add_one, missing=b"0")
            await store.append("log", b".")

    async def main() -> None:
        store = AsyncFileStore(base, durability="atomic")
        await asyncio.gather(*(run_async(store) for _ in range(int(workers))))

    if kind == "tasks":
        asyncio.run(main())
    else:
        threads = [threading.Thread(target=run) for _ in range(int(workers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def replace_for_ever(base: str) -> None:
    store = FileStore(base, durability="atomic")
    for number in count():
        store.write("a", b"%d" % (number % 10) * 100_000)
        if number == 0:
            say("writing")


def hold(path: str) -> None:
    with PathLock(path):
        say("held")
        listen()


# ---- the known mistakes ----------------------------------------------------------------------------------------------


def outcomes_of_deaths(kind: str, base: str) -> None:
    """Says what is found after each death, as a list of the different ones."""
    found: set[str] = set()
    prepare, action, look = _DEATHS[kind]
    for_each_death(lambda: action(Path(base)), lambda: prepare(Path(base)), lambda: found.add(look(Path(base))))
    say(json.dumps(sorted(found)))


def _two_files(base: Path) -> None:
    snapshot(["a", "b"], base=base)  # whoever died here is recovered
    for name in ("a", "b"):
        (base / name).write_text("old")


def _write_both(base: Path) -> None:
    with naive.flocked(base / "lock"):
        for name in ("a", "b"):
            naive.write_unsynced(base / name, b"new")


def _read_both(base: Path) -> str:
    with naive.flocked(base / "lock"):
        return f"{(base / 'a').read_text()} {(base / 'b').read_text()}"


def _commit_both(base: Path) -> None:
    with FileTransaction(base, durability="atomic") as transaction:
        for name in ("a", "b"):
            transaction.write(name, b"new")


def _read_and_lock(base: Path) -> str:
    """What is found without a lock, and then with it."""
    seen = _read_both(base)
    found = snapshot(["a", "b"], base=base)
    return f"{seen}, {found['a'].decode()} {found['b'].decode()}"


def _one_item(base: Path) -> None:
    (base / "queue").write_text(json.dumps(["first"]))


def _push(base: Path) -> None:
    FileStore(base, durability="atomic").update("queue", lambda old: json.dumps([*json.loads(old), "second"]))


def _read_queue(base: Path) -> str:
    try:
        return f"{len(json.loads((base / 'queue').read_text()))} items"
    except ValueError:
        return "broken"


_DEATHS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], Callable[[Path], str]]] = {
    "transaction naive": (_two_files, _write_both, _read_both),
    "transaction ours": (_two_files, _commit_both, _read_and_lock),
    "queue naive": (_one_item, lambda base: naive.push(base / "queue", "second"), _read_queue),
    "queue ours": (_one_item, _push, _read_queue),
}


def fork_and_unlock(base: str) -> None:
    """Says what a third party finds after a fork of the holder has unlocked, or closed the file."""
    found: dict[str, str] = {}
    path = Path(base, "naive")
    with naive.flocked(path) as fd:
        _in_fork(lambda: fcntl.flock(fd, fcntl.LOCK_UN))
        found["flock"] = "free" if naive.is_free(path) else "held"
    with open(path, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert not _in_fork(lambda: _lock_record(path))
        open(path, "rb").close()
        found["record lock"] = "free" if _in_fork(lambda: _lock_record(path)) else "held"
    lock = PathLock(os.path.join(base, "a"))
    with lock:
        _in_fork(lock.release)
        _in_fork(lambda: lock.__exit__(None, None, None))
        held = [path for path in Path(base, ".ringpool/locks").glob("??.lock") if not naive.is_free(path)]
        found["ours"] = "held" if held else "free"
    say(json.dumps(found))


def _lock_record(path: Path) -> None:
    with open(path, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _in_fork(action: Callable[[], object]) -> bool:
    """Whether a fork could do it."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    try:
        action()
        os._exit(0)
    finally:
        os._exit(1)


def claim(table: str, path: str) -> None:
    with FileStatusTable.attach(table) as statuses:
        assert statuses.claim(path)
        say("claimed")
        listen()


# ---- few descriptors -------------------------------------------------------------------------------------------------


def _limit_descriptors() -> None:
    limit = DESCRIPTORS_MAX + 32
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def _take_all() -> list[int]:
    taken: list[int] = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return taken


def count_descriptors() -> None:
    """Where no other thread waits to accept a connection: the kernel counts the descriptor that it will be."""
    listed = len(os.listdir("/proc/self/fd")) - 1  # less its own
    say(f"{resource_stats().descriptors_open - listed} more than listed")


def look_without_descriptors() -> None:
    _limit_descriptors()
    resource_stats()
    taken = _take_all()
    stats = resource_stats()
    assert stats.descriptors_max is not None
    for fd in taken:
        os.close(fd)
    memory = "unknown" if stats.rss_bytes is None else "known"
    peak = "known" if stats.rss_peak_bytes > 1 << 20 else "unknown"
    say(f"{stats.descriptors_max - stats.descriptors_open} left; memory {memory}; peak {peak}")


def work_with_few_descriptors(base: str) -> None:
    """Many paths with a low limit; then with none left, each operation; then all again."""
    _limit_descriptors()
    store, log = FileStore(base, durability="atomic"), ErrorLog(base, durability="none")
    operations: list[Callable[[], object]] = [
        lambda: store.write("a", b"new"),
        lambda: store.append("a", b"+"),
        lambda: store.update("a", lambda old: old + b"*"),
        lambda: store.read("a"),
        lambda: store.add(b"other content"),
        lambda: store.rename("a", "b"),
        lambda: store.delete("a"),
        lambda: list(store.find("**")),
        lambda: log.record(CausedError()),
        lambda: list(log),
    ]

    def work() -> None:
        for number in range(150):
            store.write(f"{number}", b"%d" % number)
        assert len(list(store.find("*"))) >= 150
        log.record(CausedError())
        store.add(b"content")

    work()
    store.write("a", b"old")
    say("worked")
    recorded = log.summary().count
    taken = _take_all()
    for operation in operations:
        with pytest.raises(FileOperationError, match="Too many open files"):
            operation()
    for fd in taken:
        os.close(fd)
    assert store.read("a") == b"old"
    assert log.summary().count == recorded
    assert [name for name in os.listdir(base) if is_staging_name(os.fsencode(name))] == []
    say("failed by name")
    work()
    for operation in operations[:6]:
        operation()
    say("worked again")

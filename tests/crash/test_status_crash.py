"""The status table under SIGKILL: at every bytecode of every operation, and at random at full speed.

After each kill: the mutex can be had, every entry and chunk is in one place (``audit``), the contents are those before
the operation or those after it, and whoever waited has been woken.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from tests.crash.harness import FULL, PATIENCE_S, Child, Sweep, sweeps
from tests.crash.opcodes import Bytecodes, kill_before
from tests.shm.child_status import as_owner, audit, files_of, table_name

from ringpool.errors import SegmentMissingError, StatusTableFullError
from ringpool.shm import owner
from ringpool.shm.owner import Owner
from ringpool.shm.status import FileState, FileStatusTable
from ringpool.shm.tables import segment_of

Contents = dict[bytes, tuple[FileState, bytes]]
CAPACITY = 8
LONG = "long/" * 60  # three chunks


@pytest.fixture
def name() -> Iterator[str]:
    with table_name() as name:
        yield name


def kill_in(act: Callable[[], object], at: int) -> bool:
    """Run ``act`` in a child that is killed before bytecode ``at`` of it; whether it came to that."""

    def body() -> None:
        with Bytecodes(kill_before(at)):
            act()

    return Child(body).was_killed()


def contents(table: FileStatusTable) -> Contents:
    return {path: (row.state, row.detail) for path, row in audit(table).items()}


def prepare(name: str) -> None:
    """A table with free entries and free chunks in it, entries of a dead owner, and one that is waited for."""
    with FileStatusTable(name, CAPACITY, path_bytes=600) as table:
        for path in ("x", LONG + "x", "y"):
            table.set(path, FileState.DONE, "gone" * 40)
            table.remove(path)
        for path in ("available", "done", LONG):
            table.set(path, FileState.DONE, "d" * 130)
        table.set("available", FileState.AVAILABLE)
        with as_owner(name, Owner(os.getpid(), 1)) as dead:
            dead.set("stale", FileState.PROCESSING, "s" * 121)
            table._entries.run(lambda: _mark(table, b"stale"))


def _mark(table: FileStatusTable, key: bytes) -> None:
    entries = table._entries
    entries.set_waited(entries.find(key, entries.hash_of(key)).base, True)


OPERATIONS: dict[str, Callable[[FileStatusTable], object]] = {
    "insert": lambda table: table.set("new", FileState.PROCESSING, "n" * 250),
    "insert-long": lambda table: table.set(LONG + "new" * 90, FileState.DONE, "n" * 500),
    "set": lambda table: table.set("done", FileState.PROCESSING),
    "set-detail": lambda table: table.set(LONG, FileState.DONE, "e" * 400),
    "claim": lambda table: table.claim("available"),
    "claim-stale": lambda table: table.claim("stale"),
    "release": lambda table: table.release("stale", "r"),
    "remove": lambda table: table.remove(LONG),
    "remove-stale": lambda table: table.remove("stale"),
}


@sweeps(shards=1)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_any_bytecode_an_operation_is_done_or_not_done(operation: str, sweep: Sweep, name: str) -> None:
    act = OPERATIONS[operation]
    prepare(name)
    with FileStatusTable(name) as table:
        before = contents(table)
        act(table)
        after = contents(table)
        assert before != after
        table.unlink()

    def kill(at: int) -> bool:
        prepare(name)
        with FileStatusTable(name) as table:
            killed = kill_in(lambda: act(table), at)
            assert contents(table) in ((before, after) if killed else (after,))
            if contents(table) == before:
                act(table)
            assert contents(table) == after
            for i in range(CAPACITY):  # nothing was lost: all of the room can still be had
                try:
                    table.set(f"{i}", FileState.DONE)
                except StatusTableFullError:
                    assert len(table) == CAPACITY
            audit(table)
            table.unlink()
        return killed

    sweep.run(kill, 150)


@sweeps(shards=1)
def test_killed_at_any_bytecode_a_creator_leaves_nothing_or_a_whole_table(sweep: Sweep, name: str) -> None:
    def kill(at: int) -> bool:
        killed = kill_in(lambda: FileStatusTable(name, 5).claim("a"), at)
        assert files_of(name) in ([], [segment_of(name)])
        with FileStatusTable(name, 5) as table:
            assert len(audit(table)) in ((0, 1) if killed else (1,))
            table.unlink()
        return killed

    sweep.run(kill, 150)


@sweeps(shards=1)
def test_killed_at_any_bytecode_an_unlinking_is_finished_by_the_next(sweep: Sweep, name: str) -> None:
    def kill(at: int) -> bool:
        with FileStatusTable(name, 5) as table:
            table.claim("a")
            os.mkdir(table._bells)
            os.mkfifo(f"{table._bells}/{table._entries.hash_of(b'a'):016x}")
            killed = kill_in(table.unlink, at)
            old = table._entries.header.uuid
            with FileStatusTable(name, 5) as new:
                if new._entries.header.uuid == old:
                    assert set(audit(new)) == {b"a"}
                else:
                    assert audit(new) == {}
                    assert files_of(name) == [segment_of(name)]
                    with pytest.raises(SegmentMissingError):
                        table.get("a")
                new.unlink()
        assert files_of(name) == []
        return killed

    sweep.run(kill, 40)


@sweeps(shards=2)
def test_killed_at_any_bytecode_a_waiter_is_in_nobodys_way(sweep: Sweep, name: str) -> None:
    with FileStatusTable(name, 5) as table:
        table.claim("a")

        def give_up() -> None:
            try:
                table.wait_available("a", 0.001)
            except TimeoutError:
                pass

        def kill(at: int) -> bool:
            killed = kill_in(give_up, at)
            other = Child(lambda: _until_done(table))
            table.set("a", FileState.PROCESSING, f"{at}")
            _let_it_sleep(other, table)
            table.set("a", FileState.DONE)
            assert other.wait() == 0
            assert not [file for file in files_of(name) if "/" in file]
            audit(table)
            table.claim("a", take={FileState.DONE})
            return killed

        sweep.run(kill, 300)


def _until_done(table: FileStatusTable) -> None:
    status = table.wait_available("a", PATIENCE_S)
    assert status is not None
    assert status.state == FileState.DONE


def _let_it_sleep(child: Child, table: FileStatusTable) -> None:
    """Half the time at least until it sleeps; else it is met on its way there."""
    if random.random() < 0.5:
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            with open(f"/proc/{child.pid}/stat", encoding="ascii") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "S":
                    return
            time.sleep(0.0002)


@sweeps(shards=1)
def test_killed_at_any_bytecode_a_releaser_wakes_all_who_wait(sweep: Sweep, name: str) -> None:
    """The waiters sleep on a path of a process that is killed while it releases: released or stale, they are woken."""
    with FileStatusTable(name, 5) as table:

        def kill(at: int) -> bool:
            ready, go = os.pipe(), os.pipe()

            def release() -> None:
                table.claim("a", take=set(FileState) - {FileState.LOCKED, FileState.PROCESSING})
                os.write(ready[1], b"!")
                os.read(go[0], 1)
                with Bytecodes(kill_before(at)):
                    table.release("a")

            def wait() -> None:
                status = table.wait_available("a", PATIENCE_S)
                assert status is not None
                assert status.stale or status.state == FileState.AVAILABLE

            releaser = Child(release)
            os.read(ready[0], 1)
            waiters = [Child(wait) for _ in range(2)]
            for waiter in waiters:
                _let_it_sleep(waiter, table)
            os.write(go[1], b"!")
            killed = releaser.was_killed()
            for waiter in waiters:
                assert waiter.wait() == 0
            for fd in (*ready, *go):
                os.close(fd)
            audit(table)
            assert not [file for file in files_of(name) if "/" in file]
            return killed

        sweep.run(kill, 150)


# ---- at random -------------------------------------------------------------------------------------------------------


def _work(name: str, seed: int) -> None:
    """Operations without end, on paths that all the others use as well."""
    draw = random.Random(seed)
    with FileStatusTable(name) as table:
        while True:
            path = "p/" * draw.randrange(1, 150) + f"{draw.randrange(6)}"
            try:
                match draw.randrange(4):
                    case 0:
                        table.claim(path, take=(FileState.AVAILABLE, FileState.DONE), detail="c" * draw.randrange(300))
                    case 1:
                        table.set(path, FileState.DONE, "d" * draw.randrange(300))
                    case 2:
                        table.remove(path)
                    case _:
                        with table.processing(path, timeout_s=draw.random() / 100):
                            pass
            except (StatusTableFullError, TimeoutError):
                pass
            except Exception as error:
                if type(error).__name__ not in ("StatusHeldError", "StatusStepError"):
                    raise


@pytest.mark.parametrize("n_kills", [pytest.param(60, id="sample"), pytest.param(2000, id="full", marks=FULL)])
def test_processes_killed_at_random_leave_a_sound_table(n_kills: int, name: str) -> None:
    with FileStatusTable(name, 64, path_bytes=360) as table:
        seeds = iter(range(random.randrange(1 << 30), 1 << 31))
        workers = [Child(lambda: _work(name, next(seeds)), 900) for _ in range(3)]
        for _ in range(n_kills):
            at = random.randrange(len(workers))
            select.select([workers[at].pidfd], [], [], random.expovariate(200))  # an end before its time wakes us
            workers[at].kill()
            assert workers[at].was_killed()
            seed = next(seeds)
            workers[at] = Child(lambda seed=seed: _work(name, seed), 900)
            audit(table)
        for worker in workers:
            worker.kill()
            assert worker.was_killed()
        audit(table)
        for status in table:
            assert status.stale == (status.state in (FileState.LOCKED, FileState.PROCESSING))
            assert table.remove(status.path)
        assert audit(table) == {}
        for path in range(64):
            assert table.claim("x" * 360 if path == 0 else f"{path}")
        assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
        assert owner.this_process().alive

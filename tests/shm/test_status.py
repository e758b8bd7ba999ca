"""The status table: a dict of paths that processes share, and whose owners may die."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.crash.harness import Child as Fork
from tests.shm import child_status
from tests.shm.child_status import as_owner, audit, table_name
from tests.workers.files.child import Child

from ringpool.errors import (
    FileOperationError,
    StatusHeldError,
    StatusStepError,
    StatusTableFullError,
    StatusTimeoutError,
)
from ringpool.shm import owner
from ringpool.shm.owner import Owner
from ringpool.shm.status import HELD, STEPS, FileState, FileStatusTable

PATHS = ["a", "a:b", "ä/ö", b"\xff\xfe", "x" * 119, "x" * 120, "x" * 121, "long/" * 1000, "new\nline"]

# ---- a shared dict ---------------------------------------------------------------------------------------------------


def test_what_was_set_is_read_in_another_process_object(table: FileStatusTable) -> None:
    before_s = time.time()
    for path in PATHS:
        table.set(path, FileState.DONE, f"detail of {path!r}")
    with FileStatusTable(table.name) as again:
        for path in PATHS:
            status = again.get(path)
            assert status is not None
            assert (status.path, status.state) == (os.fsdecode(path), FileState.DONE)
            assert status.detail == f"detail of {path!r}"
            assert (status.owner, status.pid) == (owner.this_process(), os.getpid())
            assert before_s <= status.since_s <= time.time()
            assert not status.stale
            assert path in again
        assert len(again) == len(PATHS)
        assert {status.path for status in again} == {os.fsdecode(path) for path in PATHS}


def test_what_was_never_set_is_not_there(table: FileStatusTable) -> None:
    table.set("a", FileState.DONE)
    for path in ("b", "aa", "A", "./a"):
        assert table.get(path) is None
        assert path not in table
        assert not table.remove(path)


def test_str_bytes_and_path_objects_are_one_path(table: FileStatusTable) -> None:
    table.set(Path("d/ä"), FileState.DONE)
    assert table.get("d/ä") == table.get("d/ä".encode()) == table.get(Path("d/ä"))
    with pytest.raises(ValueError, match="at least one character"):
        table.get("")


def test_counts_and_snapshot_agree(table: FileStatusTable) -> None:
    for i in range(50):
        table.set(f"{i}", list(FileState)[i % 5], "x" * i)
    for i in range(0, 50, 7):
        table.set(f"{i}", FileState.AVAILABLE)
        table.remove(f"{i}")
    snapshot = table.snapshot()
    counts = table.counts()
    assert sorted(int(status.path) for status in snapshot) == [i for i in range(50) if i % 7]
    assert all(status.detail == "x" * int(status.path) for status in snapshot)
    assert {state: sum(status.state == state for status in snapshot) for state in FileState} == counts
    assert len(table) == sum(counts.values()) == len(snapshot)


def test_since_is_when_state_or_owner_changed(table: FileStatusTable, dead: FileStatusTable) -> None:
    def since() -> float:
        status = table.get("a")
        assert status is not None
        return status.since_s

    dead.set("a", FileState.PROCESSING)
    first = since()
    table.set("a", FileState.PROCESSING)
    second = since()
    assert second > first
    table.set("a", FileState.PROCESSING, "half way")
    assert since() == second
    table.set("a", FileState.DONE)
    assert since() > second


# ---- who may do what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", FileState)
@pytest.mark.parametrize("after", FileState)
def test_the_steps_between_states(before: FileState, after: FileState, table: FileStatusTable) -> None:
    table.set("a", before)
    if after in STEPS[before]:
        table.set("a", after, "x")
        assert table.counts()[after] == 1
    else:
        with pytest.raises(StatusStepError, match=f"a is {before.name}, and cannot become {after.name}"):
            table.set("a", after, "x")
        assert table.counts()[before] == 1


@pytest.mark.parametrize("state", [FileState.LOCKED, FileState.PROCESSING])
def test_what_a_living_process_holds_nobody_else_changes(
    state: FileState, table: FileStatusTable, other: FileStatusTable
) -> None:
    other.set("a", state, "mine")
    before = table.get("a")
    assert not table.claim("a")
    for change in (
        lambda: table.set("a", FileState.DONE),
        lambda: table.set("a", FileState.PROCESSING),
        lambda: table.release("a"),
        lambda: table.remove("a"),
    ):
        with pytest.raises(StatusHeldError, match=f"a is {state.name} by process {os.getppid()}, which lives"):
            change()
    with pytest.raises(StatusTimeoutError), table.processing("a"):
        pass
    assert table.get("a") == before
    assert before is not None
    assert not before.stale
    other.release("a")
    table.set("a", FileState.DONE)


@pytest.mark.parametrize("state", [FileState.LOCKED, FileState.PROCESSING])
def test_a_dead_owners_entry_is_stale_and_anybodys(
    state: FileState, table: FileStatusTable, dead: FileStatusTable
) -> None:
    for path in ("claimed", "set", "released", "removed", "processed", "left"):
        dead.set(path, state, "work of the dead")
    assert {status.stale for status in table} == {True}
    assert table.claim("claimed")
    assert not table.claim("claimed")
    table.set("set", FileState.DONE)
    table.release("released")
    assert table.remove("removed")
    with table.processing("processed"):
        status = table.get("processed")
        assert status is not None
        assert (status.pid, status.stale, status.detail) == (os.getpid(), False, "")
    assert [(status.path, status.stale) for status in table if status.stale] == [("left", True)]


def test_what_has_ended_is_never_stale(table: FileStatusTable, dead: FileStatusTable) -> None:
    for state in set(FileState) - HELD:
        dead.set(state.name, state)
    assert {status.stale for status in table} == {False}


def test_a_killed_process_leaves_a_stale_entry_and_no_lock(table: FileStatusTable) -> None:
    with Child(child_status.hold, table.name, "a") as child:
        child.wait_for("held")
        status = table.get("a")
        assert status is not None
        assert (status.pid, status.stale) == (child.pid, False)
        assert not table.claim("a")
        child.kill()
    status = table.get("a")
    assert status is not None
    assert (status.pid, status.stale, status.state) == (child.pid, True, FileState.PROCESSING)
    assert table.claim("a")


def test_a_process_that_dies_with_the_mutex_delays_nobody(table: FileStatusTable) -> None:
    with Child(child_status.hold_the_mutex_and_die, table.name) as child:
        assert child.process.wait() == -signal.SIGKILL
    assert table.claim("a")


def test_a_claim_takes_what_it_is_told_to(table: FileStatusTable) -> None:
    table.set("done", FileState.DONE)
    table.set("error", FileState.ERROR)
    table.set("free", FileState.AVAILABLE)
    assert not table.claim("done")
    assert not table.claim("error")
    assert table.claim("free", state=FileState.LOCKED)
    assert not table.claim("done", take={FileState.ERROR})
    assert table.claim("error", take={FileState.ERROR})
    assert table.claim("new", take=())
    assert table.claim("done", take=[FileState.DONE], detail="again")
    for arguments in ({"state": FileState.DONE}, {"take": [FileState.LOCKED]}):
        with pytest.raises(ValueError, match="a claim makes a path LOCKED or PROCESSING"):
            table.claim("x", **arguments)  # type: ignore[arg-type]


def test_only_what_is_held_is_released(table: FileStatusTable) -> None:
    with pytest.raises(StatusStepError, match="a is missing"):
        table.release("a")
    table.set("a", FileState.DONE)
    with pytest.raises(StatusStepError, match="a is DONE"):
        table.release("a")


def test_eight_processes_claim_ten_thousand_paths_each_once(name: str) -> None:
    n = 10_000
    with FileStatusTable(name, 16_384) as table:
        children = [Child(child_status.claim_all, name, str(n)) for _ in range(8)]
        try:
            for child in children:
                child.wait_for("ready")
            for child in children:
                child.answer()
            got: list[int] = []
            for child in children:
                assert child.process.stdout is not None
                got += [int(word) for word in child.process.stdout.readline().split()]
                child.succeed()
        finally:
            for child in children:
                child.__exit__(None, None, None)
        assert sorted(got) == list(range(n))
        assert table.counts()[FileState.DONE] == len(audit(table)) == n


def test_threads_claim_each_path_once(table: FileStatusTable) -> None:
    got: list[list[int]] = [[] for _ in range(4)]

    def claim(mine: list[int]) -> None:
        mine += [i for i in range(100) if table.claim(f"{i}")]

    threads = [threading.Thread(target=claim, args=(mine,)) for mine in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(i for mine in got for i in mine) == list(range(100))


def test_a_forked_child_is_another_owner(table: FileStatusTable) -> None:
    def body() -> None:
        with pytest.raises(StatusHeldError):
            table.release("parents")
        assert table.claim("childs")
        assert not table.claim("parents")

    table.claim("parents")
    child = Fork(body)
    assert child.wait() == 0
    assert [(status.path, status.pid) for status in table if status.stale] == [("childs", child.pid)]


def test_a_forked_child_that_leaves_its_parents_block_changes_nothing(table: FileStatusTable) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(table.processing("a"))
        assert Fork(stack.close).wait() == 0
        status = table.get("a")
        assert status is not None
        assert (status.state, status.pid) == (FileState.PROCESSING, os.getpid())


# ---- processing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state", "detail"),
    [
        (None, FileState.DONE, ""),
        (ValueError("bad pixel"), FileState.ERROR, "ValueError: bad pixel"),
        (ValueError("\udcff" + "x" * 9999), FileState.ERROR, ("ValueError: \udcff" + "x" * 9999)[:500]),
        (KeyboardInterrupt(), FileState.AVAILABLE, ""),
    ],
)
def test_processing_ends_in_the_state_that_the_block_deserves(
    error: BaseException | None, state: FileState, detail: str, table: FileStatusTable
) -> None:
    with contextlib.suppress(ValueError, KeyboardInterrupt), table.processing("a"):
        assert table.counts()[FileState.PROCESSING] == 1
        if error is not None:
            raise error
    status = table.get("a")
    assert status is not None
    assert (status.state, status.detail) == (state, detail)


@pytest.mark.parametrize("own", [FileState.ERROR, FileState.AVAILABLE, FileState.DONE, None])
def test_what_the_block_itself_made_of_its_path_stays(own: FileState | None, table: FileStatusTable) -> None:
    with table.processing("a"):
        if own is None:
            table.remove("a")
        else:
            table.set("a", own, "by hand")
    status = table.get("a")
    assert (None if status is None else (status.state, status.detail)) == (own and (own, "by hand"))


def test_processing_once_refuses_what_has_ended(table: FileStatusTable) -> None:
    for _ in range(2):
        with table.processing("a"):
            pass
    with (
        pytest.raises(StatusStepError, match="a is DONE"),
        table.processing("a", take={FileState.AVAILABLE}, timeout_s=9),
    ):
        pass


def test_processing_waits_for_its_turn(table: FileStatusTable, name: str) -> None:
    with Child(child_status.hold, name, "a") as child:
        child.wait_for("held")
        threading.Timer(0.05, child.answer).start()
        with table.processing("a", timeout_s=60):
            assert table.counts()[FileState.PROCESSING] == 1


def test_an_exception_without_room_for_its_words_is_still_an_error(name: str) -> None:
    with FileStatusTable(name, 1, path_bytes=120) as table:
        with pytest.raises(ValueError, match="xxx"), table.processing("a"):
            raise ValueError("xxx")
        assert table.counts()[FileState.ERROR] == 1


class UnshowableError(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (ValueError("no \ud800 text"), "ValueError: no \ud800 text"),
        (OSError("caf\udce9"), "OSError: caf\udce9"),
        (UnshowableError(), "UnshowableError: (UnshowableError that cannot be shown: ValueError)"),
    ],
)
def test_an_exception_whose_words_are_no_text_ends_processing_too(
    error: Exception, detail: str, table: FileStatusTable
) -> None:
    with pytest.raises(type(error)), table.processing("a"):
        raise error
    status = table.get("a")
    assert status is not None
    assert (status.state, status.detail) == (FileState.ERROR, detail)


# ---- without descriptors ---------------------------------------------------------------------------------------------

NoDescriptors = Callable[[], contextlib.AbstractContextManager[None]]


def test_without_a_descriptor_nobody_is_taken_for_dead(
    table: FileStatusTable, other: FileStatusTable, no_descriptors: NoDescriptors
) -> None:
    assert other.claim("a")
    with no_descriptors():
        claimed, status = table.claim("a"), table.get("a")
    assert not claimed
    assert status is not None
    assert not status.stale


def is_open_here(path: str) -> bool:
    """Whether this process has a descriptor of the file at ``path``."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{fd}") == path:
                return True
    return False


def test_without_a_descriptor_a_wait_and_a_release_that_wakes_are_refused_by_name(
    table: FileStatusTable, other: FileStatusTable, no_descriptors: NoDescriptors
) -> None:
    assert other.claim("a")
    with no_descriptors(), pytest.raises(FileOperationError, match="a: wait") as refused:
        table.wait_available("a", 5)
    assert refused.value.errno == errno.EMFILE

    assert table.claim("b")
    waiter = threading.Thread(target=table.wait_available, args=("b",))
    waiter.start()
    bell = f"{table._bells}/{table._entries.hash_of(b'b'):016x}"
    while not is_open_here(bell):  # there it is a moment before, when its waiter has yet to take a descriptor
        time.sleep(0.001)
    with no_descriptors(), pytest.raises(FileOperationError, match="b: wake") as refused:
        table.release("b")
    assert refused.value.errno == errno.EMFILE
    status = table.get("b")
    assert status is not None
    assert status.state is FileState.PROCESSING
    table.release("b")
    waiter.join()


# ---- against a dict --------------------------------------------------------------------------------------------------


class TableMachine(RuleBasedStateMachine):
    """Three owners, one of them dead, on a small table; a dict says what must come of it."""

    CAPACITY, CHUNKS = 6, 12

    @initialize()
    def make(self) -> None:
        self.names = contextlib.ExitStack()
        name = self.names.enter_context(table_name())
        self.table = self.names.enter_context(FileStatusTable(name, self.CAPACITY, path_bytes=240))
        me, parent = owner.this_process(), os.getppid()
        self.processes = [me, Owner(parent, owner.start_time(parent)), Owner(me.pid, 1)]
        self.users = [self.names.enter_context(as_owner(name, process)) for process in self.processes]
        self.model: dict[str, tuple[FileState, Owner, str]] = {}

    paths = st.sampled_from(["a", "b", "c" * 120, "d" * 121, "e" * 500, "f", "g", "h" * 119])
    details = st.sampled_from(["", "x", "y" * 120, "z" * 241])
    who = st.integers(0, 2)

    def is_anothers(self, path: str, who: int) -> bool:
        held = self.model.get(path)
        return held is not None and held[0] in HELD and held[1] not in (self.processes[who], self.processes[2])

    def n_chunks(self) -> int:
        return sum(-(-len(text) // 120) for path, (_, _, detail) in self.model.items() for text in (path, detail))

    def put(self, who: int, path: str, state: FileState, detail: str, act: Callable[[], object]) -> None:
        """A change that is legal; it may find no room, and only where there is none."""
        former = self.model.get(path)
        needed = -(-len(detail) // 120) * (former is None or former[2] != detail) + -(-len(path) // 120) * (
            former is None
        )
        fits = self.n_chunks() + needed <= self.CHUNKS and (former is not None or len(self.model) < self.CAPACITY)
        if fits:
            act()
            self.model[path] = (state, self.processes[who], detail)
        else:
            with pytest.raises(StatusTableFullError):
                act()

    @rule(who=who, path=paths, state=st.sampled_from(FileState), detail=details)
    def set(self, who: int, path: str, state: FileState, detail: str) -> None:
        def act() -> None:
            self.users[who].set(path, state, detail)

        former = self.model.get(path)
        if self.is_anothers(path, who):
            with pytest.raises(StatusHeldError):
                act()
        elif former is not None and state not in STEPS[former[0]]:
            with pytest.raises(StatusStepError):
                act()
        else:
            self.put(who, path, state, detail, act)

    @rule(who=who, path=paths, take=st.sets(st.sampled_from([FileState.AVAILABLE, FileState.DONE, FileState.ERROR])))
    def claim(self, who: int, path: str, take: set[FileState]) -> None:
        def act() -> None:
            assert self.users[who].claim(path, take=take)

        former = self.model.get(path)
        is_heir = former is not None and former[0] in HELD and former[1] == self.processes[2] and who != 2
        if former is None or former[0] in take or is_heir:
            self.put(who, path, FileState.PROCESSING, "", act)
        else:
            assert not self.users[who].claim(path, take=take)

    @rule(who=who, path=paths)
    def release(self, who: int, path: str) -> None:
        former = self.model.get(path)
        if self.is_anothers(path, who):
            with pytest.raises(StatusHeldError):
                self.users[who].release(path)
        elif former is None or former[0] not in HELD:
            with pytest.raises(StatusStepError):
                self.users[who].release(path)
        else:
            self.users[who].release(path)
            self.model[path] = (FileState.AVAILABLE, self.processes[who], "")

    @rule(who=who, path=paths)
    def remove(self, who: int, path: str) -> None:
        if self.is_anothers(path, who):
            with pytest.raises(StatusHeldError):
                self.users[who].remove(path)
        else:
            assert self.users[who].remove(path) == (path in self.model)
            self.model.pop(path, None)

    @precondition(lambda self: hasattr(self, "model"))
    @invariant()
    def is_the_model(self) -> None:
        rows = audit(self.table)
        assert {path.decode(): (row.state, row.owner, row.detail.decode()) for path, row in rows.items()} == self.model
        stale = {status.path for status in self.table if status.stale}
        assert stale == {
            path for path, (state, by, _) in self.model.items() if state in HELD and by == self.processes[2]
        }

    def teardown(self) -> None:
        if hasattr(self, "names"):
            self.names.close()


TestTableAgainstADict = TableMachine.TestCase
TestTableAgainstADict.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)

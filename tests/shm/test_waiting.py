"""Waiting for a path: whoever waits is woken, by its end as by its owner's, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import random
import select
import threading
from collections.abc import Callable

import pytest
from tests.crash.opcodes import Bytecodes
from tests.shm import child_status
from tests.shm.child_status import files_of, is_asleep, until
from tests.workers.files.child import Child

from ringpool.errors import (
    StatusTimeoutError,
)
from ringpool.shm import bells
from ringpool.shm.status import HELD, FileState, FileStatusTable


def test_what_nobody_holds_is_not_waited_for(table: FileStatusTable, dead: FileStatusTable) -> None:
    assert table.wait_available("missing", 0) is None
    dead.set("stale", FileState.PROCESSING)
    status = table.wait_available("stale", 0)
    assert status is not None
    assert status.stale
    for state in set(FileState) - HELD:
        table.set(state.name, state)
        assert table.wait_available(state.name) == table.get(state.name)


def test_a_timeout_is_an_error_that_says_who_and_how_long(table: FileStatusTable, other: FileStatusTable) -> None:
    other.claim("a")
    for timeout_s in (0.0, 0.01):
        with pytest.raises(StatusTimeoutError, match=f"a: not available after .* s; process {os.getppid()} has") as e:
            table.wait_available("a", timeout_s)
        assert isinstance(e.value, TimeoutError)
        assert e.value.waited_s >= timeout_s
    assert not [file for file in files_of(table.name) if "/" in file]  # no bell is left


END: dict[str, Callable[[FileStatusTable], object]] = {
    "AVAILABLE": lambda table: table.release("a"),
    "DONE": lambda table: table.set("a", FileState.DONE),
    "ERROR": lambda table: table.set("a", FileState.ERROR, "x"),
    "missing": lambda table: table.remove("a"),
}


@pytest.mark.parametrize("end", END)
def test_all_who_wait_are_woken_by_the_end(end: str, table: FileStatusTable) -> None:
    table.claim("a", detail="x" * 300)
    waiters = [Child(child_status.wait, table.name, "a") for _ in range(2)]
    try:
        for waiter in waiters:
            waiter.wait_for("waiting")
            until(lambda waiter=waiter: is_asleep(waiter.pid))
        table.set("a", FileState.LOCKED)  # still held: nobody wakes
        END[end](table)
        for waiter in waiters:
            waiter.wait_for(end)
            waiter.succeed()
    finally:
        for waiter in waiters:
            waiter.__exit__(None, None, None)
    assert not [file for file in files_of(table.name) if "/" in file]


def test_those_who_wait_are_woken_by_the_owners_death(table: FileStatusTable) -> None:
    with Child(child_status.hold, table.name, "a") as holder:
        holder.wait_for("held")
        with Child(child_status.wait, table.name, "a") as waiter:
            waiter.wait_for("waiting")
            until(lambda: is_asleep(waiter.pid))
            holder.kill()
            waiter.wait_for("PROCESSING stale")
            waiter.succeed()
    assert not [file for file in files_of(table.name) if "/" in file]


def test_a_killed_waiter_leaves_a_bell_that_the_next_one_takes_over(table: FileStatusTable) -> None:
    table.claim("a")
    with Child(child_status.wait, table.name, "a") as waiter:
        waiter.wait_for("waiting")
        until(lambda: is_asleep(waiter.pid))
        waiter.kill()
    assert len([file for file in files_of(table.name) if "/" in file]) == 1
    with pytest.raises(StatusTimeoutError):
        table.wait_available("a", 0.001)
    assert not [file for file in files_of(table.name) if "/" in file]


def test_one_who_gives_up_leaves_the_others_waiting(table: FileStatusTable) -> None:
    table.claim("a")
    with Child(child_status.wait, table.name, "a") as waiter:
        waiter.wait_for("waiting")
        until(lambda: is_asleep(waiter.pid))
        for _ in range(3):
            with pytest.raises(StatusTimeoutError):
                table.wait_available("a", 0.001)
        until(lambda: is_asleep(waiter.pid))
        table.release("a")
        waiter.wait_for("AVAILABLE")


def test_a_bell_that_was_rung_by_one_who_was_interrupted_is_replaced(table: FileStatusTable) -> None:
    table.claim("a")
    digest = table._entries.hash_of(b"a")
    os.mkdir(table._bells)
    first = bells.listen(table._bells, digest)
    fifo = f"{table._bells}/{digest:016x}"
    with open(fifo, "r+b", buffering=0) as left:
        left.write(b"!")
        with pytest.raises(StatusTimeoutError):
            table.wait_available("a", 0.5)
        assert not os.path.exists(fifo)
    os.close(first)


def test_a_bell_is_heard_though_a_forked_child_keeps_it_open(table: FileStatusTable) -> None:
    """A fork in the midst of a release inherits the FIFO: then it is never closed, and only the byte is heard."""
    os.mkdir(table._bells)
    bell = bells.listen(table._bells, 7)
    inherited = os.open(f"{table._bells}/{7:016x}", os.O_RDWR | os.O_NONBLOCK)
    sleep = select.poll()
    sleep.register(bell, select.POLLIN)
    assert not sleep.poll(0)
    bells.ring(table._bells, 7)
    assert sleep.poll(0)
    os.close(bell)
    os.close(inherited)


def test_a_thread_waits_for_another_of_its_own_process(table: FileStatusTable) -> None:
    table.claim("a")
    thread = threading.Thread(
        target=lambda: (until(lambda: table._entries.is_waited(_base(table, b"a"))), END["DONE"](table))
    )
    thread.start()
    status = table.wait_available("a", 60)
    thread.join()
    assert status is not None
    assert status.state == FileState.DONE


def _base(table: FileStatusTable, key: bytes) -> int:
    return table._entries.run(lambda: table._entries.find(key, table._entries.hash_of(key)).base)


@pytest.mark.parametrize("stride", [pytest.param(23, id="sample"), pytest.param(1, id="full", marks=pytest.mark.crash)])
def test_no_wake_up_is_lost_between_looking_and_sleeping(stride: int, table: FileStatusTable) -> None:
    """The path ends before each bytecode of the wait in turn; a wait that misses it sleeps on, which is an error."""
    at = random.randrange(1, stride + 1)
    while end_before(at, table):
        at += stride
    assert at > 500


def end_before(at: int, table: FileStatusTable) -> bool:
    """Wait for a path that another thread ends before bytecode ``at`` of the wait; whether there was one."""
    table.set("a", FileState.PROCESSING)
    ending = threading.Thread(target=table.set, args=("a", FileState.DONE))
    has_begun = threading.Event()
    thread_id = threading.get_native_id()

    def end(n: int) -> None:
        if n == at:
            has_begun.set()
            ending.start()
            if not table._entries.lock.held_by_this_thread:
                ending.join()

    def end_the_rest() -> None:
        until(lambda: has_begun.is_set() or is_asleep(thread_id))
        if not has_begun.is_set():
            table.set("a", FileState.DONE)

    rest = threading.Thread(target=end_the_rest)
    rest.start()
    with Bytecodes(end):
        status = table.wait_available("a", 20)
    assert status is not None
    assert status.state == FileState.DONE
    rest.join()
    if has_begun.is_set():
        ending.join()
    return has_begun.is_set()


def test_a_coroutine_waits_and_the_loop_goes_on(table: FileStatusTable) -> None:
    async def main() -> None:
        table.claim("a")
        waits = [asyncio.create_task(table.wait_available_async("a", 60)) for _ in range(3)]
        cancelled = asyncio.create_task(table.wait_available_async("a"))
        with pytest.raises(StatusTimeoutError):
            await table.wait_available_async("a", 0.02)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        table.set("a", FileState.DONE)
        assert {status and status.state for status in await asyncio.gather(*waits)} == {FileState.DONE}
        assert await table.wait_available_async("a") == table.get("a")

    asyncio.run(main())
    assert not [file for file in files_of(table.name) if "/" in file]


def test_a_coroutine_is_woken_by_the_owners_death(table: FileStatusTable) -> None:
    async def main(holder: Child) -> None:
        wait = asyncio.create_task(table.wait_available_async("a", 60))
        await asyncio.sleep(0)
        holder.kill()
        status = await wait
        assert status is not None
        assert status.stale

    with Child(child_status.hold, table.name, "a") as holder:
        holder.wait_for("held")
        asyncio.run(main(holder))


@pytest.mark.usefixtures("no_garbage")
def test_a_wait_leaves_no_descriptor_open(table: FileStatusTable, other: FileStatusTable) -> None:
    other.claim("a")
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(StatusTimeoutError):
            table.wait_available("a", 0.001)
    assert sorted(os.listdir("/proc/self/fd")) == before

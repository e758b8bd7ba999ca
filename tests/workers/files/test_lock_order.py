"""Who waits for a path lock gets it in order, whatever it is and whoever dies or stops meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from tests.workers.files.child import Child
from tests.workers.files.child_locks import (
    append,
    enter_in_turn,
    enter_in_turn_as_task,
    enter_in_turn_here,
    enter_together,
    enter_when_rung,
    hold,
    in_a_thread,
    is_free,
    lock_file,
    share_until,
    try_it,
    until,
    waiting,
)

from ringpool.errors import LockTimeoutError
from ringpool.workers.files import locks, stripes
from ringpool.workers.files.asynclocks import AsyncPathLock
from ringpool.workers.files.locks import Mode, PathLock


def test_who_comes_first_is_served_first_whatever_it_is(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a")
    log = tmp_path / "log"
    arrivals = [(enter_in_turn, "exclusive"), (enter_in_turn_as_task, "exclusive"), (None, "exclusive")] * 2
    with ExitStack() as stack:
        with lock:
            for number, (function, mode) in enumerate(arrivals):
                if function is None:
                    stack.enter_context(
                        in_a_thread(partial(enter_in_turn_here, tmp_path / "a", mode, log, str(number)))
                    )
                else:
                    stack.enter_context(Child(function, tmp_path / "a", mode, log, str(number)))
                until(lambda: waiting(lock_file(tmp_path, lock)) == number + 1)  # noqa: B023
        until(lambda: log.exists() and len(log.read_text()) == len(arrivals))
    assert log.read_text() == "".join(map(str, range(len(arrivals))))


def test_threads_of_one_process_are_served_in_their_order(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a")
    with ExitStack() as stack, lock:
        for number in range(8):
            one = partial(enter_in_turn_here, tmp_path / "a", "exclusive", tmp_path / "log", str(number))
            stack.enter_context(in_a_thread(one))
            until(lambda: waiting(lock_file(tmp_path, lock)) == number + 1)  # noqa: B023
    assert (tmp_path / "log").read_text() == "01234567"


def test_readers_who_wait_next_to_each_other_go_in_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripes.Stripe, "look_s", 1000)
    monkeypatch.setattr(locks, "IDLE_S", 1000)
    lock, marks = PathLock(tmp_path / "a"), tmp_path / "marks"
    marks.mkdir()
    with ExitStack() as stack:
        with lock:
            for number in range(4):
                arguments = (tmp_path / "a", marks, str(number), "4")
                if number % 2:
                    stack.enter_context(Child(enter_together, *arguments))
                else:
                    stack.enter_context(in_a_thread(partial(share_until, *arguments)))
            until(lambda: waiting(lock_file(tmp_path, lock)) == 4)
        until(lambda: len(os.listdir(marks)) == 4)


@pytest.mark.parametrize("here", [True, False])
def test_a_reader_who_comes_while_a_writer_waits_goes_behind_it(tmp_path: Path, here: bool) -> None:
    lock, log = PathLock(tmp_path / "a", "shared"), tmp_path / "log"
    with ExitStack() as stack:
        with lock:
            if here:
                stack.enter_context(
                    in_a_thread(partial(enter_in_turn_here, tmp_path / "a", "exclusive", log, "writer "))
                )
            else:
                stack.enter_context(Child(enter_in_turn, tmp_path / "a", "exclusive", log, "writer "))
            until(lambda: waiting(lock_file(tmp_path, lock)) == 1)
            for function in (enter_in_turn, enter_in_turn_as_task):
                stack.enter_context(Child(function, tmp_path / "a", "shared", log, "reader "))
            until(lambda: waiting(lock_file(tmp_path, lock)) == 3)
            assert is_free(lock_file(tmp_path, lock), shared=True)
            with Child(try_it, tmp_path / "a", "shared") as child:
                child.wait_for("taken by somebody else")

            def refuse() -> None:
                with pytest.raises(LockTimeoutError):
                    PathLock(tmp_path / "a", "shared", timeout_s=0).acquire()

            with in_a_thread(refuse):
                pass
            assert not log.exists()
        until(lambda: log.exists() and len(log.read_text()) == 21)
    assert log.read_text() == "writer reader reader "


def test_when_a_waiting_writer_gives_up_the_readers_behind_it_go_in(tmp_path: Path) -> None:
    lock, log = PathLock(tmp_path / "a", "shared"), tmp_path / "log"

    def give_up() -> None:
        with pytest.raises(LockTimeoutError):
            PathLock(tmp_path / "a", timeout_s=0.5).acquire()

    came = time.monotonic()
    with lock, in_a_thread(give_up):
        until(lambda: waiting(lock_file(tmp_path, lock)) == 1)
        with (
            Child(enter_in_turn, tmp_path / "a", "shared", log, "reader "),
            in_a_thread(partial(enter_in_turn_here, tmp_path / "a", "shared", log, "reader ")),
        ):
            until(lambda: log.exists() and log.read_text() == "reader reader ")
        assert time.monotonic() - came >= 0.5  # not before the writer can have given up
    assert waiting(lock_file(tmp_path, lock)) == 0


def test_the_lock_is_handed_on_by_ringing_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripes.Stripe, "look_s", 1000)
    monkeypatch.setattr(locks, "IDLE_S", 1000)
    lock, log = PathLock(tmp_path / "a"), tmp_path / "log"
    arrivals: list[tuple[str, Mode]] = [("child", "exclusive"), ("thread", "exclusive"), ("thread", "exclusive")]
    arrivals += [("child", "shared"), ("thread", "shared"), ("thread", "shared"), ("child", "shared")]
    arrivals += [("thread", "exclusive"), ("child", "exclusive")]
    with ExitStack() as stack:
        with lock:
            for number, (kind, mode) in enumerate(arrivals):
                if kind == "child":
                    stack.enter_context(Child(enter_when_rung, tmp_path / "a", mode, log, str(number)))
                else:
                    one = partial(enter_in_turn_here, tmp_path / "a", mode, log, str(number))
                    stack.enter_context(in_a_thread(one))
                until(lambda: waiting(lock_file(tmp_path, lock)) == number + 1)  # noqa: B023
        until(lambda: log.exists() and len(log.read_text()) == len(arrivals))
    order = log.read_text()
    assert (order[:3], sorted(order[3:7]), order[7:]) == ("012", [*"3456"], "78")


@pytest.mark.parametrize("victim", ["holder", "first waiter"])
def test_a_killed_holder_or_waiter_does_not_hold_up_who_is_behind(tmp_path: Path, victim: str) -> None:
    lock, log = PathLock(tmp_path / "a"), tmp_path / "log"
    with Child(hold, tmp_path / "a") as holder:
        holder.wait_for("held")
        with Child(enter_in_turn, tmp_path / "a", "exclusive", log, "first ") as first:
            until(lambda: waiting(lock_file(tmp_path, lock)) == 1)
            with Child(enter_in_turn, tmp_path / "a", "exclusive", log, "second ") as second:
                until(lambda: waiting(lock_file(tmp_path, lock)) == 2)
                if victim == "holder":
                    holder.kill()
                else:
                    first.kill()
                    holder.answer()
                    holder.wait_for("released")
                until(lambda: log.exists() and "second" in log.read_text())
                second.answer()
                second.succeed()
    assert log.read_text() == ("first second " if victim == "holder" else "second ")


def test_a_stopped_waiter_is_overtaken_and_gets_it_when_it_goes_on(tmp_path: Path) -> None:
    lock, log = PathLock(tmp_path / "a"), tmp_path / "log"
    with Child(hold, tmp_path / "a") as holder:
        holder.wait_for("held")
        with Child(enter_in_turn, tmp_path / "a", "exclusive", log, "stopped ") as stopped:
            until(lambda: waiting(lock_file(tmp_path, lock)) == 1)
            os.kill(stopped.pid, signal.SIGSTOP)
            with Child(enter_in_turn, tmp_path / "a", "exclusive", log, "other ") as other:
                until(lambda: waiting(lock_file(tmp_path, lock)) == 2)
                holder.answer()
                holder.wait_for("released")
                until(lambda: log.exists())
                with PathLock(tmp_path / "a", timeout_s=30):
                    append(str(log), "here ")
                with PathLock(tmp_path / "a", timeout_s=30):  # now that it has been passed once, without queuing
                    os.kill(stopped.pid, signal.SIGCONT)
                    append(str(log), "again ")
                until(lambda: "stopped" in log.read_text())
                assert other.process.poll() is None
    assert log.read_text() == "other here again stopped "


def test_a_task_whose_loop_is_blocked_is_overtaken_by_a_lock_that_the_loop_waits_for(tmp_path: Path) -> None:
    order: list[str] = []

    async def both() -> None:
        async def wait() -> None:
            async with AsyncPathLock(tmp_path / "a"):
                order.append("task")

        release = threading.Event()

        def hold_in_a_thread() -> None:
            with PathLock(tmp_path / "a"):
                held.set()
                release.wait()

        held = threading.Event()
        with in_a_thread(hold_in_a_thread):
            held.wait()
            task = asyncio.create_task(wait())
            while not waiting(lock_file(tmp_path, PathLock(tmp_path / "a"))):
                await asyncio.sleep(0)
            release.set()
            with PathLock(tmp_path / "a", timeout_s=30):
                order.append("thread")
        await task

    asyncio.run(both())
    assert order == ["thread", "task"]

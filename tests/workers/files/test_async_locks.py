"""Path locks for asyncio: in one queue with all others, cancelled at any moment, and no thread taken."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest
from tests.workers.files.child import Child
from tests.workers.files.child_locks import hold, is_free, left_marked, lock_file, try_it, waiting

from ringpool.errors import LockTimeoutError, LockUpgradeError
from ringpool.workers.files import recovery
from ringpool.workers.files.asynclocks import AsyncPathLock, in_thread
from ringpool.workers.files.locks import PathLock, in_order


async def use(directory: Path) -> None:
    """Lock something there: the first time, a base is looked through in a thread."""
    async with AsyncPathLock(directory / "some other file"):
        pass


def test_tasks_exclude_each_other_threads_and_processes(tmp_path: Path) -> None:
    async def all_at_once() -> None:
        inside: list[int] = []

        async def enter() -> None:
            for _ in range(10):
                async with AsyncPathLock(tmp_path / "a"):
                    inside.append(1)
                    assert len(inside) == 1
                    await asyncio.sleep(0)
                    inside.pop()

        await asyncio.gather(*(enter() for _ in range(10)))
        async with AsyncPathLock(tmp_path / "a") as lock:
            await asyncio.to_thread(refuse)
            with Child(try_it, tmp_path / "a") as child:
                await asyncio.to_thread(child.wait_for, "taken by somebody else")
        assert is_free(lock_file(tmp_path, lock))

    def refuse() -> None:
        with pytest.raises(LockTimeoutError, match="another task of this process"):
            PathLock(tmp_path / "a", timeout_s=0).acquire()

    asyncio.run(all_at_once())


def test_a_thousand_waiting_tasks_take_no_thread_and_leave_the_loop_alone(tmp_path: Path) -> None:
    async def crowd() -> list[int]:
        served: list[int] = []

        async def enter(number: int) -> None:
            async with AsyncPathLock(tmp_path / "a"):
                served.append(number)

        with Child(hold, tmp_path / "a") as child:
            await asyncio.to_thread(child.wait_for, "held")
            await use(tmp_path)
            threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
            tasks = [asyncio.create_task(enter(number)) for number in range(1000)]
            await asyncio.sleep(0.05)  # the loop runs
            assert threading.active_count() == threads
            assert len(os.listdir("/proc/self/fd")) < fds + 10
            child.answer()
            await asyncio.gather(*tasks)
        return served

    assert asyncio.run(crowd()) == list(range(1000))


def test_a_task_may_lock_again_and_another_task_may_not_release_it(tmp_path: Path) -> None:
    async def main() -> None:
        lock = AsyncPathLock(tmp_path / "a", timeout_s=0)
        async with lock, lock, AsyncPathLock(tmp_path / "a", "shared", timeout_s=0):

            async def other() -> None:
                with pytest.raises(RuntimeError, match="a task that does not hold it"):
                    lock.release()
                with pytest.raises(LockTimeoutError):
                    await lock.acquire()

            await asyncio.create_task(other())
            assert not is_free(lock_file(tmp_path, lock))
        assert is_free(lock_file(tmp_path, lock))
        async with AsyncPathLock(tmp_path / "a", "shared"):
            with pytest.raises(LockUpgradeError):
                await lock.acquire()
        with pytest.raises(RuntimeError, match="not locked"):
            lock.release()

    asyncio.run(main())


def test_one_lock_object_serves_several_tasks(tmp_path: Path) -> None:
    async def main() -> None:
        lock = AsyncPathLock(tmp_path / "a", timeout_s=60)
        inside: list[int] = []

        async def enter() -> None:
            async with lock, lock:
                inside.append(1)
                assert len(inside) == 1
                await asyncio.sleep(0)
                inside.pop()

        await asyncio.gather(*(enter() for _ in range(5)))
        assert not lock.turns
        assert is_free(lock_file(tmp_path, lock))

    asyncio.run(main())


def test_what_a_task_has_acquired_that_has_ended_may_be_released_by_anybody(tmp_path: Path) -> None:
    async def main() -> None:
        lock = AsyncPathLock(tmp_path / "a")
        await asyncio.create_task(lock.acquire())  # as asyncio.wait_for does it, before Python 3.12
        assert not is_free(lock_file(tmp_path, lock))
        lock.release()
        assert is_free(lock_file(tmp_path, lock))
        with pytest.raises(RuntimeError, match="not locked"):
            lock.release()

    asyncio.run(main())


@pytest.mark.parametrize("place", ["head", "behind"])
def test_a_cancelled_wait_leaves_nothing_behind(tmp_path: Path, place: str) -> None:
    lock = AsyncPathLock(tmp_path / "a")
    file = lock_file(tmp_path, lock)

    async def enter(served: list[str], name: str) -> None:
        async with AsyncPathLock(tmp_path / "a"):
            served.append(name)

    async def main() -> None:
        served: list[str] = []
        await use(tmp_path)
        with Child(hold, tmp_path / "a") as child:
            await asyncio.to_thread(child.wait_for, "held")
            tasks = [asyncio.create_task(enter(served, name)) for name in ("one", "two", "three")]
            while waiting(file) != 3:
                await asyncio.sleep(0.001)
            tasks[place == "behind"].cancel()
            while waiting(file) != 2:
                await asyncio.sleep(0.001)
            child.answer()
            await asyncio.wait(tasks)
        assert served == (["one", "three"] if place == "behind" else ["two", "three"])
        assert (waiting(file), is_free(file)) == (0, True)

    asyncio.run(main())


def test_a_task_that_is_cancelled_just_as_it_is_woken_passes_the_lock_on(tmp_path: Path) -> None:
    async def main() -> None:
        served: list[int] = []

        async def enter(number: int) -> None:
            async with AsyncPathLock(tmp_path / "a"):
                served.append(number)

        for _ in range(20):
            async with AsyncPathLock(tmp_path / "a") as lock:
                tasks = [asyncio.create_task(enter(number)) for number in range(3)]
                while waiting(lock_file(tmp_path, lock)) != 3:
                    await asyncio.sleep(0)
            tasks[0].cancel()  # it was rung by the release
            await asyncio.wait(tasks)
        assert served.count(2) == 20
        assert is_free(lock_file(tmp_path, lock))

    asyncio.run(main())


def test_a_task_waits_no_longer_than_it_is_to(tmp_path: Path) -> None:
    async def main() -> None:
        with Child(hold, tmp_path / "a") as child:
            await asyncio.to_thread(child.wait_for, "held")
            for timeout_s in (0, 0.02):
                with pytest.raises(LockTimeoutError, match=f"process {child.pid}") as caught:
                    await AsyncPathLock(tmp_path / "a", timeout_s=timeout_s).acquire()
                assert caught.value.waited_s >= timeout_s

    asyncio.run(main())


def test_a_task_that_is_cancelled_while_it_recovers_recovers_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_marked(tmp_path / "a", "mark")
    file = lock_file(tmp_path, PathLock(tmp_path / "a"))
    began, go_on = threading.Event(), threading.Event()

    def recover(root: bytes, text: bytes, _deadline_s: float | None) -> None:
        began.set()
        assert go_on.wait(60)
        assert not is_free(file, shared=True)

    monkeypatch.setattr(recovery, "recover_marked", recover)

    async def main() -> None:
        task = asyncio.create_task(AsyncPathLock(tmp_path / "a").acquire())
        await asyncio.to_thread(began.wait)
        task.cancel()
        await asyncio.sleep(0)
        assert not is_free(file)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert is_free(file)
    assert file.stat().st_size == 0


def test_at_the_end_of_asyncio_run_work_in_a_thread_is_waited_for() -> None:
    begun, ended = threading.Event(), threading.Event()
    seen: list[bool] = []

    def work() -> None:
        begun.set()
        time.sleep(0.2)
        ended.set()

    async def under_a_lock() -> None:
        try:
            await in_thread(work)
        finally:  # here a lock would be released
            seen.append(ended.is_set())

    async def main() -> None:
        task = asyncio.create_task(under_a_lock())
        await asyncio.to_thread(begun.wait)
        assert not task.done()

    asyncio.run(main())  # cancels the task
    assert seen == [True]


def test_what_is_acquired_is_released_where_no_loop_runs(tmp_path: Path) -> None:
    lock = AsyncPathLock(tmp_path / "a")
    asyncio.run(lock.acquire())
    lock.release()
    assert is_free(lock_file(tmp_path, lock))


def test_a_block_that_is_left_when_its_loop_is_closed_leaves_no_lock(tmp_path: Path) -> None:
    lock = AsyncPathLock(tmp_path / "a")

    async def stay() -> None:
        async with lock:
            loop.stop()
            await asyncio.sleep(60)

    loop = asyncio.new_event_loop()
    task = loop.create_task(stay())
    loop.run_forever()
    loop.close()
    coroutine = task.get_coro()
    assert coroutine is not None
    coroutine.close()
    assert is_free(lock_file(tmp_path, lock))


def test_locks_of_several_bases_are_taken_in_one_order_by_all(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name / ".ringpool").mkdir(parents=True)
    locks = [AsyncPathLock(tmp_path / name / str(number)) for name in "abcd" for number in range(8)]
    paths = [lock.path for lock in in_order(reversed(locks))]
    assert paths == [lock.path for lock in in_order(PathLock(path) for path in sorted(paths))]
    inodes = [(tmp_path / os.fsdecode(path)).parent.stat().st_ino for path in paths]
    assert inodes == sorted(inodes)

"""The lock on a path for asyncio tasks. What it promises, and how, is in ``locks``."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import math
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

from ringpool.workers.files import lockfiles, turns
from ringpool.workers.files.locks import LockBase, from_here
from ringpool.workers.files.stripes import Turn

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Threads for file work, apart from the loop's default executor: that may be full of calls (``asyncio.to_thread``) that
# wait for the very lock under which the work is to be done.
_threads: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[ThreadPoolExecutor, AsyncGenerator[None]]] = (
    WeakKeyDictionary()
)


class AsyncPathLock(LockBase):
    """The lock on ``path`` for an asyncio task, its owner; otherwise as ``PathLock``, in one queue with it.

    An async context manager. Waiting takes no thread, and a cancelled wait leaves nothing behind. Several tasks may use
    one object. What a task has acquired that has ended, anybody may release who has the object.
    """

    __slots__ = ()

    async def acquire(self) -> None:
        """Take the lock. Raises as ``PathLock.acquire`` does."""
        began_s = time.monotonic()
        turn = Turn(asyncio.current_task(), from_here(self.path), self.mode == "exclusive")
        try:
            self.turns.append(turn)
            deadline_s = self._deadline_s(began_s)
            await self._recover_root(turn.path, deadline_s)
            if not turns.arrive(turn, self.base, deadline_s, may_wait=self.timeout_s != 0) or turn.is_marked:
                await self._finish(turn, deadline_s)
        except BaseException as error:
            try:
                self._undo(turn)
            except BaseException:  # a Ctrl-C while a timeout was handled
                self._undo(turn)
                raise
            self._fail(error, turn, began_s)

    async def _recover_root(self, path: bytes, deadline_s: float | None) -> None:
        place = lockfiles.find(path, self.base)
        if not turns.is_recovered(place):
            await in_thread(turns.recover, place, deadline_s)

    async def _finish(self, turn: Turn, deadline_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        turn.alarm = functools.partial(loop.call_soon_threadsafe, woken.set)
        steps = turns.finish(turn, self.base, deadline_s, math.inf)
        try:
            pause_s = next(steps)
            while True:
                if pause_s is None:
                    await in_thread(turn.recover, deadline_s)
                    pause_s = next(steps)
                else:
                    pause_s = steps.send(await _sleep(turn, woken, pause_s))
        except StopIteration:
            return

    def _is_nobodys(self, turn: Turn) -> bool:
        """Or its task has ended: ``asyncio.wait_for``, before Python 3.12, acquires in a task of its own. Or it never
        will, its loop being closed.
        """
        if super()._is_nobodys(turn):
            return True
        if not isinstance(turn.owner, asyncio.Task):
            return False
        task = cast("asyncio.Task[object]", turn.owner)
        return task.done() or task.get_loop().is_closed()

    def release(self) -> None:
        """Release it once. Raises ``RuntimeError`` where this task does not hold it, else as ``PathLock.release``."""
        self._release(_current_task, "task")

    async def __aenter__(self) -> AsyncPathLock:
        await self.acquire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _current_task() -> asyncio.Task[object] | None:
    """None also where no loop runs."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


async def _sleep(turn: Turn, woken: asyncio.Event, pause_s: float) -> bool:
    """Await the alarm or the bell of ``turn``, so many seconds at most; whether there was one."""
    loop = asyncio.get_running_loop()
    bell = turn.bell
    if bell is not None:
        loop.add_reader(bell.socket, woken.set)
    timer = loop.call_later(pause_s, woken.set) if pause_s < math.inf else None
    try:
        await woken.wait()
    finally:
        if timer is not None:
            timer.cancel()
        if bell is not None:
            loop.remove_reader(bell.socket)
        woken.clear()
    turns.answer(turn)
    return timer is None or loop.time() < timer.when()


async def _begin_threads(loop: asyncio.AbstractEventLoop) -> tuple[ThreadPoolExecutor, AsyncGenerator[None]]:
    """Threads for the running loop, which end when its asynchronous generators are shut down, as ``asyncio.run`` does;
    and those of closed loops end.
    """
    for other in [each for each in _threads if each.is_closed()]:
        _threads.pop(other)[0].shutdown(wait=False)
    threads = ThreadPoolExecutor(thread_name_prefix="ringpool-files")

    async def until_the_end() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            _threads.pop(loop, None)
            threads.shutdown()

    generator = until_the_end()
    await anext(generator)
    _threads[loop] = threads, generator
    return _threads[loop]


async def in_thread(function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """``asyncio.to_thread``, but a cancellation comes through only when the function has ended; in threads that nobody
    else uses, so that ``function`` must not wait for the lock on a path.

    What is awaited is no task: ``asyncio.run`` cancels all tasks at its end, and the thread would go on.
    """
    loop = asyncio.get_running_loop()
    threads, _ = _threads.get(loop) or await _begin_threads(loop)
    context = contextvars.copy_context()
    work = loop.run_in_executor(threads, functools.partial(context.run, function, *args, **kwargs))
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return work.result()
    if not work.cancelled():
        work.exception()  # looked at: the loop need not report it
    raise cancelled

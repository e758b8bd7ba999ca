"""Calls on a pool: what ``RingPoolExecutor`` is made of. Only who makes an executor imports this, see there.

submit --> PoolFuture <--+
map -----> MapRun <------+-- Pool: Pump <--ring--> workers, started when tasks wait for them
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import repeat
from multiprocessing.context import BaseContext
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from ringpool.coordinator.contexts import START_METHOD, has_chosen_no_method, named_context, start_method
from ringpool.coordinator.futures import PoolFuture
from ringpool.coordinator.logs import LogInbox
from ringpool.coordinator.maprun import MapOptions, MapRun
from ringpool.coordinator.pool import Pool, WorkerLimits
from ringpool.coordinator.supervisor import Death
from ringpool.coordinator.taskoptions import TaskOptions
from ringpool.coordinator.tickets import Ticket
from ringpool.errors.broken import ExecutorEndedError
from ringpool.shm import blobs
from ringpool.shm.dispatch import Task
from ringpool.shm.layout import Encoding, Form
from ringpool.workers import calls
from ringpool.workers.setup import Setup, has_fork_lock

RING_SLOTS = 1024
LOGS_TIMEOUT_S = 5.0  # for handlers, to take what workers had logged when they ended
FUNCTIONS_MAX = 1024  # known to the workers by an id; what is beyond is sent with each call
_PLAIN = int(Form.PLAIN)
_AT_HAND: tuple[type[Any], ...] = (list, tuple, range, str, bytes, dict, set, frozenset)


class CallPool:
    """A pool for calls, with arguments as ``RingPoolExecutor`` has checked them. ``pool``: its workers and its ring."""

    def __init__(
        self,
        n_workers: int,
        mp_context: str | BaseContext | ModuleType | None,
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
        *,
        max_tasks_per_child: int | None,
        memory_limit: int | None,
        memory_per_child_max: int | None,
        on_exit: Callable[[Death, str], None] | None,
        forward_logs: bool,
    ) -> None:
        if mp_context is None and max_tasks_per_child is None and has_chosen_no_method() and has_fork_lock(initargs):
            mp_context = "fork"  # no other process could have it
        if max_tasks_per_child is not None and mp_context is None and start_method() == "fork":
            mp_context = START_METHOD  # as ProcessPoolExecutor takes "spawn" then
        if max_tasks_per_child is not None and mp_context and named_context(mp_context).get_start_method() == "fork":
            raise ValueError(
                "max_tasks_per_child is incompatible with the 'fork' multiprocessing start method; "
                "supply a different mp_context."
            )
        inbox = LogInbox() if forward_logs else None
        self._functions: dict[Callable[..., Any], int] = {}
        self.pool = Pool(
            n_workers,
            mp_context,
            slots=RING_SLOTS,
            limits=WorkerLimits(
                max_tasks_per_child or 0, min(filter(None, (memory_limit, memory_per_child_max)), default=0)
            ),
            memory_limit_bytes=memory_limit,
            on_demand=True,
            setup=lambda: Setup(initializer, initargs, None if inbox is None else inbox.sender()),
            on_ended=None if inbox is None else lambda: inbox.close(LOGS_TIMEOUT_S),
            on_exit=on_exit,
            closed=lambda: RuntimeError("cannot schedule new futures after shutdown"),
            ended=ExecutorEndedError,
        )

    def submit(
        self, options: TaskOptions, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Future[Any]:
        """Queue ``fn(*args, **kwargs)``; its future."""
        pool = self.pool
        pool.check_open(first=lambda: calls.prepare(fn))
        future = PoolFuture(pool.pump)
        try:
            function_id = self._functions.get(fn, 0) if type(fn) in (FunctionType, BuiltinFunctionType) else 0
            if not function_id:
                _require_function(fn)
                function_id = self._introduce(fn)
            body = calls.encode_plain(args) if function_id and not kwargs else None
            if body is not None:
                task = Task(function_id, body, 0, _PLAIN)
            else:
                call = calls.encode_call(None if function_id else fn, args, kwargs)
                task = pool.task(function_id, call.encoded, call.form)
        except Exception as error:  # it cannot be sent
            future.set_running_or_notify_cancel()
            future.set_exception(error)
            return future
        future.ticket = ticket = Ticket(
            task,
            future,
            fn,
            None,
            attempts_max=options.retries + 1,
            timeout_s=options.timeout,
            priority=options.priority,
        )
        pool.pump.queue(ticket)
        pool.pump.wake()
        return future

    def _introduce(self, fn: Callable[..., Any]) -> int:
        """Make a function known to the workers by an id, where its name says it all; else 0: it goes with each call."""
        if len(self._functions) >= FUNCTIONS_MAX or not calls.is_by_name(fn):
            return 0
        function_id = self._write_function(fn)
        self._functions[fn] = function_id
        return function_id

    def _write_function(self, fn: Callable[..., Any]) -> int:
        pool = self.pool
        function_id = next(pool.function_ids)
        name = blobs.function_name(pool.name, function_id)
        blobs.write(name, Encoding.PICKLE, calls.pickle_callable(fn))
        pool.keep(name)
        return function_id

    def map(
        self,
        options: TaskOptions,
        fn: Callable[..., Any],
        iterables: tuple[Iterable[Any], ...],
        *,
        ordered: bool,
        timeout: float | None,
        chunksize: int | None,
        buffersize: int | None,
        return_exceptions: bool,
    ) -> Iterator[Any]:
        """Results of ``fn`` of each item, as they are taken."""
        pool = self.pool
        pool.check_open(first=lambda: calls.prepare(fn))
        _require_function(fn)
        pool.make_arena()
        at_hand = all(map(_is_at_hand, iterables))
        iterators: list[Iterator[Any]] = [iter(each) for each in iterables]  # which may raise: before there is anything
        try:
            function_id = self._write_function(fn)
        except calls.NotSharedError:  # then each item has it
            function_id = self._write_function(calls.apply)
            iterators = [repeat(fn), *iterators] if iterators else []
        starred = len(iterators) != 1
        run = MapRun(
            pool,
            fn,
            function_id,
            zip(*iterators, strict=False) if starred else iterators[0],
            starred=starred,
            at_hand=at_hand,
            options=MapOptions(
                ordered, chunksize, buffersize, return_exceptions, options.timeout, options.retries, options.priority
            ),
            on_retired=_remover(pool, function_id),
        )
        try:
            run.fill()
        except BaseException:  # Ctrl-C: nobody will have it
            run.close()
            raise
        return run.results(timeout)


def _is_at_hand(iterable: Iterable[Any]) -> bool:
    """Whether to iterate over it waits for nothing, and asks nobody: what a subclass does instead may."""
    kind = type(iterable)
    return kind is repeat or any(isinstance(iterable, known) and kind.__iter__ is known.__iter__ for known in _AT_HAND)


def _require_function(fn: object) -> None:
    """Raise ``TypeError`` for None, which to the workers means a function that they know by an id. All else that cannot
    be called they find out themselves.
    """
    if fn is None:
        raise TypeError("'NoneType' object is not callable")


def _remover(pool: Pool, function_id: int) -> Callable[[], None]:
    name = blobs.function_name(pool.name, function_id)

    def remove() -> None:
        blobs.unlink(name)

    return remove

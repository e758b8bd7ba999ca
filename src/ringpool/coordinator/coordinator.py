"""The coordinator: a pool of worker processes for file tasks, and the public face of all this.

caller --submit_file_task, run_file_tasks--> Pool: Pump <--ring--> workers
"""

from __future__ import annotations

import itertools
import os
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from multiprocessing.context import BaseContext
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import msgspec

from ringpool.coordinator.contexts import require_importable
from ringpool.coordinator.drawing import Drawing, FileTask, Path, check_output, usable
from ringpool.coordinator.fileinbox import FileInbox
from ringpool.coordinator.filerun import FileRun
from ringpool.coordinator.futures import TaskBoard, TaskFuture
from ringpool.coordinator.pool import Pool
from ringpool.coordinator.staged import StagedOutputs as StagedOutputs  # not when it is needed: see there
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import InputMissingError
from ringpool.shm import blobs, layout
from ringpool.shm.dispatch import Task
from ringpool.shm.layout import INLINE_BYTES, Encoding
from ringpool.workers import tasks, values
from ringpool.workers.files import naming
from ringpool.workers.files.atomic import Durability
from ringpool.workers.retry import RetryPolicy

IDLE_MAX = 64  # functions with a policy that are kept for the next task that has the same
PLAIN_MAX = 256  # without one: looked up at once


class CoordinatorStats(NamedTuple):
    """Counts since the start, and what is under way now."""

    workers_alive: int
    queued: int  # waiting outside the ring
    in_ring: int  # published, not yet delivered
    completed: int
    failed: int
    worker_deaths: int
    retried: int  # tasks tried again after a death
    taken_back: int  # claims taken from a worker that was busy with a long task


class _Function(msgspec.Struct):
    """A task function as it is registered: the id of its blob, how it wants to be called, and how many runs use it, and
    tasks with a policy.
    """

    id: int
    name: str
    signature: tasks.Signature
    spec: bytes
    shared: bool  # it has parameters that all its tasks share, which may be large
    has_policy: bool  # of which there may be any number
    users: int = 0


class Coordinator:
    """A pool of ``workers`` processes (default: one per core that this process may use) that run functions over files.

    ``mp_context``: a start method (``"forkserver"``, the default, ``"spawn"``, ``"fork"``), ``multiprocessing`` or a
    context of it. ``ring_slots``: how many tasks are in shared memory at a time. ``attempts_max``: how often a task is
    started whose worker died in it, at most 63. ``claims_max``: how many short tasks a worker takes at once, at most
    64 (1: one by one, and nothing is sent together). ``durability`` of outputs: ``"none"``, ``"atomic"``, ``"data"`` or
    ``"full"``.

    Use it as a context manager. Leaving it normally drains it; leaving it by an exception drops what has not started,
    and by Ctrl-C, ``SIGTERM`` or ``SIGHUP`` kills what runs too. Methods may be called from any thread of the process
    that made it.

    Raises ``SharedMemoryFullError`` where ``/dev/shm`` has no room, ``SharedMemoryUnusableError`` where it is not there
    or not writable, ``ThreadStartError``, ``ValueError`` for numbers out of range,
    ``MainModuleError`` where a worker comes by because the main module makes a pool without a guard,
    ``DaemonicProcessError`` in a process of ``multiprocessing`` that may have none of its own,
    ``MonkeyPatchedError`` where gevent or eventlet have replaced ``threading``, ``select`` or ``socket``,
    ``WorkingDirectoryError`` where the current directory was removed or may not be entered.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        mp_context: str | BaseContext | ModuleType | None = None,
        ring_slots: int = 1024,
        attempts_max: int = 3,
        claims_max: int = layout.CLAIMS_MAX,
        durability: str = Durability.FULL,
    ) -> None:
        cores = len(os.sched_getaffinity(0))
        n_workers = min(cores, layout.WORKERS_MAX) if workers is None else workers
        self._durability = Durability(durability)
        self._attempts_max = layout.check_number("attempts_max", attempts_max, layout.ATTEMPT_MAX)
        self._task_ids = itertools.count(1)
        self._functions: dict[bytes, _Function] = {}
        self._plain: dict[tasks.TaskFunction | str, _Function] = {}  # those that were given alone, by what was given
        self._ended: deque[_Function] = deque()  # of tasks; not yet released: who ends one may hold the lock
        self._idle: OrderedDict[bytes, _Function] = OrderedDict()  # with a policy, and nobody uses them now
        self._board = TaskBoard()
        self._claims_max = claims_max
        self._pool = Pool(n_workers, mp_context, slots=ring_slots, claims_max=claims_max)
        self._pump = self._pool.pump

    # ---- tasks

    def submit_file_task(
        self,
        fn: tasks.TaskFunction | str,
        src: Path,
        dst: Path | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        retry: RetryPolicy | None = None,
    ) -> TaskFuture:
        """Queue ``fn(src, **params)``, or ``fn(src, dst, **params)`` with an output; its future, with ``task_id``.

        ``fn`` is a function of a module's top level, or ``"module:qualname"``. A call that raises is tried again by
        its worker as ``retry`` says (None: not at all); a worker's death is another matter, see ``attempts_max``.
        What it has written to ``dst`` is removed before; or kept, as ``.rp-*.kept`` beside it, where ``src`` is gone.
        Raises at once, with nothing queued:
        ``UnknownFunctionError``, ``ParameterError``, ``InputMissingError``, ``PathNameError``,
        ``SharedMemoryFullError``, ``CoordinatorClosedError``, or what broke the pool.
        """
        self._pool.check_open()
        function = self._function(fn, {}, retry) if retry is not None else self._plain_function(fn)
        try:
            return self._submit(function, src, dst, params or {})
        except Exception:  # nothing is queued
            if function.has_policy:
                self._ended.append(function)
            raise

    def _submit(self, function: _Function, src: Path, dst: Path | None, params: Mapping[str, Any]) -> TaskFuture:
        name, signature = function.name, function.signature
        check_output(name, signature, has_output=dst is not None)
        own = tasks.validate(name, signature, params)
        tasks.require(name, signature, own)
        raw = naming.encoded(src)
        if not os.path.exists(raw):
            raise InputMissingError(os.fsdecode(src) or "''")
        source, target = usable(raw), None if dst is None else usable(dst)
        payload = tasks.encode_payload(tasks.FilePayload(source, target, tasks.pack_parameters(name, own) or None))
        future = TaskFuture(next(self._task_ids), self._pump, self._board)
        task = self._pool.task(function.id, values.Encoded(Encoding.MSGPACK, payload))
        future.ticket = ticket = Ticket(task, future, src, dst, attempts_max=self._attempts_max)
        if function.has_policy:
            future.on_end = partial(self._task_ended, function)
        self._board.add(future)
        self._pump.queue(ticket)
        self._pump.wake()
        return future

    def run_file_tasks(
        self,
        fn: tasks.TaskFunction | str,
        inputs: Iterable[Path | FileTask],
        *,
        output: Callable[[Any], Path] | None = None,
        params: Mapping[str, Any] | None = None,
        window: int | None = None,
        retry: RetryPolicy | None = None,
        group_commit: bool = False,
    ) -> FileRun:
        """Run ``fn`` over ``inputs``; an iterator of ``FileResult``s, in the order in which they end.

        ``inputs`` are paths, or ``FileTask``s with their outputs; relative ones begin in the directory in which the
        program is when the first result is asked for. They are drawn as results are taken, at most ``window`` ahead
        (default: the slots of the ring, and while tasks are short 40 ms of work for each worker, at most 8,192). Short
        tasks without outputs are sent together; whatever one of them does is its own affair.
        ``output`` gives the output of an input that comes without. Each is put in its place as soon as its task has
        ended; with ``group_commit`` those of short tasks together, up to 64 of a worker's, which is up to four times as
        fast where syncs to disk take their time. Then a result comes only when its group is in place: where a task
        hangs, it keeps those waiting that were before it in its worker's group.
        An iterator that itself waits until results have been taken needs ``window=1``.
        A task that fails, after what ``retry`` allows, is a result with an ``error``; the run goes on. Function and
        parameters are checked here, at once; that two tasks under way have one output is an ``OutputCollisionError``
        when the second is drawn.
        """
        self._pool.check_open()
        tasks.require(*tasks.describe(fn), params or {})
        if isinstance(inputs, str | bytes | os.PathLike):
            raise TypeError(f"inputs must be an iterable of paths, not one path ({inputs!r}); put it into a list")
        if output is not None and not callable(output):
            raise TypeError(
                f"output must be a function that gives an input's output, not {output!r}; a Job takes patterns"
            )
        if window is not None:
            window = layout.check_number("window", window, sys.maxsize)
        function = self._function(fn, params or {}, retry, group_commit=group_commit)
        inbox = FileInbox(self._pump, lambda: self._release(function), self._attempts_max - 1)

        def ticket_of(path: bytes, src: Any, dst: Any = None, target: bytes | None = None) -> Ticket:
            return self._ticket(function, inbox, path, src, dst, target)

        try:
            drawing = Drawing(inputs, output, function.name, function.signature, inbox, ticket_of)
        except BaseException:  # of the inputs, which cannot be iterated over
            self._release(function)
            raise
        return FileRun(
            self._pool,
            inbox,
            drawing,
            ticket_of,
            function.id,
            window=window,
            together=self._claims_max > 1,
        )

    def wait_for_task_result(self, task_id: int, timeout: float | None = None) -> Any:
        """The result of the task that ``submit_file_task`` gave that id; raises what the task raised.

        Waits up to ``timeout`` seconds (None: for ever), then raises ``TimeoutError``. A result can be read once; of
        those that nobody read, the newest 65,536 are kept, however large they are. Raises ``KeyError`` for an id that
        is unknown, read, or pushed out.
        """
        future = self._board.find(task_id)
        if future is None:
            raise KeyError(
                f"task {task_id}: unknown, or its result was read already, or is older than the newest unread ones"
            )
        try:
            return future.result(timeout)
        finally:
            del future  # see ``PoolFuture.result``

    # ---- looking in

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """The pids of the living workers."""
        return self._pool.supervisor.pids

    def stats(self) -> CoordinatorStats:
        """Counts, as they are now."""
        queued, in_ring = self._pump.items_in_flight
        pump = self._pump
        return CoordinatorStats(
            len(self._pool.supervisor.pids),
            queued,
            in_ring,
            pump.n_completed,
            pump.n_failed,
            pump.staff.n_deaths,
            pump.staff.n_retried,
            pump.balance.n_taken_back,
        )

    # ---- the end

    def close(self, *, cancel: bool = False) -> None:
        """Stop: run what is queued to its end (``cancel``: drop what has not begun), end the workers, leave nothing.

        Ctrl-C while it waits kills the workers. Safe to call twice, and from any thread; in a
        future's callback, which it would have to wait for, it raises ``WrongThreadError``.
        """
        self._pool.close(cancel=cancel)

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._pool.close()
        elif issubclass(kind, Exception):
            self._pool.close(cancel=True)
        else:
            self._pool.abort()

    # ---- details

    def _function(
        self,
        fn: tasks.TaskFunction | str,
        shared: Mapping[str, Any],
        retry: RetryPolicy | None,
        *,
        group_commit: bool = False,
    ) -> _Function:
        """Register a function with what all its tasks share; ``_release`` it after the last of them."""
        name, signature = tasks.describe(fn)
        require_importable(name, self._pool.context)
        packed = tasks.pack_parameters(name, tasks.validate(name, signature, shared))
        policy = tasks.pack_policy(name, retry)
        spec = tasks.encode_spec(tasks.FunctionSpec(name, packed, self._durability, policy, group_commit))
        with self._pool.lock:
            self._let_go_of_ended()
            found = self._functions.get(spec)
            if found is None:
                found = _Function(next(self._pool.function_ids), name, signature, spec, bool(packed), bool(policy))
                blob = blobs.function_name(self._pool.name, found.id)
                blobs.write(blob, Encoding.MSGPACK, spec)
                self._pool.keep(blob)
                self._functions[spec] = found
            found.users += 1
            self._idle.pop(spec, None)
        return found

    def _plain_function(self, fn: tasks.TaskFunction | str) -> _Function:
        """Register a function that has neither shared parameters nor a policy: who uses it is not counted."""
        try:
            found = self._plain.get(fn)
        except TypeError:  # it has no hash to be remembered by
            return self._function(fn, {}, None)
        if found is None:
            found = self._function(fn, {}, None)
            if len(self._plain) >= PLAIN_MAX:
                self._plain.clear()
            self._plain[fn] = found
        return found

    def _release(self, function: _Function) -> None:
        """A run has ended, or a task with a policy. One with parameters takes its function's blob along; plain
        functions stay registered, and so do the last ones with a policy.
        """
        with self._pool.lock:
            self._let_go(function)

    def _task_ended(self, function: _Function) -> None:
        """In whatever thread, amid anything: waits for nobody."""
        self._ended.append(function)
        lock = self._pool.lock
        if lock.acquire(blocking=False):  # or who has it will do so
            try:
                self._let_go_of_ended()
            finally:
                lock.release()

    def _let_go_of_ended(self) -> None:
        while self._ended:
            self._let_go(self._ended.popleft())

    def _let_go(self, function: _Function) -> None:
        function.users -= 1
        if function.users or self._pool.closed:
            return
        if function.shared:
            self._forget(function)
        elif function.has_policy:
            self._idle[function.spec] = function
            if len(self._idle) > IDLE_MAX:
                self._forget(self._idle.popitem(last=False)[1])

    def _forget(self, function: _Function) -> None:
        del self._functions[function.spec]
        blobs.unlink(blobs.function_name(self._pool.name, function.id))

    def _ticket(
        self, function: _Function, inbox: FileInbox, path: bytes, src: Any, dst: Any, target: bytes | None
    ) -> Ticket:
        """The ticket of a run's task that goes by itself."""
        encoded = tasks.encode_payload(tasks.FilePayload(path, target))
        if len(encoded) <= INLINE_BYTES:
            task = Task(function.id, encoded)
        else:
            task = self._pool.task(function.id, values.Encoded(Encoding.MSGPACK, encoded))
        return Ticket(task, inbox, src, dst, target, attempts_max=self._attempts_max)

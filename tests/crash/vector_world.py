"""A ring with vectors on it, run by real workers that may be killed anywhere, and every item is accounted for.

    with VectorWorld((13, 4, 3)) as world:        three vectors, of so many items
        world.serve(world.start_worker(0))        the pump's steps, until all has arrived, or the worker has died
        world.bury(0, worker)                     what the coordinator does for a dead worker
        world.check()                             all that follows

    nothing lost          every item has one outcome, and the right one; or it is the one that was blamed for a death
    nothing done twice    an item ran once, and once more at most where its worker died in it, and it may be tried again
    order of a death      before the blamed item all were run, behind it none
    nothing left held     chunks, slots and blobs are free

The coordinator's side is the product's ``Pump``, whose thread is not started: the test takes its steps. The worker's is
``Worker``, in a fork of the test.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any
from unittest.mock import patch

from tests.crash import opcodes
from tests.crash.harness import PATIENCE_S, Child, World
from tests.crash.opcodes import Bytecodes, kill_before

from ringpool.coordinator.balance import Balance
from ringpool.coordinator.pieces import Failure, MapInbox
from ringpool.coordinator.pump import Pump
from ringpool.coordinator.supervisor import Death
from ringpool.coordinator.tickets import Part, Ticket
from ringpool.errors import RemoteError, WorkerDiedError
from ringpool.shm import blobs, layout, results, segment, vectors
from ringpool.shm.dispatch import Task
from ringpool.shm.layout import Encoding, Form, ItemsEncoding, RunState
from ringpool.shm.ring import RUN_STATE
from ringpool.shm.vectors import Arena
from ringpool.workers import callrunner, calls, filetasks, posting, tasks
from ringpool.workers.confinement import Confinement
from ringpool.workers.process import Worker, WorkerArguments

LARGE = 300_000  # bytes: more than a chunk
TRACED = {each.__file__ for each in (vectors, callrunner, calls, posting, results, filetasks)}
FUNCTION = 1
N_CHUNKS = 5
_world: VectorWorld | None = None


class StubbornError(Exception):
    """It cannot be pickled."""

    def __reduce__(self) -> Any:
        raise LookupError


def _raise(error: BaseException) -> Any:
    raise error


# What an item returns or raises, by its index; a vector of the first fifteen meets all that an outcome can be.
OUTCOMES: list[Callable[[int], Any]] = [
    lambda i: 3 * i + 1,
    lambda i: -i,
    lambda i: 2**63 + i,
    lambda i: f"text {i}",
    lambda i: None,
    lambda i: _raise(ValueError(i)),
    lambda i: (i, [i]),
    lambda i: _raise(StubbornError(f"stubborn {i}")),
    lambda i: f"packed {i}" * 3,
    lambda i: i % 2 == 0,
    lambda i: bytes([i]) * LARGE,
    lambda i: _raise(RuntimeError(i, bytes(LARGE))),
    lambda i: lambda: i,
    lambda i: _raise(SystemExit(i)),
    lambda i: i * 0.5,
    *[lambda i: None] * 4,
    *[lambda i: i * 0.25] * 3,
    lambda i: "\xe4" * i,
    lambda i: b"",
    lambda i: -(2**40) * i,
    lambda i: None,
    lambda i: _raise(ValueError(i)),
    lambda i: f"behind {i}",
]


def run_item(i: int) -> Any:
    """An item of a vector."""
    world = _world
    assert world is not None
    world.runs[i] += 1
    if world.stop_at == i:
        os.write(world.said[1], b"!")
        os.read(world.go[0], 1)
    if world.deadly == i:
        os.kill(os.getpid(), signal.SIGKILL)
    return OUTCOMES[i](i) if i < len(OUTCOMES) else i


def run_file(src: bytes) -> Any:
    """The same, as a file task's function."""
    return run_item(int(src))


def is_right(i: int, got: Any) -> bool:
    """Whether that is what a caller is to be given for item ``i``."""
    try:
        expected = OUTCOMES[i](i) if i < len(OUTCOMES) else i
    except StubbornError as error:
        return type(got) is Failure and type(got.error) is RemoteError and str(error) in str(got.error)
    except BaseException as error:
        return type(got) is Failure and type(got.error) is type(error) and got.error.args == error.args
    if callable(expected):  # it cannot be sent back
        return type(got) is Failure and not isinstance(got.error, WorkerDiedError)
    return type(got) is type(expected) and got == expected


def _is_death(error: BaseException) -> bool:
    return isinstance(error, WorkerDiedError)


class VectorWorld(World):
    """See the module. ``lengths``: of the vectors. ``stop_at``: the item in which a worker waits for a ``split``.
    ``deadly``: the item that kills its worker. ``files``: the items are paths, for a file task's function.
    """

    def __init__(
        self, lengths: Sequence[int], *, retries: int = 0, stop_at: int = -1, deadly: int = -1, files: bool = False
    ) -> None:
        global _world
        super().__init__(slots=8, workers=2, claims_max=2)
        _world = self
        self.n_items = sum(lengths)
        self.retries = retries
        self.stop_at = stop_at
        self.deadly = deadly
        self.go, self.said = os.pipe(), os.pipe()
        self.runs = memoryview(mmap.mmap(-1, self.n_items))
        self.end = self.coordinator()
        self.pump = Pump(self.end, self.end.ring.workers)
        self.pump.publisher.arena = self.arena = Arena(self.segment.name, N_CHUNKS)
        self.files = files
        if files:
            spec = tasks.FunctionSpec(f"{__name__}:run_file", tasks.pack_parameters("run_file", {}), "full")
            blobs.write(blobs.function_name(self.segment.name, FUNCTION), Encoding.MSGPACK, tasks.encode_spec(spec))
        else:
            function = calls.pickle_callable(run_item)
            blobs.write(blobs.function_name(self.segment.name, FUNCTION), Encoding.PICKLE, function)
        self.inbox = MapInbox(lambda: None, retries)
        at = 0
        for n in lengths:
            items = [b"%d" % i if files else i for i in range(at, at + n)]
            encoding, body, _ = calls.encode_items(items, starred=False)
            self.queue(Part(body, ItemsEncoding.FILES if files else encoding, at, 0, n))
            at += n

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.arena.close()
        for fd in (*self.go, *self.said):
            os.close(fd)

    def queue(self, part: Part) -> None:
        """A vector, or a part of one that was taken back."""
        task = Task(FUNCTION, b"", 0, Form.VECTOR)
        self.pump.publisher.backlog.append(
            Ticket(task, self.inbox, run_item, None, attempts_max=self.retries + 1, part=part)
        )

    # ---- workers

    def start_worker(self, index: int, at: int = 0, life_s: int = PATIENCE_S) -> Child:
        """A worker; ``at``: the bytecode before which it is killed, of those that make a vector what it is."""

        def body() -> None:
            guard, _ = os.pipe()
            worker = Worker(WorkerArguments(self.segment.name, index, 2, 0), Confinement(guard))
            if not at:
                assert worker.run() == 0
                return
            with (
                patch.object(opcodes, "is_ours", lambda code: code.co_filename in TRACED),
                Bytecodes(kill_before(at)),
            ):
                assert worker.run() == 0

        return self.start(body, life_s)

    def is_there(self, index: int, worker: Child) -> bool:
        """Whether the worker has entered itself into the ring, and is about to claim."""
        ring = self.end.ring
        return ring.words[ring.worker_word(index, layout.W_PID)] == worker.pid

    def bury(self, index: int, worker: Child) -> None:
        """Settle what a dead worker held; the pump's own way."""
        self.n_worker_deaths += 1
        self.check_death(index)
        self.pump._recover(Death(index, worker.pid, signal.SIGKILL, None))

    # ---- the pump

    def turn(self) -> None:
        """A turn of the pump."""
        self.pump._publish()
        for worker, ticket, began_ns in self.pump.balance._running_vectors():
            ticket.sink.deliver_early(ticket, self.arena, time.monotonic_ns() - began_ns, worker)
        if self.end.has_results:
            self.end.collect(self.pump._deliver)

    @property
    def is_done(self) -> bool:
        """Whether all items have arrived, and the vectors that brought them."""
        return self.inbox.n_arrived >= self.n_items and self.pump._is_idle()

    def serve(self, worker: Child) -> bool:
        """Take turns until all has arrived, and the worker has ended; or until it has died: whether it has."""
        self.turn()
        while not self.is_done:
            ready, _, _ = select.select([worker.pidfd, self.said[0]], [], [], 0.0003)
            if self.said[0] in ready:
                os.read(self.said[0], 1)
                assert self.split(1) == 1, "it is at an item, and more follow"
                os.write(self.go[1], b"!")
            if worker.pidfd in ready:
                break
            self.turn()
            assert self.is_done or not self.pump._is_idle(), f"{self.inbox.n_arrived} of {self.n_items} items arrived"
            assert max(self.runs) <= self.retries + 2, f"items are run without end: {list(self.runs)}"
        if self.is_done:
            self.end.stop_workers()
        return worker.was_killed()

    def split(self, n_idle: int) -> int:
        """Take from each worker what it has not come to, for so many idle ones; from how many there was something."""
        ring, n = self.end.ring, 0
        for index in range(ring.workers):
            ticket = self.pump.publisher.ticket_of(ring.words[ring.worker_word(index, layout.W_RUNNING)] - 1)
            if ticket is None or ticket.part is None or ticket.part.chunk is None:
                continue
            taken = Balance._split(self.arena, ticket.part, 1 << 60, n_idle)
            if taken is not None:
                self.queue(taken)
                n += 1
        return n

    def finish(self) -> None:  # type: ignore[override]
        """Another worker runs what is left; then all is checked."""
        self.stop_at = -1
        self.end.ring.words[RUN_STATE] = RunState.RUN
        if not self.is_done:
            assert not self.serve(self.start_worker(1))
        self.check()

    # ---- checks

    def check_death(self, index: int) -> None:
        """What was run of the vector that a dead worker was at: all before one item, and none behind it."""
        ring = self.end.ring
        running = ring.words[ring.worker_word(index, layout.W_RUNNING)] - 1
        ticket = self.pump.publisher.ticket_of(running)
        if ticket is None or ticket.part is None or ticket.part.chunk is None:
            return
        part = ticket.part
        at = part.index + self.arena.progress(part.span(ticket.part.chunk))
        first, end = part.index + part.first, part.index + part.end
        assert first <= at <= end
        n_before = 1 + self.n_worker_deaths if self.retries else 1
        assert all(1 <= n <= n_before for n in self.runs[first:at]), f"{at} is being run, {list(self.runs[first:at])}"
        assert not any(self.runs[at + 1 : end]), f"{at} is being run, behind it {list(self.runs[at + 1 : end])}"

    def outcomes(self) -> list[Any]:
        """Of each item, in order."""
        found: dict[int, Any] = {}
        for piece in self.inbox.arrived:
            piece.decode()
            assert len(piece.values) == piece.n
            if self.files and not any(type(value) is Failure and _is_death(value.error) for value in piece.values):
                assert len(piece.times) == piece.n, "each file is timed"
                assert all(0 <= spent_ns < PATIENCE_S * 1e9 for spent_ns in piece.times)
            for i, value in enumerate(piece.values, piece.index):
                assert i not in found, f"item {i} has two outcomes"
                found[i] = value
        assert sorted(found) == list(range(self.n_items))
        return [found[i] for i in range(self.n_items)]

    def check(self) -> None:  # type: ignore[override]
        """The invariants of the module, once all has arrived."""
        n_blamed = n_again = 0
        for i, value in enumerate(self.outcomes()):
            n = self.runs[i]
            if type(value) is Failure and isinstance(value.error, WorkerDiedError):
                assert n <= self.retries + 1, f"item {i} was blamed, and has run {n} times"
                n_blamed += self.retries + 1
            else:
                assert is_right(i, value), f"item {i} has the outcome {value!r:.100}"
                assert 1 <= n <= self.retries + 1, f"item {i} has run {n} times"
                n_again += n - 1
        assert n_blamed + n_again <= self.n_worker_deaths, "an item is blamed for nothing, or was run again"
        assert self.pump._is_idle()
        assert self.pump.publisher.n_vectors == 0
        assert sorted(self.arena._free) == list(range(N_CHUNKS)), "a chunk is held, or free twice"
        assert self.end.n_free == self.end.ring.slots
        left = [name for name in os.listdir(segment.SHM_DIRECTORY) if name.startswith(f"{self.segment.name}.r")]
        assert not left, "a blob is left"

"""Time and memory limits: which worker must be killed, and the kill that hits the task that overran and no other.

    watch --a task is over--> SIGSTOP --its main thread stands--> still over? --yes--> SIGKILL --death--> why
                                 |                                    |
                                 +-- not within 100 ms                +-- no: another task, or a result
                                 |                                    |
                                 +----------> SIGCONT <---------------+

A worker may post its result, and begin its next task, while we make up our mind. So it is stopped first, and judged by
what its words say then: they are stored by its main thread, and that stands still.

1. *Stands*: ``/proc/PID/stat`` has it as stopped, or in a sleep that no signal but SIGKILL ends (D, such as a hung
   network file system). From D it goes, by way of its pending SIGSTOP, into the stop, with no instruction in between.
2. *Whose*: pid and start time come from the worker's words, and are compared again at each look at the process.
3. It may stand in the midst of a section, with the ring's mutex. So nothing here takes that; 100 ms bound the wait.
4. *Over*: the ``running`` word names the entry, the worker's claim holds it, and it has no result. STAGED is one:
   the work is done. A commit that hangs is waited for, without end.
5. A worker that somebody else has stopped is judged as it stands, and not continued. Its time runs on.

The time of a task is that between its start, as its worker tells it, and its result: the call, and handing over what it
returned. While a worker imports what it is to call, it tells a start that lies in the future.

The memory of a worker is what only its end would give back: its anonymous pages. Those of mapped files the kernel takes
back when it needs them; the ring, and arrays that lie in shared memory, are not the worker's own. A child process has
memory of its own, which is not counted. A fork shares its parent's pages, and is charged for all of them.

Used by the pump's thread alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Generator
from typing import Literal

import msgspec

from ringpool.errors import MemoryLimitError, RingpoolError, TaskTimeoutError
from ringpool.shm import layout
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.owner import Owner, state_of

STOP_TIMEOUT_S = 0.1  # how long the pump, and whoever wants the mutex, may have to wait for a worker to stand
STOP_LOOK_S = 0.0001
RETRY_NS = 1_000_000_000  # after which a worker that did not stand in time is tried again
WEIGH_EVERY_NS = 50_000_000
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STOPPED, _STANDS = (b"T", b"t"), (b"T", b"t", b"D")


class Condemned(msgspec.Struct, frozen=True):
    """The task for which a worker was killed: its entry, its limit (seconds, or bytes), and the worker's peak RSS."""

    entry: int
    reason: Literal["timeout", "memory"]
    limit: float
    peak_rss_bytes: int = 0

    def error(self, signal: int | None, exitcode: int | None, pid: int, task: str, deaths: int) -> RingpoolError:
        """What the task fails with; the arguments are those of ``WorkerDiedError``."""
        if self.reason == "timeout":
            return TaskTimeoutError(self.limit, task, pid, deaths)
        return MemoryLimitError(signal, exitcode, pid, task, deaths, int(self.limit), self.peak_rss_bytes)


class Limits:
    """Watches the workers of ``end``. ``memory_limit_bytes``: of each worker, None: none. ``timeout_of`` gives the
    seconds that the task of an entry may run; None: for ever, or it is known no more.
    """

    def __init__(
        self, end: CoordinatorEnd, memory_limit_bytes: int | None, timeout_of: Callable[[int], float | None]
    ) -> None:
        self.n_spared = 0  # workers that were stopped, and continued because their task had ended meanwhile
        self._ring = end.ring
        self._memory_limit_bytes = memory_limit_bytes
        self._timeout_of = timeout_of
        self._n_timed = 0
        self._shortest_ns = math.inf
        self._look_at_ns = self._weigh_at_ns = 0.0
        self._retry_at_ns = [0] * end.ring.workers
        self._condemned: dict[int, Condemned] = {}

    def expect(self, timeout_s: float) -> None:
        """A task with this timeout is about to be published: not before that long from now can it be over."""
        self._n_timed += 1
        self._shortest_ns = min(self._shortest_ns, timeout_s * 1e9)
        self._look_at_ns = min(self._look_at_ns, time.monotonic_ns() + timeout_s * 1e9)

    def release(self) -> None:
        """A task with a timeout has left the ring."""
        self._n_timed -= 1
        if not self._n_timed:
            self._shortest_ns = math.inf

    def watch(self, now_ns: int) -> float | None:
        """Look at the workers, where it is time, and kill those that are over. ``now_ns``: CLOCK_MONOTONIC.

        Seconds until it wants to be called again, at the latest; None: no limit is in force. It may be called sooner.
        """
        if not self._n_timed and self._memory_limit_bytes is None:
            return None
        if now_ns >= self._look_at_ns:
            self._look_at_ns = self._look(now_ns)
        return max(0.0, (self._look_at_ns - now_ns) / 1e9)

    def why(self, index: int) -> Condemned | None:
        """What worker ``index`` was killed for, if we killed it. To be asked once, after each death."""
        self._retry_at_ns[index] = 0
        return self._condemned.pop(index, None)

    # ---- looking

    def _look(self, now_ns: int) -> float:
        """Look at every worker; when to look again, ns.

        A task whose time begins right after this is over after the shortest timeout, at the earliest.
        """
        weigh = self._memory_limit_bytes is not None and now_ns >= self._weigh_at_ns
        if weigh:
            self._weigh_at_ns = now_ns + WEIGH_EVERY_NS
        n_seen, next_ns = 0, math.inf if self._memory_limit_bytes is None else self._weigh_at_ns
        for worker in range(self._ring.workers):
            entry = None if worker in self._condemned else self._running(worker)
            if entry is None:
                continue
            if now_ns >= self._retry_at_ns[worker] and self._over(worker, entry, now_ns, weigh) is not None:
                self._judge(worker, entry, now_ns)
            elif (ends_ns := self._ends_ns(worker, entry)) < math.inf and self._began_ns(worker) <= now_ns:
                n_seen += 1
                next_ns = min(next_ns, max(ends_ns, self._retry_at_ns[worker]))
        return min(next_ns, now_ns + self._shortest_ns) if n_seen < self._n_timed else next_ns

    def _running(self, worker: int) -> int | None:
        """The entry that ``worker`` is at, and has no result of. Of a worker that does not stand, a hint."""
        ring = self._ring
        entry = ring.words[ring.worker_word(worker, layout.W_RUNNING)] - 1
        if entry < 0 or layout.slot_of(entry) >= ring.slots or ring.result_word(entry):
            return None
        return entry if entry in ring.claimed(worker) else None

    def _ends_ns(self, worker: int, entry: int) -> float:
        """When the time of the task that ``worker`` is at will be over."""
        timeout_s = self._timeout_of(entry)
        if timeout_s is None:
            return math.inf
        return self._began_ns(worker) + timeout_s * 1e9

    def _began_ns(self, worker: int) -> int:
        return self._ring.words[self._ring.worker_word(worker, layout.W_TASK_START)]

    def _over(self, worker: int, entry: int, now_ns: int, weigh: bool) -> Condemned | None:
        """What ``entry``, which ``worker`` is at, has overrun."""
        if now_ns >= self._ends_ns(worker, entry):
            return Condemned(entry, "timeout", self._timeout_of(entry) or 0.0)
        limit_bytes = self._memory_limit_bytes
        if weigh and limit_bytes is not None:
            pid = self._who(worker).pid
            if own_bytes(pid) > limit_bytes:
                return Condemned(entry, "memory", limit_bytes, peak_rss_bytes(pid))
        return None

    def _who(self, worker: int) -> Owner:
        words, base = self._ring.words, self._ring.worker_word(worker, 0)
        return Owner(words[base + layout.W_PID], words[base + layout.W_START])

    # ---- acting

    def _judge(self, worker: int, entry: int, now_ns: int) -> None:
        """Stop the worker; kill it where ``entry`` is what it is at, and over, also then."""
        who = self._who(worker)
        self._retry_at_ns[worker] = now_ns + RETRY_NS
        try:
            pidfd = os.pidfd_open(who.pid)
        except OSError:  # it has died, or no descriptor is left
            return
        try:
            with _standing(who, pidfd) as stands:
                if not stands:
                    return
                over = self._over(worker, entry, now_ns, weigh=True) if self._running(worker) == entry else None
                if over is None:
                    self._retry_at_ns[worker] = 0
                    self.n_spared += 1
                    return
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                self._condemned[worker] = over
                os.killpg(who.pid, signal.SIGKILL)  # what it has started
        except (ProcessLookupError, PermissionError):  # it has died meanwhile; or it leads no group, or one of others'
            return
        finally:
            os.close(pidfd)


@contextlib.contextmanager
def _standing(who: Owner, pidfd: int) -> Generator[bool]:
    """Have the process stand; whether it does. Afterwards it goes on, unless somebody else had stopped it."""
    state = _state(who)
    if state == b"" or state in _STOPPED:
        yield state != b""
        return
    signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while (state := _state(who)) not in _STANDS and state and time.monotonic() < deadline:
            time.sleep(STOP_LOOK_S)
        yield state in _STANDS
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)


def _state(who: Owner) -> bytes:
    """The state of a process's main thread, a letter of proc(5); empty where it is gone, or another has its pid."""
    try:
        state, start = state_of(who.pid)
    except OSError:
        return b""
    return state if start == who.start else b""


def own_bytes(pid: int) -> int:
    """The resident anonymous pages of a process; 0 where that cannot be told. Source: proc(5), ``statm``."""
    try:
        with open(f"/proc/{pid}/statm", "rb", buffering=0) as statm:
            _, resident, shared, *_ = map(int, statm.read().split())
    except (OSError, ValueError):  # the latter: it is a zombie, whose numbers are missing in some kernels
        return 0
    return (resident - shared) * _PAGE_BYTES


def peak_rss_bytes(pid: int) -> int:
    """The largest resident size that a process has had; 0 where that cannot be told. Source: proc(5), ``status``."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith(b"VmHWM"))
    except (OSError, StopIteration):
        return 0

"""Limits on real rings: who is killed, when, for what; and that nobody else ever is.

rehearsed     the words of a worker are written by the test, step by step; the process that they name is a sleeper
acted         worker processes that do what a task may do
in numbers    many tasks that end at about their limit: each has one outcome, and each kill hit the task that overran
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import platform
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from tests.coordinator.program import is_alive, state_of, wait_until
from tests.crash.harness import Child, World
from tests.crash.opcodes import Bytecodes

from ringpool.coordinator import limits
from ringpool.coordinator.limits import Condemned, Limits, own_bytes, peak_rss_bytes
from ringpool.errors import MemoryLimitError, TaskTimeoutError, WorkerDiedError
from ringpool.shm import layout, owner
from ringpool.shm.claims import WorkerEnd
from ringpool.shm.layout import Encoding, RunState, Status
from ringpool.shm.results import Results
from ringpool.shm.ring import RUN_STATE

SECOND = 1_000_000_000
LIMIT_S = 5.0
MIB = 1 << 20
HOUR = 3600 * SECOND
EARLY = 1_000 * SECOND  # when the rehearsed tasks start; any time would do


def sleep_for_ever() -> None:
    while True:
        signal.pause()


# ---- rehearsed -------------------------------------------------------------------------------------------------------


class Stage:
    """A worker whose words the test writes, as process ``actor``, and the limits that watch it."""

    def __init__(self, world: World, memory_limit_bytes: int | None = None) -> None:
        self.world = world
        self.end = world.coordinator()
        self.worker = world.worker(0)
        self.results = Results(self.worker.ring, 0)
        self.actor = world.start(sleep_for_ever)
        self.name_process(self.actor.pid)
        self.timeout_s: float | None = LIMIT_S
        self.asked: Callable[[], object] = lambda: None  # done when the limits ask, so between their two looks
        self.limits = Limits(self.end, memory_limit_bytes, self._timeout_of)
        if memory_limit_bytes is None:
            self.limits.expect(LIMIT_S)

    def _timeout_of(self, _entry: int) -> float | None:
        asked, self.asked = self.asked, lambda: None
        asked()  # which may set it anew
        return self.timeout_s

    def name_process(self, pid: int, start: int | None = None) -> None:
        self.write(layout.W_START, owner.start_time(pid) if start is None else start)
        self.write(layout.W_PID, pid)

    def write(self, word: int, value: int) -> None:
        self.end.ring.words[self.end.ring.worker_word(0, word)] = value

    def claim(self, n: int = 1) -> list[int]:
        self.world.publish(self.end, 2 * n)  # a worker never takes more than its share of two
        entries = self.worker.exchange(n, False)
        assert entries
        return entries

    def begin(self, entry: int, at_ns: int = EARLY) -> int:
        assert self.worker.start(entry, at_ns)
        return entry

    def post(self, entry: int, status: Status = Status.OK) -> None:
        self.results.post(entry, status, Encoding.MSGPACK, b"", 0)

    def look(self, at_ns: int) -> None:
        """Let the limits look, whenever they wanted to."""
        self.limits._look_at_ns = self.limits._weigh_at_ns = 0
        self.limits.watch(at_ns)

    def watch(self, at_ns: int) -> Condemned | None:
        """Let the limits look; what they killed the actor for."""
        self.look(at_ns)
        return self.limits.why(0)

    def assert_goes_on(self) -> None:
        wait_until(lambda: state_of(self.actor.pid) == "S", "the actor, asleep again")
        assert not self.actor.ends_within(0)


@pytest.fixture
def stages() -> Iterator[Callable[..., Stage]]:
    with ExitStack() as worlds:
        yield lambda **more: Stage(worlds.enter_context(World()), **more)
    gc.collect()


@pytest.fixture
def stage(stages: Callable[..., Stage]) -> Stage:
    return stages()


def test_a_task_is_over_at_its_limit_and_not_before(stage: Stage) -> None:
    [entry] = stage.claim()
    stage.begin(entry)
    assert stage.watch(EARLY + 5 * SECOND - 1) is None
    stage.assert_goes_on()
    assert stage.watch(EARLY + 5 * SECOND) == Condemned(entry, "timeout", LIMIT_S, 0)
    assert stage.actor.wait() == -signal.SIGKILL


def test_what_a_worker_was_killed_for_is_told_once(stage: Stage) -> None:
    stage.begin(*stage.claim())
    assert stage.watch(HOUR) is not None
    assert stage.limits.why(0) is None
    assert stage.limits.why(1) is None


def test_a_worker_that_was_killed_is_not_looked_at_until_its_death_is_settled(stage: Stage) -> None:
    stage.begin(*stage.claim())
    stage.look(HOUR)
    bystander = stage.world.start(sleep_for_ever)
    stage.name_process(bystander.pid)
    stage.look(2 * HOUR)
    assert not bystander.ends_within(0)


def test_a_task_without_a_limit_runs_for_ever(stage: Stage) -> None:
    stage.timeout_s = None
    stage.begin(*stage.claim())
    assert stage.watch(1000 * HOUR) is None
    stage.assert_goes_on()


def test_a_worker_without_a_task_is_left_alone(stage: Stage) -> None:
    assert stage.watch(HOUR) is None
    [entry] = stage.claim()
    assert stage.watch(HOUR) is None, "claimed, not started"
    stage.begin(entry)
    stage.post(entry)
    assert stage.watch(HOUR) is None, "done"
    stage.worker.leave()
    assert stage.watch(HOUR) is None, "handed in"
    assert stage.limits.n_spared == 0
    stage.assert_goes_on()


def test_a_worker_stands_while_it_is_judged(stage: Stage) -> None:
    """Asked about its task, first in passing, then for good, it is found going, then stopped."""
    states: list[str] = []

    def ask() -> None:
        states.append(state_of(stage.actor.pid))
        stage.asked = ask

    stage.begin(*stage.claim())
    stage.asked = ask
    assert stage.watch(HOUR) is not None
    assert states[0] in ("S", "R")
    assert states[-1] == "T"


@pytest.mark.parametrize("status", [Status.STAGED, Status.OK, Status.ERROR, Status.CANCELLED])
def test_a_task_that_has_its_result_by_the_time_its_worker_stands_is_not_over(stage: Stage, status: Status) -> None:
    [entry] = stage.claim()
    stage.begin(entry)
    stage.asked = lambda: stage.post(entry, status)
    assert stage.watch(HOUR) is None
    assert stage.limits.n_spared == 1
    stage.assert_goes_on()


@pytest.mark.parametrize("same_claim", [True, False])
def test_a_worker_that_has_begun_another_task_by_the_time_it_stands_is_not_killed(
    stage: Stage, same_claim: bool
) -> None:
    """Even where that one is over too: it has not been asked about."""
    first, second = stage.claim(2)
    stage.begin(first)

    def go_on() -> None:
        stage.post(first)
        if same_claim:
            stage.begin(second)
        else:
            stage.begin(second)
            stage.post(second)
            stage.begin(*stage.claim())

    stage.asked = go_on
    assert stage.watch(HOUR) is None
    assert stage.limits.n_spared == 1
    stage.assert_goes_on()
    assert stage.watch(HOUR) is not None, "at the next look it is"


def test_the_next_attempt_of_a_task_is_not_the_one_that_overran(stage: Stage) -> None:
    [entry] = stage.claim()
    stage.begin(entry)

    def die_and_be_replaced() -> None:
        stage.end.settle(0, [], [], [entry])
        stage.name_process(stage.actor.pid)
        [again] = stage.worker.exchange(1, False) or []
        assert again == entry + layout.ATTEMPT_ONE
        stage.begin(again)

    stage.asked = die_and_be_replaced
    assert stage.watch(HOUR) is None
    stage.assert_goes_on()


def test_a_commit_is_waited_for_however_long_it_takes(stage: Stage) -> None:
    [entry] = stage.claim()
    stage.begin(entry)
    stage.post(entry, Status.STAGED)
    assert stage.watch(1000 * HOUR) is None
    assert stage.limits.n_spared == 0, "it is not even stopped"


def test_a_task_that_was_taken_back_is_not_the_workers(stage: Stage) -> None:
    """As its words say between its store of ``running`` and its look at the lists: see ``claims``."""
    first, second = stage.claim(2)
    stage.begin(first)
    stage.post(first)
    stage.end.settle(0, [first], [second], [])
    stage.name_process(stage.actor.pid)
    stage.write(layout.W_RUNNING, second + 1)
    assert stage.watch(HOUR) is None
    stage.assert_goes_on()


@pytest.mark.parametrize("reason", ["pid used again", "gone", "zombie", "nobody"])
def test_only_the_process_that_the_words_name_is_touched(stage: Stage, reason: str) -> None:
    stage.begin(*stage.claim())
    if reason == "pid used again":
        stage.name_process(stage.actor.pid, owner.start_time(stage.actor.pid) - 1)
    elif reason == "nobody":
        stage.name_process(0, 0)
    else:
        other = stage.world.start(sleep_for_ever)
        stage.name_process(other.pid)
        other.kill()
        wait_until(lambda: other.ends_within(0), "its end")
        if reason == "gone":
            other.wait()
    assert stage.watch(HOUR) is None
    stage.assert_goes_on()


def test_a_worker_that_dies_while_it_is_judged_was_not_killed_for_its_task(stage: Stage) -> None:
    stage.begin(*stage.claim())

    def die() -> None:
        stage.actor.kill()
        stage.actor.wait()

    stage.asked = die
    assert stage.watch(HOUR) is None


def test_words_that_make_no_sense_kill_nobody(stage: Stage) -> None:
    stage.begin(*stage.claim())
    for nonsense in ((1 << 64) - 1, layout.SLOT_MASK, 1 << 40):
        stage.write(layout.W_RUNNING, nonsense)
        assert stage.watch(HOUR) is None
    stage.assert_goes_on()


@pytest.mark.parametrize("over", [True, False])
def test_a_worker_that_somebody_else_has_stopped_is_judged_as_it_stands_and_not_continued(
    stage: Stage, over: bool
) -> None:
    [entry] = stage.claim()
    stage.begin(entry)
    os.kill(stage.actor.pid, signal.SIGSTOP)
    wait_until(lambda: state_of(stage.actor.pid) == "T", "the stop")
    if over:
        assert stage.watch(HOUR) is not None
        assert stage.actor.wait() == -signal.SIGKILL
    else:
        stage.asked = lambda: stage.post(entry)
        assert stage.watch(HOUR) is None
        assert state_of(stage.actor.pid) == "T"


def test_a_worker_that_does_not_stand_goes_on_and_is_tried_again_later(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes a kernel that is busy for 100 ms with something no signal ends: its answer is made up."""
    stage.begin(*stage.claim())
    with monkeypatch.context() as context:
        context.setattr(limits, "_state", lambda _who: b"R")
        stage.look(HOUR)
        stage.assert_goes_on()
        context.setattr(limits, "_state", lambda _who: pytest.fail("tried again at once"))
        stage.look(HOUR + SECOND // 2)
    assert stage.watch(HOUR + 2 * SECOND) is not None


def test_a_replacement_is_not_spared_for_what_its_predecessor_was(stage: Stage) -> None:
    """Its predecessor was gone when it was to be judged."""
    [entry] = stage.claim()
    stage.begin(entry)
    stage.name_process(stage.actor.pid, 1)
    stage.look(HOUR)
    assert stage.limits.why(0) is None
    stage.name_process(stage.actor.pid)
    stage.look(HOUR)
    assert stage.limits.why(0) is not None


# ---- at every bytecode


@pytest.mark.parametrize("contested", [False, True])
def test_wherever_a_worker_is_between_two_tasks_the_second_is_not_blamed_for_the_first(
    stage: Stage, contested: bool
) -> None:
    """The first took long, and the limits look before every bytecode of what follows."""
    first, second = stage.claim(2)
    stage.timeout_s = None
    stage.begin(first, EARLY)
    stage.post(first)
    stage.timeout_s = LIMIT_S
    now = EARLY + HOUR
    n_looks = 0

    def look(_n: int) -> None:
        nonlocal n_looks
        n_looks += 1
        bytecodes.paused = True
        assert stage.watch(now) is None
        bytecodes.paused = False

    with Bytecodes(look) as bytecodes:
        if contested:
            bytecodes.paused = True
            stage.write(layout.W_REVOKE, stage.worker.claim_sequence)
            bytecodes.paused = False
        stage.begin(second, now)
        stage.post(second)
        [third] = stage.worker.exchange(1, False) or []
        stage.begin(third, now)
    assert n_looks > 200
    assert stage.watch(now + 5 * SECOND - 1) is None
    assert stage.watch(now + 5 * SECOND) is not None


# ---- memory


def test_a_worker_is_over_when_it_holds_more_than_its_limit(stages: Callable[..., Stage]) -> None:
    stage = stages(memory_limit_bytes=1)
    [entry] = stage.claim()
    assert stage.watch(EARLY) is None, "it runs nothing"
    stage.begin(entry)
    stage.timeout_s = None
    peak = peak_rss_bytes(stage.actor.pid)
    condemned = stage.watch(EARLY)
    assert condemned is not None
    assert (condemned.entry, condemned.reason, condemned.limit) == (entry, "memory", 1)
    assert condemned.peak_rss_bytes >= peak > MIB


def test_a_worker_is_not_over_at_its_limit(stages: Callable[..., Stage]) -> None:
    stage = stages(memory_limit_bytes=1 << 40)
    stage.timeout_s = None
    stage.begin(*stage.claim())
    assert stage.watch(EARLY) is None
    stage.limits._memory_limit_bytes = own_bytes(stage.actor.pid)
    assert stage.watch(EARLY) is None
    stage.assert_goes_on()
    stage.limits._memory_limit_bytes -= 1
    assert stage.watch(EARLY) is not None


def test_a_task_that_ends_while_its_worker_is_judged_is_not_blamed_for_its_memory(stages: Callable[..., Stage]) -> None:
    stage = stages(memory_limit_bytes=1)
    stage.timeout_s = None
    first, second = stage.claim(2)
    stage.begin(first)

    def go_on() -> None:
        stage.post(first)
        stage.begin(second)

    stage.asked = go_on
    assert stage.watch(EARLY) is None
    stage.assert_goes_on()


def test_workers_are_weighed_every_50_ms(stages: Callable[..., Stage]) -> None:
    stage = stages(memory_limit_bytes=1 << 40)
    stage.timeout_s = None
    stage.begin(*stage.claim())
    assert stage.limits.watch(EARLY) == 0.05
    stage.limits._memory_limit_bytes = 1
    assert stage.limits.watch(EARLY + SECOND // 20 - 1) == pytest.approx(1e-9)
    stage.assert_goes_on()
    stage.limits.watch(EARLY + SECOND // 20)
    assert stage.limits.why(0) is not None


# ---- when to look again


def test_without_a_limit_nobody_is_looked_at(stages: Callable[..., Stage]) -> None:
    stage = stages()
    stage.begin(*stage.claim())
    stage.limits.release()
    stage.asked = lambda: pytest.fail("it looked")
    assert stage.limits.watch(HOUR) is None


def test_a_task_that_has_not_begun_is_looked_for_in_time(stage: Stage) -> None:
    """It may begin right after the look: so the next one is due when the shortest limit would end."""
    now = time.monotonic_ns()
    assert stage.limits.watch(now) == pytest.approx(LIMIT_S, abs=0.5)
    stage.limits.expect(0.25)
    assert stage.limits.watch(now) == pytest.approx(0.25, abs=0.2)
    stage.limits._look_at_ns = 0
    assert stage.limits.watch(EARLY) == 0.25


def test_a_task_that_has_begun_is_looked_at_when_its_time_ends(stage: Stage) -> None:
    stage.limits._look_at_ns = 0
    stage.begin(*stage.claim(), at_ns=EARLY - 4 * SECOND)
    assert stage.limits.watch(EARLY) == 1
    assert stage.limits.watch(EARLY + SECOND // 2) == 0.5
    stage.limits.expect(LIMIT_S)  # a second one, which has not begun
    assert stage.limits.watch(EARLY + SECOND // 2) == 0.5


def test_a_task_whose_start_lies_in_the_future_is_looked_for_as_one_that_has_not_begun(stage: Stage) -> None:
    """Its worker imports what it is to call, and will then say that it begins."""
    [entry] = stage.claim()
    stage.begin(entry, EARLY + HOUR)
    stage.look(EARLY)
    assert stage.limits.watch(EARLY) == LIMIT_S
    stage.begin(entry, EARLY + SECOND)
    assert stage.limits.watch(EARLY + 5 * SECOND) == 1
    assert stage.watch(EARLY + 6 * SECOND) is not None


def test_the_shortest_limit_is_forgotten_with_the_last_task_that_has_one(stage: Stage) -> None:
    stage.limits.expect(0.001)
    stage.limits.release()
    stage.limits.release()
    stage.limits._look_at_ns = 0
    assert stage.limits.watch(EARLY) is None
    stage.limits.expect(3.0)
    stage.limits._look_at_ns = 0
    assert stage.limits.watch(EARLY) == 3


def test_a_task_with_an_endless_limit_is_no_error(stage: Stage) -> None:
    stage.timeout_s = float("inf")
    stage.begin(*stage.claim())
    assert stage.watch(1000 * HOUR) is None


# ---- errors


def test_the_error_is_that_of_the_limit() -> None:
    late = Condemned(7, "timeout", 2.5).error(9, None, 123, "f", 2)
    assert isinstance(late, TaskTimeoutError)
    assert isinstance(late, TimeoutError)
    assert not isinstance(late, WorkerDiedError)
    assert (late.timeout_s, late.task, late.pid, late.deaths) == (2.5, "f", 123, 2)
    heavy = Condemned(7, "memory", 5000, 6000).error(9, None, 123, "f", 2)
    assert isinstance(heavy, MemoryLimitError)
    assert isinstance(heavy, WorkerDiedError)
    assert (heavy.limit_bytes, heavy.peak_rss_bytes, heavy.signal, heavy.exitcode) == (5000, 6000, 9, None)
    assert (heavy.task, heavy.pid, heavy.deaths) == ("f", 123, 2)
    assert "5,000" in str(heavy)
    assert "6,000" in str(heavy)


# ---- acted -----------------------------------------------------------------------------------------------------------


def act(world: World, task: Callable[[WorkerEnd], object]) -> Child:
    """Worker 0, a process, whose every task is ``task``; it leads a group of its own, as all workers do."""

    def body() -> None:
        os.setsid()
        worker = WorkerEnd(world.segment, 0)
        results = Results(worker.ring, 0)
        while (entries := worker.claim(1)) is not None:
            for entry in entries:
                assert worker.start(entry, time.monotonic_ns())
                task(worker)
                results.post(entry, Status.OK, Encoding.MSGPACK, b"", 0)

    return world.start(body)


def spin(_worker: WorkerEnd) -> None:
    while True:
        pass


def hold_the_gil(_worker: WorkerEnd) -> None:
    ctypes.PyDLL(None).sleep(60)


def stop_itself(_worker: WorkerEnd) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_mutex(worker: WorkerEnd) -> None:
    worker.ring.lock.acquire()
    sleep_for_ever()


def spin_in_threads(_worker: WorkerEnd) -> None:
    threads = [threading.Thread(target=spin, args=(None,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    threads[0].join()


def be_deaf(_worker: WorkerEnd) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    sleep_for_ever()


CLONE_NUMBERS = {"x86_64": 56, "aarch64": 220}
CLONE_VFORK = 0x4000


def sleep_in_the_kernel(_worker: WorkerEnd) -> None:
    """State D, as of one whose file system hangs: until its child has ended, the caller of vfork executes nothing."""
    libc = ctypes.PyDLL(None)
    if libc.syscall(CLONE_NUMBERS[platform.machine()], CLONE_VFORK | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        libc.sleep(60)
        libc._exit(0)


def watch_until_dead(watched: Limits, child: Child) -> Condemned | None:
    """As the pump does, until the limits have killed it."""
    while not child.ends_within(watched.watch(time.monotonic_ns()) or 0.001):
        pass
    assert child.wait() == -signal.SIGKILL
    return watched.why(0)


@pytest.mark.parametrize(
    "task",
    [
        spin,
        hold_the_gil,
        stop_itself,
        hold_the_mutex,
        spin_in_threads,
        be_deaf,
        pytest.param(
            sleep_in_the_kernel, marks=pytest.mark.skipif(platform.machine() not in CLONE_NUMBERS, reason="its number")
        ),
    ],
)
def test_a_task_that_overruns_is_killed_whatever_it_is_at(task: Callable[[WorkerEnd], object]) -> None:
    with World() as world:
        end = world.coordinator()
        watched = Limits(end, None, lambda _entry: 0.05)
        child = act(world, task)
        watched.expect(0.05)
        world.publish(end, 1)
        condemned = watch_until_dead(watched, child)
        assert condemned is not None
        assert (layout.sequence_of(condemned.entry), condemned.reason) == (0, "timeout")
        [claim] = end.claims_of_dead(0)
        assert (claim.entry, claim.started, claim.status) == (condemned.entry, True, Status.EMPTY)


def test_what_a_task_has_started_goes_with_its_worker() -> None:
    read_end, write_end = os.pipe()

    def with_a_child(_worker: WorkerEnd) -> None:
        if os.fork() == 0:
            sleep_for_ever()
        os.write(write_end, b"begun")
        sleep_for_ever()

    with World() as world:
        end = world.coordinator()
        watched = Limits(end, None, lambda _entry: 0.05)
        watched.expect(0.05)
        child = act(world, with_a_child)
        os.close(write_end)
        world.publish(end, 1)
        assert os.read(read_end, 5) == b"begun"
        assert watch_until_dead(watched, child) is not None
        assert os.read(read_end, 1) == b"", "the last process that holds the other end is gone"
    os.close(read_end)


def test_a_worker_that_was_spared_goes_on_with_its_tasks() -> None:
    """Again and again it is stopped in its first task, which has ended by then."""
    with World() as world:
        end = world.coordinator()
        gate_read, gate_write = os.pipe()
        child = act(world, lambda _worker: os.read(gate_read, 1))
        base = end.ring.worker_word(0, 0)

        def let_it_end(entry: int) -> float:
            if not gate:
                os.write(gate_write, b"x")
                gate.append(entry)
                wait_until(lambda: end.ring.result_word(entry), "its result")
            return 0.0

        watched = Limits(end, None, let_it_end)
        for n in range(1, 21):
            gate: list[int] = []
            watched.expect(LIMIT_S)
            world.publish(end, 1)
            wait_until(lambda: watched._running(0) is not None, "the task's begin")
            watched._look_at_ns = 0
            watched.watch(time.monotonic_ns())
            watched.release()
            assert watched.n_spared == n
            assert watched.why(0) is None
            wait_until(lambda: end.has_results, "its handing in")
            end.collect(lambda _slot, _entry: None)
        end.ring.words[RUN_STATE] = RunState.STOP
        end.wake_all()
        assert child.wait() == 0
        assert end.ring.words[base + layout.W_PID] == child.pid
        os.close(gate_read)
        os.close(gate_write)


class Ballast:
    """A worker's task, told by a pipe what memory to take next; it says when it has it."""

    def __init__(self, world: World) -> None:
        self._orders, self._give = os.pipe()
        self._taken, self._tell = os.pipe()
        self.child = act(world, self._task)

    def _task(self, _worker: WorkerEnd) -> None:
        kept: list[mmap.mmap] = []
        while order := os.read(self._orders, 1):
            if order == b"a":
                kept.append(mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            elif order == b"s":
                kept.append(mmap.mmap(-1, 64 * MIB))
            elif order == b"f":
                file = os.memfd_create("mapped")
                os.posix_fallocate(file, 0, 64 * MIB)
                kept.append(mmap.mmap(file, 64 * MIB, mmap.MAP_PRIVATE, mmap.PROT_READ))
            elif order == b"x":
                kept.pop().close()
            for page in range(0, 64 * MIB, mmap.PAGESIZE) if order != b"x" and kept else ():
                if order == b"f":
                    _ = kept[-1][page]
                else:
                    kept[-1][page] = 1
            os.write(self._tell, order)

    def take(self, kind: str) -> None:
        os.write(self._give, kind.encode())
        assert select.select([self._taken], [], [], 30)[0], "the worker does not answer"
        assert os.read(self._taken, 1).decode() == kind

    def close(self) -> None:
        for fd in (self._orders, self._give, self._taken, self._tell):
            os.close(fd)


def test_memory_is_what_only_the_workers_end_would_give_back() -> None:
    with World() as world:
        end = world.coordinator()
        ballast = Ballast(world)
        world.publish(end, 1)
        ballast.take("-")
        limit = own_bytes(ballast.child.pid) + 32 * MIB
        watched = Limits(end, limit, lambda _entry: None)

        def is_left_alone() -> bool:
            watched._look_at_ns = 0
            watched.watch(time.monotonic_ns())
            return not ballast.child.ends_within(0.05)

        assert is_left_alone()
        for shared in "sf":  # shared memory, as arguments that are arrays; a mapped file
            ballast.take(shared)
            assert is_left_alone()
        peak = peak_rss_bytes(ballast.child.pid)
        assert peak > 128 * MIB
        ballast.take("a")
        ballast.take("x")  # given back in time
        assert is_left_alone()
        ballast.take("a")
        condemned = watch_until_dead(watched, ballast.child)
        assert condemned is not None
        assert (condemned.reason, condemned.limit) == ("memory", limit)
        assert condemned.peak_rss_bytes >= peak + 64 * MIB
        ballast.close()


# ---- in numbers ------------------------------------------------------------------------------------------------------


class Numbers:
    """Two workers, ``n`` tasks of about the length of their limit, and a pump that does no more than it must."""

    LIMIT_S = 0.002

    def __init__(self, world: World, n: int, claims: int) -> None:
        self.world = world
        self.n = n
        self.claims = claims
        self.end = world.coordinator()
        self.limits = Limits(self.end, None, lambda _entry: self.LIMIT_S)
        self.outcomes: dict[int, str] = {}
        self.children = [self.start(0), self.start(1)]

    def start(self, index: int) -> Child:
        def body() -> None:
            os.setsid()
            lot = random.Random(os.getpid())
            worker = WorkerEnd(self.world.segment, index)
            results = Results(worker.ring, index)
            while (entries := worker.claim(self.claims)) is not None:
                for entry in entries:
                    began = time.monotonic_ns()
                    if not worker.start(entry, began):
                        break
                    self.world.runs[layout.sequence_of(entry)] += 1
                    share = lot.uniform(0.9, 1.2) if lot.random() < 0.2 else lot.uniform(0, 0.2)
                    while time.monotonic_ns() - began < share * self.LIMIT_S * 1e9:
                        pass
                    results.post(entry, Status.OK, Encoding.MSGPACK, b"", 0)

        return self.world.start(body, life_s=100)

    def run(self) -> None:
        end, deadline = self.end, time.monotonic() + 100
        while len(self.outcomes) < self.n:
            assert time.monotonic() < deadline, f"lost: {self.n - len(self.outcomes)} tasks"
            for _ in range(n_new := min(end.n_free, self.n - end.published)):
                self.limits.expect(self.LIMIT_S)
            self.world.publish(end, n_new)
            end.collect(self.deliver)
            wait_s = self.limits.watch(time.monotonic_ns())
            for index, child in enumerate(self.children):
                if child.ends_within(0):
                    self.settle(index, child)
            end.sleep(min(wait_s or 0.001, 0.001))
        end.stop_workers()
        assert [child.wait() for child in self.children] == [0, 0]

    def deliver(self, _slot: int, entry: int) -> None:
        status = Status(self.end.results.read(entry).status)
        assert status in (Status.OK, Status.DIED)
        sequence = layout.sequence_of(entry)
        assert (sequence in self.outcomes) == (status is Status.DIED), "a task has two outcomes"
        self.outcomes.setdefault(sequence, "ok")
        self.limits.release()

    def settle(self, index: int, child: Child) -> None:
        """The death is ours, and the task that was running is the one for which it was killed: no innocent died."""
        assert child.wait() == -signal.SIGKILL
        condemned = self.limits.why(index)
        assert condemned is not None, "a worker died that nobody had condemned"
        done: list[int] = []
        again: list[int] = []
        for claim in self.end.claims_of_dead(index):
            if claim.status is not Status.EMPTY:
                done.append(claim.entry)
            elif claim.started:
                assert claim.entry == condemned.entry, "an innocent was running"
                self.outcomes[layout.sequence_of(claim.entry)] = "killed"
                self.end.post_for_dead(claim.entry, Status.DIED)
                done.append(claim.entry)
            else:
                again.append(claim.entry)
        assert self.outcomes.get(layout.sequence_of(condemned.entry)) == "killed", "killed for a task that was done"
        self.end.settle(index, done, again, [])
        self.children[index] = self.start(index)


@pytest.mark.parametrize(
    ("n", "claims"),
    [
        (400, 4),
        pytest.param(10_000, 1, marks=pytest.mark.crash),
        pytest.param(10_000, 4, marks=pytest.mark.crash),
    ],
)
def test_of_many_tasks_that_end_at_about_their_limit_each_has_one_outcome(n: int, claims: int) -> None:
    with World(slots=64, tasks_max=n) as world:
        numbers = Numbers(world, n, claims)
        numbers.run()
        n_killed = list(numbers.outcomes.values()).count("killed")
        print(f"{n} tasks, {n_killed} killed, {numbers.limits.n_spared} spared")
        if n > 1000:
            assert numbers.limits.n_spared, "no task ended between the two looks"
        assert len(numbers.outcomes) == n
        assert n_killed, "none of them was over"
        late = {i for i, outcome in numbers.outcomes.items() if outcome == "killed"}  # some before they had counted
        for i, n_runs in enumerate(world.runs[:n]):
            assert n_runs == 1 or (n_runs == 0 and i in late), f"task {i} ran {n_runs} times"
        assert not any(world.runs[n:])
        assert not any(is_alive(child.pid) for child in numbers.children)

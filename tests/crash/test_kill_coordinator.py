"""A coordinator is killed, or interrupted, before each bytecode of each of its operations; the next one goes on.

the ring, each time:   done 3 results, not yet delivered; ready 3 tasks
                       worker 1, living: one task finished, one running, two not started
                       worker 0, dead: see STATES

operation     publish  collect  wait  cancel  take_back  settle (claims_of_dead, decide, post_for_dead)  attach
stopped by    SIGKILL: a new coordinator attaches
              KeyboardInterrupt, once or twice: the same one goes on, with the mutex free
"""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import pytest
from tests.crash.harness import EFFECT, FULL, Sweep, World, in_a_thread, relinquish, sweeps
from tests.crash.opcodes import Bytecodes, interrupt_before

from ringpool.shm import layout, lock
from ringpool.shm.claims import WorkerEnd
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.results import Results
from ringpool.shm.ring import VERSION_WORD

N_WRAP = 13  # tasks that go before, so that the lists wrap
N_TASKS = 40
# An interrupt between opening a file and entering its ``with`` block leaves it to the collector, in any program.
files_are_left_to_the_collector = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
Operation = Callable[[World, CoordinatorEnd], object]
State = Callable[[World], object]


# ---- how worker 0 died -----------------------------------------------------------------------------------------------


def hold(world: World, n_finished: int, then: Callable[[WorkerEnd, Results, int], object] | None = None) -> None:
    """It claims three, finishes some, and does something to the next."""
    worker = world.worker(0)
    results = Results(worker.ring, 0)
    entries = worker.exchange(4, False)
    assert entries is not None
    assert len(entries) == 3
    world.run_claim(worker, results, entries[:n_finished])
    if then is not None:
        then(worker, results, entries[n_finished])
    world.n_worker_deaths += 1


def run(world: World, worker: WorkerEnd, results: Results, entry: int, *, effect: bool) -> None:
    """Up to the effect of ``entry``, or until after it."""
    world.begin(worker, entry)
    assert world.task(layout.sequence_of(entry)).function == EFFECT
    world.runs[layout.sequence_of(entry)] += 1
    world.stage(results, entry)
    if effect:
        world.effect(entry)


def stage(world: World) -> None:
    hold(world, 1, functools.partial(run, world, effect=False))


def act(world: World) -> None:
    hold(world, 1, functools.partial(run, world, effect=True))


def die_in_exchange(world: World, moment: str) -> None:
    """In the middle of a claim, with the mutex held."""
    assert world.start_killed(lambda _: claim(world), moments()[moment]).was_killed()
    world.n_worker_deaths += 1


def claim(world: World) -> None:
    WorkerEnd(world.segment, 0).exchange(4, False)


@functools.cache
def moments() -> dict[str, int]:
    """Before which bytecode of ``claim`` a worker has to die to leave the mutex held, and ...

    ``locked``: nothing committed; ``torn``: committed, and its claim word not written; ``written``: that too.
    """
    found: dict[str, int] = {}
    with World() as world:
        end = world.coordinator()
        world.publish(end, 8)
        words, ring = end.ring.words, end.ring
        mutex, claim_at = layout.MUTEX_AT >> 3, ring.worker_word(0, layout.W_CLAIM)
        version, me = words[VERSION_WORD], threading.get_native_id()

        def look(n: int) -> None:
            if words[mutex] & lock.TID_MASK == me:
                committed, written = words[VERSION_WORD] != version, words[claim_at] != 0
                found["written" if written else "torn" if committed else "locked"] = n

        with Bytecodes(look):
            claim(world)
    assert list(found) == ["locked", "torn", "written"]
    return found


STATES: dict[str, State] = {
    "unstarted": lambda world: hold(world, 0),
    "running": lambda world: hold(world, 1, lambda worker, _, entry: world.begin(worker, entry)),
    "staged": stage,
    "acted": act,
    "finished": lambda world: hold(world, 3),
    "locked": lambda world: die_in_exchange(world, "locked"),
    "torn": lambda world: die_in_exchange(world, "torn"),
    "written": lambda world: die_in_exchange(world, "written"),
}


# ---- the operations --------------------------------------------------------------------------------------------------


def publish(world: World, end: CoordinatorEnd) -> None:
    world.publish(end, 3)


def collect(world: World, end: CoordinatorEnd) -> None:
    world.collect(end)


def wait(_world: World, end: CoordinatorEnd) -> None:
    end.wait(0.001, 4, 0.001)


def cancel(_world: World, end: CoordinatorEnd) -> None:
    cursors = end.ring.cursors()
    for entry in end.ring.entries(end.ring.ready, cursors.ready_head, min(1, cursors.ready_tail - cursors.ready_head)):
        end.refuse_unstarted(layout.slot_of(entry), layout.sequence_of(entry))
    end.cancel_unclaimed()


def take_back(_world: World, end: CoordinatorEnd) -> None:
    end.take_back(1)


def settle(world: World, end: CoordinatorEnd) -> None:
    world.recover(end, 0)


def attach(world: World, end: CoordinatorEnd) -> None:
    relinquish(end)
    world.coordinator()


OPERATIONS: dict[str, Operation] = {
    each.__name__: each for each in (publish, collect, wait, cancel, take_back, settle, attach)
}
CANCELLABLE = {"cancel": set(range(N_WRAP, N_WRAP + 13))}
AGAIN_STRIDE = 29
# An operation and a state of worker 0 that have to do with each other; the mutex of the dead is everybody's matter.
PAIRS = [
    *(("settle", state) for state in STATES),
    *((operation, "torn") for operation in OPERATIONS if operation != "settle"),
    *((operation, "running") for operation in OPERATIONS if operation != "settle"),
]


def prepare(world: World, state: str) -> tuple[CoordinatorEnd, Callable[[], None]]:
    """The ring as the module has it; and what worker 1 does as soon as it is let go on."""
    end = world.coordinator()
    world.drain(end, N_WRAP)
    world.publish(end, 13)
    worker = world.worker(1)
    results = Results(worker.ring, 1)
    world.run_claim(worker, results, worker.exchange(4, False) or ())
    finished, running, *others = worker.exchange(4, False) or ()
    world.run_claim(worker, results, [finished])
    world.begin(worker, running)
    STATES[state](world)

    def go_on() -> None:
        world.run(results, running)
        world.run_claim(worker, results, others)
        while entries := worker.exchange(4, False):
            world.run_claim(worker, results, entries)

    return end, go_on


# ---- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("operation", "state"), PAIRS)
@sweeps(shards=2)
def test_a_coordinator_killed_at_any_bytecode_leaves_all_to_the_next(sweep: Sweep, operation: str, state: str) -> None:
    def kill(at: int) -> bool:
        with World(attempts_max=2) as world:
            end, go_on = prepare(world, state)
            world.cancellable |= CANCELLABLE.get(operation, set())
            killed = world.start_killed(lambda _: OPERATIONS[operation](world, end), at).was_killed()
            world.n_coordinator_deaths += killed
            if random.randint(0, 1):  # workers may do much before the next coordinator is there, or nothing
                go_on()
                successor = world.coordinator()
            else:
                successor = world.coordinator()
                go_on()
            world.finish(successor, N_TASKS, [0])
            return killed

    sweep.run(kill, 40)


# ---- interrupted -----------------------------------------------------------------------------------------------------


def interrupt(operation: str, state: str, at: int, again: int) -> tuple[bool, bool]:
    """KeyboardInterrupt before bytecode ``at``, and ``again`` bytecodes later (0: not again); whether there were."""
    with World(attempts_max=2) as world:
        end, go_on = prepare(world, state)
        world.cancellable |= CANCELLABLE.get(operation, set())
        bytecodes = Bytecodes(interrupt_before(at, at + again))
        try:
            with bytecodes:
                OPERATIONS[operation](world, end)
        except KeyboardInterrupt:
            world.n_coordinator_deaths += 1 + bool(again)
        if not again:
            assert not end.ring.lock.held_by_this_thread, "the mutex is held, and its owner lives on"
        OPERATIONS[operation](world, end)
        go_on()
        world.finish(end, N_TASKS, [0])
        world.check(world.coordinator(), N_TASKS)
        return bytecodes.n >= at, bytecodes.n >= at + again


@files_are_left_to_the_collector
@pytest.mark.parametrize(("operation", "state"), PAIRS)
@sweeps(shards=1)
def test_an_interrupted_coordinator_lets_go_of_the_mutex_and_goes_on(sweep: Sweep, operation: str, state: str) -> None:
    sweep.run(lambda at: in_a_thread(lambda: interrupt(operation, state, at, 0))[0], 40)


@files_are_left_to_the_collector
@pytest.mark.parametrize(("operation", "state"), PAIRS)
@pytest.mark.parametrize(
    "sweep", [pytest.param(Sweep(149), id="sample"), pytest.param(Sweep(7), id="full", marks=FULL)]
)
def test_a_coordinator_interrupted_again_on_its_way_out_goes_on(sweep: Sweep, operation: str, state: str) -> None:
    def twice(at: int) -> bool:
        again, happened = random.randint(1, AGAIN_STRIDE), (True, True)
        while happened == (True, True):
            happened = in_a_thread(functools.partial(interrupt, operation, state, at, again))
            again += AGAIN_STRIDE
        return happened[0]

    sweep.run(twice, 40)


class Interrupts:
    """A child that sends this process SIGUSR1 all the time, which raises up to twice in each call of ``during``."""

    def __init__(self, world: World) -> None:
        self.n = 0
        self._left = 0
        self._target = os.getpid()
        self._former = signal.signal(signal.SIGUSR1, self._handle)
        self._sender = world.start(self._send, 600)

    def _send(self) -> None:
        while True:
            time.sleep(random.expovariate(1 / 2e-4))
            os.kill(self._target, signal.SIGUSR1)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._left:
            self._left -= 1
            self.n += 1
            raise KeyboardInterrupt

    def during(self, operation: Callable[[], object]) -> None:
        """Run ``operation``, which may be interrupted twice."""
        self._left = 2
        try:
            operation()
            self._left = 0
        except KeyboardInterrupt:
            try:
                self._left = 0
            except KeyboardInterrupt:
                pass

    def end(self) -> None:
        self._sender.kill()
        self._sender.wait()
        signal.signal(signal.SIGUSR1, self._former)


@pytest.mark.parametrize("n_interrupts", [pytest.param(300, id="sample"), pytest.param(30_000, id="full", marks=FULL)])
def test_interrupts_that_come_at_any_time_lose_nothing(n_interrupts: int) -> None:
    with World(slots=64, claims_max=8, tasks_max=1 << 22) as world:
        end = world.coordinator()
        worker = world.start(lambda: world.work(0, 8), 600)
        interrupts = Interrupts(world)
        try:
            while interrupts.n < n_interrupts:
                interrupts.during(lambda: world.publish(end, 64))
                interrupts.during(lambda: end.take_back(0))
                interrupts.during(lambda: world.collect(end))
        finally:
            interrupts.end()
        end.stop_workers()
        assert not worker.was_killed()
        world.n_coordinator_deaths = interrupts.n
        world.finish(end, end.published + 100)

"""A worker is killed before each bytecode that it executes in ``ringpool/shm``; nothing is lost, nothing done twice.

alone           from its first store to its last, at batches 1 and 4
taken back      the same, while the coordinator takes from it what it has not started
interleaved     nobody is killed; a start and a take-back meet, each stopped at any bytecode for the other's sake
in parallel     the coordinator takes back without end, and workers die at random
"""

from __future__ import annotations

import os
import random
import select

import pytest
from tests.crash.harness import FULL, PATIENCE_S, Child, Sweep, World, sweeps
from tests.crash.opcodes import Bytecodes
from tests.crash.staging_world import StagingWorld

from ringpool.shm import barrier
from ringpool.shm.claims import WorkerEnd
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.results import Results

N_WRAP = 11  # tasks that go before, so that the lists wrap
can_take_back = pytest.mark.skipif(not barrier.register(), reason="this kernel has no membarrier")


def wait_until_parked(end: CoordinatorEnd, index: int, worker: Child) -> None:
    """Until the worker has parked, or died before."""
    while not end.ring.peek().parked >> index & 1 and not worker.ends_within(0.0005):
        pass


# ---- alone -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_of", "n_min"), [(World, 2000), (StagingWorld, 1500)], ids=["", "staging"])
@pytest.mark.parametrize("batch", [1, 4])
@sweeps()
def test_a_worker_killed_at_any_bytecode_loses_nothing(
    sweep: Sweep, batch: int, world_of: type[World], n_min: int
) -> None:
    """It attaches, claims, runs, completes, parks, is woken, and is told to stop."""

    def kill(at: int) -> bool:
        with world_of() as world:
            end = world.coordinator()
            world.drain(end, N_WRAP)
            world.publish(end, 9)
            worker = world.start_killed(lambda _: world.work(0, batch, last=21), at)
            wait_until_parked(end, 0, worker)
            world.publish(end, 2)
            killed = worker.was_killed()
            world.n_worker_deaths += killed
            world.finish(world.coordinator(), 30, [0] if killed else [])
            return killed

    sweep.run(kill, n_min)


# ---- taken back ------------------------------------------------------------------------------------------------------


@can_take_back
@sweeps()
def test_a_worker_killed_after_a_take_back_loses_nothing(sweep: Sweep) -> None:
    """Of its first claim of four, three go before the second start, which is refused. They come back one by one. Of its
    next claim of two, one goes while it is about to start the other, which is contested, and granted.
    """

    def live(world: World, end: CoordinatorEnd, bytecodes: Bytecodes) -> None:
        n_starts, n_taken_back = 0, list[int]()

        def before_start(worker: WorkerEnd, entry: int) -> None:
            nonlocal n_starts
            n_starts += 1
            bytecodes.paused = True
            if n_starts == 2:
                n_taken_back.extend(end.take_back(0) for _ in range(3))  # twice in vain, and in the way of nobody
            elif n_starts == 7:
                world.begin(worker, entry)  # so that the coordinator finds it running, as if it came in the middle
                n_taken_back.append(end.take_back(0))
            bytecodes.paused = False

        world.work(0, 4, last=N_WRAP + 8, before_start=before_start)
        assert n_taken_back == [3, 0, 0, 1]

    def kill(at: int) -> bool:
        with World() as world:
            end = world.coordinator()
            world.drain(end, N_WRAP)
            world.publish(end, 9)
            killed = world.start_killed(lambda bytecodes: live(world, end, bytecodes), at).was_killed()
            world.n_worker_deaths += killed
            world.finish(world.coordinator(), 30, [0] if killed else [])
            return killed

    sweep.run(kill, 2000)


# ---- interleaved -----------------------------------------------------------------------------------------------------


class Stage:
    """Two pipes: a test lets its child go on, and the child says whether it has stopped again, or will no more."""

    def __init__(self) -> None:
        self._go, self._said = os.pipe(), os.pipe()
        self.stops = True

    def let_go(self, child: Child) -> None:
        """In the test: let the child go on to its next stop, if it has one."""
        if self.stops:
            os.write(self._go[1], b"!")
            ready, _, _ = select.select([self._said[0], child.pidfd], [], [], PATIENCE_S)
            assert self._said[0] in ready, "the child has ended, or is stuck"
            self.stops = os.read(self._said[0], 1) == b"s"

    def let_go_for_good(self, child: Child) -> None:
        """In the test: let the child go on to its end."""
        while self.stops:
            self.let_go(child)
        os.write(self._go[1], b"!")

    def say(self, *, stops: bool) -> None:
        """In the child."""
        os.write(self._said[1], b"s" if stops else b"-")

    def wait(self) -> None:
        """In the child."""
        os.read(self._go[0], 1)

    def close(self) -> None:
        for fd in (*self._go, *self._said):
            os.close(fd)


def start_in_steps(world: World, worker: WorkerEnd, entry: int, stage: Stage, at: int) -> bool:
    """Start ``entry``, and stop before bytecode ``at`` of that; but not where it is the mutex that it is after."""
    contested, stops = worker._start_contested, True

    def start_contested(entry: int) -> bool:
        nonlocal stops
        stops = False
        stage.say(stops=False)
        return contested(entry)

    def act(n: int) -> None:
        if n == at and stops:
            stage.say(stops=True)
            stage.wait()

    worker._start_contested = start_contested
    worker.start = worker._start()  # which looks it up once
    stage.wait()
    with Bytecodes(act):
        started = world.begin(worker, entry)
    if stops:
        stage.say(stops=False)
    stage.wait()
    return started


def go_on(world: World, worker: WorkerEnd, entries: list[int], stage: Stage, at: int) -> None:
    """The child: start the first of ``entries``, as the test wants it, then run whatever is left to run."""
    results = Results(worker.ring, worker.index)
    entry, *others = entries
    if start_in_steps(world, worker, entry, stage, at):
        world.run(results, entry)
        world.run_claim(worker, results, others)
    while entries := worker.exchange(4, False):
        world.run_claim(worker, results, entries)


def meet(at_start: int, at_take_back: int, *, worker_first: bool) -> bool:
    """A start and a take-back, interleaved; whether the take-back has a bytecode ``at_take_back``.

    Whoever is first goes to its stop, then the other to its own, then the first to its end, then the other.
    """
    stage = Stage()
    with World() as world:
        end = world.coordinator()
        world.drain(end, N_WRAP)
        world.publish(end, 13)
        worker = world.worker(0)
        first, *others = worker.exchange(4, False) or ()
        world.begin(worker, first)
        world.run(Results(worker.ring, 0), first)
        child = world.start(lambda: go_on(world, worker, others, stage, at_start))

        def act(n: int) -> None:
            if n == at_take_back:
                stage.let_go(child)

        if worker_first:
            stage.let_go(child)
        with Bytecodes(act) as bytecodes:
            n_back = end.take_back(0)
        stage.let_go_for_good(child)
        assert child.wait() == 0
        assert n_back in (2, 3)
        world.finish(world.coordinator(), 30)
        stage.close()
        return bytecodes.n >= at_take_back


@can_take_back
@pytest.mark.parametrize("worker_first", [True, False], ids=["worker_first", "coordinator_first"])
@sweeps(stride=149)
def test_a_start_and_a_take_back_that_meet_leave_each_task_to_one_of_them(sweep: Sweep, worker_first: bool) -> None:
    n_start = 24  # more than an uncontested start has

    def interleave(at: int) -> bool:
        at_take_back, at_start = divmod(at, n_start)
        return meet(at_start + 1, at_take_back + 1, worker_first=worker_first)

    sweep.run(interleave, 200 * n_start)


# ---- in parallel -----------------------------------------------------------------------------------------------------


def take_back_without_end(n_wanted: int) -> None:
    """A coordinator that takes back all the time, from two workers, until that many tasks were; one of them dies."""

    def start(index: int) -> Child:
        batch, at = random.choice((2, 8)), random.randint(1, 20_000)
        if index:
            return world.start(lambda: world.work(index, batch), 600)
        return world.start_killed(lambda _: world.work(index, batch), at)

    n_back = 0
    with World(slots=64, workers=2, claims_max=8, tasks_max=1 << 22) as world:
        end = world.coordinator()
        workers = [start(0), start(1)]
        while n_back < n_wanted:
            world.publish(end, 64)
            n_back += sum(end.take_back(index) for index in (0, 1) * 10)
            for index, worker in enumerate(workers):
                if worker.ends_within(0):
                    assert worker.was_killed()
                    world.n_worker_deaths += 1
                    world.recover(end, index)
                    workers[index] = start(index)
            world.collect(end)
        end.stop_workers()
        dead = [index for index, worker in enumerate(workers) if worker.was_killed()]
        world.n_worker_deaths += len(dead)
        world.finish(world.coordinator(), end.published + 100, dead)


@can_take_back
@pytest.mark.parametrize("n_wanted", [pytest.param(200, id="sample"), pytest.param(20_000, id="full", marks=FULL)])
def test_taking_back_in_parallel_with_starts_and_deaths_loses_nothing(n_wanted: int) -> None:
    take_back_without_end(n_wanted)

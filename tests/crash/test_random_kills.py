"""Random SIGKILLs, of processes that run in parallel and at full speed: the counts stay exact.

    workers         a killer of its own kills them; the coordinator recovers and replaces them
    everybody       coordinators too: workers live on without one, and the next one attaches
    stepwise        two workers, then two coordinators, each killed before a random bytecode
    public          the same of the whole pool, through Coordinator.run_file_tasks

The kills here fall inside of bytecodes too: into the middle of a copy, or between two instructions of a C library.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tests.crash import tasks
from tests.crash.harness import FULL, PATIENCE_S, Child, World, relinquish

from ringpool import Coordinator
from ringpool.shm import layout, owner
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.results import Results
from ringpool.shm.ring import DONE_HEAD

LIFE_S = 900
TASKS_MAX = 1 << 22
N_WORKERS = 3


def start_worker(world: World, index: int) -> Child:
    batch = random.choice((1, 2, 8, 64))
    return world.start(lambda: world.work(index, batch), LIFE_S)


def owner_of_worker(end: CoordinatorEnd, index: int) -> owner.Owner:
    """The process that says of itself that it is this worker."""
    words = end.ring.words
    return owner.Owner(*(words[end.ring.worker_word(index, word)] for word in (layout.W_PID, layout.W_START)))


# ---- workers ---------------------------------------------------------------------------------------------------------


def kill_workers(end: CoordinatorEnd, n_kills: int, gap_tasks: int) -> None:
    """A process that does nothing but that, once per so many tasks: it keeps no step with what the coordinator does."""
    while n_kills:
        done = end.ring.words[DONE_HEAD] + random.expovariate(1 / gap_tasks)
        while end.ring.words[DONE_HEAD] < done:
            time.sleep(random.uniform(0, 4e-4))
        victim = owner_of_worker(end, random.randrange(N_WORKERS))
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(victim.pid) if victim.pid else -1
            if pidfd >= 0 and victim.alive:  # asked after the pidfd was opened: it is that very process
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [], PATIENCE_S)  # or the next kill might be of the same
                n_kills -= 1
            if pidfd >= 0:
                os.close(pidfd)


@pytest.mark.parametrize(
    ("n_kills", "n_tasks"),
    [pytest.param(100, 20_000, id="sample"), pytest.param(2000, 1_000_000, id="full", marks=FULL)],
)
def test_workers_killed_at_random_lose_no_task_and_do_none_twice(n_kills: int, n_tasks: int) -> None:
    with World(slots=256, workers=N_WORKERS, claims_max=64, tasks_max=TASKS_MAX) as world:
        end = world.coordinator()
        workers = [start_worker(world, index) for index in range(N_WORKERS)]
        killer = world.start(lambda: kill_workers(end, n_kills, n_tasks // n_kills), LIFE_S)
        while end.ring.words[DONE_HEAD] < n_tasks or not killer.ends_within(0):
            world.publish(end, 64)
            if end.published > 2 * n_tasks:
                time.sleep(0.001)  # a killer on a busy machine must not be outrun, or the counters do not suffice
            for index, worker in enumerate(workers):
                if worker.ends_within(0):
                    assert worker.was_killed()
                    world.n_worker_deaths += 1
                    world.recover(end, index)
                    workers[index] = start_worker(world, index)
            if not world.collect(end):
                end.wait(0.002, 64, 0.001)
        assert not killer.was_killed()
        end.stop_workers()
        dead = [index for index, worker in enumerate(workers) if worker.was_killed()]
        world.n_worker_deaths += len(dead)
        assert world.n_worker_deaths == n_kills
        world.finish(world.coordinator(), end.published + 100, dead)


# ---- everybody -------------------------------------------------------------------------------------------------------


class Crowd:
    """Workers and a coordinator, all of which may die. This process starts them, kills them, and knows no more.

    ``words``, which all share: whether to publish no more; whether all is delivered; then for each worker the pid and
    the start time of its process, 0 once that is dead and settled.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self.coordinator = world.start(self.coordinate, LIFE_S)
        self.workers = [self.start(index) for index in range(N_WORKERS)]

    def start(self, index: int) -> Child:
        worker = start_worker(self.world, index)
        self.words[3 + 2 * index] = owner.start_time(worker.pid)
        self.words[2 + 2 * index] = worker.pid
        return worker

    def coordinate(self) -> None:
        """A coordinator's life: it finds out by itself who is dead."""
        world, words, end = self.world, self.words, CoordinatorEnd(self.world.segment)
        while not words[1]:
            for index in range(N_WORKERS):
                process = owner.Owner(words[2 + 2 * index], words[3 + 2 * index])
                if process.pid and not process.alive:
                    world.recover(end, index)
                    words[2 + 2 * index] = 0
            if not words[0]:
                world.publish(end, 32)
            if not world.collect(end):
                end.wait(0.001, 8, 0.001)
            if words[0] and end.ring.words[DONE_HEAD] == end.published:
                words[1] = 1

    def replace(self) -> None:
        """Start anew who has died: a worker only once it was settled."""
        if self.coordinator.ends_within(0) and not self.words[1]:
            assert self.coordinator.was_killed()
            self.world.n_coordinator_deaths += 1
            self.coordinator = self.world.start(self.coordinate, LIFE_S)
        for index, worker in enumerate(self.workers):
            if not self.words[2 + 2 * index]:
                assert worker.was_killed()
                self.world.n_worker_deaths += 1
                self.workers[index] = self.start(index)

    def kill_one(self) -> bool:
        """Whether there was somebody to be killed."""
        victim = random.choice((self.coordinator, *self.workers))
        lives = not victim.ends_within(0)
        if lives:
            victim.kill()
        return lives

    def end(self) -> list[int]:
        """Let it come to its end; the workers that have died meanwhile."""
        self.words[0] = 1
        while not self.coordinator.ends_within(0.001):
            self.replace()
        if self.coordinator.was_killed():  # after it had said that all is delivered
            self.world.n_coordinator_deaths += 1
        for worker in self.workers:
            if worker.exitcode is None:
                worker.kill()
        dead = [index for index, worker in enumerate(self.workers) if worker.was_killed()]
        self.world.n_worker_deaths += len(dead)
        return dead


@pytest.mark.parametrize("n_kills", [pytest.param(100, id="sample"), pytest.param(3000, id="full", marks=FULL)])
def test_coordinators_and_workers_killed_at_random_lose_no_task_and_do_none_twice(n_kills: int) -> None:
    with World(slots=128, workers=N_WORKERS, claims_max=64, tasks_max=TASKS_MAX) as world:
        crowd = Crowd(world)
        while n_kills:
            time.sleep(random.expovariate(1 / 0.005))
            n_kills -= crowd.kill_one()
            crowd.replace()
        dead = crowd.end()
        end = world.coordinator()
        assert end.published > 0
        world.finish(end, end.published + 100, dead)


# ---- stepwise --------------------------------------------------------------------------------------------------------


def work_off(world: World, index: int, batch: int) -> None:
    """A worker, for as long as there is something to claim."""
    worker = world.worker(index)
    results = Results(worker.ring, index)
    while entries := worker.exchange(batch, False):
        world.run_claim(worker, results, entries)


def work_and_die(world: World, index: int) -> bool:
    """Whether it died before it was done."""
    batch, at = random.choice((1, 4)), random.randint(300, 3000)
    return world.start_killed(lambda _: work_off(world, index, batch), at).was_killed()


def coordinate_once(world: World) -> None:
    """All that a coordinator may do, once."""
    end = CoordinatorEnd(world.segment)
    world.publish(end, 3)
    for index in (0, 1):
        world.recover(end, index)
    world.collect(end)
    world.publish(end, 3)
    end.take_back(0)
    end.wait(0.001, 4, 0.001)
    world.collect(end)


@pytest.mark.parametrize("n_worlds", [pytest.param(40, id="sample"), pytest.param(3000, id="full", marks=FULL)])
def test_workers_and_coordinators_killed_before_random_bytecodes_lose_no_task(n_worlds: int) -> None:
    for _ in range(n_worlds):
        with World(claims_max=4, workers=2) as world:
            end = world.coordinator()
            world.drain(end, random.choice((0, 5, 13)))
            world.publish(end, random.randint(8, 16))
            relinquish(end)
            for index in (0, 1):
                world.n_worker_deaths += work_and_die(world, index)
            for _ in range(2):
                at = random.randint(1, 3000)
                world.n_coordinator_deaths += world.start_killed(lambda _: coordinate_once(world), at).was_killed()
            world.finish(world.coordinator(), 40, [0, 1])


# ---- public ----------------------------------------------------------------------------------------------------------


def kill_a_worker(pool: Coordinator) -> None:
    """SIGKILL for one of the pool's workers, if there is one; by a pidfd that was seen to be that of a worker."""
    pids = pool.worker_pids
    if not pids:
        return
    with suppress(ProcessLookupError, FileNotFoundError):
        pid = random.choice(pids)
        pidfd = os.pidfd_open(pid)
        try:
            if Path(f"/proc/{pid}/comm").read_text().startswith("ringpool-w"):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


@pytest.mark.parametrize(
    ("n_tasks", "n_kills"),
    [pytest.param(10_000, 10, id="sample"), pytest.param(200_000, 300, id="full", marks=FULL)],
)
def test_a_pool_whose_workers_are_killed_gives_every_result_once(n_tasks: int, n_kills: int) -> None:
    came, gap_tasks = bytearray(n_tasks), n_tasks // n_kills
    first = random.randrange(gap_tasks)
    with Coordinator(workers=2, attempts_max=63) as pool:
        for result in pool.run_file_tasks(tasks.number_of, map(str, range(n_tasks))):
            assert result.ok, result.error
            assert result.value == int(result.path)
            came[result.value] += 1
            if result.value % gap_tasks == first:
                kill_a_worker(pool)
        n_deaths = pool.stats().worker_deaths
    assert came == b"\1" * n_tasks
    assert n_deaths > n_kills // 10

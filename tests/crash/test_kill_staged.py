"""A worker stages what its tasks make and commits it at the end of a claim, as a job's does; whoever dies in between.

worker         killed before each bytecode, while the coordinator takes back what it has not started (alone: in
               ``test_kill_worker``, with the others)
coordinator    killed before each bytecode of a take-back, and of the settling of a worker that died with things staged

Between two tasks of a claim there are results that say STAGED: they stay with their worker, alive or dead, until each
is committed by the one or the other, and never by both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from tests.crash.harness import Sweep, World, relinquish, sweeps
from tests.crash.opcodes import Bytecodes
from tests.crash.staging_world import StagingWorld
from tests.crash.test_kill_worker import can_take_back

from ringpool.shm.claims import WorkerEnd
from ringpool.shm.dispatch import CoordinatorEnd
from ringpool.shm.results import Results

N_WRAP = 11  # tasks that go before, so that the lists wrap


# ---- workers ---------------------------------------------------------------------------------------------------------


@can_take_back
@pytest.mark.parametrize("n_staged", [1, 2, 3])
@sweeps()
def test_a_worker_killed_around_a_take_back_leaves_nothing_undone(sweep: Sweep, n_staged: int) -> None:
    """Of its first claim of four it has run ``n_staged``, of which some are staged, when the rest is taken back."""

    def live(world: World, end: CoordinatorEnd, bytecodes: Bytecodes) -> None:
        n_starts, n_taken_back = 0, 0

        def before_start(_worker: WorkerEnd, _entry: int) -> None:
            nonlocal n_starts, n_taken_back
            n_starts += 1
            if n_starts == n_staged + 1:
                bytecodes.paused = True
                n_taken_back = end.take_back(0)
                bytecodes.paused = False

        world.work(0, 4, last=N_WRAP + 8, before_start=before_start)
        assert n_taken_back == 4 - n_staged

    def kill(at: int) -> bool:
        with StagingWorld() as world:
            end = world.coordinator()
            world.drain(end, N_WRAP)
            world.publish(end, 9)
            killed = world.start_killed(lambda bytecodes: live(world, end, bytecodes), at).was_killed()
            world.n_worker_deaths += killed
            world.finish(world.coordinator(), 30, [0] if killed else [])
            return killed

    sweep.run(kill, 1500)


# ---- coordinators ----------------------------------------------------------------------------------------------------


def die_with_staged(world: StagingWorld, n_committed: int) -> None:
    """Worker 0 claims four tasks, stages what three of them make, commits some of it, and is no more."""

    def live() -> None:
        worker = world.worker(0)
        results = Results(worker.ring, 0)
        for entry in (worker.exchange(4, False) or ())[:3]:
            world.begin(worker, entry)
            world.run(results, entry)
        world.commit_some(results, n_committed)

    assert world.start(live).wait() == 0
    world.n_worker_deaths += 1


def settle(world: World, end: CoordinatorEnd) -> None:
    world.recover(end, 0)


def take_back(_world: World, end: CoordinatorEnd) -> None:
    end.take_back(1)


@can_take_back
@pytest.mark.parametrize("operation", [settle, take_back])
@pytest.mark.parametrize("n_committed", [0, 1])
@sweeps(1, 17)
def test_a_coordinator_killed_at_any_bytecode_leaves_nothing_undone(
    sweep: Sweep, operation: Callable[[World, CoordinatorEnd], None], n_committed: int
) -> None:
    """Worker 0 is dead, with things staged; worker 1 lives: two of its claim have run, one runs, one is not started."""

    def kill(at: int) -> bool:
        with StagingWorld() as world:
            end = world.coordinator()
            world.drain(end, N_WRAP)
            world.publish(end, 13)
            die_with_staged(world, n_committed)
            worker = world.worker(1)
            results = Results(worker.ring, 1)
            world.run_claim(worker, results, worker.exchange(4, False) or ())  # one, before the list wraps
            claimed = worker.exchange(4, False)
            assert claimed is not None
            assert len(claimed) == 4
            *staged, running, last = claimed
            for entry in staged:
                world.begin(worker, entry)
                world.run(results, entry)
            world.begin(worker, running)
            relinquish(end)
            dies = functools.partial(operation, world)
            coordinator = world.start_killed(lambda _: dies(world.coordinator()), at)
            killed = coordinator.was_killed()
            world.n_coordinator_deaths += killed
            heir = world.coordinator()
            world.run(results, running)
            world.run_claim(worker, results, [last])  # unless it was taken back; with it, what is staged is committed
            while entries := worker.exchange(4, False):
                world.run_claim(worker, results, entries)
            world.finish(heir, 30, [0], index=1)
            return killed

    sweep.run(kill, 100)

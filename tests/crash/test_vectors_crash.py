"""Vectors under SIGKILL: batching is invisible. An item's outcome is its own, its worker's death too.

alone           a worker is killed before each bytecode of what runs a vector, outcomes of all kinds
in part         the same, while its publisher takes from it what it has not come to
interleaved     nobody is killed; a worker and a ``split`` meet, each stopped at any bytecode for the other's sake
in parallel     the publisher splits without end, workers die at random, at full speed
public          the same of the whole pool, through RingPoolExecutor.map
"""

from __future__ import annotations

import os
import random
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.crash import vector_tasks
from tests.crash.harness import FULL, Child, Sweep, sweeps
from tests.crash.test_kill_worker import can_take_back
from tests.crash.test_random_kills import kill_a_worker
from tests.crash.vector_duel import N_RUN, N_SPLIT, Duel
from tests.crash.vector_world import VectorWorld

from ringpool import RingPoolExecutor
from ringpool.errors import WorkerDiedError

LENGTHS = (15, 4, 3, 6)


# ---- alone -----------------------------------------------------------------------------------------------------------


def kill(at: int, retries: int, stop_at: int = -1, lengths: tuple[int, ...] = LENGTHS, *, files: bool = False) -> bool:
    """A worker is killed before bytecode ``at``, another one runs what is left. Whether there was such a bytecode."""
    with VectorWorld(lengths, retries=retries, stop_at=stop_at, files=files) as world:
        worker = world.start_worker(0, at)
        killed = world.serve(worker)
        if killed:
            world.bury(0, worker)
        world.finish()
        return killed


@pytest.mark.parametrize("files", [False, True], ids=["calls", "files"])
def test_outcomes_of_all_kinds_arrive_as_they_are(files: bool) -> None:
    with VectorWorld(LENGTHS, files=files) as world:
        assert not world.serve(world.start_worker(0))
        world.finish()


@pytest.mark.parametrize("retries", [0, 1])
@sweeps(stride=97)
def test_a_worker_killed_at_any_bytecode_of_a_vector_is_the_death_of_one_item(sweep: Sweep, retries: int) -> None:
    sweep.run(lambda at: kill(at, retries), 1500)


@pytest.mark.parametrize("retries", [0, 1])
@sweeps(stride=97)
def test_a_worker_killed_at_any_bytecode_of_a_vector_of_files_is_the_death_of_one_file(
    sweep: Sweep, retries: int
) -> None:
    sweep.run(lambda at: kill(at, retries, files=True), 2000)


def die_in(deadly: int, retries: int) -> None:
    """An item kills every worker that runs it."""
    with VectorWorld(LENGTHS, retries=retries, deadly=deadly) as world:
        for _ in range(retries + 1):
            worker = world.start_worker(0)
            assert world.serve(worker)
            world.bury(0, worker)
        world.finish()
        error = world.outcomes()[deadly].error
        assert isinstance(error, WorkerDiedError)
        assert error.deaths == world.runs[deadly] == retries + 1


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("deadly", [0, 1, 6, 8, 14, 15, 21, 22, 26])
def test_an_item_that_kills_its_workers_fails_after_so_many_deaths(deadly: int, retries: int) -> None:
    die_in(deadly, retries)


# ---- in part ---------------------------------------------------------------------------------------------------------


@can_take_back
@pytest.mark.parametrize("stop_at", [0, 3, 16])
@sweeps(stride=197)
def test_a_worker_killed_after_a_part_was_taken_from_it_loses_nothing(sweep: Sweep, stop_at: int) -> None:
    """It is at that item when half of those behind it are taken."""
    sweep.run(lambda at: kill(at, 0, stop_at), 1500)


# ---- interleaved -----------------------------------------------------------------------------------------------------


@pytest.fixture
def duel() -> Iterator[Duel]:
    with Duel() as duel:
        yield duel


@can_take_back
@pytest.mark.parametrize("worker_first", [True, False], ids=["worker_first", "publisher_first"])
@sweeps(stride=499)
def test_a_worker_and_a_split_that_meet_leave_each_item_to_one_of_them(
    duel: Duel, sweep: Sweep, worker_first: bool
) -> None:
    def meet(at: int) -> bool:
        at_split, at_run = divmod(at, N_RUN)
        return duel.meet(at_run + 1, at_split + 1, worker_first=worker_first)

    sweep.run(meet, N_SPLIT * N_RUN // 2)


@can_take_back
def test_all_bytecodes_of_either_side_are_met(duel: Duel) -> None:
    """``N_RUN`` and ``N_SPLIT`` are no less than there are."""
    duel.meet(1 << 30, 1 << 30, worker_first=True)
    assert 100 < duel.n_run <= N_RUN
    assert 50 < duel.n_split <= N_SPLIT


# ---- in parallel -----------------------------------------------------------------------------------------------------


def split_without_end(n_vectors: int) -> int:
    """Vectors of two thousand items; parts of them are taken all the time, and one of the two workers dies at times.

    How often a part was taken.
    """
    n_splits = 0
    with VectorWorld((2000,) * n_vectors) as world:
        workers: list[Child] = [world.start_worker(index, life_s=600) for index in (0, 1)]
        dies_at = [0.0, 0.0]  # not known, before it is there: where a start takes long, nobody would get to work
        while not world.is_done:
            world.turn()
            n_splits += world.split(random.choice((1, 1, 7)))
            victim = random.randrange(2)
            if not dies_at[victim]:
                if world.is_there(victim, workers[victim]):
                    dies_at[victim] = time.monotonic() + random.expovariate(1 / 0.02)
            elif time.monotonic() > dies_at[victim]:
                workers[victim].kill()
                if workers[victim].was_killed():
                    world.bury(victim, workers[victim])
                workers[victim] = world.start_worker(victim, life_s=600)
                dies_at[victim] = 0.0
        world.end.stop_workers()
        assert not any(worker.was_killed() for worker in workers)
        world.check()
        assert world.n_worker_deaths > 0
    return n_splits


@can_take_back
@pytest.mark.parametrize(
    ("n_vectors", "n_splits"), [pytest.param(60, 60, id="sample"), pytest.param(3000, 3000, id="full", marks=FULL)]
)
def test_splitting_in_parallel_with_runs_and_deaths_loses_nothing(n_vectors: int, n_splits: int) -> None:
    n = 0
    while n < n_splits:  # on a busy machine, workers that are not scheduled leave little to split: then once more
        n += split_without_end(n_vectors)


# ---- public ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_items", "n_kills"),
    [pytest.param(200_000, 8, id="sample"), pytest.param(2_000_000, 150, id="full", marks=FULL)],
)
@pytest.mark.parametrize("retries", [0, 60])
def test_a_map_whose_workers_are_killed_gives_every_result_once(
    tmp_path: Path, n_items: int, n_kills: int, retries: int
) -> None:
    """Each item appends its number to a log: what stands there twice was run twice."""
    log = tmp_path / "log"
    log.touch()
    finished = threading.Event()
    outcomes: list[object] = []

    def take() -> None:
        try:
            mapped = pool.options(retries=retries).map(vector_tasks.note, range(n_items), return_exceptions=True)
            outcomes.extend(mapped)
        finally:
            finished.set()

    with RingPoolExecutor(2, initializer=vector_tasks.open_log, initargs=(os.fspath(log),)) as pool:
        taker = threading.Thread(target=take)
        taker.start()
        seen = 0
        while not finished.wait(random.uniform(0.001, 0.01)):
            n_bytes = log.stat().st_size
            if n_bytes > seen:  # nobody is killed for nothing
                seen = n_bytes + random.uniform(0, 3 * n_items / n_kills)  # more than n_kills: some come late
                kill_a_worker(pool)
        taker.join()
        n_deaths = pool.stats().worker_deaths
    runs = array("I", log.read_bytes())
    n_runs = bytearray(n_items)
    for i in runs:
        n_runs[i] += 1
    blamed = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, WorkerDiedError)]
    assert len(outcomes) == n_items
    assert all(outcome == i for i, outcome in enumerate(outcomes) if not isinstance(outcome, WorkerDiedError))
    again = [i for i in range(n_items) if n_runs[i] > 1]
    assert not [i for i in set(range(n_items)).difference(blamed) if not n_runs[i]]
    assert len(blamed) + sum(n_runs[i] - 1 for i in again) <= n_deaths
    assert not (blamed if retries else again)
    assert n_deaths > n_kills // 4

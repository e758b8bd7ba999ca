"""Results that stay in the segment until they are released, and outputs that are staged while their worker goes on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.shm.test_ring import bench, close_worker

from ringpool.coordinator import leftovers
from ringpool.shm import segment
from ringpool.shm.claims import WorkerEnd
from ringpool.shm.dispatch import CoordinatorEnd, Task
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import Results


@contextmanager
def retaining(slots: int) -> Iterator[tuple[CoordinatorEnd, WorkerEnd]]:
    made = segment.create(slots, 1)
    try:
        coordinator, worker = CoordinatorEnd(made, retains=True), WorkerEnd(segment.attach(made.name), 0)
        yield coordinator, worker
        close_worker(worker)
        coordinator.close()
    finally:
        segment.unlink(made.name)


def run_all(coordinator: CoordinatorEnd, worker: WorkerEnd, n: int) -> None:
    coordinator.publish([Task(1, b"%d" % i) for i in range(n)])
    results = Results(worker.ring, 0)
    while entries := worker.exchange(64, False):
        for entry in entries:
            assert worker.start(entry, 1)
            results.post(entry, Status.OK, Encoding.MSGPACK, b"", 1)


def collected(coordinator: CoordinatorEnd) -> list[int]:
    entries: list[int] = []
    coordinator.collect(lambda _slot, entry: entries.append(entry))
    return entries


def test_a_retained_result_keeps_its_slot_until_it_is_released() -> None:
    with retaining(4) as (coordinator, worker):
        run_all(coordinator, worker, 4)
        assert len(collected(coordinator)) == 4
        assert coordinator.n_free == 0
        assert not coordinator.has_results
        assert collected(coordinator) == []  # delivered once only
        coordinator.release(3)
        assert coordinator.n_free == 3
        run_all(coordinator, worker, 3)
        assert len(collected(coordinator)) == 3
        coordinator.release(4)
        assert coordinator.n_free == 4


def test_who_takes_over_gets_what_was_delivered_and_not_released() -> None:
    with retaining(4) as (coordinator, worker):
        run_all(coordinator, worker, 3)
        entries = collected(coordinator)
        coordinator.release(1)
        heir = CoordinatorEnd(segment.attach(coordinator.ring.segment.name), retains=True)
        assert collected(heir) == entries[1:]
        heir.close()


def test_a_cut_off_method_does_not_deliver_what_is_retained_again() -> None:
    with retaining(4) as (coordinator, worker):
        run_all(coordinator, worker, 2)
        collected(coordinator)
        coordinator._stale = True  # as after an exception in the middle
        assert coordinator.n_free == 2
        assert collected(coordinator) == []
        coordinator.release(2)
        assert coordinator.n_free == 4


def test_a_waiting_coordinator_counts_from_what_it_has_collected() -> None:
    with retaining(4) as (coordinator, worker):
        run_all(coordinator, worker, 2)
        collected(coordinator)
        coordinator.publish([Task(1, b"x")])
        slept: list[float] = []
        coordinator.sleep = slept.append  # type: ignore[method-assign]
        coordinator.wait(0.5, 1, 0.0)
        assert slept == [0.5]  # what is retained is no news
        assert coordinator.ring.peek().wake_at == 3


@pytest.mark.parametrize("ended", [(), (0,), (0, 2), (0, 1, 2)])
def test_what_is_staged_stays_with_its_worker_when_the_rest_is_taken_back(ended: tuple[int, ...]) -> None:
    with bench(8, 1, claims_max=8) as it:
        it.publish(6)
        worker, results = it.workers[0], Results(it.workers[0].ring, 0)
        entries = worker.exchange(8, False) or []
        assert len(entries) == 6
        for i in range(3):
            assert worker.start(entries[i], 1)
            results.post(entries[i], Status.OK if i in ended else Status.STAGED, Encoding.MSGPACK, b"", 1)
        assert worker.start(entries[3], 1)  # it runs this one
        assert it.coordinator.take_back(0) == 2
        staged = [entries[i] for i in range(3) if i not in ended]
        assert it.coordinator.ring.claimed(0) == [*staged, entries[3]]
        assert it.coordinator.take_back(0) == 0
        assert it.coordinator.ring.claimed(0) == [*staged, entries[3]]
        assert it.coordinator.ring.peek().done_tail - it.coordinator.ring.words[80] == len(ended)


@pytest.mark.parametrize("n_takes", [1, 2, 3])
def test_what_was_taken_back_is_not_started_however_often_one_looks(n_takes: int) -> None:
    with bench(8, 1, claims_max=8) as it:
        it.publish(6)
        worker, results = it.workers[0], Results(it.workers[0].ring, 0)
        entries = worker.exchange(8, False) or []
        for entry in entries[:3]:
            assert worker.start(entry, 1)
            results.post(entry, Status.STAGED, Encoding.MSGPACK, b"", 1)
        assert [it.coordinator.take_back(0) for _ in range(n_takes)] == [3, *[0] * (n_takes - 1)]
        assert not worker.start(entries[3], 1)
        for entry in entries[:3]:
            results.finish(entry)
        again = worker.exchange(8, False) or []
        assert again == entries[3:4]  # a retried task is claimed alone
        assert worker.start(again[0], 1)


def test_a_claim_is_taken_back_after_a_look_that_found_nothing_to_take() -> None:
    with bench(8, 1, claims_max=8) as it:
        it.publish(2)
        worker, results = it.workers[0], Results(it.workers[0].ring, 0)
        for entry in worker.exchange(8, False) or []:
            assert worker.start(entry, 1)
            results.post(entry, Status.STAGED, Encoding.MSGPACK, b"", 1)
        assert it.coordinator.take_back(0) == 0
        for entry in it.coordinator.ring.claimed(0):
            results.finish(entry)
        it.publish(5)
        assert len(worker.exchange(8, False) or []) == 5
        assert it.coordinator.take_back(0) == 5


def test_a_staged_task_is_finished_or_retracted() -> None:
    with bench(2, 1) as it:
        it.publish(1)
        [entry] = it.workers[0].exchange(1, False) or []
        results = Results(it.workers[0].ring, 0)
        results.post(entry, Status.STAGED, Encoding.MSGPACK, b"abc", 7)
        ring = it.coordinator.ring
        assert ring.status(entry) is Status.STAGED
        results.finish(entry)
        assert ring.status(entry) is Status.OK
        assert results.read(entry).payload == b"abc"
        results.post(entry, Status.STAGED, Encoding.MSGPACK, b"abc", 7)
        results.retract(entry)
        assert ring.status(entry) is Status.EMPTY


def test_a_kept_segment_is_no_spoil_of_the_next_start() -> None:
    made = segment.create(1, 1, kept=True)
    try:
        assert made.name.startswith("rpj.")
        assert made.name not in segment.dead_kept()  # its owner lives
        namespace, pid, _ = made.name.split(".")[1:4]
        dead = f"rpj.{namespace}.{pid}.1.00000000"
        open(f"/dev/shm/{dead}", "w").close()
        try:
            assert dead not in leftovers.reclaim_dead()
            assert dead in segment.dead_kept()
        finally:
            segment.unlink(dead)
        assert dead not in segment.dead_kept()
    finally:
        segment.unlink(made.name)


def test_a_kept_segment_that_another_run_drains_meanwhile_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace = os.stat("/proc/self/ns/pid").st_ino
    dead, owner_of = f"rpj.{namespace}.{os.getpid()}.1.00000000", segment.owner_of

    def drained(name: str) -> object:
        if name == dead:
            segment.unlink(dead)
        return owner_of(name)

    open(f"/dev/shm/{dead}", "w").close()
    monkeypatch.setattr(segment, "owner_of", drained)
    assert dead not in segment.dead_kept()

"""What the process uses, as it tells it; and that store, locks and log get by with few descriptors."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import threading
from pathlib import Path

import pytest
from tests.workers.files import child_store
from tests.workers.files.child import Child

from ringpool.workers.files import turns
from ringpool.workers.files.lockfiles import lock_file
from ringpool.workers.files.locks import LockSet, PathLock
from ringpool.workers.files.resources import resource_stats


@pytest.mark.usefixtures("no_garbage")
def test_it_tells_what_is_open_and_what_the_limits_are(tmp_path: Path) -> None:
    before = resource_stats()
    opened = [os.open(tmp_path, os.O_RDONLY) for _ in range(5)]
    running = threading.Event()
    thread = threading.Thread(target=running.wait)
    thread.start()
    try:
        stats = resource_stats()
    finally:
        running.set()
        thread.join()
        for fd in opened:
            os.close(fd)
    assert stats.descriptors_open == before.descriptors_open + 5
    assert resource_stats().descriptors_open == before.descriptors_open
    with Child(child_store.count_descriptors) as child:
        child.wait_for("0 more than listed")
    assert stats.descriptors_max == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert stats.threads == before.threads + 1
    assert stats.rss_bytes is not None
    assert 1 << 20 < stats.rss_bytes <= stats.rss_peak_bytes * 2
    if Path("/dev/shm").is_dir():
        assert stats.shm_free_bytes is not None
        assert stats.shm_bytes is not None
        assert 0 <= stats.shm_free_bytes <= stats.shm_bytes
    json.dumps({name: getattr(stats, name) for name in stats.__struct_fields__})


@pytest.mark.usefixtures("no_garbage")
def test_the_table_of_locks_is_bounded_and_a_held_one_stays(tmp_path: Path) -> None:
    bases = [tmp_path / name for name in ("a", "b", "c")]  # each has stripes of its own, as many as the table holds
    for base in bases:
        base.mkdir()

    def lock_many(base: Path) -> None:
        for number in range(1000):
            with PathLock(base / f"{number}"):
                pass

    with PathLock(tmp_path / "held", base=tmp_path / "a"):
        lock_many(bases[0])
        lock_many(bases[1])
        stats = resource_stats()
        assert stats.lock_files_open == stats.lock_files_max
        lock_many(bases[2])
        after = resource_stats()
        assert after.lock_files_open == after.lock_files_max
        assert after.descriptors_open == stats.descriptors_open
        with pytest.raises(BlockingIOError):
            take(lock_file(os.fsencode(tmp_path / "a"), PathLock(tmp_path / "held").stripe))


@pytest.mark.usefixtures("no_garbage")
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_after_more_locks_at_once_than_the_table_has_room_for_it_is_within_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    monkeypatch.setattr(turns, "DESCRIPTORS_MAX", 4)
    sets = [LockSet([tmp_path / f"{part}-{number}" for number in range(count)]) for part, count in enumerate((3, 3, 9))]
    before = resource_stats()
    assert before.lock_files_max == 4
    for several in sets:
        several.acquire()
    held = {lock.turns[-1].stripe for several in sets for lock in several.held}
    assert resource_stats().lock_files_open == len(held) > 4
    for part in order:
        sets[part].release()
    after = resource_stats()
    assert after.lock_files_open == 4
    assert after.descriptors_open == before.descriptors_open + 4 - before.lock_files_open
    for number in range(100):  # they are opened again, and have their turn
        with PathLock(tmp_path / f"{number}", timeout_s=0), PathLock(tmp_path / f"{number}", timeout_s=0):
            assert resource_stats().lock_files_open == 4


def take(path: bytes) -> None:
    """Take a lock file as somebody else would."""
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_with_no_descriptor_left_it_still_tells_what_it_can(tmp_path: Path) -> None:
    with Child(child_store.look_without_descriptors) as child:
        child.wait_for("0 left; memory unknown; peak known")
        child.succeed()


def test_few_descriptors_are_enough_and_none_left_is_a_named_error_that_loses_nothing(tmp_path: Path) -> None:
    with Child(child_store.work_with_few_descriptors, tmp_path) as child:
        child.wait_for("worked")
        child.wait_for("failed by name")
        child.wait_for("worked again")
        child.succeed()

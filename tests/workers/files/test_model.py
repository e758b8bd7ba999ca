"""The model of the page cache: which disks a power cut can leave, and which not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from tests.workers.files.model import Recording, seen_as
from tests.workers.files.trials import room

from ringpool.workers.files.atomic import atomic_write
from ringpool.workers.files.oslayer import calls, intercepted

OLD, NEW = b"old content", b"the new content"


@pytest.fixture
def directory() -> Iterator[Path]:
    with room() as directory:
        yield directory


def outcomes(root: Path, code: Callable[[], object], *, after: bool = True) -> set[bytes | None]:
    """What a cut can leave at ``file``: of those after ``code`` has returned, or of those before."""
    recording = Recording(root, Random(1))
    with recording:
        code()
    recording.mark("returned")
    disks = [disk for disk in recording.disks(Random(1)) if bool(disk.marks) is after]
    assert disks
    return {disk.contents.get(b"file") for disk in disks}


def write_to(path: Path, content: bytes, *, sync: bool = False) -> None:
    fd = calls.open(os.fsencode(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    calls.write(fd, content)
    if sync:
        calls.fsync(fd)
    calls.close(fd)


def sync_directory(path: Path) -> None:
    fd = calls.open(os.fsencode(path), os.O_RDONLY | os.O_DIRECTORY)
    calls.fsync(fd)
    calls.close(fd)


def test_what_was_there_before_is_on_disk(directory: Path) -> None:
    (directory / "file").write_bytes(OLD)
    assert outcomes(directory, lambda: None) == {OLD}


def test_a_file_that_is_not_synced_may_be_missing_empty_torn_or_zeros(directory: Path) -> None:
    found = outcomes(directory, lambda: write_to(directory / "file", NEW))
    assert found == {None, b"", NEW[: len(NEW) // 2], bytes(len(NEW)), NEW}


def test_fsync_of_a_file_does_not_make_its_name_durable(directory: Path) -> None:
    assert outcomes(directory, lambda: write_to(directory / "file", NEW, sync=True)) == {None, NEW}


def test_fsync_of_the_directory_does_not_make_the_content_durable(directory: Path) -> None:
    def code() -> None:
        write_to(directory / "file", NEW)
        sync_directory(directory)

    found = outcomes(directory, code)
    assert b"" in found
    assert None not in found


def test_operations_that_are_not_synced_are_on_disk_in_any_combination(directory: Path) -> None:
    (directory / "file").write_bytes(OLD)
    (directory / "other").write_bytes(NEW)

    def code() -> None:
        calls.unlink(directory / "file")
        calls.rename(directory / "other", directory / "third")

    recording = Recording(directory, Random(1))
    with recording:
        code()
    found = {frozenset(disk.contents) for disk in recording.disks(Random(1))}
    assert found == {
        frozenset({b"file", b"other"}),
        frozenset({b"other"}),
        frozenset({b"file", b"third"}),
        frozenset({b"third"}),
    }


def test_a_rename_is_on_disk_with_either_of_its_directories(directory: Path) -> None:
    (directory / "inner").mkdir()
    (directory / "inner/file").write_bytes(NEW)

    def code() -> None:
        calls.rename(directory / "inner/file", directory / "file")
        sync_directory(directory / "inner")

    assert outcomes(directory, code) == {NEW}


def test_what_is_in_a_directory_goes_with_its_name(directory: Path) -> None:
    def code() -> None:
        calls.mkdir(os.fsencode(directory / "inner"))
        write_to(directory / "inner/file", NEW, sync=True)
        sync_directory(directory / "inner")

    recording = Recording(directory, Random(1))
    with recording:
        code()
    recording.mark("done")
    assert {frozenset(disk.contents) for disk in recording.disks(Random(1)) if disk.marks} == {
        frozenset(),
        frozenset({b"inner/file"}),
    }


@pytest.mark.parametrize(
    ("durability", "after"), [("full", {NEW}), ("data", {OLD, NEW}), ("atomic", {OLD, NEW, b"", bytes(len(NEW)), None})]
)
def test_an_atomic_write_leaves_what_its_level_says(directory: Path, durability: str, after: set[bytes | None]) -> None:
    (directory / "file").write_bytes(OLD)
    found = outcomes(directory, lambda: atomic_write(directory / "file", NEW, durability=durability))
    assert found - {NEW[: len(NEW) // 2]} == after - {None}
    (directory / "file").write_bytes(OLD)
    before = outcomes(directory, lambda: atomic_write(directory / "file", NEW, durability=durability), after=False)
    assert before <= after | {OLD, NEW, NEW[: len(NEW) // 2]}


def test_a_disk_can_be_made_and_is_seen_with_the_inode_numbers_of_then(directory: Path) -> None:
    live, place = directory / "live", directory / "place"
    live.mkdir()
    place.mkdir()
    (live / "file").write_bytes(OLD)
    recording = Recording(live, Random(1))
    with recording:
        number = calls.stat(live / "file").st_ino
        calls.link(live / "file", live / "second")
    *_, disk = recording.disks(Random(1))
    with disk.materialised(place) as numbers:
        assert (place / "file").read_bytes() == OLD
        assert (place / "file").samefile(place / "second")
        with intercepted(seen_as(numbers)):
            assert calls.stat(place / "second").st_ino == number
    assert not os.listdir(place)


def test_a_freed_inode_number_may_be_given_to_the_next_file(directory: Path) -> None:
    reused = set[bool]()
    for seed in range(20):
        (directory / "file").write_bytes(OLD)
        recording = Recording(directory, Random(seed))
        with recording:
            first = calls.stat(directory / "file").st_ino
            calls.unlink(directory / "file")
            write_to(directory / "file", NEW)
            second = calls.stat(directory / "file").st_ino
        reused.add(first == second)
    assert reused == {True, False}


def test_a_call_that_the_model_does_not_know_is_refused(directory: Path) -> None:
    recording = Recording(directory, Random(1))
    with recording, pytest.raises(AssertionError, match="does not know rename_backwards"):
        recording._call("rename_backwards", os.rename, (), {})

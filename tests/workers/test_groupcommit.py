"""Outputs that are put in place together: what a power cut, a death at any system call, or an error leaves of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.workers.files.model import Recording
from tests.workers.files.trials import room

from ringpool.errors import RingpoolError
from ringpool.workers import groupcommit
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.locks import PathLock
from ringpool.workers.files.oslayer import calls, intercepted
from ringpool.workers.groupcommit import StagedOutput, StagedTask, Staging, staged_name

EFFECTS = ("open", "rename", "fsync", "syncfs", "mkdir")  # the calls after which a death can matter


class Death(BaseException):
    """A process dies here."""


def content_of(number: int) -> bytes:
    return b"content %d " % number * 3


def prepare(root: Path, n: int, directories: int) -> tuple[Path, list[StagedTask]]:
    """``n`` tasks with an output each, staged; every third replaces a file."""
    staging = root / ".ringpool" / "staging"
    staging.mkdir(parents=True)
    (root / ".ringpool" / "locks").mkdir()
    tasks: list[StagedTask] = []
    for number in range(n):
        target = root / f"d{number % directories}" / f"{number}.out"
        target.parent.mkdir(exist_ok=True)
        if number % 3 == 0:
            target.write_bytes(b"old")
        path = os.fsencode(target)
        tasks.append(StagedTask(number, [StagedOutput(staged_name(os.fsencode(staging), number, 0, 0, path), path)]))
    return staging, tasks


def write_staged(tasks: list[StagedTask]) -> None:
    for task in tasks:
        for output in task.outputs:
            fd = calls.open(output.staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            calls.write(fd, content_of(task.entry))
            calls.close(fd)


def targets_of(root: Path, tasks: list[StagedTask]) -> dict[bytes, int]:
    prefix = len(os.fsencode(root)) + 1
    return {output.target[prefix:]: task.entry for task in tasks for output in task.outputs}


@pytest.mark.parametrize(("n", "directories"), [(2, 1), (4, 3), (10, 2), (10, 10)])
@pytest.mark.parametrize("level", [Durability.DATA, Durability.FULL])
def test_after_a_power_cut_each_output_is_old_or_new_and_after_the_commit_new(
    n: int, directories: int, level: Durability
) -> None:
    random = Random(n)
    with room() as root:
        staging_path, tasks = prepare(root, n, directories)
        staging = Staging([os.fsencode(staging_path)])
        with PathLock(tasks[0].outputs[0].target):
            pass
        recording = Recording(root, random)
        with recording:
            write_staged(tasks)
            staging.commit(tasks, level)
            recording.mark("returned")
        staging.close()
        assert [task.error for task in tasks] == [None] * n
        expected = targets_of(root, tasks)
        n_disks = 0
        for disk in recording.disks(random):
            n_disks += 1
            for path, number in expected.items():
                old = {b"old"} if number % 3 == 0 else {None}
                allowed = {content_of(number)} | (set() if disk.marks and level is Durability.FULL else old)
                assert disk.contents.get(path) in allowed, (path, disk.marks)
        assert n_disks > 20


def dying_at(at: int) -> Callable[..., Any]:
    """Dies before the ``at``-th call that has an effect."""
    left = at

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal left
        if name in EFFECTS:
            left -= 1
            if left < 0:
                raise Death
        return call(*args, **kwargs)

    return around


@pytest.mark.parametrize("level", [Durability.ATOMIC, Durability.FULL])
@pytest.mark.parametrize("n", [1, 3, 9])
def test_who_comes_after_a_death_finishes_what_was_begun(tmp_path: Path, n: int, level: Durability) -> None:
    at, died = 0, True
    while died:
        root = tmp_path / str(at)
        root.mkdir()
        staging_path, tasks = prepare(root, n, 2)
        write_staged(tasks)
        dead = Staging([os.fsencode(staging_path)])
        died = False
        try:
            with intercepted(dying_at(at)):
                dead.commit(tasks, level)
        except Death:
            died = True
        died = died or any(isinstance(task.error, Death) for task in tasks)
        for path, number in targets_of(root, tasks).items():
            there = root / os.fsdecode(path)
            assert not there.exists() or there.read_bytes() in (b"old", content_of(number))
        heirs = [StagedTask(task.entry, task.outputs) for task in tasks if not isinstance(task.error, Death)]
        heir = Staging([os.fsencode(staging_path)])
        heir.commit(heirs, level)
        assert [task.error for task in heirs] == [None] * len(heirs)
        for path, number in targets_of(root, heirs).items():
            assert (root / os.fsdecode(path)).read_bytes() == content_of(number)
        assert list(staging_path.iterdir()) == []
        dead.close()
        heir.close()
        at += 1
    assert at > n


def failing_at(at: int, number: int) -> Callable[..., Any]:
    left = at

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal left
        if name in EFFECTS:
            left -= 1
            if left == -1:
                raise OSError(number, os.strerror(number))
        return call(*args, **kwargs)

    return around


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("n", [3, 9])
def test_an_error_is_told_of_each_task_that_it_concerns_and_leaves_nothing(tmp_path: Path, n: int, number: int) -> None:
    n_failed = 0
    for at in range(4 * n + 8):
        root = tmp_path / str(at)
        root.mkdir()
        staging_path, tasks = prepare(root, n, 2)
        write_staged(tasks)
        staging = Staging([os.fsencode(staging_path)])
        with intercepted(failing_at(at, number)):
            staging.commit(tasks, Durability.FULL)
        staging.close()
        for task in tasks:
            found = Path(os.fsdecode(task.outputs[0].target))
            if task.error is None:
                assert found.read_bytes() == content_of(task.entry)
            else:
                n_failed += 1
                assert isinstance(task.error, RingpoolError), task.error
                assert os.strerror(number) in str(task.error)
                assert not found.exists() or found.read_bytes() in (b"old", content_of(task.entry))
        assert list(staging_path.iterdir()) == []
    assert n_failed > n


@pytest.mark.parametrize(("n", "n_elsewhere"), [(10, 10), (10, 2), (2, 10), (3, 2)])
def test_each_file_system_is_synced_before_the_first_rename_and_after_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, n_elsewhere: int
) -> None:
    """The first ``n`` tasks have an output here and, the first ``n_elsewhere`` of them, one elsewhere as well."""
    monkeypatch.setattr(groupcommit, "is_synced_whole", lambda _fd: True)
    here, tasks = prepare(tmp_path / "here", n, n)
    elsewhere, others = prepare(tmp_path / "elsewhere", n_elsewhere, n_elsewhere)
    write_staged([*tasks, *others])
    for task, other in zip(tasks, others, strict=False):
        task.outputs = [*task.outputs, *other.outputs]
    tasks += others[n:]
    staging = Staging([os.fsencode(here), os.fsencode(elsewhere)])
    done: list[tuple[str, bytes]] = []

    def note(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in ("rename", "fsync", "syncfs"):
            fd_or_path = args[0]
            path = os.readlink(f"/proc/self/fd/{fd_or_path}").encode() if isinstance(fd_or_path, int) else args[1]
            done.append((name, path))
        return call(*args, **kwargs)

    with intercepted(note):
        staging.commit(tasks, Durability.FULL)
    staging.close()
    assert [task.error for task in tasks] == [None] * len(tasks)
    renames = [at for at, (name, _) in enumerate(done) if name == "rename"]
    before, after = done[: renames[0]], done[renames[-1] :]
    outputs = [output for task in tasks for output in task.outputs]
    for place in (here, elsewhere):
        those = [output for output in outputs if output.staged.startswith(os.fsencode(place))]
        if len(those) >= groupcommit.TOGETHER_MIN:
            assert [("syncfs", os.fsencode(place))] == [one for one in before if one[1] == os.fsencode(place)]
            assert ("syncfs", os.fsencode(place)) in after
        else:
            assert {("fsync", output.staged) for output in those} <= set(before)
            assert {("fsync", os.path.dirname(output.target)) for output in those} <= set(after)


def test_an_error_of_one_file_system_fails_those_that_have_an_output_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groupcommit, "is_synced_whole", lambda _fd: True)
    here, tasks = prepare(tmp_path / "here", 10, 2)
    elsewhere, others = prepare(tmp_path / "elsewhere", 10, 2)
    write_staged([*tasks, *others])
    staging = Staging([os.fsencode(here), os.fsencode(elsewhere)])

    def fail(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "syncfs" and os.readlink(f"/proc/self/fd/{args[0]}") == str(elsewhere):
            raise OSError(errno.EIO, "no more")
        return call(*args, **kwargs)

    with intercepted(fail):
        staging.commit([*tasks, *others], Durability.DATA)
    staging.close()
    assert [task.error for task in tasks] == [None] * 10
    assert all("no more" in str(task.error) for task in others)


def test_one_that_fails_does_not_hold_up_the_others(tmp_path: Path) -> None:
    staging_path, tasks = prepare(tmp_path, 5, 2)
    write_staged(tasks)
    target = Path(os.fsdecode(tasks[1].outputs[0].target))
    target.mkdir()
    staging = Staging([os.fsencode(staging_path)])
    staging.commit(tasks, Durability.FULL)
    staging.close()
    assert [task.error is None for task in tasks] == [True, False, True, True, True]
    assert str(target) in str(tasks[1].error)


def test_an_older_output_is_not_taken_for_one_whose_file_a_stranger_has_removed(tmp_path: Path) -> None:
    staging_path, tasks = prepare(tmp_path, 2, 1)
    write_staged(tasks)
    for task in tasks:
        [output] = task.outputs
        found = os.stat(output.staged)
        task.outputs = [output._replace(device=found.st_dev, inode=found.st_ino)]
        os.replace(output.staged, output.target) if task.entry else os.unlink(output.staged)
    staging = Staging([os.fsencode(staging_path)])
    staging.commit(tasks, Durability.ATOMIC)
    staging.close()
    assert isinstance(tasks[0].error, RingpoolError), "the old content stands there"
    assert tasks[1].error is None, "it was put in its place before"


def test_a_directory_that_was_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    staging_path, tasks = prepare(tmp_path, 3, 3)
    write_staged(tasks)
    (tmp_path / "d1").rmdir()
    staging = Staging([os.fsencode(staging_path)])
    staging.commit(tasks, Durability.ATOMIC)
    staging.close()
    assert [task.error for task in tasks] == [None] * 3
    assert (tmp_path / "d1/1.out").read_bytes() == content_of(1)


def test_a_directory_that_was_removed_after_it_was_locked_in_is_made_again(tmp_path: Path) -> None:
    staging_path, tasks = prepare(tmp_path, 4, 2)
    write_staged(tasks)
    staging = Staging([os.fsencode(staging_path)])
    staging.commit(tasks[:2], Durability.ATOMIC)  # now it knows both directories
    (tmp_path / "d1/1.out").unlink()
    (tmp_path / "d1/3.out").unlink()
    (tmp_path / "d1").rmdir()
    staging.commit(tasks[2:], Durability.ATOMIC)
    staging.close()
    assert [task.error for task in tasks] == [None] * 4
    assert (tmp_path / "d1/3.out").read_bytes() == content_of(3)


def test_a_link_of_the_target_is_put_in_its_place_too(tmp_path: Path) -> None:
    staging_path, tasks = prepare(tmp_path, 1, 1)
    [output] = tasks[0].outputs
    os.link(output.target, output.staged)  # rename(2) of two names of one file does nothing
    tasks[0].outputs = [output._replace(is_linked=True)]
    staging = Staging([os.fsencode(staging_path)])
    staging.commit(tasks, Durability.FULL)
    staging.close()
    assert tasks[0].error is None
    assert list(staging_path.iterdir()) == []
    assert Path(os.fsdecode(output.target)).read_bytes() == b"old"


@pytest.mark.parametrize("character", ["é", "€", "😀"])
@pytest.mark.parametrize("n_before", range(4))
def test_a_long_name_is_cut_between_two_characters(character: str, n_before: int) -> None:
    name = "n" * 60 + character * (160 // len(character.encode())) + "n" * n_before + ".gz"
    tail = os.path.basename(staged_name(b"/s", 1, 0, 0, b"/t/" + name.encode())).partition(b".0.0.")[2].decode()
    assert name.endswith(tail)
    assert 156 < len(tail.encode()) <= 160


def test_a_long_name_that_is_no_text_is_cut_where_it_must_be() -> None:
    assert staged_name(b"/s", 1, 0, 0, b"/t/" + b"\x80" * 240).endswith(b"/1.0.0." + b"\x80" * 160)


def test_a_long_name_is_cut_and_keeps_its_suffix() -> None:
    staged = staged_name(b"/s", (1 << 36) - 1, 63, 9, b"/t/" + b"n" * 240 + b".tar.gz")
    assert len(os.path.basename(staged)) <= 255
    assert staged.endswith(b"n.tar.gz")
    assert groupcommit.NAME_TAIL_BYTES < 255

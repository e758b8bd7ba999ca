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
        staging = Staging(os.fsencode(staging_path))
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
        dead = Staging(os.fsencode(staging_path))
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
        heir = Staging(os.fsencode(staging_path))
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
        staging = Staging(os.fsencode(staging_path))
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


def test_one_that_fails_does_not_hold_up_the_others(tmp_path: Path) -> None:
    staging_path, tasks = prepare(tmp_path, 5, 2)
    write_staged(tasks)
    target = Path(os.fsdecode(tasks[1].outputs[0].target))
    target.mkdir()
    staging = Staging(os.fsencode(staging_path))
    staging.commit(tasks, Durability.FULL)
    staging.close()
    assert [task.error is None for task in tasks] == [True, False, True, True, True]
    assert str(target) in str(tasks[1].error)


def test_a_directory_that_was_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    staging_path, tasks = prepare(tmp_path, 3, 3)
    write_staged(tasks)
    (tmp_path / "d1").rmdir()
    staging = Staging(os.fsencode(staging_path))
    staging.commit(tasks, Durability.ATOMIC)
    staging.close()
    assert [task.error for task in tasks] == [None] * 3
    assert (tmp_path / "d1/1.out").read_bytes() == content_of(1)


def test_a_directory_that_was_removed_after_it_was_locked_in_is_made_again(tmp_path: Path) -> None:
    staging_path, tasks = prepare(tmp_path, 4, 2)
    write_staged(tasks)
    staging = Staging(os.fsencode(staging_path))
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
    staging = Staging(os.fsencode(staging_path))
    staging.commit(tasks, Durability.FULL)
    staging.close()
    assert tasks[0].error is None
    assert list(staging_path.iterdir()) == []
    assert Path(os.fsdecode(output.target)).read_bytes() == b"old"


def test_a_long_name_is_cut_and_keeps_its_suffix() -> None:
    staged = staged_name(b"/s", (1 << 36) - 1, 63, 9, b"/t/" + b"n" * 240 + b".tar.gz")
    assert len(os.path.basename(staged)) <= 255
    assert staged.endswith(b"n.tar.gz")
    assert groupcommit.NAME_TAIL_BYTES < 255

"""The steps that make a write durable: new directories, each on disk before anything is made in it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.workers.files.child_atomic import (
    identity,
    names,
    one_inode,
    synced,
    traced,
)

from ringpool.errors import AtomicWriteError
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.output import (
    prepare_target,
)


def test_a_new_directory_is_on_disk_before_anything_is_made_in_it(tmp_path: Path) -> None:
    target = os.fsencode(tmp_path / "x/y/z/a")
    with traced() as trace:
        prepare_target(target, Durability.FULL)
    opened: dict[int, tuple[int, int]] = {}
    story: list[tuple[str, Any]] = []
    for name, args, result in trace:
        if name == "open":
            opened[result] = identity(args[0])
        elif name == "fsync":
            story.append((name, opened[args[0]]))
        elif name == "mkdir":
            story.append((name, identity(args[0])))
    where = [identity(os.fsencode(tmp_path / part)) for part in ("", "x", "x/y", "x/y/z")]
    assert story == [pair for n in range(3) for pair in (("mkdir", where[n + 1]), ("fsync", where[n]))]
    with traced() as trace:
        prepare_target(target, Durability.FULL)
    assert synced(trace) == []  # remembered


def test_a_directory_that_a_neighbour_may_have_left_unsynced_is_synced_once(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    stories: list[list[str]] = []
    for level in (Durability.DATA, Durability.FULL, Durability.FULL):
        with traced() as trace:
            prepare_target(os.fsencode(tmp_path / "theirs/a"), level)
        stories.append(synced(trace))
    assert stories == [[], ["directory"], []]


def test_a_directory_that_has_got_the_inode_of_a_durable_one_is_synced(tmp_path: Path) -> None:
    with one_inode(tmp_path / "daily"):
        for _ in range(2):  # the second is somebody else's, who has promised nothing
            (tmp_path / "daily").mkdir()
            stories: list[list[str]] = []
            for _ in range(2):
                with traced() as trace:
                    prepare_target(os.fsencode(tmp_path / "daily/a"), Durability.FULL)
                stories.append(synced(trace))
            assert stories == [["directory"], []]
            (tmp_path / "daily").rmdir()


def test_neighbours_may_make_one_directory_at_once(tmp_path: Path) -> None:
    target = os.fsencode(tmp_path / "x/y/z/a")

    def faster(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "mkdir":
            with suppress(FileExistsError):
                os.mkdir(args[0])
        return call(*args, **kwargs)

    with intercepted(faster):
        assert prepare_target(target) == target
    assert (tmp_path / "x/y/z").is_dir()


@pytest.mark.parametrize("path", ["file/x/a", "file/a"])
def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AtomicWriteError) as caught:
        prepare_target(os.fsencode(tmp_path / path))
    assert str(tmp_path / "file") in str(caught.value)
    assert caught.value.errno == errno.ENOTDIR


def test_a_directory_that_is_named_by_way_of_a_missing_one_is_made(tmp_path: Path) -> None:
    assert prepare_target(os.fsencode(tmp_path / "new/../a")) == os.fsencode(tmp_path / "new/../a")
    assert names(tmp_path) == {"new"}

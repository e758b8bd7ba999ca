"""A task's output: its staging, its final name, and what the disk tells after a death."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.workers.files.child_atomic import (
    failing,
    identity,
    mode_of,
    names,
)

from ringpool.errors import OutputMissingError
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.oslayer import calls
from ringpool.workers.files.output import (
    CommitSide,
    StagedFile,
    discard_staged,
    finish_staged,
    which_side,
)
from ringpool.workers.groupcommit import StagedOutput, StagedTask, StagingBeside


def put_in_place(staged: bytes, target: bytes, file: StagedFile) -> None:
    task = StagedTask(0, (StagedOutput(staged, target, file.n_links > 1, file.dev, file.ino),))
    staging = StagingBeside()
    staging.expect(target)
    staging.commit((task,), Durability.FULL)
    assert task.error is None


def make_socket(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.fspath(path))


@pytest.mark.parametrize(
    "make",
    [
        lambda _: None,
        lambda path: path.mkdir(),
        lambda path: (path / "deep").mkdir(parents=True),
        lambda path: path.symlink_to("/etc/hostname"),
        lambda path: os.mkfifo(path),
        make_socket,
    ],
    ids=["nothing", "directory", "tree", "symlink", "pipe", "socket"],
)
def test_a_function_that_wrote_no_regular_file_is_told_so(
    tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make(Path("s"))
    with pytest.raises(OutputMissingError) as caught:
        finish_staged(b"s", b"a")
    assert (caught.value.output, caught.value.staged) == ("a", "s")
    discard_staged(b"s")
    assert names(tmp_path) == set()


def test_finishing_tells_the_identity_that_the_file_keeps(tmp_path: Path) -> None:
    staged, target = os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a")
    (tmp_path / "s").write_text("four")
    file = finish_staged(staged, target)
    assert file.size == 4
    assert which_side(staged, target, file.ino, file.dev) is CommitSide.STAGED
    put_in_place(staged, target, file)
    assert which_side(staged, target, file.ino, file.dev) is CommitSide.TARGET
    assert identity(target) == (file.dev, file.ino)


@pytest.mark.parametrize(
    ("staged", "target", "side"),
    [
        ("it", None, CommitSide.STAGED),
        ("it", "other", CommitSide.STAGED),
        ("it", "it", CommitSide.STAGED),
        (None, "it", CommitSide.TARGET),
        (None, "other", CommitSide.UNKNOWN),
        (None, None, CommitSide.UNKNOWN),
        ("other", None, CommitSide.UNKNOWN),
        ("other", "it", CommitSide.UNKNOWN),
    ],
)
def test_the_disk_tells_on_which_side_of_the_commit_a_writer_died(
    tmp_path: Path, staged: str | None, target: str | None, side: CommitSide
) -> None:
    for file in ("it", "other"):
        (tmp_path / file).touch()
    for place, file in (("s", staged), ("a", target)):
        if file is not None:
            (tmp_path / place).hardlink_to(tmp_path / file)
    device, inode = identity(os.fsencode(tmp_path / "it"))
    assert which_side(os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a"), inode, device) is side


def test_a_disk_that_cannot_be_read_leaves_the_commit_in_doubt(tmp_path: Path) -> None:
    (tmp_path / "s").touch()
    device, inode = identity(os.fsencode(tmp_path / "s"))
    with failing(lambda *_: True, errno.EIO):
        side = which_side(os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a"), inode, device)
    assert side is CommitSide.UNKNOWN


def test_an_output_that_is_a_link_of_its_target_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("same")
    (tmp_path / "s").hardlink_to(tmp_path / "a")
    staged, target = os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a")
    file = finish_staged(staged, target)
    put_in_place(staged, target, file)
    assert names(tmp_path) == {"a"}


def test_an_output_that_is_a_link_of_its_input_does_not_change_the_input(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("same")
    (tmp_path / "source").chmod(0o444)
    (tmp_path / "a").touch(0o600)
    (tmp_path / "s").hardlink_to(tmp_path / "source")
    finish_staged(os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a"))
    assert mode_of(tmp_path / "source") == 0o444


def test_discarding_what_is_not_there_is_fine(tmp_path: Path) -> None:
    discard_staged(os.fsencode(tmp_path / "s"))
    assert calls.access(tmp_path, os.F_OK)


def test_an_output_without_predecessor_keeps_the_mode_that_its_function_gave_it(tmp_path: Path) -> None:
    staged, target = os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a")
    (tmp_path / "s").touch(0o600)
    (tmp_path / "s").chmod(0o711)
    file = finish_staged(staged, target)
    put_in_place(staged, target, file)
    assert mode_of(tmp_path / "a") == 0o711


def test_an_attribute_that_the_function_set_is_not_overwritten(tmp_path: Path) -> None:
    staged, target = os.fsencode(tmp_path / "s"), os.fsencode(tmp_path / "a")
    for path, value in ((staged, b"new"), (target, b"old")):
        Path(os.fsdecode(path)).touch()
        try:
            os.setxattr(path, "user.origin", value)
        except OSError:
            pytest.skip("this file system has no such attributes")
    finish_staged(staged, target)
    assert os.getxattr(staged, "user.origin") == b"new"

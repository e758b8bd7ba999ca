"""Replacements at their limits: paths that can hold no file, full and read-only disks, processes at their limits."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.workers.files.child import Child
from tests.workers.files.child_atomic import (
    LEVELS,
    WRITERS,
    names,
)

from ringpool.errors import AtomicWriteError, FileOperationError, PathNameError
from ringpool.workers.files.atomic import atomic_write
from ringpool.workers.files.durability import Durability

PUBLIC = ["write", "stream", "batch"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "ringpool-test", os.fspath(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", os.fspath(place)], check=True)  # lock files on it stay open


@pytest.mark.parametrize("writer", PUBLIC)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("path", "kind", "error"),
    [
        ("", PathNameError, errno.EINVAL),
        ("a\0b", PathNameError, errno.EINVAL),
        ("a\0/b", PathNameError, errno.EINVAL),
        ("n" * 256, AtomicWriteError, errno.ENAMETOOLONG),
        ("d/" * 2100 + "n", AtomicWriteError, errno.ENAMETOOLONG),
        (".", AtomicWriteError, errno.EISDIR),
        ("..", AtomicWriteError, errno.EISDIR),
        ("/", AtomicWriteError, errno.EISDIR),
        ("directory", AtomicWriteError, errno.EISDIR),
        ("directory/", AtomicWriteError, errno.EISDIR),
        ("file/a", AtomicWriteError, errno.ENOTDIR),
        ("none/a", AtomicWriteError, errno.ENOENT),
        ("circle/a", AtomicWriteError, errno.ELOOP),
    ],
    ids=lambda value: ascii(value)[:12],
)
def test_a_path_that_can_hold_no_file_is_a_named_error(
    tmp_path: Path,
    writer: str,
    level: Durability,
    path: str,
    kind: type[FileOperationError],
    error: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("directory").mkdir()
    Path("file").write_text("old")
    Path("circle").symlink_to("circle")
    with pytest.raises(kind) as caught:
        WRITERS[writer](path, b"new", level)  # type: ignore[arg-type]
    assert (caught.value.errno, caught.value.path) == (error, path)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    assert names(tmp_path) == {"directory", "file", "circle"}
    assert names(tmp_path / "directory") == set()
    assert Path("file").read_text() == "old"


@pytest.mark.parametrize("path", ["", "a\0b", "n" * 256, "directory", "none/a"])
def test_a_path_that_can_hold_no_file_is_a_named_error_for_an_overwrite_too(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("directory").mkdir()
    with pytest.raises(FileOperationError):
        atomic_write(path, b"new", durability="none")
    assert names(tmp_path) == {"directory"}


@pytest.mark.parametrize("writer", PUBLIC)
@pytest.mark.parametrize("level", LEVELS)
def test_a_full_and_a_read_only_file_system_keep_the_old_content(
    small_disk: Path, writer: str, level: Durability
) -> None:
    path = small_disk / "a"
    path.write_text("old")
    with pytest.raises(AtomicWriteError) as caught:
        WRITERS[writer](path, b"x" * 100_000, level)
    assert caught.value.errno == errno.ENOSPC
    assert (path.read_text(), names(small_disk)) == ("old", {"a"})
    WRITERS[writer](path, b"fits", level)
    subprocess.run(["mount", "-o", "remount,ro", os.fspath(small_disk)], check=True)
    with pytest.raises(AtomicWriteError) as caught:
        WRITERS[writer](path, b"new", level)
    assert caught.value.errno == errno.EROFS
    assert (path.read_text(), names(small_disk)) == ("fits", {"a"})


@pytest.mark.parametrize("writer", WRITERS)
def test_a_link_to_another_file_system_is_followed(small_disk: Path, tmp_path: Path, writer: str) -> None:
    (small_disk / "b").write_text("old")
    (tmp_path / "a").symlink_to(small_disk / "b")
    WRITERS[writer](tmp_path / "a", b"new", Durability.FULL)
    assert (small_disk / "b").read_text() == "new"
    assert (names(tmp_path), names(small_disk)) == ({"a", "disk"}, {"b"})


@pytest.mark.parametrize("writer", PUBLIC)
def test_a_process_at_its_limits_gets_a_named_error(tmp_path: Path, writer: str) -> None:
    with Child(write_at_the_limits, tmp_path, writer) as child:
        child.succeed()


def write_at_the_limits(directory: str, writer: str) -> None:
    path = Path(directory, "a")
    path.write_text("old")
    WRITERS[writer](Path(directory, "b"), b"", Durability.FULL)  # what is imported late is imported now
    first_free = os.open(directory, os.O_RDONLY)
    os.close(first_free)
    for n_left in (0, 1):
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + n_left, 4096))
        assert failed_with(writer, path, b"new") == errno.EMFILE
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert failed_with(writer, path, b"x" * 200_000) == errno.EFBIG
    assert path.read_text() == "old"
    assert names(Path(directory)) == {"a", "b"}


def failed_with(writer: str, path: Path, content: bytes) -> int | None:
    """The errno of the named error."""
    try:
        WRITERS[writer](path, content, Durability.FULL)
    except AtomicWriteError as error:
        return error.errno
    return None

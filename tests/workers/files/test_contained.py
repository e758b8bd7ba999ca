"""Containment: no path leads out of its base, by text, by link, or by a link that is swapped in meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.workers.files.child import Child
from tests.workers.files.child_atomic import failing, names, open_files, traced
from tests.workers.files.child_contained import swap_for_ever

from ringpool.errors import AtomicWriteError, FileOperationError, PathNameError, PathOutsideError
from ringpool.workers.files.atomic import atomic_open, atomic_write
from ringpool.workers.files.contained import Contained
from ringpool.workers.files.oslayer import calls

WAYS = ["openat2", "walked"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of resolving a path: by the kernel, and by us where it has no openat2."""

    def not_there(*_: Any) -> int:
        raise OSError(errno.ENOSYS, "")

    if request.param == "walked":
        monkeypatch.setattr(calls, "openat2", not_there)
    return request.param


@pytest.fixture
def base(tmp_path: Path, way: str) -> Iterator[Path]:
    files = open_files()
    base = tmp_path / "base"
    (base / "a/b").mkdir(parents=True)
    (tmp_path / "outside/c").mkdir(parents=True)
    for link, target in {
        "absolute": "/etc",
        "back": str(base / "a"),
        "up": "../outside",
        "far": "a/../../outside",
        "a/round": "../a/b",
        "inside": "a/b",
        "circle": "circle",
        "nowhere": "a/none",
        "name": "a/target",
        "chain": "name",
        "escape": "../outside/file",
        "slash": "/etc/hostname",
        "proc": "/proc/self/root",
        "here": ".",
    }.items():
        (base / link).symlink_to(target)
    yield base
    assert open_files() <= files
    assert names(tmp_path / "outside") == {"c"}


def resolved(base: Path, path: Any) -> tuple[Path, bytes]:
    fd, name = Contained(base).open_parent(path)
    try:
        return Path(os.readlink(f"/proc/self/fd/{fd}")), name
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("path", "directory", "name"),
    [
        ("x", "", b"x"),
        (b"a/x", "a", b"x"),
        (Path("a/b/x"), "a/b", b"x"),
        ("./a//b/./x", "a/b", b"x"),
        ("inside/x", "a/b", b"x"),
        ("a/round/x", "a/b", b"x"),
        ("here/here/x", "", b"x"),
        ("name", "a", b"target"),
        ("chain", "a", b"target"),
        ("nowhere", "a", b"none"),
        ("inside", "a", b"b"),
        ("n" * 255, "", b"n" * 255),
        (b"a/caf\xe9\xff", "a", b"caf\xe9\xff"),
        ("...", "", b"..."),
    ],
    ids=ascii,
)
def test_a_path_inside_is_resolved(base: Path, path: Any, directory: str, name: bytes) -> None:
    assert resolved(base, path) == (base / directory, name)
    assert Contained(base).path(path) == os.path.normpath(os.path.join(os.fsencode(base), os.fsencode(path)))


@pytest.mark.parametrize(
    ("path", "kind", "error"),
    [
        ("", PathNameError, errno.EINVAL),
        (".", PathNameError, errno.EISDIR),
        ("a/", PathNameError, errno.EISDIR),
        ("a\0b", PathNameError, errno.EINVAL),
        ("n" * 256, PathNameError, errno.ENAMETOOLONG),
        ("n" * 256 + "/x", PathNameError, errno.ENAMETOOLONG),
        (".rp-0123456789abcdef.txt", PathNameError, errno.EINVAL),
        (".ringpool/txn/x", PathNameError, errno.EINVAL),
        ("..", PathOutsideError, errno.EXDEV),
        ("../base/x", PathOutsideError, errno.EXDEV),
        ("a/../x", PathOutsideError, errno.EXDEV),
        ("/etc/passwd", PathOutsideError, errno.EXDEV),
        ("//x", PathOutsideError, errno.EXDEV),
        ("absolute/x", PathOutsideError, errno.EXDEV),
        ("back/x", PathOutsideError, errno.EXDEV),
        ("up/x", PathOutsideError, errno.EXDEV),
        ("far/c/x", PathOutsideError, errno.EXDEV),
        ("proc/x", PathOutsideError, errno.EXDEV),
        ("escape", PathOutsideError, errno.EXDEV),
        ("slash", PathOutsideError, errno.EXDEV),
        ("up", PathOutsideError, errno.EXDEV),
        ("circle", FileOperationError, errno.ELOOP),
        ("circle/x", FileOperationError, errno.ELOOP),
        ("here", FileOperationError, errno.EISDIR),
    ],
    ids=ascii,
)
def test_a_path_that_leads_out_or_names_no_file_is_refused(
    base: Path, path: str, kind: type[FileOperationError], error: int
) -> None:
    contained = Contained(base)
    for use in (contained.open_parent, contained.path, lambda path: contained.open_parent(path, create=True)):
        with pytest.raises(kind) as caught:
            use(path)
        assert caught.value.errno == error


@pytest.mark.parametrize("path", ["none/x", "nowhere/x"])
def test_a_directory_that_is_missing_is_named(base: Path, path: str) -> None:
    with pytest.raises(FileOperationError, match=path) as caught:
        Contained(base).open_parent(path)
    assert caught.value.errno == errno.ENOENT
    assert Contained(base).path(path) == os.fsencode(base / path)  # for a lock, before it is made
    with pytest.raises(FileOperationError, match="not there"):
        Contained(base / "not there").open_parent("x")


def test_a_link_is_left_alone_where_that_is_asked_for(base: Path) -> None:
    fd, name = Contained(base).open_parent("escape", follow=False)
    os.close(fd)
    assert name == b"escape"


def test_a_directory_is_opened_by_its_own_path(base: Path) -> None:
    for path, directory in ((".", base), ("a/b", base / "a/b"), ("inside", base / "a/b")):
        fd = Contained(base).open_directory(path)
        assert Path(os.readlink(f"/proc/self/fd/{fd}")) == directory
        os.close(fd)
    with pytest.raises(PathOutsideError):
        Contained(base).open_directory("up")


def test_missing_directories_are_made_and_are_on_disk(base: Path) -> None:
    with traced() as trace:
        fd, name = Contained(base).open_parent("inside/x/y/file", create=True)
    os.close(fd)
    assert name == b"file"
    assert (base / "a/b/x/y").is_dir()
    story = [call for call, _, _ in trace if call in ("mkdir", "fsync")]
    assert story[-4:] == ["mkdir", "fsync", "mkdir", "fsync"]
    with traced() as trace:
        os.close(Contained(base).open_parent("inside/x/y/file", create=True)[0])
    assert "fsync" not in [call for call, _, _ in trace]  # remembered


@pytest.mark.parametrize("path", ["up/new/x", "absolute/new/x", "nowhere/x"])
def test_no_directory_is_made_outside_or_through_a_link_to_nowhere(base: Path, path: str) -> None:
    with pytest.raises(FileOperationError):
        Contained(base).open_parent(path, create=True)


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE, errno.ENOSPC])
def test_any_call_may_fail_and_nothing_stays_open(base: Path, error: int) -> None:
    files = open_files()
    n_failed = 0
    for nth in range(1, 400):
        raised: FileOperationError | None = None
        with failing(lambda n, _, nth=nth: n == nth, error) as seen:
            try:
                os.close(Contained(base).open_parent(f"a/round/new{nth}/deep/x", create=True)[0])
            except FileOperationError as failure:
                raised = failure
        assert open_files() <= files, seen
        assert raised is None or raised.errno == error
        n_failed += raised is not None
        if len(seen) < nth:
            break
    assert n_failed > 10


@pytest.mark.parametrize("refusal", [errno.ENOSYS, errno.EPERM])
def test_a_kernel_or_sandbox_without_openat2_is_no_obstacle(base: Path, refusal: int) -> None:
    with failing(lambda _, name: name == "openat2", refusal):
        assert resolved(base, "inside/x") == (base / "a/b", b"x")
        with pytest.raises(PathOutsideError):
            resolved(base, "up/x")


def test_renames_elsewhere_that_disturb_openat2_again_and_again_are_no_obstacle(base: Path) -> None:
    for n_disturbed in (3, 1000):
        with failing(lambda n, name, most=n_disturbed: name == "openat2" and n <= most, errno.EAGAIN):
            assert resolved(base, "a/round/x") == (base / "a/b", b"x")


def test_a_symlink_that_is_swapped_in_again_and_again_never_leads_out(base: Path, tmp_path: Path) -> None:
    (base / "way").mkdir()
    contained = Contained(base)
    inside = {base / "way", base / "away"}
    n_refused = n_inside = 0
    with Child(swap_for_ever, base, tmp_path / "outside") as child:
        child.wait_for("swapping")
        while n_inside < 200 or n_refused < 200:
            fd = -1
            try:
                fd, name = contained.open_parent("way/file")
                atomic_write(name, b"inside", durability="atomic", dir_fd=fd)
                assert Path(os.readlink(f"/proc/self/fd/{fd}")) in inside
                n_inside += 1
            except PathOutsideError:
                n_refused += 1
            except FileOperationError as disturbed:
                if disturbed.errno not in (errno.ENOENT, errno.ENOTDIR):  # neither was there
                    raise
            finally:
                if fd >= 0:
                    os.close(fd)
        child.kill()


def test_a_write_by_directory_takes_a_name_and_follows_no_link(base: Path) -> None:
    fd = os.open(base, os.O_RDONLY)
    try:
        for level in ("none", "atomic", "full"):
            for name in ("escape", "slash", "name"):
                with pytest.raises(FileOperationError) as caught:
                    atomic_write(name, b"new", dir_fd=fd, durability=level)
                assert caught.value.errno == errno.ELOOP
            for name in ("a/x", "../outside/x", "/etc/x", ""):
                with pytest.raises(PathNameError):
                    atomic_write(name, b"new", dir_fd=fd, durability=level)
            atomic_write("plain", level, dir_fd=fd, durability=level, mode=0o600)
            assert (base / "plain").read_text() == level
        with pytest.raises(AtomicWriteError):
            atomic_open("escape", dir_fd=fd)
        with atomic_open("plain", "w", dir_fd=fd) as file:
            file.write("streamed")
    finally:
        os.close(fd)
    assert (base / "plain").read_text() == "streamed"
    assert (base / "escape").is_symlink()

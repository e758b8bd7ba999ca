"""Which lock file is a path's: one for all spellings of it; and which file systems are network file systems."""

from __future__ import annotations

import errno
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.workers.files.child import Child
from tests.workers.files.child_locks import (
    hold,
    hold_softly,
    in_a_thread,
    is_free,
    lock_file,
    try_it,
)

from ringpool.errors import FileOperationError, LockTimeoutError
from ringpool.workers.files import lockfiles
from ringpool.workers.files.errorlog import ErrorLog
from ringpool.workers.files.lockfiles import file_system_of, is_network, root_of
from ringpool.workers.files.locks import PathLock
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.store import FileStore
from ringpool.workers.files.transaction import FileTransaction

USER = 12345  # nobody's

# ---- one file, one lock file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Readme.TXT", "README.txt"),
        ("stra\u00dfe", "STRASSE"),
        ("\u00c9t\u00e9", "e\u0301te\u0301"),
        ("\udcffA", "\udcffa"),
    ],
)
def test_spellings_that_differ_in_case_are_one_lock(tmp_path: Path, one: str, other: str) -> None:
    """Mistake 28: where a directory ignores case they are one file; a table of locks by path has two."""
    assert len({os.path.realpath(tmp_path / one), os.path.realpath(tmp_path / other)}) == 2, "the naive way sees two"
    assert PathLock(tmp_path / one).stripe == PathLock(tmp_path / other).stripe
    with Child(hold, tmp_path / one) as child:
        child.wait_for("held")
        with pytest.raises(LockTimeoutError):
            PathLock(tmp_path / other, timeout_s=0).acquire()


def test_a_bind_mount_leads_to_the_same_lock(tmp_path: Path) -> None:
    """Mistake 28: a lock by real path makes two of them, and so does one by the path as it was given."""
    (tmp_path / "real").mkdir()
    (tmp_path / "bound").mkdir()
    program = (
        "import sys; from ringpool import PathLock; from ringpool.errors import LockTimeoutError\n"
        "with PathLock(sys.argv[1]):\n"
        "    pass\n"
        "print('free', flush=True); sys.stdin.readline()\n"
        "try:\n"
        "    PathLock(sys.argv[1], timeout_s=0).acquire()\n"
        "except LockTimeoutError:\n"
        "    print('held')\n"
    )
    mount = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$2/a"'
    arguments = [tmp_path / "real", tmp_path / "bound", sys.executable, program]
    child = subprocess.Popen(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    if child.stdout.readline() != "free\n":
        pytest.skip(f"no bind mount here: {child.communicate()[1]}")
    with PathLock(tmp_path / "real/a"):
        told, _ = child.communicate("\n", timeout=30)
    assert told == "held\n"
    assert os.path.realpath(tmp_path / "bound/a") != os.path.realpath(tmp_path / "real/a"), "the naive way sees two"


def test_the_spellings_of_a_file_are_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "alias").symlink_to("real/deep/a")
    monkeypatch.chdir(tmp_path / "real")
    with Child(hold, tmp_path / "real/deep/a") as child:
        child.wait_for("held")
        spellings = [
            tmp_path / "link/deep/a",
            tmp_path / "real/../real/deep/a",
            tmp_path / "alias",
            "deep/a",
            os.fsencode(tmp_path / "link/deep/./a"),
        ]
        for path in spellings:
            with pytest.raises(LockTimeoutError):
                PathLock(path, timeout_s=0).acquire()
    assert (tmp_path / "real/deep/.ringpool").is_dir()
    assert sorted(os.listdir(tmp_path)) == ["alias", "link", "real"]


def test_a_directory_that_is_renamed_is_not_looked_for_at_its_old_place(tmp_path: Path) -> None:
    (tmp_path / "x/y").mkdir(parents=True)
    (tmp_path / "link").symlink_to("x/y")
    with PathLock(tmp_path / "link/a"):
        pass
    (tmp_path / "x").rename(tmp_path / "z")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("z/y")
    with PathLock(tmp_path / "link/a"), Child(try_it, tmp_path / "z/y/a") as child:
        child.wait_for("taken by somebody else")
    assert not (tmp_path / "x").exists()


def test_the_outermost_ringpool_directory_holds_the_lock_files(tmp_path: Path) -> None:
    (tmp_path / "x/y").mkdir(parents=True)
    lock = PathLock(tmp_path / "x/y/a")
    for base in ("x/y", "x", ""):
        (tmp_path / base / ".ringpool").mkdir(exist_ok=True)
        with lock:
            assert not is_free(lock_file(tmp_path / base, lock))


def test_the_caller_may_name_the_base(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "locks").mkdir()
    lock = PathLock(tmp_path / "x/a", base=tmp_path / "locks")
    with lock:
        assert not is_free(lock_file(tmp_path / "locks", lock))
    assert os.listdir(tmp_path / "x") == []


def test_a_neighbour_that_made_a_ringpool_directory_further_out_is_followed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    lock = PathLock(tmp_path / "x/a")

    def meanwhile(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "mkdir":
            (tmp_path / ".ringpool").mkdir(exist_ok=True)
        return call(*args, **kwargs)

    with intercepted(meanwhile):
        lock.acquire()
    try:
        assert not is_free(lock_file(tmp_path, lock))
    finally:
        lock.release()


def test_nothing_is_made_beside_the_files_but_the_ringpool_directory(tmp_path: Path) -> None:
    for name in (b"a", b"n" * 254, b"caf\xe9\xff", b"a\nb"):
        with PathLock(os.path.join(os.fsencode(tmp_path), name)):
            pass
    assert os.listdir(tmp_path) == [".ringpool"]
    assert os.listdir(tmp_path / ".ringpool") == ["locks"]
    assert len(os.listdir(tmp_path / ".ringpool/locks")) <= 4


def test_the_lock_directory_is_open_to_whom_the_base_is_open_to(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o2770)
    with PathLock(tmp_path / "shared/a"):
        pass
    for made in (".ringpool", ".ringpool/locks"):
        assert stat.S_IMODE((tmp_path / "shared" / made).stat().st_mode) == 0o2770


def test_a_lock_file_that_we_may_not_write_is_locked_all_the_same(tmp_path: Path) -> None:
    lock = PathLock(tmp_path / "a")
    with lock:
        pass
    shutil.move(tmp_path / ".ringpool", tmp_path / "x")  # so that it is opened anew
    shutil.copytree(tmp_path / "x", tmp_path / ".ringpool")

    def deny(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "open" and args[1] & os.O_RDWR:
            raise PermissionError(errno.EACCES, "")
        return call(*args, **kwargs)

    with intercepted(deny), lock:
        assert not is_free(lock_file(tmp_path, lock))


@pytest.mark.parametrize(
    ("path", "error"),
    [("missing/a", errno.ENOENT), ("file/a", errno.ENOTDIR), ("", errno.EISDIR), ("circle/a", errno.ELOOP)],
)
def test_a_path_that_cannot_be_locked_is_named(tmp_path: Path, path: str, error: int) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(FileOperationError) as caught:
        PathLock(f"{tmp_path}/{path}").acquire()
    assert (caught.value.path, caught.value.errno) == (f"{tmp_path}/{path}", error)


def test_a_base_where_no_lock_file_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / ".ringpool").touch()
    with pytest.raises(FileOperationError, match=r"\.ringpool"):
        PathLock(tmp_path / "a").acquire()


def test_the_mode_of_a_directory_is_not_set_through_a_link_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(0o700)
    (tmp_path / "link").symlink_to("private")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        lockfiles.set_rights(os.fsencode(tmp_path / "link"), lockfiles.Rights(0o777, 0))
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_an_outer_base_that_is_closed_to_us_is_named_with_its_owner_and_the_way_out(tmp_path: Path, error: int) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / ".ringpool/locks").mkdir(parents=True)

    def refuse(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "open" and args[0].endswith(b".lock") and args[1] & os.O_CREAT:
            raise OSError(error, os.strerror(error), args[0])
        return call(*args, **kwargs)

    owner = pwd.getpwuid(os.geteuid()).pw_name
    with intercepted(refuse):
        for lock in (lambda: PathLock(tmp_path / "in/a").acquire(), lambda: FileStore(tmp_path / "in").write("a", "")):
            with pytest.raises(FileOperationError) as caught:
                lock()
            assert caught.value.errno == error
            assert f"{tmp_path}/.ringpool, made by {owner}, serves all that lies below it" in caught.value.reason
            assert "chmod" in caught.value.reason


# ---- network file systems --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f_type", "network"),
    [
        (0x6969, True),  # nfs
        (-11317950, True),  # cifs, sign and all
        (0xFE534D42, True),  # smb2
        (0x00C36400, True),  # ceph
        (0xEF53, False),  # ext4
        (0x58465342, False),  # xfs
        (-1862052802, False),  # btrfs, 0x9123683E
        (0x01021994, False),  # tmpfs
        (0x794C7630, False),  # overlayfs
    ],
)
def test_network_file_systems_are_told_by_their_type(f_type: int, network: bool) -> None:
    assert is_network(f_type) is network


def test_the_type_of_this_file_system_is_that_which_the_kernel_names(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        told = subprocess.run(["stat", "-f", "-c", "%t", tmp_path], capture_output=True, check=True, text=True).stdout
        assert file_system_of(fd) & 0xFFFFFFFF == int(told, 16)
    finally:
        os.close(fd)


def test_on_a_network_file_system_processes_exclude_each_other_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringpool.workers.files.lockfiles.is_network", lambda _: True)
    with Child(hold_softly, tmp_path / "a", "shared") as child:
        child.wait_for("held")
        with PathLock(tmp_path / "a", "shared", timeout_s=30):
            pass
        with pytest.raises(LockTimeoutError):
            PathLock(tmp_path / "a", timeout_s=0.05).acquire()
        child.answer()
        child.wait_for("released")
        with PathLock(tmp_path / "a", timeout_s=30) as lock, lock:
            assert is_free(lock_file(tmp_path, lock))  # flock has no part in it

            def refuse() -> None:
                with pytest.raises(LockTimeoutError):
                    PathLock(tmp_path / "a", "shared", timeout_s=0.05).acquire()

            with in_a_thread(refuse):
                pass


# ---- several users ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of_base", "of_file"), [(0o775, 0o664), (0o755, 0o644), (0o770, 0o660), (0o700, 0o600)])
def test_who_may_make_files_in_a_base_may_write_to_its_lock_files_and_who_may_list_it_may_read_them_whatever_the_umask(
    tmp_path: Path, of_base: int, of_file: int
) -> None:
    os.chmod(tmp_path, of_base)
    lock = PathLock(tmp_path / "a")
    before = os.umask(0o077)
    try:
        with lock:
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE(lock_file(tmp_path, lock).stat().st_mode) == of_file


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize("is_member", [True, False])
def test_what_is_open_to_a_group_is_open_to_the_bases_group_and_to_no_other(tmp_path: Path, is_member: bool) -> None:
    os.chown(tmp_path, 0, 5000)
    os.chmod(tmp_path, 0o775)

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "fchown" and not is_member:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return call(*args, **kwargs)

    with intercepted(around):
        with PathLock(tmp_path / "a"):
            pass
        with FileTransaction(tmp_path) as transaction:
            transaction.write("a", "new")
        ErrorLog(tmp_path).record(ValueError("no"))
    ours = [tmp_path / ".ringpool", *(tmp_path / ".ringpool").rglob("*")]
    assert {path.name for path in ours} >= {"locks", "txn", "errors"}
    for path in ours:
        found = path.stat()
        others = (found.st_mode & 0o007) << 3
        assert found.st_gid == 5000 if is_member else found.st_mode & 0o070 & ~others == 0, path
    assert stat.S_IMODE((tmp_path / ".ringpool/txn").stat().st_mode) == (0o770 if is_member else 0o700)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EINVAL])
def test_where_a_group_cannot_be_given_those_whom_an_acl_lets_in_stay_in(tmp_path: Path, error: int) -> None:
    """EINVAL: it is no group in this container."""
    named = bytes.fromhex(
        "02000000 01000700ffffffff 02000700d2040000 04000700ffffffff 10000700ffffffff 20000000ffffffff"
    )
    try:
        for kind in ("access", "default"):
            os.setxattr(tmp_path, f"system.posix_acl_{kind}", named)
    except OSError:
        pytest.skip("this file system has no ACLs")
    asked: list[int] = []

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "fchown":
            asked.append(args[2])
            raise OSError(error, os.strerror(error))
        if name in ("stat", "fstat") and args[0] == os.fsencode(tmp_path):
            found = call(*args, **kwargs)
            return os.stat_result((*found[:5], 5000, *found[6:]))
        return call(*args, **kwargs)

    with intercepted(around), PathLock(tmp_path / "a"):
        pass
    assert asked == [5000, 5000]
    for path in (tmp_path / ".ringpool", tmp_path / ".ringpool/locks"):
        acl = os.getxattr(path, "system.posix_acl_access")
        assert acl == named.replace(bytes.fromhex("04000700"), bytes.fromhex("04000000")), (
            "the owning group's part alone"
        )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_in_a_sticky_directory_a_strangers_base_does_not_serve_what_lies_deeper(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / ".ringpool").mkdir()
    os.chown(tmp_path / ".ringpool", 12345, 12345)
    assert root_of(os.fsencode(tmp_path / "mine")) == os.fsencode(tmp_path), "not sticky: its group's"
    os.chmod(tmp_path, 0o1777)
    assert root_of(os.fsencode(tmp_path / "mine")) == os.fsencode(tmp_path / "mine")
    os.chown(tmp_path, 12345, 12345)
    assert root_of(os.fsencode(tmp_path / "mine")) == os.fsencode(tmp_path), "the directory owner's"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_strangers_link_to_what_is_the_directory_owners_is_a_strangers_base(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "locks").mkdir()
    (tmp_path / ".ringpool").symlink_to(".")
    os.chmod(tmp_path, 0o1777)
    assert root_of(os.fsencode(tmp_path / "mine")) == os.fsencode(tmp_path), "its owner's link"
    os.chown(tmp_path / ".ringpool", 12345, 12345, follow_symlinks=False)
    assert root_of(os.fsencode(tmp_path / "mine")) == os.fsencode(tmp_path / "mine")


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_lock_file_that_may_only_be_read_serves(tmp_path: Path, error: int) -> None:
    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "open" and args[1] & (os.O_RDWR | os.O_CREAT):
            raise OSError(error, os.strerror(error))
        return call(*args, **kwargs)

    path = tmp_path / "a"
    with Child(hold, path, "shared") as child:
        child.wait_for("held")
        (tmp_path / "b").symlink_to(tmp_path, target_is_directory=True)
        with intercepted(around), PathLock(path, "shared", base=tmp_path / "b", timeout_s=0):
            pass


def test_a_group_that_may_only_read_a_base_with_an_acl_may_not_write_where_locks_are(tmp_path: Path) -> None:
    """Its mode says of the group what the mask of the ACL allows to anybody."""
    # user::rwx user:1000:rwx group::r-x mask::rwx other::---, as acl(5) and linux/posix_acl_xattr.h lay it out
    acl = bytes.fromhex("02000000 01000700ffffffff 02000700e8030000 04000500ffffffff 10000700ffffffff 20000000ffffffff")
    try:
        os.setxattr(tmp_path, "system.posix_acl_access", acl)
    except OSError:
        pytest.skip("this file system has no ACLs")
    assert stat.S_IMODE(os.stat(tmp_path).st_mode) == 0o770
    with FileTransaction(tmp_path) as transaction:
        transaction.write("a", "new")
    ErrorLog(tmp_path).record(ValueError())
    modes = {
        name: stat.S_IMODE(os.stat(tmp_path / ".ringpool" / name).st_mode) for name in ("", "locks", "txn", "errors")
    }
    assert modes == {"": 0o750, "locks": 0o750, "txn": 0o700, "errors": 0o750}

"""What stands at a target already, and what of it its replacement keeps."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.workers.files.child_atomic import (
    LEVELS,
    WRITERS,
    mode_of,
    names,
    untouched,
)

from ringpool.errors import AtomicWriteError, FileOperationError
from ringpool.workers.files.atomic import atomic_open, atomic_write
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.target import resolve_target


def make_circle(path: Path) -> None:
    path.symlink_to(path)


# ---- what stands at the target already -------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
def test_a_symlink_is_followed(tmp_path: Path, writer: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a").write_text("old")
    (tmp_path / "link").symlink_to("real/a")
    (tmp_path / "dangling").symlink_to("real/b")
    for name, real in (("link", "real/a"), ("dangling", "real/b")):
        before = resolve_target(os.fsencode(tmp_path / name))
        WRITERS[writer](tmp_path / name, b"new", Durability.FULL)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / real).read_text() == "new"
        assert resolve_target(os.fsencode(tmp_path / name)) == before == os.fsencode(tmp_path / real)
    assert names(tmp_path / "real") == {"a", "b"}


@pytest.mark.parametrize("level", list(Durability))
def test_a_symlink_is_replaced_or_refused_where_that_is_asked_for(tmp_path: Path, level: Durability) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(FileOperationError) as caught:
        atomic_write(tmp_path / "link", b"new", symlinks="refuse", durability=level)
    assert caught.value.errno == errno.ELOOP
    assert (tmp_path / "link").is_symlink()
    atomic_write(tmp_path / "link", b"new", symlinks="replace", durability=level)
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "old"


def test_a_hard_link_is_split_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    with pytest.raises(AtomicWriteError) as caught:
        atomic_write(tmp_path / "a", b"new", hard_links="refuse")
    assert caught.value.errno == errno.EMLINK
    atomic_write(tmp_path / "a", b"new")
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("new", "old")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: os.mkfifo(path), errno.EINVAL),
        (lambda path: path.symlink_to("/dev/null"), errno.EINVAL),
        (lambda path: path.mkdir(), errno.EISDIR),
        (make_circle, errno.EINVAL),
    ],
)
def test_what_is_no_regular_file_is_not_replaced(
    tmp_path: Path, writer: str, make: Callable[[Path], None], error: int
) -> None:
    make(tmp_path / "a")
    before = untouched(tmp_path / "a")
    with pytest.raises(AtomicWriteError) as caught:
        WRITERS[writer](tmp_path / "a", b"new", Durability.FULL)
    assert caught.value.errno == error
    assert untouched(tmp_path / "a") == before
    assert names(tmp_path) == {"a"}
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


# ---- owner, mode, attributes -----------------------------------------------------------------------------------------


ACL = "system.posix_acl_access"
# user::rw- user:1000:r-- group::r-- mask::r-- other::---, as acl(5) and linux/posix_acl_xattr.h lay it out


ACL_USER_1000 = bytes.fromhex(
    "02000000 01000600ffffffff 02000400e8030000 04000400ffffffff 10000400ffffffff 20000000ffffffff"
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


@pytest.mark.parametrize("level", LEVELS)
def test_a_new_file_has_the_mode_that_the_umask_leaves_or_the_one_that_is_asked_for(
    tmp_path: Path, level: Durability
) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", b"", durability=level)
        atomic_write(tmp_path / "b", b"", durability=level, mode=0o646)
        atomic_write(tmp_path / "a", b"", durability=level)
    finally:
        os.umask(before)
    assert (mode_of(tmp_path / "a"), mode_of(tmp_path / "b")) == (0o640, 0o646)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("old", "new"), [(0o640, 0o640), (0o755, 0o755), (0o4755, 0o755), (0o600, 0o600)])
def test_the_mode_of_the_replaced_file_is_kept_but_for_set_id_bits(
    tmp_path: Path, writer: str, old: int, new: int
) -> None:
    (tmp_path / "a").write_bytes(b"\xff\r\n")
    (tmp_path / "a").chmod(old)
    WRITERS[writer](tmp_path / "a", b"\r\n\xfe", Durability.ATOMIC)
    assert mode_of(tmp_path / "a") == new
    assert (tmp_path / "a").read_bytes() == b"\r\n\xfe"


@as_root
def test_set_id_bits_go_where_root_writes_in_place_too(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "a").chmod(0o6755)
    atomic_write(tmp_path / "a", b"new", durability=Durability.NONE)
    assert mode_of(tmp_path / "a") == 0o755


@pytest.mark.parametrize("writer", WRITERS)
def test_extended_attributes_and_acls_are_kept(tmp_path: Path, writer: str) -> None:
    path = tmp_path / "a"
    path.touch()
    try:
        os.setxattr(path, "user.origin", b"theirs")
        os.setxattr(path, ACL, ACL_USER_1000)
    except OSError:
        pytest.skip("this file system has no such attributes")
    WRITERS[writer](path, b"new", Durability.ATOMIC)
    assert os.getxattr(path, "user.origin") == b"theirs"
    assert os.getxattr(path, ACL) == ACL_USER_1000


def test_an_acl_inherited_from_the_directory_does_not_open_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    path.chmod(0o600)
    try:
        os.setxattr(tmp_path, "system.posix_acl_default", ACL_USER_1000)
    except OSError:
        pytest.skip("this file system has no ACLs")
    atomic_write(path, b"new")
    assert ACL not in os.listxattr(path)
    assert mode_of(path) == 0o600


@as_root
@pytest.mark.parametrize("writer", WRITERS)
def test_the_owner_is_kept_where_we_may_give_the_file_away(tmp_path: Path, writer: str) -> None:
    (tmp_path / "a").touch()
    os.chown(tmp_path / "a", 1234, 5678)
    WRITERS[writer](tmp_path / "a", b"new", Durability.ATOMIC)
    status = (tmp_path / "a").stat()
    assert (status.st_uid, status.st_gid) == (1234, 5678)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_group_that_cannot_be_kept_takes_its_rights_along(
    tmp_path: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.touch()
    path.chmod(0o664)
    real = path.stat()
    foreign = os.stat_result((*real[:4], real.st_uid + 1, real.st_gid + 1, *real[6:]))

    def not_root(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "fchown":
            raise PermissionError(errno.EPERM, "")
        if name == "stat" and args[0] in (os.fsencode(path), os.fsencode(path.name)):
            return foreign
        return call(*args, **kwargs)

    with intercepted(not_root):
        WRITERS[writer](path, b"new", Durability.ATOMIC)
    assert mode_of(path) == 0o644
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("is_relative", [True, False])
def test_attributes_are_those_of_the_file_that_is_replaced_wherever_its_name_leads_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_relative: bool
) -> None:
    for name in ("a", "b"):
        path = tmp_path / name / "f"
        path.parent.mkdir()
        path.write_text("old")
        try:
            os.setxattr(path, "user.origin", name.encode())
        except OSError as error:
            pytest.skip(str(error))
    monkeypatch.chdir(tmp_path / "a")
    with atomic_open("f" if is_relative else tmp_path / "a/f", "w") as file:
        file.write("new")
        if is_relative:
            os.chdir(tmp_path / "b")
        else:
            os.rename(tmp_path / "a", tmp_path / "c")
            os.rename(tmp_path / "b", tmp_path / "a")
    written = tmp_path / ("a/f" if is_relative else "c/f")
    assert (written.read_text(), os.getxattr(written, "user.origin")) == ("new", b"a")

"""Transactions: all or nothing, through errors, kills and power cuts, and at one moment for whoever locks."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
from collections.abc import Callable
from contextlib import chdir, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from tests.workers.files import child_transaction
from tests.workers.files.child import Child
from tests.workers.files.child_transaction import NEW, OLD, lay_out, make, transact
from tests.workers.files.trials import room

from ringpool.errors import (
    CommittedWithErrors,
    CrossDeviceError,
    FileOperationError,
    LockTimeoutError,
    PathNameError,
    PathOutsideError,
    TransactionConflictError,
    TransactionError,
)
from ringpool.workers.files import commit
from ringpool.workers.files.journal import Effect
from ringpool.workers.files.locks import PathLock, call_locked
from ringpool.workers.files.operations import Delete, New, Operation, Original, Rename, Write, outcome
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.transaction import FileTransaction, snapshot

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    lay_out(tmp_path / "base")
    return tmp_path / "base"


def files(base: Path) -> dict[str, bytes]:
    """All there is but for ringpool's own."""
    found = (
        path for path in base.rglob("*") if path.is_file() and not path.is_symlink() and ".ringpool" not in path.parts
    )
    return {str(path.relative_to(base)): path.read_bytes() for path in found}


def left(base: Path) -> list[str]:
    txn = base / ".ringpool/txn"
    return os.listdir(txn) if txn.exists() else []


# ---- operations and their outcome ------------------------------------------------------------------------------------

PATHS = [b"a", b"b", b"c"]
path = st.sampled_from(PATHS)
operation = st.one_of(
    st.builds(Write, path, st.binary(max_size=2)), st.builds(Delete, path), st.builds(Rename, path, path)
)


@given(st.lists(operation, max_size=8), st.sets(path))
def test_the_outcome_is_what_one_operation_after_the_other_makes(
    operations: list[Operation], first: set[bytes]
) -> None:
    model = {name: b"first " + name for name in first}
    expected: dict[bytes, bytes] | None = dict(model)
    for each in operations:
        assert expected is not None
        needed = each.source if isinstance(each, Rename) else each.path
        if not isinstance(each, Write) and needed not in expected:
            expected = None
            break
        match each:
            case Write(name, content):
                expected[name] = content
            case Delete(name):
                del expected[name]
            case Rename(source, target):
                expected[target] = expected.pop(source)
    if expected is None:
        with pytest.raises(TransactionError) as caught:
            outcome(operations, first)
        assert caught.value.errno == errno.ENOENT
        return
    found = dict(model)
    for name, file in outcome(operations, first).items():
        match file:
            case Original(source):
                found[name] = model[source]
            case New(content, _):
                found[name] = content
            case None:
                del found[name]
    assert found == expected


def test_a_path_that_ends_as_it_began_is_not_part_of_the_outcome() -> None:
    assert outcome([Rename(b"a", b"b"), Rename(b"b", b"a")], [b"a"]) == {}
    assert outcome([Rename(b"a", b"a")], [b"a"]) == {}
    assert outcome([Write(b"n", b""), Delete(b"n")], [b"a"]) == {}


def test_a_new_file_takes_after_the_one_that_it_replaces_in_its_turn() -> None:
    assert outcome([Write(b"a", b"1"), Write(b"a", b"2")], [b"a"]) == {b"a": New(b"2", b"a")}
    assert outcome([Rename(b"a", b"b"), Write(b"b", b"1")], [b"a", b"b"])[b"b"] == New(b"1", b"a")
    assert outcome([Delete(b"a"), Write(b"a", b"1")], [b"a"])[b"a"] == New(b"1", None)
    assert outcome([Write(b"n", b"1"), Rename(b"n", b"a")], [b"a"])[b"a"] == New(b"1", None)


# ---- what it does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["full", "atomic"])
def test_a_clean_exit_commits_everything(base: Path, durability: str) -> None:
    with FileTransaction(base, durability=durability) as transaction:
        transaction.write("d1/a", "new a")
        transaction.delete("d1/b")
        transaction.rename("d2/c", "d2/d")
        transaction.write("d2/e", b"new e")
        assert files(base) == OLD
    assert files(base) == NEW
    assert not left(base)


def test_an_exception_in_the_block_leaves_everything_as_it_was(base: Path) -> None:
    with suppress(KeyError), FileTransaction(base) as transaction:
        transaction.write("d1/a", "new")
        raise KeyError
    assert files(base) == OLD
    assert not (base / ".ringpool").exists()


def test_commit_and_rollback_end_it(base: Path) -> None:
    first, second = FileTransaction(base), FileTransaction(base)
    first.write("d1/a", "1")
    second.write("d1/a", "2")
    first.commit()
    second.rollback()
    assert (base / "d1/a").read_bytes() == b"1"
    for ended in (first, second):
        for act in (ended.commit, ended.rollback, lambda ended=ended: ended.write("d1/a", "3")):
            with pytest.raises(RuntimeError, match="has ended"):
                act()
    with FileTransaction(base) as third:
        third.write("d1/a", "4")
        third.commit()
    assert (base / "d1/a").read_bytes() == b"4"


def test_it_reads_what_it_has_written(base: Path) -> None:
    with FileTransaction(base) as transaction:
        assert transaction.read("d1/a") == b"old a"
        transaction.write("d1/a", "new")
        transaction.rename("d1/b", "d2/b")
        assert transaction.read("d1/a") == b"new"
        assert transaction.read("d2/b") == b"old b"
        with pytest.raises(TransactionError, match="No such file"):
            transaction.read("d1/b")


def test_files_can_be_exchanged(base: Path) -> None:
    with FileTransaction(base) as transaction:
        transaction.rename("d1/a", "d1/t")
        transaction.rename("d1/b", "d1/a")
        transaction.rename("d1/t", "d1/b")
    assert files(base) == OLD | {"d1/a": b"old b", "d1/b": b"old a"}


def test_two_names_of_one_file_are_two_files_to_it(base: Path) -> None:
    os.link(base / "d1/a", base / "d1/link")
    with FileTransaction(base) as transaction:
        transaction.rename("d1/a", "d1/link")
    assert files(base) == {"d1/link": b"old a", "d1/b": b"old b", "d2/c": b"old c"}
    assert not left(base)


def test_a_replaced_file_hands_on_its_mode_and_a_new_one_gets_the_umasks(base: Path) -> None:
    (base / "d1/a").chmod(0o640)
    before = os.umask(0o027)
    try:
        with FileTransaction(base) as transaction:
            transaction.write("d1/a", "new")
            transaction.write("d1/n", "new")
            transaction.delete("d1/b")
            transaction.write("d1/b", "new")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((base / "d1" / name).stat().st_mode) for name in "anb"] == [0o640] * 3


ACLS = {
    "none": None,
    "everybody": "02000000 01000700ffffffff 04000700ffffffff 20000700ffffffff",
    "user 1000": "02000000 01000700ffffffff 02000700e8030000 04000000ffffffff 10000700ffffffff 20000000ffffffff",
    "user 2000": "02000000 01000700ffffffff 02000700d0070000 04000500ffffffff 10000500ffffffff 20000500ffffffff",
}


@pytest.mark.parametrize("of_the_directory", ACLS)
@pytest.mark.parametrize("of_the_base", ACLS)
def test_a_new_file_has_the_rights_that_its_directory_hands_on(
    base: Path, of_the_base: str, of_the_directory: str
) -> None:
    def hand_on(directory: Path, acl: str | None) -> None:
        if acl is not None:
            os.setxattr(directory, "system.posix_acl_default", bytes.fromhex(acl))

    def rights(path: Path) -> tuple[int, dict[str, bytes]]:
        names = [name for name in os.listxattr(path) if name.startswith("system.")]
        return path.stat().st_mode, {name: os.getxattr(path, name) for name in names}

    before = os.umask(0o027)
    try:
        hand_on(base / "d1", ACLS[of_the_directory])
        hand_on(base, ACLS[of_the_base])
        (base / "d1/plain").write_text("new")
        with FileTransaction(base) as transaction:
            transaction.write("d1/n", "new")
    except OSError:
        pytest.skip("this file system has no ACLs")
    finally:
        os.umask(before)
    assert rights(base / "d1/n") == rights(base / "d1/plain")


def test_an_acl_that_cannot_be_set_leaves_a_new_file_to_its_owner(base: Path) -> None:
    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "setxattr":
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        if name == "getxattr" and isinstance(args[0], int) and os.readlink(f"/proc/self/fd/{args[0]}").endswith("/d1"):
            return bytes.fromhex(ACLS["everybody"] or "")
        return call(*args, **kwargs)

    with intercepted(around), FileTransaction(base) as transaction:
        transaction.write("d1/n", "new")
    assert stat.S_IMODE((base / "d1/n").stat().st_mode) == 0o600


@as_root
def test_a_new_file_has_the_group_that_its_own_directory_gives(base: Path) -> None:
    os.chown(base, -1, 2345)
    base.chmod(0o2775)
    (base / "d1").chmod(0o755)
    os.chown(base / "d2", -1, 3456)
    (base / "d2").chmod(0o2755)
    names = ("n", "d1/n", "d2/n")
    with FileTransaction(base) as transaction:
        for name in names:
            transaction.write(name, "new")
    assert [os.stat(base / name).st_gid for name in names] == [2345, os.getegid(), 3456]


@as_root
@pytest.mark.parametrize("way_in", ["an ACL", "the rights of all"])
def test_a_user_who_is_not_in_the_group_that_a_base_hands_on_commits_there(way_in: str) -> None:
    # user::rwx user:65534:rwx group::rwx mask::rwx other::---, as acl(5) and linux/posix_acl_xattr.h lay it out
    acl = bytes.fromhex("02000000 01000700ffffffff 02000700feff0000 04000700ffffffff 10000700ffffffff 20000000ffffffff")
    with room() as directory:
        directory.chmod(0o755)
        base = directory / "base"
        base.mkdir()
        os.chown(base, -1, 2345)
        base.chmod(0o2770 if way_in == "an ACL" else 0o2777)
        if way_in == "an ACL":
            try:
                for kind in ("access", "default"):
                    os.setxattr(base, f"system.posix_acl_{kind}", acl)
            except OSError:
                pytest.skip("this file system has no ACLs")
        os.seteuid(65_534)
        try:
            with FileTransaction(base) as transaction:
                transaction.write("a", "new")
        finally:
            os.seteuid(0)
        assert (base / "a").read_text() == "new"
        assert os.stat(base / "a").st_gid == (2345 if way_in == "an ACL" else os.getegid())


@as_root
def test_a_replaced_file_hands_on_its_owner(base: Path) -> None:
    os.chown(base / "d1/a", 1234, 2345)
    (base / "d2").chmod(0o2755)
    os.chown(base / "d2", -1, 3456)
    with FileTransaction(base) as transaction:
        transaction.write("d1/a", "new")
        transaction.write("d2/n", "new")
        transaction.rename("d1/b", "d2/b")
    assert ((base / "d1/a").stat().st_uid, (base / "d1/a").stat().st_gid) == (1234, 2345)
    assert (base / "d2/n").stat().st_gid == 3456  # as of a file that is made in a set-group-id directory
    assert (base / "d2/b").stat().st_gid == os.getegid()


@pytest.mark.parametrize("name", [b"n\xff\xfe", b"x" * 255, "\u00e4 \n".encode(), b"-rf"])
def test_any_name_that_a_file_can_have_will_do(base: Path, name: bytes) -> None:
    with FileTransaction(os.fsencode(base)) as transaction:
        transaction.write(b"d1/" + name, "new")
        transaction.rename(b"d1/" + name, b"d2/" + name)
    assert Path(os.fsdecode(os.fsencode(base) + b"/d2/" + name)).read_bytes() == b"new"


def test_a_directory_that_is_reached_by_a_link_is_the_same_directory(base: Path) -> None:
    (base / "link").symlink_to("d1")
    with FileTransaction(base) as transaction:
        transaction.write("link/a", "1")
        assert transaction.read("d1/a") == b"1"
        transaction.write("d1/a", "2")
    assert (base / "d1/a").read_bytes() == b"2"


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "error"),
    [
        ("../x", PathOutsideError, None),
        ("d1/../../x", PathOutsideError, None),
        ("/etc/passwd", PathOutsideError, None),
        ("out/x", PathOutsideError, None),
        ("", PathNameError, None),
        ("a\0b", PathNameError, None),
        ("x" * 256, PathNameError, None),
        (".ringpool/txn/x", PathNameError, None),
        ("d1", TransactionError, errno.EISDIR),
        ("d1/a/x", FileOperationError, errno.ENOTDIR),
        ("missing/x", FileOperationError, errno.ENOENT),
        ("circle", TransactionError, errno.ELOOP),
        ("circle/x", FileOperationError, errno.ELOOP),
        ("own/x", PathNameError, None),
        ("to_a", TransactionError, errno.ELOOP),
        ("pipe", TransactionError, errno.EINVAL),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_by_name(
    base: Path, name: str, kind: type[FileOperationError], error: int | None
) -> None:
    (base / "out").symlink_to(base.parent)
    (base / "circle").symlink_to("circle")
    (base / "own").symlink_to(".ringpool")
    (base / "to_a").symlink_to("d1/a")
    os.mkfifo(base / "pipe")
    (base / ".ringpool").mkdir()
    with FileTransaction(base) as transaction:
        for act in (
            lambda: transaction.write(name, ""),
            lambda: transaction.delete(name),
            lambda: transaction.rename(name, "d1/n"),
            lambda: transaction.rename("d1/a", name),
            lambda: transaction.read(name),
        ):
            with pytest.raises(kind) as caught:
                act()
            assert error is None or caught.value.errno == error
    assert files(base) == OLD
    assert not left(base)


@pytest.mark.parametrize(
    "act", [lambda t: t.delete("d1/n"), lambda t: t.rename("d1/n", "d1/a"), lambda t: t.read("d1/n")]
)
def test_a_file_that_is_needed_and_missing_is_an_error_at_once(
    base: Path, act: Callable[[FileTransaction], Any]
) -> None:
    with FileTransaction(base) as transaction, pytest.raises(TransactionError, match="d1/n") as caught:
        act(transaction)
    assert caught.value.errno == errno.ENOENT


def test_what_has_changed_since_an_operation_was_asked_for_is_found_under_the_locks(base: Path) -> None:
    transaction = FileTransaction(base)
    transaction.write("d1/a", "new")
    transaction.delete("d1/b")
    (base / "d1/b").unlink()
    with pytest.raises(TransactionError, match="d1/b"):
        transaction.commit()
    assert files(base) == {"d1/a": b"old a", "d2/c": b"old c"}
    assert not left(base)
    transaction = FileTransaction(base)
    transaction.write("d1/a", "new")
    transaction.write("d1/n", "new")
    (base / "d1/n").mkdir()
    with pytest.raises(TransactionError) as caught:
        transaction.commit()
    assert caught.value.errno == errno.EISDIR
    assert (base / "d1/a").read_bytes() == b"old a"


def test_a_base_that_is_no_directory_is_refused(base: Path) -> None:
    for name, error in (("missing", errno.ENOENT), ("d1/a", errno.ENOTDIR)):
        with pytest.raises(TransactionError) as caught:
            FileTransaction(base / name)
        assert caught.value.errno == error


def test_a_level_that_would_not_be_all_or_nothing_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="'full' or 'atomic'"):
        FileTransaction(base, durability="none")


def test_a_file_on_another_file_system_is_refused_before_anything_is_done(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = os.stat(base / "d2").st_ino
    real = commit.mount_of
    monkeypatch.setattr(commit, "mount_of", lambda fd: (0, b"") if os.fstat(fd).st_ino == foreign else real(fd))
    with pytest.raises(CrossDeviceError, match="another file system"):
        transact(base)
    assert files(base) == OLD
    assert not left(base)


def test_a_lock_that_is_not_had_in_time_leaves_everything_as_it_was(base: Path) -> None:
    with Child(child_transaction.hold, base / "d1/b") as child:
        child.wait_for("held")
        transaction = FileTransaction(base, timeout_s=0.01)
        transaction.write("d1/a", "new")
        transaction.delete("d1/b")
        with pytest.raises(LockTimeoutError):
            transaction.commit()
        assert files(base) == OLD
        child.answer()
        child.succeed()


# ---- several at once -------------------------------------------------------------------------------------------------


def test_two_that_read_and_write_one_file_do_not_lose_an_update(base: Path) -> None:
    first, second = FileTransaction(base), FileTransaction(base)
    for each in (first, second):
        each.write("d1/a", each.read("d1/a") + b"!")
    first.commit()
    with pytest.raises(TransactionConflictError, match="d1/a"):
        second.commit()
    assert (base / "d1/a").read_bytes() == b"old a!"


@pytest.mark.parametrize("change", ["changed", "came", "went"])
def test_a_file_that_was_only_read_counts_as_well(base: Path, change: str) -> None:
    transaction = FileTransaction(base)
    name = "d1/n" if change == "came" else "d1/b"
    if change == "came":
        with pytest.raises(TransactionError):
            transaction.read(name)
    else:
        transaction.read(name)
    transaction.write("d1/a", "new")
    if change == "went":
        (base / name).unlink()
    else:
        (base / name).write_bytes(b"other")
    with pytest.raises(TransactionConflictError):
        transaction.commit()
    assert (base / "d1/a").read_bytes() == b"old a"


def test_a_file_that_changes_between_two_reads_is_a_conflict_at_once(base: Path) -> None:
    transaction = FileTransaction(base)
    transaction.read("d1/a")
    (base / "d1/a").write_bytes(b"other")
    with pytest.raises(TransactionConflictError):
        transaction.read("d1/a")
    transaction.rollback()


def test_a_snapshot_leaves_out_what_is_no_file_and_stays_in_its_base(base: Path) -> None:
    assert snapshot(["d1/a", "d1/n"], base=base) == {"d1/a": b"old a"}
    assert snapshot([base / "d1/a", base / "d2/c"]) == {base / "d1/a": b"old a", base / "d2/c": b"old c"}
    with pytest.raises(PathOutsideError):
        snapshot(["../x"], base=base)
    (base / "link").symlink_to("d1/a")
    (base / "loop").symlink_to("loop")
    os.mkfifo(base / "pipe")
    no_files = ["d1", "d1/n", "pipe", "no/x", "no/such/x", "d1/a/x", "loop", "loop/x"]
    with socket.socket(socket.AF_UNIX) as listening:
        with chdir(base):
            listening.bind("socket")
        for paths in (["socket"], *([path] for path in no_files), [*no_files, "d1/a"], []):
            found = {path: b"old a" for path in paths if path == "d1/a"}
            assert snapshot(paths, base=base) == found
            assert snapshot([base / path for path in paths], timeout_s=9) == {
                base / path: found[path] for path in found
            }
    assert snapshot(["link"], base=base) == {}
    assert snapshot([base / "link"]) == {base / "link": b"old a"}


def test_a_snapshot_of_a_single_path_that_is_in_no_list_is_refused(base: Path) -> None:
    for path in ("ab", b"ab", base / "a"):
        with pytest.raises(TypeError, match="one path"):
            snapshot(path, base=base)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["", "a\0b", "n" * 256])
def test_a_snapshot_refuses_what_can_be_no_name(base: Path, name: str) -> None:
    for root in (None, base):
        with pytest.raises(PathNameError):
            snapshot([name], base=root)


def test_a_snapshot_leaves_out_what_loses_its_directory_while_it_locks_the_others(base: Path) -> None:
    (base / ".ringpool").mkdir()
    (base / "d3").mkdir()

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "lock_descriptor" or name == "flock":
            with suppress(FileNotFoundError):
                os.rmdir(base / "d3")
        return call(*args, **kwargs)

    with intercepted(around):
        paths = [base / "d1/a", *(base / f"d3/{number}" for number in range(30))]
        assert snapshot(paths, timeout_s=9) == {base / "d1/a": b"old a"}
    assert not (base / "d3").exists()


def test_a_snapshot_below_what_cannot_hold_locks_is_a_named_error(base: Path) -> None:
    (base / "d1/.ringpool").touch()
    with pytest.raises(FileOperationError, match="Not a directory"):
        snapshot([base / "d1/a"])


def test_transactions_of_several_processes_add_up_though_they_are_killed(tmp_path: Path) -> None:
    with Child(child_transaction.contend, tmp_path, "1.5", "1") as child:
        child.succeed()


def test_what_died_under_an_inner_base_is_recovered_by_who_comes_by_an_outer_one(tmp_path: Path) -> None:
    inner = tmp_path / "in"
    inner.mkdir()
    make(inner, [Effect(b"a", True, 0), Effect(b"b", True, 0)], staged=2).close()
    (tmp_path / ".ringpool").mkdir()
    assert snapshot(["in/a", "in/b"], base=tmp_path) == {"in/a": b"new 0", "in/b": b"new 1"}


@pytest.mark.parametrize("again", [lambda: snapshot(["a", "b"]), lambda: read_locked("a", "b")], ids=["long", "short"])
def test_a_directory_is_looked_through_also_where_another_had_its_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: Callable[[], dict[str, bytes]]
) -> None:
    for name in ("other", "in"):
        (tmp_path / name).mkdir()
    make(tmp_path / "in", [Effect(b"a", True, 0), Effect(b"b", True, 0)], staged=2).close()
    (tmp_path / ".ringpool").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for number in range(2000):  # every lock file is open then, so that the short way is open as well
        call_locked(b"./%d" % number, None, lambda: None)
    monkeypatch.chdir(tmp_path / "in")
    assert again() == {"a": b"new 0", "b": b"new 1"}


def read_locked(*names: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in names:
        call_locked(b"./" + name.encode(), None, lambda name=name: found.update({name: Path(name).read_bytes()}))
    return found


def test_a_snapshot_of_a_base_that_is_missing_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(FileOperationError, match="missing"):
        snapshot(["a"], base=tmp_path / "missing")


def test_without_the_right_to_change_a_directory_nothing_is_committed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "access" and args[1] & os.W_OK:
            return False
        return call(*args, **kwargs)

    with intercepted(around), pytest.raises(TransactionError), FileTransaction(tmp_path) as transaction:
        transaction.write("in/a", "new")
    assert os.listdir(tmp_path / "in") == []
    assert os.listdir(tmp_path / ".ringpool/txn") == []


@as_root
def test_another_users_file_in_a_sticky_directory_is_refused_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("theirs")
    os.chmod(tmp_path, 0o1777)
    for owner, is_refused in ((12345, True), (34567, False)):
        os.chown(tmp_path / "a", owner, owner)
        os.chown(tmp_path, 23456, 23456)
        monkeypatch.setattr(os, "geteuid", lambda: 34567)
        with pytest.raises(TransactionError) if is_refused else nullcontext(), FileTransaction(tmp_path) as transaction:
            transaction.write("a", "ours")
        monkeypatch.undo()
        assert (tmp_path / "a").read_text() == ("theirs" if is_refused else "ours")


@as_root
def test_whom_a_transaction_is_refused_has_made_nothing_that_shuts_out_others(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o1777)
    (tmp_path / ".ringpool").mkdir(mode=0o1777)
    os.chown(tmp_path / ".ringpool", 12345, 12345)
    with pytest.raises(TransactionError, match="another user's"), FileTransaction(tmp_path) as transaction:
        transaction.write("a", "ours")
    assert not (tmp_path / ".ringpool/txn").exists()


@as_root
@pytest.mark.parametrize("which", [".ringpool", ".ringpool/txn"])
def test_where_another_user_could_change_what_is_staged_nothing_is(tmp_path: Path, which: str) -> None:
    os.chmod(tmp_path, 0o1777)
    (tmp_path / ".ringpool/txn").mkdir(parents=True)
    os.chown(tmp_path / which, 12345, 12345)
    with pytest.raises(TransactionError, match="another user's"), FileTransaction(tmp_path) as transaction:
        transaction.write("a", "ours")
    assert not (tmp_path / "a").exists()
    os.chown(tmp_path, 12345, 12345)  # who may do in it what he likes
    with FileTransaction(tmp_path) as transaction:
        transaction.write("a", "ours")
    assert (tmp_path / "a").read_text() == "ours"


@as_root
@pytest.mark.parametrize("fixed", ["log", "in"])
def test_what_can_only_be_appended_to_is_refused_before_the_commit(tmp_path: Path, fixed: str) -> None:
    (tmp_path / "in").mkdir()
    for log in ("log", "in/log"):
        (tmp_path / log).write_text("old")
    if subprocess.run(["chattr", "+a", tmp_path / fixed], capture_output=True, check=False).returncode:
        pytest.skip("its file system has no such attribute")
    try:
        transaction = FileTransaction(tmp_path)
        transaction.write("a", "new")
        transaction.write("in/log" if fixed == "in" else "log", "new")
        with pytest.raises(TransactionError, match="append-only"):
            transaction.commit()
        with FileTransaction(tmp_path) as transaction:
            transaction.write("in/new", "new")  # which is what such a directory is for
    finally:
        subprocess.run(["chattr", "-a", tmp_path / fixed], check=True)
    assert not (tmp_path / "a").exists()
    assert [(tmp_path / name).read_text() for name in ("log", "in/log", "in/new")] == ["old", "old", "new"]
    with PathLock(tmp_path / "log", timeout_s=10):
        pass


@as_root
def test_an_append_only_file_that_may_not_be_read_is_found_before_the_commit(tmp_path: Path) -> None:
    """By whoever may replace files in its directory."""
    (tmp_path / "log").write_text("old")
    if subprocess.run(["chattr", "+a", tmp_path / "log"], capture_output=True, check=False).returncode:
        pytest.skip("its file system has no such attribute")

    def refuse(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "open" and args[0].endswith(b"log"):
            raise PermissionError(errno.EACCES, "Permission denied", args[0])
        return call(*args, **kwargs)

    try:
        transaction = FileTransaction(tmp_path)
        transaction.write("a", "new")
        transaction.write("log", "new")
        with intercepted(refuse), pytest.raises(TransactionError, match="append-only"):
            transaction.commit()
    finally:
        subprocess.run(["chattr", "-a", tmp_path / "log"], check=True)
    assert not (tmp_path / "a").exists()


@as_root
def test_a_base_whose_locks_do_not_serve_what_lies_deeper_is_refused_before_the_commit(tmp_path: Path) -> None:
    """Its lock files are not those that others would wait for."""
    (tmp_path / "sub").mkdir()
    (tmp_path / ".ringpool").mkdir()
    os.chown(tmp_path / ".ringpool", 12345, 12345)
    os.chmod(tmp_path, 0o1777)
    refused = FileTransaction(tmp_path)
    refused.write("sub/a", "half")
    refused.write("b", "half")
    with pytest.raises(TransactionError, match="does not serve this directory"):
        refused.commit()
    assert not (tmp_path / "sub/a").exists()
    assert not (tmp_path / "b").exists()
    with FileTransaction(tmp_path / "sub") as transaction:
        transaction.write("a", "whole")
    os.chown(tmp_path / ".ringpool", 0, 0)
    with FileTransaction(tmp_path) as transaction:
        transaction.write("b", "whole")
    assert (tmp_path / "b").read_text() == (tmp_path / "sub/a").read_text() == "whole"


def test_an_unlock_that_fails_after_the_commit_says_that_it_stands(tmp_path: Path) -> None:
    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "unlock_descriptor":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*args, **kwargs)

    with intercepted(around), pytest.raises(CommittedWithErrors) as caught, FileTransaction(tmp_path) as transaction:
        transaction.write("a", "new")
    assert caught.value.finished
    assert snapshot(["a"], base=tmp_path, timeout_s=0) == {"a": b"new"}

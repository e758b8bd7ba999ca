"""The redo journal: its format, what a recovery does with it, and whom it leaves alone."""

from __future__ import annotations

import errno
import os
import stat
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st
from tests.workers.files import child_transaction
from tests.workers.files.child import Child
from tests.workers.files.child_transaction import make

from ringpool.errors import FileOperationError
from ringpool.workers.files import journal, recovery
from ringpool.workers.files.journal import Effect, Journal, decode, encode, txn_directory
from ringpool.workers.files.locks import PathLock
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.recovery import recover_marked, recover_root

names = st.binary(min_size=1, max_size=20).filter(
    lambda name: name not in (b".", b"..", b".ringpool") and not {0, ord("/")} & {*name}
)
paths = st.lists(names, min_size=1, max_size=3).map(b"/".join)
effects = st.lists(
    st.builds(Effect, paths, st.booleans(), st.integers(0, 2**63)), max_size=5, unique_by=lambda each: each.path
)

GOOD = encode([Effect(b"a/b", True, 7)])


def record(content: object) -> bytes:
    packed = msgspec.msgpack.encode(content)
    return b"RPJ1" + len(packed).to_bytes(4, "little") + zlib.crc32(packed).to_bytes(4, "little") + packed


def txn(base: Path) -> list[str]:
    return sorted(os.listdir(base / ".ringpool/txn"))


# ---- the format ------------------------------------------------------------------------------------------------------


@given(effects)
def test_a_journal_is_read_as_it_was_written(content: list[Effect]) -> None:
    assert decode(encode(content)) == content


def test_the_record_that_the_tests_make_by_hand_is_a_good_one() -> None:
    assert decode(record([[b"a", True, 7]])) == [Effect(b"a", True, 7)]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(GOOD[:11], id="part of a header"),
        pytest.param(GOOD[:-1], id="cut"),
        pytest.param(GOOD + b"\0", id="too long"),
        pytest.param(b"RPJ2" + GOOD[4:], id="another version"),
        pytest.param(bytes(len(GOOD)), id="zeros"),
        pytest.param(GOOD[:12].ljust(len(GOOD), b"\0"), id="zeros after the header"),
        pytest.param(GOOD[:-1] + bytes([GOOD[-1] ^ 1]), id="one bit changed"),
        pytest.param(record("x"), id="no list"),
        pytest.param(record([[b"a", True]]), id="a field is missing"),
        pytest.param(record([[b"a", True, 7, 8]]), id="one field too many"),
        pytest.param(record([["a", "yes", 7]]), id="a field of another type"),
        pytest.param(record([[b"a", True, -1]]), id="a negative inode"),
        pytest.param(record([[b"", True, 7]]), id="no path"),
        pytest.param(record([[b"/etc/passwd", True, 7]]), id="an absolute path"),
        pytest.param(record([[b"a/../../b", True, 7]]), id="a path that leads out"),
        pytest.param(record([[b"a//b", True, 7]]), id="an empty component"),
        pytest.param(record([[b"./a", True, 7]]), id="a component that is no name"),
        pytest.param(record([[b"a\0b", True, 7]]), id="a NUL byte"),
        pytest.param(record([[b".ringpool/txn/x", True, 7]]), id="a path of ringpool's own"),
        pytest.param(record([[b"a", True, 7], [b"a", False, 7]]), id="a path twice"),
    ],
)
def test_what_is_not_a_whole_journal_is_none(content: bytes) -> None:
    assert decode(content) is None


def test_a_torn_journal_is_dropped_with_all_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    inode = os.stat(tmp_path / "a").st_ino
    for kept in range(len(encode([Effect(b"a", True, inode)]))):
        made = make(tmp_path, [Effect(b"a", True, inode)], staged=1)
        made.close()
        os.truncate(txn_directory(os.fsencode(tmp_path)) + b"/" + made.id + b".journal", kept)
        assert recover_root(os.fsencode(tmp_path)) == 0
        assert (tmp_path / "a").read_bytes() == b"old"
        assert not txn(tmp_path)


# ---- what is done, by what is there ----------------------------------------------------------------------------------


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("new", ["is there", "is missing"])
@pytest.mark.parametrize("here", ["nothing", "the replaced one", "another"])
def test_an_effect_is_done_where_it_is_not_done_yet_and_nobody_came_later(
    tmp_path: Path, staged: bool, new: str, here: str
) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    made = make(tmp_path, [Effect(b"a", staged, os.stat(target).st_ino)], staged=int(staged and new == "is there"))
    made.close()
    if here != "the replaced one":
        os.link(target, tmp_path / "keeps its inode alive")
        target.unlink()
    if here == "another":
        target.write_bytes(b"later")
    assert recover_root(os.fsencode(tmp_path)) == 1
    assert not txn(tmp_path)
    found = target.read_bytes() if target.exists() else None
    expected: dict[str, bytes | None] = {"nothing": None, "the replaced one": b"old", "another": b"later"}
    if staged and new == "is there":
        expected |= {"nothing": b"new 0", "the replaced one": b"new 0"}
    if not staged:
        expected["the replaced one"] = None
    assert found == expected[here]


def test_a_directory_that_was_removed_after_the_commit_does_not_stop_a_recovery(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    make(tmp_path, [Effect(b"gone/a", True, 0), Effect(b"b", True, 0)], staged=2).close()
    (tmp_path / "gone").rmdir()
    assert recover_root(os.fsencode(tmp_path)) == 1
    assert (tmp_path / "b").read_bytes() == b"new 1"


def test_a_symbolic_link_that_was_swapped_in_is_not_followed(tmp_path: Path) -> None:
    base, outside = tmp_path / "base", tmp_path / "outside"
    (base / "d").mkdir(parents=True)
    outside.mkdir()
    make(base, [Effect(b"d/a", True, 0)], staged=1).close()
    (base / "d").rmdir()
    (base / "d").symlink_to(outside)
    recover_root(os.fsencode(base))
    assert not os.listdir(outside)


def test_a_tree_that_was_moved_recovers_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    make(tmp_path / "before", [Effect(b"a", True, 0)], staged=1).close()
    os.rename(tmp_path / "before", tmp_path / "after")
    assert recover_root(os.fsencode(tmp_path / "after")) == 1
    assert (tmp_path / "after/a").read_bytes() == b"new 0"


# ---- who is recovered ------------------------------------------------------------------------------------------------


def test_where_there_was_no_transaction_nothing_is_made(tmp_path: Path) -> None:
    assert recover_root(os.fsencode(tmp_path)) == 0
    recover_marked(os.fsencode(tmp_path), b"0123456789abcdef")
    assert not os.listdir(tmp_path)


def test_a_transaction_that_nobody_can_finish_keeps_nobody_from_other_files(tmp_path: Path) -> None:
    """An append-only file, say, or one in a directory of another user's."""
    (tmp_path / "log").write_bytes(b"old")
    effects = [Effect(b"a", True, 0), Effect(b"log", True, os.stat(tmp_path / "log").st_ino)]
    make(tmp_path, effects, staged=2).close()

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "rename" and args[1] == b"log":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return call(*args, **kwargs)

    with intercepted(around):
        for _ in range(2):
            with PathLock(tmp_path / "another"):
                pass
            with pytest.raises(FileOperationError, match="not permitted"), PathLock(tmp_path / "log"):
                pass
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "log").read_bytes()) == (b"new 0", b"old")
    with PathLock(tmp_path / "another"), PathLock(tmp_path / "log"):
        assert (tmp_path / "log").read_bytes() == b"new 1"
    assert not txn(tmp_path)


def test_what_is_left_of_a_transaction_that_never_was_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    made = make(tmp_path, [Effect(b"a", True, os.stat(tmp_path / "a").st_ino)], staged=1)
    made.close()
    os.unlink(txn_directory(os.fsencode(tmp_path)) + b"/" + made.id + b".journal")

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "unlink" and args[0].endswith(b".new"):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return call(*args, **kwargs)

    with intercepted(around):
        for name in ("a", "another"):
            with PathLock(tmp_path / name):
                assert (tmp_path / "a").read_bytes() == b"old"


def test_one_that_nobody_can_finish_in_a_base_further_in_keeps_all_from_it(tmp_path: Path) -> None:
    """Its marks are where nobody looks any more, once there is a base around it."""
    inner = tmp_path / "inner"
    inner.mkdir()
    make(inner, [Effect(b"a", True, 0)], staged=1).close()

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "rename" and args[1] == b"a":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return call(*args, **kwargs)

    with intercepted(around), pytest.raises(FileOperationError, match="not permitted"):
        PathLock(inner / "another", base=tmp_path).acquire()
    with PathLock(inner / "another", base=tmp_path):
        assert (inner / "a").read_bytes() == b"new 0"


def test_a_living_transaction_is_left_alone(tmp_path: Path) -> None:
    made = make(tmp_path, [Effect(b"a", True, 0)], staged=1)
    files = txn(tmp_path)
    assert recover_root(os.fsencode(tmp_path)) == 0
    assert txn(tmp_path) == files
    made.close()
    assert recover_root(os.fsencode(tmp_path)) == 1


def test_a_mark_whose_transaction_stays_held_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "RECOVERER_PATIENCE_S", 0.01)
    made = make(tmp_path, [], staged=0)
    with pytest.raises(FileOperationError, match=made.id.decode()) as caught:
        recover_marked(os.fsencode(tmp_path), made.id)
    assert caught.value.errno == errno.EBUSY
    made.close()
    recover_marked(os.fsencode(tmp_path), made.id)
    assert not txn(tmp_path)


@pytest.mark.parametrize("text", [b"", b"somebody's note", b"../../../etc/passwd", b"0123456789abcde", b"\0" * 16])
def test_a_mark_that_names_no_transaction_is_nothing_to_recover(tmp_path: Path, text: bytes) -> None:
    make(tmp_path, [], staged=0).close()
    files = txn(tmp_path)
    recover_marked(os.fsencode(tmp_path), text)
    assert txn(tmp_path) == files


def test_files_that_are_not_a_transactions_stay(tmp_path: Path) -> None:
    make(tmp_path, []).close()
    (tmp_path / ".ringpool/txn/notes.txt").write_text("mine")
    recover_root(os.fsencode(tmp_path))
    assert txn(tmp_path) == ["notes.txt"]


def test_what_has_lost_its_lock_file_is_recovered_all_the_same(tmp_path: Path) -> None:
    for recover in (
        lambda made: recover_root(os.fsencode(tmp_path)),
        lambda made: recover_marked(os.fsencode(tmp_path), made.id),
    ):
        made = make(tmp_path, [Effect(b"a", True, 0)], staged=1)
        made.close()
        os.unlink(txn_directory(os.fsencode(tmp_path)) + b"/" + made.id + b".lock")
        recover(made)
        assert (tmp_path / "a").read_bytes() == b"new 0"
        assert not txn(tmp_path)
        (tmp_path / "a").unlink()


def test_a_forked_child_does_not_keep_a_dead_transaction_alive(tmp_path: Path) -> None:
    with Child(child_transaction.fork_while_held, tmp_path) as child:
        child.wait_for("forked")
        assert recover_root(os.fsencode(tmp_path)) == 0, "its parent lives"
        child.kill()
        assert recover_root(os.fsencode(tmp_path)) == 1
        child.answer()
    assert (tmp_path / "a").read_bytes() == b"new 0"


def test_an_id_that_a_recovery_took_for_a_dead_ones_is_not_used(tmp_path: Path) -> None:
    taken: list[str] = []

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "flock" and not taken:  # it is made, and not yet locked
            taken.extend(txn(tmp_path))
            recover_root(os.fsencode(tmp_path))
        return call(*args, **kwargs)

    with intercepted(around):
        made = Journal.begin(os.fsencode(tmp_path), durable=True)
    assert taken
    assert txn(tmp_path) == [f"{made.id.decode()}.lock"] != taken
    made.close()


@pytest.mark.parametrize(
    ("base_mode", "mode"), [(0o755, 0o700), (0o775, 0o770), (0o2775, 0o2770), (0o777, 0o707 | 0o070), (0o1777, 0o1777)]
)
def test_what_is_staged_is_open_to_whom_the_base_is_open_for_writing(tmp_path: Path, base_mode: int, mode: int) -> None:
    base = tmp_path / "base"
    base.mkdir()
    base.chmod(base_mode)
    make(base, []).close()
    assert stat.S_IMODE((base / ".ringpool/txn").stat().st_mode) == mode


def test_a_base_that_a_new_one_encloses_is_recovered_by_who_knew_it(tmp_path: Path) -> None:
    """From then on nobody sees the marks of its dead."""
    base = tmp_path / "base"
    base.mkdir()
    with PathLock(base / "a"):
        pass
    make(base, [Effect(b"a", True, 0), Effect(b"b", True, 0)], staged=2).close()
    with PathLock(base / "a"):
        assert not (base / "a").exists(), "it is known, and there is no mark: the test has no teeth"
    (tmp_path / ".ringpool").mkdir()
    with PathLock(base / "b"):
        assert ((base / "a").exists(), (base / "b").exists()) == (True, True)


def test_a_directory_that_has_got_the_path_of_a_known_base_is_recovered(tmp_path: Path) -> None:
    for name in ("base", "copy"):
        (tmp_path / name).mkdir()
    base = tmp_path / "base"
    with PathLock(base / "a", base=base):
        pass
    make(tmp_path / "copy", [Effect(b"a", True, 0)], staged=1).close()
    base.rename(tmp_path / "former")
    (tmp_path / "copy").rename(base)
    with PathLock(base / "a", base=base):
        assert (base / "a").exists()


def test_who_comes_while_another_recovers_waits_for_it(tmp_path: Path) -> None:
    """After a power cut there are no marks: only this keeps a second process from what is half done."""
    make(tmp_path, [Effect(b"a", True, 0), Effect(b"b", True, 0)], staged=2).close()
    seen: list[bool] = []
    threads: list[threading.Thread] = []

    def come_later() -> None:
        recover_root(os.fsencode(tmp_path))
        seen.append((tmp_path / "a").exists() and (tmp_path / "b").exists())

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "rename" and not threads and (tmp_path / "a").exists():
            threads.append(threading.Thread(target=come_later))
            threads[0].start()
            threads[0].join(0.2)  # where it does not wait, it is through by then
        return call(*args, **kwargs)

    with intercepted(around):
        assert recover_root(os.fsencode(tmp_path)) == 1
        threads[0].join()
    assert seen == [True]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_in_a_sticky_directory_a_strangers_journal_is_not_carried_out(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o1777)
    made = make(tmp_path, [Effect(b"a", True, 0)], staged=1)
    made.close()
    journal_file = os.path.join(txn_directory(os.fsencode(tmp_path)), made.id + b".journal")
    os.chown(journal_file, 12345, 12345)
    os.chown(tmp_path, 23456, 23456)
    assert recover_root(os.fsencode(tmp_path)) == 0
    with pytest.raises(FileOperationError) as caught:
        recover_marked(os.fsencode(tmp_path), made.id)
    assert caught.value.errno == errno.EPERM
    assert not (tmp_path / "a").exists()
    os.chown(tmp_path, 12345, 12345)
    assert recover_root(os.fsencode(tmp_path)) == 1, "the directory owner's"


def test_what_a_group_shares_its_members_may_recover_whatever_the_umask(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o2775)
    before = os.umask(0o077)
    try:
        made = make(tmp_path, [Effect(b"a", True, 0)], staged=1)
    finally:
        os.umask(before)
    made.close()
    txn_path = Path(os.fsdecode(txn_directory(os.fsencode(tmp_path))))
    for suffix, mode in ((".lock", 0o660), (".journal", 0o640)):  # which nobody but its author is to write
        assert stat.S_IMODE((txn_path / (made.id.decode() + suffix)).stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_journal_is_carried_out_only_where_its_author_may_make_files(tmp_path: Path) -> None:
    """Or whoever recovers it would do for him what he may not."""
    os.chown(tmp_path, 12345, 12345)
    (tmp_path / "roots").mkdir(mode=0o755)
    (tmp_path / "roots/kept").write_text("kept")
    inode = (tmp_path / "roots/kept").stat().st_ino
    for name, is_staged, replaced in ((b"a", True, 0), (b"kept", True, inode), (b"kept", False, inode)):
        made = make(tmp_path, [Effect(b"roots/" + name, is_staged, replaced)], staged=1)
        made.close()
        files = os.path.join(txn_directory(os.fsencode(tmp_path)), made.id)
        os.chown(files + b".journal", 12345, 12345)
        with pytest.raises(PermissionError, match="a journal of user 12345"):
            recover_root(os.fsencode(tmp_path))
        with pytest.raises(PermissionError, match=r"roots, where that user may make none"):
            recover_marked(os.fsencode(tmp_path), made.id)
        assert [path.name for path in (tmp_path / "roots").iterdir()] == ["kept"]
        assert (tmp_path / "roots/kept").read_text() == "kept"
        for suffix in (b".journal", b".lock", b".0.new"):
            os.unlink(files + suffix)
    made = make(tmp_path, [Effect(b"a", True, 0)], staged=1)
    made.close()
    os.chown(os.path.join(txn_directory(os.fsencode(tmp_path)), made.id) + b".journal", 12345, 12345)
    assert recover_root(os.fsencode(tmp_path)) == 1
    assert (tmp_path / "a").read_bytes() == b"new 0"


def test_a_link_to_another_file_is_no_journal(tmp_path: Path) -> None:
    """Its owner would be taken for the author."""
    made = make(tmp_path, [Effect(b"a", True, 0)], staged=1)
    made.close()
    journal_file = os.path.join(txn_directory(os.fsencode(tmp_path)), made.id) + b".journal"
    os.link(journal_file, tmp_path / "of somebody")
    with pytest.raises(PermissionError, match="is a link to another file"):
        recover_root(os.fsencode(tmp_path))
    assert not (tmp_path / "a").exists()
    (tmp_path / "of somebody").unlink()
    assert recover_root(os.fsencode(tmp_path)) == 1


def test_what_is_on_another_mount_by_now_is_neither_done_nor_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    make(tmp_path, [Effect(b"a", True, 0), Effect(b"d/b", True, 0)], staged=2).close()
    foreign, real = (tmp_path / "d").stat().st_ino, journal.mount_of
    with monkeypatch.context() as patch:
        patch.setattr(journal, "mount_of", lambda fd: (0, b"") if os.fstat(fd).st_ino == foreign else real(fd))
        with pytest.raises(OSError, match="another mount"):
            recover_root(os.fsencode(tmp_path))
        assert not (tmp_path / "a").exists()
    assert recover_root(os.fsencode(tmp_path)) == 1
    assert [(tmp_path / name).read_bytes() for name in ("a", "d/b")] == [b"new 0", b"new 1"]


def test_an_old_link_to_another_file_is_no_leave_to_remove_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("replaced")
    (tmp_path / "b").write_text("another")
    made = make(tmp_path, [Effect(b"a", False, (tmp_path / "a").stat().st_ino)])
    old = os.path.join(txn_directory(os.fsencode(tmp_path)), made.old(0))
    os.link(tmp_path / "b", old)
    unlinked: list[bytes] = []

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "unlink":
            unlinked.append(args[0])
        return call(*args, **kwargs)

    with intercepted(around):
        made.recover()
    assert b"a" not in unlinked, "it is kept until the journal is gone"
    made.close()
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b").read_text() == "another"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_who_holds_the_turn_where_only_journals_of_strangers_are_holds_up_nobody(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o1777)
    made = make(tmp_path, [Effect(b"a", True, 0)], staged=1)
    made.close()
    directory = txn_directory(os.fsencode(tmp_path))
    for name in os.listdir(directory):
        os.chown(os.path.join(directory, name), 12345, 12345)
    with Child(child_transaction.hold_turn, tmp_path) as child:
        child.wait_for("held")
        assert recover_root(os.fsencode(tmp_path), 0.0) == 0

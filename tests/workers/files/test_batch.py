"""Batches: whole files, durable together, and an error that says which of them stand."""

from __future__ import annotations

import errno
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.workers.files.child import Child
from tests.workers.files.child_atomic import Call, die_at, failing, interrupt_at, names, open_files, traced
from tests.workers.files.model import Recording
from tests.workers.files.trials import room

from ringpool.errors import AtomicWriteError, BatchWriteError, DurabilityError
from ringpool.workers.files import batch
from ringpool.workers.files.batch import write_batch
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.naming import is_staging_name
from ringpool.workers.files.oslayer import intercepted

LEVELS = [Durability.ATOMIC, Durability.DATA, Durability.FULL]


def items(directory: Path, n_files: int, n_directories: int = 1) -> list[tuple[Path, bytes]]:
    for n in range(n_directories):
        (directory / f"d{n}").mkdir(exist_ok=True)
    return [(directory / f"d{n % n_directories}/{n}.bin", b"new %d" % n) for n in range(n_files)]


def contents(batch: list[tuple[Path, bytes]]) -> list[bytes | None]:
    return [path.read_bytes() if path.exists() else None for path, _ in batch]


def left_over(directory: Path) -> list[Path]:
    return [path for path in directory.rglob(".*") if path.is_file()]


def story(trace: list[Call]) -> list[str]:
    return [name for name, _, _ in trace if name in ("write", "fsync", "sync_file_range", "syncfs", "rename")]


@pytest.mark.parametrize("level", list(Durability))
@pytest.mark.parametrize(("n_files", "n_directories"), [(0, 1), (1, 1), (7, 1), (8, 3), (20, 9)])
def test_every_file_has_its_content(tmp_path: Path, level: Durability, n_files: int, n_directories: int) -> None:
    files = open_files()
    wanted = items(tmp_path, n_files, n_directories)
    for _ in range(2):  # made, then replaced
        report = write_batch(iter(wanted), durability=level)
        assert contents(wanted) == [content for _, content in wanted]
        assert (report.n_files, report.content_bytes) == (n_files, sum(len(content) for _, content in wanted))
    assert left_over(tmp_path) == []
    assert open_files() == files


def test_text_and_any_buffer_are_taken(tmp_path: Path) -> None:
    write_batch([(tmp_path / "a", "\u20ac"), (os.fsencode(tmp_path / "b"), bytearray(b"b")), (tmp_path / "c", b"")])
    assert [(tmp_path / name).read_bytes() for name in "abc"] == ["\u20ac".encode(), b"b", b""]


def test_a_mapping_is_taken_by_its_items(tmp_path: Path) -> None:
    write_batch({tmp_path / "x1": "content", tmp_path / "x2": b"more"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x1": "content", "x2": "more"}


def test_words_are_no_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for items in (["x1"], "x1", {"x1", "x2"}):
        with pytest.raises(TypeError, match="no pair"):
            write_batch(items)  # pyright: ignore[reportArgumentType]
    assert not os.listdir(tmp_path)


def test_of_two_items_for_one_target_the_later_stands(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a")
    write_batch([(tmp_path / "a", b"1"), (tmp_path / "link", b"2"), (f"{tmp_path}/./a", b"3")])
    assert (tmp_path / "a").read_bytes() == b"3"
    assert (tmp_path / "link").is_symlink()
    assert left_over(tmp_path) == []


# ---- the order that durability needs ---------------------------------------------------------------------------------


def test_few_files_are_synced_one_by_one_before_any_rename(tmp_path: Path) -> None:
    with traced() as trace:
        report = write_batch(items(tmp_path, 3, 2))
    assert story(trace) == ["write", "sync_file_range"] * 3 + ["fsync"] * 3 + ["rename"] * 3 + ["fsync"] * 2
    assert report[2:] == (1, 0, 5)


@pytest.mark.parametrize("n_directories", [1, 7, 8])
def test_many_files_are_synced_at_once_and_many_directories_too(tmp_path: Path, n_directories: int) -> None:
    with traced() as trace:
        report = write_batch(items(tmp_path, 9, n_directories))
    last = ["syncfs"] if n_directories == 8 else ["fsync"] * n_directories
    told = [name for name in story(trace) if name != "sync_file_range"]
    assert told == ["write"] * 9 + ["syncfs"] + ["rename"] * 9 + last
    assert (report.n_groups, report.n_syncfs, report.n_fsyncs) == (1, 1 + last.count("syncfs"), last.count("fsync"))


def test_what_syncfs_syncs_was_opened_before_the_first_write_so_that_it_tells_of_its_errors(tmp_path: Path) -> None:
    with traced() as trace:
        write_batch(items(tmp_path, 9, 3))
    calls_made = [(name, args, result) for name, args, result in trace if name in ("open", "write", "syncfs")]
    [synced] = [args[0] for name, args, _ in calls_made if name == "syncfs"]
    opened = next(n for n, (name, args, result) in enumerate(calls_made) if name == "open" and result == synced)
    assert opened < [name for name, _, _ in calls_made].index("write")
    assert calls_made[opened][1][1] & os.O_PATH == 0


@pytest.mark.parametrize(("level", "syncs"), [(Durability.ATOMIC, set()), (Durability.DATA, {"syncfs"})])
def test_lower_levels_sync_less(tmp_path: Path, level: Durability, syncs: set[str]) -> None:
    with traced() as trace:
        write_batch(items(tmp_path, 9), durability=level)
    told = [name for name in story(trace) if name != "sync_file_range"]
    assert set(told) - {"write", "rename"} == syncs
    assert told[-9:] == ["rename"] * 9


@pytest.mark.parametrize("reason", ["an old kernel", "a file system that is not known to do it"])
def test_every_file_is_synced_by_itself_where_syncfs_is_not_to_be_relied_on(
    tmp_path: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "an old kernel":
        monkeypatch.setattr(batch.platform, "release", lambda: "5.7.19-generic")
    else:
        monkeypatch.setattr(batch, "file_system_of", lambda _: 0x6969)
    with traced() as trace:
        report = write_batch(items(tmp_path, 9, 9))
    assert story(trace) == ["write", "fsync"] * 9 + ["rename"] * 9 + ["fsync"] * 9
    assert (report.n_syncfs, report.n_fsyncs) == (0, 18)


@pytest.mark.parametrize(
    ("release", "tells"),
    [("5.8.0", True), ("5.7.19", False), ("4.19", False), ("10.0-x", True), ("6.1", True), ("odd", False)],
)
def test_the_kernels_version_says_whether_syncfs_tells_of_errors(
    release: str, tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch.platform, "release", lambda: release)
    assert batch._syncfs_tells() is tells


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_a_group_is_bounded_in_files_bytes_and_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "GROUP_FILES_MAX", 5)
    assert write_batch(items(tmp_path, 12)).n_groups == 3
    monkeypatch.setattr(batch, "GROUP_DIRECTORIES_MAX", 2)
    assert write_batch(items(tmp_path, 12, 6)).n_groups == 6
    monkeypatch.setattr(batch, "GROUP_BYTES_MAX", 12)
    assert write_batch(items(tmp_path, 8)).n_groups == 3  # of 5, 5 and 5 bytes


def test_a_generator_is_not_drawn_further_than_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "GROUP_FILES_MAX", 5)
    wanted = items(tmp_path, 17)
    ahead: list[int] = []

    def drawn() -> Iterator[tuple[Path, bytes]]:
        for n, item in enumerate(wanted):
            ahead.append(n - len(names(tmp_path / "d0") - {path.name for path in left_over(tmp_path)}))
            yield item

    write_batch(drawn(), durability="atomic")
    assert max(ahead) == 4


def test_few_descriptors_are_open_at_a_time(tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(open_files())
        return call(*args, **kwargs)

    before = open_files()
    with intercepted(watch):
        write_batch(items(tmp_path, 100, 3))
    assert max(seen) - before <= 3 + batch.TOGETHER_MIN


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_files", "error"), [(3, errno.EIO), (3, errno.ENOSPC), (3, errno.EINTR), (9, errno.EIO)], ids=str
)
@pytest.mark.parametrize("level", LEVELS)
def test_any_call_may_fail_and_the_error_says_which_files_stand(
    tmp_path: Path, n_files: int, level: Durability, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "GROUP_FILES_MAX", n_files - 1)
    wanted = items(tmp_path, n_files, 2)
    new = [content for _, content in wanted]
    n_failed = 0
    for nth in count(1):
        for n, (path, _) in enumerate(wanted):
            path.write_bytes(b"old")
            path.chmod(0o640) if n % 2 else path.unlink()
        before = contents(wanted)
        files = open_files()
        with failing(lambda n, _, nth=nth: n == nth, error) as seen:
            try:
                write_batch(wanted, durability=level)
                failure = None
            except BatchWriteError as raised:
                failure = raised
        assert left_over(tmp_path) == [], seen
        assert open_files() <= files, seen
        if failure is None:
            assert contents(wanted) == new, seen
        else:
            n_failed += 1
            assert failure.errno == error
            assert isinstance(failure.__cause__, AtomicWriteError | DurabilityError)
            assert 0 <= failure.n_durable <= failure.n_visible <= n_files
            stand = failure.n_visible
            assert contents(wanted) == new[:stand] + before[stand:], seen
            if failure.n_visible > failure.n_durable:
                assert isinstance(failure.__cause__, DurabilityError)
        if len(seen) < nth:
            break
    assert n_failed > 2 * n_files


def test_what_was_renamed_before_an_error_is_durable_when_the_error_says_so(tmp_path: Path) -> None:
    wanted = items(tmp_path, 9, 2)
    n_renames = 0

    def fail(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal n_renames
        n_renames += name == "rename"
        if name == "rename" and n_renames == 4:
            raise OSError(errno.EROFS, "read-only")
        result = call(*args, **kwargs)
        seen.append(name)
        return result

    seen: list[str] = []
    with intercepted(fail), pytest.raises(BatchWriteError) as caught:
        write_batch(wanted)
    assert (caught.value.n_durable, caught.value.n_visible) == (3, 3)
    assert caught.value.path == str(wanted[3][0])
    assert "3 files of the batch are written" in str(caught.value)
    after = seen[len(seen) - seen[::-1].index("rename") :]
    assert after.count("fsync") == 2
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.args, copy.n_durable, copy.n_visible, str(copy)) == (caught.value.args, 3, 3, str(caught.value))


@pytest.mark.parametrize(("n_files", "n_directories", "call"), [(3, 2, "fsync"), (9, 2, "fsync"), (9, 8, "syncfs")])
def test_what_is_renamed_and_may_not_last_is_not_called_durable(
    tmp_path: Path, n_files: int, n_directories: int, call: str
) -> None:
    wanted = items(tmp_path, n_files, n_directories)
    n_renames = 0

    def last(_: int, name: str) -> bool:
        nonlocal n_renames
        n_renames += name == "rename"
        return name == call and n_renames == n_files

    with failing(last, errno.EIO), pytest.raises(BatchWriteError) as caught:
        write_batch(wanted)
    assert (caught.value.n_durable, caught.value.n_visible) == (0, n_files)
    assert isinstance(caught.value.__cause__, DurabilityError)
    assert contents(wanted) == [content for _, content in wanted]


def test_a_failed_sync_is_not_tried_again_and_nothing_is_renamed(tmp_path: Path) -> None:
    for n_files, call in ((9, "syncfs"), (3, "fsync")):
        with failing(lambda _, name, call=call: name == call, errno.EIO) as seen, pytest.raises(BatchWriteError):
            write_batch(items(tmp_path, n_files))
        assert seen.count(call) == 1
        assert "rename" not in seen
        assert left_over(tmp_path) == []


@pytest.mark.parametrize("bad", [ValueError("theirs"), (b"path only",), ("a", 5)])
def test_what_the_iterable_does_wrong_passes_with_a_note_and_drops_its_group(
    tmp_path: Path, bad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "GROUP_FILES_MAX", 2)
    wanted = items(tmp_path, 3)

    def drawn() -> Iterator[Any]:
        yield from wanted
        if isinstance(bad, Exception):
            raise bad
        yield bad

    with pytest.raises((ValueError, TypeError)) as caught:
        write_batch(drawn())
    assert caught.value.__notes__ == ["write_batch: the first 2 files are written"]
    assert contents(wanted) == [b"new 0", b"new 1", None]
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_ctrl_c_at_any_bytecode_leaves_no_temporary_file(tmp_path: Path, disk_is_full: bool) -> None:
    wanted = items(tmp_path, 2)

    def write() -> None:
        n_writes = count(1)
        second = lambda _, name: disk_is_full and name == "write" and next(n_writes) == 2  # noqa: E731
        with failing(second, errno.ENOSPC), suppress(BatchWriteError):
            write_batch(wanted, durability="atomic")

    n_interrupted = 0
    for nth in count(1, 5):
        interrupted = interrupt_at(nth, write)
        assert left_over(tmp_path) == [], nth
        if not interrupted:
            break
        n_interrupted += 1
    assert n_interrupted > 30


# ---- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_files", ["2", pytest.param("9", marks=pytest.mark.crash)])
def test_a_kill_at_any_call_leaves_each_file_old_or_new_and_the_first_ones_new(tmp_path: Path, n_files: str) -> None:
    with Child(die_at_every_call_of_a_batch, tmp_path, n_files) as child:
        child.succeed()


def die_at_every_call_of_a_batch(directory: str, n_files: str) -> None:
    wanted = items(Path(directory), int(n_files))
    for nth in count(1):
        for path, _ in wanted:
            path.write_bytes(b"old")
        pid = os.fork()
        if pid == 0:
            die_at(nth, lambda: write_batch(wanted))
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        stands = [content == new for content, (_, new) in zip(contents(wanted), wanted, strict=True)]
        assert all(content == b"old" or new for content, new in zip(contents(wanted), stands, strict=True))
        assert stands == sorted(stands, reverse=True)
        for path in left_over(Path(directory)):
            assert is_staging_name(path.name.encode())
            path.unlink()
        if status == 0:
            assert all(stands)
            break
        assert os.WTERMSIG(status) == signal.SIGKILL


# ---- power cuts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [Durability.DATA, Durability.FULL])
@pytest.mark.parametrize(("n_files", "n_directories"), [(3, 2), (9, 1), (8, 8)])
def test_a_power_cut_leaves_each_file_old_or_new_and_after_the_return_new(
    level: Durability, n_files: int, n_directories: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "GROUP_FILES_MAX", max(8, n_files - 1))
    with room() as directory:
        wanted = items(directory, n_files, n_directories)
        for path, _ in wanted[::2]:
            path.write_bytes(b"the old content")
        before = contents(wanted)
        recording = Recording(directory, Random(1))
        with recording:
            write_batch(wanted, durability=level)
        recording.mark("returned")
        n_states = 0
        for disk in islice(recording.disks(Random(2)), 4000):
            found = [disk.contents.get(os.fsencode(path.relative_to(directory))) for path, _ in wanted]
            for content, old, (_, new) in zip(found, before, wanted, strict=True):
                assert content == new or (content == old and not (disk.marks and level is Durability.FULL))
            n_states += 1
        assert n_states > 20

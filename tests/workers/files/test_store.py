"""The file store: whole files, one writer at a time, nothing outside its base; from threads, processes and asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import io
import os
import shutil
import stat
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.coordinator.program import wait_until
from tests.workers.files import child_store
from tests.workers.files.child import Child
from tests.workers.files.child_locks import lock_file, waiting
from tests.workers.files.model import Recording

from ringpool.errors import (
    ContentCorruptError,
    DurabilityError,
    FileMissingError,
    FileOperationError,
    LockTimeoutError,
    PathNameError,
    PathOutsideError,
)
from ringpool.workers.files.aiostore import AsyncFileStore, in_thread
from ringpool.workers.files.locks import PathLock
from ringpool.workers.files.naming import is_staging_name, random_token, staging_name
from ringpool.workers.files.objects import ContentAddress
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.store import FileStore


class Blocking:
    """An ``AsyncFileStore`` called like a ``FileStore``, each operation in a loop of its own."""

    def __init__(self, store: AsyncFileStore) -> None:
        self.aio = store

    def find(self, pattern: str | bytes, *, sort: bool = False) -> Iterator[str]:
        async def find() -> list[str]:
            return [path async for path in self.aio.find(pattern, sort=sort)]

        return iter(asyncio.run(find()))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def run(*args: Any, **kwargs: Any) -> Any:
            return await getattr(self.aio, name)(*args, **kwargs)

        return lambda *args, **kwargs: asyncio.run(run(*args, **kwargs))


@pytest.fixture(params=["threads", "asyncio"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A store in tmp_path/base, without fsync; beside it there is a file that it must never touch."""
    (tmp_path / "outside").write_text("outside")
    if request.param == "threads":
        return FileStore(tmp_path / "base", durability="atomic")
    return Blocking(AsyncFileStore(tmp_path / "base", durability="atomic"))


class Failing(io.RawIOBase):
    """A stream that gives some bytes, and then the next of its answers."""

    def __init__(self, answer: Any) -> None:
        self.answers = [answer, b"some"]

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> Any:
        answer = self.answers.pop() if self.answers else b""
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (ConnectionResetError(errno.ECONNRESET, "reset"), ConnectionResetError),
        (None, BlockingIOError),  # no end: nothing is there yet
        ("text", TypeError),
        ("", TypeError),
    ],
)
def test_what_a_stream_raises_comes_through_and_nothing_is_stored(
    answer: object, kind: type[Exception], store: Any, plain: FileStore
) -> None:
    with pytest.raises(kind) as raised:
        store.add(Failing(answer))
    assert not isinstance(raised.value, FileOperationError)
    assert list(plain.find("**")) == []


def test_a_source_that_cannot_be_opened_is_named(tmp_path: Path, plain: FileStore) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileOperationError) as raised:
        plain.add(tmp_path / "loop")
    assert (raised.value.path, raised.value.errno) == (str(tmp_path / "loop"), errno.ELOOP)
    with pytest.raises(PathNameError):
        plain.add(Path("nul\0"))


def test_added_content_is_read_only_and_obeys_the_umask(plain: FileStore) -> None:
    before = os.umask(0o027)
    try:
        address = plain.add(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(plain.stat(address.path).st_mode) == 0o440


@pytest.fixture
def plain(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "base", durability="atomic")


def left_over(base: Path) -> list[Path]:
    """Temporary files."""
    return [path for path in base.rglob("*") if is_staging_name(os.fsencode(path.name))]


@pytest.mark.parametrize("store", ["threads", "asyncio"], indirect=True)
def test_a_store_that_is_new_takes_no_lock_but_those_of_its_paths(store: Any, plain: FileStore) -> None:
    plain.write("first", b"")
    with contextlib.ExitStack() as held:
        stripes = set[int]()
        for number in range(10_000):  # all stripes but one, that of the path to be written
            lock = plain.lock(f"{number}", "shared")
            if lock.stripe not in stripes and lock.stripe != plain.lock("written").stripe:
                stripes.add(lock.stripe)
                held.enter_context(lock)
        assert len(stripes) == 255
        store.write("written", b"x")
    assert plain.read("written") == b"x"


# ---- one file --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(store: Any) -> None:
    store.write("a/b/c.txt", "text\r\n\u20ac")
    assert store.read("a/b/c.txt") == "text\r\n\u20ac".encode()
    assert store.read_text("a/b/c.txt") == "text\r\n\u20ac"
    store.write(Path("a.bin"), b"\0\xff")
    store.write(b"a.bin", bytearray(b"new"))
    assert store.read("a.bin") == b"new"
    assert store.read_text("a/b/c.txt", "latin-1").startswith("text\r\n\u00e2")


def test_append_adds_to_the_end_and_makes_the_file(store: Any) -> None:
    for piece in (b"1", "\u20ac", bytearray(b"3"), b""):
        store.append("new/log", piece)
    assert store.read("new/log") == b"1\xe2\x82\xac3"


def test_append_keeps_the_mode_and_copies_also_where_the_kernel_cannot(tmp_path: Path, plain: FileStore) -> None:
    def refuse(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "copy_file_range":
            raise OSError(errno.EOPNOTSUPP, "")
        return call(*args, **kwargs)

    content = os.urandom(3 << 20)
    plain.write("a", content)
    (tmp_path / "base/a").chmod(0o640)
    with intercepted(refuse):
        plain.append("a", b"end")
    plain.append("a", b"!")
    assert plain.read("a") == content + b"end!"
    assert stat.S_IMODE(plain.stat("a").st_mode) == 0o640


def test_update_gets_the_old_content_and_gives_the_new_one(store: Any) -> None:
    assert store.update("n", lambda old: b"%d" % (int(old) + 1), missing=b"0") == b"1"
    assert store.update("n", lambda old: f"{int(old) + 1}") == b"2"
    assert store.read("n") == b"2"


@pytest.mark.parametrize("wrong", [None, 5])
def test_an_update_that_fails_changes_nothing(store: Any, wrong: Any) -> None:
    store.write("n", b"old")
    with pytest.raises(ZeroDivisionError):
        store.update("n", lambda old: old * (1 // 0))
    with pytest.raises(TypeError):
        store.update("n", lambda old: wrong)
    assert store.read("n") == b"old"
    store.write("n", b"new")  # it is not locked


def test_an_update_of_nothing_is_an_error_unless_told_what_to_begin_with(store: Any) -> None:
    with pytest.raises(FileMissingError):
        store.update("n", lambda old: old)
    assert not store.exists("n")


def test_delete_and_rename(store: Any) -> None:
    store.write("a", b"1")
    store.write("b", b"2")
    store.rename("a", "sub/a")
    assert (store.exists("a"), store.read("sub/a")) == (False, b"1")
    with pytest.raises(FileOperationError) as raised:
        store.rename("b", "sub/a")
    assert raised.value.errno == errno.EEXIST
    store.rename("b", "sub/a", replace=True)
    assert (store.exists("b"), store.read("sub/a")) == (False, b"2")
    store.delete("sub/a")
    assert store.list("sub") == []


def test_a_rename_that_must_not_replace_works_where_the_file_system_cannot_say_so(plain: FileStore) -> None:
    def refuse(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "rename_exclusive":
            raise OSError(errno.EINVAL, "")
        return call(*args, **kwargs)

    plain.write("a", b"1")
    plain.write("b", b"2")
    with intercepted(refuse):
        plain.rename("a", "c")
        with pytest.raises(FileOperationError):
            plain.rename("b", "c")
    assert (plain.list(), plain.read("c"), plain.read("b")) == (["b", "c"], b"1", b"2")


@pytest.mark.parametrize("path", ["a", "sub/a"])
@pytest.mark.parametrize("call", ["read", "read_text", "stat", "delete", "rename"])
def test_a_missing_file_is_named_and_nothing_is_made(store: Any, call: str, path: str, tmp_path: Path) -> None:
    store.write("there", b"")
    with pytest.raises(FileNotFoundError) as raised:
        getattr(store, call)(*[path, "other"][: 2 if call == "rename" else 1])
    assert isinstance(raised.value, FileMissingError)
    assert raised.value.path == os.fspath(tmp_path / "base" / path)
    assert store.list() == ["there"]
    assert not store.exists(path)


def test_a_store_that_only_reads_makes_nothing(tmp_path: Path, store: Any) -> None:
    with pytest.raises(FileMissingError):
        store.read("a")
    with pytest.raises(FileMissingError):
        store.delete("a")
    assert not store.exists("a")
    assert not (tmp_path / "base").exists()


def test_nothing_exists_below_a_file(store: Any) -> None:
    store.write("a", b"")
    assert not store.exists("a/b")
    with pytest.raises(FileOperationError):
        store.write("a/b", b"")
    assert store.read("a") == b""


@pytest.mark.parametrize(
    ("directory", "names"),
    [(".", ["a", "sub"]), ("./", ["a", "sub"]), ("sub", ["b"]), ("sub/", ["b"]), ("sub//", ["b"]), ("./sub/.", ["b"])],
)
def test_a_directory_may_be_named_with_a_slash_at_its_end(store: Any, directory: str, names: list[str]) -> None:
    store.write("a", b"")
    store.write("sub/b", b"")
    assert store.list(directory) == names
    for call in (store.read, store.delete, lambda path: store.write(path, b"")):
        with pytest.raises(FileOperationError):
            call(directory)


@pytest.mark.parametrize(
    ("directory", "error"),
    [("/", PathOutsideError), ("../", PathOutsideError), ("", PathNameError), (".ringpool/", PathNameError)],
)
def test_what_is_no_directory_of_the_store_is_not_listed(store: Any, directory: str, error: type[Exception]) -> None:
    store.write("a", b"")
    with pytest.raises(error):
        store.list(directory)


def test_a_link_inside_is_followed_and_one_that_is_removed_is_not(tmp_path: Path, store: Any) -> None:
    store.write("d/a", b"1")
    (tmp_path / "base/link").symlink_to("d/a")
    store.write("link", b"2")
    store.append("link", b"3")
    assert store.read("link") == store.read("d/a") == b"23"
    assert (tmp_path / "base/link").is_symlink()
    store.rename("link", "moved")
    assert (tmp_path / "base/moved").is_symlink()
    store.delete("moved")
    assert store.read("d/a") == b"23"


def test_no_durability_still_means_whole_files(tmp_path: Path) -> None:
    store = FileStore(tmp_path, durability="none")
    store.write("a", b"old")
    with child_store.intercepted_write_error(), pytest.raises(FileOperationError):
        store.write("a", b"new", durability="none")
    assert store.read("a") == b"old"


def test_names_need_not_be_text(store: Any) -> None:
    name = b"caf\xe9\xff"
    store.write(name, b"1")
    assert store.read(os.fsdecode(name)) == b"1"
    assert store.list() == [os.fsdecode(name)]
    store.write("n" * 255, b"2")
    assert store.read("n" * 255) == b"2"


# ---- its base --------------------------------------------------------------------------------------------------------

CALLS: list[tuple[str, Callable[[Any, Any], object]]] = [
    ("read", lambda store, path: store.read(path)),
    ("write", lambda store, path: store.write(path, b"x")),
    ("append", lambda store, path: store.append(path, b"x")),
    ("update", lambda store, path: store.update(path, lambda old: b"x", missing=b"")),
    ("delete", lambda store, path: store.delete(path)),
    ("rename", lambda store, path: store.rename(path, "other", replace=True)),
    ("rename to", lambda store, path: store.rename("there", path, replace=True)),
    ("stat", lambda store, path: store.stat(path)),
    ("list", lambda store, path: store.list(path)),
]


@pytest.mark.parametrize("call", [call for _, call in CALLS], ids=[name for name, _ in CALLS])
@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("../outside", PathOutsideError),
        ("a/../../outside", PathOutsideError),
        ("/etc/passwd", PathOutsideError),
        ("link/outside", PathOutsideError),
        ("a\0b", PathNameError),
        ("n" * 256, PathNameError),
        (".ringpool/locks/00.lock", PathNameError),
        (".rp-0123456789abcdef.txt", PathNameError),
    ],
)
def test_no_path_leads_out_of_the_base_or_to_our_own_files(
    tmp_path: Path, plain: FileStore, call: Any, path: str, error: type[Exception]
) -> None:
    plain.write("there", b"1")
    (tmp_path / "outside").write_text("outside")
    (tmp_path / "base/link").symlink_to(tmp_path)
    with pytest.raises(error):
        call(plain, path)
    assert (tmp_path / "outside").read_text() == "outside"
    assert plain.list() == ["link", "there"]


@pytest.mark.parametrize("call", [call for name, call in CALLS if name not in ("delete", "rename", "stat")])
def test_a_symlink_out_is_neither_read_nor_written_through(tmp_path: Path, plain: FileStore, call: Any) -> None:
    plain.write("there", b"1")
    (tmp_path / "outside").write_text("outside")
    (tmp_path / "base/link").symlink_to(tmp_path / "outside")
    try:
        call(plain, "link")
    except FileOperationError:
        pass
    assert (tmp_path / "outside").read_text() == "outside"


@pytest.mark.parametrize("call", [call for name, call in CALLS if name not in ("stat", "list")])
def test_a_directory_is_no_file(plain: FileStore, call: Any) -> None:
    plain.write("directory/a", b"1")
    plain.write("there", b"1")
    with pytest.raises(FileOperationError):
        call(plain, "directory")
    assert plain.read("directory/a") == b"1"
    assert plain.read("there") == b"1"


MORE = ("append", "update", "delete")  # whose steps are those of the others


def test_a_pipe_is_no_empty_file(tmp_path: Path, plain: FileStore) -> None:
    plain.write("there", b"")
    os.mkfifo(tmp_path / "base/pipe")
    for call in (
        lambda: plain.read("pipe"),
        lambda: plain.append("pipe", b"x"),
        lambda: plain.update("pipe", lambda old: old, missing=b""),
    ):
        with pytest.raises(FileOperationError):
            call()
    assert stat.S_ISFIFO(plain.stat("pipe").st_mode)


# ---- errors and kills ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_garbage")
@pytest.mark.parametrize("error", [errno.ENOSPC, pytest.param(errno.EIO, marks=pytest.mark.crash)])
@pytest.mark.parametrize("name", ["write", "append", "update", "delete", "rename", "add"])
def test_an_error_at_any_call_is_named_and_leaves_the_old_state_or_the_new(
    tmp_path: Path, name: str, error: int
) -> None:
    store = FileStore(tmp_path / "base")
    operations: dict[str, Callable[[], object]] = {
        "write": lambda: store.write("a", b"new"),
        "append": lambda: store.append("a", b"+"),
        "update": lambda: store.update("a", lambda old: old + b"*"),
        "delete": lambda: store.delete("a"),
        "rename": lambda: store.rename("a", "b", replace=True),
        "add": lambda: store.add(b"content"),
    }
    nth = 0
    finished = False
    failures: list[tuple[int | None, bool]] = []
    while not finished:
        nth += 1
        seen: list[str] = []

        store.write("a", b"old", durability="atomic")
        descriptors = len(os.listdir("/proc/self/fd"))
        try:
            with child_store.failing(nth, error, seen):
                operations[name]()
        except FileOperationError as failure:
            failures.append((failure.errno, os.path.isabs(failure.path)))
        finished = len(seen) < nth
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 2, seen  # a lock file may stay open
        assert {path: store.read(path) for path in store.find("*")} in (
            {"a": b"old"},
            {"a": b"new"},
            {"a": b"old+"},
            {"a": b"old*"},
            {"b": b"old"},
            {},
        )
        for path in store.find("objects/**"):
            assert store.read(path) == b"content"
            os.unlink(tmp_path / "base" / path)
        if seen[min(nth, len(seen)) - 1] not in ("unlink",):
            assert left_over(tmp_path / "base") == [], seen
        for path in list(store.find("*")):
            store.delete(path, durability="atomic")
    assert set(failures) == {(error, True)}
    assert len(failures) > 8


def test_a_failed_fsync_is_a_durability_error_and_not_retried(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    syncs = 0

    def fail(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal syncs
        if name == "fsync":
            syncs += 1
            raise OSError(errno.EIO, "")
        return call(*args, **kwargs)

    store.write("a", b"old")
    for call in (
        lambda: store.write("a", b"new"),
        lambda: store.append("a", b"new"),
        lambda: store.update("a", lambda old: b"new"),
        lambda: store.add(b"new"),
    ):
        syncs = 0
        with intercepted(fail), pytest.raises(DurabilityError):
            call()
        assert syncs == 1
        assert store.read("a") == b"old"


@pytest.mark.parametrize(
    "name", ["write", "rename", "add", *(pytest.param(name, marks=pytest.mark.crash) for name in MORE)]
)
def test_a_kill_at_any_call_leaves_the_old_state_or_the_new(tmp_path: Path, name: str) -> None:
    with Child(child_store.die_at_every_call_of, tmp_path / "base", name) as child:
        child.succeed()


@pytest.mark.parametrize("name", ["write", "append", "update", "delete", "rename", "add"])
def test_a_power_cut_leaves_the_old_state_or_the_new_and_the_new_one_after_the_call(tmp_path: Path, name: str) -> None:
    store = FileStore(tmp_path)
    store.write("d/a", b"old")
    operations: dict[str, tuple[Callable[[], object], dict[bytes, bytes]]] = {
        "write": (lambda: store.write("d/a", b"new"), {b"d/a": b"new"}),
        "append": (lambda: store.append("d/a", b"+"), {b"d/a": b"old+"}),
        "update": (lambda: store.update("d/a", lambda old: old + b"*"), {b"d/a": b"old*"}),
        "delete": (lambda: store.delete("d/a"), {}),
        "rename": (lambda: store.rename("d/a", "new/b"), {b"new/b": b"old"}),
        "add": (lambda: store.add(b"content"), {b"d/a": b"old", os.fsencode(child_store.ADDED.path): b"content"}),
    }
    operation, after = operations[name]

    def refuse(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model of the page cache does not know: there are other ways, which it does."""
        if name in ("openat2", "copy_file_range"):
            raise OSError(errno.ENOSYS, "")
        if name == "open" and args[1] & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "")
        return call(*args, **kwargs)

    recording = Recording(tmp_path, Random(0))
    recording.around = refuse
    with recording:
        operation()
        recording.mark("returned")
    states = [(disk.marks, disk.contents) for disk in recording.disks(Random(0))]
    assert len(states) > 2
    for marks, contents in states:
        assert contents == after or (contents == {b"d/a": b"old"} and not marks)


def test_a_rename_syncs_both_directories(tmp_path: Path) -> None:
    """The model takes a rename for one step at both its ends, which not every file system promises."""
    store = FileStore(tmp_path)
    for path in ("d/a", "e/x"):
        store.write(path, b"")
    synced: list[int] = []

    def note(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "fsync":
            synced.append(os.fstat(args[0]).st_ino)
        return call(*args, **kwargs)

    with intercepted(note):
        store.rename("d/a", "e/b")
    assert synced == [(tmp_path / "e").stat().st_ino, (tmp_path / "d").stat().st_ino]


# ---- one writer at a time --------------------------------------------------------------------------------------------


def test_updates_of_processes_threads_and_tasks_are_all_counted(tmp_path: Path) -> None:
    kinds = ("threads", "tasks")
    children = [Child(child_store.count_up, tmp_path / "base", kind, "3", "25") for kind in kinds]
    for child in children:
        with child:
            child.succeed()
    store = FileStore(tmp_path / "base")
    assert store.read("n") == b"150"
    assert len(store.read("log")) == 150
    assert left_over(tmp_path / "base") == []


def test_readers_wait_for_nobody_and_see_whole_files_only(tmp_path: Path, plain: FileStore) -> None:
    plain.write("a", b"0" * 100_000)
    with PathLock(tmp_path / "base/a"):
        reader = threading.Thread(target=plain.read, args=("a",))
        reader.start()
        reader.join(30)
        assert not reader.is_alive()
    with Child(child_store.replace_for_ever, tmp_path / "base") as child:
        child.wait_for("writing")
        seen = {frozenset(plain.read("a")) for _ in range(300)}
        sizes = {len(plain.read("a")) for _ in range(300)}
    assert all(len(digits) == 1 for digits in seen)
    assert sizes == {100_000}
    assert len(seen) > 1


def test_a_lock_that_is_not_had_in_time_is_an_error_and_nothing_changes(tmp_path: Path) -> None:
    store = FileStore(tmp_path, durability="atomic", timeout_s=0.01)
    aio = Blocking(AsyncFileStore(tmp_path, durability="atomic", timeout_s=0.01))
    store.write("a", b"old")
    with Child(child_store.hold, tmp_path / "a") as child:
        child.wait_for("held")
        for either in (store, aio):
            for call in (
                lambda either=either: either.write("a", b"new"),
                lambda either=either: either.append("a", b"new"),
                lambda either=either: either.update("a", lambda old: b"new"),
                lambda either=either: either.delete("a"),
                lambda either=either: either.rename("a", "b"),
                lambda either=either: either.rename("missing", "a", replace=True),
            ):
                with pytest.raises((LockTimeoutError, FileMissingError)):
                    call()
            assert either.read("a") == b"old"


def test_the_lock_of_a_path_is_one_wherever_it_is_taken_from(tmp_path: Path, plain: FileStore) -> None:
    with plain.lock("deep/er/a"):
        plain.write("deep/er/a", b"1")  # re-entrant
        other = FileStore(tmp_path / "base/deep", timeout_s=0, durability="atomic")
        caught: list[type[BaseException]] = []

        def write() -> None:
            try:
                other.write("er/a", b"2")
            except LockTimeoutError as error:
                caught.append(type(error))

        thread = threading.Thread(target=write)
        thread.start()
        thread.join(30)
        assert caught == [LockTimeoutError]
    assert not (tmp_path / "base/deep/.ringpool").exists()
    assert not (tmp_path / "base/deep/er/.ringpool").exists()


def test_a_cancelled_write_keeps_its_lock_until_it_has_ended(tmp_path: Path) -> None:
    store = AsyncFileStore(tmp_path, durability="atomic")
    writing, go_on = threading.Event(), threading.Event()

    def stop(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "write" and bytes(args[1]) == b"first":
            writing.set()
            assert go_on.wait(30)
        return call(*args, **kwargs)

    async def main() -> None:
        first = asyncio.create_task(store.write("a", b"first"))
        await asyncio.to_thread(writing.wait, 30)
        first.cancel()
        second = asyncio.create_task(store.write("a", b"second"))
        for _ in range(20):  # the loop runs on
            await asyncio.sleep(0.001)
        first.cancel()
        assert not first.done()
        assert not second.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await first
        await second

    with intercepted(stop):
        asyncio.run(main())
    assert (tmp_path / "a").read_bytes() == b"second"


def test_an_error_of_what_was_cancelled_is_not_reported_again() -> None:
    started, go_on = threading.Event(), threading.Event()
    reports: list[object] = []

    def fail() -> None:
        started.set()
        assert go_on.wait(30)
        raise OSError("of the thread")

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
        work = asyncio.create_task(in_thread(fail))
        await asyncio.to_thread(started.wait, 30)
        work.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with suppress(asyncio.CancelledError):
            await work
        assert work.cancelled()

    asyncio.run(main())
    gc.collect()
    assert reports == []


def test_a_cancelled_wait_for_the_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    store = AsyncFileStore(tmp_path, durability="atomic")

    async def main() -> None:
        async with await store.lock("a"):
            waiting = asyncio.create_task(store.write("a", b"never"))
            for _ in range(20):
                await asyncio.sleep(0.001)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await store.write("a", b"after")

    asyncio.run(main())
    assert (tmp_path / "a").read_bytes() == b"after"


@pytest.mark.parametrize("kind", [FileStore, AsyncFileStore])
def test_a_base_that_is_removed_and_made_again_is_locked_where_all_others_lock_it(
    tmp_path: Path, kind: type[FileStore | AsyncFileStore]
) -> None:
    made = kind(tmp_path / "base", durability="atomic")
    store: Any = Blocking(made) if isinstance(made, AsyncFileStore) else made
    store.write("a", b"1")
    shutil.rmtree(tmp_path / "base")
    store.write("a", b"2")
    assert store.read("a") == b"2"
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "base/sub").mkdir(parents=True)
    store.write("sub/a", b"3")
    assert (tmp_path / "base/.ringpool").is_dir()
    assert not (tmp_path / "base/sub/.ringpool").exists()


def test_a_base_that_is_a_link_may_be_turned(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
    base = tmp_path / "base"
    base.symlink_to("one")
    store = FileStore(base, durability="atomic")
    store.write("sub/a", b"1")
    base.unlink()
    base.symlink_to("two")
    store.write("sub/a", b"2")
    assert (tmp_path / "two/.ringpool").is_dir()
    assert not (tmp_path / "two/sub/.ringpool").exists()


def test_tasks_go_on_beside_threads_of_their_loop_that_all_wait_for_the_same_lock(tmp_path: Path) -> None:
    plain = FileStore(tmp_path, durability="atomic", timeout_s=20)
    store = AsyncFileStore(tmp_path, durability="atomic", timeout_s=20)

    def add(old: bytes) -> str:
        return str(int(old) + 1)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(2))
        async with await store.lock("n") as lock:
            blocked = [asyncio.create_task(asyncio.to_thread(plain.update, "n", add, missing=b"0")) for _ in range(4)]
            while waiting(lock_file(tmp_path, lock)) != 2:
                await asyncio.sleep(0.001)
            await store.update("n", add, missing=b"0")
        await asyncio.gather(*blocked)

    asyncio.run(main())
    assert plain.read("n") == b"5"


def test_threads_of_asyncio_end_with_their_loop(tmp_path: Path) -> None:
    store = AsyncFileStore(tmp_path, durability="atomic")
    before = set(threading.enumerate())

    async def main() -> None:
        await asyncio.gather(*(store.write(f"{n}", b"") for n in range(8)))
        assert set(threading.enumerate()) > before

    asyncio.run(main())
    assert set(threading.enumerate()) <= before
    for _ in range(2):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
    asyncio.run(main())
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of the threads of loops that are closed")


def test_an_async_change_holds_the_lock_over_its_awaits(tmp_path: Path) -> None:
    store = AsyncFileStore(tmp_path, durability="atomic")

    async def change(old: bytes) -> bytes:
        await asyncio.sleep(0.001)
        return b"%d" % (int(old) + 1)

    async def main() -> None:
        await asyncio.gather(*(store.update("n", change, missing=b"0") for _ in range(20)))

    asyncio.run(main())
    assert (tmp_path / "n").read_bytes() == b"20"


# ---- by content ------------------------------------------------------------------------------------------------------


def digest_of(content: bytes) -> str:
    return blake2b(content, digest_size=32).hexdigest()


@pytest.mark.parametrize("content", [b"", b"content", os.urandom((3 << 20) + 1)], ids=["empty", "short", "long"])
def test_a_content_is_stored_once_under_its_digest(store: Any, tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "source"
    source.write_bytes(content)
    addresses = {store.add(each) for each in (content, bytearray(content), io.BytesIO(content), source)}
    [address] = addresses
    assert address == ContentAddress(digest_of(content), len(content))
    assert list(store.find("objects/**")) == [address.path]
    path = tmp_path / "base" / address.path
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert path.stat().st_nlink == 1
    for name in (address, address.digest):
        with store.open(name) as file:
            assert file.read() == content
    assert store.verify() == (1, len(content), ())
    assert left_over(tmp_path / "base") == []


@pytest.mark.parametrize("source", ["text", io.StringIO, None, 5])
def test_what_is_no_content_is_refused(store: Any, source: Any) -> None:
    with pytest.raises(TypeError):
        store.add(source("text") if source is io.StringIO else source)
    assert list(store.find("**")) == []


def test_a_missing_source_and_a_missing_content_are_named(store: Any, tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match="source"):
        store.add(tmp_path / "source")
    with pytest.raises(FileMissingError, match="objects/00"):
        store.open("0" * 64)
    with pytest.raises(FileMissingError):
        store.verify("0" * 64)
    assert store.verify() == (0, 0, ())


@pytest.mark.parametrize("address", ["", "../" * 20 + "etc/passwd", "0" * 63, "0" * 63 + "G", "0" * 64 + "\n"])
def test_an_address_that_is_none_is_refused(plain: FileStore, address: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        plain.open(address)


def test_damage_is_found_by_verify_and_a_wrong_size_at_once(store: Any, tmp_path: Path) -> None:
    whole, changed, cut = (store.add(content) for content in (b"whole", b"changed", b"cut"))
    for address, content in ((changed, b"changes"), (cut, b"cu")):
        path = tmp_path / "base" / address.path
        path.chmod(0o644)
        path.write_bytes(content)
    report = store.verify()
    assert report.objects == 3
    assert {os.path.basename(error.path) for error in report.corrupt} == {changed.digest, cut.digest}
    assert len(store.verify(whole, changed).corrupt) == 1
    with pytest.raises(ContentCorruptError, match="2 bytes"):
        store.open(cut)
    with pytest.raises(ContentCorruptError, match="2 bytes"):
        store.add(b"cut")
    assert (tmp_path / "base" / cut.path).read_bytes() == b"cu"
    assert store.add(b"changed") == changed  # same size: only verify reads it


def test_adding_works_where_files_need_names(tmp_path: Path, plain: FileStore) -> None:
    def refuse(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "open" and args[1] & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "")
        return call(*args, **kwargs)

    with intercepted(refuse):
        address = plain.add(b"content")
        assert plain.add(b"content") == address
        with pytest.raises(TypeError):
            plain.add(io.StringIO("text"))  # type: ignore[arg-type]
    assert plain.verify() == (1, 7, ())
    assert (tmp_path / "base" / address.path).stat().st_nlink == 1
    assert left_over(tmp_path / "base") == []


def test_an_object_removed_in_the_moment_of_the_duplicate_is_linked_again(tmp_path: Path, plain: FileStore) -> None:
    address = plain.add(b"content")
    path = tmp_path / "base" / address.path

    def remove(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return call(*args, **kwargs)
        except FileExistsError:
            if name == "link":
                path.unlink()
            raise

    with intercepted(remove):
        assert plain.add(b"content") == address
    assert path.read_bytes() == b"content"


def test_what_add_says_is_on_disk_also_where_another_has_made_it(tmp_path: Path) -> None:
    FileStore(tmp_path, durability="atomic").add(b"content")
    story: list[str] = []

    def note(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return call(*args, **kwargs)
        finally:
            if name in ("link", "fsync"):
                kind = "" if name == "link" else "file" if stat.S_ISREG(os.fstat(args[0]).st_mode) else "directory"
                story.append(f"{name} {kind}".strip())

    store = FileStore(tmp_path, durability="full")
    with intercepted(note):
        store.add(b"content")
    assert story[-3:] == ["link", "fsync file", "fsync directory"]  # of the one that was there
    story.clear()
    with intercepted(note):
        store.add(b"else")
    assert story[-1] == "fsync directory"
    assert "fsync file" in story[: story.index("link")]


def test_memory_does_not_grow_with_the_content(plain: FileStore) -> None:
    class Endless(io.RawIOBase):
        left = 64 << 20

        def read(self, size: int = -1) -> bytes:
            size = min(size, self.left)
            self.left -= size
            return bytes(size)

    tracemalloc.start()
    try:
        address = plain.add(Endless())  # type: ignore[arg-type]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert address.size == 64 << 20
    assert peak_bytes < 8 << 20


@pytest.mark.usefixtures("no_garbage")
def test_several_that_add_one_content_find_one_object(tmp_path: Path, plain: FileStore) -> None:
    contents = [b"%d" % number for number in range(5)] * 8
    plain.add(contents[0])
    descriptors = len(os.listdir("/proc/self/fd"))
    found: list[ContentAddress] = []
    threads = [
        threading.Thread(target=lambda: found.extend(plain.add(content) for content in contents)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert len(found) == 160
    assert {address.digest for address in found} == {digest_of(content) for content in contents}
    assert plain.verify().objects == 5
    assert left_over(tmp_path / "base") == []


# ---- by pattern ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(store: Any, tmp_path: Path) -> Any:
    for path in ("a.txt", "b.txt", ".c.txt", "d/a.txt", "d/e/a.txt", "d/e/b.csv", "x/y/a/z/a.txt", "new\nline.txt"):
        store.write(path, b"")
    store.write(b"caf\xe9.txt", b"")
    (tmp_path / "base/link.txt").symlink_to("a.txt")
    (tmp_path / "base/up").symlink_to("..")
    (tmp_path / "base/staged.txt").mkdir()
    (tmp_path / "base" / os.fsdecode(staging_name(b"d/a.txt", random_token()))).write_text("on its way")
    return store


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.txt", [".c.txt", "a.txt", "b.txt", "caf\udce9.txt", "new\nline.txt"]),
        ("?.txt", ["a.txt", "b.txt"]),
        ("[!a].txt", ["b.txt"]),
        ("caf?.txt", ["caf\udce9.txt"]),
        ("a.txt", ["a.txt"]),
        ("./d//a.txt", ["d/a.txt"]),
        ("*/*.txt", ["d/a.txt"]),
        ("d/**", ["d/a.txt", "d/e/a.txt", "d/e/b.csv"]),
        ("**/e/*", ["d/e/a.txt", "d/e/b.csv"]),
        ("**/a.txt", ["a.txt", "d/a.txt", "d/e/a.txt", "x/y/a/z/a.txt"]),
        ("**/**/b.*", ["b.txt", "d/e/b.csv"]),
        ("**/a/**/a.txt", ["x/y/a/z/a.txt"]),
        ("x/**/a/**", ["x/y/a/z/a.txt"]),
        ("**/*.lock", []),
        (".ringpool/**", []),
        (".rp-*", []),
        ("d", []),
        ("nothing/**", []),
        ("a.txt/*", []),
        ("a.txt/**", []),
        ("[ad]*/**", ["d/a.txt", "d/e/a.txt", "d/e/b.csv"]),
        (b"?.txt", ["a.txt", "b.txt"]),
    ],
)
def test_a_pattern_finds_files_and_nothing_of_ours(tree: Any, pattern: str | bytes, found: list[str]) -> None:
    assert list(tree.find(pattern, sort=True)) == found
    assert sorted(tree.find(pattern), key=os.fsencode) == found


@pytest.mark.parametrize("pattern", ["", "/", "/etc/*", "../*", "d/../../*", "."])
def test_a_pattern_that_leads_out_is_refused(tree: Any, pattern: str) -> None:
    with pytest.raises(PathOutsideError):
        list(tree.find(pattern))


def test_what_vanishes_while_it_is_looked_for_is_skipped(tmp_path: Path, plain: FileStore) -> None:
    for number in range(5):
        plain.write(f"{number}/a", b"")

    def remove(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """After it was listed, before it is opened."""
        if name == "openat2" and args[0] in (b"1", b"3"):
            (tmp_path / "base" / os.fsdecode(args[0]) / "a").unlink()
            (tmp_path / "base" / os.fsdecode(args[0])).rmdir()
        return call(*args, **kwargs)

    with intercepted(remove):
        assert list(plain.find("**/a", sort=True)) == ["0/a", "2/a", "4/a"]


@pytest.mark.usefixtures("no_garbage")
def test_each_directory_is_listed_once_and_one_is_open_at_a_time(plain: FileStore) -> None:
    for number in range(20):
        plain.write(f"{number}/{number}/a", b"")
    lists = 0

    def note(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal lists
        lists += name == "scandir"
        return call(*args, **kwargs)

    before = len(os.listdir("/proc/self/fd"))
    open_most = before
    with intercepted(note):
        for _ in plain.find("**/**/a"):
            open_most = max(open_most, len(os.listdir("/proc/self/fd")))
        assert lists == 41
        lists = 0
        found = plain.find("**")
        next(found)
        assert lists < 41  # as they are drawn
        del found
    assert open_most <= before + 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_may_not_be_read_is_an_error(plain: FileStore) -> None:
    plain.write("d/a", b"")

    def refuse(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "scandir":
            raise PermissionError(errno.EACCES, "no")
        return call(*args, **kwargs)

    with intercepted(refuse), pytest.raises(FileOperationError, match="no"):
        list(plain.find("**"))


def test_a_full_file_system_leaves_the_old_content(tmp_path: Path, plain: FileStore) -> None:
    plain.write("a", b"old")

    def full(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in ("write", "copy_file_range"):
            raise OSError(errno.ENOSPC, "full")
        return call(*args, **kwargs)

    with intercepted(full):
        for call in (lambda: plain.write("a", b"new"), lambda: plain.append("a", b"new")):
            with pytest.raises(FileOperationError, match="full"):
                call()
        with pytest.raises(FileOperationError, match="full"):
            plain.add(b"content")
    assert plain.read("a") == b"old"
    assert left_over(tmp_path / "base") == []


def test_of_two_names_of_one_file_the_old_one_goes(tmp_path: Path) -> None:
    store = FileStore(tmp_path, durability="atomic")
    store.write("a", b"content")
    os.link(tmp_path / "a", tmp_path / "b")
    store.rename("a", "b", replace=True)
    assert not (tmp_path / "a").exists()
    assert store.read("b") == b"content"
    store.rename("b", "b", replace=True)
    assert store.read("b") == b"content"


def test_a_parent_after_a_symlink_in_the_base_is_what_the_system_says_it_is(tmp_path: Path) -> None:
    (tmp_path / "other/dir").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "other/dir")
    FileStore(f"{tmp_path}/link/..", durability="atomic").write("f", b"here")
    assert (tmp_path / "other/f").read_bytes() == b"here"


@pytest.mark.parametrize("n", [999, 1000, 1001, 2500])
def test_tasks_find_every_file_however_many_there_are(tmp_path: Path, n: int) -> None:
    for number in range(n):
        (tmp_path / f"{number}.txt").touch()

    async def all_found() -> list[str]:
        return [path async for path in AsyncFileStore(tmp_path).find("*.txt")]

    assert sorted(asyncio.run(all_found())) == sorted(f"{number}.txt" for number in range(n))

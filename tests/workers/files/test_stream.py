"""Files that are written piece by piece and appear whole."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tests.workers.files.child_atomic import failing, interrupt_at, mode_of, names, open_files

from ringpool.errors import AtomicWriteError, DurabilityError
from ringpool.workers.files.atomic import atomic_open
from ringpool.workers.files.oslayer import intercepted

# ---- what is written -------------------------------------------------------------------------------------------------


def test_a_file_appears_at_the_end_of_its_block_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_open(path, "w") as file:
        file.write("new \u20ac\n")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == "new \u20ac\n".encode()
    assert names(tmp_path) == {"a.txt"}


def test_an_exception_in_the_block_drops_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    files = open_files()
    file = atomic_open(tmp_path / "a")

    def write() -> None:
        with file:
            file.write(b"new")
            raise LookupError

    with pytest.raises(LookupError):
        write()
    assert file.closed
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}
    assert open_files() == files


def zipped(file: Any) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("member", b"x" * 100_000)


def gzipped(file: Any) -> None:
    with gzip.GzipFile(fileobj=file, mode="wb") as stream:
        stream.write(b"x" * 100_000)


def wrapped(file: Any) -> None:
    with io.TextIOWrapper(file, encoding="utf-16") as stream:
        stream.write("x" * 100_000)


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (zipped, lambda path: zipfile.ZipFile(path).read("member") == b"x" * 100_000),
        (gzipped, lambda path: gzip.decompress(path.read_bytes()) == b"x" * 100_000),
        (wrapped, lambda path: path.read_text("utf-16") == "x" * 100_000),
        (lambda file: np.save(file, np.arange(9)), lambda path: np.load(path).sum() == 36),
        (lambda file: np.arange(9).tofile(file), lambda path: np.fromfile(path, dtype=int).sum() == 36),
    ],
    ids=["zipfile", "gzip", "TextIOWrapper", "numpy.save", "numpy.tofile"],
)
def test_other_libraries_write_to_it_and_may_close_it(
    tmp_path: Path, write: Callable[[Any], None], read: Callable[[Path], bool]
) -> None:
    path = tmp_path / "a"
    with atomic_open(path) as file:
        write(file)
        assert not path.exists()
    assert read(path)
    assert names(tmp_path) == {"a"}


def test_json_is_written_to_a_text_file(tmp_path: Path) -> None:
    with atomic_open(tmp_path / "a.json", "w") as file:
        json.dump({"a": ["\u20ac"] * 9}, file, ensure_ascii=False)
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"a": ["\u20ac"] * 9}


def test_encoding_and_line_ends_are_those_that_are_asked_for(tmp_path: Path) -> None:
    with atomic_open(tmp_path / "a", "w", encoding="latin-1", newline="\r\n", errors="replace") as file:
        file.write("\xe9\n\u20ac")
    assert (tmp_path / "a").read_bytes() == b"\xe9\r\n?"
    with atomic_open(tmp_path / "a", "w") as file:
        file.write("\r\n")
    assert (tmp_path / "a").read_bytes() == b"\r\n"


def test_a_file_can_be_sought_in_and_cut(tmp_path: Path) -> None:
    with atomic_open(tmp_path / "a") as file:
        file.write(b"0123456789")
        assert (file.tell(), file.seek(2), file.write(b"x")) == (10, 2, 1)
        file.truncate(5)
        assert file.seek(0, os.SEEK_END) == 5
    assert (tmp_path / "a").read_bytes() == b"01x34"


def test_more_than_a_buffer_is_written_whole_although_each_write_is_short(tmp_path: Path) -> None:
    content = os.urandom(1 << 19)

    def shorten(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(args[0], memoryview(args[1])[:9999]) if name == "write" else call(*args, **kwargs)

    with intercepted(shorten), atomic_open(tmp_path / "a") as file:
        file.write(content)
    assert (tmp_path / "a").read_bytes() == content


@pytest.mark.parametrize("option", [{"encoding": "latin-1"}, {"errors": "ignore"}, {"newline": "\r\n"}])
@pytest.mark.parametrize("mode", ["wb", "xb"])
def test_what_is_for_text_is_refused_for_bytes(tmp_path: Path, mode: Any, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"mode '{mode}' is for bytes, and takes no {next(iter(option))}"):
        atomic_open(tmp_path / "a", mode, **option)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["x", "xb"])
def test_an_exclusive_file_is_made_once(tmp_path: Path, mode: Literal["x", "xb"]) -> None:
    with atomic_open(tmp_path / "a", mode):
        pass
    with pytest.raises(AtomicWriteError) as caught:
        atomic_open(tmp_path / "a", mode)
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(AtomicWriteError) as caught, atomic_open(tmp_path / "b", mode):
        (tmp_path / "b").write_text("theirs")
    assert caught.value.errno == errno.EEXIST
    assert (tmp_path / "b").read_text() == "theirs"
    assert names(tmp_path) == {"a", "b"}


@pytest.mark.parametrize("mode", ["r", "a", "w+", "wt", ""])
def test_a_mode_that_is_not_for_writing_anew_is_refused(tmp_path: Path, mode: Any) -> None:
    with pytest.raises(ValueError, match="mode"):
        atomic_open(tmp_path / "a", mode)
    with pytest.raises(LookupError):
        atomic_open(tmp_path / "a", "w", encoding="no such")
    assert names(tmp_path) == set()


def test_permissions_are_those_that_are_asked_for(tmp_path: Path) -> None:
    with atomic_open(tmp_path / "a", permissions=0o604):
        pass
    assert mode_of(tmp_path / "a") == 0o604


# ---- how it ends -----------------------------------------------------------------------------------------------------


def test_it_is_committed_once(tmp_path: Path) -> None:
    file = atomic_open(tmp_path / "a")
    file.write(b"new")
    file.commit()
    assert file.closed
    for end in (file.commit, lambda: file.write(b"more")):
        with pytest.raises(ValueError, match=r"committed|closed"):
            end()
    file.discard()
    assert (tmp_path / "a").read_text() == "new"


def test_it_may_be_discarded_or_committed_inside_its_block(tmp_path: Path) -> None:
    with atomic_open(tmp_path / "a", "w") as file:
        file.write("new")
        file.discard()
    with pytest.raises(ValueError, match="discarded"):
        file.commit()
    with atomic_open(tmp_path / "b", "w") as file:
        file.write("new")
        file.commit()
        assert (tmp_path / "b").read_text() == "new"
    assert names(tmp_path) == {"b"}


@pytest.mark.parametrize("mode", ["w", "wb"])
@pytest.mark.parametrize("is_closed", [False, True])
def test_one_that_is_forgotten_is_dropped_with_a_warning(
    tmp_path: Path, mode: Literal["w", "wb"], is_closed: bool
) -> None:
    files = open_files()
    file: Any = atomic_open(tmp_path / "a", mode)
    file.write("new" if mode == "w" else b"new")
    if is_closed:
        file.close()
    held = [file]
    del file
    with pytest.warns(ResourceWarning, match="neither committed nor discarded"):
        held.clear()
    assert names(tmp_path) == set()
    assert open_files() <= files


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_the_child_of_a_fork_neither_commits_nor_drops_its_parents_file(
    tmp_path: Path, mode: Literal["w", "wb"]
) -> None:
    with atomic_open(tmp_path / "a", mode) as file:
        file.write("new" if mode == "w" else b"new")  # type: ignore[call-overload]
        for end in (file.discard, file.commit, file.flush, file.__del__):
            pid = os.fork()
            if pid == 0:
                with suppress(OSError):
                    end()
                os._exit(0)
            os.waitpid(pid, 0)
        assert len(names(tmp_path)) == 1
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == {"a"}


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "close", "fsync"])
def test_an_error_at_the_end_drops_it(tmp_path: Path, call: str, error: int) -> None:
    (tmp_path / "a").write_text("old")
    with (
        failing(lambda _, name: name == call, error),
        pytest.raises(DurabilityError if call == "fsync" else AtomicWriteError) as caught,
        atomic_open(tmp_path / "a", "w") as file,
    ):
        file.write("new")
    assert caught.value.errno == error
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}


def test_an_error_of_writing_that_was_swallowed_is_not_committed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    n_writes = 0

    def fail_once(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal n_writes
        n_writes += name == "write"
        if name == "write" and n_writes == 1:
            raise OSError(errno.ENOSPC, "full")
        return call(*args, **kwargs)

    with intercepted(fail_once):
        file = atomic_open(tmp_path / "a")
        file.write(b"new")
        with suppress(OSError):
            file.flush()
        with pytest.raises(AtomicWriteError, match="earlier"):
            file.commit()
    assert n_writes == 2
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}


def test_a_write_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    zero = lambda name, call, args, kwargs: 0 if name == "write" else call(*args, **kwargs)  # noqa: E731
    with intercepted(zero), pytest.raises(AtomicWriteError), atomic_open(tmp_path / "a") as file:
        file.write(b"new")
    assert names(tmp_path) == set()


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # its clean-up
@pytest.mark.parametrize("disk_is_full", [False, True])
def test_ctrl_c_at_any_bytecode_leaves_nothing_or_the_whole_file(tmp_path: Path, disk_is_full: bool) -> None:
    path = tmp_path / "a.bin"

    def write() -> None:
        with failing(lambda _, name: name == "write" and disk_is_full, errno.ENOSPC), suppress(AtomicWriteError):
            file = atomic_open(path, durability="atomic")
            try:
                file.write(b"new")
                file.commit()
            finally:
                file.discard()

    n_interrupted = 0
    for nth in count(1, 3):
        path.write_bytes(b"old")
        interrupted = interrupt_at(nth, write)
        assert {name for name in names(tmp_path) if name != "a.bin"} == set(), nth
        assert path.read_bytes() in (b"old", b"new")
        if not interrupted:
            break
        n_interrupted += 1
    assert n_interrupted > 50

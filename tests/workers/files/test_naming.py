"""Names: of staged files, of files that nobody else has, of content by what it is."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringpool import FileStore, PathLock, atomic_write
from ringpool.errors import FileOperationError, PathNameError
from ringpool.workers.files import naming
from ringpool.workers.files.naming import (
    content_name,
    digest_name,
    is_staging_name,
    random_staging_name,
    random_token,
    staging_name,
    unique_name,
)

TOKEN = "0123456789abcdef-1f-2"


@pytest.mark.parametrize(
    ("target", "suffixes"),
    [
        (b"a.txt", b".txt"),
        (b"archive.tar.gz", b".tar.gz"),
        (b"plain", b""),
        (b".profile", b""),
        (b".hidden.json", b".json"),
        (b"..twice.json", b".json"),
        (b"end.", b""),
        (b"v1." + b"long words " * 5 + b".jpg", b".jpg"),
        (b"x." + b"s" * 31, b"." + b"s" * 31),
        (b"x." + b"s" * 32, b""),
        (b"caf\xe9.\xff", b".\xff"),
        (b"line\nbreak.a\nb", b".a\nb"),
    ],
)
def test_a_staged_file_keeps_the_suffixes_that_fit(target: bytes, suffixes: bytes) -> None:
    name = staging_name(target, TOKEN)
    assert name == b".rp-" + TOKEN.encode() + suffixes
    assert is_staging_name(name)


def test_a_staged_file_stands_in_the_targets_directory() -> None:
    assert staging_name(b"/out/x.y/a.txt", TOKEN) == b"/out/x.y/.rp-" + TOKEN.encode() + b".txt"
    assert staging_name(b"/a.txt", TOKEN).startswith(b"/.rp-")


def test_the_longest_target_and_token_give_a_name_that_a_directory_takes() -> None:
    token = "-".join(("f" * 32, "f" * 16, "f" * 16))
    for target in (b"n" * 255, b"n" * 222 + b"." + b"s" * 31, b"n" * 251 + b".txt"):
        assert len(staging_name(target, token)) <= 255


def test_two_suffixes_of_one_stem_never_share_a_staged_file() -> None:
    token = random_token()
    assert staging_name(b"a.txt", token) != staging_name(b"a.csv", token)
    assert random_token() != random_token()


@pytest.mark.parametrize(
    "token", ["", "short", "0123456789ABCDEF", "0123456789abcdef-", "0123456789abcdef/1", "../a" * 8]
)
def test_a_token_that_could_not_be_recognised_is_refused(token: str) -> None:
    with pytest.raises(AssertionError):
        staging_name(b"a.txt", token)


@pytest.mark.parametrize(
    "name",
    [
        b"a.txt",
        b".rp-",
        b".rp-notes.txt",
        b".rp-0123456789abcdefx",
        b".rp-0123456789abcdef/x.y",
        b"x.rp-0123456789abcdef",
    ],
)
def test_a_users_own_name_is_no_staging_name(name: bytes) -> None:
    assert not is_staging_name(name)


def test_a_random_staging_name_is_one_and_the_child_of_a_fork_has_others() -> None:
    assert is_staging_name(random_staging_name(b"a.tar.gz"))
    assert random_staging_name(b"a.tar.gz").endswith(b".tar.gz")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, random_token().encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 99).decode() != random_token()
    os.close(reader)
    os.close(writer)


# ---- unique names ----------------------------------------------------------------------------------------------------


def test_a_unique_name_is_made_with_its_prefix_and_suffix(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = Path(unique_name(tmp_path, "log-", ".txt"))
    finally:
        os.umask(before)
    assert path.parent == tmp_path
    assert path.name.startswith("log-")
    assert path.name.endswith(".txt")
    assert (path.stat().st_size, stat.S_IMODE(path.stat().st_mode)) == (0, 0o640)
    assert os.fsencode(unique_name(os.fsencode(tmp_path), b"\xff", b".\xfe")).endswith(b".\xfe")


def test_unique_names_are_all_different(tmp_path: Path) -> None:
    found: list[str] = []

    def make() -> None:
        found.extend(unique_name(tmp_path) for _ in range(200))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 800 == len(list(tmp_path.iterdir()))


def test_a_name_that_is_there_is_never_taken_and_another_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a1").write_text("theirs")
    (tmp_path / "a2").symlink_to("nowhere")
    tokens = iter(["1", "2", "3"])
    monkeypatch.setattr(naming, "random_token", lambda: next(tokens))
    assert unique_name(tmp_path, "a") == str(tmp_path / "a3")
    assert (tmp_path / "a1").read_text() == "theirs"
    assert not (tmp_path / "nowhere").exists()
    monkeypatch.setattr(naming, "random_token", lambda: "1")
    with pytest.raises(FileOperationError) as caught:
        unique_name(tmp_path, "a")
    assert caught.value.errno == errno.EEXIST


@pytest.mark.parametrize(
    ("prefix", "suffix"), [("a/", ""), ("", "/b"), ("../", ""), ("a\0", ""), ("", "\0"), ("p" * 240, "")]
)
def test_a_prefix_or_suffix_that_makes_no_name_is_refused(tmp_path: Path, prefix: str, suffix: str) -> None:
    with pytest.raises(PathNameError):
        unique_name(tmp_path, prefix, suffix)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileOperationError, match="missing") as caught:
        unique_name(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT


# ---- content names ---------------------------------------------------------------------------------------------------


def test_content_is_named_by_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(1000)
    digest = hashlib.blake2b(content, digest_size=32)
    name = f"{digest.hexdigest()[:2]}/{digest.hexdigest()}"
    assert content_name(content) == name
    assert content_name(bytearray(content), ".bin") == name + ".bin"
    assert digest_name(digest.digest()) == name
    monkeypatch.setattr(naming, "CONTENT_PIECE_BYTES", 7)
    assert content_name(io.BytesIO(content)) == name
    assert content_name(b"") != name


@pytest.mark.parametrize("view", [memoryview(b"abcdef")[::2], memoryview(b"abcdef").cast("B", (2, 3)), memoryview(b"")])
def test_a_view_is_named_by_its_bytes_however_they_lie(view: memoryview) -> None:
    assert content_name(view) == content_name(view.tobytes())


@pytest.mark.parametrize(
    ("pieces", "error"), [([b"abc", None, b"def", b""], BlockingIOError), ([b"abc", "def", ""], TypeError)]
)
def test_a_stream_that_cannot_be_read_to_its_end_has_no_name(pieces: list[Any], error: type[Exception]) -> None:
    class Stream:
        def read(self, _: int) -> Any:
            return pieces.pop(0)

    with pytest.raises(error):
        content_name(Stream())


@pytest.mark.parametrize("use", [atomic_write, PathLock, FileStore, lambda path: FileStore("/").read(path)])
def test_text_that_stands_for_no_bytes_is_refused_by_name(use: Callable[..., object]) -> None:
    arguments = ("\ud800.txt", b"new") if use is atomic_write else ("\ud800.txt",)
    with pytest.raises(PathNameError) as raised:
        use(*arguments)
    assert raised.value.path == "\\ud800.txt"
    assert raised.value.errno == errno.EILSEQ

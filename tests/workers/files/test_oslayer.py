"""The layer of system calls: complete, transparent, and replaceable."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

from ringpool.workers.files.oslayer import FileCalls, calls, intercepted, rename_exclusive


def test_ordinarily_the_calls_are_those_of_os() -> None:
    for name in set(FileCalls.__slots__) - {"openat2", "rename_exclusive", "sync_file_range", "syncfs"}:
        home = next(module for module in (os, fcntl, filelock) if hasattr(module, name))
        assert getattr(calls, name) is getattr(home, name)


def test_inside_the_block_every_call_is_seen_and_after_it_none(tmp_path: Path) -> None:
    seen: list[str] = []

    def record(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(name)
        return call(*args, **kwargs)

    with intercepted(record):
        calls.mkdir(tmp_path / "a")
        with pytest.raises(FileNotFoundError):
            calls.unlink(tmp_path / "missing")
    calls.stat(tmp_path / "a")
    assert seen == ["mkdir", "unlink"]
    assert calls.unlink is os.unlink


def test_an_exclusive_rename_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileExistsError):
            rename_exclusive(b"a", b"b", directory, directory)
        rename_exclusive(b"a", b"c", directory, directory)
    finally:
        os.close(directory)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b": "b", "c": "a"}

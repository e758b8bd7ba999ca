"""What ringpool is measured against does what it should: a baseline that is wrong would be easy to beat."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from benchmarks.bench_claims import verdict
from benchmarks.guide_baseline import (
    FileLocks,
    JsonQueue,
    LockedFiles,
    LockedWriter,
    TextStatus,
    Transaction,
    run_queue,
)

WORKERS = 2
TASKS = 24


def note_of(path: str) -> str:
    """A task: put a line into the file, and say whose it is."""
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    return Path(path).name


def test_the_queue_hands_out_each_task_once(tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{number}.txt") for number in range(TASKS)]
    queue = JsonQueue(str(tmp_path / "queue.json"))
    queue.fill(paths)
    run_queue(queue.path, note_of, WORKERS, TASKS)
    tasks = queue.tasks()
    assert [task["result"] for task in tasks] == [f"{number}.txt" for number in range(TASKS)]
    assert {task["state"] for task in tasks} == {"done"}
    assert [Path(path).read_text() for path in paths] == [f"{task['worker']}\n" for task in tasks]
    assert queue.claim() is None


def test_a_queue_with_a_failing_task_says_so(tmp_path: Path) -> None:
    queue = JsonQueue(str(tmp_path / "queue.json"))
    queue.fill([str(tmp_path / "no such directory" / "a.txt")])
    with pytest.raises(RuntimeError, match="workers ended with"):
        run_queue(queue.path, note_of, 1, 1)


def test_a_transaction_writes_all_of_its_files(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"before")
    with Transaction(FileLocks(), durable=True) as transaction:
        transaction.write(str(old), b"after")
        transaction.write(str(new), b"there")
    assert (old.read_bytes(), new.read_bytes()) == (b"after", b"there")
    assert not [*tmp_path.glob("*.bak"), *tmp_path.glob("*.tmp")]


def test_a_transaction_that_fails_puts_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, made, refused = (str(tmp_path / name) for name in "abc")
    Path(old).write_bytes(b"before")
    replace = os.replace

    def replace_but_one(source: str, target: str) -> None:
        if target == refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO), target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_but_one)
    transaction = Transaction(FileLocks())
    for path in (old, made, refused):
        transaction.write(path, b"after")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        transaction.commit()
    assert Path(old).read_bytes() == b"before"
    assert not os.path.exists(made)
    assert not [*tmp_path.glob("*.bak"), *tmp_path.glob("*.tmp")]


def test_an_error_in_the_block_writes_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "a")

    def write_and_fail() -> None:
        with Transaction(FileLocks()) as transaction:
            transaction.write(path, b"after")
            raise KeyError("a")

    with pytest.raises(KeyError):
        write_and_fail()
    assert not os.path.exists(path)


@pytest.mark.parametrize("durable", [False, True])
def test_what_was_written_is_read(tmp_path: Path, durable: bool) -> None:
    path, files = str(tmp_path / "a"), LockedFiles()
    LockedWriter().write(path, b"in place")
    assert files.read(path) == b"in place"
    files.write(path, b"replaced", durable=durable)
    assert files.read(path) == b"replaced"
    assert not (tmp_path / "a.tmp").exists()


def test_a_status_is_found(tmp_path: Path) -> None:
    table = TextStatus(str(tmp_path / "status.txt"), 3, threading.Lock())
    table.fill(["/data/a", "/data/ab"], "pending")
    table.set("/data/ab", "done")
    table.set("/data/b", "working")
    assert [(table.get(path) or ("missing",))[0] for path in ("/data/a", "/data/ab", "/data/b", "b")] == [
        "pending",
        "done",
        "working",
        "missing",
    ]
    with pytest.raises(ValueError, match="no line is left"):
        table.set("/data/c", "pending")
    with pytest.raises(ValueError, match="no room"):
        table.set("/" * 200, "pending")
    table.close()


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [([3.1, 8.0], "true"), ([0.9, 2.9], "false"), ([0.9, 3.0], "depends")],
)
def test_a_claim_is_judged_by_the_ratios(ratios: list[float], expected: str) -> None:
    assert verdict(ratios, 3.0) == expected

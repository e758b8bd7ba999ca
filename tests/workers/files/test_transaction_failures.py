"""Transactions that fail, are killed, or lose their power: what stands then, and that the next one finds it whole."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from tests.workers.files import child_transaction
from tests.workers.files.child import Child
from tests.workers.files.child_transaction import NAMES, NEW, OLD, check, lay_out, transact
from tests.workers.files.trials import KNOWN_PLANS, room, sweep, try_plan

from ringpool.errors import (
    CommittedWithErrors,
    CrossDeviceError,
    DurabilityError,
    FileOperationError,
    RingpoolError,
    TransactionConflictError,
    TransactionError,
    TransactionInDoubtError,
)
from ringpool.workers.files import journal
from ringpool.workers.files.locks import LockSet
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.transaction import FileTransaction, snapshot


@pytest.fixture
def base(tmp_path: Path) -> Path:
    lay_out(tmp_path / "base")
    return tmp_path / "base"


def files(base: Path) -> dict[str, bytes]:
    """All there is but for ringpool's own."""
    found = (path for path in base.rglob("*") if path.is_file() and ".ringpool" not in path.parts)
    return {str(path.relative_to(base)): path.read_bytes() for path in found}


def left(base: Path) -> list[str]:
    txn = base / ".ringpool/txn"
    return os.listdir(txn) if txn.exists() else []


# ---- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def failing(at: int, error: int | type[BaseException], *, ever_after: bool = False) -> Iterator[list[str]]:
    """System call number ``at`` fails (and all after it, but for those that let go); yields the names of the calls."""
    seen: list[str] = []

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(name)
        if len(seen) == at or (
            ever_after and len(seen) > at and name not in ("close", "fcntl", "flock", "unlock_descriptor")
        ):
            if not isinstance(error, int):
                raise error
            if name == "close":
                call(*args, **kwargs)  # which frees the descriptor, whatever it says
            raise OSError(error, os.strerror(error))
        return call(*args, **kwargs)

    with intercepted(around):
        yield seen


def fail_at_every_call(
    base: Path, error: int | type[BaseException], *, ever_after: bool = False, first: int = 1, stride: int = 1
) -> set[str]:
    """What was raised, at all those calls."""
    raised: set[str] = set()
    at = first
    while True:
        base = base.with_name(f"base {at}")  # not one whose lock files this process has open
        lay_out(base)
        with failing(at, error, ever_after=ever_after) as seen:
            try:
                transact(base)
                caught: BaseException | None = None
            except BaseException as each:
                caught = each
        if len(seen) < at:
            assert caught is None
            return raised
        where = (at, seen[at - 1], caught)
        raised.add(type(caught).__name__)
        assert isinstance(caught, RingpoolError | KeyboardInterrupt | None), where
        if isinstance(caught, TransactionError | DurabilityError):
            assert files(base) == OLD, where
        if caught is None or (isinstance(caught, CommittedWithErrors) and caught.finished):
            assert files(base) == NEW, where
        is_new = check(base, where)
        if isinstance(caught, KeyboardInterrupt):
            assert is_new == bool(getattr(caught, "__notes__", ())), where
        elif isinstance(caught, TransactionInDoubtError | CommittedWithErrors | None):
            assert is_new, where
        else:
            assert not is_new, where
        at += stride


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EINTR, errno.EMFILE, errno.EROFS])
def test_an_error_at_any_call_says_what_stands(base: Path, error: int) -> None:
    raised = fail_at_every_call(base, error, first=1 + error % 7, stride=7)
    assert {"TransactionError", "CommittedWithErrors"} <= raised


def test_an_error_that_stays_says_what_stands(base: Path) -> None:
    raised = fail_at_every_call(base, errno.EIO, ever_after=True, stride=7)
    assert {"TransactionError", "CommittedWithErrors"} <= raised


def test_an_interrupt_at_any_call_leaves_old_or_new(base: Path) -> None:
    fail_at_every_call(base, KeyboardInterrupt, stride=5)


def test_the_fsync_that_commits_leaves_it_in_doubt_until_the_next_lock(base: Path) -> None:
    with failing_fsync("fsync of the journal's directory"), pytest.raises(TransactionInDoubtError, match="in doubt"):
        transact(base)
    assert files(base) == OLD
    assert check(base, "in doubt")


def test_an_fsync_after_the_commit_is_not_tried_again(base: Path) -> None:
    with failing_fsync("fsync of the directory, after it"), pytest.raises(CommittedWithErrors) as caught:
        transact(base)
    assert not caught.value.finished
    assert any(name.endswith(".journal") for name in left(base))
    assert check(base, "not synced")


@contextmanager
def failing_fsync(operation: str) -> Iterator[None]:
    real = journal.sync

    def sync(fd: int, path: bytes, now: str) -> None:
        if now == operation:
            raise DurabilityError(os.fsdecode(path), now, errno.EIO, os.strerror(errno.EIO))
        real(fd, path, now)

    with patch.object(journal, "sync", sync):
        yield


def test_one_that_was_left_to_the_next_is_finished_also_under_locks_held_from_outside(base: Path) -> None:
    with LockSet([base / name for name in NAMES], base=base):
        with failing_fsync("fsync of the directory, after it"), pytest.raises(CommittedWithErrors):
            transact(base)
        with FileTransaction(base) as transaction:
            transaction.write("d1/a", "newer")
        assert not left(base)
    assert snapshot(NAMES, base=base) == {**NEW, "d1/a": b"newer"}


def test_a_short_write_is_gone_on_with(base: Path) -> None:
    def shorten(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(args[0], args[1][:1]) if name == "write" else call(*args, **kwargs)

    with intercepted(shorten):
        transact(base)
    assert files(base) == NEW


@pytest.mark.parametrize(
    "error",
    [
        TransactionError("a", "stage", errno.EIO, "no"),
        TransactionConflictError("a", "read", errno.EAGAIN, "no"),
        CrossDeviceError("a", "stage", errno.EXDEV, "no"),
        TransactionInDoubtError("a", "commit", errno.EIO, "no"),
        CommittedWithErrors("a", "apply", errno.EIO, "no", True),
    ],
)
def test_errors_travel_between_processes(error: FileOperationError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert str(there) == str(error)
    assert vars(there) == vars(error)


# ---- kills and power cuts: a sample; all of it is in tests/crash -----------------------------------------------------


def test_a_kill_at_any_call_leaves_old_or_new() -> None:
    with room() as directory, Child(child_transaction.kill_everywhere, directory / "base", "1", "5", "0") as child:
        child.succeed()


def test_a_kill_of_the_recovery_leaves_old_or_new() -> None:
    with room() as directory, Child(child_transaction.kill_everywhere, directory / "base", "3", "40", "13") as child:
        child.succeed()


@pytest.mark.parametrize("at", range(len(KNOWN_PLANS)))
def test_a_power_cut_leaves_old_or_new(at: int) -> None:
    assert try_plan(KNOWN_PLANS[at], Random(at), twice=0.02)


def test_a_power_cut_of_drawn_plans_leaves_old_or_new() -> None:
    assert sweep(range(1000, 1012)) > 1000

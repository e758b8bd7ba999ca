"""Mistakes planted in the transactions, each a step of the protocol left out or done in the wrong order.

    mutant = MUTANTS["no fsync of the journal"]
    with mutant.plant():              in this process, in the block
        HUNTS[mutant.hunt]()          what is wrong, in words; "" where the hunt finds nothing

Of the first eight a kill alone finds one, a real power cut on ext4 or xfs three, the model of the page cache all. A
patch whose place is gone is an error: of a name, ``AttributeError``; of an fsync that is not met, an assertion.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import msgspec
from tests.workers.files import child_transaction
from tests.workers.files.trials import KNOWN_PLANS, ViolationError, room, try_plan

from ringpool.workers.files import commit, holds, journal, recovery
from ringpool.workers.files.holds import Hold
from ringpool.workers.files.journal import AFTER, BEFORE, Effect, Journal, encode
from ringpool.workers.files.locks import LockSet
from ringpool.workers.files.oslayer import calls, intercepted

Plant = Callable[[], AbstractContextManager[None]]


def _without_fsync(operation: str) -> Plant:
    """The fsync that goes by that name is not done."""

    @contextmanager
    def planted() -> Iterator[None]:
        skipped = 0
        real = journal.sync

        def sync(fd: int, path: bytes, now: str) -> None:
            nonlocal skipped
            if now == operation:
                skipped += 1
            else:
                real(fd, path, now)

        with patch.object(journal, "sync", sync), patch.object(commit, "sync", sync):
            yield
        assert skipped, f"{operation!r} is no fsync of a transaction any more"

    return planted


def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Plant:
    """``owner.name`` is what ``make`` makes of it."""

    @contextmanager
    def planted() -> Iterator[None]:
        with patch.object(owner, name, make(getattr(owner, name))):
            yield

    return planted


def _apply_before_journal(commit: Callable[..., None]) -> Callable[..., None]:
    def planted(self: Journal, effects: Sequence[Effect]) -> None:
        self.apply(effects)
        commit(self, effects)

    return planted


def _unlink_first(apply: Callable[..., None]) -> Callable[..., None]:
    def planted(self: Journal, effects: Sequence[Effect]) -> None:
        if self.stage:
            calls.unlink(self.id + b".journal", dir_fd=self.txn_fd)
        apply(self, effects)

    return planted


def _without_checksum(decode: Callable[..., Any]) -> Callable[..., Any]:
    def planted(content: bytes) -> list[Effect] | None:
        try:
            effects = msgspec.msgpack.decode(content[12:], type=list[Effect])
        except msgspec.MsgspecError:
            return None
        return (
            decode(
                b"RPJ1"
                + len(content[12:]).to_bytes(4, "little")
                + zlib.crc32(content[12:]).to_bytes(4, "little")
                + content[12:]
            )
            and effects
        )

    return planted


def _without_identity(redo: Callable[..., None]) -> Callable[..., None]:
    def planted(self: Journal, n: int, effect: Effect, parent_fd: int, name: bytes) -> None:
        found = journal.lstat_at(name, parent_fd)
        redo(self, n, msgspec.structs.replace(effect, replaced=found.st_ino if found else 0), parent_fd, name)

    return planted


def _nothing(_: Callable[..., None]) -> Callable[..., None]:
    return lambda *args: None


def _without_hold(_: Callable[..., Any]) -> Callable[..., Any]:
    def planted(self: Hold, dir_fd: int, name: bytes, flags: int) -> bool:
        self.fd = os.open(name, os.O_RDONLY | flags, dir_fd=dir_fd)
        holds._held.add(self)
        return True

    return planted


class Mutant(NamedTuple):
    """A mistake, and the hunt that finds it."""

    plant: Callable[[], AbstractContextManager[None]]
    hunt: str = "power cuts"


MUTANTS = {
    "no fsync of staged content": Mutant(_without_fsync("fsync of its new content")),
    "no fsync of the staged files' directory": Mutant(_without_fsync("fsync of the staged files' directory")),
    "no fsync of the journal": Mutant(_without_fsync("fsync of the journal")),
    "no fsync at the commit": Mutant(_without_fsync("fsync of the journal's directory")),
    "applied before the journal": Mutant(_replaced(Journal, "commit", _apply_before_journal)),
    "the journal goes first": Mutant(_replaced(Journal, "apply", _unlink_first)),
    "no fsync of the files' directories": Mutant(_without_fsync(AFTER)),
    "the removal of the journal is not synced": Mutant(
        _without_fsync("fsync of the directory of a journal that is done with")
    ),
    "no checksum": Mutant(_replaced(journal, "decode", _without_checksum), "changed bits"),
    "no look at what is there now": Mutant(_replaced(Journal, "_redo", _without_identity)),
    "the old files are not kept alive": Mutant(_replaced(Journal, "pin", _nothing)),
    "no fsync of what is moved": Mutant(_without_fsync("fsync of a file that is moved")),
    "no fsync of the names that go": Mutant(_without_fsync(BEFORE)),
    "a recovery does not sync its journal": Mutant(_without_fsync("fsync of a journal's directory, in its recovery")),
    "no mark": Mutant(_replaced(LockSet, "mark", _nothing)),
    "the id is not held": Mutant(_replaced(Hold, "take", _without_hold), "a living one"),
}


# ---- hunts -----------------------------------------------------------------------------------------------------------


def _power_cuts() -> str:
    try:
        for plan in KNOWN_PLANS:
            for seed in range(6):
                try_plan(plan, Random(seed))
    except ViolationError as error:
        return str(error)
    return ""


def _changed_bits() -> str:
    """A journal with a bit changed is no journal."""
    with room() as base:
        good = encode([Effect(b"a", True, 0)])
        for bit in range(8 * len(good)):
            made = Journal.begin(os.fsencode(base), durable=True)
            made.commit([Effect(b"a", True, 0)])
            made.close()
            path = base / ".ringpool/txn" / f"{made.id.decode()}.journal"
            changed = bytearray(good)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            if recovery.recover_root(os.fsencode(base)):
                return f"a journal whose bit {bit} is changed was rolled forward"
    return ""


def _a_living_one() -> str:
    """Somebody looks for dead transactions at each call of one that lives, once it stages."""
    with room() as directory:
        base = directory / "base"

        def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal at_work
            if at_work:
                at_work = False
                recovery.recover_root(os.fsencode(base))
                at_work = True
            result = call(*args, **kwargs)
            at_work = at_work or (name == "open" and os.fsencode(args[0]).endswith(b".0.new"))
            return result

        at_work = False
        child_transaction.lay_out(base)
        try:
            with intercepted(around):
                child_transaction.transact(base)
            return "" if child_transaction.check(base, "") else "it was undone"
        except (AssertionError, OSError) as error:
            return repr(error)


HUNTS: dict[str, Callable[[], str]] = {
    "power cuts": _power_cuts,
    "changed bits": _changed_bits,
    "a living one": _a_living_one,
}

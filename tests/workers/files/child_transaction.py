"""What second processes do to transactions: they run in a fresh interpreter, which may fork, and fail by exit status.

kill_everywhere     a fork dies at each system call of a transaction, the next one at each of the recovery; what is
                    there then is old or new
contend             forks transfer between accounts, and are killed at random; all that is read adds up
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.workers.files.child import listen, say

from ringpool.errors import TransactionConflictError
from ringpool.workers.files import recovery
from ringpool.workers.files.journal import Effect, Journal, txn_directory
from ringpool.workers.files.locks import LockSet, PathLock
from ringpool.workers.files.oslayer import intercepted
from ringpool.workers.files.transaction import FileTransaction, snapshot

PATIENCE_S = 30
OLD = {"d1/a": b"old a", "d1/b": b"old b", "d2/c": b"old c"}
NEW = {"d1/a": b"new a", "d2/d": b"old c", "d2/e": b"new e"}
NAMES = sorted({*OLD, *NEW})


def forked(body: Callable[[], object]) -> int:
    """The pid of a fork that runs ``body``, and exits with 1 where that raises."""
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
        os._exit(0)
    except BaseException as error:
        say(f"{os.getpid()}: {error!r}")
        os._exit(1)


def died(pid: int) -> bool:
    """Wait for its end: whether it was killed. It must have been that, or well."""
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, f"{pid} ended with {status:#x}"
    return os.WIFSIGNALED(status)


def dying_at(at: int, body: Callable[[], object]) -> Callable[[], None]:
    """``body``, killed at its system call number ``at``."""
    n = 0

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal n
        n += 1
        if n == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    def run() -> None:
        with intercepted(around):
            body()

    return run


def hold(name: str) -> None:
    """Hold a path's lock until the test answers."""
    with PathLock(name, base=Path(name).parents[1]):
        say("held")
        listen()


def make(base: Path, content: list[Effect], *, staged: int = 0) -> Journal:
    """A journal of ``base`` that is not applied, with files for so many effects."""
    made = Journal.begin(os.fsencode(base), durable=True)
    for n in range(staged):
        fd = made.create(n, 0o600)
        os.write(fd, b"new %d" % n)
        os.close(fd)
    made.commit(content)
    return made


def hold_turn(directory: str) -> None:
    """Hold the turn to recover the transactions of a base until the test answers."""
    fd = os.open(txn_directory(os.fsencode(directory)), os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    say("held")
    listen()


def fork_while_held(directory: str) -> None:
    """It holds the id of a transaction until it is killed, and its fork lives on until the test answers."""
    made = make(Path(directory), [Effect(b"a", True, 0)], staged=1)
    if os.fork() == 0:
        say("forked")
        listen()
        os._exit(0)
    os.wait()
    made.close()


# ---- killed at every system call -------------------------------------------------------------------------------------


def lay_out(base: Path) -> None:
    """``OLD``, and nothing else."""
    shutil.rmtree(base, ignore_errors=True)
    for name, content in OLD.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)


def transact(base: Path) -> None:
    """From ``OLD`` to ``NEW``."""
    with FileTransaction(base) as transaction:
        transaction.write("d1/a", b"new a")
        transaction.delete("d1/b")
        transaction.rename("d2/c", "d2/d")
        transaction.write("d2/e", b"new e")


def check(base: Path, where: object) -> bool:
    """Whether it is ``NEW``; else it must be ``OLD``. One lock is enough to see the right one, at every path."""
    with PathLock(base / "d1/b", "shared", base=base):
        seen = {name: (base / name).read_bytes() for name in NAMES if (base / name).exists()}
    assert seen in (OLD, NEW), (where, seen)
    assert snapshot(NAMES, base=base) == seen, where
    recovery.recover_root(os.fsencode(base))
    left = os.listdir(base / ".ringpool/txn") if (base / ".ringpool/txn").exists() else []
    assert not left, (where, left)
    assert not any(file.stat().st_size for file in (base / ".ringpool/locks").glob("*.lock")), where
    return seen == NEW


def stands(base: Path) -> bool:
    """Whether the one that was killed is committed: its journal has its name, or is done with."""
    if any((base / ".ringpool/txn").glob("*.journal")):
        return True
    return {name: (base / name).read_bytes() for name in NAMES if (base / name).exists()} == NEW


def kill_everywhere(directory: str, first: str, stride: str, recovery_stride: str) -> None:
    """Every ``stride``-th call from ``first`` on; in the recovery every ``recovery_stride``-th, none where it is 0."""
    base = Path(directory)
    sides: set[bool] = set()
    count = 0
    at = int(first)
    while True:
        lay_out(base)
        if not died(forked(dying_at(at, lambda: transact(base)))):
            break
        is_new = stands(base)
        assert check(base, at) == is_new, at
        sides.add(is_new)
        count += 1
        recovery_at = 1
        while int(recovery_stride):
            lay_out(base)
            died(forked(dying_at(at, lambda: transact(base))))
            is_new = stands(base)
            if not died(forked(dying_at(recovery_at, lambda: PathLock(base / "d2/d", base=base).acquire()))):
                break
            assert check(base, (at, recovery_at)) == is_new, (at, recovery_at)
            count += 1
            recovery_at += int(recovery_stride)
        at += int(stride)
    assert check(base, "not killed")
    assert sides == {False, True}
    say(f"{count} kills")


# ---- many at once ----------------------------------------------------------------------------------------------------

ACCOUNTS = [f"accounts/{n}" for n in range(6)]
PLACES = [f"places/{n}" for n in range(3)]  # one file wanders among these
COUNTERS = [f"counters/{n}" for n in range(4)]  # one for each process
START = 1000


def contend(directory: str, seconds: str, seed: str) -> None:
    """Four processes for that long, killed now and then; every snapshot must add up, and so must the end."""
    base = Path(directory)
    lots = random.Random(int(seed))
    for name in (*ACCOUNTS, *COUNTERS, PLACES[0]):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(f"{START} 0" if name in ACCOUNTS else "0")
    workers: list[int] = []
    kills = snapshots = 0
    end_s = time.monotonic() + float(seconds)
    try:
        workers += [forked(lambda n=n: _transfer(base, n, end_s)) for n in range(len(COUNTERS))]
        while time.monotonic() < end_s:
            _add_up(snapshot((*ACCOUNTS, *COUNTERS, *PLACES), base=base, timeout_s=PATIENCE_S))
            snapshots += 1
            if lots.random() < 0.3:
                n = lots.randrange(len(workers))
                os.kill(workers[n], signal.SIGKILL)
                if died(workers[n]):
                    kills += 1
                workers[n] = forked(lambda n=n: _transfer(base, n, end_s))
            time.sleep(lots.random() * 0.01)
    finally:
        for pid in workers:
            died(pid)
    _add_up(snapshot((*ACCOUNTS, *COUNTERS, *PLACES), base=base, timeout_s=PATIENCE_S))
    transfers = sum(int((base / name).read_text()) for name in COUNTERS)
    recovery.recover_root(os.fsencode(base))
    assert not os.listdir(base / ".ringpool/txn")
    assert kills, "nobody was killed"
    assert transfers > kills, "nobody got anything done"
    say(f"{transfers} transfers, {kills} kills, {snapshots} snapshots")


def _add_up(files: dict[str, bytes]) -> None:
    balances = [list(map(int, files[name].split())) for name in ACCOUNTS]
    assert sum(balance for balance, _ in balances) == START * len(ACCOUNTS), files
    assert sum(version for _, version in balances) == 2 * sum(int(files[name]) for name in COUNTERS), files
    assert sum(name in files for name in PLACES) == 1, files


def _transfer(base: Path, n: int, end_s: float) -> None:
    """Transfer until then: by turns under locks, and trusting that nobody comes in between."""
    lots = random.Random(os.getpid())
    os.sched_yield()
    while time.monotonic() < end_s:
        names = [*lots.sample(ACCOUNTS, 2), COUNTERS[n]]
        if lots.random() < 0.5:
            with LockSet([base / name for name in (*names, *PLACES)], base=base, timeout_s=PATIENCE_S):
                _once(base, names, lots, PLACES)
        else:
            try:
                _once(base, names, lots, ())
            except TransactionConflictError:
                pass  # the next one


def _once(base: Path, names: list[str], lots: random.Random, places: Iterable[str]) -> None:
    amount = lots.randint(1, 9)
    with FileTransaction(base, timeout_s=PATIENCE_S, durability=lots.choice(["full", "atomic"])) as transaction:
        for name, change in zip(names, (-amount, amount), strict=False):
            balance, version = map(int, transaction.read(name).split())
            transaction.write(name, f"{balance + change} {version + 1}")
        transaction.write(names[2], str(int(transaction.read(names[2])) + 1))
        here = next((place for place in places if (base / place).exists()), None)
        if here is not None:
            transaction.rename(here, lots.choice(PLACES))

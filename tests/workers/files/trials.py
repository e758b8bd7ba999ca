"""Trials of transactions: a drawn plan is run, recorded, and checked at every disk that a power cut could leave of it.

    plan = draw(Random(seed))           what stands at first, and steps: transactions of one to three operations,
                                        plain atomic writes, writes that were never synced, kills and recoveries
    Trial(plan, directory, random).check() runs it; for each disk of the model: recovery; then what is there must be ...

    step                     while it runs             after it
    transaction              before or after           after
    plain atomic write       before or after           after
    loose write              that path: anything       that path: anything, until a transaction takes it
    killed transaction       before or after           before or after, also under later plain writes
    recovery                 before or after           what the running system shows, for ever

The expectation is a dict that the operations are done to; nothing of it is taken from the code under test.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tests.workers.files.model import Disk, Recording, seen_as

from ringpool.workers.files import recovery
from ringpool.workers.files.atomic import atomic_write
from ringpool.workers.files.locks import PathLock
from ringpool.workers.files.naming import staging_name
from ringpool.workers.files.operations import Delete, Operation, Rename, Write, paths_of
from ringpool.workers.files.oslayer import calls, intercepted
from ringpool.workers.files.transaction import FileTransaction

PATHS = (b"d1/a", b"d1/b", b"d2/c", b"d2/d")
KILLED_AT_MAX = 110  # system calls; about as many as a transaction makes, in all
KILLED_AFTER_MAX = 16  # and after its commit

OF_THE_KERNEL = ("close", "fcntl", "flock", "unlock_descriptor")  # it does these for the dead as well

Files = dict[bytes, bytes]


class Transaction(NamedTuple):
    operations: tuple[Operation, ...]


class Killed(NamedTuple):
    """A transaction whose process dies at its ``at``-th system call, or that many after its commit."""

    operations: tuple[Operation, ...]
    at: int
    committed: bool


class Plain(NamedTuple):
    """A durable atomic write, without a lock."""

    path: bytes
    content: bytes


class Loose(NamedTuple):
    """A write by temporary file and rename, nothing of it synced."""

    path: bytes
    content: bytes


class Recover(NamedTuple):
    """Somebody locks a path."""

    path: bytes


Step = Transaction | Killed | Plain | Loose | Recover


class Plan(NamedTuple):
    first: Files
    steps: tuple[Step, ...]


def done(operations: tuple[Operation, ...], files: Files) -> Files:
    """``files`` after the operations."""
    files = dict(files)
    for operation in operations:
        match operation:
            case Write(path, content):
                files[path] = content
            case Delete(path):
                del files[path]
            case Rename(source, target):
                files[target] = files.pop(source)
    return files


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(random: Random) -> Plan:
    """A plan of two to four steps."""
    first = {path: _content(random) for path in PATHS if random.random() < 0.7}
    kind = random.choice(["one", "two", "then plain", "loose", "killed", "killed, then plain"])
    files = dict(first)
    steps: list[Step] = []

    def transaction() -> tuple[Operation, ...]:
        operations = _operations(random, files)
        after = done(operations, files)
        files.clear()
        files.update(after)
        return operations

    def plain(path: bytes) -> None:
        steps.append(Plain(path, _content(random)))
        files[path] = steps[-1].content

    if kind == "loose":
        path = random.choice(PATHS)
        steps.append(Loose(path, _content(random)))
        files[path] = steps[-1].content
        while True:
            taking = _taking(random, path)
            operations = (taking, *_operations(random, done((taking,), files)))
            if done(operations, files).get(path) != files[path]:  # else what was not synced may stand there again
                break
        steps.append(Transaction(operations))
    elif kind.startswith("killed"):
        operations = _operations(random, files)
        committed = random.random() < 0.7
        at = random.randint(1, KILLED_AFTER_MAX if committed else KILLED_AT_MAX) if random.random() < 0.8 else 1
        steps.append(Killed(operations, at, committed))
        named = sorted({path for each in operations for path in paths_of(each)})
        if kind == "killed, then plain":
            path = random.choice(named)
            for _ in range(random.randint(1, 3)):
                plain(path if random.random() < 0.7 else random.choice(PATHS))
        steps.append(Recover(random.choice(named)))
    else:
        steps.append(Transaction(transaction()))
        if kind == "two":
            steps.append(Transaction(transaction()))
        elif kind == "then plain":
            for _ in range(random.randint(1, 2)):
                plain(random.choice(PATHS))
    return Plan(first, tuple(steps))


def _operations(random: Random, files: Files) -> tuple[Operation, ...]:
    """One to three that can be done to ``files`` in this order."""
    files = dict(files)
    operations: list[Operation] = []
    for _ in range(random.randint(1, 3)):
        choice = random.choice("wdr") if files else "w"
        if choice == "w":
            operations.append(Write(random.choice(PATHS), _content(random)))
        elif choice == "d":
            operations.append(Delete(random.choice(sorted(files))))
        else:
            operations.append(Rename(random.choice(sorted(files)), random.choice(PATHS)))
        files = done((operations[-1],), files)
    return tuple(operations)


def _taking(random: Random, path: bytes) -> Operation:
    others = [each for each in PATHS if each != path]
    return random.choice([Write(path, _content(random)), Delete(path), Rename(path, random.choice(others))])


def _content(random: Random) -> bytes:
    return bytes(random.choices(b"abcdefghij", k=random.choice([1, 8, 40])))


A, B, C, D = PATHS
FIRST = {A: b"first a", B: b"first b", C: b"first c"}
# Those that the planted mistakes are hunted with: each of them shows at one of these.
KNOWN_PLANS = (
    Plan(FIRST, (Transaction((Write(A, b"new"), Delete(B), Rename(C, D))), Plain(B, b"plain"))),
    Plan(FIRST, (Transaction((Delete(A),)), Plain(A, b"plain"), Transaction((Write(D, b"new"), Rename(A, B))))),
    Plan(FIRST, (Loose(A, b"loose"), Transaction((Rename(A, D), Write(B, b"new"))))),
    Plan(FIRST, (Loose(A, b"loose"), Transaction((Delete(A), Delete(B))))),
    Plan(FIRST, (Killed((Write(A, b"new"), Delete(C)), 1, True), Recover(C))),
    Plan(FIRST, (Killed((Write(A, b"new"), Delete(C)), 8, True), Recover(A))),
    Plan(FIRST, (Killed((Write(A, b"new"), Delete(B)), 1, True), Plain(A, b"one"), Plain(A, b"two"), Recover(B))),
    Plan(FIRST, (Killed((Write(A, b"new"), Delete(B)), 14, True), Plain(B, b"one"), Plain(B, b"two"), Recover(A))),
)


# ---- running ---------------------------------------------------------------------------------------------------------


class Death(BaseException):
    """Stands for the kill: from here on the code gets no system call done."""


class ViolationError(AssertionError):
    """Something is on the disk that must not be."""


class Trial:
    """A plan, run and recorded below ``directory``, which is empty."""

    def __init__(self, plan: Plan, directory: Path, random: Random) -> None:
        self.plan = plan
        self.live = directory / "live"
        self.place = directory / "disk"
        for name in ("live/d1", "live/d2", "disk"):
            (directory / name).mkdir(parents=True)
        for path, content in plan.first.items():
            (self.live / os.fsdecode(path)).write_bytes(content)
        self.recording = Recording(self.live, random)
        self.legal: dict[tuple[str, ...], list[tuple[Files, frozenset[bytes]]]] = {}
        self._run()

    def _run(self) -> None:
        now = [(self.plan.first, frozenset[bytes]())]  # what there may be for certain; with the paths that do not count
        with self.recording:
            self.legal[()] = now
            for n, step in enumerate(self.plan.steps):
                after = [(_after(step, files), ignored) for files, ignored in now]
                match step:
                    case Loose(path, _):
                        after = [(files, ignored | {path}) for files, ignored in after]
                    case Transaction():
                        after = [(files, frozenset()) for files, _ in after]  # it takes the loose path
                    case Recover():
                        after = now
                    case _:
                        pass
                self._mark(f"{n} begins", [*now, *after])
                died = self._do(step)
                if isinstance(step, Killed):
                    now = [*now, *after] if died else after
                elif isinstance(step, Recover):
                    shown = _files_in(self.live)
                    now = [(files, ignored) for files, ignored in now if files == shown]
                    if not now:
                        raise ViolationError(f"{self.plan}: after the recovery of a killed one there is {shown}")
                else:
                    now = after
                self._mark(f"{n} is done", now)
            recovery.recover_root(os.fsencode(self.live))  # what was killed before it was marked
        shown, left = _files_in(self.live), _left_in(self.live)
        if left or all(shown != files for files, _ in now):
            raise ViolationError(f"{self.plan}: at the end there is {shown}, {left}")

    def _mark(self, text: str, legal: list[tuple[Files, frozenset[bytes]]]) -> None:
        self.recording.mark(text)
        self.legal[self.recording.marks] = legal

    def _do(self, step: Step) -> bool:
        """Whether it was killed."""
        match step:
            case Transaction(operations):
                _transact(self.live, operations)
            case Killed(operations, at, committed):
                self.recording.around = _death_at(at, committed)
                try:
                    _transact(self.live, operations)
                except Death:
                    return True
                finally:
                    self.recording.around = None
            case Plain(path, content):
                atomic_write(self.live / os.fsdecode(path), content)
            case Loose(path, content):
                target = os.fsencode(self.live) + b"/" + path
                temp = staging_name(target, "0" * 16)
                fd = calls.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                calls.write(fd, content)
                calls.close(fd)
                calls.rename(temp, target)
            case Recover(path):
                with PathLock(self.live / os.fsdecode(path), base=self.live):
                    pass
        return False

    def check(self, random: Random, subsets_max: int | None = None, twice: float = 0.0) -> int:
        """Recover every disk, and look at it; of each, with probability ``twice``, those of a second cut as well.

        How many disks that were. Raises ``ViolationError``.
        """
        count = 0
        for disk in self.recording.disks(random, subsets_max):
            legal = self.legal[disk.marks]
            if random.random() < twice:
                count += self._check_twice(disk, legal, random)
            with disk.materialised(self.place) as numbers, intercepted(seen_as(numbers)):
                self._recover(disk, legal)
            count += 1
        return count

    def _check_twice(self, disk: Disk, legal: list[tuple[Files, frozenset[bytes]]], random: Random) -> int:
        with disk.materialised(self.place) as numbers:
            recording = Recording(self.place, random, numbers)
            with recording:
                self._recover(disk, legal)
            outcome = _files_in(self.place)
        recording.mark("recovered")
        count = 0
        for second in recording.disks(random):
            with second.materialised(self.place) as numbers, intercepted(seen_as(numbers)):
                self._recover(second, [(outcome, frozenset())] if second.marks else legal)
            count += 1
        return count

    def _recover(self, disk: Disk, legal: list[tuple[Files, frozenset[bytes]]]) -> None:
        try:
            recovery.recover_root(os.fsencode(self.place))
        except Exception as error:
            raise ViolationError(f"{self.plan}: cut after {disk.marks[-1:]}, recovery fails: {error!r}") from error
        found = _files_in(self.place)
        if not any(_alike(found, files, ignored) for files, ignored in legal):
            raise ViolationError(f"{self.plan}: cut after {disk.marks[-1:]}, there is {found}; legal: {legal}")
        if left := _left_in(self.place):
            raise ViolationError(f"{self.plan}: recovery left {left}")


def _after(step: Step, files: Files) -> Files:
    match step:
        case Transaction(operations) | Killed(operations):
            return done(operations, files)
        case Plain(path, content) | Loose(path, content):
            return {**files, path: content}
        case Recover():
            return files


def _alike(found: Files, files: Files, ignored: frozenset[bytes]) -> bool:
    if not ignored:
        return found == files
    return all(found.get(path) == files.get(path) for path in {*found, *files} - ignored)


def _transact(base: Path, operations: tuple[Operation, ...]) -> None:
    with FileTransaction(base) as transaction:
        for operation in operations:
            match operation:
                case Write(path, content):
                    transaction.write(path, content)
                case Delete(path):
                    transaction.delete(path)
                case Rename(source, target):
                    transaction.rename(source, target)


def _death_at(at: int, committed: bool) -> Callable[..., Any]:
    n = -1 if committed else 0

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal n
        n += n >= 0
        if n >= at and name not in OF_THE_KERNEL:
            raise Death
        result = call(*args, **kwargs)
        if name == "rename" and os.fsencode(args[1]).endswith(b".journal"):
            n = 0
        return result

    return around


def _files_in(directory: Path) -> Files:
    found: Files = {}
    for name in ("d1", "d2"):
        if not (directory / name).is_dir():
            continue
        for entry in os.scandir(os.fsencode(directory / name)):
            if not entry.name.startswith(b".rp-"):
                found[os.fsencode(name) + b"/" + entry.name] = Path(os.fsdecode(entry.path)).read_bytes()
    return found


def _left_in(directory: Path) -> list[str]:
    """What transactions have left of theirs."""
    txn = directory / ".ringpool/txn"
    return os.listdir(txn) if txn.exists() else []


@contextmanager
def room() -> Iterator[Path]:
    """An empty directory, in memory where that can be."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="ringpool-trial-") as directory:
        yield Path(directory)


def try_plan(plan: Plan, random: Random, *, subsets_max: int | None = None, twice: float = 0.0) -> int:
    """A trial of the plan: how many disks. Raises ``ViolationError``."""
    with room() as directory:
        return Trial(plan, directory, random).check(random, subsets_max, twice)


def sweep(seeds: range, *, subsets_max: int | None = None, twice: float = 0.0) -> int:
    """Trials of the plans that are drawn from these seeds: how many disks. Raises ``ViolationError``."""
    count = 0
    for seed in seeds:
        random = Random(seed)
        count += try_plan(draw(random), random, subsets_max=subsets_max, twice=twice)
    return count

"""Mistakes that somebody might make in ``ringpool/shm``, planted one at a time, and the hunt that has to find each.

    mutant --plant--> a copy of the package --python -m tests.crash.mutants HUNT, the copy first in its path--> caught

A hunt is a part of the kill suite that is sure to meet the mistake, not by chance: every bytecode of what matters. A
suite that lets one of these pass would let it pass in earnest. Where the source has changed so that a mutant's text is
not found any more, planting it is an error: write the mistake anew, in today's words.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.crash import test_kill_coordinator, test_kill_worker
from tests.crash.harness import Sweep, World

import ringpool
from ringpool.coordinator import leftovers
from ringpool.errors import RingpoolError

PACKAGE = Path(os.path.realpath(ringpool.__file__)).parent
PATIENCE_S = 240
EXIT_CAUGHT = 3


class Change(NamedTuple):
    """In a file of ``ringpool/shm``: an old text, which must stand there ``n`` times, and the new one."""

    file: str
    old: str
    new: str
    n: int = 1


class Mutant(NamedTuple):
    """A mistake: what it is, the hunt that finds it, and how it is made."""

    name: str
    hunt: str
    changes: tuple[Change, ...]


READ_RUNNING = "running = words[running_at] - 1"
MUTANTS = [
    Mutant(
        "the heir of the mutex does not redo what was committed",
        "worker",
        (Change("ring.py", "] = cursors.op_claim", "] += 0"),),
    ),
    Mutant(
        "the cursors are written over the active block",
        "worker",
        (Change("claims.py", "block_at + (version + 1 & 1) * stride", "block_at + (version & 1) * stride"),),
    ),
    Mutant(
        "the claim word is written before the commit",
        "worker",
        (
            Change("claims.py", "            words[VERSION_WORD] = version + 1  # the commit\n", ""),
            Change(
                "claims.py",
                "            words[claim_word] = claim\n",
                "            words[claim_word] = claim\n            words[VERSION_WORD] = version + 1\n",
            ),
        ),
    ),
    Mutant(
        "a claim list has one half",
        "worker",
        (
            Change("claims.py", "halves + (claim >> 16 & 1) * claims_max", "halves", 2),
            Change("claims.py", "halves + (sequence & 1) * claims_max", "halves"),
            Change("ring.py", "(2 * worker + (claim >> layout.CLAIM_SHIFT & 1))", "2 * worker"),
        ),
    ),
    Mutant(
        "the result says OK before the effect stands",
        "worker",
        (Change("results.py", "Status.STAGED << layout.STATUS_SHIFT", "Status.OK << layout.STATUS_SHIFT"),),
    ),
    Mutant(
        "recovery does not look at results",
        "worker",
        (Change("dispatch.py", "ClaimedTask(entry, ring.status(entry), ", "ClaimedTask(entry, Status.EMPTY, "),),
    ),
    Mutant(
        "a task that is tried again keeps its attempt",
        "worker",
        (Change("dispatch.py", "entry + layout.ATTEMPT_ONE for entry in blamed", "entry for entry in blamed"),),
    ),
    Mutant(
        "the claim of the dead is not emptied",
        "worker",
        (Change("dispatch.py", "op_worker=worker,", "op_worker=ring.workers,"),),
    ),
    Mutant(
        "a start does not look whether it was taken back",
        "taken back",
        (Change("claims.py", "if words[revoke] == self.claim_sequence:", "if False:"),),
    ),
    Mutant(
        "a start that was refused is still called running",
        "taken back",
        (Change("claims.py", "            self.ring.words[self._running] = 0", "            pass"),),
    ),
    Mutant(
        "a take-back looks at what runs before it says what it revokes",
        "meeting",
        (
            Change(
                "dispatch.py", "            running = words[running_at] - 1  # read after", "            # read after"
            ),
            Change(
                "dispatch.py",
                "            words[revoke] = sequence\n",
                f"            {READ_RUNNING}\n            words[revoke] = sequence\n",
            ),
        ),
    ),
    Mutant(
        "a take-back in vain hides the one before",
        "taken back",
        (
            Change(
                "dispatch.py",
                "            if len(entries) < 2 or (former and former + 1 == sequence):\n",
                "            if not entries:\n",
            ),
            Change("dispatch.py", "                words[revoke] = former\n", "                pass\n"),
        ),
    ),
    Mutant(
        "DHEAD moves before delivery",
        "collect",
        (
            Change(
                "dispatch.py",
                "        freed: list[int] = []\n",
                "        freed: list[int] = []\n        words[DONE_HEAD] = delivered + n\n",
            ),
        ),
    ),
    Mutant(
        "tasks are published before they are written",
        "publish",
        (
            Change(
                "dispatch.py",
                "        entries = self._write_records(tasks, slots, first)\n"
                "        ring.put(ring.ready, first, entries)\n"
                "        tail = first + len(entries)\n",
                "        tail = first + len(tasks)\n",
            ),
            Change(
                "dispatch.py",
                "        wake = ring.lock.run(section)\n        del free",
                "        wake = ring.lock.run(section)\n"
                "        ring.put(ring.ready, first, self._write_records(tasks, slots, first))\n        del free",
            ),
        ),
    ),
    Mutant(
        "a death is counted again by the next coordinator",
        "settle",
        (Change("results.py", "return (word & 0xFF) - counted", "return word & 0xFF"),),
    ),
    Mutant(
        "an interrupted section is left as it is",
        "interrupted settle",
        (
            Change(
                "lock.py",
                "            self._redo()\n            self._consistent(self.mutex)",
                "            self._consistent(self.mutex)",
            ),
        ),
    ),
    Mutant(
        "an interrupted publisher trusts what it knew before",
        "interrupted publish",
        (Change("dispatch.py", "        self._stale = True\n        slots = free", "        slots = free"),),
    ),
]


def plant(mutant: Mutant, directory: Path) -> None:
    """Copy the package into ``directory`` and make the mistake there. Raises ``LookupError`` where there is no place.

    With no changes it is just a copy.
    """
    copy = directory / "ringpool"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new, n in mutant.changes:
        source = (copy / "shm" / file).read_text()
        if source.count(old) != n:
            raise LookupError(f"{mutant.name!r} is out of date: {file} has this {source.count(old)} times:\n{old}")
        changed = source.replace(old, new)
        compile(changed, file, "exec")
        (copy / "shm" / file).write_text(changed)


def caught(directory: Path, hunt: str, module: str = "tests.crash.mutants") -> str:
    """What ``hunt`` of ``module`` finds wrong with the package in ``directory``, in its words; "" where there is
    nothing.
    """
    path = os.pathsep.join([str(directory), *(each or os.getcwd() for each in sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", module, str(directory), hunt]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"no end within {PATIENCE_S} s"
    finally:
        _end(process)
    if process.returncode not in (0, EXIT_CAUGHT):
        raise RuntimeError(f"the hunt itself failed, with status {process.returncode}:\n{said}")
    return said.splitlines()[-1] if process.returncode else ""


def _end(process: subprocess.Popen[str]) -> None:
    """Leave nothing of a hunt that has not ended by itself: no process, no segment."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if process.returncode not in (0, EXIT_CAUGHT):
        leftovers.reclaim_dead()


# ---- in the process that hunts ---------------------------------------------------------------------------------------

_killed = test_kill_coordinator.test_a_coordinator_killed_at_any_bytecode_leaves_all_to_the_next
_interrupted = test_kill_coordinator.test_an_interrupted_coordinator_lets_go_of_the_mutex_and_goes_on

# By name. A stride is less than the bytecodes between which each mistake that it is after shows.
HUNTS: dict[str, Callable[[], object]] = {
    "worker": lambda: test_kill_worker.test_a_worker_killed_at_any_bytecode_loses_nothing(Sweep(3, 1), 4, World, 2000),
    "taken back": lambda: test_kill_worker.test_a_worker_killed_after_a_take_back_loses_nothing(Sweep(3, 1)),
    "meeting": lambda: [test_kill_worker.meet(99, at, worker_first=False) for at in range(1, 800, 7)],
    "collect": lambda: _killed(Sweep(1, 1), "collect", "running"),
    "publish": lambda: _killed(Sweep(1, 1), "publish", "running"),
    "settle": lambda: _killed(Sweep(1, 1), "settle", "running"),
    "interrupted settle": lambda: _interrupted(Sweep(1, 1), "settle", "running"),
    "interrupted publish": lambda: _interrupted(Sweep(1, 1), "publish", "running"),
}


def main(directory: str, hunt: Callable[[], object]) -> int:
    """Run ``hunt``; the exit status says whether it caught something."""
    assert PACKAGE.is_relative_to(directory), f"{PACKAGE} is hunted, and not the copy in {directory}"
    try:
        hunt()
    except (AssertionError, RingpoolError) as error:
        print(f"caught: {type(error).__name__}: {error}")
        return EXIT_CAUGHT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], HUNTS[sys.argv[2]]))

"""Transactions, all of it: every disk that a power cut can leave, every kill, every error, and every planted mistake.

A sample runs by default, here (the mistakes) and in tests/workers/files.
"""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest
from tests.crash.harness import FULL
from tests.crash.transaction_mutants import HUNTS, MUTANTS
from tests.workers.files import child_transaction
from tests.workers.files.child import Child
from tests.workers.files.test_transaction_failures import fail_at_every_call
from tests.workers.files.trials import room, sweep

SHARDS = 4
DISKS_MIN = 100_000
SAMPLE = {"no fsync of the journal", "no checksum", "no look at what is there now", "no mark", "the id is not held"}
full = [pytest.param(shard, marks=FULL) for shard in range(SHARDS)]


@pytest.mark.parametrize("shard", full)
def test_no_power_cut_leaves_anything_but_old_or_new(shard: int) -> None:
    began_s = time.monotonic()
    count = first = 0
    while count < 1.05 * DISKS_MIN / SHARDS:
        count += sweep(range(100_000 * (shard + 1) + first, 100_000 * (shard + 1) + first + 20), twice=0.01)
        first += 20
    print(f"{count:,} disks of {first} plans in {time.monotonic() - began_s:.0f} s")


@pytest.mark.parametrize("shard", full)
def test_no_kill_leaves_anything_but_old_or_new_nor_a_kill_of_the_recovery(shard: int) -> None:
    arguments = (str(shard + 1), str(SHARDS), "1")
    with room() as directory, Child(child_transaction.kill_everywhere, directory / "base", *arguments) as child:
        assert child.process.stdout is not None
        print(child.process.stdout.read().decode())
        child.succeed()


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(each, marks=FULL)
        for each in (errno.EIO, errno.ENOSPC, errno.EINTR, errno.EMFILE, errno.EROFS, errno.EDQUOT, KeyboardInterrupt)
    ],
)
def test_an_error_at_every_call_says_what_stands(tmp_path: Path, error: int | type[BaseException]) -> None:
    fail_at_every_call(tmp_path / "base", error)
    if isinstance(error, int):  # who is interrupted all the time cannot tell what stands
        fail_at_every_call(tmp_path / "ever after" / "base", error, ever_after=True)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=FULL) for seed in range(2)])
def test_transactions_of_several_processes_add_up_for_long(tmp_path: Path, seed: int) -> None:
    with Child(child_transaction.contend, tmp_path, "15", str(seed)) as child:
        assert child.process.stdout is not None
        print(child.process.stdout.read().decode())
        child.succeed()


@pytest.mark.parametrize("name", [pytest.param(each, marks=() if each in SAMPLE else FULL) for each in MUTANTS])
def test_a_planted_mistake_is_caught(name: str) -> None:
    mutant = MUTANTS[name]
    with mutant.plant():
        assert HUNTS[mutant.hunt]()


@pytest.mark.parametrize("hunt", [pytest.param(each, marks=FULL if each == "power cuts" else ()) for each in HUNTS])
def test_what_is_unchanged_is_found_sound(hunt: str) -> None:
    assert HUNTS[hunt]() == ""


def test_every_mistake_and_every_hunt_is_used() -> None:
    assert set(MUTANTS) >= SAMPLE
    assert {mutant.hunt for mutant in MUTANTS.values()} == set(HUNTS)

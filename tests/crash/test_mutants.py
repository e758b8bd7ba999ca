"""Planted mistakes are caught, each by the hunt that is after it; and an unchanged copy is not.

A sample runs by default; all of it is part of the full matrix.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.crash.harness import FULL
from tests.crash.mutants import HUNTS, MUTANTS, Change, Mutant, caught, plant

SAMPLE = {
    "the heir of the mutex does not redo what was committed",
    "DHEAD moves before delivery",
    "an interrupted publisher trusts what it knew before",
}
SAMPLE_HUNTS = {"interrupted publish"}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mistake_still_has_its_place_in_the_source(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, tmp_path)


def test_a_mistake_whose_place_is_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    mutant = Mutant("something that nobody writes", "worker", (Change("ring.py", "no such text", ""),))
    with pytest.raises(LookupError, match=r"'something that nobody writes' is out of date: ring\.py has this 0 times"):
        plant(mutant, tmp_path)


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(each, id=each.name, marks=() if each.name in SAMPLE else FULL) for each in MUTANTS],
)
def test_a_planted_mistake_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, tmp_path)
    assert caught(tmp_path, mutant.hunt)


@pytest.mark.parametrize("hunt", [pytest.param(each, marks=() if each in SAMPLE_HUNTS else FULL) for each in HUNTS])
def test_an_unchanged_copy_is_found_sound(hunt: str, tmp_path: Path) -> None:
    plant(Mutant("nothing", hunt, ()), tmp_path)
    assert not caught(tmp_path, hunt)


def test_every_hunt_is_after_something() -> None:
    assert {mutant.hunt for mutant in MUTANTS} == set(HUNTS)
    assert {mutant.name for mutant in MUTANTS} >= SAMPLE

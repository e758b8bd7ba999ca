"""Mistakes planted in what runs vectors are caught, each by the hunt that is after it; and an unchanged copy is not.

A sample runs by default; all of it is part of the full matrix.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.crash import vector_mutants
from tests.crash.harness import FULL
from tests.crash.mutants import Mutant, caught, plant
from tests.crash.vector_mutants import HUNTS, MUTANTS, UNCERTAIN

SAMPLE = {
    "what is left after a death is forgotten where its item is tried again",
    "outcomes are looked at after their chunk was given back",
    "the head of one more outcome has no room",
    "outcomes are written over the times of files",
    "a part is sealed, and nobody is told",
    "it is counted what is in a part before it is said that it is sealed",
    "who comes while a part is sealed does not wait for its end",
}
SAMPLE_HUNTS = {"again", "times", "filled"}


@pytest.mark.parametrize("mutant", [*MUTANTS, *UNCERTAIN], ids=lambda mutant: mutant.name)
def test_a_mistake_still_has_its_place_in_the_source(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, tmp_path)


@pytest.mark.parametrize(
    "mutant", [pytest.param(each, id=each.name, marks=() if each.name in SAMPLE else FULL) for each in MUTANTS]
)
def test_a_planted_mistake_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, tmp_path)
    assert caught(tmp_path, mutant.hunt, vector_mutants.__name__)


@pytest.mark.parametrize("hunt", [pytest.param(each, marks=() if each in SAMPLE_HUNTS else FULL) for each in HUNTS])
def test_an_unchanged_copy_is_found_sound(hunt: str, tmp_path: Path) -> None:
    plant(Mutant("nothing", hunt, ()), tmp_path)
    assert not caught(tmp_path, hunt, vector_mutants.__name__)


def test_every_hunt_is_after_something() -> None:
    assert {mutant.hunt for mutant in MUTANTS} == set(HUNTS)
    assert {mutant.name for mutant in MUTANTS} >= SAMPLE

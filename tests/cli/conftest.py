"""Each test has a directory of its own, with files to work on, and is in it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def numbers(here: Path) -> Path:
    """A directory ``in`` with the files 0.txt to 7.txt; n.txt holds n + 1 bytes."""
    place = here / "in"
    place.mkdir()
    for number in range(8):
        (place / f"{number}.txt").write_text(str(number) * (number + 1))
    return place


@pytest.fixture
def mixed(here: Path) -> Path:
    """A directory ``in`` with files that fail in several ways, until there is a file ``healed``."""
    place = here / "in"
    place.mkdir()
    for stem in ("fine", "bad1", "bad2", "slow1", "dead1"):
        (place / f"{stem}.txt").write_text(stem)
    return place

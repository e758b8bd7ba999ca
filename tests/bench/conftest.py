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
    """A directory ``in`` with the files 0.txt to 19.txt."""
    place = here / "in"
    place.mkdir()
    for number in range(20):
        (place / f"{number}.txt").write_text(str(number) * 10)
    return place

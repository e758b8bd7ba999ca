"""Transactions through real power cuts: as root, where file systems can be made, loop-mounted and shut down."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tests.crash.child_power_cut import IMAGE_BYTES, cut_everywhere
from tests.crash.harness import FULL
from tests.workers.files.child import Child

pytestmark = [*FULL, pytest.mark.parametrize("kind", list(IMAGE_BYTES))]


def cuts(directory: Path, kind: str, *, stride: int = 1, mutant: str = "") -> str:
    """What cuts at each ``stride``-th change found, with a mistake planted or without; skips where none can be."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"there is no mkfs.{kind}")
    with Child(cut_everywhere, directory, kind, str(stride), mutant) as child:
        assert child.process.stdout is not None
        said = child.process.stdout.read().decode()
        child.succeed()
    if said.startswith("impossible"):
        pytest.skip(said)
    print(said)
    return said


def test_a_power_cut_at_every_change_leaves_old_or_new(tmp_path: Path, kind: str) -> None:
    assert "wrong: []" in cuts(tmp_path, kind)


@pytest.mark.parametrize("mutant", ["no fsync of staged content", "applied before the journal"])
def test_a_planted_mistake_shows_at_a_power_cut(tmp_path: Path, kind: str, mutant: str) -> None:
    assert "wrong: []" not in cuts(tmp_path, kind, stride=3, mutant=mutant)

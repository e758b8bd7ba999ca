"""Nothing may be left in ``/dev/shm``, also by a test that fails: what it has left is removed, and fails the test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ringpool.shm import owner, segment


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    me = owner.this_process()
    left = {name for name in os.listdir(segment.SHM_DIRECTORY) if segment.owner_of(name) == me}
    for name in left:
        os.unlink(f"{segment.SHM_DIRECTORY}/{name}")
    assert not left

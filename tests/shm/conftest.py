"""Shared memory for tests: made under names that carry this process, removed by name, and none may be left over.

fixture                          gives
nothing_is_left  (every test)    fails the test that leaves something of this process in /dev/shm
make_segment                     segment.create, with small defaults
stem                             the name of a segment that does not exist, for its blobs
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator

import pytest

from ringpool.shm import owner, segment
from ringpool.shm.segment import Segment


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = _ours()
    yield
    left = _ours() - before
    for name in left:
        os.unlink(f"{segment.SHM_DIRECTORY}/{name}")
    assert not left


def _ours() -> set[str]:
    return {name for name in os.listdir(segment.SHM_DIRECTORY) if segment.owner_of(name) == owner.this_process()}


@pytest.fixture
def make_segment() -> Iterator[Callable[..., Segment]]:
    made: list[Segment] = []

    def make(slots: int = 8, workers: int = 2, claims_max: int = 4) -> Segment:
        made.append(segment.create(slots, workers, claims_max))
        return made[-1]

    yield make
    for each in made:
        segment.unlink(each.name)
        each.close()


@pytest.fixture
def stem() -> Iterator[str]:
    me = owner.this_process()
    name = f"rp.{owner.pid_namespace()}.{me.pid}.{me.start}.{secrets.token_hex(4)}"
    yield name
    segment.unlink(name)

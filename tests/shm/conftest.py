"""Shared memory for tests: made under names that carry this process, removed by name, and none may be left over.

fixture                          gives
nothing_is_left  (every test)    fails the test that leaves something of this process in /dev/shm
make_segment                     segment.create, with small defaults
stem                             the name of a segment that does not exist, for its blobs
name                             the name of a status table that does not exist
table                            a FileStatusTable; audited at the end
no_descriptors                   a context in which this process can open nothing
dead, other                      that table, as a dead and as a living other process used it
"""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
from collections.abc import Callable, Iterator

import pytest
from tests.shm.child_status import as_owner, audit, table_name

from ringpool.errors import SegmentMissingError
from ringpool.shm import owner, segment
from ringpool.shm.owner import Owner
from ringpool.shm.segment import Segment
from ringpool.shm.status import FileStatusTable


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


@pytest.fixture
def name() -> Iterator[str]:
    with table_name() as name:
        yield name


@pytest.fixture
def table(name: str) -> Iterator[FileStatusTable]:
    with FileStatusTable(name, 100, path_bytes=480) as table:
        yield table
        with contextlib.suppress(SegmentMissingError):
            audit(table)


@pytest.fixture
def no_descriptors() -> Callable[[], contextlib.AbstractContextManager[None]]:
    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    return limited


@pytest.fixture
def dead(table: FileStatusTable) -> Iterator[FileStatusTable]:
    """Its pid is used again."""
    with as_owner(table.name, Owner(os.getpid(), 1)) as dead:
        yield dead


@pytest.fixture
def other(table: FileStatusTable) -> Iterator[FileStatusTable]:
    with as_owner(table.name, Owner(os.getppid(), owner.start_time(os.getppid()))) as other:
        yield other

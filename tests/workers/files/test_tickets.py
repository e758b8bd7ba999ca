"""Tickets and bells: order among processes, that the kernel takes back from the dead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.workers.files.child import Child, listen, say
from tests.workers.files.child_locks import in_a_thread, until, waiting

from ringpool.workers.files import tickets
from ringpool.workers.files.tickets import OVERTAKEN, Bell, Tickets, next_ticket, ring


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "lock").touch()
    return tmp_path / "lock"


@pytest.fixture
def several(file: Path) -> Iterator[list[Tickets]]:
    """The tickets of the same file through different descriptors: as different processes have them."""
    fds = [os.open(file, os.O_RDWR) for _ in range(4)]
    found = os.stat(file)
    yield [Tickets(fd, found.st_dev, found.st_ino) for fd in fds]
    for fd in fds:
        os.close(fd)


def test_a_ticket_shows_to_others_until_it_is_taken_back(several: list[Tickets]) -> None:
    mine, other, *_ = several
    for exclusive in (True, False):
        mine.put(7, exclusive=exclusive)
        assert (mine.any(), other.any()) == (False, True)
        mine.take_back(7, exclusive=exclusive)
        assert not other.any()
        mine.take_back(7, exclusive=exclusive)  # once more changes nothing


@pytest.mark.parametrize(
    ("ahead", "mine", "waits"),
    [
        # (ticket, exclusive)
        ((5, True), (6, True), True),
        ((5, True), (6, False), True),
        ((5, False), (6, True), True),
        ((5, False), (6, False), False),  # shared ones go in together
        ((6, True), (5, True), False),
        ((6, True), (5, False), False),
        ((5, True), (5, True), False),  # equal: the lock itself decides
        ((2, True), (6, True), False),  # overtaken, see after=3
        ((3, False), (6, True), False),
        ((4, False), (6, True), True),
        ((2**61, True), (2**61 + 1, False), True),  # 73 years after the start
    ],
)
def test_who_comes_later_waits_for_whom(
    several: list[Tickets], ahead: tuple[int, bool], mine: tuple[int, bool], waits: bool
) -> None:
    several[0].put(ahead[0], exclusive=ahead[1])
    assert several[1].is_ahead(3, mine[0], exclusive=mine[1]) is waits


def test_the_lowest_ticket_of_all_is_the_first_of_whatever_kind(several: list[Tickets]) -> None:
    looking = several[0]
    assert looking.first(0) is None
    several[1].put(90, exclusive=True)
    several[1].put(30, exclusive=True)
    several[2].put(20, exclusive=False)
    several[2].put(40, exclusive=True)
    several[3].put(10, exclusive=True)
    several[3].put(50, exclusive=False)
    looking.put(5, exclusive=True)  # one's own do not count
    assert [looking.first(after) for after in (0, 10, 20, 30, 40, 50, 90)] == [
        (10, True),
        (20, False),
        (30, True),
        (40, True),
        (50, False),
        (90, True),
        None,
    ]


def test_who_may_only_read_the_file_has_a_place_like_any_other(several: list[Tickets], file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        reader = Tickets(fd, 0, 0)
        reader.put(5, exclusive=True)
        assert several[0].is_ahead(0, 6, exclusive=False)
        several[0].put(4, exclusive=False)
        assert reader.is_ahead(0, 5, exclusive=True)
    finally:
        os.close(fd)


def test_the_place_of_a_killed_process_is_free_and_so_is_the_name_of_its_bell(file: Path) -> None:
    with Child(put_a_ticket_and_hang_a_bell, file) as child:
        child.wait_for("there")
        until(lambda: waiting(file) == 1)
        with pytest.raises(OSError, match="Address already in use"):
            Bell(name_of(file))
        child.kill()
        assert waiting(file) == 0
        Bell(name_of(file)).close()


def name_of(file: Path) -> bytes:
    found = os.stat(file)
    return Tickets(-1, found.st_dev, found.st_ino).bell_name(5)


def put_a_ticket_and_hang_a_bell(path: str) -> None:
    fd = os.open(path, os.O_RDWR)
    Tickets(fd, 0, 0).put(5, exclusive=True)
    bell = Bell(name_of(Path(path)))
    say("there")
    listen()
    bell.close()


def test_two_tickets_of_a_process_never_are_the_same() -> None:
    last = 0
    for _ in range(1000):
        ticket = next_ticket(last)
        assert ticket > last
        last = ticket
    assert next_ticket(last + 10**12) == last + 10**12 + 1


def test_a_bell_wakes_one_who_sleeps_at_it_and_then_is_silent(file: Path) -> None:
    bell = Bell(name_of(file))
    try:
        assert not bell.sleep(0)
        with in_a_thread(lambda: ring(name_of(file))):
            assert bell.sleep(60)
        ring(name_of(file), OVERTAKEN)
        words = bell.heard()
        assert OVERTAKEN in words
        assert words != OVERTAKEN
        assert not bell.sleep(0)
        assert bell.heard() == b""
    finally:
        bell.close()


def test_ringing_where_nobody_is_or_nobody_answers_does_nothing(file: Path) -> None:
    ring(name_of(file))
    bell = Bell(name_of(file))
    try:
        for _ in range(10_000):
            ring(name_of(file))
        assert bell.heard()
    finally:
        bell.close()
    ring(name_of(file))


def test_the_child_of_a_fork_rings_with_a_socket_of_its_own(file: Path) -> None:
    bell = Bell(name_of(file))
    try:
        ring(name_of(file))
        tickets.close_ringer()
        tickets.close_ringer()
        ring(name_of(file))
        assert bell.heard() == b"!!"
    finally:
        bell.close()

"""Coordinators for tests.

fixture                          gives
nothing_is_left  (every test)    fails the test that leaves something of this process in /dev/shm
pool                             a Coordinator with two workers, for all tests of a module that do it no harm
file                             an input file
files                            makes n input files
run_program                      a ``Program``, looked after
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.coordinator.program import Program, shared_memory_of, wait_until

from ringpool import Coordinator

_STAYS = re.compile(r"(.*)\.(f\d+|v|s\d+(\.\d+)?)")  # functions, the arena, spare blobs, of a pool that stays


@pytest.fixture(scope="module")
def pool() -> Iterator[Coordinator]:
    with Coordinator(2) as coordinator:
        wait_until(lambda: len(coordinator.worker_pids) == 2, "both workers")
        yield coordinator


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    for shared in {"pool", "executor"} & set(request.fixturenames):
        request.getfixturevalue(shared)  # it was there before the test, and stays
    before = shared_memory_of(os.getpid())

    def left() -> set[str]:
        found = shared_memory_of(os.getpid()) - before
        return {name for name in found if not ((match := _STAYS.fullmatch(name)) and match[1] in before)}

    yield
    wait_until(lambda: not left(), "an empty /dev/shm")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "input"
    path.write_bytes(b"hello")
    return path


@pytest.fixture
def files(tmp_path: Path) -> Callable[[int], list[Path]]:
    def make(n: int) -> list[Path]:
        place = tmp_path / "inputs"
        place.mkdir()
        made = [place / f"{i:05}" for i in range(n)]
        for path in made:
            path.write_text(path.name)
        return made

    return make


@pytest.fixture
def run_program(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    with ExitStack() as programs:
        n = 0

        def start(body: str, **more: object) -> Program:
            nonlocal n
            n += 1
            place = tmp_path / f"program-{n}"
            place.mkdir()
            return programs.enter_context(Program(place, body, **more))  # type: ignore[arg-type]

        yield start

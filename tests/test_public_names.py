"""The names that ``import ringpool`` offers: each is there, typed as what it is, and imported when it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ringpool


def test_every_public_name_is_to_be_had() -> None:
    for name in ringpool.__all__:
        assert getattr(ringpool, name).__name__.endswith(name.rpartition(".")[2]), name
        assert name in dir(ringpool)


def test_type_checkers_are_told_the_same_names_from_the_same_places() -> None:
    tree = ast.parse(Path(ringpool.__file__).read_text())
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.asname: node.module for node in branch.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert told == {name: f"ringpool.{home}" for name, home in ringpool._HOMES.items()}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ringpool' has no attribute 'Cordinator'"):
        ringpool.Cordinator  # noqa: B018


def test_a_program_that_only_writes_files_imports_no_pool() -> None:
    program = "import sys; from ringpool import atomic_write; print('ringpool.coordinator.pump' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_what_a_worker_imports_is_no_event_loop_and_no_shell_patterns() -> None:
    program = (
        "import sys, ringpool.coordinator.job, ringpool.coordinator.executor, ringpool.workers.jobtasks; "
        "print(sorted({'asyncio', 'ringpool.workers.commands'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"

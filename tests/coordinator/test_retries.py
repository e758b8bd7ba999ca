"""Retries of tasks: a call that raises is tried again by its worker, as a policy says."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import task_functions as tasks

from ringpool import Coordinator, FileTask, RetryPolicy
from ringpool.errors import ParameterError

SWIFT = RetryPolicy(3, 0.001)


def test_a_task_is_tried_again_until_it_succeeds(pool: Coordinator, tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    results = list(pool.run_file_tasks(tasks.fail_until, files, params={"attempts": 2}, retry=SWIFT))
    assert [r.value for r in results] == [3, 3, 3]


def test_an_output_is_that_of_the_attempt_that_succeeded(pool: Coordinator, tmp_path: Path) -> None:
    task = FileTask(tmp_path / "a", tmp_path / "out")
    [result] = pool.run_file_tasks(tasks.fail_until, [task], params={"attempts": 1}, retry=SWIFT)
    assert (result.value, (tmp_path / "out").read_text()) == (2, "2")


def test_what_a_call_that_failed_has_written_is_not_there_for_the_next(pool: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    task = FileTask(tmp_path / "a", tmp_path / "out")
    [result] = pool.run_file_tasks(tasks.write_unless_there, [task], retry=SWIFT)
    assert result.ok
    assert (tmp_path / "out").read_text() == "whole"


def test_after_the_last_attempt_its_own_error_tells_of_all(pool: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    future = pool.submit_file_task(tasks.fail_until, tmp_path / "a", params={"attempts": 5}, retry=SWIFT)
    with pytest.raises(ConnectionError, match="attempt 3") as raised:
        future.result(60)
    assert [note.split(" failed")[0] for note in raised.value.__notes__] == ["attempt 1", "attempt 2", "attempt 3"]


def test_what_the_policy_does_not_cover_is_not_tried_again(pool: Coordinator, tmp_path: Path) -> None:
    policy = RetryPolicy(3, 0.001, on=ValueError)
    [result] = pool.run_file_tasks(tasks.fail_until, [tmp_path / "a"], params={"attempts": 1}, retry=policy)
    assert isinstance(result.error, ConnectionError)
    assert (tmp_path / "a").read_text() == "x\n"


def test_without_a_policy_nothing_is_tried_again(pool: Coordinator, tmp_path: Path) -> None:
    [result] = pool.run_file_tasks(tasks.fail_until, [tmp_path / "a"], params={"attempts": 1})
    assert isinstance(result.error, ConnectionError)
    [result] = pool.run_file_tasks(tasks.fail_until, [tmp_path / "b"], params={"attempts": 1}, retry=SWIFT)
    assert result.value == 2, "one function with and without a policy is two"


def test_a_policy_that_cannot_travel_is_refused_at_once(pool: Coordinator, tmp_path: Path) -> None:
    class LocalError(Exception):
        pass

    with pytest.raises(ParameterError, match="its retry policy cannot be pickled"):
        pool.run_file_tasks(tasks.size, [tmp_path], retry=RetryPolicy(on=LocalError))
    with pytest.raises(TypeError, match="must be a RetryPolicy"):
        pool.run_file_tasks(tasks.size, [tmp_path], retry=3)  # pyright: ignore[reportArgumentType]

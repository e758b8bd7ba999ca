"""What a run has left in shared memory that could not write it down: the next one of this process takes it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ringpool import Job
from ringpool.coordinator.ledger import Ledger
from ringpool.errors import LedgerError
from ringpool.shm import segment

N = 20


def job() -> Job:
    return Job(command="echo {src} >> calls; cp {src} {dst}", inputs="in", output="out/{relpath}")


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a job has done some files, all on a quick machine, and had a full disk for its ledger."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for number in range(N):
        (tmp_path / "in" / str(number)).write_text(f"content {number}")

    def write(_ledger: Ledger, _job: int, _rows: Iterable[Any]) -> None:
        raise LedgerError("out/.ringpool/ledger.db", "database or disk is full")

    with monkeypatch.context() as full:
        full.setattr(Ledger, "write", write)
        with pytest.raises(LedgerError):
            job().run(2)
    assert len(segment.own_kept()) == 1
    return tmp_path


def test_what_a_failed_run_of_this_process_has_done_is_not_done_again(failed: Path) -> None:
    report, n_workers = job().run(2), 2
    progress = report.progress
    assert progress.drained > 0
    assert (report.ok, progress.skipped, progress.done) == (True, progress.drained, N - progress.drained)
    # What ran when the disk was full was killed.
    assert len((failed / "calls").read_text().splitlines()) <= N + n_workers
    assert segment.own_kept() == []


def test_what_was_put_into_a_directory_that_is_another_one_now_is_done_again(failed: Path) -> None:
    shutil.rmtree(failed / "out")
    report = job().run(2)
    assert (report.ok, report.progress.drained, report.progress.done) == (True, 0, N)
    assert {path.name for path in (failed / "out").iterdir() if path.is_file()} == {str(number) for number in range(N)}
    assert segment.own_kept() == []


def test_the_segment_of_a_job_that_runs_in_this_process_is_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_text("content")
    found: list[list[str]] = []
    running = Job(command="cp {src} {dst}", inputs="in", output="out/{relpath}")
    running.run(1, on_progress=lambda _progress: found.append(segment.own_kept()))
    assert found
    assert not any(found)

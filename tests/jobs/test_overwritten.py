"""What a run writes over is no other input's output any more, and the ledger does not say that it is.

All files here have one size and one time, and their copies too: by these nobody sees that an output is another's.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.coordinator.program import wait_until
from tests.jobs import job_functions as functions
from tests.workers.files.child import Child

from ringpool import InputFile, Job, Report
from ringpool.coordinator.jobrun import JobRun
from ringpool.coordinator.ledger import Ledger, State
from ringpool.coordinator.ledgerqueries import decode_made

NAMES = ("x", "y")
TIME_NS = 1_500_000_000_000_000_000


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories a and b, each with files x and y."""
    for directory in "ab":
        for name in NAMES:
            make(tmp_path / directory / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{path.parent.name}/{path.name}")
    os.utime(path, ns=(TIME_NS, TIME_NS))


def run(inputs: Any, output: str = "out/{relpath}") -> Report:
    return Job(functions.copy_with_times, inputs, output, directory="out").run(1)


def owners() -> dict[str, list[str]]:
    """By output: whose it is by the ledger, all jobs of it; whose content it has is checked, and the totals are."""
    found: dict[str, list[str]] = {}
    with Ledger.open(Path("out"), create=False, read_only=True) as ledger:
        for job in ledger.jobs():
            rows = list(ledger.rows(job.id))
            assert ledger.counts(job.id).done == sum(row.state == State.DONE for row in rows)
            assert ledger.counts(job.id).output_bytes == sum(one.size for row in rows for one in decode_made(row.made))
            for row in rows:
                output, source = os.path.relpath(os.fsdecode(row.output)), os.path.relpath(os.fsdecode(row.input))
                assert Path(output).read_bytes() == Path(source).read_bytes(), output
                found.setdefault(output, []).append(source)
    return found


def has_index() -> bool:
    with closing(sqlite3.connect("out/.ringpool/ledger.db")) as db:
        return bool(db.execute("SELECT 1 FROM sqlite_schema WHERE type = 'index' AND sql LIKE '%(output)%'").fetchall())


SOURCES: dict[str, Callable[[str], Any]] = {
    "a directory": lambda name: name,
    "a path object": Path,
    "a glob": lambda name: f"{name}/*",
    "files": lambda name: [f"{name}/{each}" for each in NAMES],
    "input files": lambda name: iter([InputFile(f"{name}/{each}", each) for each in NAMES]),
    "a list": lambda name: [f"@{name}.list"],
}


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("output", ["out/{relpath}", "out/{name}", "out/{index}", "out/{hash}"])
def test_runs_over_two_sources_in_turn(place: Path, sources: str, output: str) -> None:
    for name in "ab":
        (place / f"{name}.list").write_text("".join(f"{name}/{each}\n" for each in NAMES))
    for name in "abbaba":
        assert run(SOURCES[sources](name), output).ok
        found = owners()  # where the relpath of one has the directory in it, both have outputs of their own
        assert all(len(each) == 1 for each in found.values())
        assert {path for [path] in found.values()}.issuperset({f"{name}/x", f"{name}/y"})


def test_a_run_over_the_same_inputs_does_nothing_and_needs_no_index(place: Path) -> None:
    assert run("a").progress.done == 2
    make(place / "a" / "z")
    second = run(str(place / "a")).progress
    assert (second.done, second.skipped) == (1, 2)
    assert not has_index()
    assert run("b").progress.done == 2
    assert has_index()
    assert owners() == {"out/x": ["b/x"], "out/y": ["b/y"], "out/z": ["a/z"]}


def test_a_link_to_the_inputs_leads_to_the_same_outputs() -> None:
    os.symlink("a", "c")
    assert run("a").progress.done == 2
    assert run("c").progress.done == 2
    assert owners() == {"out/x": ["c/x"], "out/y": ["c/y"]}


def test_two_jobs_that_write_in_one_place() -> None:
    assert run("a", "out/{relpath}").ok
    assert run("b", "out/{name}").ok
    assert owners() == {"out/x": ["b/x"], "out/y": ["b/y"]}
    assert run("a", "out/{relpath}").progress.done == 2
    assert owners() == {"out/x": ["a/x"], "out/y": ["a/y"]}


def test_a_file_that_takes_the_place_of_another_of_its_source(place: Path) -> None:
    shutil.copytree("a", "in/a")
    assert run("in", "out/{name}").progress.done == 2
    os.rename("in/a", "a.old")
    shutil.copytree("b", "in/b")
    assert run("in", "out/{name}").progress.done == 2
    assert owners() == {"out/x": ["in/b/x"], "out/y": ["in/b/y"]}


def test_totals_are_right_where_a_batch_has_rows_that_are_there_already(place: Path) -> None:
    for source in ("a", ["b/y"]):
        assert run(source, "out/{name}").ok
    (place / "b/y").write_text("other")
    assert Job(functions.copy_with_times, "b", "out/{name}", directory="out").run(1).ok
    assert owners() == {"out/x": ["b/x"], "out/y": ["b/y"]}


def test_a_failure_is_not_forgotten_because_another_input_has_its_output(place: Path) -> None:
    (place / "a/bad").write_text("bad")
    (place / "b/bad").write_text("good")
    for source in "ab":
        report = Job(functions.fail_if_bad, source, "out/{relpath}", directory="out", attempts_max=1).run(1)
        assert (report.progress.done, report.progress.failed) == ((2, 1) if source == "a" else (3, 0))
    with Ledger.open(Path("out"), create=False, read_only=True) as ledger:
        [job] = ledger.jobs()
        counts = ledger.counts(job.id)
        assert (counts.done, counts.failed) == (3, 1)
        assert [os.path.relpath(os.fsdecode(row.input)) for row in ledger.failed(job.id)] == ["a/bad"]


def test_rows_of_one_output_that_an_older_version_left_go(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(Ledger, "expect_inputs", lambda *_: None)
        for source in "ab":
            assert run(source).progress.done == 2
    with closing(sqlite3.connect("out/.ringpool/ledger.db")) as db:
        db.execute("CREATE INDEX outputs ON files (job, output)")  # as it had for numbered outputs
    assert run("a").progress.done == 2
    assert owners() == {"out/x": ["a/x"], "out/y": ["a/y"]}
    with closing(sqlite3.connect("out/.ringpool/ledger.db")) as db:
        assert not db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'outputs'").fetchall()


def test_what_a_killed_run_has_overwritten(place: Path) -> None:
    """It had not written a row yet: what it has done is found in what it left in memory."""
    assert run("a").ok
    with Child(run_and_linger, str(place)) as child:
        wait_until(lambda: (place / "out" / "x").read_text() == "b/x", "an output is overwritten")
        child.kill()
    assert run("a").progress.done >= 1
    assert owners() == {"out/x": ["a/x"], "out/y": ["a/y"]}


def test_what_a_killed_run_left_whose_ledger_was_removed(place: Path) -> None:
    with Child(run_and_linger, str(place)) as child:
        wait_until((place / "out" / "x").exists, "an output")
        child.kill()
    (place / "out/.ringpool/ledger.db").unlink()
    for source in "ab":
        assert run(source).ok
        assert owners() == {f"out/{name}": [f"{source}/{name}"] for name in NAMES}


def run_and_linger(place: str) -> None:
    os.chdir(place)

    JobRun.commit = lambda _run: None  # it is killed before it writes a row
    Job(functions.copy_with_times, drawn_slowly(), "out/{relpath}", directory="out").run(1)


def drawn_slowly() -> Iterator[InputFile]:
    yield InputFile("b/x", "x")
    time.sleep(60)  # it is killed meanwhile

"""A job, from Python: what it does, what it skips the next time, and why it does a file again."""

from __future__ import annotations

import errno
import gzip
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.coordinator.program import ROOT, shared_memory_of, wait_until
from tests.jobs import job_functions as functions
from tests.shm.test_segment import in_a_small_shared_memory
from tests.workers.files.child import Child, say

from ringpool import InputFile, Job, Report, RetryPolicy
from ringpool.coordinator import drain
from ringpool.coordinator.joboptions import JobOptions
from ringpool.coordinator.jobwork import Progress
from ringpool.coordinator.ledger import Ledger, Row, State
from ringpool.coordinator.ledgerqueries import decode_made
from ringpool.coordinator.takeover import take_over_dead_runs
from ringpool.errors import (
    CommandTemplateError,
    InputMissingError,
    JobBusyError,
    JobMissingError,
    OutputCollisionError,
    OutputPatternError,
    ParameterError,
    PathNameError,
    ThreadStartError,
)
from ringpool.shm import blobs, owner, segment
from ringpool.shm.layout import Encoding
from ringpool.workers import jobtasks

WATCHDOG_S = 30.0


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    me = owner.this_process()
    assert [name for name in os.listdir(segment.SHM_DIRECTORY) if segment.owner_of(name) == me] == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten files in two directories."""
    for i in range(10):
        path = tmp_path / "in" / f"d{i % 2}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content of %d" % i)
    return tmp_path / "in"


def rows_of(directory: Path) -> dict[str, Row]:
    ledger = Ledger.open(directory, create=False, read_only=True)
    try:
        [job] = ledger.jobs()
        return {os.path.basename(os.fsdecode(row.input)): row for row in ledger.rows(job.id)}
    finally:
        ledger.close()


def test_what_a_killed_run_left_in_memory_goes_with_the_directory_of_its_job(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(source), str(tmp_path / "killed"), "atomic", "slowly"]
    command = [sys.executable, "-m", "tests.jobs.job_program", *words]
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: list((tmp_path / "killed").rglob("*.gz")), "an output appears")
    program.kill()
    program.wait()

    def left() -> list[str]:
        return [name for name in segment.dead_kept() if (who := segment.owner_of(name)) and who.pid == program.pid]

    assert compress_job(source, tmp_path / "other").run(1).ok
    assert len(left()) == 1  # a resume of the job would drain it
    function = blobs.function_name(left()[0], 1)
    _, body, _ = blobs.read(function)
    spec = bytes(body)
    with monkeypatch.context() as patched:
        patched.setattr(blobs, "read", fail_to_open)
        with pytest.raises(OSError, match="Too many open files"):
            drain.segments_of(b"/another")
    assert len(left()) == 1
    unseen = msgspec.structs.replace(jobtasks.decode_spec(spec), directory=os.fsencode(tmp_path / ("x" * 256)))
    blobs.unlink(function)
    blobs.write(function, Encoding.MSGPACK, jobtasks.encode_spec(unseen))
    drain.segments_of(b"/another")
    assert len(left()) == 1
    blobs.unlink(function)
    blobs.write(function, Encoding.MSGPACK, msgspec.msgpack.encode(["of another version"]))
    assert compress_job(source, tmp_path / "third").run(1).ok
    assert len(left()) == 1
    blobs.unlink(function)
    blobs.write(function, Encoding.MSGPACK, spec)
    shutil.rmtree(tmp_path / "killed")
    assert compress_job(source, tmp_path / "another").run(1).ok
    assert left() == []


def fail_to_open(_name: str) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def compress_job(source: Path, target: Path, **options: Any) -> Job:
    return Job(functions.compress, str(source), f"{target}/{{relpath}}.gz", **options)


def counts(report: Report) -> tuple[int, int, int, int]:
    progress = report.progress
    return progress.done, progress.skipped, progress.failed, progress.dead


# ---- doing


@pytest.mark.parametrize("durability", ["none", "atomic", "data", "full"])
def test_every_file_has_its_output_and_its_row(source: Path, tmp_path: Path, durability: str) -> None:
    target = tmp_path / "out"
    report = compress_job(source, target, durability=durability).run(2)
    assert report.ok
    assert counts(report) == (10, 0, 0, 0)
    for path in source.rglob("*.txt"):
        assert gzip.decompress((target / f"{path.relative_to(source)}.gz").read_bytes()) == path.read_bytes()
    rows = rows_of(target)
    assert len(rows) == 10
    for name, row in rows.items():
        status = next(source.rglob(name)).stat()
        [made] = msgspec.msgpack.decode(row.made)
        output = Path(os.fsdecode(made[0]))
        assert (row.size, row.mtime_ns, row.inode) == (status.st_size, status.st_mtime_ns, status.st_ino)
        assert made[1] == output.stat().st_size
        assert len(made[2]) == 16
        assert msgspec.msgpack.decode(row.value or b"") == status.st_size
        assert (row.state, row.attempts, row.deaths, row.kind) == (State.DONE, 1, 0, "")
        assert row.started_s > 1e9
        assert row.peak_rss > 1 << 20


def test_a_job_without_outputs_keeps_values(source: Path, tmp_path: Path) -> None:
    report = Job(functions.size_of, str(source), directory=tmp_path / "job").run(2)
    assert counts(report) == (10, 0, 0, 0)
    rows = rows_of(tmp_path / "job")
    assert {name: msgspec.msgpack.decode(row.value or b"") for name, row in rows.items()} == {
        path.name: path.stat().st_size for path in source.rglob("*.txt")
    }


def test_several_outputs_of_each_input(source: Path, tmp_path: Path) -> None:
    outputs = {"thumb": f"{tmp_path}/t/{{relpath}}", "meta": f"{tmp_path}/m/{{relpath}}.json"}
    job = Job(functions.thumb_and_meta, str(source), outputs, directory=tmp_path / "job")
    assert job.run(2).ok
    assert (tmp_path / "t/d0/0.txt").read_bytes() == b"cont"
    assert (tmp_path / "m/d1/9.txt.json").read_text() == str(len(b"content of 9"))
    (tmp_path / "m/d1/9.txt.json").unlink()
    assert counts(job.run(2)) == (1, 9, 0, 0)
    assert (tmp_path / "m/d1/9.txt.json").exists()


def test_a_command_is_a_task(source: Path, tmp_path: Path) -> None:
    job = Job(command="gzip -9c {src} > {dst}", inputs=str(source), output=f"{tmp_path}/out/{{relpath}}.gz")
    assert job.run(2).ok
    assert gzip.decompress((tmp_path / "out/d1/3.txt.gz").read_bytes()) == b"content of 3"
    assert counts(job.run(2)) == (0, 10, 0, 0)


def test_a_command_that_fails_leaves_no_output_and_says_why(source: Path, tmp_path: Path) -> None:
    command = "cat {src} > {dst}; case {name} in 4.txt) echo 'no fours' >&2; exit 3;; esac"
    report = Job(command=command, inputs=str(source), output=f"{tmp_path}/out/{{relpath}}").run(2)
    assert counts(report) == (9, 0, 1, 0)
    [failure] = report.failures
    assert failure.kind == "CommandError"
    assert "exit status 3" in failure.message
    assert "no fours" in failure.message
    assert not (tmp_path / "out/d0/4.txt").exists()


def test_inputs_from_a_generator_are_drawn_while_tasks_run(tmp_path: Path) -> None:
    drawn: list[int] = []
    done = 0

    def inputs() -> Iterator[Path]:
        for i in range(5000):
            drawn.append(i)
            path = tmp_path / "in" / str(i % 10)
            yield path

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        assert len(drawn) <= done + 1024 + 2  # the window, and the two that are looked at before all

    report = Job(functions.name_of, inputs(), directory=tmp_path / "job", fingerprints=False).run(2, on_row=count)
    assert report.progress.done == 5000


def test_the_first_task_runs_before_the_second_input_comes(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a", "b", "c")

    def inputs() -> Iterator[Path]:
        for name in "abc":
            yield source / name
            wait_until((tmp_path / "out" / f"{name}.gz").exists, f"the output of {name}")

    assert counts(Job(functions.compress, inputs(), f"{tmp_path}/out/{{name}}.gz").run(2)) == (3, 0, 0, 0)


def test_files_with_parameters_of_their_own(source: Path, tmp_path: Path) -> None:
    files = [InputFile(str(path), path.name, {"level": i % 9}) for i, path in enumerate(sorted(source.rglob("*.txt")))]
    job = Job(functions.compress, files, f"{tmp_path}/out/{{name}}.gz")
    assert counts(job.run(2)) == (10, 0, 0, 0)
    assert counts(job.run(2)) == (0, 10, 0, 0)
    files[3] = files[3]._replace(parameters={"level": 9})
    assert counts(Job(functions.compress, files, f"{tmp_path}/out/{{name}}.gz").run(2)) == (1, 9, 0, 0)


def test_the_largest_come_first(tmp_path: Path) -> None:
    sizes = [3, 9, 1, 7, 5]
    for i, size in enumerate(sizes):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}").write_bytes(b"x" * size)
    log = tmp_path / "log"
    job = Job(
        functions.count_calls, str(tmp_path / "in"), f"{tmp_path}/out/{{name}}", params={"log": log}, largest_first=True
    )
    assert job.run(1).ok
    assert log.read_text().split() == ["1", "3", "4", "0", "2"]


def test_a_name_that_no_file_can_have_fails_its_file_before_that_is_run(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("short", "y" * 253, "z" * 250):
        (tmp_path / "in" / name).touch()
    log = tmp_path / "log"
    job = Job(functions.count_calls, str(tmp_path / "in"), f"{tmp_path}/out/{{name}}.done", params={"log": log})
    report = job.run(1)
    [failure] = report.failures
    assert (failure.path, failure.kind) == (f"{tmp_path}/in/{'y' * 253}", "PathNameError")
    assert "a name has at most 255 bytes" in failure.message
    assert sorted(log.read_text().split()) == ["short", "z" * 250]
    assert sorted(os.listdir(tmp_path / "out")) == [".ringpool", "short.done", "z" * 250 + ".done"]


# ---- doing again, or not


def remove(source: Path, target: Path) -> None:
    (target / "d1/3.txt.gz").unlink()


def tear(source: Path, target: Path) -> None:
    path = target / "d1/3.txt.gz"
    path.write_bytes(path.read_bytes()[:-5])


def change_input(source: Path, target: Path) -> None:
    (source / "d1/3.txt").write_bytes(b"other content")


def touch_input(source: Path, target: Path) -> None:
    os.utime(source / "d1/3.txt", ns=(1, 1))


def replace_input(source: Path, target: Path) -> None:
    path = source / "d1/3.txt"
    status = path.stat()
    path.rename(source.parent / "former")
    path.write_bytes((source.parent / "former").read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (remove, "is missing"),
        (tear, "instead of"),
        (change_input, "its input has changed"),
        (touch_input, "its input has changed"),
        (replace_input, "its input has changed"),
    ],
)
def test_what_is_not_as_it_was_left_is_done_again_and_nothing_else(
    source: Path, tmp_path: Path, harm: Callable[[Path, Path], None], reason: str
) -> None:
    target = tmp_path / "out"
    job = compress_job(source, target)
    assert job.run(2).ok
    harm(source, target)
    plan = {planned.path: planned for planned in job.plan()}
    [redone] = [planned for planned in plan.values() if planned.action == "run"]
    assert redone.path.endswith("d1/3.txt")
    assert reason in redone.reason
    assert counts(job.run(2)) == (1, 9, 0, 0)
    assert gzip.decompress((target / "d1/3.txt.gz").read_bytes()) == (source / "d1/3.txt").read_bytes()
    assert counts(job.run(2)) == (0, 10, 0, 0)


def test_a_digest_finds_what_has_kept_its_size(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    job = compress_job(source, target)
    assert job.run(2).ok
    path = target / "d1/3.txt.gz"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert counts(job.run(2)) == (0, 10, 0, 0)
    assert counts(job.run(2, verify="digest")) == (1, 9, 0, 0)
    assert gzip.decompress(path.read_bytes()) == b"content of 3"


def test_an_output_that_was_written_since_is_looked_at_more_closely(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    job = compress_job(source, target)
    assert job.run(2).ok
    os.utime(target / "d1/3.txt.gz")  # or copied: it has its content
    assert counts(job.run(2)) == (0, 10, 0, 0)
    path = target / "d1/5.txt.gz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert [planned.reason for planned in job.plan() if planned.action == "run"] == [
        f"the content of its output {path} has changed"
    ]
    assert counts(job.run(2)) == (1, 9, 0, 0)


def test_an_output_that_another_input_has_written_over_is_not_done(tmp_path: Path) -> None:
    one, other = named(tmp_path / "one", "x"), named(tmp_path / "other", "x")
    (one / "x").write_text("year 2024")
    (other / "x").write_text("year 2025")
    pattern = f"{tmp_path}/out/{{relpath}}"
    for source in (one, other, one):
        assert counts(Job(functions.copy, str(source), pattern).run(1)) == (1, 0, 0, 0)
        assert (tmp_path / "out/x").read_text() == (source / "x").read_text()


def test_with_checksums_an_input_that_was_only_touched_is_the_same(source: Path, tmp_path: Path) -> None:
    job = compress_job(source, tmp_path / "out", checksums=True)
    assert job.run(2).ok
    touch_input(source, tmp_path / "out")
    assert counts(job.run(2)) == (0, 10, 0, 0)
    (source / "d1/3.txt").write_bytes(b"content of X")  # as long as before
    assert counts(job.run(2)) == (1, 9, 0, 0)


def test_other_parameters_do_all_again(source: Path, tmp_path: Path) -> None:
    assert compress_job(source, tmp_path / "out", params={"level": 1}).run(2).ok
    assert counts(compress_job(source, tmp_path / "out", params={"level": 1}).run(2)) == (0, 10, 0, 0)
    assert counts(compress_job(source, tmp_path / "out", params={"level": 9}).run(2)) == (10, 0, 0, 0)


def test_a_function_that_is_changed_while_its_job_runs_stops_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is started then has imported the new one: what it makes is not the job's."""
    module = tmp_path / "edited.py"
    text = (
        "import os, time\n"
        "def shout(src: str, dst: str) -> None:\n"
        "    while src[-6:] not in ('/0.txt', '/2.txt') and not os.path.exists({!r}):\n"
        "        time.sleep(0.01)  # no more than the first worker's files are done before the edit\n"
        "    open(dst, 'w').write(open(src).read().{}())\n"
    )
    edited = str(tmp_path / "is-edited")
    module.write_text("# a comment\n" + text.format(edited, "upper"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    job = Job("edited:shout", source, f"{tmp_path}/out/{{relpath}}", max_tasks_per_child=2)

    def edit(*_row: object) -> None:
        (tmp_path / "new").write_text(text.format(edited, "title"))
        (tmp_path / "new").replace(module)  # half of it is another test's
        Path(edited).touch()

    report = job.run(1, on_row=edit)
    assert report.stopped == "its function was changed while it ran"
    assert set(report.kinds) == {"FunctionChangedError"}
    assert {path.read_text()[:7] for path in (tmp_path / "out").rglob("*.txt")} == {"CONTENT"}
    assert set(job.run(1).kinds) == {"FunctionChangedError"}  # the object is still that of the former function's job
    module.write_text("def other():\n    return 1\n")
    report = job.run(1)
    assert (set(report.kinds), report.stopped) == ({"UnknownFunctionError"}, "workers cannot have its function")
    module.write_text("# comments\n# that move it\n\n\n" + text.format(edited, "upper"))
    assert counts(job.run(1))[2:] == (0, 0)
    module.write_text(text.format(edited, "title"))
    sys.modules.pop("edited")
    assert counts(Job("edited:shout", source, f"{tmp_path}/out/{{relpath}}").run(1)) == (10, 0, 0, 0)
    assert {path.read_text()[:7] for path in (tmp_path / "out").rglob("*.txt")} == {"Content"}


HALF_WRITTEN = """
import threading, time

def restore():
    time.sleep(0.1)
    open(__file__, "w").write(text)

text = open(__file__).read()
open(__file__, "w").close()
threading.Thread(target=restore).start()
"""


def test_a_function_whose_file_is_half_written_when_a_worker_looks_at_it_is_seen_to_have_changed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "rewritten.py"
    text = "def shout(src: str, dst: str) -> None:\n    open(dst, 'w').write(open(src).read().{}())\n"
    module.write_text(text.format("upper"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    job = Job("rewritten:shout", source, f"{tmp_path}/out/{{relpath}}")
    module.write_text(text.format("title") + HALF_WRITTEN)
    report = job.run(1)
    assert (counts(report)[0], set(report.kinds)) == (0, {"FunctionChangedError"})


def test_another_function_does_all_again(source: Path, tmp_path: Path) -> None:
    assert compress_job(source, tmp_path / "out").run(2).ok
    other = Job(functions.slowly, str(source), f"{tmp_path}/out/{{relpath}}.gz", params={"seconds": 0})
    assert counts(other.run(2)) == (10, 0, 0, 0)


def test_a_plan_makes_nothing(source: Path, tmp_path: Path) -> None:
    plan = list(compress_job(source, tmp_path / "out").plan())
    assert [planned.action for planned in plan] == ["run"] * 10
    assert {planned.reason for planned in plan} == {"new"}
    assert not (tmp_path / "out").exists()


def test_outputs_inside_the_inputs_are_not_taken_for_inputs(source: Path) -> None:
    job = Job(functions.compress, str(source), f"{source}/packed/{{relpath}}.gz")
    assert counts(job.run(2)) == (10, 0, 0, 0)
    assert counts(job.run(2)) == (0, 10, 0, 0)


# ---- failures


def named(directory: Path, *names: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_bytes(b"x")
    return directory


def test_failures_are_in_the_ledger_with_their_tracebacks_and_done_again(tmp_path: Path) -> None:
    source, target = named(tmp_path / "in", "a", "b.bad", "c.silent", "d"), tmp_path / "out"
    job = Job(functions.fail_by_name, str(source), f"{target}/{{name}}")
    report = job.run(2)
    assert counts(report) == (2, 0, 2, 0)
    assert report.kinds == {"ValueError": 1, "OutputMissingError": 1}
    row = rows_of(target)["b.bad"]
    assert (row.state, row.kind, row.message) == (State.FAILED, "ValueError", "b.bad is bad")
    assert "in fail_by_name" in row.traceback
    assert sorted(os.listdir(target)) == [".ringpool", "a", "d"]
    (source / "b.bad").rename(source / "b")
    assert counts(job.run(2)) == (1, 2, 1, 0)


def test_a_file_that_kills_its_workers_is_set_aside(tmp_path: Path) -> None:
    source, target = named(tmp_path / "in", "a", "b.kill", "c"), tmp_path / "out"
    job = Job(functions.fail_by_name, str(source), f"{target}/{{name}}", attempts_max=2)
    report = job.run(2)
    assert counts(report) == (2, 0, 0, 1)
    row = rows_of(target)["b.kill"]
    assert (row.state, row.kind, row.deaths) == (State.DEAD, "WorkerDiedError", 2)
    assert "SIGKILL" in row.message
    assert counts(job.run(2)) == (0, 2, 0, 1)
    assert [planned.action for planned in job.plan()] == ["skip", "set aside", "skip"]
    assert counts(job.run(2, redo=lambda work: work.path.endswith(".kill"))) == (0, 2, 0, 1)
    assert rows_of(target)["b.kill"].started_s > row.started_s


def test_a_timeout_costs_its_file_alone(tmp_path: Path) -> None:
    source, target = named(tmp_path / "in", "a", "b.slow", "c"), tmp_path / "out"
    report = Job(functions.fail_by_name, str(source), f"{target}/{{name}}", timeout_s=3, attempts_max=1).run(2)
    assert counts(report) == (2, 0, 1, 0)
    assert report.kinds == {"TaskTimeoutError": 1}


def test_a_retry_begins_with_nothing_of_the_attempt_before(source: Path, tmp_path: Path) -> None:
    policy = RetryPolicy(max_attempts=3, delay_s=0.01)
    job = Job(
        functions.fail_at_first,
        str(source),
        f"{tmp_path}/out/{{relpath}}",
        params={"log": tmp_path / "log"},
        retry=policy,
    )
    report = job.run(1)
    assert counts(report) == (10, 0, 0, 0)
    assert report.progress.retried == 10
    assert {row.attempts for row in rows_of(tmp_path / "out").values()} == {2}


def test_an_input_that_changes_meanwhile_is_done_again(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a")
    job = Job(functions.change_input, str(source), f"{tmp_path}/out/{{name}}", params={"times": 3})
    assert counts(job.run(1)) == (1, 0, 0, 0)
    assert (tmp_path / "out/a").read_bytes() == b"xxx"
    assert rows_of(tmp_path / "out")["a"].size == 3


def test_an_input_that_never_stays_the_same_is_reported(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a")
    report = Job(functions.change_input, str(source), f"{tmp_path}/out/{{name}}", params={"times": 99}).run(1)
    assert report.kinds == {"InputChangedError": 1}
    assert not (tmp_path / "out/a").exists()


def test_a_missing_input_of_a_list_is_a_failure_of_its_own(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a")
    job = Job(functions.compress, iter([source / "a", source / "gone"]), f"{tmp_path}/out/{{name}}")
    report = job.run(1)
    assert counts(report) == (1, 0, 1, 0)
    assert report.kinds == {"InputMissingError": 1}


@pytest.mark.parametrize("limit", [{"max_failures": 3}, {"max_failure_share": 0.01}])
def test_too_many_failures_stop_the_run(tmp_path: Path, limit: dict[str, float]) -> None:
    source = named(tmp_path / "in", *(f"{i:04}.bad" for i in range(3000)))
    report = Job(functions.fail_by_name, str(source), f"{tmp_path}/out/{{name}}", **limit).run(2)
    assert "fail" in report.stopped
    assert 3 < report.progress.failed < 3000
    assert len(rows_of(tmp_path / "out")) == report.progress.failed


@pytest.mark.parametrize(
    ("limit", "n"),
    [
        ({"max_failures": 0}, 1),
        ({"max_failures": 3}, 4),
        ({"max_failures": 80}, 81),
        ({"max_failure_share": 0.05}, 100),
        ({"max_failures": 3, "max_failure_share": 0.9}, 4),
    ],
)
def test_no_file_is_begun_after_one_failure_too_many(tmp_path: Path, limit: dict[str, float], n: int) -> None:
    source = named(tmp_path / "in", *(f"{i:04}.bad" for i in range(300)))
    report = Job(functions.fail_by_name, str(source), f"{tmp_path}/out/{{name}}", **limit).run(1)
    assert report.progress.failed == n


def test_files_that_do_not_fail_are_all_done_under_a_limit(tmp_path: Path) -> None:
    source = named(tmp_path / "in", *(f"{i:04}{'' if i % 50 else '.bad'}" for i in range(500)))
    job = Job(functions.fail_by_name, str(source), f"{tmp_path}/out/{{name}}", max_failure_share=0.05)
    assert counts(job.run(2)) == (490, 0, 10, 0)


def test_a_pipe_is_no_input(tmp_path: Path) -> None:
    """To open it might be to wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    report = Job(functions.compress, str(tmp_path / "pipe"), f"{tmp_path}/out/{{name}}").run(1)
    [failure] = report.failures
    assert "it is a pipe" in failure.message


def test_a_job_in_a_directory_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="directory is empty"):
        Job(functions.size_of, "in", directory="")


# ---- stopping


def test_a_stop_lets_what_runs_end_and_a_resume_does_the_rest(tmp_path: Path) -> None:
    source = named(tmp_path / "in", *(f"{i:04}" for i in range(200)))
    job = Job(functions.slowly, str(source), f"{tmp_path}/out/{{name}}", params={"seconds": 0.02})

    stopped: list[None] = []

    def stop(*_: Any) -> None:
        if not stopped:  # a second one would not wait
            job.stop("enough")
        stopped.append(None)

    report = job.run(2, on_row=stop)
    assert report.stopped == "enough"
    assert not report.ok
    assert 0 < report.progress.done < 200
    assert len(rows_of(tmp_path / "out")) == report.progress.done == len(list((tmp_path / "out").iterdir())) - 1
    again = job.run(2)
    assert counts(again) == (200 - report.progress.done, report.progress.done, 0, 0)


def test_a_file_whose_worker_dies_while_the_run_stops_is_not_set_aside(tmp_path: Path) -> None:
    """Nothing is begun again then; the next run does that."""
    source = named(tmp_path / "in", "bad", "dies")

    def run(**options: Any) -> Report:
        job = Job(functions.die_once, str(source), params={"marks": tmp_path}, directory=tmp_path / "job", **options)
        return job.run(2, on_row=lambda *_: (tmp_path / "stopped").touch())

    report = run(max_failures=0)
    assert report.stopped == "more than 0 failures"
    assert counts(report) == (0, 0, 1, 0)
    assert (tmp_path / "died").exists()
    assert counts(run()) == (1, 0, 1, 0)


def test_calls_deaths_and_time_of_a_file_that_failed_are_counted(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a")
    retry = RetryPolicy(max_attempts=4, delay_s=0, on=ValueError)
    job = Job(functions.fail_slowly, str(source), directory=tmp_path / "called", retry=retry)
    report = job.run(1)
    row = rows_of(tmp_path / "called")["a"]
    assert (row.attempts, row.deaths, report.progress.retried) == (4, 0, 1)
    late = Job(
        functions.fail_slowly,
        str(source),
        directory=tmp_path / "late",
        params={"seconds": 60},
        timeout_s=0.3,
        attempts_max=2,
    )
    late.run(1)
    row = rows_of(tmp_path / "late")["a"]
    assert (row.kind, row.attempts, row.deaths) == ("TaskTimeoutError", 2, 2)
    assert row.duration_s >= 0.3


def test_a_file_whose_function_was_not_called_has_no_calls_of_the_one_before(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a", "b")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/b").write_text("a file in the place of a directory")
    retry = RetryPolicy(max_attempts=3, delay_s=0)
    job = Job(
        functions.fail_twice,
        str(source),
        f"{tmp_path}/out/{{stem}}/x",
        params={"log": tmp_path / "log"},
        retry=retry,
        timeout_s=float("inf"),
    )
    report = job.run(1)
    assert (counts(report), report.progress.retried) == ((1, 0, 1, 0), 1)
    assert {name: row.attempts for name, row in rows_of(tmp_path / "out").items()} == {"a": 3, "b": 1}


def test_a_wait_between_two_calls_does_not_become_a_timeout(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a")
    retry = RetryPolicy(max_attempts=9, delay_s=1.5, factor=1, jitter=0, on=ValueError)
    job = Job(functions.fail_slowly, str(source), directory=tmp_path / "job", retry=retry, timeout_s=2.5)
    report = job.run(1)
    row = rows_of(tmp_path / "job")["a"]
    assert (row.kind, row.attempts, row.deaths) == ("ValueError", 2, 0)
    assert report.kinds == {"ValueError": 1}


def test_a_stop_while_the_run_starts_is_heard_and_one_before_it_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = named(tmp_path / "in", "a", "b", "c", "d")
    job = Job(functions.copy, str(source), f"{tmp_path}/out/{{name}}")
    open_ledger = Ledger.open

    def stop_first(*arguments: Any, **more: Any) -> Ledger:
        job.stop("not yet")
        return open_ledger(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "open", stop_first)
        report = job.run(1)
    assert (report.stopped, counts(report)) == ("not yet", (0, 0, 0, 0))
    job.stop()
    report = job.run(1)
    assert (report.stopped, counts(report)) == ("", (4, 0, 0, 0))


def test_a_run_goes_on_while_it_passes_over_what_is_not_asked_for(tmp_path: Path) -> None:
    told: list[str] = []
    progress: list[int] = []
    n_passed = 0

    def names() -> Iterator[str]:
        nonlocal n_passed
        yield "asked for"
        while not (told and progress and len(rows_of(tmp_path)) == 1):
            n_passed += 1
            assert n_passed < 3_000_000
            yield "not asked for"
        job.stop("enough")
        for _ in range(3_000_000):
            yield "not asked for, and after the stop"
        raise AssertionError("the stop was not heard")

    job = Job(functions.name_of, names(), directory=tmp_path, fingerprints=False)
    report = job.run(
        1,
        only=lambda work: work.path == "asked for",
        on_row=lambda work, _row, _value: told.append(work.path),
        on_progress=lambda now: progress.append(now.done),
    )
    assert (report.stopped, counts(report), told) == ("enough", (1, 0, 0, 0), ["asked for"])


def test_what_came_before_an_error_of_only_is_done(tmp_path: Path) -> None:
    names = [f"name{i:03}" for i in range(300)]

    def refuse(work: Any) -> bool:
        if work.path == "name200":
            raise LookupError("only")
        return True

    with pytest.raises(LookupError, match="only"):
        Job(functions.name_of, iter(names), directory=tmp_path, fingerprints=False).run(1, only=refuse)
    assert counts(Job(functions.name_of, iter(names), directory=tmp_path, fingerprints=False).run(1))[:1] == (100,)


def test_a_second_stop_does_not_wait(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a", "b.slow")
    job = Job(functions.fail_by_name, str(source), f"{tmp_path}/out/{{name}}")

    def stop(*_: Any) -> None:
        job.stop()
        job.stop()

    report = job.run(2, on_row=stop)  # within the watchdog: the task would take a minute
    assert counts(report) == (1, 0, 0, 0)
    assert not (tmp_path / "out/b.slow").exists()


def test_what_runs_has_its_grace_and_no_more(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a", "b.slow")
    job = Job(functions.fail_by_name, str(source), f"{tmp_path}/out/{{name}}", grace_s=0.2)
    report = job.run(2, on_row=lambda *_: job.stop())
    assert counts(report) == (1, 0, 0, 0)


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_a_run_whose_directory_was_renamed_ends_and_goes_on_when_it_is_back(tmp_path: Path, is_made_anew: bool) -> None:
    n = 4000  # several batches, however quickly they fail
    source = named(tmp_path / "in", *(f"{i:04}" for i in range(n)))
    job = Job(functions.slowly, str(source), f"{tmp_path}/out/{{name}}", params={"seconds": 0.0001})

    def rename(*_: Any) -> None:
        if not (tmp_path / "moved").exists():
            (tmp_path / "out").rename(tmp_path / "moved")
            if is_made_anew:
                Ledger.open(tmp_path / "out").close()

    progress = Progress()
    with pytest.raises(JobMissingError, match=r"no job in .*/out: it was removed or renamed while the job ran"):
        job.run(2, on_row=rename, progress=progress)
    assert progress.seen < n
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    (tmp_path / "moved").rename(tmp_path / "out")
    report = job.run(2)
    assert report.ok
    assert report.progress.skipped == progress.done > 0


def test_what_the_inputs_raise_comes_when_all_before_is_done(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a", "b")

    def inputs() -> Iterator[Path]:
        yield source / "a"
        yield source / "b"
        yield source / "a"
        raise ZeroDivisionError

    job = Job(functions.size_of, inputs(), directory=tmp_path / "job")
    with pytest.raises(ZeroDivisionError):
        job.run(2)
    assert len(rows_of(tmp_path / "job")) == 2


# ---- what is wrong from the start


def test_two_inputs_with_one_output_are_named(source: Path, tmp_path: Path) -> None:
    (source / "d1/0.txt").write_bytes(b"x")
    with pytest.raises(OutputCollisionError) as error:
        Job(functions.compress, str(source), f"{tmp_path}/out/{{name}}").run(2)
    assert {error.value.first, error.value.second} == {str(source / "d0/0.txt"), str(source / "d1/0.txt")}


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Job(functions.compress, "in"), ParameterError),
        (lambda: Job(functions.size_of, "in", "out/{name}"), ParameterError),
        (lambda: Job(functions.compress, "in", "out/{name}", params={"levle": 1}), ParameterError),
        (lambda: Job(command="cat {src}", inputs="in", output="out/{name}"), (ParameterError, CommandTemplateError)),
        (lambda: Job(command="cp {src} {dst}", inputs="in", output={"a": "out/{name}"}), CommandTemplateError),
        (lambda: Job(command="cp {src} {dst.b}", inputs="in", output={"a": "out/{name}"}), CommandTemplateError),
        (lambda: Job(command="wc {src} {dst}", inputs="in"), CommandTemplateError),
        (lambda: Job(command="wc {src}", inputs="in", params={"template": "x"}), CommandTemplateError),
        (lambda: Job(command="wc {src}", inputs="in", params={"fields": {}}), CommandTemplateError),
        (
            lambda: Job(command="wc {src}", inputs="in", params={"environment": {"RINGPOOL_SRC": "x"}}),
            CommandTemplateError,
        ),
        (lambda: Job(command="wc {src}", inputs="in", params={"environment": {"A=B": "x"}}), CommandTemplateError),
        (lambda: Job(command="wc {src}", inputs="in", params={"environment": {"A": "x\0"}}), CommandTemplateError),
        (lambda: Job(functions.compress, "in", {"a-b": "out/{name}"}), OutputPatternError),
        (lambda: Job(functions.compress, "in", "out/{name}", attempts_max=0), ValueError),
        (lambda: Job(functions.compress, "in", "out/{name}", retry=3), TypeError),
        (lambda: Job(functions.compress, "in", "out/{name}", largest_first="x"), TypeError),
        (lambda: Job(functions.compress, "in", "out/{name}", digests=None), TypeError),
        (lambda: Job(functions.compress, "in", "out/{name}", timeout_s=0), ValueError),
        (lambda: Job(functions.compress, "in", "out/{name}", nonsense=1), TypeError),
        (lambda: Job(None, "in"), TypeError),
    ],
)
def test_a_job_that_cannot_be_is_refused_at_once(make: Callable[[], Job], error: type[Exception]) -> None:
    with pytest.raises(error):
        make()


def test_a_file_has_no_command_of_its_own(source: Path, tmp_path: Path) -> None:
    file = InputFile(str(source / "d0/0.txt"), "0.txt", {"template": "echo {src}"})
    with pytest.raises(CommandTemplateError, match="its own template"):
        Job(command="cat {src}", inputs=[file], directory=tmp_path / "job").run(1)


_TYPED = """
import sys
from ringpool import Coordinator, Job
from ringpool.errors import UnknownFunctionError

def size(src):
    return src.stat().st_size

source, directory = sys.argv[1:]
job = Job(size, source, directory=directory)
try:
    job.run(1)
except UnknownFunctionError as error:
    assert "use mp_context='fork'" in str(error)
    assert not __import__("os").path.exists(directory)
    print(job.run(1, mp_context="fork").progress.done)
with Coordinator(1, mp_context="fork") as coordinator:
    print(coordinator.submit_file_task(size, f"{source}/d0/0.txt").result())
"""


@pytest.mark.parametrize("words", [["-"], ["-c", _TYPED]])
def test_a_function_that_was_typed_runs_in_forks_and_elsewhere_it_is_refused_at_once(
    source: Path, tmp_path: Path, words: list[str]
) -> None:
    command = [sys.executable, *words, str(source), str(tmp_path / "job")]
    done = subprocess.run(command, cwd=ROOT, input=_TYPED, text=True, capture_output=True, timeout=60, check=False)
    assert (done.stderr, done.stdout.split(), done.returncode) == ("", ["10", "12"], 0)


def test_an_output_that_is_its_own_input_is_refused(source: Path) -> None:
    with pytest.raises(OutputPatternError, match="of itself"):
        Job(functions.compress, f"{source}/**/*.txt", f"{source}/{{relpath}}").run(1)


@pytest.mark.parametrize("pattern", ["out/.ringpool/ledger.db", "out/.ringpool/{relpath}", "out/{relpath}/.ringpool/x"])
def test_an_output_where_ledgers_and_locks_are_is_refused(source: Path, tmp_path: Path, pattern: str) -> None:
    with pytest.raises(OutputPatternError, match=r"\.ringpool is where ledgers and locks are"):
        Job(functions.compress, f"{source}/d0/0.txt", str(tmp_path / pattern)).run(1)


@pytest.mark.parametrize("is_directory", [True, False])
def test_an_output_that_a_symlink_leads_to_its_input_is_refused(
    source: Path, tmp_path: Path, is_directory: bool
) -> None:
    out = tmp_path / "out"
    if is_directory:
        out.symlink_to(source)
    else:
        (out / "d1").mkdir(parents=True)
        (out / "d1/3.txt").symlink_to(source / "d1/3.txt")
    job = Job(functions.compress, f"{source}/d1/3*", f"{out}/d1/{{name}}")
    if is_directory:
        with pytest.raises(OutputPatternError, match="an input too"):
            job.run(1)
    else:
        report = job.run(1)
        assert [failure.kind for failure in report.failures] == ["AtomicWriteError"]
        assert "the input itself" in report.failures[0].message
    assert (source / "d1/3.txt").read_bytes() == b"content of 3"


def test_outputs_among_the_inputs_are_refused_unless_it_is_said_which_are_inputs(source: Path) -> None:
    with pytest.raises(OutputPatternError, match="the next run would take them for inputs"):
        Job(functions.compress, str(source), f"{source}/{{relpath}}.gz").run(1)
    assert list(source.rglob("*.gz")) == []
    job = Job(functions.compress, str(source), f"{source}/{{relpath}}.gz", exclude=["*.gz"])
    assert counts(job.run(1)) == (10, 0, 0, 0)
    assert counts(job.run(1)) == (0, 10, 0, 0)


@pytest.mark.parametrize("how", ["include", "link", "input files"])
def test_a_named_input_is_no_output_however_it_is_named(tmp_path: Path, how: str) -> None:
    source = named(tmp_path / "in", "a", "a.gz")
    (source / "a.gz").write_text("precious")
    (tmp_path / "link").symlink_to(source)
    inputs = [source / "a", source / "a.gz"]
    place = tmp_path / "link" if how == "link" else source
    job = Job(
        functions.compress,
        [InputFile(str(path), path.name) for path in inputs] if how == "input files" else inputs,
        f"{place}/{{name}}.gz",
        directory=tmp_path / "job",
        include=["*"] if how == "include" else (),
    )
    with pytest.raises(OutputPatternError, match="an input too"):
        job.run(1)
    assert (source / "a.gz").read_text() == "precious"


@pytest.mark.parametrize("inputs", [["a", "a.gz"], ["a*"], ["**/a*"], ["sub/../a", "./a.gz"]])
def test_an_output_that_is_another_input_is_refused(tmp_path: Path, inputs: list[str]) -> None:
    """Named, or matched by a glob: it is not written over."""
    source = named(tmp_path / "in", "a", "a.gz", "b")
    (source / "sub").mkdir()
    (source / "a.gz").write_text("precious")
    with pytest.raises(OutputPatternError, match="an input too"):
        Job(functions.compress, [f"{source}/{name}" for name in inputs], f"{source}/{{name}}.gz").run(1)
    assert (source / "a.gz").read_text() == "precious"
    assert Job(functions.compress, [f"{source}/a", f"{source}/[b]"], f"{source}/{{name}}.gz").run(1).ok
    job = Job(functions.compress, f"{source}/**/*.gz", f"{source}/out/{{name}}.gz")
    assert counts(job.run(1)) == (2, 0, 0, 0)
    assert counts(job.run(1)) == (0, 2, 0, 0)


@pytest.mark.parametrize("command", ["mv {src} {dst}", "cat {src} > {dst} && rm {src}"])
def test_a_task_may_move_its_input_away(tmp_path: Path, command: str) -> None:
    source = named(tmp_path / "in", "a")
    (source / "a").write_text("the only copy")
    assert Job(command=command, inputs=str(source), output=f"{tmp_path}/out/{{name}}").run(1).ok
    assert (tmp_path / "out/a").read_text() == "the only copy"


@pytest.mark.parametrize("ending", ["kill -9 $PPID", "exit 3", ""])
def test_an_input_that_a_task_has_moved_is_kept_where_its_output_cannot_be(tmp_path: Path, ending: str) -> None:
    source = named(tmp_path / "in", "a")
    (source / "a").write_text("the only copy")
    (tmp_path / "out/a").mkdir(parents=True)  # no output can take its place
    report = Job(command=f"mv {{src}} {{dst}}; {ending}", inputs=str(source), output=f"{tmp_path}/out/{{name}}").run(1)
    assert not report.ok
    [kept] = (tmp_path / "out/.ringpool").glob("kept.*")
    assert kept.read_text() == "the only copy"
    assert not (tmp_path / "out/.ringpool/staging").exists() or not any((tmp_path / "out/.ringpool/staging").iterdir())


@pytest.mark.parametrize("ending", ["exit 3", "kill -9 $PPID"])
@pytest.mark.parametrize("leaving", ["echo stub > {src}.new; mv {src}.new {src}", "ln -sf {dst} {src}"])
@pytest.mark.parametrize("taking", ["mv {src} {dst}", "cat {src} > {dst}"])
def test_an_input_that_a_task_has_moved_is_kept_though_another_has_its_name(
    tmp_path: Path, taking: str, leaving: str, ending: str
) -> None:
    source = named(tmp_path / "in", "a")
    (source / "a").write_text("the only copy")
    command = f"{taking}; {leaving}; {ending}"
    assert not Job(command=command, inputs=str(source / "a"), output=f"{tmp_path}/out/{{name}}").run(1).ok
    kept = [path.read_text() for path in (tmp_path / "out/.ringpool").glob("kept.*")]
    assert "the only copy" in kept


def test_a_task_may_take_a_log_away_while_its_program_goes_on(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a")
    (source / "a").write_text("line 1\n")
    command = "mv {src} {dst}; echo line 2 > {src}"
    assert Job(command=command, inputs=str(source), output=f"{tmp_path}/out/{{name}}").run(1).ok
    assert (tmp_path / "out/a").read_text() == "line 1\n"
    assert (source / "a").read_text() == "line 2\n"


@pytest.mark.parametrize("command", ["mv {src} {dst}", "cat {src} > {dst}; rm {src}"])
def test_what_has_moved_its_input_away_is_done_though_the_input_is_asked_for(tmp_path: Path, command: str) -> None:
    source = named(tmp_path / "in", "a", "b")
    (tmp_path / "list").write_text(f"{source}/a\n{source}/b\n")
    for number, inputs in enumerate([f"@{tmp_path}/list", [source / "a", source / "b"]]):
        named(tmp_path / "in", "a", "b")
        job = Job(command=command, inputs=inputs, output=f"{tmp_path}/out{number}/{{name}}")
        assert counts(job.run(1)) == (2, 0, 0, 0)
        assert counts(job.run(1)) == (0, 2, 0, 0)
        named(tmp_path / "in", "a")
        (tmp_path / f"out{number}/b").unlink()
        report = job.run(1)
        assert counts(report) == (1, 0, 1, 0)
        assert [(Path(failure.path).name, failure.kind) for failure in report.failures] == [("b", "InputMissingError")]
    with pytest.raises(InputMissingError):
        Job(command=command, inputs=[source / "b"], output=f"{tmp_path}/new/{{name}}").run(1)


def test_what_was_taken_away_is_not_written_over_when_another_file_has_its_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = named(tmp_path / "in", "a [1].log")
    for number in (1, 2):
        (source / "a [1].log").write_text(f"line {number}\n")
        job = Job(command="mv {src} {dst}", inputs=[f"{source}/a [1].log"], output=f"{tmp_path}/out/{{name}}")
        assert counts(job.run(1)) == (1, 0, 0, 0)
        assert counts(job.run(1)) == (0, 1, 0, 0)  # it is named, and its name looks like a glob
    assert (tmp_path / "out/a [1].log").read_text() == "line 2\n"
    [kept] = (tmp_path / "out").glob(".rp-*.kept")
    assert kept.read_text() == "line 1\n"
    assert str(kept) in capfd.readouterr().err


def test_all_that_was_taken_away_is_kept_where_the_task_is_called_again(tmp_path: Path) -> None:
    """And fails each time: the name is that of a new file by then."""
    source = named(tmp_path / "in", "a")
    (source / "a").write_text("1")
    command, retry = (
        "old=$(cat {src}); mv {src} {dst}; echo $((old + 1)) > {src}; exit 3",
        RetryPolicy(3, 0.0, on=Exception),
    )
    assert not Job(command=command, inputs=str(source), output=f"{tmp_path}/out/{{name}}", retry=retry).run(1).ok
    assert sorted(int(path.read_text()) for path in (tmp_path / "out/.ringpool").glob("kept.*")) == [1, 2, 3]


def test_an_input_that_a_task_has_moved_is_kept_when_it_is_called_again(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a")
    (source / "a").write_text("the only copy")
    command, retry = "mv {src} {dst}; exit 3", RetryPolicy(2, 0.0, on=Exception)
    assert not Job(command=command, inputs=str(source), output=f"{tmp_path}/out/{{name}}", retry=retry).run(1).ok
    [kept] = (tmp_path / "out/.ringpool").glob("kept.*")
    assert kept.read_text() == "the only copy"


def test_what_is_kept_of_an_input_is_not_replaced_when_it_is_called_once_more(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a")
    (source / "a").write_text("the only copy")
    command, retry = "mv {src} {dst} || echo half > {dst}; exit 3", RetryPolicy(3, 0.0, on=Exception)
    assert not Job(command=command, inputs=str(source), output=f"{tmp_path}/out/{{name}}", retry=retry).run(1).ok
    [kept] = (tmp_path / "out/.ringpool").glob("kept.*")
    assert kept.read_text() == "the only copy"


def test_an_input_that_the_task_of_a_killed_run_has_moved_is_kept(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a")
    (source / "a").write_text("the only copy")
    with Child(move_and_wait, source, tmp_path / "out") as child:
        wait_until(lambda: not (source / "a").exists(), "the input is moved")
        child.kill()
    staging = tmp_path / "out/.ringpool/staging"
    staging.rename(tmp_path / "other")
    (tmp_path / "other/not a run's").mkdir()
    staging.symlink_to(tmp_path / "other")
    with Ledger.open(tmp_path / "out") as ledger:
        assert take_over_dead_runs(tmp_path / "out", ledger) == 0
    [kept] = (tmp_path / "out/.ringpool").glob("kept.*")
    assert kept.read_text() == "the only copy"
    assert [left.name for left in (tmp_path / "other").iterdir()] == ["not a run's"]


def test_an_input_that_a_task_has_moved_is_kept_though_nobody_knows_its_run_any_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """/dev/shm is a new one, as after a container's restart. Half an output is removed."""
    source, out = named(tmp_path / "in", "a", "b"), tmp_path / "out"
    (source / "a").write_text("the only copy")
    with Child(move_and_wait, source, out) as child:
        wait_until(lambda: not (source / "a").exists(), "the input is moved")
        child.kill()
    [name] = drain.segments_of(os.fsencode(out))
    segment.unlink(name)
    [staging] = (out / ".ringpool/staging").glob("*/")
    (staging / "1.0.0.b").write_text("half")
    assert Job(functions.compress, source, f"{out}/{{name}}").run(1).ok
    [kept] = (out / ".ringpool").glob("kept.*")
    assert kept.read_text() == "the only copy"
    assert str(kept) in capfd.readouterr().err
    assert not any((out / ".ringpool/staging").iterdir())


def move_and_wait(source: Path, target: Path) -> None:
    Job(command="mv {src} {dst}; sleep 60", inputs=str(source), output=f"{target}/{{name}}").run(1)


def test_a_link_from_one_output_to_another_is_replaced_and_any_other_is_followed(source: Path, tmp_path: Path) -> None:
    """A tool that looks for duplicates makes links of outputs that are the same; what they hold is of two inputs."""
    job = Job(functions.copy, source, str(tmp_path / "out/{relpath}"))
    (source / "d0/2.txt").write_bytes((source / "d0/0.txt").read_bytes())
    assert job.run(workers=1).ok
    out, elsewhere = tmp_path / "out/d0", tmp_path / "elsewhere"
    for name, target in (("2.txt", "0.txt"), ("4.txt", "nowhere.txt"), ("6.txt", "6.txt"), ("8.txt", elsewhere)):
        (out / name).unlink()
        (out / name).symlink_to(target)
    elsewhere.write_bytes(b"old")
    for path in source.rglob("*.txt"):
        path.write_bytes(b"new " + path.name.encode())
    for _ in range(2):
        assert job.run(workers=1).ok
        assert {path.name: path.read_bytes() for path in out.parent.rglob("*.txt")} == {
            f"{i}.txt": b"new %d.txt" % i for i in range(10)
        }
    assert [path.name for path in out.iterdir() if path.is_symlink()] == ["8.txt"]
    assert elsewhere.read_bytes() == b"new 8.txt"
    assert job.run(workers=1).progress.skipped == 10


def test_what_is_found_at_the_end_of_a_run_that_fails_is_counted_as_it_is(source: Path, tmp_path: Path) -> None:
    """Also where the files were larger the time before."""
    for path in source.rglob("*.txt"):
        path.write_bytes(b"x" * 10_000)
    job = Job(functions.slowly, source, str(tmp_path / "out/{relpath}"))
    assert job.run(workers=1).progress.input_bytes == 100_000
    for path in source.rglob("*.txt"):
        path.write_bytes(b"yy")

    def fail(*_: object) -> None:
        wait_until(lambda: n_new() >= 4, "some more are done")
        raise LookupError

    def n_new() -> int:
        return sum(path.read_bytes() == b"yy" for path in (tmp_path / "out").glob("d*/*.txt"))

    progress = Progress()
    with pytest.raises(LookupError):
        job.run(workers=1, on_row=fail, progress=progress)
    assert progress.done == n_new()
    assert (progress.input_bytes, progress.output_bytes) == (2 * n_new(), 2 * n_new())


def test_a_numbered_output_is_that_of_the_input_that_had_its_number_last(source: Path, tmp_path: Path) -> None:
    """More inputs, or fewer, are counted anew; and the ledger says of no output that it is of two inputs."""
    out = tmp_path / "out"

    def run(*inputs: int) -> None:
        paths = [source / f"d{i % 2}/{i}.txt" for i in inputs]
        assert Job(functions.copy, paths, str(out / "{index}.gz")).run(workers=1).ok
        with Ledger.open(out, create=False, read_only=True) as ledger:
            [job] = ledger.jobs()
            rows = list(ledger.rows(job.id))
            assert ledger.counts(job.id).done == len(rows)
            assert ledger.counts(job.id).output_bytes == sum(one.size for row in rows for one in decode_made(row.made))
        owners = {os.path.basename(os.fsdecode(row.output)): os.fsdecode(row.input) for row in rows}
        assert len(owners) == len(rows)
        assert set(owners) == {path.name for path in out.glob("*.gz")}
        for name, path in owners.items():
            assert (out / name).read_bytes() == Path(path).read_bytes()
        assert [owners[f"{n}.gz"] for n in range(len(paths))] == list(map(str, paths))

    run(4, 5, 6)
    run(*range(10))
    run(9, 8)
    run(7, *range(5))


def test_a_parameter_that_a_file_has_of_its_own_is_refused_with_its_name_and_value(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    files = [InputFile(str(tmp_path / "a.txt"), "a.txt", {"level": "9x"})]
    with pytest.raises(ParameterError, match=r"input .*/a\.txt: parameter 'level': expected `int`, got `str` '9x'"):
        Job(functions.compress, files, str(tmp_path / "out/{name}")).run(workers=1)


def test_the_command_of_an_error_names_the_outputs_where_they_would_be(source: Path, tmp_path: Path) -> None:
    report = Job(
        command="cat {src} {src} > {dst}; exit 3", inputs=source, output=str(tmp_path / "out dir/{relpath}")
    ).run(1)
    assert report.kinds == {"CommandError": 10}
    for row in rows_of(tmp_path / "out dir").values():
        command = row.message.partition(": cat ")[2].partition("; exit 3")[0]
        assert subprocess.run(["sh", "-c", f"cat {command}"]).returncode == 0
        path = Path(os.fsdecode(row.output))
        assert path.read_bytes() == 2 * Path(os.fsdecode(row.input)).read_bytes()


def test_a_parent_after_a_symlink_is_what_the_system_says_it_is(tmp_path: Path) -> None:
    for directory, words in (("data", "wrong"), ("other/data", "right")):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "f").write_text(words)
    (tmp_path / "other/dir").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other/dir")
    job = Job(functions.copy, f"{tmp_path}/link/../data/f", f"{tmp_path}/link/../out/{{name}}")
    assert job.run(1).ok
    assert (tmp_path / "other/out/f").read_text() == "right"
    assert counts(Job(functions.copy, f"{tmp_path}/link/../data", f"{tmp_path}/link/../all/{{name}}").run(1))[0] == 1
    assert (tmp_path / "other/all/f").read_text() == "right"


def test_files_that_are_skipped_do_not_count_for_the_rate(source: Path, tmp_path: Path) -> None:
    assert compress_job(source, tmp_path / "out").run(1).ok
    assert counts(compress_job(source, tmp_path / "out", rate_per_s=0.001).run(1)) == (0, 10, 0, 0)  # or 2 h 46 min


def die_between_rename_and_result(source: Path, target: Path, *directory: Path) -> None:
    params, place = {"pid": os.getpid()}, (*directory, None)[0]
    Job(functions.kill_before_the_result, str(source), f"{target}/{{name}}", params=params, directory=place).run(1)


def test_what_a_killed_run_had_done_goes_to_its_own_job_in_a_new_ledger_too(tmp_path: Path) -> None:
    source, place = named(tmp_path / "in", "a"), tmp_path / "job"
    assert Job(functions.size_of, str(source), directory=place).run(1).ok  # a job of number 1
    with Child(die_between_rename_and_result, source, tmp_path / "out", place) as child:
        child.process.wait()
    for file in (place / ".ringpool").glob("ledger.db*"):
        file.unlink()
    assert Job(functions.size_of, str(source), directory=place).run(1).ok
    for name in ("second", "third"):
        assert Job(functions.copy, str(source), f"{tmp_path}/{name}/{{name}}", directory=place).run(1).ok
    with Ledger.open(place) as ledger:
        outputs = {job.identity: [os.fsdecode(row.output) for row in ledger.rows(job.id)] for job in ledger.jobs()}
    by_pattern = {
        f"outputs ={tmp_path}/{name}/{{name}}": [f"{tmp_path}/{name}/a"] for name in ("out", "second", "third")
    }
    assert outputs == {"values of tests.jobs.job_functions:size_of": [""], **by_pattern}


@pytest.mark.parametrize("has_staging", [True, False])
def test_what_was_in_its_place_when_all_died_is_done(tmp_path: Path, has_staging: bool) -> None:
    source = named(tmp_path / "in", "a")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with Child(die_between_rename_and_result, source, tmp_path / "link/out") as child:
        child.process.wait()
    target = tmp_path / "real/out"
    inode = (target / "a").stat().st_ino
    if not has_staging:
        shutil.rmtree(target / ".ringpool/staging")
    ledger = Ledger.open(target)
    try:
        assert take_over_dead_runs(target, ledger) == 1
        [job] = ledger.jobs()
        assert ledger.counts(job.id).done == 1
    finally:
        ledger.close()
    assert (target / "a").stat().st_ino == inode


def test_options_may_be_numbers_of_any_type() -> None:
    whole = {"attempts_max": 2, "memory_limit_bytes": 1 << 30, "max_tasks_per_child": 9, "max_failures": 0, "nice": 1}
    real = {"timeout_s": 1.5, "max_failure_share": 0.5, "rate_per_s": 2.5, "grace_s": 0.0}
    given: dict[str, Any] = {name: np.int64(n) for name, n in whole.items()}
    given |= {name: Fraction(x) for name, x in real.items()}
    options = JobOptions(**given)
    assert {name: getattr(options, name) for name in whole} == whole
    assert {name: getattr(options, name) for name in real} == real
    assert {type(getattr(options, name)) for name in whole} == {int}
    assert {type(getattr(options, name)) for name in real} == {float}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("attempts_max", 1.5, TypeError),
        ("nice", "1", TypeError),
        ("timeout_s", "1", TypeError),
        ("timeout_s", float("nan"), ValueError),
        ("max_failures", np.int8(-1), ValueError),
        ("max_failure_share", np.float32(1.5), ValueError),
    ],
)
def test_an_option_that_is_no_such_number_is_refused_by_its_name(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=name):
        JobOptions(**{name: value})


def test_verify_is_a_word_that_there_is(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'digset'"):
        compress_job(source, tmp_path / "out").run(1, verify="digset")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("durability", ["atomic", "full"])
def test_outputs_may_be_on_other_file_systems_than_the_ledger(
    source: Path, tmp_path: Path, other_file_system: Path, durability: str
) -> None:
    outputs = {"thumb": f"{other_file_system}/thumb/{{relpath}}", "meta": f"{tmp_path}/meta/{{relpath}}.json"}
    job = Job(functions.thumb_and_meta, str(source), outputs, directory=tmp_path / "job", durability=durability)
    assert job.run(2).ok
    for path in (path for path in source.rglob("*") if path.is_file()):
        relpath = path.relative_to(source)
        assert (other_file_system / "thumb" / relpath).read_bytes() == path.read_bytes()[:4]
        assert int((tmp_path / "meta" / f"{relpath}.json").read_text()) == path.stat().st_size
    assert job.run(2).progress.skipped == 10
    for base in (other_file_system / "thumb", tmp_path / "meta", tmp_path / "job"):
        assert list((base / ".ringpool").glob("staging/*")) == []


def test_outputs_may_be_on_other_mounts_of_one_file_system_than_the_ledger(source: Path, tmp_path: Path) -> None:
    """As two volumes of a container may be: between them, no rename is possible."""
    for name in ("host/a", "host/b", "ledger", "out"):
        (tmp_path / name).mkdir(parents=True)
    mount = "mount --bind host/a ledger && mount --bind host/b out || exit 99"
    words = [sys.executable, "-m", "ringpool", "run", "--exec", "cp {src} {dst.a}; cp {src} {dst.b}", str(source)]
    words += ["--out", "a=ledger/{name}", "--out", "b=out/{name}", "--job", "ledger"]
    command = ["unshare", "-m", "sh", "-c", f"{mount}; exec {shlex.join(words)}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=WATCHDOG_S)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("no mounts may be made here")
    assert done.returncode == 0, done.stderr
    for side in ("a", "b"):
        assert sorted(path.name for path in (tmp_path / "host" / side).glob("*.txt")) == sorted(
            path.name for path in source.rglob("*.txt")
        )


def test_what_a_killed_run_staged_on_another_file_system_is_found(tmp_path: Path, other_file_system: Path) -> None:
    source = named(tmp_path / "in", "a", "b")
    with Child(run_slowly, source, other_file_system, tmp_path / "job") as child:
        child.wait_for("running")
        wait_until(lambda: list(other_file_system.glob(".ringpool/staging/*/*")), "a staged output")
        child.kill()
    job = Job(functions.compress, str(source), f"{other_file_system}/{{name}}", directory=tmp_path / "job")
    assert job.run(1).ok
    assert list(other_file_system.glob(".ringpool/staging/*")) == []
    assert sorted(path.name for path in other_file_system.iterdir()) == [".ringpool", "a", "b"]


def test_a_file_that_is_set_aside_counts_as_a_failure(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "0.kill", *(f"{i:04}" for i in range(1, 3000)))
    job = Job(functions.fail_by_name, str(source), f"{tmp_path}/out/{{name}}", attempts_max=1, max_failures=0)
    report = job.run(2)
    assert report.stopped
    assert report.progress.done < 2999
    assert job.run(2).progress.done == 2999 - report.progress.done  # what was set aside before does not count again


def test_a_missing_source_is_an_error_and_makes_no_job(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError):
        Job(functions.compress, str(tmp_path / "gone"), f"{tmp_path}/out/{{name}}").run(2)


@pytest.mark.parametrize("path", ["", "\ud800", "a\0b"])
@pytest.mark.parametrize("form", [list, iter])
def test_an_input_that_can_name_no_file_is_named(tmp_path: Path, path: str, form: Callable[[list[str]], Any]) -> None:
    job = Job(functions.size_of, form([path]), directory=tmp_path / "job")
    if "\0" in path and form is iter:  # as a file that is missing there
        assert job.run(1).progress.failed == 1
        return
    with pytest.raises((PathNameError, InputMissingError)) as caught:
        job.run(1)
    assert str(caught.value).isprintable() or "\0" in path


def run_slowly(source: Path, target: Path, *directory: Path) -> None:
    job = Job(
        functions.slowly,
        str(source),
        f"{target}/{{name}}",
        directory=(*directory, None)[0],
        params={"seconds": 60},
    )
    threading.Thread(target=lambda: (wait_until(lambda: job._run, "the run"), say("running")), daemon=True).start()
    job.run(1)


@pytest.mark.parametrize("ledgers", [(None, None), ("one", None), ("one", "two")])
def test_a_second_job_on_the_same_outputs_is_refused_while_the_first_lives(
    tmp_path: Path, ledgers: tuple[str | None, str | None]
) -> None:
    source = named(tmp_path / "in", "a")
    target = tmp_path / "out"
    first, second = (None if name is None else tmp_path / name for name in ledgers)
    with Child(run_slowly, source, target, *filter(None, [first])) as child:
        child.wait_for("running")
        with pytest.raises(JobBusyError) as error:
            compress_job(source, target, directory=second).run(1)
        assert error.value.pid == child.pid
        child.kill()
    for directory in (first, second):  # the first one's also takes over what the killed run has left in memory
        assert compress_job(source, target, directory=directory).run(1).ok


@pytest.mark.parametrize(
    ("names", "dead", "calls"),
    [
        (["keep1", "keep2", "need"], 0, ["keep1", "keep2", "need", "need"]),  # the first had one's left-overs around it
        (["grow"], 1, ["grow", "grow"]),
    ],
)
def test_a_file_whose_worker_was_killed_for_its_memory_is_tried_once_more_in_a_new_process(
    tmp_path: Path, names: list[str], dead: int, calls: list[str]
) -> None:
    log = tmp_path / "calls"
    log.mkdir()
    for name in names:
        (tmp_path / name).touch()
    paths = [str(tmp_path / name) for name in names]
    limits: dict[str, Any] = {"memory_limit_bytes": 2 * functions.KEPT_BYTES, "attempts_max": 9}
    report = Job(functions.keep_or_need, paths, directory=tmp_path / "job", params={"calls": log}, **limits).run(2)
    assert (report.progress.done, report.progress.dead) == (len(names) - dead, dead)
    assert [failure.kind for failure in report.failures] == ["MemoryLimitError"] * dead
    assert sorted(path.name.partition(".")[0] for path in log.iterdir()) == calls


def test_what_waits_behind_a_slow_file_does_not_begin_all_at_once_where_the_rate_is_limited(tmp_path: Path) -> None:
    names = ["slow", *(f"quick{i}" for i in range(40))]
    job = Job(functions.begin_time, iter(names), directory=tmp_path, fingerprints=False, rate_per_s=40.0)
    assert job.run(1).progress.done == len(names)
    began = sorted(msgspec.msgpack.decode(row.value or b"") for row in rows_of(tmp_path).values())
    in_a_tenth = max(sum(first <= one < first + 0.1 for one in began) for first in began)
    assert in_a_tenth <= 12  # 4 that waited, 4 or 5 at their time, and as many that were late; all 40 without a limit


@pytest.mark.parametrize("thread", ["ringpool-supervisor", "ringpool-pump"])
def test_a_job_without_threads_fails_in_words_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    """Its segment would stay for a resume; but nothing was run, and no ledger knows of it."""
    start = threading.Thread.start

    def start_others(self: threading.Thread) -> None:
        if self.name == thread:
            raise RuntimeError("can't start new thread")
        start(self)

    job = Job(functions.compress, source, f"{tmp_path}/out/{{relpath}}.gz")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_others)
        with pytest.raises(ThreadStartError, match="ulimit -u"):
            job.run(1)
    me = owner.this_process()
    assert [name for name in os.listdir(segment.SHM_DIRECTORY) if segment.owner_of(name) == me] == []
    assert job.run(1).progress.done == 10


def test_a_terminal_that_goes_away_says_so_twice_and_a_job_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and so does the shell: the second one must not interrupt the end of the run."""
    place = tmp_path / "out"
    words = [sys.executable, "-m", "tests.jobs.job_program", str(source), str(place), "atomic", "slowly"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as program:
        wait_until(lambda: list(place.glob(".ringpool/staging/*/*")), "the first task")
        os.kill(program.pid, signal.SIGHUP)
        while program.poll() is None:
            os.kill(program.pid, signal.SIGHUP)
            time.sleep(0.001)
        assert program.returncode in (128 + signal.SIGHUP, -signal.SIGHUP)
    assert shared_memory_of(program.pid) == set()
    assert not list((place / ".ringpool" / "staging").iterdir())


_MANY_MEGABYTES = """
from ringpool import Job
from tests.jobs.job_functions import megabyte
report = Job(megabyte, map(str, range(120)), directory={!r}, fingerprints=False, durability="none").run(2)
print(report.progress.done, report.kinds)
"""


def test_values_of_a_megabyte_fit_a_small_shared_memory_one_after_the_other(tmp_path: Path) -> None:
    assert in_a_small_shared_memory(48 << 10, _MANY_MEGABYTES.format(str(tmp_path))) == "120 {}\n"


def test_content_that_changes_under_the_same_size_and_time_is_seen_where_digests_are_verified(tmp_path: Path) -> None:
    source = named(tmp_path / "in", "a", "b")
    for path in source.iterdir():
        path.write_text("old")
    job = Job(functions.copy, str(source), f"{tmp_path}/out/{{name}}", checksums=True)
    assert counts(job.run(1)) == (2, 0, 0, 0)
    before = (source / "a").stat()
    (source / "a").write_text("new")
    os.utime(source / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert counts(job.run(1)) == (0, 2, 0, 0)
    assert counts(job.run(1, verify="digest")) == (1, 1, 0, 0)
    assert (tmp_path / "out/a").read_text() == "new"
    assert counts(job.run(1, verify="digest")) == (0, 2, 0, 0)

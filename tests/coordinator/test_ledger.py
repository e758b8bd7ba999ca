"""The ledger: what is written is found, whole batches survive any kill, totals stay right; and the lock of a job.

random batches, forgets and reopenings   against a dict
a writer, killed 30 times                against what it had said was written
a reader                                 while another process writes
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.workers.files.child import Child, listen, say

from ringpool.coordinator import ledger as ledgers
from ringpool.coordinator.joblock import JobLock
from ringpool.coordinator.ledger import Counts, Found, Ledger, Made, Row, RowTuple, State
from ringpool.coordinator.ledgerqueries import decode_made
from ringpool.errors import JobBusyError, JobMissingError, LedgerError

PR_SET_PDEATHSIG = 1
BATCH_ROWS = 120  # two chunks, and some rows
KEYS = [(f"in/{i}".encode(), b"out" * (i % 2)) for i in range(6)]


def made_of(*sizes: int) -> bytes:
    return msgspec.msgpack.encode([Made(b"out/%d" % i, size) for i, size in enumerate(sizes)])


def row(input: bytes, output: bytes = b"", **more: Any) -> Row:  # noqa: A002
    default = Row(
        input, output, State.DONE, 10, 11, 12, b"", b"p", b"", None, 0, 1, 0, "", "", "", 3, 1.5, 0.25, 4096
    )  # fmt: skip
    return msgspec.structs.replace(default, **more)


def as_tuple(one: Row) -> RowTuple:
    return msgspec.structs.astuple(one)  # type: ignore[return-value]


def write(ledger: Ledger, job: int, *rows: Row) -> None:
    ledger.write(job, map(as_tuple, rows))


def path_of(directory: Path) -> Path:
    return directory / ".ringpool" / "ledger.db"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path) as opened:
        yield opened


# ---- what is written is found ----------------------------------------------------------------------------------------

small = st.integers(0, 2**40)
texts = st.text(max_size=30) | st.binary(max_size=30).map(os.fsdecode)  # surrogates among them
rows_of_any_kind = st.builds(
    Row,
    input=st.binary(max_size=300),
    output=st.binary(max_size=300),
    state=st.sampled_from(State).map(int),
    size=st.integers(-1, 2**40),
    mtime_ns=st.integers(-(2**63), 2**63 - 1),
    inode=st.integers(-1, 2**64 - 1),
    checksum=st.binary(max_size=32),
    parameters=st.binary(max_size=32),
    made=st.one_of(st.just(b""), st.lists(small, max_size=3).map(lambda sizes: made_of(*sizes))),
    value=st.none() | st.binary(max_size=20_000),
    encoding=st.integers(0, 5),
    attempts=st.integers(1, 9),
    deaths=st.integers(0, 9),
    kind=st.sampled_from(["", "ValueError", "my.Error"]),
    message=texts,
    traceback=texts,
    worker=st.integers(-1, 63),
    started_s=st.floats(allow_nan=False),
    duration_s=st.floats(0, 1e6),
    peak_rss=small,
)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(rows_of_any_kind, max_size=8, unique_by=lambda one: (one.input, one.output)))
def test_rows_of_any_bytes_come_back_as_they_were_in_the_order_of_their_keys(ledger: Ledger, rows: list[Row]) -> None:
    job = ledger.job(os.urandom(8).hex(), b"")
    write(ledger, job, *rows)
    expected = sorted(rows, key=lambda one: (one.input, one.output))
    for one in expected:
        found = ledger.find(job, one.input, one.output)
        assert found == Found(*as_tuple(one)[2:13])
        one.message, one.traceback = (
            text.encode("utf-8", "backslashreplace").decode() for text in (one.message, one.traceback)
        )
    assert list(ledger.rows(job)) == expected
    assert ledger.check() == []


def test_the_path_of_the_ledger_may_hold_any_bytes(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"\xff ?mode=memory#%41&")
    with Ledger.open(directory) as ledger:
        job = ledger.job("a", b"")
        write(ledger, job, row(b"x"))
        assert path_of(directory).is_file()
        assert [one.input for one in ledger.rows(job)] == [b"x"]


def test_what_is_not_there_is_not_found(ledger: Ledger) -> None:
    job, other = ledger.job("a", b""), ledger.job("b", b"")
    assert ledger.is_empty(job)
    write(ledger, job, row(b"x", b"y"))
    assert not ledger.is_empty(job)
    assert ledger.is_empty(other)
    assert ledger.find(job, b"x", b"") is None
    assert ledger.find(other, b"x", b"y") is None
    assert ledger.find(job, b"x", b"y") is not None


def test_the_last_row_of_a_key_counts_also_within_a_batch(ledger: Ledger) -> None:
    job = ledger.job("a", b"")
    write(ledger, job, row(b"x", size=1), row(b"y", size=2), row(b"x", size=3, state=State.FAILED, kind="E"))
    assert [one.size for one in ledger.rows(job)] == [3, 2]
    assert ledger.counts(job) == Counts(1, 1, 0, 0, 5, 0, 0.5)


def test_a_batch_with_a_row_that_cannot_be_written_leaves_nothing(ledger: Ledger) -> None:
    job = ledger.job("a", b"")
    write(ledger, job, row(b"old"))
    broken: Any = (None, *as_tuple(row(b"x"))[1:])
    with pytest.raises(sqlite3.IntegrityError):
        ledger.write(job, [*(as_tuple(row(b"%d" % i)) for i in range(BATCH_ROWS)), broken])
    assert [one.input for one in ledger.rows(job)] == [b"old"]
    assert ledger.counts(job).n_files == 1
    assert ledger.check() == []


def test_a_batch_whose_rows_fail_while_they_are_drawn_leaves_nothing(ledger: Ledger) -> None:
    job = ledger.job("a", b"")

    def rows() -> Iterator[RowTuple]:
        yield as_tuple(row(b"x"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.write(job, rows())
    assert ledger.is_empty(job)
    write(ledger, job, row(b"x"))
    with pytest.raises(KeyboardInterrupt):
        ledger.forget(job, (one[:2] for one in rows()))
    assert not ledger.is_empty(job)
    assert ledger.check() == []


def test_a_report_after_a_find_is_not_of_yesterday(ledger: Ledger) -> None:
    job = ledger.job("a", b"")
    for n in range(3):
        assert ledger.find(job, b"%d" % n, b"") is None
        write(ledger, job, row(b"%d" % n))
        assert ledger.find(job, b"%d" % n, b"") is not None
        assert ledger.counts(job).done == n + 1


# ---- jobs and runs ---------------------------------------------------------------------------------------------------


def test_a_job_is_found_by_its_identity_and_takes_its_last_spec(ledger: Ledger) -> None:
    first, second = ledger.job("a", b"1"), ledger.job("b", b"2")
    assert first != second
    assert ledger.job("a", b"3") == first
    assert {(one.identity, one.spec, one.started_s) for one in ledger.jobs()} == {("a", b"3", None), ("b", b"2", None)}


@pytest.mark.parametrize("identity", ["outputs =/o\udcff/{relpath}", "\ud800", "\\xff"])
def test_the_identity_of_a_job_may_hold_any_bytes(ledger: Ledger, identity: str) -> None:
    job = ledger.job(identity, b"")
    assert ledger.job(identity, b"other") == job
    assert [found.identity for found in ledger.jobs()] == [identity]
    run = ledger.begin_run(job, "rp.1", 1)
    ledger.end_run(run, f"OSError: {identity}", b"")
    assert (found := ledger.last_run(job)) is not None
    assert found.ended_s


def test_the_job_that_ran_last_comes_first(ledger: Ledger) -> None:
    jobs = [ledger.job(identity, b"") for identity in "abc"]
    for job in (jobs[1], jobs[0], jobs[1]):
        run = ledger.begin_run(job, "", 1)
    assert [one.identity for one in ledger.jobs()] == ["b", "a", "c"]
    last = ledger.last_run(jobs[1])
    assert last is not None
    assert last.id == run
    assert ledger.jobs()[0].started_s == last.started_s
    assert ledger.last_run(jobs[2]) is None


def test_a_run_that_did_not_end_leaves_its_segment_open_until_it_is_forgotten(ledger: Ledger) -> None:
    job = ledger.job("a", b"")
    runs = [ledger.begin_run(job, name, 42) for name in ("rp.1", "rp.2", "rp.3")]
    ledger.end_run(runs[1], "done", b"counts")
    assert ledger.open_segments() == ["rp.1", "rp.3"]
    ledger.forget_segment("rp.1")
    assert ledger.open_segments() == ["rp.3"]
    last = ledger.last_run(job)
    assert last is not None
    assert (last.segment, last.pid, last.ended_s, last.outcome, last.counts) == ("rp.3", 42, None, "", b"")
    ledger.end_run(runs[2], "stopped", b"c")
    ended = ledger.last_run(job)
    assert ended is not None
    assert (ended.outcome, ended.counts, ended.ended_s is None) == ("stopped", b"c", False)
    assert ledger.open_segments() == []


# ---- totals ----------------------------------------------------------------------------------------------------------

keys = st.sampled_from(KEYS)
states = st.sampled_from([(State.DONE, ""), (State.FAILED, "A"), (State.FAILED, "B"), (State.DEAD, "B")])
durations = st.floats(0, 1e3)
written = st.builds(
    lambda key, state, size, sizes, attempts, duration_s: row(
        *key,
        state=int(state[0]),
        kind=state[1],
        size=size,
        made=made_of(*sizes),
        attempts=attempts,
        duration_s=duration_s,
        message=f"because of {state[1]}" if state[1] else "",
    ),
    keys,
    states,
    st.integers(-1, 9),
    st.lists(st.integers(0, 9), max_size=2),
    st.integers(1, 2),
    durations,
)
steps = st.one_of(
    st.tuples(st.just("write"), st.lists(written, max_size=6)),
    st.tuples(st.just("forget"), st.lists(keys, max_size=3)),
    st.tuples(st.just("reopen"), st.booleans()),
)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(steps, max_size=12))
def test_reports_are_those_of_the_rows_whatever_was_written_over_and_forgotten(
    tmp_path: Path, steps: list[tuple[str, Any]]
) -> None:
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    ledger = Ledger.open(tmp_path / "out")
    job, other = ledger.job("a", b""), ledger.job("other", b"")
    write(ledger, other, row(b"in/0", size=1))
    model: dict[tuple[bytes, bytes], Row] = {}
    for step, what in steps:
        if step == "write":
            write(ledger, job, *what)
            model |= {(one.input, one.output): one for one in what}
        elif step == "forget":
            ledger.forget(job, what)
            for key in what:
                model.pop(key, None)
        else:
            ledger.close()
            ledger = Ledger.open(tmp_path / "out", create=False, synchronous=what)
        assert_reports_are_of(ledger, job, [model[key] for key in sorted(model)])
    assert ledger.counts(other) == Counts(1, 0, 0, 0, 1, 0, 0.25)
    assert ledger.check() == []
    ledger.close()


def assert_reports_are_of(ledger: Ledger, job: int, rows: list[Row]) -> None:
    assert list(ledger.rows(job)) == rows
    assert ledger.is_empty(job) == (not rows)
    by_state = Counter(one.state for one in rows)
    counts = ledger.counts(job)
    assert (counts.done, counts.failed, counts.dead, counts.n_files) == (
        *(by_state[state] for state in State),
        len(rows),
    )
    assert counts.n_retried == sum(one.attempts > 1 for one in rows)
    assert counts.input_bytes == sum(max(one.size, 0) for one in rows)
    assert counts.output_bytes == sum(made.size for one in rows for made in decode_made(one.made))
    assert counts.duration_s == sum(round(one.duration_s * 1e9) for one in rows) / 1e9
    failed = sorted((one for one in rows if one.state != State.DONE), key=lambda one: (one.kind, one.state))
    assert list(ledger.failed(job)) == failed
    for kind in ("A", "B", "C"):
        assert list(ledger.failed(job, kind)) == [one for one in failed if one.kind == kind]
        assert list(ledger.failed(job, kind, 2)) == [one for one in failed if one.kind == kind and one.state == 2]
    assert list(ledger.failed(job, state=State.DEAD)) == [one for one in failed if one.state == State.DEAD]
    by_cause = Counter((one.kind, one.state) for one in failed)
    causes = ledger.failures_by_cause(job)
    assert {(cause.kind, cause.state): cause.n_files for cause in causes} == by_cause
    assert [cause.n_files for cause in causes] == sorted(by_cause.values(), reverse=True)
    for cause in causes:
        first = next(one for one in failed if (one.kind, one.state) == (cause.kind, cause.state))
        assert (cause.input, cause.message) == (first.input, first.message)


def test_totals_that_are_not_those_of_the_rows_are_a_problem(tmp_path: Path, ledger: Ledger) -> None:
    job = ledger.job("a", b"")
    write(ledger, job, row(b"x"))
    assert ledger.check() == []
    with closing(sqlite3.connect(path_of(tmp_path))) as db:
        db.execute("UPDATE totals SET input_bytes = 11")
        db.commit()
    assert ledger.check() == [f"the totals of job {job} are not those of its files"]


# ---- kills and readers -----------------------------------------------------------------------------------------------


def batch_of(n: int) -> list[RowTuple]:
    """Rows of their own, and one that each batch writes over."""
    own = [as_tuple(row(b"%06d/%03d" % (n, i), b"o" * 100, parameters=b"%d" % n)) for i in range(BATCH_ROWS)]
    return [*own, as_tuple(row(b"last", size=n))]


def write_batches(directory: str) -> None:
    with Ledger.open(Path(directory)) as ledger:
        job = ledger.job("a", b"")
        last = ledger.find(job, b"last", b"")
        n = -1 if last is None else last.size
        say(f"began {n}")
        while True:
            n += 1
            ledger.write(job, batch_of(n))
            say(f"wrote {n}")


def fork_writers(directory: str) -> None:
    while True:
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            say(f"pid {os.getpid()}")
            write_batches(directory)
        os.waitpid(pid, 0)
        say("killed")
        listen()


def test_a_killed_writer_leaves_whole_batches_in_order_and_all_that_it_said_were_written(tmp_path: Path) -> None:
    dice = random.Random(20)
    said = -1
    with Child(fork_writers, tmp_path) as child:
        lines = child.process.stdout
        assert lines is not None
        for _ in range(30):
            pid = int(lines.readline().removeprefix(b"pid "))
            for line in islice(lines, dice.randrange(1, 8)):
                said = int(line.split()[1])
            select.select([], [], [], dice.random() * 0.02)  # a moment of a batch, by chance
            os.kill(pid, signal.SIGKILL)
            for line in iter(lines.readline, b"killed\n"):
                said = int(line.split()[1])
            assert_batches_are_whole(tmp_path, said, read_only=dice.random() < 0.5)
            child.answer()


def assert_batches_are_whole(directory: Path, said: int, *, read_only: bool) -> None:
    with Ledger.open(directory, create=False, read_only=read_only) as ledger:
        assert ledger.check() == []
        [job] = ledger.jobs() or [None]
        if job is None:
            assert said == -1
            return
        n_rows = Counter(one.parameters for one in ledger.rows(job.id) if one.input != b"last")
        assert n_rows == {b"%d" % n: BATCH_ROWS for n in range(len(n_rows))}
        assert len(n_rows) - 1 >= said
        last = ledger.find(job.id, b"last", b"")
        assert (-1 if last is None else last.size) == len(n_rows) - 1
        assert ledger.counts(job.id).done == sum(n_rows.values()) + (last is not None)


def write_over(directory: str) -> None:
    with Ledger.open(Path(directory), synchronous=False) as ledger:
        job = ledger.job("a", b"")
        for n in range(1, 1_000_000):
            ledger.write(job, [as_tuple(row(b"%03d" % i, size=n, value=b"v" * 500)) for i in range(BATCH_ROWS)])
            if n in (1, 20):
                say("written")


def test_a_reader_sees_whole_batches_while_another_process_writes(tmp_path: Path) -> None:
    with Child(write_over, tmp_path) as child:
        child.wait_for("written")
        with Ledger.open(tmp_path, read_only=True) as reader:
            [job] = reader.jobs()
            stream = reader.rows(job.id)
            first = next(stream)
            child.wait_for("written")  # it is not held up by a reader in the middle
            assert {one.size for one in stream} == {first.size}
            seen = [first.size]
            while len(set(seen)) < 10:
                sizes = {one.size for one in reader.rows(job.id)}
                assert len(sizes) == 1
                seen.append(sizes.pop())
                assert reader.counts(job.id).input_bytes % BATCH_ROWS == 0
            assert seen == sorted(seen)


def test_a_report_of_several_questions_is_of_one_moment(ledger: Ledger) -> None:
    job = ledger.job("a", b"")
    with ledger._snapshot() as db:
        assert db.execute("SELECT count(*) FROM files").fetchall() == [(0,)]
        write(ledger, job, row(b"x"))
        assert db.execute("SELECT count(*) FROM files").fetchall() == [(0,)]


def test_close_leaves_one_file_and_a_reader_in_the_middle_does_not_hold_it_up(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path)
    job = ledger.job("a", b"")
    write(ledger, job, *(row(b"%d" % i) for i in range(BATCH_ROWS)))
    reader = Ledger.open(tmp_path, read_only=True)
    stream = reader.rows(job)
    next(stream)
    write(ledger, job, row(b"more"))
    ledger.close()
    ledger.close()
    assert len(list(stream)) == BATCH_ROWS - 1
    assert len(list(reader.rows(job))) == BATCH_ROWS + 1
    reader.close()
    Ledger.open(tmp_path).close()
    assert os.listdir(tmp_path / ".ringpool") == ["ledger.db"]


@pytest.mark.parametrize("is_over", [False, True])
def test_who_reads_the_file_alone_is_told_when_a_run_writes_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_over: bool
) -> None:
    """Another user, who may not make a log's index there: he gets no mixture of two runs."""
    with Ledger.open(tmp_path) as ledger:
        job = ledger.job("a", b"")
        write(ledger, job, *(row(b"%04d" % i) for i in range(1000)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 34567)
        reader = Ledger.open(tmp_path, read_only=True)
    with reader:
        assert len(list(reader.rows(job))) == 1000
        stream = reader.rows(job)
        next(stream)
        ledger = Ledger.open(tmp_path)
        write(ledger, job, *(row(b"%04d" % i, size=BATCH_ROWS) for i in range(1000)))
        if is_over:
            ledger.close()
        with pytest.raises(LedgerError, match="a run has begun to write to it"):
            list(stream)
        ledger.close()
        assert len({one.size for one in reader.rows(job)}) == 1, "what is asked anew"


def test_close_puts_all_into_the_file_while_a_reader_looks_on(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path)
    job = ledger.job("a", b"")
    write(ledger, job, row(b"x"))
    with Ledger.open(tmp_path, read_only=True):
        assert ledger.find(job, b"x", b"") is not None
        ledger.close()
        assert os.stat(f"{path_of(tmp_path)}-wal").st_size == 0


def test_an_unfinished_stream_can_be_dropped(ledger: Ledger) -> None:
    job = ledger.job("a", b"")
    write(ledger, job, row(b"x"), row(b"y"))
    stream = ledger.rows(job)
    next(stream)
    del stream
    write(ledger, job, row(b"z"))
    assert len(list(ledger.rows(job))) == 3


def test_a_fork_cannot_write_to_its_parents_ledger_and_does_it_no_harm_by_closing_it(tmp_path: Path) -> None:
    with Child(fork_with_a_ledger, tmp_path) as child:
        child.wait_for("refused")
        child.wait_for("1 []")
        child.succeed()


def fork_with_a_ledger(directory: str) -> None:
    ledger = Ledger.open(Path(directory))
    job = ledger.job("a", b"")
    pid = os.fork()
    if pid == 0:
        try:
            write(ledger, job, row(b"child"))
        except AssertionError:
            say("refused")
        ledger.close()
        os._exit(0)
    os.waitpid(pid, 0)
    write(ledger, job, row(b"parent"))
    say(f"{ledger.counts(job).done} {ledger.check()}")
    ledger.close()


# ---- what cannot be opened -------------------------------------------------------------------------------------------


def a_text(path: Path) -> None:
    path.write_bytes(b"not a database, " * 1000)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def anothers(path: Path) -> None:
    path.unlink()
    change(path, "CREATE TABLE t (x)")


def anothers_with_a_name(path: Path) -> None:
    change(path, "PRAGMA application_id = 7")


def a_newer_version(path: Path) -> None:
    change(path, f"PRAGMA user_version = {ledgers.VERSION + 1}")


def cut_to(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


def cut_by_a_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement)
        db.commit()


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (a_text, "it is no SQLite database; move it away"),
        (a_directory, "it is a directory; move it away"),
        (a_pipe, "it is no file"),
        (anothers, "it is a database of another program; move it away"),
        (anothers_with_a_name, "it is a database of another program; move it away"),
        (a_newer_version, "it has version 2, and this ringpool knows 1; use the ringpool that made it"),
        (cut_to(50), "it is damaged; put a copy in its place"),
        (cut_to(ledgers.PAGE_BYTES), "it is damaged; put a copy in its place"),
        (cut_by_a_byte, "it was cut off at"),
    ],
)
def test_what_is_no_ledger_is_refused_with_its_reason_and_left_as_it_is(
    tmp_path: Path, spoil: Callable[[Path], None], reason: str, read_only: bool
) -> None:
    with Ledger.open(tmp_path) as ledger:
        write(ledger, ledger.job("a", b""), *(row(b"%d" % i) for i in range(BATCH_ROWS)))
    path = path_of(tmp_path)
    spoil(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(LedgerError) as caught:
        Ledger.open(tmp_path, read_only=read_only)
    assert str(caught.value).startswith(f"ledger {path}: {reason}")
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_damaged_page_is_a_problem_and_an_error_where_it_is_read(tmp_path: Path) -> None:
    with Ledger.open(tmp_path) as ledger:
        job = ledger.job("a", b"")
        write(ledger, job, *(row(b"%05d" % i, b"o" * 200) for i in range(500)))
    with path_of(tmp_path).open("r+b") as file:
        file.seek(0, os.SEEK_END)
        n_pages = file.tell() // ledgers.PAGE_BYTES
        for page in range(n_pages // 2, n_pages):
            file.seek(page * ledgers.PAGE_BYTES)
            file.write(b"\xa5" * ledgers.PAGE_BYTES)
    with Ledger.open(tmp_path, read_only=True) as ledger:
        assert ledger.check() != []
        with pytest.raises(LedgerError, match="it is damaged; put a copy in its place"):
            list(ledger.rows(job))
        with pytest.raises(LedgerError, match="it is damaged; put a copy in its place"):
            _ = [ledger.find(job, b"%05d" % i, b"o" * 200) for i in range(500)]


@pytest.mark.parametrize("facts", ["x'93010203'", "5", "made"])
def test_facts_that_nobody_can_read_are_a_damage(tmp_path: Path, ledger: Ledger, facts: str) -> None:
    job = ledger.job("a", b"")
    write(ledger, job, row(b"x"))
    if facts == "made":
        broken = msgspec.msgpack.encode(as_tuple(row(b"x", made=b"abc"))[2:])
        facts = f"x'{broken.hex()}'"
    change(path_of(tmp_path), f"UPDATE files SET facts = {facts}")
    for read in (
        lambda: ledger.find(job, b"x", b""),
        lambda: list(ledger.rows(job)),
        lambda: write(ledger, job, row(b"x")),
        lambda: ledger.forget(job, [(b"x", b"")]),
    ):
        with pytest.raises(LedgerError, match="it is damaged"):
            read()
    assert len(ledger.check()) == 1


def test_another_user_who_looks_leaves_nothing_that_its_owner_could_not_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ledger.open(tmp_path) as ledger:
        write(ledger, ledger.job("a job"), row(b"/in/a"))
    me = os.geteuid()
    with monkeypatch.context() as another:
        another.setattr(os, "geteuid", lambda: me + 1)
        with Ledger.open(tmp_path, read_only=True) as ledger:
            assert [found.identity for found in ledger.jobs()] == ["a job"]
            assert os.listdir(path_of(tmp_path).parent) == ["ledger.db"]


def test_what_another_user_has_left_by_looking_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger.open(tmp_path) as ledger:
        write(ledger, ledger.job("a job"), row(b"/in/a"))
    path = path_of(tmp_path)
    left = [Path(f"{path}-wal"), Path(f"{path}-shm")]
    for each in left:
        each.touch()
        os.link(each, tmp_path / each.name)  # or a new file might have its inode
    inodes = {each.stat().st_ino for each in left}
    access = os.access
    monkeypatch.setattr(os, "access", lambda name, *how, **more: name != str(left[0]) and access(name, *how, **more))
    with Ledger.open(tmp_path) as ledger:
        write(ledger, ledger.job("a job"), row(b"/in/b"))
        assert not inodes & {each.stat().st_ino for each in left}


@pytest.mark.parametrize("read_only", [False, True])
def test_where_there_is_no_ledger_there_is_no_job(tmp_path: Path, read_only: bool) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(JobMissingError, match=r"no job in .*: there is no \.ringpool/ledger\.db; `ringpool run`"):
            Ledger.open(directory, create=False, read_only=read_only)
        assert not (directory / ".ringpool").exists()


@pytest.mark.parametrize("n_statements", [0, 1])
def test_a_ledger_whose_maker_was_killed_is_no_job_and_is_made_anew(tmp_path: Path, n_statements: int) -> None:
    path_of(tmp_path).parent.mkdir()
    path_of(tmp_path).touch()
    with closing(sqlite3.connect(path_of(tmp_path))) as db:
        for statement in ["PRAGMA journal_mode = WAL"][:n_statements]:
            db.execute(statement)
    for read_only in (False, True):
        with pytest.raises(JobMissingError, match="never finished; run the job again"):
            Ledger.open(tmp_path, create=False, read_only=read_only)
    with Ledger.open(tmp_path) as ledger:
        write(ledger, ledger.job("a", b""), row(b"x"))
        assert ledger.check() == []


class MadeMeanwhile(sqlite3.Connection):
    """A connection to a database in which a neighbour makes the ledger after the first question."""

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        if sql == "PRAGMA user_version":
            [(_, _, path)] = super().execute("PRAGMA database_list")
            with closing(sqlite3.connect(path, isolation_level=None)) as neighbour:
                ledgers._make(neighbour)
        return super().execute(sql, *parameters)


def test_a_ledger_that_is_made_while_one_looks_is_not_taken_for_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path_of(tmp_path).parent.mkdir()
    change(path_of(tmp_path), "PRAGMA journal_mode = WAL")
    with monkeypatch.context() as patched:
        patched.setattr(ledgers, "connect", lambda uri: sqlite3.connect(uri, uri=True, factory=MadeMeanwhile))
        with pytest.raises(JobMissingError, match="never finished"):
            Ledger.open(tmp_path, read_only=True)
    with Ledger.open(tmp_path, read_only=True) as ledger:
        assert ledger.jobs() == []


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    path_of(tmp_path).parent.mkdir()
    path_of(tmp_path).symlink_to(tmp_path / "gone" / "ledger.db")
    with pytest.raises(LedgerError, match=f"symbolic link into {tmp_path}/gone, which is no directory"):
        Ledger.open(tmp_path)
    with pytest.raises(JobMissingError):
        Ledger.open(tmp_path, create=False, read_only=True)
    (tmp_path / "gone").mkdir()
    Ledger.open(tmp_path).close()
    assert (tmp_path / "gone" / "ledger.db").exists()


def test_a_file_in_place_of_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / ".ringpool").write_text("")
    with pytest.raises(OSError, match=r"\.ringpool"):
        Ledger.open(tmp_path)
    with pytest.raises(JobMissingError):
        Ledger.open(tmp_path, read_only=True)


# ---- without the right to write --------------------------------------------------------------------------------------


def drop_rights() -> None:
    """In a child: root, too, now heeds modes."""
    if os.geteuid() == 0:
        header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(header, rights) == 0, ctypes.get_errno()


def protected(function: Callable[..., None], *arguments: str | os.PathLike[str]) -> str:
    """What ``function`` says, in a process that modes bind."""
    with Child(function, *arguments) as child:
        assert child.process.stdout is not None
        said = child.process.stdout.read().decode()
        child.succeed()
    return said


@pytest.fixture
def lock_directory(tmp_path: Path) -> Iterator[Callable[[], None]]:
    yield lambda: (tmp_path / ".ringpool").chmod(0o555)
    (tmp_path / ".ringpool").chmod(0o755)


def read_and_say(directory: str) -> None:
    drop_rights()
    try:
        with Ledger.open(Path(directory), read_only=True) as ledger:
            job = ledger.jobs()[0].id
            said = f"{ledger.counts(job).done} {len(list(ledger.rows(job)))} {ledger.check()}"
    except LedgerError as error:
        said = error.reason
    say(said)


def open_and_say(directory: str) -> None:
    drop_rights()
    try:
        Ledger.open(Path(directory))
    except OSError as error:
        say(f"{type(error).__name__} {error.filename or error}")


def test_a_closed_ledger_in_a_directory_that_one_may_not_write_to_can_be_read(
    tmp_path: Path, lock_directory: Callable[[], None]
) -> None:
    with Ledger.open(tmp_path) as ledger:
        write(ledger, ledger.job("a", b""), row(b"x"))
    lock_directory()
    assert protected(read_and_say, tmp_path) == "1 1 []\n"
    assert os.listdir(tmp_path / ".ringpool") == ["ledger.db"]


def test_an_open_ledger_in_a_directory_that_one_may_not_write_to_can_be_read(
    tmp_path: Path, ledger: Ledger, lock_directory: Callable[[], None]
) -> None:
    write(ledger, ledger.job("a", b""), row(b"x"))
    for file in (tmp_path / ".ringpool").iterdir():
        file.chmod(0o444)
    lock_directory()
    assert protected(read_and_say, tmp_path) == "1 1 []\n"


@pytest.mark.parametrize("with_index", [True, False])
def test_what_a_killed_writer_left_in_such_a_directory_is_read_whole_or_not_at_all(
    tmp_path: Path, lock_directory: Callable[[], None], with_index: bool
) -> None:
    with Child(write_batches, tmp_path) as child:
        child.wait_for("began -1")
        child.wait_for("wrote 0")
        child.kill()
    assert ledgers.has_log(path_of(tmp_path))
    for file in (tmp_path / ".ringpool").iterdir():
        if file.name.endswith("-shm") and not with_index:
            file.unlink()
        else:
            file.chmod(0o444)
    lock_directory()
    said = protected(read_and_say, tmp_path)
    if with_index:
        n_done = int(said.split()[0])
        assert n_done % BATCH_ROWS == 1
        assert said == f"{n_done} {n_done} []\n"
    else:
        assert said.startswith("it, or its -wal and -shm beside it, cannot be opened; run as the user who made it")


def test_to_write_where_one_may_not_is_an_error_that_names_the_place(
    tmp_path: Path, lock_directory: Callable[[], None]
) -> None:
    (tmp_path / ".ringpool").mkdir()
    lock_directory()
    assert protected(open_and_say, tmp_path) == f"PermissionError {tmp_path}/.ringpool\n"
    (tmp_path / ".ringpool").chmod(0o755)
    Ledger.open(tmp_path).close()
    path_of(tmp_path).chmod(0o444)
    assert protected(open_and_say, tmp_path) == f"PermissionError {path_of(tmp_path)}\n"


# ---- the lock --------------------------------------------------------------------------------------------------------


def hold(directory: str) -> None:
    with JobLock(Path(directory)):
        say("held")
        listen()
    say("released")
    listen()


def hold_and_fork(directory: str) -> None:
    with JobLock(Path(directory)):
        if os.fork() == 0:
            say("forked")
            sys.stdin.buffer.raw.readall()  # type: ignore[attr-defined]  # to the end of the test, or of its block
            os._exit(0)
        listen()


def test_a_second_job_is_refused_until_the_first_has_let_go(tmp_path: Path) -> None:
    lock = JobLock(tmp_path)
    assert lock.holder() is None
    with Child(hold, tmp_path) as child:
        child.wait_for("held")
        assert lock.holder() == child.pid
        with pytest.raises(JobBusyError) as caught:
            lock.acquire()
        assert (caught.value.directory, caught.value.pid) == (str(tmp_path), child.pid)
        lock.release()  # what was never had
        assert lock.holder() == child.pid
        child.answer()
        child.wait_for("released")
        assert lock.holder() is None
        with lock:
            assert lock.holder() == os.getpid()


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    with Child(hold, tmp_path) as child:
        child.wait_for("held")
        child.kill()
        assert JobLock(tmp_path).holder() is None
        with JobLock(tmp_path):
            pass


def test_a_fork_of_its_holder_neither_keeps_the_lock_nor_frees_it(tmp_path: Path) -> None:
    with Child(hold_and_fork, tmp_path) as child:
        child.wait_for("forked")
        assert JobLock(tmp_path).holder() == child.pid
        child.kill()
        assert JobLock(tmp_path).holder() is None
        with JobLock(tmp_path):
            assert child.process.stdin is not None
            child.process.stdin.close()  # the fork, which has lived until here, ends
            assert child.process.stdout is not None
            assert child.process.stdout.read() == b""


def test_one_process_cannot_have_it_twice(tmp_path: Path) -> None:
    lock = JobLock(tmp_path)
    with lock:
        for again in (lock, JobLock(tmp_path), JobLock(tmp_path / ".." / tmp_path.name)):
            with pytest.raises(JobBusyError, match=f"process {os.getpid()} runs a job there"):
                again.acquire()
        assert JobLock(tmp_path).holder() == os.getpid()
        (tmp_path / ".ringpool" / "job.lock").read_bytes()  # to close a descriptor of it, or to ask, frees nothing
        with Child(ask, tmp_path) as child:
            child.wait_for(str(os.getpid()))
    assert lock.holder() is None
    lock.release()
    with JobLock(tmp_path):
        pass


def ask(directory: str) -> None:
    say(str(JobLock(Path(directory)).holder()))


def take_turns(directory: str) -> None:
    """Hold the lock again and again, and remove its file each time, as `ringpool clean` does."""
    lock, marker = JobLock(Path(directory)), f"{directory}/marker"
    n_turns = 0
    while n_turns < 3000:
        try:
            with lock:
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                os.unlink(marker)
                os.unlink(lock.path)
            n_turns += 1
        except JobBusyError:
            pass
        except FileExistsError:
            say("two hold it")
            return
    say("one at a time")


def test_a_lock_file_that_its_holder_removes_lets_nobody_in_beside_its_successors(tmp_path: Path) -> None:
    with Child(take_turns, tmp_path) as first, Child(take_turns, tmp_path) as second:
        first.wait_for("one at a time")
        second.wait_for("one at a time")


def test_a_holder_that_has_not_written_its_pid_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    file = tmp_path / ".ringpool" / "job.lock"
    with JobLock(tmp_path):
        for content in (b"", b"garbage", b"1 1\n", b"-1 -1\n", b"%d" % os.getpid(), b"9" * 60 + b" 5"):
            file.write_bytes(content)
            assert JobLock(tmp_path).holder() == 0
            with pytest.raises(JobBusyError, match="another process runs a job there"):
                JobLock(tmp_path).acquire()

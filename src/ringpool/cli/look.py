"""``ringpool status``, ``results``, ``clean``: what jobs have left in a directory.

    status     the ledger, and whether a run is under way        reads
    results    the ledger's files that are done, one by one      reads
    clean      what dead runs left in /dev/shm and on disk       into the ledger, then away; --ledger: that too

Nobody who reads disturbs a run, or waits for it. ``clean`` takes the job's lock, as a run does.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ringpool.cli.lines import AS_FILE, command, counted, one_line, print_line, printable, say, size_in_words
from ringpool.cli.options import DIRECTORY

if TYPE_CHECKING:
    from ringpool.coordinator.joblock import JobLock
    from ringpool.coordinator.ledger import Cause, JobInfo, Ledger, RunInfo

RUNNING, KILLED = "running", "killed"
_DIRECTORY = click.argument("directory", metavar="[DIR]", type=DIRECTORY, default=".")
_LEDGER_FILES = ("ledger.db-wal", "ledger.db-shm", "ledger.db")


# ---- ringpool status -------------------------------------------------------------------------------------------------


@click.command(short_help="What is done of a job, what failed, and why.")
@_DIRECTORY
@click.option("--json", "as_object", is_flag=True, help="As one JSON object.")
def status(directory: str, as_object: bool) -> int:
    """What is done of the jobs of DIR, the current directory if none is given; the one that ran last comes first."""
    from ringpool.coordinator.joblock import JobLock
    from ringpool.coordinator.ledger import Ledger
    from ringpool.errors import JobMissingError

    lock = JobLock(Path(directory))
    with Ledger.open(Path(directory), create=False, read_only=True) as ledger:
        jobs = [_facts(ledger, job, lock if number == 0 else None) for number, job in enumerate(ledger.jobs())]
        running = lock.holder()
    if not jobs:
        raise JobMissingError(directory, "none was begun; `ringpool run` begins one")
    if as_object:
        print_line(_dumps({"directory": os.path.abspath(directory), "running": running, "jobs": jobs}))
        return 0
    for number, job in enumerate(jobs):
        if number:
            print_line("")
        for line in _in_lines(job, directory, is_last_job=number == 0):
            print_line(printable(line))
    return 0


def _dumps(value: dict[str, Any]) -> str:
    import json

    return json.dumps(value)


def _facts(ledger: Ledger, job: JobInfo, lock: JobLock | None) -> dict[str, Any]:
    """What there is to say of a job, as JSON has it. ``lock``: that of its directory, where it is the last one there,
    and may be under way.
    """
    counts = ledger.counts(job.id)
    return {
        "identity": job.identity,
        "begun_s": job.created_s,
        "call": _call(job),
        "files": {"done": counts.done, "failed": counts.failed, "set_aside": counts.dead, "retried": counts.n_retried},
        "input_bytes": counts.input_bytes,
        "output_bytes": counts.output_bytes,
        "duration_s": counts.duration_s,
        "last_run": _last_run(ledger, job, lock),
        "causes": [_cause_facts(cause) for cause in ledger.failures_by_cause(job.id)],
    }


def _call(job: JobInfo) -> dict[str, Any] | None:
    """What the command line was, and where; None for the job of a program. Raises ``JobError`` where that is lost."""
    import json

    from ringpool.errors import JobError

    if not job.spec:
        return None
    try:
        call = json.loads(job.spec)
        _task_of(call["call"])
        os.fspath(call["cwd"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"how it was started cannot be read in its ledger ({error}); run its command again"
        raise JobError(f"job {job.identity}: {reason}") from None
    return call


def _last_run(ledger: Ledger, job: JobInfo, lock: JobLock | None) -> dict[str, Any] | None:
    run, seen = ledger.last_run(job.id), None
    while run is not None and run.ended_s is None and run != seen:
        if lock is not None and lock.holder() in (run.pid, 0):  # 0: a process that cannot be told
            return _run_facts(run, RUNNING)
        run, seen = ledger.last_run(job.id), run  # it may have ended between the two questions
    return None if run is None else _run_facts(run, KILLED if run.ended_s is None else run.outcome)


def _run_facts(run: RunInfo, outcome: str) -> dict[str, Any]:
    counts = msgspec.json.decode(run.counts) if run.counts else None
    facts = {"outcome": outcome, "pid": run.pid, "started_s": run.started_s, "ended_s": run.ended_s, "counts": counts}
    return {**facts, "is_drained": bool(run.is_drained)}


def _cause_facts(cause: Cause) -> dict[str, Any]:
    from ringpool.coordinator.ledger import State

    return {
        "kind": cause.kind,
        "state": "set aside" if cause.state == State.DEAD else "failed",
        "files": cause.n_files,
        "example": {"path": os.fsdecode(cause.input), "message": cause.message},
    }


def _in_lines(job: dict[str, Any], directory: str, *, is_last_job: bool) -> Iterator[str]:
    files = job["files"]
    yield f"job        {_what(job)}"
    yield f"last run   {_run_in_words(job['last_run'])}"
    words = [f"{files['done']} done", f"{files['failed']} failed", f"{files['set_aside']} set aside"]
    if files["retried"]:
        words.append(f"{files['retried']} retried")
    sizes = f"{size_in_words(job['input_bytes'])} of input, {size_in_words(job['output_bytes'])} of output"
    yield f"files      {', '.join(words)}; {sizes}, {job['duration_s']:.1f} s of work"
    for cause in job["causes"]:
        example = cause["example"]
        n = f"{cause['files']} {cause['kind']}"
        yield f"{cause['state']:<10} {n}, such as {example['path']}: {one_line(example['message'] or cause['kind'])}"
    if is_last_job:
        yield from _ways_on(job, directory)


def _what(job: dict[str, Any]) -> str:
    """What a job does, and what becomes of it."""
    if job["call"] is None:
        return job["identity"]
    call = job["call"]["call"]
    return " -> ".join([_task_of(call), *([", ".join(call["out"])] if "out" in call else [])])


def _task_of(call: dict[str, Any]) -> str:
    return call.get("function") or f"--exec {shlex.quote(call['command'])}"


def _ways_on(job: dict[str, Any], directory: str) -> Iterator[str]:
    run = job["last_run"]
    if run is not None and run["outcome"] == RUNNING:
        return
    if job["call"] is None:
        yield "go on      run the Python program again that ran it"
        return
    from ringpool.cli.calls import are_repeatable

    call = job["call"]["call"]
    if not are_repeatable(call.get("inputs", ()), call.get("manifest")):
        yield "go on      the same command with the same list: its inputs came from standard input"
        if job["files"]["set_aside"]:
            yield f"           {AS_FILE}, and then {command('retry', directory, '--dead')}"
        return
    label = "go on"
    for line in _commands(job, directory):
        yield f"{label:<10} {line}"
        label = ""


def _commands(job: dict[str, Any], directory: str) -> Iterator[str]:
    yield command("resume", directory)
    kinds = {cause["kind"]: None for cause in job["causes"] if cause["state"] == "failed"}
    if len(kinds) > 1:
        for kind in kinds:
            yield command("retry", directory, "--kind", kind)
    if kinds:
        yield command("retry", directory)
    if job["files"]["set_aside"]:
        yield command("retry", directory, "--dead")


def _run_in_words(run: dict[str, Any] | None) -> str:
    if run is None:
        return "none"
    began = f"began {_when(run['started_s'])}"
    if run["outcome"] == RUNNING:
        return f"{began}, runs as process {run['pid']}"
    if run["outcome"] == KILLED:
        rest = "what it had done and not written down, the next run or `ringpool clean` collects"
        return f"{began}, was killed; {'what it left is collected' if run['is_drained'] else rest}"
    how = "came to its end" if run["outcome"] == "ended" else f"was stopped ({run['outcome']})"
    return f"{began}, {how} {_when(run['ended_s'])}"


def _when(since_epoch_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since_epoch_s))


# ---- ringpool results ------------------------------------------------------------------------------------------------


@click.command(short_help="The values of the files that are done.")
@_DIRECTORY
@click.option("--format", "form", type=click.Choice(["jsonl", "csv"]), default="jsonl", help="Default: jsonl.")
def results(directory: str, form: str) -> int:
    """Write the files of DIR's last job that are done to standard output: values, outputs, sizes, digests, times.

    Paths are absolute. A value that is no plain one was pickled, and is unpickled here: ask ledgers that you trust.
    """
    from ringpool.cli import filelines
    from ringpool.coordinator.ledger import Ledger, State
    from ringpool.errors import JobMissingError

    with Ledger.open(Path(directory), create=False, read_only=True) as ledger:
        job = next(iter(ledger.jobs()), None)
        if job is None:
            raise JobMissingError(directory, "none was begun; `ringpool run` begins one")
        _find_modules_of(job)
        files = filelines.Files()
        has_header = form != "csv"
        for row in ledger.rows(job.id):
            if row.state != State.DONE:
                continue
            if not has_header:
                print_line(filelines.csv_header(len(filelines.made_of(row))))
                has_header = True
            line = files.as_object(row, os.fsdecode(row.input)) if form == "jsonl" else filelines.csv_row(row)
            print_line(line)
        if not has_header:  # most readers take a file without one for a mistake
            print_line(filelines.csv_header(_n_outputs_of(job)))
    return 0


def _n_outputs_of(job: JobInfo) -> int:
    """How many outputs each file of a job has; 0 of a program's job, where nothing tells."""
    call = _call(job)
    return 0 if call is None else len(call["call"].get("out", ()))


def _find_modules_of(job: JobInfo) -> None:
    """Values may be of classes of the job's own modules."""
    call = _call(job)
    if call is not None and not sys.flags.safe_path:
        sys.path.insert(0, call["cwd"])


# ---- ringpool clean --------------------------------------------------------------------------------------------------


@click.command(short_help="Tidy up what killed runs have left.")
@_DIRECTORY
@click.option("--ledger", "forgets", is_flag=True, help="Forget as well what is done: the next run does all of it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def clean(directory: str, forgets: bool, yes: bool) -> int:
    """Write down what killed runs of DIR had done, and remove what else they left, on disk and in /dev/shm.

    The next run does the same. Outputs that are in their places stay there, with --ledger too. That also removes what
    a run of another version of ringpool has left in /dev/shm, which else only that version can collect.
    """
    from ringpool.coordinator.joblock import JobLock
    from ringpool.coordinator.ledger import LEDGER_NAME, OWN_DIRECTORY, Ledger
    from ringpool.errors import JobMissingError, LedgerError

    place = Path(directory)
    try:
        Ledger.open(place, create=False, read_only=True).close()
    except (JobMissingError, LedgerError):
        found = place / OWN_DIRECTORY / LEDGER_NAME
        if not forgets or not os.path.lexists(found) or found.is_dir():
            raise
    if forgets and not yes:
        _confirm(directory)
    with JobLock(place) as lock:
        n_files = _collect(place, forgets=forgets)
        if forgets:
            for name in _LEDGER_FILES:
                (lock.path.parent / name).unlink(missing_ok=True)
            lock.path.unlink(missing_ok=True)
    say(f"{directory}: {counted(n_files, 'file')} found in what killed runs had left; all else of them is removed")
    if forgets:
        say(f"{directory}: the ledger is forgotten")
    return 0


def _confirm(directory: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("--ledger forgets what is done, and there is no terminal to ask: say --yes as well")
    click.confirm(f"Forget what is done in {directory}? The next run does all files again", abort=True, err=True)


def _say_forgotten(segment: str) -> None:
    say(f"/dev/shm/{segment}, which this version of ringpool cannot read, is removed; what it held is lost")


def _collect(place: Path, *, forgets: bool) -> int:
    """Drain what dead runs left, put it into the ledger if there is one that can be read; how many files."""
    from ringpool.coordinator.ledger import Ledger
    from ringpool.coordinator.leftovers import reclaim_dead
    from ringpool.coordinator.takeover import take_over_dead_runs
    from ringpool.errors import JobMissingError, LedgerError

    reclaim_dead()
    try:
        with Ledger.open(place, create=False) as ledger:
            n_files = take_over_dead_runs(place, ledger, _say_forgotten if forgets else None)
            for name in ledger.open_segments():
                ledger.forget_segment(name)
            return n_files
    except (JobMissingError, LedgerError):
        if not forgets:
            raise
    return 0

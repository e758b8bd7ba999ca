"""A worker process: attach, claim, run, commit, post.

    main -> Confinement -> attach -> initializer -> WorkerEnd -> loop:

        claim ----> for each entry: start -> run -> post -> restore ----> adapt the batch -> claim ...
          |                           |                        |
          +- None: stop, exit 0       +- False: taken back,    +- no: exit UNSOUND; finished ones are settled,
                                         claim again              unstarted ones go back, nobody is blamed

A worker that is worn out (it has run its number of tasks, or outgrown its memory) hands in what it has, and exits with
0, or in the midst of a claim with WORN_OUT. So does one that comes to a task which has killed a worker before, where
memory is limited and it is not its first: that task is to be tried alone.

Crash-only: whatever goes wrong outside a task function ends the process at once (``os._exit``), without unlocking or
tidying. That path has to be right anyway, because SIGKILL takes it; so there is no other.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

import msgspec

from ringpool import startup
from ringpool.shm import blobs, layout, segment
from ringpool.shm.claims import WorkerEnd
from ringpool.shm.layout import Encoding, Form
from ringpool.shm.results import Results
from ringpool.workers import group
from ringpool.workers.callrunner import CallRunner
from ringpool.workers.confinement import EXIT_UNSOUND, Confinement, flush, name_process
from ringpool.workers.descriptor import Descriptor
from ringpool.workers.environment import take_environment
from ringpool.workers.functions import CannotReadError
from ringpool.workers.posting import Post
from ringpool.workers.sessions import WORKER_NAME
from ringpool.workers.setup import InitializerFailure, Setup

if TYPE_CHECKING:
    from ringpool.workers.filetasks import FileRunner
    from ringpool.workers.jobtasks import JobRunner

EXIT_ORPHAN = 69  # the coordinator was gone before this process was bound to it
EXIT_BROKEN = 71  # an error outside a task function; standard error says which
EXIT_INITIALIZER = 72  # the initializer raised; a blob says what
EXIT_UNGUARDED = 74  # the program's main module, which it was importing, was about to make a pool
EXIT_WORN_OUT = 73  # its successor is to go on: it has outgrown its memory, or what comes next wants a new process
BEFORE_QUEUES = 20  # among finalizers of multiprocessing: its queues, which executors end by, are closed at 10
CLAIM_TARGET_NS = 200_000  # a claim holds about this much work: what a neighbour may have to wait
RSS_EVERY_NS = 5_000_000  # how often a worker with a limit looks at its own memory
_FILE, _VECTOR, _JOB = int(Form.FILE), int(Form.VECTOR), int(Form.JOB)
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class WorkerArguments(msgspec.Struct, frozen=True):
    """What the coordinator tells a worker.

    ``segment`` (name), ``index``, ``batch_max`` (most entries per claim), ``spins`` (before it sleeps); when it is
    replaced: after ``tasks_max`` tasks, or when its own pages have grown beyond ``rss_max_bytes``; 0: never. ``umask``:
    the coordinator's, which a fork server does not have; None: as it is. ``main_file``: of the program's main module,
    for a process that is no fork of it; None: it imports none. ``environment``: the coordinator's, where a fork server
    has an older one; None: as it is.
    """

    segment: str
    index: int
    batch_max: int
    spins: int
    tasks_max: int = 0
    rss_max_bytes: int = 0
    umask: int | None = None
    main_file: str | None = None
    environment: dict[str, str | None] | None = None


def main(arguments: WorkerArguments, guard: Descriptor, setup: Setup | None = None) -> None:
    """The body of a worker process. Returns only when told to stop."""
    code = EXIT_BROKEN
    try:
        if arguments.environment is not None:
            take_environment(arguments.environment)
        if arguments.main_file is not None:
            _import_main(arguments.main_file)
        confinement = Confinement(os.dup(guard.fileno()))
        guard.close()
        _be_main_thread()
        if arguments.umask is not None:
            os.umask(arguments.umask)
        if startup.in_fork_server:
            _renew_numpy_chance()
        Finalize(None, _end_executors, exitpriority=BEFORE_QUEUES)
        if setup is not None:
            setup.apply()
            confinement.remember()
        worker = Worker(arguments, confinement)
        name_process(f"{WORKER_NAME}{arguments.index}")  # from now on it is one
        code = worker.run()
    except ProcessLookupError:
        code = EXIT_ORPHAN
    except InitializerFailure as failure:
        _tell(arguments, failure)
        sys.exit(EXIT_INITIALIZER)  # as a program ends: queues among the initializer's arguments are flushed
    except BaseException:
        os.write(2, f"ringpool: worker {arguments.index} ({os.getpid()}) ends:\n{traceback.format_exc()}".encode())
    if code:
        flush()
        os._exit(code)


def _import_main(path: str) -> None:
    """Import the program's main module, where ``multiprocessing`` has not. It reads that module's ``__file__`` when it
    starts a process, and a script that has come to its end has none any more, see ``calls.main_file``.
    """
    if sys.modules["__main__"].__name__ == "__mp_main__" or not os.path.isfile(path):  # or it was removed meanwhile
        return
    from multiprocessing import process, spawn

    this: Any = process.current_process()
    this._inheriting = True  # as multiprocessing itself does: a pool that it makes unguarded is to be found
    try:
        spawn.import_main_path(path)
    finally:
        del this._inheriting


def _end_executors() -> None:
    """What an interpreter calls when its main thread ends. ``multiprocessing`` does that for a process of its own last,
    and first waits for its children: those of an executor that a task has left (``loky``'s, under joblib, goes on by
    itself) would wait to be told.
    """
    callbacks: list[Callable[[], object]] = getattr(threading, "_threading_atexits", [])
    while callbacks:
        with contextlib.suppress(SystemExit):
            try:
                callbacks.pop()()
            except Exception:  # each has its turn
                traceback.print_exc()


def _be_main_thread() -> None:
    """A fork has the supervisor's thread as its main thread: a daemon, as those would be that tasks start."""
    this: Any = threading.current_thread()
    this.name, this._daemonic = "MainThread", False  # the public name of the latter is for threads that have not begun


def _renew_numpy_chance() -> None:
    """NumPy's global generator begins anew, unless the program seeded it: what the fork server has imported ahead is
    the same in all workers, which would all draw the same numbers. ``random`` does so by itself after a fork.
    """
    numpy_random: Any = sys.modules.get("numpy.random")
    try:
        if numpy_random.get_bit_generator().seed_seq is not None:  # None: ``numpy.random.seed(...)`` was called
            numpy_random.seed()
    except (AttributeError, TypeError):  # not imported, or older than 1.25; a generator that the program has chosen
        return


def _tell(arguments: WorkerArguments, failure: InitializerFailure) -> None:
    """Leave word of what the initializer raised, in a blob."""
    body = msgspec.msgpack.encode(failure.args)
    blobs.write(blobs.initializer_name(arguments.segment, arguments.index), Encoding.MSGPACK, body)


class Worker:
    """The loop of one worker process. ``ringpool.shm`` keeps it safe; the runners know what a task is."""

    def __init__(self, arguments: WorkerArguments, confinement: Confinement) -> None:
        self.confinement = confinement
        self.segment = segment.attach(arguments.segment)
        self.end = WorkerEnd(self.segment, arguments.index, arguments.spins)
        self.results = Results(self.end.ring, arguments.index)
        self.batch_max = min(arguments.batch_max, self.end.ring.claims_max) if self.end.can_be_revoked else 1
        self.tasks_max = arguments.tasks_max or (1 << 62)
        self.rss_max_bytes = arguments.rss_max_bytes
        self.is_mortal = bool(arguments.tasks_max or arguments.rss_max_bytes)
        self.post = Post(self.segment, self.results, confinement)
        self.files: FileRunner | None = None
        self.jobs: JobRunner | None = None
        self.group = group.Group(self.post, confinement)
        self._gathers = False  # the tasks of the last claim had outputs, which are committed together
        may_go_on = self._may_go_on if arguments.rss_max_bytes else None
        self.calls = CallRunner(self.segment, self.post, confinement, self.end.grant, self._file_function, may_go_on)
        self.n_tasks = self.busy_ns = 0
        self._n_of_claim = 0  # tasks run of the claim at hand
        self._weighed_ns = 0
        self._has_outgrown = False

    def run(self) -> int:
        """Until told to stop, or worn out; the exit status."""
        claim, start, restore = self.end.claim, self.end.start, self.confinement.restore
        clock, run_task = time.monotonic_ns, self.run_task
        mean_ns, batch = float(CLAIM_TARGET_NS), 1
        while True:
            entries = claim(batch)
            if entries is None:
                return 0
            began_ns = now_ns = clock()
            n = self._n_of_claim = 0
            for entry in entries:
                if n:
                    now_ns = clock()  # what posting the result before it took is no part of this task
                if self.is_mortal and self._is_too_used_for(entry):
                    self._commit_staged()
                    return EXIT_WORN_OUT
                if not start(entry, now_ns):
                    break
                try:
                    now_ns = run_task(entry, now_ns)
                except CannotReadError as error:
                    if self.n_tasks + n:  # for what a task before has left behind: a new process will have it
                        self.end.disown()
                        return EXIT_UNSOUND
                    self.post.error(entry, error.__cause__ or error, 0)
                n += 1
                self._n_of_claim = n
                if not restore():
                    return EXIT_UNSOUND
                if self.is_mortal and self._is_worn_out(now_ns):
                    self._commit_staged()
                    if n < len(entries):
                        return EXIT_WORN_OUT
                    self.end.leave()
                    return 0
            if not n:
                continue
            self._commit_staged()
            self.confinement.disarm()
            self.n_tasks += n + self.calls.take_extra()
            self.busy_ns += now_ns - began_ns
            self.end.count(self.n_tasks, self.post.n_errors, self.busy_ns)
            mean_ns += ((now_ns - began_ns) / n - mean_ns) / 4
            batch = max(1, min(self._batch(mean_ns), self.batch_max, self.tasks_max - self.n_tasks))

    def run_task(self, entry: int, start_ns: int) -> int:
        """Run the task of ``entry`` and post its result: of whatever kind, one is posted. When that was done, ns."""
        function_id, payload, blob, form, cancelled = self.results.read_task(entry)
        if cancelled:
            self.post.cancelled(entry)
            self.calls.skip()
            return start_ns
        if form == _JOB:
            return (self.jobs or self._make_jobs()).run(entry, function_id, payload, blob, start_ns)
        if form == _FILE:
            return (self.files or self._make_files()).run(entry, function_id, payload, blob, start_ns)
        if form == _VECTOR:
            self.group.commit()  # what comes may take long
            quota = self.tasks_max - self.n_tasks - self._n_of_claim - self.calls.n_extra
            return self.calls.run_vector(entry, function_id, payload, start_ns, quota)
        return self.calls.run(entry, function_id, form, payload, blob, start_ns)

    def _make_files(self) -> FileRunner:
        from ringpool.workers.filetasks import FileRunner  # here: half of what a worker would import at its start

        self.files = FileRunner(self.segment, self.post, self.confinement, self.group)
        return self.files

    def _file_function(self, function_id: int) -> Callable[[bytes], Any]:
        return (self.files or self._make_files()).caller(function_id)

    def _make_jobs(self) -> JobRunner:
        from ringpool.workers.jobtasks import JobRunner

        self.jobs = JobRunner(self.segment, self.post, self.confinement, self.group)
        return self.jobs

    def _commit_staged(self) -> None:
        """What tasks have staged goes to its place."""
        self._gathers = bool(self.group) or self.jobs is not None
        self.group.commit()

    def _batch(self, mean_ns: float) -> int:
        """How many entries to claim, by what recent tasks took. Short ones with outputs: all that may be, since they
        are put in their places together.
        """
        if self._gathers:
            return group.TASKS_MAX if mean_ns < group.SHORT_NS else 1
        return int(CLAIM_TARGET_NS / (mean_ns + 1))

    def _is_too_used_for(self, entry: int) -> bool:
        """Whether ``entry`` is to have a process that has run nothing yet: where memory is limited, and it killed a
        worker before, it may have been for what tasks before it had left behind.
        """
        return bool(self.rss_max_bytes and layout.attempt_of(entry) and self.n_tasks + self._n_of_claim)

    def _is_worn_out(self, now_ns: int) -> bool:
        """Whether this process has run its number of tasks, or has more memory than it is to have."""
        return self.n_tasks + self._n_of_claim + self.calls.n_extra >= self.tasks_max or self._is_too_large(now_ns)

    def _may_go_on(self) -> bool:
        """Put this process right, between two items of a vector where memory is limited; whether it may go on."""
        return self.confinement.renew() and not self._is_too_large(time.monotonic_ns())

    def _is_too_large(self, now_ns: int) -> bool:
        """Whether this process has ever had more memory than it is to have. That is looked at now and then, after each
        long task: what that has left behind is not to be charged to those after it.
        """
        if self.rss_max_bytes and not self._has_outgrown and now_ns - self._weighed_ns >= RSS_EVERY_NS:
            self._weighed_ns = now_ns
            with open("/proc/self/statm", "rb", buffering=0) as statm:
                _, resident, shared, *_ = map(int, statm.read().split())
            self._has_outgrown = (resident - shared) * _PAGE_BYTES > self.rss_max_bytes
        return self._has_outgrown

"""The ways in which a function is run over its inputs while it is measured, and what one turn of each tells.

    way       runs it as                                         the clock runs
    alone     a plain loop, in a process of its own, no pool     over the loop
    filerun   Coordinator.run_file_tasks, without outputs        over the run, on a pool that is awake
    job       Job(...).run(), with outputs                       from the first file's start to the job's end
    mapped    RingPoolExecutor.map, inputs that are no files     over the map, on a pool that is awake

A pool is made for each turn, and is awake when each worker has had an input: until then nothing counts but ``start_s``.
A job has its pool for itself, so it counts all that comes after the first file's start: imports in the workers too.
Inputs that are done before ``turn_s`` is over are run through again.

The plain loop has a process of its own, so that what the function leaves there is not in the parent's figures, and a
function that ends its process ends that one.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import statistics
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle

from ringpool.bench import measure
from ringpool.coordinator.coordinator import Coordinator
from ringpool.coordinator.executor import RingPoolExecutor
from ringpool.coordinator.filerun import FileResult
from ringpool.coordinator.inputs import InputFile
from ringpool.coordinator.job import Job
from ringpool.coordinator.jobwork import Work
from ringpool.coordinator.ledger import Row, State
from ringpool.coordinator.outputs import NamedOutputs, OutputPattern
from ringpool.errors import BenchmarkError, RemoteError, words_of
from ringpool.errors.words import one_line, printable
from ringpool.workers import tasks

WAKE_S_MAX = 10.0  # for all workers to have had an input
SCRATCH_PREFIX = "ringpool-bench-"
NAME_LENGTH_MAX = 80
END_S = 5.0  # for the process of a plain loop, when it has told what it found
_DONE = int(State.DONE)


class Latency(NamedTuple):
    """Seconds that calls took in the function, in the process that ran it."""

    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float


class Failure(NamedTuple):
    """Calls that failed in one way: how many, and the first of them in words."""

    n: int
    first: str

    def in_words(self) -> str:
        """In one line, for a screen: what cannot be written there is escaped."""
        first = printable(one_line(self.first)).encode("utf-8", "backslashreplace").decode()
        return f"{self.n:,} times, first {first}"


class Spent(NamedTuple):
    """CPU seconds, and peak RSS: of the workers, the largest of which counts, and of the parent."""

    worker_cpu_s: float
    parent_cpu_s: float
    worker_rss_bytes: int
    parent_rss_bytes: int


class Turn(NamedTuple):
    """What one turn tells. ``n``: calls that came to an end; ``failures``: those that failed, by the kind of error;
    ``seconds``: they took together; ``start_s``: from the making of the pool to its first result, or the first file's
    start in a job; ``deaths``: processes that died. Without a pool the loop's process is the worker.
    """

    n: int
    failures: dict[str, Failure]
    seconds: float
    start_s: float
    latency: Latency
    deaths: int
    spent: Spent

    @property
    def n_failed(self) -> int:
        """How many calls failed."""
        return sum(failure.n for failure in self.failures.values())

    @property
    def rate_per_s(self) -> float:
        """Calls a second."""
        return self.n / self.seconds if self.seconds else 0.0


class Load(NamedTuple):
    """What is run: ``function`` of each of ``items``; for files its name, and ``InputFile``s.

    ``outputs``: patterns as the user has them, in the form of ``NamedOutputs``; they go below a directory of their own
    in ``scratch`` instead. ``turn_s``: how long a turn lasts at least; ``method``: how processes are started.
    """

    function: Callable[..., Any] | str
    items: Sequence[Any]
    params: dict[str, Any]
    outputs: tuple[str, ...]
    scratch: str
    durability: str
    turn_s: float
    method: str

    @property
    def is_files(self) -> bool:
        """Whether the inputs are files."""
        return isinstance(self.function, str)


class Tally:
    """Takes note of calls as they end."""

    def __init__(self) -> None:
        self._n = 0
        self._durations_s = array("d")
        self._failures: dict[str, Failure] = {}

    def add(self, duration_s: float | None) -> None:
        """A call has ended, and took so long; None: nobody knows, for it took its process along."""
        self._n += 1
        if duration_s is not None:
            self._durations_s.append(duration_s)

    def fail(self, kind: str, message: str, item: object) -> None:
        """The call that was just added has failed."""
        found = self._failures.get(kind)
        first = found.first if found is not None else f"{item}: {kind}: {message}"
        self._failures[kind] = Failure(1 + (found.n if found is not None else 0), first)

    def turn(self, seconds: float, spent: Spent, *, start_s: float = 0.0, deaths: int = 0) -> Turn:
        """All of it."""
        durations_s = sorted(self._durations_s)
        n = len(durations_s)
        latency = Latency(*(durations_s[min(n - 1, n * share // 100)] if n else 0.0 for share in (50, 90, 99, 100)))
        return Turn(self._n, self._failures, seconds, start_s, latency, deaths, spent)


# ---- what processes spend --------------------------------------------------------------------------------------------


class Meter:
    """What workers and parent spend from its making on."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # where the kernel cannot do that, the peak is that of the whole life
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, see proc_pid_clear_refs(5)
        self._began_own_s = time.process_time()
        self._began_workers_s = measure.cpu_s().descendants_s

    def read(self, worker_rss_bytes: int) -> Spent:
        """So far. The peak of the workers is given: some ways know it from elsewhere."""
        own_s = time.process_time() - self._began_own_s
        workers_s = measure.cpu_s().descendants_s - self._began_workers_s
        return Spent(workers_s, own_s, worker_rss_bytes, _peak_rss_bytes("self"))


def _peak_of(pids: Iterable[int]) -> int:
    peaks = [0]
    for pid in pids:
        with contextlib.suppress(OSError):  # it has just ended
            peaks.append(_peak_rss_bytes(str(pid)))
    return max(peaks)


def _peak_rss_bytes(pid: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0  # a zombie has no memory


# ---- without a pool --------------------------------------------------------------------------------------------------


def alone(load: Load) -> Turn:
    """A plain loop. A turn of no calls with a death, where the function has ended the process."""
    context: Any = multiprocessing.get_context(load.method)
    receiver, sender = context.Pipe(duplex=False)
    with receiver, _scratch(load) as directory:
        process = context.Process(target=_loop, args=(sender, cloudpickle.dumps(load), directory), name="no pool")
        process.start()
        sender.close()
        try:
            return receiver.recv()
        except EOFError:
            return Tally().turn(0.0, Spent(0.0, 0.0, 0, 0), deaths=1)
        except BaseException:
            process.kill()
            raise
        finally:
            process.join(END_S)
            process.kill()
            process.join()


def _loop(sender: Any, packed: bytes, directory: str) -> None:
    """The body of that process: call the function until the turn is over, and tell what came of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent hears Ctrl-C too, and ends it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # held back from the fork server
    threading.Thread(target=_end_with_parent, daemon=True).start()
    load: Load = pickle.loads(packed)
    calls, places = _calls(load, directory)
    tally, clock = Tally(), time.perf_counter
    inodes = _inodes(load.items) if directory else []
    seconds = cpu_s = 0.0
    while seconds < load.turn_s:
        if directory and _gone(load.items, inodes) is not None:
            break  # or what it has moved to its outputs would be removed with them: the parent says so
        _empty(directory, places)
        began_s, began_cpu_s = clock(), _cpu_s()
        for call, item in zip(calls, load.items, strict=True):
            before_s = clock()
            try:
                call()
            except BaseException as error:  # in a pool, too, SystemExit is that call's failure
                tally.add(clock() - before_s)
                tally.fail(type(error).__name__, words_of(error), name_of(item))
            else:
                tally.add(clock() - before_s)
        seconds += clock() - began_s
        cpu_s += _cpu_s() - began_cpu_s
    sender.send(tally.turn(seconds, Spent(cpu_s, 0.0, _peak_rss_bytes("self"), 0)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _calls(load: Load, directory: str) -> tuple[list[Callable[[], Any]], set[str]]:
    """A call for each item, and the directories that they write to."""
    if not isinstance(load.function, str):
        return [partial(load.function, item, **load.params) for item in load.items], set()
    name, signature = tasks.describe(load.function)
    function = partial(tasks.resolve(name), **tasks.validate(name, signature, load.params))
    sources = [signature.source_type(os.fsencode(os.path.abspath(item.path))) for item in load.items]
    if not load.outputs:
        return [partial(function, source) for source in sources], set()
    outputs = NamedOutputs(moved(load.outputs, directory))
    calls: list[Callable[[], Any]] = []
    places: set[str] = set()
    for index, (source, item) in enumerate(zip(sources, load.items, strict=True)):
        paths = outputs.paths_for(item, index)
        places.update(map(os.path.dirname, paths))
        targets = [signature.target_type(os.fsencode(path)) for path in paths]
        target = dict(zip(outputs.names, targets, strict=True)) if outputs.names else targets[0]
        calls.append(partial(function, source, target))
    return calls, places


def _empty(directory: str, places: Iterable[str]) -> None:
    """Remove what an earlier pass has written, and make the directories for the next."""
    for one in os.listdir(directory) if directory else ():
        shutil.rmtree(f"{directory}/{one}")
    for place in places:
        os.makedirs(place, exist_ok=True)


def _cpu_s() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


# ---- on a pool -------------------------------------------------------------------------------------------------------


def filerun(load: Load, workers: int) -> Turn:
    """Files without outputs: ``Coordinator.run_file_tasks``."""
    paths, tally, seconds = [item.path for item in load.items], Tally(), 0.0
    began_s = time.perf_counter()
    with Coordinator(workers, mp_context=load.method) as pool:

        def run(some: Sequence[str]) -> Iterable[FileResult]:
            return pool.run_file_tasks(load.function, some, params=load.params)

        start_s = _wake(lambda: (result.worker for result in run(paths[:workers])), workers, began_s)
        meter, n_died = Meter(), pool.stats().worker_deaths
        while seconds < load.turn_s:
            began_s = time.perf_counter()
            for result in run(paths):
                tally.add(result.duration_s)
                if result.error is not None:
                    tally.fail(_kind_of(result.error), words_of(result.error), result.path)
            seconds += time.perf_counter() - began_s
        spent, deaths = meter.read(_peak_of(pool.worker_pids)), pool.stats().worker_deaths - n_died
    return tally.turn(seconds, spent, start_s=start_s, deaths=deaths)


def mapped(load: Load, workers: int) -> Turn:
    """Inputs that are no files: ``RingPoolExecutor.map``."""
    assert not isinstance(load.function, str)
    call, tally, seconds = partial(load.function, **load.params), Tally(), 0.0
    began_s = time.perf_counter()
    with RingPoolExecutor(workers, load.method) as pool:
        few = load.items[:workers]
        pid_of = partial(_pid_after, call)
        start_s = _wake(lambda: pool.map(pid_of, few, return_exceptions=True), workers, began_s)
        meter, n_died, timed = Meter(), pool.stats().worker_deaths, partial(_timed, call)
        while seconds < load.turn_s:
            began_s = time.perf_counter()
            for item, found in zip(load.items, pool.map(timed, load.items, return_exceptions=True), strict=True):
                if isinstance(found, BaseException):
                    tally.add(None)
                    tally.fail(_kind_of(found), words_of(found), name_of(item))
                else:
                    duration_s, _value, error = found
                    tally.add(duration_s)
                    if error is not None:
                        tally.fail(error[0], error[1], name_of(item))
            seconds += time.perf_counter() - began_s
        spent, deaths = meter.read(_peak_of(pool.worker_pids)), pool.stats().worker_deaths - n_died
    return tally.turn(seconds, spent, start_s=start_s, deaths=deaths)


def _timed(call: Callable[[Any], Any], item: Any) -> tuple[float, Any, tuple[str, str] | None]:
    """In a worker: how long a call took, and its value, or its error as kind and message."""
    began_s = time.perf_counter()
    try:
        value = call(item)
    except BaseException as error:
        return time.perf_counter() - began_s, None, (type(error).__name__, words_of(error))
    return time.perf_counter() - began_s, value, None


def _pid_after(call: Callable[[Any], Any], item: Any) -> int:
    """In a worker: which one this is, once it has run ``call``."""
    with contextlib.suppress(Exception):
        call(item)
    return os.getpid()


def _wake(run: Callable[[], Iterable[Any]], workers: int, began_s: float) -> float:
    """``run`` a few items, again and again, until each of ``workers`` has had one; the seconds from ``began_s`` to the
    first result. ``run`` tells for each item who had it.
    """
    seen: set[Any] = set()
    start_s = 0.0
    while len(seen) < workers and time.perf_counter() - began_s < WAKE_S_MAX:
        for worker in run():
            start_s = start_s or time.perf_counter() - began_s
            seen.add(worker)
    return start_s


def _kind_of(error: BaseException) -> str:
    return error.type_name if isinstance(error, RemoteError) else type(error).__name__


def job(load: Load, workers: int) -> Turn:
    """Files with outputs: a ``Job``, its ledger, locks and syncs included; a new one for each pass."""
    tally, seconds, deaths, starts_s = Tally(), 0.0, 0, list[float]()
    spent: list[Spent] = []
    while seconds < load.turn_s:
        with _scratch(load) as directory:
            first_s, peak_bytes = math.inf, 0

            def note(work: Work, row: tuple[Any, ...], _value: Any) -> None:
                nonlocal first_s, peak_bytes
                found = Row(*row)
                first_s, peak_bytes = min(first_s, found.started_s), max(peak_bytes, found.peak_rss)
                tally.add(found.duration_s)
                if found.state != _DONE:
                    tally.fail(found.kind, found.message, work.path)

            meter, began_s, began_clock_s = Meter(), time.time(), time.perf_counter()
            report = _job_of(load, directory).run(workers, mp_context=load.method, on_row=note)
            start_s = max(0.0, first_s - began_s)
            seconds += time.perf_counter() - began_clock_s - start_s
            spent.append(meter.read(peak_bytes))
            starts_s.append(start_s)
            deaths += report.progress.worker_deaths
    worker_cpu_s, parent_cpu_s, worker_rss_bytes, parent_rss_bytes = zip(*spent, strict=True)
    together = Spent(sum(worker_cpu_s), sum(parent_cpu_s), max(worker_rss_bytes), max(parent_rss_bytes))
    return tally.turn(seconds, together, start_s=statistics.median(starts_s), deaths=deaths)


def _job_of(load: Load, directory: str) -> Job:
    outputs = NamedOutputs(moved(load.outputs, directory))
    patterns = [pattern.pattern for pattern in outputs.patterns]
    output = dict(zip(outputs.names, patterns, strict=True)) if outputs.names else patterns[0]
    return Job(load.function, list(load.items), output, params=load.params, durability=load.durability)


# ---- where outputs go ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _scratch(load: Load) -> Generator[str]:
    """A directory for the outputs of one pass, removed when it is over; empty where there are none.

    Where an input is not at its name any more, the only copy may be in there. Then it is kept, and ``BenchmarkError``
    says so, whatever else was about to be raised.
    """
    if not load.outputs:
        yield ""
        return
    inodes = _inodes(load.items)
    directory = tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=load.scratch)
    try:
        yield directory
    finally:
        gone = _gone(load.items, inodes)
        if gone is not None:
            raise BenchmarkError(
                str(load.function),
                f"it moves or replaces its inputs, and a benchmark calls it for each of them many times. {gone} is no "
                f"longer the file that it was. All that the function has written is kept in {directory}: move your "
                "files back from there",
            )
        _remove(directory)


def _inodes(items: Iterable[InputFile]) -> list[tuple[int, int] | None]:
    """Which file is at each input's name; None where there is none."""
    return [_inode(item.path) for item in items]


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _gone(items: Iterable[InputFile], inodes: Iterable[tuple[int, int] | None]) -> str | None:
    """The first input at whose name the file is not that of ``inodes``; None where all are."""
    pairs = zip(items, inodes, strict=True)
    return next((item.path for item, inode in pairs if inode is not None and inode != _inode(item.path)), None)


def _remove(directory: str) -> None:
    try:
        shutil.rmtree(directory)
    except BaseException:  # Ctrl-C
        shutil.rmtree(directory, ignore_errors=True)
        raise


def moved(words: Sequence[str], directory: str) -> list[str]:
    """The patterns of ``words``, in the form of ``NamedOutputs``, with ``directory`` and a number in place of what
    stands before the first name of a pattern.
    """
    outputs = NamedOutputs(words)
    root = directory.replace("{", "{{").replace("}", "}}")
    patterns = [f"{root}/{number}/{_below_base(pattern)}" for number, pattern in enumerate(outputs.patterns)]
    if not outputs.names:
        return patterns
    return [f"{name}={pattern}" for name, pattern in zip(outputs.names, patterns, strict=True)]


def _below_base(pattern: OutputPattern) -> str:
    """The text of ``pattern`` without its base, in which a brace stands twice."""
    text, at = pattern.pattern, 0
    for _ in range(pattern.base_length):
        at += 2 if text[at] in "{}" else 1
    return text[at:]


def name_of(item: object) -> str:
    """What an item is called where it has failed."""
    text = item.path if isinstance(item, InputFile) else repr(item)
    return text if len(text) <= NAME_LENGTH_MAX else text[: NAME_LENGTH_MAX - 3] + "..."

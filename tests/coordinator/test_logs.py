"""Workers' log records reach the program's loggers: all of what a worker sent before it ended, however it ended."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import select
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from tests import log_functions as work
from tests.coordinator.program import WATCHDOG_S, Program, is_alive, state_of, wait_until

from ringpool import RingPoolExecutor
from ringpool.coordinator import logs
from ringpool.coordinator.logs import LogInbox, levels_in_force
from ringpool.workers.logs import encode

METHODS = ["fork", "spawn", "forkserver"]
RunProgram = Callable[..., Program]
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


class Collector(logging.Handler):
    """Keeps what it handles; calls ``act`` with each record before."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.act: Callable[[logging.LogRecord], object] = lambda _record: None

    def emit(self, record: logging.LogRecord) -> None:
        self.act(record)
        self.records.append(record)

    @property
    def texts(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@pytest.fixture
def collector() -> Iterator[Collector]:
    """At the logger of the workers' tasks, which is as new afterwards."""
    logger = work.logger
    handler = Collector()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    logger.disabled = False
    for condition in list(logger.filters):
        logger.removeFilter(condition)


class Workers:
    """Processes of one inbox."""

    def __init__(self) -> None:
        self.inbox = LogInbox()
        self.processes: list[BaseProcess] = []

    def start(self, function: Callable[..., None], *arguments: object, method: str = "fork") -> BaseProcess:
        context: Any = multiprocessing.get_context(method)
        process = context.Process(target=work.enter, args=(self.inbox.sender(), function, *arguments))
        process.start()
        self.processes.append(process)
        return process

    def finish(self, *, timeout_s: float = WATCHDOG_S) -> None:
        """Until all have ended; then close."""
        for process in self.processes:
            process.join(WATCHDOG_S)
            assert process.exitcode is not None, "a worker hangs"
        self.inbox.close(timeout_s)


@pytest.fixture
def workers() -> Iterator[Workers]:
    own = Workers()
    yield own
    for process in own.processes:
        process.kill()
        process.join()
    own.inbox.close(WATCHDOG_S)
    wait_until(no_thread_is_left, "the end of the thread")


def no_thread_is_left() -> bool:
    return not any(thread.name == "ringpool-logs" for thread in threading.enumerate())


# ---- what arrives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_records_arrive_as_they_were(workers: Workers, collector: Collector, method: str) -> None:
    process = workers.start(work.log_an_error, method=method)
    pid = process.pid
    workers.finish()
    [record] = collector.records
    assert (record.name, record.levelno, record.levelname) == (work.NAME, logging.ERROR, "ERROR")
    assert record.getMessage() == "it failed"
    assert (record.process, record.processName) == (pid, process.name)
    assert (record.threadName, record.funcName) == ("MainThread", "log_an_error")
    text = logging.Formatter("%(message)s").format(record)
    assert text.count("LookupError: what was looked for") == 1
    assert "in log_an_error" in text
    assert "Stack (most recent call last)" in text
    assert record.items == [1, 2]  # type: ignore[attr-defined]
    assert "lock" in record.unpicklable  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_logs_as_the_coordinator_would(
    workers: Workers, collector: Collector, method: str, tmp_path: Path
) -> None:
    """Its levels are the coordinator's; no handler or filter of the coordinator acts twice; nothing is in the way."""
    loud = logging.getLogger(f"{work.NAME}.loud")
    filtered: list[str] = []
    work.logger.addFilter(lambda record: filtered.append(record.getMessage()) or True)
    loud.setLevel(logging.DEBUG)
    path = tmp_path / "described"
    try:
        workers.start(work.describe_logging, path, method=method)
        workers.start(work.log, "once", method=method)
        workers.finish()
    finally:
        loud.setLevel(logging.NOTSET)
    assert path.read_text().splitlines() == [
        "handlers ['Outlet']",
        "of others []",
        "filters []",
        "propagate True",
        f"levels {logging.getLogger().level} {logging.INFO} {logging.DEBUG}",
        "disabled to 0",
        "high True",
        "in the child False",
    ]
    assert filtered == collector.texts == ["once"]


def test_each_logger_gets_what_its_level_lets_through(workers: Workers, collector: Collector) -> None:
    loud, silent = (logging.getLogger(f"{work.NAME}.{name}") for name in ("loud", "silent"))
    loud.setLevel(5)
    silent.setLevel(logging.CRITICAL)
    try:
        workers.start(work.log_at_all_levels)
        workers.finish()
    finally:
        loud.setLevel(logging.NOTSET)
        silent.setLevel(logging.NOTSET)
    assert collector.texts == [
        *(f"{work.NAME} {level}" for level in (20, 30, 40)),
        *(f"{work.NAME}.loud {level}" for level in (5, 10, 20, 30, 40)),
    ]
    assert {record.levelname for record in collector.records if record.levelno == 5} == {"Level 5"}


def test_the_coordinators_present_state_decides(collector: Collector) -> None:
    """Level, filters, ``disabled`` and ``logging.disable``, as they are when the record comes in."""
    record = work.logger.makeRecord(work.NAME, logging.INFO, __file__, 1, "text", (), None)
    logs.hand_over(record)
    assert collector.texts == ["text"]

    work.logger.disabled = True
    logs.hand_over(record)
    work.logger.disabled = False
    work.logger.setLevel(logging.WARNING)
    logs.hand_over(record)
    work.logger.setLevel(logging.INFO)
    logging.disable(logging.INFO)
    try:
        logs.hand_over(record)
        assert levels_in_force()[1] == logging.INFO
    finally:
        logging.disable(logging.NOTSET)
    work.logger.addFilter(lambda _record: False)
    logs.hand_over(record)
    assert collector.texts == ["text"], "no more"


def test_the_coordinators_name_of_a_level_is_used_where_the_worker_has_none(collector: Collector) -> None:
    logging.addLevelName(25, "NOTICE")
    try:
        record = work.logger.makeRecord(work.NAME, 25, __file__, 1, "text", (), None)
        record.levelname = "Level 25"
        logs.hand_over(record)
    finally:
        logging.addLevelName(25, "Level 25")
    assert collector.records[0].levelname == "NOTICE"


def test_threads_of_a_worker_may_all_log(workers: Workers, collector: Collector) -> None:
    workers.start(work.log_in_threads, 4, 250)
    workers.finish()
    for i in range(4):
        assert [r.getMessage() for r in collector.records if r.threadName == f"t{i}"] == [str(n) for n in range(250)]
    assert len(collector.records) == 1_000


def test_the_records_of_a_tasks_forked_child_come_too(workers: Workers, collector: Collector) -> None:
    pid = workers.start(work.log_in_a_fork).pid
    workers.finish()
    assert collector.texts == ["before", "child", "after"]
    own, child, _ = (record.process for record in collector.records)
    assert own == pid != child


@pytest.mark.parametrize("method", METHODS)
def test_a_handler_that_an_initializer_puts_on_the_root_has_the_records(collector: Collector, method: str) -> None:
    queue = multiprocessing.get_context(method).Queue()
    for name, text in ((None, "queued"), (work.NAME, "queued and sent")):
        with RingPoolExecutor(1, method, work.queue_records, (queue, name)) as pool:
            pool.submit(work.log, text).result(WATCHDOG_S)
            assert queue.get(timeout=WATCHDOG_S).getMessage() == text
    assert collector.texts == ["queued and sent"]
    queue.close()
    queue.join_thread()


def test_a_root_handler_that_brings_records_nowhere_keeps_none(collector: Collector) -> None:
    with RingPoolExecutor(1, initializer=work.add_null_handler) as pool:
        pool.submit(work.log, "sent").result(WATCHDOG_S)
    assert collector.texts == ["sent"]


def test_a_worker_that_has_workers_passes_their_records_up(workers: Workers, collector: Collector) -> None:
    workers.start(work.be_a_coordinator)
    workers.finish()
    assert collector.texts == ["from below"]


def test_a_record_that_cannot_be_formatted_costs_itself_alone(workers: Workers, collector: Collector) -> None:
    workers.start(work.log_badly)
    workers.finish()
    assert collector.texts == ["next"]


# ---- deaths and hostile tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_a_worker_sent_before_it_was_killed_is_not_lost(
    workers: Workers, collector: Collector, method: str
) -> None:
    for n in (1, 300):
        workers.start(work.log_and_be_killed, n, method=method)
    workers.finish()
    assert [process.exitcode for process in workers.processes] == [-signal.SIGKILL] * 2
    by_process = Counter(record.process for record in collector.records)
    assert sorted(by_process.values()) == [1, 300]


def test_killed_senders_leave_no_torn_record(
    workers: Workers, collector: Collector, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Processes that log without a pause are killed; of each, what came is the beginning of what it logged."""
    for i in range(12):
        begun = tmp_path / str(i)
        process = workers.start(work.log_for_ever, i, begun)
        wait_until(begun.exists, "its records")
        process.kill()
    workers.finish()
    for i in range(12):
        words = [text.split() for text in collector.texts if text.split()[0] == str(i)]
        assert [int(n) for _, n, *_ in words] == list(range(len(words)))
        assert len(words) >= 50
        assert all(len("".join(x)) == int(n) % 97 * 10 for _, n, *x in words)
    assert capfd.readouterr().err == ""


def test_a_task_that_closes_all_descriptors_harms_nobody(
    workers: Workers, collector: Collector, tmp_path: Path
) -> None:
    path = tmp_path / "file of the task"
    process = workers.start(work.close_all_and_log, path)
    process.join(WATCHDOG_S)
    assert process.exitcode == 0
    workers.start(work.log, "of another")
    workers.finish()
    assert collector.texts == ["of another"]
    assert path.read_text() == "never in a file of the task\n", "on standard error, which the task had moved there"


def test_a_message_that_is_none_costs_itself_alone(
    workers: Workers, collector: Collector, capfd: pytest.CaptureFixture[str]
) -> None:
    sender = workers.inbox.sender()
    end = sender._end
    assert end is not None
    os.write(end.fileno(), b"no pickle")
    workers.start(work.log, "next")
    workers.finish()
    assert collector.texts == ["next"]
    assert "could not be handled" in capfd.readouterr().err


def test_what_a_worker_may_send_arrives_whole_up_to_the_limit(workers: Workers, collector: Collector) -> None:
    workers.start(work.log, "%s", "x" * 60_000)
    workers.start(work.log, "%s", "x" * 10_000_000)
    workers.finish()
    assert sorted(map(len, collector.texts))[1] == 60_000
    assert any("characters are cut here" in text for text in collector.texts)


# ---- a program that is slow, stopped, or fails -----------------------------------------------------------------------


@pytest.mark.parametrize("error", [LookupError, SystemExit, KeyboardInterrupt])
def test_a_handler_that_raises_ends_nothing(
    workers: Workers, collector: Collector, error: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    def fail_at_first(record: logging.LogRecord) -> None:
        if record.getMessage() == "0":
            raise error

    collector.act = fail_at_first
    workers.start(work.log_count, 3)
    workers.finish()
    assert collector.texts == ["1", "2"]
    assert error.__name__ in capfd.readouterr().err


def test_workers_outlive_a_handler_that_hangs(workers: Workers, collector: Collector, tmp_path: Path) -> None:
    """They wait for a while, and go on without: what they lost they say when it is over."""
    gate, lost = tmp_path / "gate", tmp_path / "lost"
    goes_on = threading.Event()
    collector.act = lambda _record: goes_on.wait(WATCHDOG_S)
    process = workers.start(work.log_around, gate, 0.01, 500)
    wait_until(lost.exists, "the end of what it had to log")
    goes_on.set()
    receiving, _ = workers.inbox._pair
    wait_until(lambda: not select.select([receiving], [], [], 0)[0], "room for more")
    notes = Collector()
    logging.getLogger("ringpool.workers").addHandler(notes)
    try:
        gate.touch()
        workers.finish()
    finally:
        logging.getLogger("ringpool.workers").removeHandler(notes)
    assert process.exitcode == 0
    n_arrived = len(collector.records) - 1
    assert collector.texts[-1] == "room"
    assert [text.split()[0] for text in notes.texts] == [str(500 - n_arrived)]


def test_workers_of_a_stopped_program_end_their_tasks(run_program: RunProgram) -> None:
    program = run_program(
        """
        from ringpool.coordinator.logs import LogInbox
        from tests import log_functions as work
        work.logger.setLevel("INFO")
        inbox = LogInbox()
        process = multiprocessing.get_context("fork").Process(
            target=work.enter, args=(inbox.sender(), work.log_after, Path("gate"), 0.1, 1000, Path("done")))
        process.start()
        say("started")
        process.join()
        inbox.close(30)
        """,
        top="import logging, multiprocessing",
    )
    program.wait_for("started")
    program.signal(signal.SIGSTOP, group=False)
    wait_until(lambda: state_of(program.pid) == "T", "the stop")
    program.file.with_name("gate").touch()
    wait_until(program.file.with_name("done").exists, "the end of the task")
    assert state_of(program.pid) == "T"
    program.signal(signal.SIGCONT, group=False)
    assert program.finish() == 0
    assert program.err.count("loses log records") == 1


@pytest.mark.usefixtures("no_garbage")
def test_close_does_not_wait_longer_for_handlers_than_it_is_told(
    workers: Workers, collector: Collector, capfd: pytest.CaptureFixture[str]
) -> None:
    goes_on, entered = threading.Event(), threading.Event()

    def hang(_record: logging.LogRecord) -> None:
        entered.set()
        goes_on.wait(WATCHDOG_S)

    collector.act = hang
    workers.start(work.log_count, 40)
    assert entered.wait(WATCHDOG_S)
    workers.finish(timeout_s=0.05)
    assert len(collector.records) == 0
    goes_on.set()
    workers.inbox.close(WATCHDOG_S)
    assert collector.texts == ["0"]
    assert "39 log records of workers were dropped" in capfd.readouterr().err


# ---- the inbox -------------------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.usefixtures("no_garbage")
def test_nothing_is_opened_before_the_first_sender_and_nothing_is_left(collector: Collector) -> None:
    before = open_files(), threading.active_count()
    own = Workers()
    assert (open_files(), threading.active_count()) == before
    for _ in range(3):
        own.start(work.log, "text")
    own.finish()
    for process in own.processes:
        process.close()
    assert len(collector.records) == 3
    wait_until(no_thread_is_left, "the end of the thread")
    assert (open_files(), threading.active_count()) == before


def test_close_twice_is_close_once_and_close_before_begin_is_nothing() -> None:
    idle = LogInbox()
    idle.close(0)
    idle.close(0)
    inbox = LogInbox()
    inbox.begin()
    inbox.begin()
    inbox.close(WATCHDOG_S)
    inbox.close(WATCHDOG_S)
    inbox.begin()
    wait_until(no_thread_is_left, "the end of the thread")


def test_a_sender_of_a_closed_inbox_changes_nothing() -> None:
    inbox = LogInbox()
    inbox.close(0)
    before = list(logging.getLogger().handlers)
    inbox.sender().install()
    assert logging.getLogger().handlers == before


def test_a_handler_may_close_the_inbox(workers: Workers, collector: Collector) -> None:
    collector.act = lambda _record: workers.inbox.close(WATCHDOG_S)
    workers.start(work.log, "text")
    wait_until(lambda: collector.records, "the record")
    workers.finish()
    assert collector.texts == ["text"]


def test_many_threads_may_close(workers: Workers, collector: Collector) -> None:
    workers.start(work.log_count, 50).join()
    threads = [threading.Thread(target=workers.inbox.close, args=(WATCHDOG_S,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
        assert len(collector.records) == 50, "each waits for the end"


@pytest.mark.usefixtures("no_garbage")
def test_without_a_descriptor_begin_fails_and_may_be_tried_again(collector: Collector) -> None:
    own = Workers()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(taken)]  # no hole is left below
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            own.inbox.sender()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in held:
            os.close(fd)
    own.start(work.log, "text")
    own.finish()
    assert collector.texts == ["text"]


@pytest.mark.usefixtures("no_garbage")
def test_without_a_thread_begin_fails_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, collector: Collector) -> None:
    def no_thread(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    own = Workers()
    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(OSError, match="no thread"):
            own.inbox.sender()
    assert open_files() == before
    own.start(work.log, "text")
    own.finish()
    assert collector.texts == ["text"]


@pytest.mark.usefixtures("no_garbage")
def test_a_fork_of_the_program_has_no_part_in_it(workers: Workers, collector: Collector) -> None:
    """It may close and fork as it likes, and its pool goes on in the parent."""
    sender = workers.inbox.sender()
    sockets = [os.readlink(f"/proc/self/fd/{end.fileno()}") for end in workers.inbox._pair]
    pid = os.fork()
    if not pid:
        code = 1
        try:
            workers.inbox.close(WATCHDOG_S)
            workers.inbox.begin()
            own = [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
            receiving, sending = sockets
            targets = Counter(
                os.readlink(f"/proc/self/fd/{fd}") for fd in own if os.path.lexists(f"/proc/self/fd/{fd}")
            )
            code = 0 if targets[receiving] == 0 and targets[sending] == 1 else 2  # 1: the sender's, of a worker
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    del sender
    workers.start(work.log, "still here")
    workers.finish()
    assert collector.texts == ["still here"]


def test_forks_while_records_come_in_do_not_hang(run_program: RunProgram) -> None:
    """Each logs to the file that the thread writes to all the time."""
    program = run_program(
        """
        from ringpool.coordinator.logs import LogInbox
        from tests import log_functions as work
        logging.basicConfig(filename="log", level=logging.INFO)
        inbox = LogInbox()
        process = multiprocessing.get_context("fork").Process(
            target=work.enter, args=(inbox.sender(), work.log_for_ever, 0, Path("begun")))
        process.start()
        while not os.path.exists("begun"):
            select.select([], [], [], 0.005)
        for i in range(100):
            pid = os.fork()
            if not pid:
                signal.alarm(60)
                logging.getLogger("forked").info("%d", i)
                inbox.close(30)
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        process.kill()
        process.join()
        inbox.close(30)
        lines = Path("log").read_text().splitlines()
        assert [line for line in lines if "forked" in line] == [f"INFO:forked:{i}" for i in range(100)]
        """,
        top="import logging, multiprocessing",
    )
    assert program.finish() == 0, program.err
    program.assert_nothing_is_left()


def test_a_fork_does_not_wait_for_ever_for_a_handler(workers: Workers, collector: Collector) -> None:
    goes_on, entered = threading.Event(), threading.Event()

    def hang(_record: logging.LogRecord) -> None:
        entered.set()
        goes_on.wait(WATCHDOG_S)

    collector.act = hang
    workers.start(work.log_count, 3)
    assert entered.wait(WATCHDOG_S)
    pid = os.fork()
    if not pid:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert not goes_on.is_set()
    goes_on.set()
    workers.finish()
    assert collector.texts == ["0", "1", "2"]


def test_a_handler_may_fork(workers: Workers, collector: Collector) -> None:
    def fork(_record: logging.LogRecord) -> None:
        pid = os.fork()
        if not pid:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7

    collector.act = fork
    workers.start(work.log_count, 3)
    workers.finish()
    assert collector.texts == ["0", "1", "2"]


@pytest.mark.parametrize("half", ["pause", "go_on"])
def test_half_of_what_belongs_around_a_fork_holds_nobody_up_for_ever(
    workers: Workers, collector: Collector, half: str
) -> None:
    """The other half fell to Ctrl-C."""
    workers.inbox.begin()
    for _ in range(3):
        getattr(workers.inbox, half)()
    workers.start(work.log_count, 20)
    workers.finish()
    assert len(collector.records) == 20


def test_a_program_that_is_killed_leaves_a_worker_that_can_end(run_program: RunProgram) -> None:
    """Without its coordinator's bonds, even: what it logs goes nowhere, and it does not wait."""
    program = run_program(
        """
        from ringpool.coordinator.logs import LogInbox
        from tests import log_functions as work
        work.logger.setLevel("INFO")
        inbox = LogInbox()
        process = multiprocessing.get_context("fork").Process(
            target=work.enter, args=(inbox.sender(), work.log_around, Path("gate").resolve(), 30.0, 3))
        process.start()
        say("worker", process.pid)
        wait()
        """,
        top="import logging, multiprocessing",
    )
    pid = int(program.wait_for("worker"))
    lost = program.file.with_name("lost")
    wait_until(lost.exists, "its first records")
    program.signal(signal.SIGKILL, group=False)
    program.finish()
    assert is_alive(pid)
    program.file.with_name("gate").touch()
    wait_until(lambda: not is_alive(pid), "the worker's end")


def test_the_message_of_the_largest_record_fits_the_buffer() -> None:
    inbox = LogInbox()
    inbox.begin()
    try:
        receiving, sending = inbox._pair
        record = work.logger.makeRecord(work.NAME, logging.INFO, __file__, 1, "x" * 10_000_000, (), None)
        message = encode(record, inbox._message_bytes_max)
        assert len(message) > inbox._message_bytes_max // 4
        assert sending.send(message) == len(message)
        wait_until(lambda: not select.select([receiving], [], [], 0)[0], "its being read")
    finally:
        inbox.close(WATCHDOG_S)

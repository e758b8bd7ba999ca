"""The end of a pool and of its program, in whichever way: no hang, no process, nothing in ``/dev/shm``."""

from __future__ import annotations

import gc
import os
import pty
import signal
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from tests import task_functions as tasks
from tests.coordinator.program import (
    WATCHDOG_S,
    Program,
    is_alive,
    shared_memory_of,
    state_of,
    wait_until,
    wait_until_gone,
)
from tests.crash.harness import World

from ringpool import Coordinator, RingPoolExecutor
from ringpool.coordinator.balance import Balance
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import CoordinatorClosedError
from ringpool.shm.dispatch import Task
from ringpool.shm.results import Results

MakeFiles = Callable[[int], list[Path]]
RunProgram = Callable[..., Program]


# ---- close -----------------------------------------------------------------------------------------------------------


def test_close_runs_what_is_queued(files: MakeFiles) -> None:
    own = Coordinator(2, ring_slots=16)
    futures = [own.submit_file_task(tasks.name, path) for path in files(500)]
    own.close()
    assert [future.result(0) for future in futures] == [f"{i:05}" for i in range(500)]
    assert own.worker_pids == ()


def test_a_task_submitted_just_before_close_is_run(file: Path) -> None:
    for _ in range(10):
        with Coordinator(1) as own:
            future = own.submit_file_task(tasks.size, file)
        assert future.result(0) == 5


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_an_executor_that_a_task_has_left_ends_with_its_worker(run_program: RunProgram, method: str) -> None:
    """By itself: ``multiprocessing`` would wait for its processes, who would wait to be told."""
    program = run_program(
        f"""
        if __name__ == "__main__":
            with RingPoolExecutor(1, {method!r}) as pool:
                child = pool.submit(functions.leave_an_executor).result()
            assert not os.path.exists(f"/proc/{{child}}")
        """,
        top="from ringpool import RingPoolExecutor\nfrom tests.coordinator import call_functions as functions\n",
    )
    assert program.finish() == 0, program.err
    assert program.err == ""
    program.assert_nothing_is_left()


def test_close_twice_is_close_once(file: Path) -> None:
    own = Coordinator(1)
    future = own.submit_file_task(tasks.size, file)
    own.close()
    own.close(cancel=True)
    assert own.wait_for_task_result(future.task_id, 0) == 5


def test_many_threads_may_close(file: Path) -> None:
    own = Coordinator(2)
    futures = [own.submit_file_task(tasks.size, file) for _ in range(100)]
    threads = [threading.Thread(target=own.close) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WATCHDOG_S)
    assert [future.result(0) for future in futures] == [5] * 100


def test_a_closed_pool_refuses_tasks(file: Path) -> None:
    own = Coordinator(1)
    run = own.run_file_tasks(tasks.size, [file])
    own.close()
    with pytest.raises(CoordinatorClosedError):
        own.submit_file_task(tasks.size, file)
    with pytest.raises(CoordinatorClosedError):
        own.run_file_tasks(tasks.size, [file])
    with pytest.raises(CoordinatorClosedError):
        next(run)
    assert own.stats().workers_alive == 0


def test_a_pool_that_did_nothing_closes(file: Path) -> None:
    for _ in range(3):
        Coordinator(2).close()


@pytest.mark.parametrize("wait", [True, False])
def test_an_executor_that_had_no_task_is_shut_down_with_its_futures_cancelled(wait: bool) -> None:
    executor = RingPoolExecutor(1)
    closing = threading.Thread(target=executor.shutdown, args=(wait,), kwargs={"cancel_futures": True}, daemon=True)
    closing.start()
    closing.join(WATCHDOG_S)
    assert not closing.is_alive()
    wait_until(lambda: "ringpool-closer" not in [each.name for each in threading.enumerate()], "the end of the pool")
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(len, "abc")


def test_futures_are_cancelled_at_once_while_every_worker_is_busy(file: Path, tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    executor = RingPoolExecutor(1)
    held = executor.submit(tasks.hold, file, gate=str(gate), begun=str(begun))
    wait_until(begun.exists, "the task's begin")
    waiting = [executor.submit(len, "abc") for _ in range(50)]
    told = threading.Event()
    waiting[-1].add_done_callback(lambda _: told.set())
    executor.shutdown(wait=False, cancel_futures=True)
    done, _ = wait(waiting, WATCHDOG_S)
    assert len(done) == len(waiting)
    assert all(future.cancelled() for future in waiting)
    assert told.wait(WATCHDOG_S)
    assert not held.done()
    gate.touch()
    assert held.exception(WATCHDOG_S) is None


def test_a_callback_that_ends_a_shutdown_leaves_no_future_pending(file: Path, tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    executor = RingPoolExecutor(1)
    executor.submit(tasks.hold, file, gate=str(gate), begun=str(begun))
    wait_until(begun.exists, "the task's begin")
    waiting = [executor.submit(len, "abc") for _ in range(3000)]
    waiting[2000].add_done_callback(lambda _: sys.exit(3))
    with pytest.raises(SystemExit):
        executor.shutdown(cancel_futures=True)
    done, pending = wait(waiting, WATCHDOG_S)
    assert not pending
    assert done == set(waiting)


def test_executors_that_had_no_task_leave_no_descriptors() -> None:
    def n_descriptors() -> int:
        gc.collect()  # the mapping of a segment goes with the last reference to it
        return len(os.listdir("/proc/self/fd"))

    def make_and_shut_down() -> None:
        executor = RingPoolExecutor(1)
        executor.shutdown()
        executor.shutdown(cancel_futures=True)

    make_and_shut_down()
    before = n_descriptors()
    for _ in range(5):
        make_and_shut_down()
    assert n_descriptors() <= before  # what tests before have left to the collector may go meanwhile


def test_close_with_cancel_drops_what_no_worker_has(file: Path, files: MakeFiles, tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    own = Coordinator(1, ring_slots=8)
    held = own.submit_file_task(tasks.hold, file, params={"gate": str(gate), "begun": str(begun)})
    wait_until(begun.exists, "the task's begin")
    [other] = files(1)
    waiting = [own.submit_file_task(tasks.append_line, other) for _ in range(50)]
    closing = threading.Thread(target=lambda: own.close(cancel=True))
    closing.start()
    wait_until(lambda: all(future.cancelled() for future in waiting), "those in the ring, too")
    gate.touch()
    closing.join(WATCHDOG_S)
    assert not closing.is_alive()
    assert held.exception(0) is None
    assert wait(waiting, 0).not_done == set()
    assert all(future.cancelled() for future in waiting)
    with pytest.raises(CancelledError):
        waiting[0].result(0)
    assert other.read_text() == "00000"


def test_an_exception_in_the_block_cancels_what_has_not_begun(file: Path, tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with pytest.raises(LookupError), Coordinator(1, ring_slots=8) as own:  # noqa: PT012
        held = own.submit_file_task(tasks.hold, file, params={"gate": str(gate), "begun": str(begun)})
        wait_until(begun.exists, "the task's begin")
        waiting = [own.submit_file_task(tasks.size, file) for _ in range(20)]
        waiting[-1].add_done_callback(lambda _: gate.touch())
        raise LookupError
    assert held.exception(0) is None
    assert all(future.cancelled() for future in waiting)


@pytest.mark.parametrize(("n_begun", "n_kept"), [(0, 1), (1, 1), (2, 2), (4, 4)])
def test_what_a_worker_has_claimed_and_not_begun_is_refused_but_for_the_first(n_begun: int, n_kept: int) -> None:
    with World() as world:
        end, worker = world.coordinator(), world.worker(0)
        world.publish(end, 8)
        entries = worker.exchange(4, False)
        for entry in entries[:n_begun]:
            assert worker.start(entry, 0)
        Balance(end, lambda entry: Ticket(Task(0, b""), None, None, None)).refuse_claimed()
        refused = [bool(Results(worker.ring, 0).read_task(entry)[4]) for entry in entries]
        assert refused == [False] * n_kept + [True] * (4 - n_kept)


@pytest.mark.parametrize("cancel", [False, True])
def test_a_close_in_a_callback_hangs_nobody(file: Path, cancel: bool) -> None:
    """It may be refused; whatever it does, the pool can be closed afterwards, and every future ends."""
    own = Coordinator(2)
    called = threading.Event()

    def close(_future: object) -> None:
        try:
            own.close(cancel=cancel)
        finally:
            called.set()

    own.submit_file_task(tasks.size, file).add_done_callback(close)
    futures = []
    try:
        for _ in range(100):
            futures.append(own.submit_file_task(tasks.size, file))
    except CoordinatorClosedError:
        pass
    assert called.wait(WATCHDOG_S)
    closing = threading.Thread(target=own.close, daemon=True)
    closing.start()
    closing.join(WATCHDOG_S)
    assert not closing.is_alive()
    assert wait(futures, WATCHDOG_S).not_done == set()


def test_closing_while_other_threads_submit_leaves_no_future_behind(file: Path) -> None:
    for _ in range(5):
        own = Coordinator(1, ring_slots=16)
        futures: list[object] = []
        started = threading.Event()

        def submit(own: Coordinator = own, futures: list[object] = futures, started: threading.Event = started) -> None:
            try:
                while True:
                    futures.append(own.submit_file_task(tasks.size, file))
                    if len(futures) > 100:
                        started.set()
            except CoordinatorClosedError:
                started.set()

        threads = [threading.Thread(target=submit) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert started.wait(WATCHDOG_S)
        own.close(cancel=True)
        for thread in threads:
            thread.join(WATCHDOG_S)
            assert not thread.is_alive()
        assert wait(futures, WATCHDOG_S).not_done == set()  # type: ignore[type-var]


class SlowContext(ForkServerContext):
    """Threads that are asked to wait do so where they want to know the start method: between look and act."""

    def __init__(self) -> None:
        self.asked, self.may_go_on = threading.Event(), threading.Event()
        self.slow: threading.Thread | None = None

    def get_start_method(self, allow_none: bool = False) -> str:
        if threading.current_thread() is self.slow:
            self.asked.set()
            assert self.may_go_on.wait(WATCHDOG_S)
        return super().get_start_method(allow_none)


def test_a_first_task_that_comes_while_its_pool_is_shut_down_starts_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    context, raised = SlowContext(), list[BaseException]()
    executor = RingPoolExecutor(1, context)

    def submit() -> None:
        try:
            executor.submit(len, "abc")
        except RuntimeError as error:
            raised.append(error)

    context.slow = thread = threading.Thread(target=submit)
    thread.start()
    assert context.asked.wait(WATCHDOG_S)
    executor.shutdown()
    context.may_go_on.set()
    thread.join(WATCHDOG_S)
    assert [str(error) for error in raised] == ["cannot schedule new futures after shutdown"]
    assert "ringpool-pump" not in [each.name for each in threading.enumerate()]
    assert capfd.readouterr().err == ""


class SlowToPickle:
    """A function, or an argument, that is still being pickled when its pool is shut down."""

    def __init__(self) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, x: object) -> object:
        return x

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        self.begun.set()
        assert self.may_go_on.wait(WATCHDOG_S)
        return bytes, (bytes(10_000),)


@pytest.mark.parametrize("what", ["function", "argument"])
def test_what_was_pickled_for_too_long_leaves_nothing_in_a_pool_that_is_gone(what: str) -> None:
    executor, slow, raised = RingPoolExecutor(1), SlowToPickle(), list[BaseException]()
    executor.submit(len, "abc").result(WATCHDOG_S)

    def send() -> None:
        try:
            if what == "argument":
                executor.submit(len, slow).result(WATCHDOG_S)
            else:
                executor.map(slow, [1])
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    assert slow.begun.wait(WATCHDOG_S)
    executor.shutdown()
    slow.may_go_on.set()
    thread.join(WATCHDOG_S)
    assert [str(error) for error in raised] == ["cannot schedule new futures after shutdown"]
    assert not shared_memory_of(os.getpid())


def test_a_run_that_is_taken_while_its_pool_closes_ends(file: Path) -> None:
    own = Coordinator(1)
    run = own.run_file_tasks(tasks.size, iter(lambda: file, None), window=50)
    assert next(run).value == 5
    closing = threading.Thread(target=own.close)
    closing.start()
    with pytest.raises(CoordinatorClosedError):
        list(run)
    closing.join(WATCHDOG_S)
    assert not closing.is_alive()


def test_results_taken_after_close_are_those_that_were_there(file: Path) -> None:
    own = Coordinator(1)
    run = own.run_file_tasks(tasks.many_bytes, [file] * 10, params={"n": 5000})
    first = next(run)
    wait_until(lambda: own.stats()[1:3] == (0, 0), "the results of what was drawn")  # on a busy machine, not all 10
    own.close()
    assert len(first.unwrap()) == 5000
    try:
        assert {len(result.unwrap()) for result in run} <= {5000}
    except CoordinatorClosedError:
        pass


# ---- programs that end -----------------------------------------------------------------------------------------------

STUCK = """
here = Path(__file__)
def hold(pool, n={workers}):
    for i in range(n):
        pool.submit_file_task(tasks.stay, here, params={{"how": {how!r}, "begun": str(here.with_name(f"begun-{{i}}"))}})
    for i in range(n):
        tasks.wait_for(here.with_name(f"begun-{{i}}"))
"""
WHERE = {
    "in a loop over results": """
        with Coordinator(2) as pool:
            for i, result in enumerate(pool.run_file_tasks(tasks.size, itertools.repeat(here))):
                if i == 300:
                    say("ready")
        """,
    "waiting for a result": """
        with Coordinator(2) as pool:
            hold(pool)
            say("ready")
            pool.submit_file_task(tasks.size, here).result()
        """,
    "waiting for a run": """
        with Coordinator(2) as pool:
            hold(pool)
            say("ready")
            list(pool.run_file_tasks(tasks.size, [here]))
        """,
    "in close": """
        pool = Coordinator(2)
        hold(pool)
        say("ready")
        pool.close()
        """,
    "without a block": """
        pool = Coordinator(2)
        hold(pool)
        say("ready")
        wait()
        """,
    "at exit": """
        pool = Coordinator(2)
        hold(pool)
        threading._register_atexit(say, "ready")  # what comes by atexit itself comes after the tasks
        """,
    "with a pool made in a thread": """
        made = []
        thread = threading.Thread(target=lambda: made.append(Coordinator(2)))
        thread.start()
        thread.join()
        with made[0] as pool:
            hold(pool)
            say("ready")
            wait()
        """,
    "with two pools": """
        with Coordinator(1) as pool, Coordinator(1) as other:
            hold(pool, 1)
            say("ready")
            list(other.run_file_tasks(tasks.size, itertools.repeat(here)))
            wait()
        """,
}


@pytest.mark.parametrize("where", WHERE)
def test_an_interrupt_ends_a_program(run_program: RunProgram, where: str) -> None:
    program = run_program(WHERE[where], top=STUCK.format(how="deaf", workers=2))
    program.wait_for("ready")
    program.signal(signal.SIGINT)
    code = program.finish()
    if where != "at exit":
        assert code == -signal.SIGINT
        assert program.err.splitlines()[-1] == "KeyboardInterrupt"
    program.assert_nothing_is_left()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_an_interrupt_while_a_worker_starts_is_none_of_its_own(run_program: RunProgram, method: str) -> None:
    """A terminal sends Ctrl-C to all. But what is no worker has it, when it comes to its work."""
    program = run_program(
        f"""
        with Coordinator(1, mp_context={method!r}) as pool:
            assert pool.submit_file_task(tasks.size, __file__).result() > 0
        context = multiprocessing.get_context({method!r})
        other = context.Process(target=print, args=("it was not interrupted",))
        other.start()
        other.join()
        say("other", other.exitcode != 0)
        """,
        top="""
        import multiprocessing

        if __name__ != "__main__":
            os.kill(os.getpid(), signal.SIGINT)  # while it imports this
        """,
    )
    assert program.wait_for("other") == "True"
    assert program.finish() == 0, program.err
    assert "not interrupted" not in program.out
    assert program.err.count("Traceback") <= 1, "the other's"
    program.assert_no_process_is_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("pool", ["a new pool", "the same pool"])
def test_a_program_that_catches_its_end_goes_on_as_before(run_program: RunProgram, pool: str, number: int) -> None:
    """What it gives out after that is run to the end, although ``sys.exit`` leaves the block."""
    program = run_program(
        f"""
        first = Coordinator(1)
        try:
            first.submit_file_task(tasks.size, __file__).result()
            os.kill(os.getpid(), {number})
            wait()
        except SystemExit as error:
            say("caught", error)
        pool = Coordinator(1) if {pool == "a new pool"} else first
        pool.submit_file_task(tasks.nap, __file__, params={{"seconds": 0.3}})
        for n in range(5):
            pool.submit_file_task(tasks.copy, __file__, f"copy{{n}}")
        sys.exit(0)
        """
    )
    assert program.wait_for("caught") == str(128 + number)
    assert program.finish() == 0, program.err
    assert len(list(program.file.parent.glob("copy?"))) == 5
    program.assert_nothing_is_left()


ENDINGS = {
    "at exit": "atexit.register(lambda: pool.submit_file_task(tasks.nap, __file__, params={'seconds': 0}))",
    "in a finalizer": """
        class Last:
            def __del__(self):
                pool.submit_file_task(tasks.nap, __file__, params={"seconds": 0})

        last = Last()
    """,
    "in a weakref's callback": """
        class Last: pass
        last = Last()
        weakref.finalize(last, lambda: pool.submit_file_task(tasks.nap, __file__, params={"seconds": 0}))
    """,
    "to another pool": """
        def end(number, frame, handler=signal.getsignal(signal.SIGTERM)):
            try:
                handler(number, frame)
            except SystemExit:
                Coordinator(1).submit_file_task(tasks.nap, __file__, params={"seconds": 0}).result()
                raise

        signal.signal(signal.SIGTERM, end)
    """,
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_task_that_is_given_out_while_a_program_ends_does_not_keep_it(run_program: RunProgram, ending: str) -> None:
    """What is queued would take ten minutes."""
    program = run_program(
        f"""
        pool = Coordinator(1)
        pool.submit_file_task(tasks.size, __file__).result()
        for _ in range(600):
            pool.submit_file_task(tasks.nap, __file__, params={{"seconds": 1}})
{textwrap.indent(textwrap.dedent(ending), " " * 8)}
        say("ready")
        wait()
        """,
        top="import weakref",
    )
    program.wait_for("ready")
    program.signal(signal.SIGTERM, group=False)
    assert program.finish() == 143
    program.assert_nothing_is_left()


def test_a_second_sighup_does_not_interrupt_what_a_program_does_after_the_first(run_program: RunProgram) -> None:
    program = run_program(
        """
        pool = Coordinator(1)
        pool.submit_file_task(tasks.size, __file__).result()
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            wait()
        except SystemExit:
            pass
        future = pool.submit_file_task(tasks.nap, __file__, params={"seconds": 0.3})
        os.kill(os.getpid(), signal.SIGHUP)
        future.result()
        say("saved")
        pool.close()
        """
    )
    assert program.wait_for("saved") == ""
    assert program.finish() == 0, program.err


def test_what_a_program_has_in_globals_ends_as_without_a_pool(run_program: RunProgram) -> None:
    program = run_program(
        """
        with Coordinator(1) as pool:
            assert pool.submit_file_task(tasks.size, __file__).result() > 0
        """,
        top="""
        class Kept:
            def __del__(self):
                os.write(1, b"ended")

        kept = Kept()
        """,
    )
    assert program.finish() == 0, program.err
    assert program.out == "ended"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "where", ["in a loop over results", "waiting for a result", "in close", "without a block", "with two pools"]
)
def test_a_signal_to_end_ends_a_program_quietly(run_program: RunProgram, where: str, number: int) -> None:
    program = run_program(WHERE[where], top=STUCK.format(how="deaf", workers=2))
    program.wait_for("ready")
    program.signal(number, group=False)
    assert program.finish() in (128 + number, -number)
    assert "Traceback" not in program.err
    program.assert_nothing_is_left()


@pytest.mark.parametrize(
    "waiting",
    [
        "pool.submit_file_task(tasks.size, here).result()",
        "pool.submit_file_task(tasks.size, here).result(1000)",
        "pool.submit_file_task(tasks.size, here).exception()",
        "list(pool.run_file_tasks(tasks.size, [here]))",
        "list(executor.map(tasks.wait_for, [here.with_name('never')]))",
        "list(executor.map(tasks.wait_for, [here.with_name('never')], timeout=1000))",
        "pool.close()",
    ],
)
def test_a_signal_that_the_main_thread_does_not_wake_by_ends_a_program_too(
    run_program: RunProgram, waiting: str
) -> None:
    """As where it comes just when that thread goes to sleep for a lock."""
    program = run_program(
        f"""
        def end():
            select.select([], [], [], 0.5)  # it sleeps by then
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            wait()

        with Coordinator(2) as pool, RingPoolExecutor(1) as executor:
            hold(pool)
            threading.Thread(target=end, daemon=True).start()
            {waiting}
        """,
        top=STUCK.format(how="deaf", workers=2) + "from ringpool import RingPoolExecutor\n",
    )
    assert program.finish() in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert "Traceback" not in program.err
    program.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "how", ["pool.shutdown(wait=False)", "del pool", "threading.Thread(target=pool.shutdown).start()"]
)
def test_after_its_last_pool_a_program_ends_by_a_signal_as_without_one(
    run_program: RunProgram, how: str, number: int
) -> None:
    program = run_program(
        f"""
        pool = RingPoolExecutor(1)
        assert pool.submit(abs, -1).result() == 1
        calls = pool._rp_pool
        {how}
        while not calls.closed:
            select.select([], [], [], 0.01)
        say("ready")
        wait()
        """,
        top="from ringpool import RingPoolExecutor",
    )
    program.wait_for("ready")
    program.signal(number, group=False)
    assert program.finish() == -number, program.err
    program.assert_nothing_is_left()


def test_after_its_last_pool_a_program_has_its_signals_back_as_soon_as_its_main_thread_comes_by(
    run_program: RunProgram,
) -> None:
    program = run_program(
        """
        with RingPoolExecutor(1) as pool:
            assert pool.submit(abs, -1).result() == 1
            thread = threading.Thread(target=pool.shutdown)
            thread.start()
            thread.join()
        assert {signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)} == {signal.SIG_DFL}
        """,
        top="from ringpool import RingPoolExecutor",
    )
    assert program.finish() == 0, program.err


def test_a_signal_ends_a_program_whose_pool_was_made_in_a_thread(run_program: RunProgram) -> None:
    """No handler can be set there, so that the segment may stay; the next start removes it."""
    program = run_program(WHERE["with a pool made in a thread"], top=STUCK.format(how="deaf", workers=2))
    program.wait_for("ready")
    program.signal(signal.SIGTERM, group=False)
    program.finish()
    program.assert_no_process_is_left()
    with Coordinator(1):
        wait_until_gone(program.pid)


def test_interrupts_one_after_the_other_end_a_program(run_program: RunProgram) -> None:
    program = run_program(WHERE["waiting for a result"], top=STUCK.format(how="deaf", workers=2))
    program.wait_for("ready")
    while program.process.poll() is None:
        program.signal(signal.SIGINT, group=False)
        threading.Event().wait(0.003)
    program.assert_no_process_is_left()
    with Coordinator(1):
        wait_until_gone(program.pid)


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_an_interrupt_while_workers_start_ends_a_program(run_program: RunProgram, method: str) -> None:
    program = run_program(
        f"""
        with Coordinator(4, mp_context={method!r}) as pool:
            say("ready")
            list(pool.run_file_tasks(tasks.size, itertools.repeat(__file__)))
        """
    )
    program.wait_for("ready")
    program.signal(signal.SIGINT)
    assert program.finish() == -signal.SIGINT
    program.assert_no_process_is_left()
    assert shared_memory_of(program.pid) == set()
    assert program.err.count("Traceback") <= 1, program.err


@pytest.mark.parametrize("blocks", [False, True])
def test_an_interrupt_while_the_fork_server_imports_is_none_of_its_own(run_program: RunProgram, blocks: bool) -> None:
    """And it is as it was for processes that are none of ours, whether the program has it blocked or not."""
    program = run_program(
        f"""
        multiprocessing.set_forkserver_preload(["__main__", "tests.coordinator.interrupted_import"])
        resource_tracker.ensure_running()  # it would unblock that
        if {blocks}:
            signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGINT}})
        context = multiprocessing.get_context("forkserver")
        with Coordinator(1, mp_context=context) as pool:
            assert pool.submit_file_task(tasks.size, __file__).result() > 0
            server = forkserver._forkserver._forkserver_pid
            other = context.Process(target=tell_blocked)
            other.start()
            other.join()
            assert forkserver._forkserver._forkserver_pid == server
        """,
        top="""
        import multiprocessing
        from multiprocessing import forkserver, resource_tracker

        def tell_blocked():
            say("blocked", signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        """,
    )
    assert program.finish() == 0, program.err
    assert program.wait_for("blocked") == str(blocks)
    assert program.err == ""
    program.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("end", "code", "ran"),
    [
        ("raise LookupError('at the end')", 1, False),
        ("sys.exit(3)", 3, None),
        ("return", 0, True),
    ],
)
@pytest.mark.parametrize("block", [True, False])
def test_a_program_that_ends_with_tasks_queued(
    run_program: RunProgram, end: str, code: int, ran: bool | None, block: bool
) -> None:
    """Drained where all went well; not where it ended by an error."""
    begin = "with Coordinator(2) as pool:" if block else "pool = Coordinator(2)\n        if True:"
    program = run_program(
        f"""
        paths = [Path(__file__).with_name(f"file-{{i:03}}") for i in range(300)]
        for path in paths:
            path.touch()
        {begin}
            for path in paths:
                pool.submit_file_task(tasks.append_line, path)
            {end}
        """
    )
    assert program.finish() == code
    if ran:
        assert {path.read_text() for path in program.file.parent.glob("file-*")} == {"run\n"}
    if ran is False:
        assert "at the end" in program.err.splitlines()[-1]
    program.assert_nothing_is_left()


def test_a_program_that_fails_beside_a_stuck_task_ends(run_program: RunProgram) -> None:
    program = run_program(
        """
        pool = Coordinator(2)
        hold(pool)
        raise LookupError("at the end")
        """,
        top=STUCK.format(how="deaf", workers=2),
    )
    assert program.finish() == 1
    program.assert_nothing_is_left()


def test_a_program_that_leaves_its_pool_to_a_daemon_thread_ends(run_program: RunProgram) -> None:
    program = run_program(
        """
        pool = Coordinator(2)
        begun = threading.Event()
        def use():
            for result in pool.run_file_tasks(tasks.size, itertools.repeat(__file__)):
                begun.set()
        threading.Thread(target=use, daemon=True).start()
        begun.wait()
        """
    )
    assert program.finish() == 0, program.err
    program.assert_nothing_is_left()


def test_a_program_may_end_with_a_run_half_taken(run_program: RunProgram) -> None:
    program = run_program(
        """
        global run
        pool = Coordinator(2)
        run = pool.run_file_tasks(tasks.many_bytes, itertools.repeat(__file__), params={"n": 5000})
        next(run)
        """
    )
    assert program.finish() == 0, program.err
    program.assert_nothing_is_left()
    assert program.err == ""


def test_a_program_may_end_at_once_and_leave_it_to_the_next_start(run_program: RunProgram) -> None:
    program = run_program(
        """
        pool = Coordinator(2)
        hold(pool)
        os._exit(4)
        """,
        top=STUCK.format(how="subprocess", workers=2),
    )
    assert program.finish() == 4
    program.assert_no_process_is_left()
    with Coordinator(1):
        wait_until_gone(program.pid)


def test_a_fork_of_a_program_may_make_a_pool_of_its_own_and_end(run_program: RunProgram) -> None:
    program = run_program(
        """
        with Coordinator(2) as pool:
            run = pool.run_file_tasks(tasks.many_bytes, [__file__] * 100, params={"n": 5000})
            next(run)
            child = os.fork()
            if not child:
                with Coordinator(1) as own:
                    assert own.submit_file_task(tasks.size, __file__).result() > 0
                sys.exit(6)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
            assert [len(r.unwrap()) for r in run] == [5000] * 99
        say("done")
        """
    )
    assert program.finish() == 0, program.err
    assert program.err == ""
    program.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_fork_of_a_program_as_if_there_were_no_pool(run_program: RunProgram, number: int) -> None:
    program = run_program(
        f"""
        def in_child():
            try:
                say("begun", os.getpid())
                wait()
            finally:
                say("unwound")
        with Coordinator(1) as pool:
            child = multiprocessing.get_context("fork").Process(target=in_child)
            child.start()
            child.join()
            say("child", child.exitcode)
            own = os.fork()
            if not own:
                with Coordinator(1):
                    say("again", os.getpid())
                    wait()
            say("own", os.waitstatus_to_exitcode(os.waitpid(own, 0)[1]))
            assert pool.submit_file_task(tasks.size, __file__).result() > 0
            os.kill(os.getpid(), {number})
            wait()
        """,
        top="import multiprocessing",
    )
    os.kill(int(program.wait_for("begun")), number)
    assert program.wait_for("child") == str(-number)
    os.kill(int(program.wait_for("again")), number)
    assert program.wait_for("own") == str(128 + number), "it has a pool of its own"
    assert program.finish() == 128 + number
    assert "unwound" not in program.out
    program.assert_nothing_is_left()


def test_a_stopped_program_goes_on(run_program: RunProgram) -> None:
    """Ctrl-Z stops the program, not its workers, which are of other sessions; ``fg`` lets it go on."""
    program = run_program(
        """
        with Coordinator(2) as pool:
            say("ready")
            results = [r.value for r in pool.run_file_tasks(tasks.hold, [__file__] * 2,
                params={"gate": str(here.with_name("gate")), "begun": str(here.with_name("begun"))})]
            assert len(results) == 2
        """,
        top="here = Path(__file__)",
    )
    wait_until((program.file.parent / "begun").exists, "the task's begin")
    program.signal(signal.SIGSTOP)
    wait_until(lambda: state_of(program.pid) == "T", "the program's stop")
    (program.file.parent / "gate").touch()
    program.signal(signal.SIGCONT)
    assert program.finish() == 0, program.err
    program.assert_nothing_is_left()


def test_ctrl_c_and_ctrl_z_at_a_terminal(run_program: RunProgram) -> None:
    master, terminal = pty.openpty()
    try:
        program = run_program(
            """
            import fcntl, termios
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGTSTP, lambda *_: say("stop wanted"))
            with Coordinator(2) as pool:
                hold(pool)
                say("ready", *pool.worker_pids)
                wait()
            """,
            top=STUCK.format(how="python", workers=2),
            terminal=terminal,
        )
        pids = [int(word) for word in program.wait_for("ready").split()]
        os.write(master, b"\x1a")
        program.wait_for("stop wanted")
        assert all(is_alive(pid) for pid in pids), "the keys are not for workers"
        os.write(master, b"\x03")
        assert program.finish() == -signal.SIGINT
        program.assert_nothing_is_left()
    finally:
        os.close(master)
        os.close(terminal)


def test_a_program_whose_terminal_goes_away_ends(run_program: RunProgram) -> None:
    master, terminal = pty.openpty()
    program = run_program(
        """
        import fcntl, termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        with Coordinator(2) as pool:
            hold(pool)
            say("ready")
            wait()
        """,
        top=STUCK.format(how="deaf", workers=2),
        terminal=terminal,
    )
    os.close(terminal)
    try:
        program.wait_for("ready")
    finally:
        os.close(master)
    assert program.finish() in (128 + signal.SIGHUP, -signal.SIGHUP)
    program.assert_nothing_is_left()


# ---- a long TMPDIR ---------------------------------------------------------------------------------------------------


def test_a_long_path_for_temporary_files_is_no_hindrance(run_program: RunProgram, tmp_path: Path) -> None:
    """The fork server listens at a path there, of which the kernel takes 107 bytes."""
    place = tmp_path / ("t" * 100)
    place.mkdir()
    program = run_program(
        """
        from multiprocessing import process
        with Coordinator(1) as pool:
            assert pool.submit_file_task(tasks.size, __file__).result() > 0
        say("made", process.current_process()._config["tempdir"])
        """,
        top=f"""
        os.environ["TMPDIR"] = {str(place)!r}
        """,
    )
    assert program.finish() == 0, program.err
    assert not os.path.exists(program.wait_for("made"))
    assert not list(place.iterdir())
    program.assert_nothing_is_left()


# ---- no current directory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_a_pool_in_a_directory_that_was_removed_is_refused_in_words(run_program: RunProgram, method: str) -> None:
    program = run_program(
        f"""
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
        try:
            Coordinator(1, mp_context={method!r})
        except WorkingDirectoryError as error:
            say("refused", error)
        """
    )
    assert program.finish() == 0, program.err
    assert "was removed" in program.wait_for("refused")
    program.assert_nothing_is_left()


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_a_pool_whose_directory_is_removed_says_so_and_goes_on_in_another_one(
    run_program: RunProgram, method: str
) -> None:
    program = run_program(
        f"""
        os.mkdir("gone")
        os.chdir("gone")
        for is_left in (True, False):
            with Coordinator(1, mp_context={method!r}) as pool:
                size = pool.submit_file_task(tasks.size, __file__).result()
                os.rmdir("../gone")
                os.kill(*pool.worker_pids, signal.SIGKILL)
                future = pool.submit_file_task(tasks.size, __file__)
                if is_left:
                    os.chdir("..")
                try:
                    say("as before", future.result() == size)
                except CrashLoopError as error:
                    say("refused", error)
            if is_left:
                os.mkdir("gone")
                os.chdir("gone")
        """
    )
    assert program.finish() == 0, program.err
    assert program.wait_for("as before") == "True"
    assert "the current directory was removed, and workers begin in it; go to another" in program.wait_for("refused")
    program.assert_nothing_is_left()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_pool_in_a_directory_that_its_user_may_not_enter_is_refused_in_words(run_program: RunProgram) -> None:
    """As after ``sudo -u somebody`` in root's home."""
    program = run_program(
        """
        os.mkdir("closed", 0o700)
        os.chdir("closed")
        os.seteuid(1)
        try:
            Coordinator(1)
        except WorkingDirectoryError as error:
            say("refused", error)
        """
    )
    assert program.finish() == 0, program.err
    assert "closed may not be entered by user 1" in program.wait_for("refused")
    program.assert_nothing_is_left()

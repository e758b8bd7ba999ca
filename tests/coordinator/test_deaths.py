"""Workers die, in every way, and the coordinator too: what it costs, and that nothing is left alive."""

from __future__ import annotations

import os
import signal
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, wait
from pathlib import Path

import psutil
import pytest
from tests import task_functions as tasks
from tests.coordinator.program import (
    WATCHDOG_S,
    Program,
    is_alive,
    kill_worker,
    shared_memory_of,
    state_of,
    wait_until,
    wait_until_gone,
)
from tests.crash.harness import World

from ringpool import Coordinator, PathLock, RingPoolExecutor, WorkerDiedError
from ringpool.coordinator.estate import Estates
from ringpool.coordinator.futures import TaskFuture
from ringpool.coordinator.leftovers import reclaim_dead
from ringpool.coordinator.supervisor import Death
from ringpool.shm import layout, segment
from ringpool.shm.owner import this_process
from ringpool.shm.ring import Ring

MakeFiles = Callable[[int], list[Path]]
RunProgram = Callable[..., Program]
START_METHODS = ["forkserver", "spawn", "fork"]


def hold(pool: Coordinator, file: Path, place: Path, name: str = "begun") -> tuple[TaskFuture, int]:
    """A task that runs until ``place/gate`` appears, and the pid of its worker."""
    begun = place / name
    future = pool.submit_file_task(tasks.hold, file, params={"gate": str(place / "gate"), "begun": str(begun)})
    wait_until(begun.exists, "the task's begin")
    return future, int(begun.read_text())


# ---- a task that kills its worker ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "number", "exitcode"),
    [
        ("kill", signal.SIGKILL, None),
        ("terminate", signal.SIGTERM, None),
        ("abort", signal.SIGABRT, None),
        ("segfault", signal.SIGSEGV, None),
        ("group", signal.SIGKILL, None),
        ("exit", None, 7),
        ("exit well", None, 0),
    ],
)
def test_a_task_that_kills_its_worker_is_tried_again_and_then_fails(
    pool: Coordinator, file: Path, how: str, number: int | None, exitcode: int | None
) -> None:
    before = pool.stats()
    error = pool.submit_file_task(tasks.die, file, params={"how": how}).exception(WATCHDOG_S)
    assert isinstance(error, WorkerDiedError)
    assert isinstance(error, BrokenExecutor), "what users of other pools catch"
    assert (error.signal, error.exitcode, error.deaths) == (number, exitcode, 3)
    assert error.pid > 0
    assert str(file) in error.task
    assert str(file) in str(error)
    after = pool.stats()
    assert after.worker_deaths == before.worker_deaths + 3
    assert after.retried == before.retried + 2
    assert pool.submit_file_task(tasks.size, file).result(WATCHDOG_S) == 5


def test_a_death_in_a_run_is_a_result_with_an_error(pool: Coordinator, file: Path) -> None:
    [result] = pool.run_file_tasks(tasks.die, [file])
    assert isinstance(result.error, WorkerDiedError)
    assert result.attempts == 3
    assert result.worker in (-1, 0, 1)


def test_a_task_whose_worker_died_once_succeeds(pool: Coordinator, files: MakeFiles, tmp_path: Path) -> None:
    paths = files(3)
    results = {r.path: r for r in pool.run_file_tasks(tasks.die_once, paths, params={"marks": str(tmp_path)})}
    assert {r.value for r in results.values()} == {path.name for path in paths}
    assert {r.attempts for r in results.values()} == {2}


def test_the_number_of_attempts_can_be_chosen(file: Path) -> None:
    with Coordinator(1, attempts_max=1) as once:
        error = once.submit_file_task(tasks.die, file).exception(WATCHDOG_S)
        assert isinstance(error, WorkerDiedError)
        assert error.deaths == 1
        assert once.stats().worker_deaths == 1


def test_neighbours_of_a_killer_are_not_blamed(pool: Coordinator, files: MakeFiles) -> None:
    """They are short, so that the worker that dies holds others which it has not begun."""
    paths = files(2000)
    killers = set(paths[500::400])
    for path in killers:
        path.write_text("die")
    results = {r.path: r for r in pool.run_file_tasks(tasks.die_if_marked, paths)}
    assert len(results) == len(paths)
    assert {path for path, result in results.items() if not result.ok} == killers
    for path, result in results.items():
        if path in killers:
            assert isinstance(result.error, WorkerDiedError)
            assert str(path) in result.error.task
        else:
            assert (result.value, result.attempts) == (path.name, 1)


def test_each_neighbour_of_a_killer_runs_once(pool: Coordinator, files: MakeFiles, tmp_path: Path) -> None:
    paths = files(300)
    victim = tmp_path / "victim"
    victim.write_text("die")
    futures = [pool.submit_file_task(tasks.append_line, path) for path in paths[:150]]
    killer = pool.submit_file_task(tasks.die, victim)
    futures += [pool.submit_file_task(tasks.append_line, path) for path in paths[150:]]
    wait(futures, WATCHDOG_S)
    assert isinstance(killer.exception(WATCHDOG_S), WorkerDiedError)
    assert [path.read_text() for path in paths] == [f"{path.name}run\n" for path in paths]


# ---- a worker that is killed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_killed_in_a_task_is_replaced_and_the_task_done(
    pool: Coordinator, file: Path, tmp_path: Path, number: int
) -> None:
    future, pid = hold(pool, file, tmp_path)
    (tmp_path / "begun").unlink()
    os.kill(pid, number)
    wait_until((tmp_path / "begun").exists, "the second attempt")
    (tmp_path / "gate").touch()
    assert future.result(WATCHDOG_S) != pid
    wait_until(lambda: len(pool.worker_pids) == 2, "both workers")


def test_idle_workers_may_be_killed_again_and_again(file: Path, tmp_path: Path) -> None:
    """While the other one is busy with a task, which is none the worse for it."""
    with Coordinator(2) as own:
        future, busy = hold(own, file, tmp_path)
        killed: set[int] = set()

        def idle() -> list[int]:
            return [pid for pid in own.worker_pids if pid != busy and pid not in killed and is_bound(pid)]

        for _ in range(20):
            wait_until(idle, "the next idle worker")
            [pid] = idle()
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)
        (tmp_path / "gate").touch()
        assert future.result(WATCHDOG_S) == busy
        assert own.submit_file_task(tasks.size, file).result(WATCHDOG_S) == 5


def is_bound(pid: int) -> bool:
    """Whether the worker process has come as far as to call itself one."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("ringpool-w")
    except OSError:
        return False


def test_all_workers_may_be_killed_at_once_in_the_middle_of_a_run(pool: Coordinator, files: MakeFiles) -> None:
    paths = files(3000)
    results = []
    for result in pool.run_file_tasks(tasks.name, paths):
        results.append(result)
        if len(results) in (500, 1500):
            for pid in pool.worker_pids:
                kill_worker(pid)
    assert sorted(r.path for r in results) == paths
    assert all(r.value == r.path.name for r in results), "a short task is not unlucky three times"


def test_workers_that_are_stopped_can_be_killed(pool: Coordinator, file: Path, tmp_path: Path) -> None:
    future, pid = hold(pool, file, tmp_path)
    (tmp_path / "begun").unlink()
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T", "the worker's stop")
    assert pool.submit_file_task(tasks.size, file).result(WATCHDOG_S) == 5
    os.kill(pid, signal.SIGKILL)
    (tmp_path / "gate").touch()
    assert future.result(WATCHDOG_S) != pid


def test_a_stopped_worker_goes_on_where_it_was(pool: Coordinator, file: Path, tmp_path: Path) -> None:
    future, pid = hold(pool, file, tmp_path)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T", "the worker's stop")
    (tmp_path / "gate").touch()
    os.kill(pid, signal.SIGCONT)
    assert future.result(WATCHDOG_S) == pid


def test_a_fork_server_that_is_killed_is_replaced(file: Path) -> None:
    with Coordinator(2, mp_context="forkserver") as own:
        pid = own.submit_file_task(tasks.process_id, file).result(WATCHDOG_S)
        os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
        wait_until(lambda: not is_alive(pid), "the end of the workers with their parent")
        assert own.submit_file_task(tasks.process_id, file).result(WATCHDOG_S) != pid


# ---- tasks that bend their process -----------------------------------------------------------------------------------


def test_a_task_that_closes_all_descriptors_is_done_and_its_worker_replaced(
    pool: Coordinator, files: MakeFiles
) -> None:
    paths = files(20)
    futures = [pool.submit_file_task(tasks.name, path) for path in paths]
    closing = [pool.submit_file_task(tasks.close_descriptors, paths[0]) for _ in range(3)]
    futures += [pool.submit_file_task(tasks.name, path) for path in paths]
    assert [future.result(WATCHDOG_S) for future in closing] == ["closed"] * 3
    assert [future.result(WATCHDOG_S) for future in futures] == [path.name for path in paths] * 2


def test_a_task_may_close_its_streams(pool: Coordinator, file: Path) -> None:
    assert pool.submit_file_task(tasks.close_streams, file).result(WATCHDOG_S) == "closed"
    assert [r.value for r in pool.run_file_tasks(tasks.size, [file] * 100)] == [5] * 100


def test_handlers_and_timers_of_a_task_do_not_outlive_it(file: Path) -> None:
    with Coordinator(1) as own:
        before = own.submit_file_task(tasks.handlers, file).result(WATCHDOG_S)
        deaths = own.stats().worker_deaths
        for _ in range(3):
            bent = own.submit_file_task(tasks.replace_handlers, file)
            alarmed = own.submit_file_task(tasks.wait_while_alarmed, file)
            after = own.submit_file_task(tasks.handlers, file)
            assert bent.result(WATCHDOG_S) == "replaced"
            assert alarmed.result(WATCHDOG_S) == "alive"
            assert after.result(WATCHDOG_S) == before
        assert own.stats().worker_deaths == deaths


def test_a_task_cannot_move_its_neighbours(pool: Coordinator, file: Path, tmp_path: Path) -> None:
    home = pool.submit_file_task(tasks.directory, file).result(WATCHDOG_S)
    assert home == os.getcwd()
    assert all(r.ok for r in pool.run_file_tasks(tasks.directory, [file] * 500)), "claimed many at once"
    futures = []
    for _ in range(200):
        futures.append(pool.submit_file_task(tasks.directory, file))
        pool.submit_file_task(tasks.change_directory, file, params={"to": str(tmp_path)})
    assert {future.result(WATCHDOG_S) for future in futures} == {home}


@pytest.mark.parametrize("then", ["return", "raise", "exit", "exit at once"])
def test_the_child_of_a_task_that_forks_has_no_say(pool: Coordinator, file: Path, then: str) -> None:
    pids = pool.worker_pids
    for _ in range(3):
        assert pool.submit_file_task(tasks.fork_here, file, params={"then": then}).result(WATCHDOG_S) in pids
    assert pool.worker_pids == pids


def test_a_task_may_use_processes_of_its_own(pool: Coordinator, file: Path) -> None:
    assert pool.submit_file_task(tasks.use_a_pool, file).result(WATCHDOG_S) == [1, 2, 3]


def test_a_task_reads_nothing_from_standard_input(pool: Coordinator, file: Path) -> None:
    assert pool.submit_file_task(tasks.read_input, file).result(WATCHDOG_S) == ""


def test_what_a_task_left_running_goes_with_its_worker(file: Path, tmp_path: Path) -> None:
    with Coordinator(1) as own:
        left = own.submit_file_task(tasks.leave_child, file).result(WATCHDOG_S)
        assert is_alive(left)
        error = own.submit_file_task(
            tasks.leave_child_and_die, file, params={"begun": str(tmp_path / "begun")}
        ).exception(WATCHDOG_S)
        assert isinstance(error, WorkerDiedError)
        wait_until(lambda: not is_alive(left), "the end of the first child")
        child = int((tmp_path / "begun").read_text())
        wait_until(lambda: not is_alive(child), "the end of the second child")
        left = own.submit_file_task(tasks.leave_child, file).result(WATCHDOG_S)
    wait_until(lambda: not is_alive(left), "the end of the last child, with the pool")


# ---- the coordinator dies --------------------------------------------------------------------------------------------

BUSY = """
with Coordinator({workers}, mp_context={method!r}) as pool:
    here = Path(__file__)
    ways = ["python", "sleep holding the GIL", "hopeless match", "stopped", "subprocess", "deaf"]
    for i, way in enumerate(ways):
        pool.submit_file_task(tasks.stay, here, params={{"how": way, "begun": str(here.with_name(f"begun-{{i}}"))}})
    while len(list(here.parent.glob("begun-?"))) < len(ways) or len(pool.worker_pids) < {workers}:
        select.select([], [], [], 0.01)
    pids = [int(path.read_text()) for path in here.parent.glob("begun-?")]
    {extra}
    say("ready", *pool.worker_pids, *pids)
    wait()
"""


def await_ready(program: Program) -> set[int]:
    pids = {int(word) for word in program.wait_for("ready").split()}
    assert len(pids) == 8  # seven workers, six of them busy in one way each, one idle; and a child of one of them
    assert all(is_alive(pid) for pid in pids)
    wait_until(lambda: pids < program.processes, "the environment of what is just taking on its program")
    wait_until(lambda: any(state_of(pid) == "T" for pid in pids), "the stop of one")
    return pids


@pytest.mark.parametrize("method", START_METHODS)
def test_no_worker_survives_a_killed_coordinator(run_program: RunProgram, method: str) -> None:
    program = run_program(BUSY.format(workers=7, method=method, extra=""))
    await_ready(program)
    program.signal(signal.SIGKILL, group=False)
    assert program.finish() == -signal.SIGKILL
    program.assert_no_process_is_left()
    with Coordinator(1):
        wait_until_gone(program.pid)  # the next start removes what the dead one left


@pytest.mark.parametrize("method", START_METHODS)
def test_no_worker_survives_a_killed_coordinator_of_which_a_fork_lives_on(run_program: RunProgram, method: str) -> None:
    fork = 'child = os.fork()\n    if not child:\n        wait()\n    say("fork", child)'
    program = run_program(BUSY.format(workers=7, method=method, extra=fork))
    pids = await_ready(program)
    fork_pid = int(program.wait_for("fork"))
    program.signal(signal.SIGKILL, group=False)
    assert program.finish() == -signal.SIGKILL
    wait_until(lambda: not any(is_alive(pid) for pid in pids), "the end of the workers")
    assert is_alive(fork_pid)
    with Coordinator(1):
        wait_until_gone(program.pid)


GROUPS = """
with Coordinator(2) as pool:
    here = Path(__file__)
    for i in range(2):
        begun = str(here.with_name(f"begun-{i}"))
        how = "process group of a shell" if i else "process group"
        pool.submit_file_task(tasks.stay, here, params={"how": how, "begun": begun})
    while len(list(here.parent.glob("begun-?"))) < 2:
        select.select([], [], [], 0.01)
    say("ready", *[path.read_text() for path in here.parent.glob("begun-?")])
    wait()
"""


def test_what_has_a_process_group_of_its_own_goes_with_a_killed_coordinator_too(run_program: RunProgram) -> None:
    """The kernel kills the groups of the workers; what `timeout` runs is in another."""
    program = run_program(GROUPS)
    pids = [int(word) for word in program.wait_for("ready").split()]
    assert all(is_alive(pid) and os.getpgid(pid) == pid for pid in pids)
    program.signal(signal.SIGKILL, group=False)
    assert program.finish() == -signal.SIGKILL
    wait_until(lambda: not any(is_alive(pid) for pid in pids), "the end of both")
    program.assert_no_process_is_left()


SLOW_TO_CLOSE = """
with Coordinator(7, mp_context={method!r}) as pool:
    here = Path(__file__)
    for i in range(7):
        begun = str(here.with_name(f"begun-{{i}}"))
        pool.submit_file_task(tasks.stay, here, params={{"how": "subprocess", "begun": begun}})
    while len(list(here.parent.glob("begun-?"))) < 7:
        select.select([], [], [], 0.01)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        for _ in range(50_000):
            os.open("/dev/null", os.O_RDONLY)
    except OSError:
        pass
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # this thread, not that which starts workers
    say("ready")
    wait()
"""


@pytest.mark.parametrize("method", START_METHODS)
def test_what_tasks_started_goes_with_a_coordinator_whose_files_are_closed_after_its_workers_are_dead(
    run_program: RunProgram, method: str
) -> None:
    """The kernel takes its time to close many: what a worker has started is then another's to kill."""
    for _ in range(3):
        program = run_program(SLOW_TO_CLOSE.format(method=method), top="import resource")
        program.wait_for("ready")
        program.signal(signal.SIGKILL, group=False)
        assert program.finish() == -signal.SIGKILL
        program.assert_no_process_is_left()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_starts_where_its_user_has_no_more_descriptors_to_send(run_program: RunProgram, method: str) -> None:
    program = run_program(
        f"""
        ours, theirs = socket.socketpair()
        for _ in range(40):
            socket.send_fds(theirs, [b"-"], [0, 1])
        drop_capabilities()
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        try:
            socket.send_fds(theirs, [b"-"], [0])
        except OSError as error:
            assert error.errno == errno.ETOOMANYREFS
            with Coordinator(2, mp_context={method!r}) as pool:
                say("done", sum(result.ok for result in pool.run_file_tasks(tasks.size, [__file__] * 3)))
        """,
        top="""
        import ctypes, errno, resource, socket

        def drop_capabilities():
            header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None).capget(header, data) == 0
            data[0] &= ~(1 << 21 | 1 << 24)  # CAP_SYS_ADMIN, CAP_SYS_RESOURCE
            assert ctypes.CDLL(None).capset(header, data) == 0
        """,
    )
    assert program.wait_for("done") == "3"
    assert program.finish() == 0, program.err


def test_workers_that_are_killed_as_they_start_are_no_crash_loop(file: Path) -> None:
    with Coordinator(2, attempts_max=63) as own:  # some come to run a task
        sizes = [own.submit_file_task(tasks.size, file) for _ in range(10)]
        seen: set[int] = set()
        while len(seen) < 30:
            for pid in own.worker_pids:
                kill_worker(pid)
                seen.add(pid)
        assert {size.result(WATCHDOG_S) for size in sizes} == {file.stat().st_size}


def test_the_death_of_a_worker_that_was_idle_ends_no_series_of_kills() -> None:
    with World(slots=4, workers=2) as world:
        end = world.coordinator()
        estates = Estates(end, lambda _entry: None, lambda _index: None)
        for pid in range(1, 8):
            assert estates._is_crash_loop(True, Death(0, pid, signal.SIGKILL, None)) is False
        estates._barren_since_s -= 3600
        assert estates._is_crash_loop(False, Death(1, 9, signal.SIGKILL, None)) is False
        assert estates._is_crash_loop(True, Death(0, 10, signal.SIGKILL, None)) is True


def test_what_a_killed_coordinator_was_writing_is_not_visible(run_program: RunProgram) -> None:
    program = run_program(
        """
        place = Path(__file__).parent
        with Coordinator(1) as pool:
            begun = str(place / "begun")
            params = {"then": "wait", "begun": begun}
            pool.submit_file_task(tasks.write_half, __file__, place / "output.txt", params=params)
            pool.submit_file_task(tasks.echo, __file__, params={"value": bytes(100_000)})
            tasks.wait_for(begun)
            say("ready")
            wait()
        """
    )
    program.wait_for("ready")
    program.signal(signal.SIGKILL, group=False)
    program.finish()
    program.assert_no_process_is_left()
    place = program.file.parent
    assert not (place / "output.txt").exists()
    with Coordinator(1):
        wait_until_gone(program.pid)
    assert staged_in(place) == []
    assert not (place / "output.txt").exists()


@pytest.mark.parametrize("is_moved", [False, True])
def test_what_a_killed_coordinator_had_staged_is_removed_with_its_segment(
    run_program: RunProgram, tmp_path: Path, is_moved: bool
) -> None:
    """And not put in place: somebody may have made the output since then. By whatever pool starts next. But what may be
    the only copy of an input stays.
    """
    source, output = tmp_path / "input", tmp_path / "output"
    source.write_text("content")
    with PathLock(output):
        program = run_program(
            f"""
            with Coordinator(1) as pool:
                pool.submit_file_task(tasks.copy, {str(source)!r}, {str(output)!r}).result()
            """
        )
        wait_until(lambda: [path.stat().st_size for path in staged_in(tmp_path)] == [len("content")], "its output")
        if is_moved:
            source.unlink()
        program.signal(signal.SIGKILL, group=False)
        program.finish()
        program.assert_no_process_is_left()
        output.write_text("made since then")
    with RingPoolExecutor(1) as pool:
        assert pool.submit(int, "1").result(WATCHDOG_S) == 1
    wait_until_gone(program.pid)
    assert [path.read_text() for path in staged_in(tmp_path)] == ["content"] * is_moved
    assert output.read_text() == "made since then"


def test_a_dead_segment_stays_while_a_worker_of_it_lives(run_program: RunProgram) -> None:
    """It hangs in the kernel, and what it will write has no other record."""
    me = this_process()  # any pool that starts meanwhile, on this machine, asks the same
    program = run_program(
        f"""
        from ringpool.shm import layout, segment
        from ringpool.shm.ring import Ring

        ring = Ring(segment.create(8, 1))
        at = ring.worker_word(0, 0)
        ring.words[at + layout.W_PID], ring.words[at + layout.W_START] = {me.pid}, {me.start}
        say("ready")
        wait()
        """
    )
    program.wait_for("ready")
    program.signal(signal.SIGKILL, group=False)
    program.finish()
    (name,) = (file for file in shared_memory_of(program.pid) if segment.NAME.fullmatch(file))
    assert name not in reclaim_dead()
    ring = Ring(segment.attach(name))
    assert not ring.words[layout.COORDINATOR_PID_AT >> 3], "it was taken over"
    ring.words[ring.worker_word(0, layout.W_PID)] = 0
    ring.close()
    reclaim_dead()
    wait_until_gone(program.pid)


def test_a_dead_segment_stays_while_another_start_is_at_it(run_program: RunProgram) -> None:
    """Without the segment's blobs, that one would not find all that was staged."""
    other = run_program("say('ready'); wait()")
    other.wait_for("ready")
    program = run_program(
        f"""
        from ringpool.shm import layout, owner, segment
        from ringpool.shm.ring import Ring

        ring = Ring(segment.create(8, 1))
        ring.words[layout.COORDINATOR_PID_AT >> 3] = {other.pid}
        ring.words[layout.COORDINATOR_START_AT >> 3] = owner.start_time({other.pid})
        say("ready")
        wait()
        """
    )
    program.wait_for("ready")
    program.signal(signal.SIGKILL, group=False)
    program.finish()
    (name,) = (file for file in shared_memory_of(program.pid) if segment.NAME.fullmatch(file))
    assert name not in reclaim_dead()
    other.signal(signal.SIGKILL)
    other.finish()
    reclaim_dead()
    wait_until_gone(program.pid)


def test_a_damaged_segment_leaves_no_semaphore_open(run_program: RunProgram) -> None:
    program = run_program(
        """
        from ringpool.shm import segment
        from ringpool.shm.ring import VERSION_WORD, Ring

        for _ in range(20):
            Ring(segment.create(8, 8)).words[VERSION_WORD] = 1 << 63
        say("ready")
        wait()
        """
    )
    program.wait_for("ready")
    program.signal(signal.SIGKILL, group=False)
    program.finish()
    reclaim_dead()
    wait_until_gone(program.pid)
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert not [line for line in mapped if "/sem." in line and f".{program.pid}." in line]


def staged_in(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.name.startswith(".rp-")]


def test_a_coordinator_killed_while_its_workers_start_leaves_none(run_program: RunProgram) -> None:
    for method in START_METHODS:
        program = run_program(
            f"""
            pool = Coordinator(4, mp_context={method!r})
            say("ready")
            wait()
            """
        )
        program.wait_for("ready")
        program.signal(signal.SIGKILL, group=False)
        program.finish()
        program.assert_no_process_is_left()


# ---- crash loops -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_main_module_without_a_guard_ends_in_one_clear_error(run_program: RunProgram, method: str) -> None:
    program = run_program(
        f"""
        with Coordinator(2, mp_context={method!r}) as pool:
            print([r.value for r in pool.run_file_tasks(tasks.size, [__file__] * 3)])
        """,
        guarded=False,
    )
    assert program.finish() == 1
    assert "MainModuleError" in program.err.splitlines()[-1]
    assert "under `if __name__" in program.err.splitlines()[-1]
    assert program.err.count("Traceback") == 1, "the program's: its workers say nothing"
    assert "cannot be started" not in program.err, "a worker has made a pool of its own"
    program.assert_no_process_is_left()
    wait_until_gone(program.pid)


def test_a_job_of_a_main_module_without_a_guard_is_not_begun_in_its_own_workers(
    run_program: RunProgram, tmp_path: Path
) -> None:
    program = run_program(
        f"""
        from ringpool import Job
        Job(tasks.size, [__file__] * 3, directory={str(tmp_path / "job")!r}).run(2)
        """,
        guarded=False,
    )
    assert program.finish() == 1
    assert "MainModuleError" in program.err.splitlines()[-1]
    assert program.err.count("Traceback") == 1
    assert "JobBusyError" not in program.err, "a worker has begun the job that it was started for"
    program.assert_no_process_is_left()
    wait_until_gone(program.pid)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_an_executor_and_a_job_may_be_globals_of_the_main_module(
    run_program: RunProgram, tmp_path: Path, method: str
) -> None:
    program = run_program(
        f"""
        print(sum(executor.map(len, ["a", "bc"])), executor.submit(tasks.size, Path(__file__)).result() > 0)
        executor.shutdown()
        assert job.run(2, mp_context={method!r}).progress.done == 3
        """,
        top=f"""
        from ringpool import Job, RingPoolExecutor
        executor = RingPoolExecutor(2, mp_context={method!r})
        job = Job(tasks.size, [__file__] * 3, directory={str(tmp_path / "job")!r})
        """,
    )
    assert program.finish() == 0, program.err
    assert program.out.splitlines() == ["3 True"]
    program.assert_nothing_is_left()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_job_that_is_a_global_of_the_main_module_can_be_asked_where_it_is(
    run_program: RunProgram, tmp_path: Path, method: str
) -> None:
    program = run_program(
        f"""
        assert job.run(2, mp_context={method!r}).progress.done == 1
        assert note.read_text() == job.name.partition(":")[2]
        """,
        top=f"""
        from ringpool import Job

        def leave_note(src):
            note.write_text(job.name.partition(":")[2])
            assert not hasattr(job, "nothing")

        job = Job(leave_note, [__file__], directory={str(tmp_path / "job")!r})
        note = job.directory / "note"
        """,
    )
    assert program.finish() == 0, program.err
    program.assert_nothing_is_left()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_an_executor_of_a_main_module_without_a_guard_breaks_the_pool(run_program: RunProgram, method: str) -> None:
    program = run_program(
        """
        try:
            executor.submit(tasks.size, __file__).result()
        except BrokenProcessPool as error:
            say("broken", type(error).__name__)
        """,
        top=f"""
        from concurrent.futures.process import BrokenProcessPool
        from ringpool import RingPoolExecutor
        executor = RingPoolExecutor(2, mp_context={method!r})
        """,
        guarded=False,
    )
    assert program.finish() == 0, program.err
    assert program.out.splitlines() == ["broken MainModuleError"]
    assert program.err == ""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_main_module_that_raises_in_workers_ends_in_one_clear_error(run_program: RunProgram, method: str) -> None:
    program = run_program(
        f"""
        with Coordinator(2, mp_context={method!r}) as pool:
            print(pool.submit_file_task(tasks.size, __file__).result())
        """,
        top="""
        if __name__ != "__main__":
            raise RuntimeError("not here")
        """,
    )
    assert program.finish() == 1
    assert "CrashLoopError" in program.err.splitlines()[-1]
    assert "not here" in program.err, "why"
    program.assert_no_process_is_left()
    wait_until_gone(program.pid)


# Tells a fork server which file the main module is, as newer releases of Python do: older ones forget it.
TOLD = """
from multiprocessing import spawn

def tell(name, prepare=spawn.get_preparation_data):
    told = prepare(name)
    return told | {"main_path": told.get("init_main_from_path")}

spawn.get_preparation_data = tell
with open("imports", "a") as imports:
    print(__name__, file=imports)
"""


def test_a_main_module_is_imported_once_for_all_workers(run_program: RunProgram, tmp_path: Path) -> None:
    program = run_program(
        """
        with Coordinator(2) as pool:
            assert all(r.ok for r in pool.run_file_tasks(tasks.size, [__file__] * 3))
            while len(pool.worker_pids) < 2:
                select.select([], [], [], 0.01)
            victim = pool.worker_pids[0]
            os.kill(victim, signal.SIGKILL)
            while victim in pool.worker_pids or len(pool.worker_pids) < 2:
                select.select([], [], [], 0.01)
        """,
        top=TOLD,
    )
    assert program.finish() == 0, program.err
    assert (program.file.parent / "imports").read_text().split() == ["__main__", "__mp_main__"]
    program.assert_nothing_is_left()


@pytest.mark.parametrize(("seeded", "n_different"), [("", 3), ("numpy.random.seed(1)", 1)])
def test_workers_draw_different_random_numbers_unless_the_main_module_seeds_them(
    run_program: RunProgram, seeded: str, n_different: int
) -> None:
    """As if each had imported it, and not the fork server for all."""
    program = run_program(
        """
        with RingPoolExecutor(1, max_tasks_per_child=1) as pool:
            drawn = [pool.submit(draw).result() for _ in range(3)]
        say(len({pid for pid, _ in drawn}), len({number for _, number in drawn}))
        """,
        top=f"""
        {textwrap.indent(TOLD, " " * 8).strip()}
        import numpy.random
        from ringpool import RingPoolExecutor
        {seeded}

        def draw():
            return os.getpid(), float(numpy.random.random())
        """,
    )
    assert program.finish() == 0, program.err
    assert program.out.split() == ["3", str(n_different)]
    assert (program.file.parent / "imports").read_text().split() == ["__main__", "__mp_main__"], "once for all workers"
    program.assert_nothing_is_left()


@pytest.mark.parametrize("preload", [[], ["__main__"], ["json", "__main__"]])
@pytest.mark.parametrize("catches", ["Exception", "BaseException"])
def test_a_main_module_without_a_guard_does_not_end_the_fork_server_that_imports_it(
    run_program: RunProgram, preload: list[str], catches: str
) -> None:
    program = run_program(
        f"""
        if {preload}:
            multiprocessing.set_forkserver_preload({preload})
        try:
            with Coordinator(2) as pool:
                list(pool.run_file_tasks(tasks.size, [__file__] * 3))
        except {catches} as error:
            if __name__ == "__main__":
                say("caught", type(error).__name__)
        """,
        top=f"import multiprocessing\n{TOLD}",
        guarded=False,
    )
    assert program.finish() == 0, program.err
    assert program.out.splitlines() == ["caught MainModuleError"]
    assert program.err == ""
    program.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("how", "why"), [("raise RuntimeError('not here')", "not here"), ("sys.exit(3)", "exit status")]
)
def test_a_main_module_that_ends_early_does_not_end_the_fork_server_that_imports_it(
    run_program: RunProgram, how: str, why: str
) -> None:
    program = run_program(
        """
        with Coordinator(2) as pool:
            print(pool.submit_file_task(tasks.size, __file__).result())
        """,
        top=f"""
        {textwrap.indent(TOLD, " " * 8).strip()}
        if __name__ != "__main__":
            {how}
        """,
    )
    assert program.finish() == 1
    assert "CrashLoopError" in program.err.splitlines()[-1]
    assert why in program.err
    assert "cannot be started" not in program.err, "a fork server has ended"
    program.assert_no_process_is_left()
    wait_until_gone(program.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_program_ends_while_the_fork_server_imports_its_main_module(run_program: RunProgram, number: int) -> None:
    """And so does the server."""
    program = run_program(
        """
        with Coordinator(2) as pool:
            list(pool.run_file_tasks(tasks.size, [__file__] * 3))
        """,
        top=f"""
        {textwrap.indent(TOLD, " " * 8).strip()}
        if __name__ != "__main__":
            wait()
        """,
    )
    imports = program.file.parent / "imports"
    wait_until(lambda: imports.exists() and "__mp_main__" in imports.read_text(), "the server's import")
    program.signal(number, group=False)
    assert program.finish() in (-number, 128 + number)
    program.assert_no_process_is_left()
    if number != signal.SIGKILL:
        program.assert_nothing_is_left()


def test_a_crash_loop_fails_what_waits_and_what_comes(run_program: RunProgram) -> None:
    program = run_program(
        """
        from concurrent.futures import ThreadPoolExecutor
        pool = Coordinator(2, mp_context="spawn")
        futures = []
        try:
            while True:
                futures.append(pool.submit_file_task(tasks.size, __file__))
                select.select([], [], [], 0.01)
        except CrashLoopError as error:
            say("refused", error.deaths)
        assert futures and all(isinstance(f.exception(), CrashLoopError) for f in futures)
        try:
            pool.run_file_tasks(tasks.size, [__file__])
        except CrashLoopError:
            say("refused again")
        pool.close()
        say("closed")
        """,
        top="""
        if __name__ != "__main__":
            os._exit(9)
        """,
    )
    assert program.finish() == 0, program.err
    assert program.wait_for("closed") == ""
    program.assert_nothing_is_left()


# ---- descriptors run out ---------------------------------------------------------------------------------------------


def test_a_pool_without_free_descriptors_fails_in_words_or_recovers(run_program: RunProgram) -> None:
    program = run_program(
        """
        import resource
        with Coordinator(2) as pool:
            pool.submit_file_task(tasks.size, __file__).result()
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            held = []
            try:
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                os.close(held.pop())
            for pid in pool.worker_pids:
                os.kill(pid, signal.SIGKILL)
            try:
                pool.submit_file_task(tasks.size, __file__).result()
                say("done")
            except CrashLoopError:
                say("refused")
            for fd in held:
                os.close(fd)
        """
    )
    assert program.finish() == 0, program.err
    assert program.out.strip() in ("done", "refused")
    program.assert_no_process_is_left()
    wait_until_gone(program.pid)


@pytest.mark.parametrize("n_free", [0, 2, 4])
def test_a_start_without_free_descriptors_costs_no_other_worker(run_program: RunProgram, n_free: int) -> None:
    """The fork server must not be left in the middle of a conversation: it would end, and all workers with it."""
    program = run_program(
        f"""
        import resource
        with Coordinator(2) as pool:
            pool.submit_file_task(tasks.size, __file__).result()
            while len(pool.worker_pids) < 2:
                select.select([], [], [], 0.01)
            spared, victim = pool.worker_pids
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            held = []
            try:
                while True:
                    held.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                for _ in range({n_free}):  # besides, the victim leaves five
                    os.close(held.pop())
            os.kill(victim, signal.SIGKILL)
            while pool.stats().worker_deaths < 3 and {{spared, victim}}.issuperset(pool.worker_pids):
                select.select([], [], [], 0.01)
            for fd in held:
                os.close(fd)
            while len(pool.worker_pids) < 2 or victim in pool.worker_pids:
                select.select([], [], [], 0.01)
            assert spared in pool.worker_pids
            say("spared")
        """
    )
    assert program.finish() == 0, program.err
    assert program.wait_for("spared") == ""
    program.assert_no_process_is_left()
    wait_until_gone(program.pid)


def test_deaths_are_noticed_while_other_workers_cannot_be_started(run_program: RunProgram) -> None:
    """There are always some that are to be started again: nothing must wait until there are none."""
    program = run_program(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with Coordinator(40) as pool:
            pool.submit_file_task(tasks.size, __file__).result()
            victim = pool.worker_pids[0]
            os.kill(victim, signal.SIGKILL)
            while victim in pool.worker_pids:
                select.select([], [], [], 0.01)
            assert all(result.ok for result in pool.run_file_tasks(tasks.size, [__file__] * 100))
            say("done")
        """
    )
    assert program.finish() == 0, program.err
    assert program.wait_for("done") == ""
    program.assert_no_process_is_left()
    wait_until_gone(program.pid)


def test_a_process_that_cannot_be_forked_costs_no_other_worker(run_program: RunProgram, tmp_path: Path) -> None:
    """As at the limit of a container's processes: the fork server must live, or each try would end all workers."""
    program = run_program(
        """
        refused = Path(os.environ["RINGPOOL_TEST_NO_FORK"])
        multiprocessing.set_forkserver_preload(
            ["tests.coordinator.failing_fork", "ringpool.workers.ahead", "ringpool.workers.process"]
        )
        with Coordinator(2) as pool:
            while len(pool.worker_pids) < 2:
                select.select([], [], [], 0.01)
            for result in pool.run_file_tasks(tasks.size, [__file__] * 200):
                assert result.ok
            spared, victim = pool.worker_pids
            refused.touch()
            os.kill(victim, signal.SIGKILL)
            while pool.stats().worker_deaths < 9:  # which would be a crash loop, were nobody at work
                select.select([], [], [], 0.01)
            assert pool.worker_pids == (spared,)
            assert pool.submit_file_task(tasks.size, __file__).result() > 0
            refused.unlink()
            assert pool.submit_file_task(tasks.size, __file__).result() > 0
            while len(pool.worker_pids) < 2:
                select.select([], [], [], 0.01)
            assert spared in pool.worker_pids
            say("spared")
        """,
        top=f"""
        import multiprocessing
        os.environ["RINGPOOL_TEST_NO_FORK"] = {str(tmp_path / "refused")!r}
        """,
    )
    assert program.finish() == 0, program.err
    assert program.wait_for("spared") == ""
    assert "no process can be made" in program.err
    program.assert_no_process_is_left()
    wait_until_gone(program.pid)


@pytest.mark.parametrize("sent", [b"", b"\x80\x05\x95"], ids=["nothing", "a part"])
def test_a_process_whose_program_ends_before_it_has_said_what_it_is_to_be_ends_without_a_word(
    run_program: RunProgram, sent: bytes
) -> None:
    """As Ctrl-C may end a program while its pool starts a worker."""
    program = run_program(
        f"""
        with Coordinator(1) as pool:
            pool.submit_file_task(tasks.size, __file__).result()
            status, data = forkserver.connect_to_new_process([])
            pid = forkserver.read_signed(status)
            os.write(data, {sent!r})
            os.close(data)
            say(f"code {{forkserver.read_signed(status)}}")
        """,
        top="from multiprocessing import forkserver",
    )
    assert program.finish() == 0, program.err
    assert program.wait_for("code") == "1"
    assert program.err == ""
    program.assert_no_process_is_left()
    wait_until_gone(program.pid)


def test_what_cannot_be_unpickled_in_a_process_of_a_fork_server_is_said(run_program: RunProgram) -> None:
    program = run_program(
        """
        class Bad:
            def __reduce__(self):
                return tasks.end_of_file, ()

        with Coordinator(1) as pool:
            pool.submit_file_task(tasks.size, __file__).result()
            process = multiprocessing.get_context("forkserver").Process(target=print, args=(Bad(),))
            process.start()
            process.join()
            say(f"code {process.exitcode}")
        """,
        top="import multiprocessing",
    )
    assert program.finish() == 0, program.err
    assert program.wait_for("code") == "1"
    assert "EOFError: of a task" in program.err
    program.assert_no_process_is_left()
    wait_until_gone(program.pid)


# ---- the full matrix -------------------------------------------------------------------------------------------------


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_a_run_of_many_tasks_survives_many_deaths(files: MakeFiles) -> None:
    """Workers are killed all the time, by another thread; each file has one result, and no innocent fails."""
    paths = files(50_000)
    with Coordinator(4, attempts_max=63) as own:
        over = threading.Event()

        def kill() -> None:
            n_seen = -1
            while not over.wait(0.02):
                if (n_done := own.stats().completed) == n_seen:  # where starts take longer, none would get to work
                    continue
                n_seen = n_done
                for pid in own.worker_pids[:1] if os.urandom(1)[0] % 2 else own.worker_pids[-1:]:
                    kill_worker(pid)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            results = list(own.run_file_tasks(tasks.name, paths))
        finally:
            over.set()
            killer.join()
        assert own.stats().worker_deaths > 10
    assert sorted(r.path for r in results) == paths
    assert all(r.value == r.path.name for r in results)


@pytest.mark.crash
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", START_METHODS)
def test_a_coordinator_killed_at_any_moment_leaves_no_worker(run_program: RunProgram, method: str) -> None:
    """The moments are counted in results, from none to some hundreds."""
    for n in (0, 1, 2, 5, 17, 120, 400):
        program = run_program(
            f"""
            with Coordinator(3, mp_context={method!r}) as pool:
                for i, result in enumerate(pool.run_file_tasks(tasks.size, itertools.repeat(__file__))):
                    if i == {n}:
                        os.kill(os.getpid(), signal.SIGKILL)
            """
        )
        assert program.finish() == -signal.SIGKILL
        program.assert_no_process_is_left()
    with Coordinator(1):
        wait_until_gone(program.pid)


@pytest.mark.parametrize("how", ["SIGCHLD is ignored", "a thread waits for any child"])
@pytest.mark.parametrize("method", START_METHODS)
def test_workers_whose_exit_status_the_program_has_taken_are_not_waited_for(
    run_program: Callable[..., Program], method: str, how: str
) -> None:
    """They were, for 5 s each, and were said to have not ended."""
    program = run_program(
        f"""
        if {how!r} == "SIGCHLD is ignored":
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        else:
            threading.Thread(target=reap, daemon=True).start()
        with Coordinator(4, mp_context={method!r}) as pool:
            here = str(Path(__file__))
            assert len([*pool.run_file_tasks(tasks.size, [here] * 20)]) == 20
            for pid in pool.worker_pids:
                os.kill(pid, signal.SIGKILL)
            assert len([*pool.run_file_tasks(tasks.size, [here] * 20)]) == 20
        say("closed")
        """,
        top="""
import time

def reap():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.001)
""",
    )
    assert program.finish() == 0, program.err
    assert (program.out, program.err) == ("closed\n", "")
    program.assert_nothing_is_left()

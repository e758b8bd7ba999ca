"""``RingPoolExecutor`` under what others have built on executors: ``wait``, ``as_completed``, asyncio, dask, joblib."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.coordinator import integration_functions as tasks
from tests.coordinator.program import WATCHDOG_S, Program, is_alive, wait_until

from ringpool import RingPoolExecutor
from ringpool.errors import WorkerDiedError


@pytest.fixture
def executor() -> Iterator[RingPoolExecutor]:
    with RingPoolExecutor(2) as made:
        yield made


def pid_in(begun: Path) -> int:
    wait_until(begun.exists, "the task to begin")
    return int(begun.read_text())


# ---- wait, as_completed ----------------------------------------------------------------------------------------------


def test_futures_of_several_executors_complete_together(executor: RingPoolExecutor) -> None:
    context = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(1) as threads, ProcessPoolExecutor(1, context) as processes:
        made: list[Executor] = [executor, threads, processes, executor]
        futures = {one.submit(tasks.square, i): i * i for i, one in enumerate(made)}
        for future in as_completed(futures, timeout=WATCHDOG_S):
            assert future.result() == futures.pop(future)
        assert not futures


def test_wait_returns_when_the_first_of_several_executors_futures_is_done(
    executor: RingPoolExecutor, tmp_path: Path
) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    with ThreadPoolExecutor(1) as threads:
        slow = executor.submit(tasks.tell_and_wait, begun, gate)
        pid_in(begun)
        quick = threads.submit(tasks.square, 3)
        done, pending = wait([slow, quick], WATCHDOG_S, FIRST_COMPLETED)
        assert (done, pending) == ({quick}, {slow})
        gate.touch()
        assert wait([slow, quick], WATCHDOG_S).not_done == set()


# ---- asyncio ---------------------------------------------------------------------------------------------------------


def test_asyncio_awaits_results_and_exceptions(executor: RingPoolExecutor) -> None:
    async def main() -> tuple[list[int], BaseException]:
        loop = asyncio.get_running_loop()
        squares = await asyncio.gather(*(loop.run_in_executor(executor, tasks.square, i) for i in range(100)))
        (error,) = await asyncio.gather(loop.run_in_executor(executor, tasks.fail, "no"), return_exceptions=True)
        return squares, error

    squares, error = asyncio.run(main())
    assert squares == [i * i for i in range(100)]
    assert (type(error), str(error)) == (ValueError, "no")


def test_what_asyncio_cancels_before_it_began_never_runs(tmp_path: Path) -> None:
    begun, gate, never = tmp_path / "begun", tmp_path / "gate", tmp_path / "never"

    async def main(own: RingPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        first = loop.run_in_executor(own, tasks.tell_and_wait, begun, gate)
        pid = await asyncio.to_thread(pid_in, begun)
        others = [loop.run_in_executor(own, never.touch) for _ in range(8)]
        for other in others:
            other.cancel()
        await asyncio.sleep(0)  # asyncio tells the executor's futures in its next round
        gate.touch()
        assert await first == pid
        for other in others:
            with pytest.raises(asyncio.CancelledError):
                await other

    with RingPoolExecutor(1) as own:
        asyncio.run(main(own))
        assert own.submit(tasks.square, 2).result(WATCHDOG_S) == 4
    assert not never.exists()


def test_a_timeout_of_asyncio_leaves_the_pool_usable(executor: RingPoolExecutor, tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"

    async def main() -> int:
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(executor, tasks.tell_and_wait, begun, gate)
        await asyncio.to_thread(pid_in, begun)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(running, 0.01)
        return await loop.run_in_executor(executor, tasks.square, 5)

    assert asyncio.run(main()) == 25
    gate.touch()


# ---- pools inside workers --------------------------------------------------------------------------------------------


def test_a_task_may_have_a_pool_of_its_own(executor: RingPoolExecutor) -> None:
    results = [future.result(WATCHDOG_S) for future in [executor.submit(tasks.nested_ringpool, 100) for _ in range(2)]]
    assert [value for value, _ in results] == [328350, 328350]
    inner = {pid for _, pid in results}
    assert len(inner) == 2
    assert not inner & {os.getpid(), *executor.worker_pids}
    wait_until(lambda: not any(map(is_alive, inner)), "the end of the inner workers")


def test_a_task_may_have_a_process_pool(executor: RingPoolExecutor) -> None:
    assert executor.submit(tasks.nested_process_pool, 10).result(WATCHDOG_S) == 285


# ---- dask ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_dask_computes_on_the_pool(executor: RingPoolExecutor, scheduler: str) -> None:
    dask = pytest.importorskip("dask")
    squares = [dask.delayed(tasks.square)(i) for i in range(20)]
    pids = [dask.delayed(tasks.process_id)(i) for i in range(20)]
    with dask.config.set(pool=executor, scheduler=scheduler):
        assert dask.delayed(sum)(squares).compute() == 2470
        assert set(dask.compute(*pids)) <= set(executor.worker_pids)


def test_dask_raises_what_a_task_raised(executor: RingPoolExecutor) -> None:
    dask = pytest.importorskip("dask")
    # Its scheduler of threads hands tracebacks back as they are, which no process pool can.
    with dask.config.set(pool=executor, scheduler="processes"), pytest.raises(ValueError, match="broken"):
        dask.delayed(tasks.fail)("broken").compute()


# ---- joblib ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def joblib() -> Iterator[Any]:
    """joblib, with the backend registered; no worker is kept beyond the test."""
    module = pytest.importorskip("joblib")
    import ringpool
    from ringpool.coordinator.engines.joblib import release_kept_pool

    ringpool.register_joblib_backend()
    yield module
    release_kept_pool()


def workers_of(joblib: Any) -> set[int]:
    """The pids that a call with two workers uses, both of them."""
    pids: set[int] = set()
    with joblib.Parallel(n_jobs=2, backend="ringpool", batch_size=1) as parallel:
        wait_until(lambda: pids.update(parallel([joblib.delayed(tasks.process_id)()] * 8)) or len(pids) == 2, "both")
    return pids


@pytest.mark.parametrize("batch_size", ["auto", 1, 7])
@pytest.mark.parametrize("pre_dispatch", ["2 * n_jobs", "all", 3])
def test_joblib_gets_results_in_order(joblib: Any, batch_size: object, pre_dispatch: object) -> None:
    parallel = joblib.Parallel(n_jobs=2, backend="ringpool", batch_size=batch_size, pre_dispatch=pre_dispatch)
    assert parallel(joblib.delayed(tasks.square)(i) for i in range(300)) == [i * i for i in range(300)]


def test_joblib_runs_lambdas_and_closures(joblib: Any) -> None:
    offset = 40
    parallel = joblib.Parallel(n_jobs=2, backend="ringpool")
    assert parallel(joblib.delayed(lambda x: x + offset)(i) for i in range(5)) == [40, 41, 42, 43, 44]


@pytest.mark.parametrize(
    ("sharing", "n_shared"),
    [
        ({}, 200_000),
        ({"max_nbytes": "1K"}, 1000),
        ({"max_nbytes": None}, None),
        ({"mmap_mode": "c"}, None),
        ({"mmap_mode": "r+", "max_nbytes": "1K"}, None),
        ({"mmap_mode": None}, None),
    ],
)
def test_arrays_are_read_only_where_joblib_shares_them(
    joblib: Any, sharing: dict[str, Any], n_shared: int | None
) -> None:
    numpy = pytest.importorskip("numpy")
    parallel = joblib.Parallel(n_jobs=2, backend="ringpool", **sharing)
    own = [numpy.zeros(n) for n in ((n_shared or 300_000) // 2, 10, 1000) if n < (n_shared or math.inf)]
    assert parallel(joblib.delayed(tasks.write_into)(array) for array in own) == [1.0] * len(own)
    assert not any(array.any() for array in own)
    if n_shared is not None:
        with pytest.raises(ValueError, match="read-only"):
            parallel([joblib.delayed(tasks.write_into)(numpy.zeros(n_shared))])


def test_a_config_without_n_jobs_uses_all_cores_and_workers(joblib: Any) -> None:
    with joblib.parallel_config(backend="ringpool"):
        assert joblib.effective_n_jobs() == joblib.cpu_count()
        parallel = joblib.Parallel()
        pids = set(parallel(joblib.delayed(tasks.process_id)() for _ in range(4)))
    assert os.getpid() not in pids or joblib.cpu_count() == 1


@pytest.mark.parametrize(("n_jobs", "workers"), [(1, 1), (3, 3), (65, 64), (-1, None), (-1000, 1)])
def test_n_jobs_counts_as_joblib_counts(joblib: Any, n_jobs: int, workers: int | None) -> None:
    with joblib.parallel_config(backend="ringpool"):
        assert joblib.effective_n_jobs(n_jobs) == (workers or joblib.cpu_count())


def test_all_cores_of_a_large_machine_are_no_more_than_a_pool_has(joblib: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ringpool.coordinator.engines.joblib import RingPoolBackend

    monkeypatch.setattr(joblib, "cpu_count", lambda: 192)
    assert RingPoolBackend().effective_n_jobs(-1) == 64
    assert RingPoolBackend().effective_n_jobs(-191) == 2


def test_in_a_daemonic_process_joblib_has_one_worker_and_a_pool_is_refused(joblib: Any) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as daemons:
        pids, me, refused = daemons.apply_async(tasks.in_a_daemonic_process).get(WATCHDOG_S)
    assert pids == [me] * 3
    assert refused == [("DaemonicProcessError", True)] * 2


def test_one_job_runs_in_the_program_and_none_is_an_error(joblib: Any) -> None:
    assert joblib.Parallel(n_jobs=1, backend="ringpool")([joblib.delayed(tasks.process_id)()]) == [os.getpid()]
    with pytest.raises(ValueError, match="n_jobs == 0"):
        joblib.Parallel(n_jobs=0, backend="ringpool")([joblib.delayed(tasks.process_id)()])


@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
def test_joblib_generates_results_while_others_run(joblib: Any, return_as: str, tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    parallel = joblib.Parallel(n_jobs=2, backend="ringpool", return_as=return_as, batch_size=1)
    calls = [joblib.delayed(tasks.square)(3), joblib.delayed(tasks.tell_and_wait)(begun, gate)]
    results = parallel(calls)
    assert next(results) == 9
    assert not gate.exists()
    gate.touch()
    assert len(list(results)) == 1


def test_joblib_draws_no_more_than_it_was_told_to(joblib: Any, tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    drawn: list[int] = []

    def inputs() -> Iterator[object]:
        for i in range(100):
            drawn.append(i)
            yield joblib.delayed(tasks.tell_and_wait)(begun, gate)

    results = joblib.Parallel(n_jobs=2, backend="ringpool", pre_dispatch=4, return_as="generator")(inputs())
    pid_in(begun)
    assert len(drawn) == 4
    gate.touch()
    assert len(list(results)) == len(drawn) == 100


def test_an_error_reaches_the_caller_and_ends_what_still_runs(joblib: Any, tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    parallel = joblib.Parallel(n_jobs=2, backend="ringpool", batch_size=1, pre_dispatch="all")
    calls = [
        joblib.delayed(tasks.tell_and_wait)(begun, gate),
        joblib.delayed(tasks.wait_for_then_fail)(begun, "number 1"),
        *[joblib.delayed(tasks.square)(i) for i in range(50)],
    ]
    with pytest.raises(ValueError, match="number 1") as caught:
        parallel(calls)
    assert "wait_for_then_fail" in str(caught.value.__cause__)
    wait_until(lambda: not is_alive(pid_in(begun)), "the end of the worker that still ran a task")
    assert parallel(calls[2:]) == [i * i for i in range(50)]


def test_a_managed_parallel_goes_on_after_an_error(joblib: Any) -> None:
    with joblib.Parallel(n_jobs=2, backend="ringpool", initializer=tasks.set_mark, initargs=("mine",)) as parallel:
        with pytest.raises(ValueError, match="first"):
            parallel([joblib.delayed(tasks.fail)("first")] * 3)
        assert parallel([joblib.delayed(tasks.get_mark)()] * 3) == ["mine"] * 3


def test_an_array_among_the_arguments_of_an_initializer(joblib: Any) -> None:
    """Nobody can tell by ``==`` whether it is the same as that of the call before."""
    for n in (2, 2, 3):
        mark = np.arange(n)
        parallel = joblib.Parallel(n_jobs=2, backend="ringpool", initializer=tasks.set_mark, initargs=(mark,))
        assert [found.tolist() for found in parallel([joblib.delayed(tasks.get_mark)()])] == [mark.tolist()]


def test_a_timeout_of_joblib_kills_what_runs_over(joblib: Any, tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    pids = workers_of(joblib)  # kept for the next call
    parallel = joblib.Parallel(n_jobs=2, backend="ringpool", timeout=0.2)
    with pytest.raises(multiprocessing.TimeoutError):
        parallel([joblib.delayed(tasks.tell_and_wait)(begun, gate)] * 2)
    wait_until(lambda: not any(map(is_alive, pids)), "the end of the workers")


def test_a_worker_that_dies_is_named_to_joblib(joblib: Any) -> None:
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        joblib.Parallel(n_jobs=2, backend="ringpool")([joblib.delayed(tasks.die)()] * 2)
    assert joblib.Parallel(n_jobs=2, backend="ringpool")([joblib.delayed(tasks.square)(4)]) == [16]


def test_a_generator_that_is_not_read_on_ends_its_workers(joblib: Any, tmp_path: Path) -> None:
    begun, gate = tmp_path / "begun", tmp_path / "gate"
    calls = [joblib.delayed(tasks.square)(3), joblib.delayed(tasks.tell_and_wait)(begun, gate)]
    results = joblib.Parallel(n_jobs=2, backend="ringpool", return_as="generator", batch_size=1)(calls)
    assert next(results) == 9
    pid = pid_in(begun)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results.close()
    assert any("have been cancelled" in str(one.message) for one in said)
    wait_until(lambda: not is_alive(pid), "the end of the worker")


def test_workers_are_kept_from_call_to_call(joblib: Any) -> None:
    pids = workers_of(joblib)
    assert workers_of(joblib) == pids
    assert set(joblib.Parallel(n_jobs=2, backend="ringpool")([joblib.delayed(tasks.process_id)()] * 4)) <= pids
    joblib.Parallel(n_jobs=3, backend="ringpool")([joblib.delayed(tasks.square)(1)] * 4)  # another pool
    wait_until(lambda: not any(map(is_alive, pids)), "the end of the two workers")


def test_idle_workers_end_after_their_time(joblib: Any) -> None:
    with joblib.parallel_config(backend="ringpool", n_jobs=2, idle_worker_timeout=0.05):
        pids = set(joblib.Parallel()([joblib.delayed(tasks.process_id)()] * 4))
    wait_until(lambda: not any(map(is_alive, pids)), "the end of the workers")


@pytest.mark.parametrize(("timeout", "error"), [("x", TypeError), (-1, ValueError), (float("nan"), ValueError)])
def test_a_time_to_keep_workers_that_is_none_is_refused(joblib: Any, timeout: Any, error: type[Exception]) -> None:
    with (
        joblib.parallel_config(backend="ringpool", n_jobs=2, idle_worker_timeout=timeout),
        pytest.raises(error, match="idle_worker_timeout must be"),
    ):
        joblib.Parallel()([joblib.delayed(tasks.square)(1)] * 4)


@pytest.mark.parametrize("timeout", [float("inf"), None, 10**10])
def test_workers_may_be_kept_for_ever(joblib: Any, timeout: Any, recwarn: pytest.WarningsRecorder) -> None:
    with joblib.parallel_config(backend="ringpool", n_jobs=2, idle_worker_timeout=timeout):
        assert joblib.Parallel()([joblib.delayed(tasks.square)(2)] * 4) == [4] * 4
        assert joblib.Parallel()([joblib.delayed(tasks.square)(3)] * 4) == [9] * 4
    assert not recwarn.list  # such as that of a thread which has ended by an exception


def test_calls_in_several_threads_do_not_share_a_pool(joblib: Any) -> None:
    def call(factor: int) -> list[int]:
        parallel = joblib.Parallel(n_jobs=2, backend="ringpool")
        return parallel(joblib.delayed(pow)(factor, i) for i in range(50))

    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(call, [2, 3, 5]))
    assert results == [[factor**i for i in range(50)] for factor in (2, 3, 5)]


def test_a_fork_of_the_program_has_workers_of_its_own(joblib: Any, run_program: Callable[..., Program]) -> None:
    program = run_program(
        """
        from joblib import Parallel, delayed
        import ringpool
        from tests.coordinator import integration_functions as functions
        ringpool.register_joblib_backend()
        before = set()
        with Parallel(n_jobs=2, backend="ringpool", batch_size=1) as call:
            while len(before) < 2:
                before.update(call([delayed(functions.process_id)()] * 8))
        child = os.fork()
        after = set(call([delayed(functions.process_id)()] * 8))
        if child:
            say("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "parent", after <= before)
        else:
            sys.exit(3 if before.isdisjoint(after) else 4)
        """
    )
    assert program.wait_for("child") == "3 parent True", program.err
    assert program.finish() == 0
    program.assert_nothing_is_left()


def test_a_parallel_inside_a_task_runs_in_threads(joblib: Any) -> None:
    parallel = joblib.Parallel(n_jobs=2, backend="ringpool")
    for values, pids, backend in parallel([joblib.delayed(tasks.nested_threads)(20)] * 2):
        assert (values, len(pids), backend) == ([i * i for i in range(20)], 1, "ThreadingBackend")
        assert os.getpid() not in pids


def test_a_task_may_name_the_backend_again(joblib: Any) -> None:
    outer = joblib.Parallel(n_jobs=2, backend="ringpool")([joblib.delayed(tasks.nested_by_name)(20)] * 2)
    for values, pids in outer:
        assert values == [i * i for i in range(20)]
        assert os.getpid() not in pids


@pytest.mark.parametrize("n", [10, 1_000_000])
def test_joblib_passes_arrays(joblib: Any, n: int) -> None:
    np = pytest.importorskip("numpy")
    array = np.arange(n, dtype=np.float64)
    sums = joblib.Parallel(n_jobs=2, backend="ringpool")(joblib.delayed(tasks.total)(array) for _ in range(4))
    assert sums == [n * (n - 1) / 2] * 4


def test_blas_gets_its_share_of_the_cores(joblib: Any) -> None:
    pytest.importorskip("threadpoolctl")
    with joblib.parallel_config(backend="ringpool", n_jobs=2, inner_max_num_threads=1):
        for threads in joblib.Parallel()([joblib.delayed(tasks.blas_threads)()] * 4):
            assert set(threads) <= {1}


def test_unknown_keywords_are_refused(joblib: Any) -> None:
    with (
        joblib.parallel_config(backend="ringpool", n_jobs=2, no_such_option=1),
        pytest.raises(TypeError, match="no_such_option"),
    ):
        joblib.Parallel()([joblib.delayed(tasks.square)(1)])


def test_scikit_learn_searches_with_forests_inside(joblib: Any) -> None:
    pytest.importorskip("sklearn")
    from sklearn.datasets import make_classification
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import GridSearchCV

    x, y = make_classification(200, random_state=0)
    forest = RandomForestClassifier(10, n_jobs=2, random_state=0)

    def search() -> list[float]:
        found = GridSearchCV(forest, {"max_depth": [2, 4]}, cv=2, n_jobs=2).fit(x, y)
        return list(found.cv_results_["mean_test_score"])

    with joblib.parallel_config(backend="ringpool"):
        scores = search()
    with joblib.parallel_config(backend="sequential"):
        assert scores == search()


def test_without_joblib_the_error_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['joblib'] = None\n"
        "import ringpool\n"
        "try:\n"
        "    ringpool.register_joblib_backend()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=WATCHDOG_S, check=True
    )
    assert "pip install 'ringpool[joblib]'" in done.stdout, done

"""``ringpool.benchmark``, from a program: what is measured, what is said of failures, and what is left."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.bench import functions
from tests.cli.command import WATCHDOG_S, environment, wait_until

import ringpool
from ringpool.bench import measure, tables
from ringpool.bench.own import BenchmarkError
from ringpool.bench.ways import moved
from ringpool.coordinator.inputs import InputFile
from ringpool.coordinator.outputs import NamedOutputs
from ringpool.errors import (
    InputMissingError,
    OutputCollisionError,
    ParameterError,
    UnknownFunctionError,
)

BRIEF: dict[str, Any] = {"rounds": 1, "turn_s": 0.01}


def tree(place: Path) -> dict[str, bytes]:
    return {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}


def test_each_number_of_workers_and_the_plain_loop_have_a_turn_in_each_round(numbers: Path) -> None:
    told: list[tuple[int, str]] = []
    report = ringpool.benchmark(
        functions.size, numbers, [1, 2], params={"times": 3}, on_turn=lambda *turn: told.append(turn), **BRIEF
    )
    names = ["no pool", "1 worker", "2 workers"]
    assert told == [(number, name) for number in range(2) for name in names]
    assert report.ok
    assert [step.workers for step in report.steps] == [0, 1, 2]
    for turn in (turn for turns in report.turns.values() for turn in turns):
        assert turn.n % 20 == 0
        assert turn.seconds >= 0.01
        assert 0 < turn.latency.p50_s <= turn.latency.p90_s <= turn.latency.p99_s <= turn.latency.max_s
        assert turn.spent.worker_rss_bytes > 1 << 20


def test_speed_up_is_the_median_of_the_ratios_within_a_round(numbers: Path) -> None:
    report = ringpool.benchmark(functions.size, numbers, [2], rounds=1, turn_s=0.01)
    alone, two = report.steps
    assert alone.speed_up == 1
    assert two.speed_up == two.rate_per_s / alone.rate_per_s
    assert two.efficiency == two.speed_up / 2


def test_outputs_go_to_a_directory_beside_the_real_ones_and_are_removed(numbers: Path, here: Path) -> None:
    real = here / "out" / "5.txt"
    real.parent.mkdir()
    real.write_text("mine")
    before, places = tree(here), here.parent / f"{here.name}-places"
    report = ringpool.benchmark(
        functions.write_down, numbers, [1], output="out/{relpath}", params={"places": str(places)}, **BRIEF
    )
    assert report.ok
    assert tree(here) == before
    assert sorted(path.name for path in here.iterdir()) == ["in", "out"]
    written = {Path(line) for line in places.read_text().splitlines()}
    assert all(path.is_relative_to(real.parent) and path.parent != real.parent for path in written)


def test_several_outputs_have_their_names(numbers: Path, here: Path) -> None:
    output = {"one": "a/{name}", "two": str(here / "b{{x}}/{name}")}
    assert ringpool.benchmark(functions.copy_twice, numbers, [1], output=output, rounds=1, turn_s=0.01).ok
    assert sorted(path.name for path in here.iterdir()) == ["in"]


@pytest.mark.parametrize(
    "pattern", ["out/{relpath}", "../{relpath}", "/a/{{b}}/{relpath}", "{relpath}", "a}}/c{{/{relpath}"]
)
def test_a_moved_pattern_keeps_what_is_below_its_base(pattern: str) -> None:
    (word,) = moved([pattern], "/tmp/{odd}")
    assert NamedOutputs([word]).paths_for(InputFile("x/y.txt", "x/y.txt"), 0) == ("/tmp/{odd}/0/x/y.txt",)


@pytest.mark.parametrize("name", ["move", "move_and_link", "move_and_end", "move_in_pool"])
def test_what_a_function_moves_to_its_outputs_is_kept(numbers: Path, here: Path, name: str) -> None:
    before = set(tree(numbers).values())
    with pytest.raises(BenchmarkError, match="it moves or replaces its inputs") as caught:
        ringpool.benchmark(getattr(functions, name), numbers, [2], output="out/{relpath}", **BRIEF)
    kept = re.search(r"is kept in (\S+):", str(caught.value))
    assert kept is not None
    assert set(tree(numbers).values()) | set(tree(Path(kept[1])).values()) >= before


def test_a_function_that_replaces_its_inputs_is_not_measured(numbers: Path, here: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"in/0.txt is no longer the file that it was"):
        ringpool.benchmark(functions.replace, numbers, [2], output="out/{relpath}", **BRIEF)


def test_failures_are_counted_and_the_first_is_told(numbers: Path) -> None:
    report = ringpool.benchmark(functions.fail_on_odd, "in", [1], **BRIEF)
    assert not report.ok
    n = sum(turn.n for turns in report.turns.values() for turn in turns)
    assert report.failures["ValueError"].n == n / 2
    assert f"FAILED: {n // 2:,} of {n:,} calls" in str(report)
    assert re.search(r"first in/(\d+)\.txt: ValueError: number \1 is odd", str(report))


def test_a_function_that_always_fails_is_not_measured(numbers: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"all [\d,]+ calls failed: .* first in/0.txt: LookupError: 0.txt"):
        ringpool.benchmark(functions.fail, "in", [1], **BRIEF)


def test_a_function_that_ends_its_process_is_measured_without_the_plain_loop(numbers: Path) -> None:
    report = ringpool.benchmark(functions.end_process_on_7, numbers, [1], **BRIEF)
    assert report.base_workers == 1
    assert {turn.deaths for turn in report.turns[0]} == {1}
    assert "without a pool the function ended its process" in str(report)
    assert [*report.failures] == ["WorkerDiedError"]
    json.dumps(report.as_dict(), allow_nan=False)


def test_inputs_of_any_kind_go_through_map() -> None:
    report = ringpool.benchmark(functions.double, range(20), [2], files=False, params={"plus": 1}, **BRIEF)
    assert report.way == "RingPoolExecutor.map"
    assert report.failures["ValueError"].first == "3: ValueError: three"
    assert all(turn.n_failed == turn.n / 20 for turns in report.turns.values() for turn in turns)


def test_a_sample_is_the_same_each_time(numbers: Path) -> None:
    reports = [ringpool.benchmark(functions.size, numbers, [1], sample=5, rounds=1, turn_s=0.01) for _ in range(2)]
    assert [(report.n_inputs, report.n_listed) for report in reports] == [(5, 20)] * 2
    assert "5 of 20 files" in str(reports[0])


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"function": "tests.bench.functions:nothing"}, UnknownFunctionError, "has no nothing"),
        ({"function": functions.copy}, ParameterError, "has a parameter dst, and the job has no output"),
        ({"output": "o/{name}"}, ParameterError, "has no parameter dst"),
        ({"params": {"tims": 1}}, ParameterError, "no parameter 'tims'; it has: times"),
        ({"inputs": "nowhere"}, InputMissingError, "nowhere"),
        ({"inputs": []}, ValueError, "there are no inputs: give at least 2 files for 1 worker"),
        ({"inputs": "in/1.txt"}, ValueError, "too few inputs to measure 1 worker: 1; give at least 2 files"),
        ({"workers": 2}, TypeError, "workers must be a sequence of numbers, such as"),
        ({"workers": ["a"]}, TypeError, "workers must be a whole number, not 'a'"),
        ({"params": 3}, TypeError, "params must be a mapping"),
        ({"inputs": 5, "files": False}, TypeError, "inputs must be an iterable of values, not 5"),
        ({"durability": "x"}, ValueError, "durability must be one of none, atomic, data, full, not 'x'"),
        ({"workers": []}, ValueError, "workers names no number"),
        ({"workers": [0]}, ValueError, "workers must be from 1 to 64, not 0"),
        ({"workers": [1, 1]}, ValueError, "names a number twice"),
        ({"rounds": 0}, ValueError, "rounds must be 1 or more"),
        ({"turn_s": 0}, ValueError, "turn_s must be more than 0"),
        ({"turn_s": float("inf")}, ValueError, "turn_s must be more than 0 seconds, and have an end, not inf"),
        ({"turn_s": float("nan")}, ValueError, "and have an end, not nan"),
        ({"turn_s": "1"}, TypeError, "turn_s must be a number, not '1'"),
        ({"rounds": 1.5}, TypeError, "rounds must be a whole number, not 1.5"),
        ({"sample": 2.5}, TypeError, "sample must be a whole number, not 2.5"),
        ({"sample": 0}, ValueError, "sample must be 1 or more"),
        ({"mp_context": "thread"}, ValueError, "mp_context must be one of"),
        ({"files": False, "output": "o/{name}"}, ValueError, "output is for files"),
        (
            {"function": functions.copy, "output": "o/all"},
            OutputCollisionError,
            "two inputs map to the output o/all: in/0.txt and in/1.txt",
        ),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_measured(
    numbers: Path, changed: dict[str, Any], kind: type[Exception], message: str
) -> None:
    given = {"function": functions.size, "inputs": "in", "workers": [1]} | changed
    with pytest.raises(kind, match=message):
        ringpool.benchmark(given.pop("function"), given.pop("inputs"), given.pop("workers"), **given)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (tables.duration(0.0000123), "12.3 us"),
        (tables.duration(0.0045), "4.5 ms"),
        (tables.duration(0.99999), "1 s"),
        (tables.duration(1234.5), "1,234 s"),
        (tables.duration(999.7), "1,000 s"),
        (tables.rate(12345.6), "12,346"),
        (tables.rate(999.7), "1,000"),
        (tables.mib(999.7 * (1 << 20)), "1,000 MiB"),
        (tables.rate(0.123), "0.123"),
        (tables.factor(1.944), "1.94x"),
        (tables.factor(0.0342), "0.034x"),
        (tables.factor(332.4), "332x"),
        (tables.percent(0.97), "97 %"),
        (tables.mib(32.5 * (1 << 20)), "32.5 MiB"),
        (tables.mib(1 << 31), "2,048 MiB"),
        (tables.mib(0), "-"),
    ],
)
def test_figures_are_written_as_one_reads_them(written: str, expected: str) -> None:
    assert written == expected


def test_deaths_and_cpu_are_those_of_the_passes_that_count(numbers: Path) -> None:
    report = ringpool.benchmark(functions.end_process_on_7, [f"in/{n}.txt" for n in (7, 8)], [1], **BRIEF)
    [turn] = report.turns[1]
    assert turn.deaths == 3 * turn.n_failed, "three attempts each"
    copied = ringpool.benchmark(functions.copy, "in", [1], output="out/{name}", rounds=1, turn_s=0.3)
    [alone] = copied.turns[0]
    assert alone.spent.worker_cpu_s <= 1.05 * alone.seconds, "without what was done between passes; it has one thread"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_plain_loop_leaves_no_output(numbers: Path, here: Path, number: signal.Signals) -> None:
    (here / "program.py").write_text(
        "import ringpool\n"
        "from tests.bench.functions import begin_and_wait\n"
        "if __name__ == '__main__':\n"
        "    ringpool.benchmark(begin_and_wait, 'in', [1], output='out/{name}', params={'begun': 'begun'}, rounds=1)\n"
    )
    program = subprocess.Popen([sys.executable, "program.py"], env=environment())
    try:
        wait_until((here / "begun").exists, "the first call")
        program.send_signal(number)
        assert program.wait(WATCHDOG_S) == 128 + number
    finally:
        program.kill()
        program.wait()
    assert sorted(path.name for path in here.iterdir()) == ["begun", "in", "program.py"]
    assert signal.getsignal(number) is signal.SIG_DFL


class SendsSignalAtItsEnd:
    """Part of a cycle, so that only a collection of garbage ends it."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_comes_in_a_collection_of_garbage_is_heard() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            measure.take_turns({"a": lambda: bool(SendsSignalAtItsEnd())}, rounds=1)
    finally:
        signal.signal(signal.SIGINT, before)

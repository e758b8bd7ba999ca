"""``ringpool bench``, run as its users do: tables, JSON, plots, errors, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from pathlib import Path

import pytest
from tests.cli.command import ROOT, Terminal, finish, run, run_redirected, start, wait_until

from ringpool.bench import peers, quick
from ringpool.cli.bench import POOL_CASES

FUNCTIONS = "tests.bench.functions"
BRIEF = ("--rounds", "1", "--turn", "0.01", "--workers", "1,2")


def left_behind(pid: int) -> list[str]:
    """What process ``pid`` has left where temporary files are."""
    names = [name for place in ("/dev/shm", tempfile.gettempdir()) for name in os.listdir(place)]
    return [name for name in names if name.startswith(f"ringpool-bench-{pid}-")]


def test_a_table_in_a_pipe_has_a_line_for_each_number_of_workers(numbers: Path) -> None:
    done = run("bench", f"{FUNCTIONS}:size", "in", *BRIEF)
    assert done.returncode == 0
    for workers in ("no pool", "1", "2"):
        assert len(re.findall(rf"^  {workers} +[\d,.]+ ", done.stdout, re.MULTILINE)) == 3
    assert f"{FUNCTIONS}:size: 20 files, by Coordinator.run_file_tasks" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_terminal_is_told_whose_turn_it_is_and_shows_a_table(numbers: Path) -> None:
    with Terminal("bench", f"{FUNCTIONS}:size", "in", "--rounds", "2", "--turn", "0.2", "--workers", "1") as terminal:
        terminal.wait_for(r"round 2 of 2: 1 worker; about \d+ s left")
        assert terminal.finish() == 0
        assert re.search(r"│ no pool │ +[\d,.]+ │", terminal.screen.text)
        assert "about" not in terminal.screen.text  # the line has gone


def test_json_holds_the_machine_and_the_figures_of_each_turn(numbers: Path, here: Path) -> None:
    assert run("bench", f"{FUNCTIONS}:size", "in", "--rounds", "2", *BRIEF[2:], "--json", "found.json").returncode == 0
    found = json.loads((here / "found.json").read_text())
    assert found["function"] == f"{FUNCTIONS}:size"
    assert found["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert [step["workers"] for step in found["steps"]] == [0, 1, 2]
    assert {workers: len(turns) for workers, turns in found["turns"].items()} == {"0": 2, "1": 2, "2": 2}
    assert {"n", "seconds", "latency", "spent", "failures", "deaths"} <= found["turns"]["1"][0].keys()


def test_outputs_are_left_alone(numbers: Path, here: Path) -> None:
    real = here / "out" / "3.txt"
    real.parent.mkdir()
    real.write_text("mine")
    done = run("bench", f"{FUNCTIONS}:copy", "in", "--out", "out/{relpath}", "--durability", "atomic", *BRIEF)
    assert (done.returncode, real.read_text()) == (0, "mine")
    assert "by Job.run, durability atomic" in done.stdout
    assert sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.parent != numbers) == [
        "in",
        "out",
        "out/3.txt",
    ]


def test_lists_and_parameters_are_those_of_run(numbers: Path, here: Path) -> None:
    (here / "list.txt").write_text("".join(f"in/{number}.txt\n" for number in range(8)))
    done = run("bench", f"{FUNCTIONS}:size", "@list.txt", "--param", "times=2", *BRIEF)
    assert (done.returncode, "size: 8 files" in done.stdout) == (0, True)


def test_failures_make_the_exit_status_and_are_told(numbers: Path) -> None:
    done = run("bench", f"{FUNCTIONS}:fail_on_odd", "in", *BRIEF)
    assert done.returncode == 1
    assert "first in/1.txt: ValueError: number 1 is odd" in done.stdout
    done = run("bench", f"{FUNCTIONS}:fail", "in", *BRIEF)
    assert (done.returncode, done.stdout) == (1, "")
    assert "fail cannot be measured: all" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{FUNCTIONS}:size"], "Missing argument 'INPUTS...'"),
        ([f"{FUNCTIONS}:size", "nowhere"], "input nowhere: there is no such file"),
        ([f"{FUNCTIONS}:size", "in", "--workers", "0"], "workers must be from 1 to 64, not 0"),
        ([f"{FUNCTIONS}:size", "in", "--workers", "many"], "--workers 'many' is no list of numbers"),
        ([f"{FUNCTIONS}:size", "in/1.txt"], "too few inputs to measure 4 workers: 1; give at least 8 files"),
        ([f"{FUNCTIONS}:copy", "in"], "say where with --out"),
        ([f"{FUNCTIONS}:size", "in", "--json", "nowhere/x.json"], "make the directory nowhere first"),
        ([f"{FUNCTIONS}:size", "in", "--json", ""], "'' cannot be written: give the name of a file"),
        ([f"{FUNCTIONS}:size", "in", "--workers", ""], "--workers '' is no list of numbers"),
        ([f"{FUNCTIONS}:size", "in", "--plot", "x.png"], "write a name that ends in .svg"),
        ([f"{FUNCTIONS}:size", "in", "--durability", "none"], "--durability is that of outputs, and there are none"),
        (["--workers", ""], "--workers needs a function to measure"),
        ([f"{FUNCTIONS}:size", "in", "--quick"], "--quick is for a benchmark without a function"),
        (["--workers", "2"], "--workers needs a function to measure"),
    ],
)
def test_a_command_that_cannot_be_run_says_why(numbers: Path, words: list[str], message: str) -> None:
    done = run("bench", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_without_matplotlib_the_extra_is_named_before_anything_is_measured(numbers: Path, here: Path) -> None:
    (here / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")  # as if it were missing
    search_path = os.pathsep.join([str(here), str(ROOT)])
    done = finish(start("bench", f"{FUNCTIONS}:size", "in", "--plot", "x.svg", PYTHONPATH=search_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "pip install 'ringpool[bench]'" in done.stderr


def test_a_plot_is_an_svg_with_the_functions_name(numbers: Path, here: Path) -> None:
    assert run("bench", f"{FUNCTIONS}:size", "in", *BRIEF, "--plot", "x.svg").returncode == 0
    drawn = (here / "x.svg").read_text()
    assert drawn.startswith("<?xml")
    assert "speed-up over no pool" in drawn


def test_figures_that_cannot_be_kept_are_shown(numbers: Path) -> None:
    done = run("bench", f"{FUNCTIONS}:size", "in", *BRIEF, "--json", "/dev/full")
    assert done.returncode == 1
    assert "ringpool: --json /dev/full cannot be written: No space left on device; the figures are on" in done.stderr
    assert "size: 20 files, by Coordinator.run_file_tasks" in done.stdout


def test_figures_that_cannot_be_shown_are_kept(numbers: Path, here: Path) -> None:
    done = run_redirected(">/dev/full", "bench", f"{FUNCTIONS}:size", "in", *BRIEF, "--json", "found.json")
    assert done.returncode == 1
    assert done.stderr.endswith(
        "ringpool: standard output: No space left on device; make room, or let it go somewhere else\n"
    )
    assert json.loads((here / "found.json").read_text())["n_inputs"] == 20


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_names_and_errors_of_any_characters_are_shown_and_have_no_power(numbers: Path, encoding: str) -> None:
    (numbers / os.fsdecode(b"odd\xe9.txt")).touch()
    command = start("bench", f"{FUNCTIONS}:fail_on_odd_name", "in", *BRIEF, PYTHONIOENCODING=encoding)
    done = finish(command)
    assert done.returncode == 1
    [note] = re.findall("first in/odd.*", done.stdout)
    assert note.startswith("first in/odd\\udce9.txt: ValueError: caf")
    assert "\\x1b[31m" in note
    assert len(note) < 700


def test_what_is_left_of_a_benchmark_is_told_by_its_turns(numbers: Path) -> None:
    words = ("--rounds", "1", "--turn", "1", "--workers", "1")
    with Terminal("bench", f"{FUNCTIONS}:size", "in", *words) as terminal:
        terminal.wait_for(r"round 1 of 1: 1 worker")
        assert terminal.finish() == 0
        left_s = [int(found) for frame in terminal.screen.frames for found in re.findall(r"about (\d+) s left", frame)]
    assert left_s[-1] < left_s[0]


def test_a_narrow_terminal_cuts_no_figure(numbers: Path) -> None:
    with Terminal("bench", f"{FUNCTIONS}:size", "in", *BRIEF, columns=40) as terminal:
        assert terminal.finish() == 0
        assert "…" not in terminal.screen.text
        assert re.search(r"^  no pool +[\d,]+ +- +1\.00x +- +-$", terminal.screen.text, re.MULTILINE)


def test_ctrl_c_ends_it_and_leaves_no_output(numbers: Path, here: Path) -> None:
    words = ("--workers", "1", "--rounds", "99", "--turn", "0.05")
    with Terminal("bench", f"{FUNCTIONS}:copy", "in", "--out", "out/{relpath}", *words) as terminal:
        terminal.wait_for("round 1 of 99")
        terminal.type("\x03")
        assert terminal.finish() == 130
    assert sorted(path.name for path in here.iterdir()) == ["in"]


def test_a_terminal_that_is_closed_ends_it_in_the_plain_loop_and_leaves_no_output(numbers: Path, here: Path) -> None:
    words = ("--workers", "1", "--rounds", "1", "--param", "begun=begun")
    command = start("bench", f"{FUNCTIONS}:begin_and_wait", "in", "--out", "out/{relpath}", *words)
    wait_until((here / "begun").exists, "the first call")
    command.send_signal(signal.SIGHUP)
    assert finish(command).returncode == 128 + signal.SIGHUP
    assert sorted(path.name for path in here.iterdir()) == ["begun", "in"]


def test_without_a_function_ringpool_is_compared_with_the_pools_that_are_there(here: Path) -> None:
    cases = ("--case", "one", "--case", "lock")
    command = start("bench", "--quick", "--rounds", "1", *cases, "--json", "found.json")
    done = finish(command)
    assert done.returncode == 0
    found = json.loads((here / "found.json").read_text())
    series = {name for case in found["cases"] for name in case["series"]}
    expected = {peers.SUBMIT, peers.FUTURES_SUBMIT, peers.APPLY_ASYNC, "PathLock", "filelock.FileLock"}
    assert expected <= series
    for name in expected:
        assert f"\n  {name} " in done.stdout
    for package in peers.missing():
        assert package in found["machine"]["peers_missing"]
        assert not any(name.startswith(f"{package}.") for name in series)
    assert not left_behind(command.pid)


TINY = quick.Scale(rounds=1, turn_s=0.01, items=500, few=50, trips=20, files=300, locks=10)


@pytest.mark.parametrize("name", ["mapped", "trip", "start", "files"])
def test_each_case_has_a_figure_for_ringpool_and_says_how_many_times_as_fast_it_is(name: str) -> None:
    for case in quick.CASES[name](TINY, lambda _number, _name: None):
        rows = {row[0]: row[1:] for row in quick.as_table(case).rows}
        ours = case.claims[0].ours
        assert rows[ours][-1] == ""
        assert len(rows) > 1
        assert all(re.fullmatch(r"[\d,.]+x", row[-1]) for peer, row in rows.items() if peer != ours)
    assert not left_behind(os.getpid())


def test_the_command_knows_the_cases() -> None:
    assert (*quick.CASES,) == POOL_CASES

"""The command line, run as users run it: exit statuses, what is printed where, and what a signal leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.cli.command import TASKS, Terminal, finish, has_ended, objects, run, segments_of, start, wait_until

import ringpool


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs without outputs have their ledger in the current directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A directory with the files 0.txt to 7.txt; n.txt holds n + 1 bytes."""
    place = tmp_path / "numbers"
    place.mkdir()
    for number in range(8):
        (place / f"{number}.txt").write_text(str(number) * (number + 1))
    return place


# ---- all is well -----------------------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"ringpool {ringpool.__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["run", "--help"]])
def test_help_is_no_error(words: list[str]) -> None:
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ringpool")


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"]])
def test_help_that_nobody_reads_ends_as_all_does_that_nobody_reads(words: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as nobody:
        done = finish(start(*words, stdout=nobody.fileno()))
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_values_are_printed_with_their_paths_and_the_summary_goes_elsewhere(numbers: Path) -> None:
    done = run("run", f"{TASKS}:size", numbers)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"{numbers}/{n}.txt\t{n + 1}" for n in range(8)]
    assert re.fullmatch(r"ringpool: 8 files done, 0 failed, 36 B of input, [\d.]+ s, [\d.]+ files/s\n", done.stderr)


def test_quiet_says_nothing_but_the_values(numbers: Path) -> None:
    done = run("run", f"{TASKS}:nothing", numbers / "3.txt", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{numbers}/3.txt\t\n", "")


def test_outputs_appear_where_the_pattern_says_and_nothing_is_printed(numbers: Path, tmp_path: Path) -> None:
    done = run("run", f"{TASKS}:copy", numbers, "--out", f"{tmp_path}/out/{{stem}}/{{name}}", "--durability", "none")
    assert (done.returncode, done.stdout) == (0, "")
    for number in range(8):
        copy = tmp_path / f"out/{number}/{number}.txt"
        assert copy.read_text() == (numbers / f"{number}.txt").read_text()
    assert len(list(tmp_path.rglob(".ringpool"))) == 1  # one place for lock files, not one in each directory


def test_outputs_below_the_source_are_not_inputs_of_the_next_run(numbers: Path) -> None:
    for n_done, words in ((8, "8 files done, 0 failed"), (0, "0 files done, 8 done before")):
        done = run("run", f"{TASKS}:copy", ".", "--out", "copies/{relpath}", "--json", cwd=numbers)
        assert done.returncode == 0
        assert words in done.stderr
        assert sorted(line["output"] for line in objects(done)) == [f"copies/{n}.txt" for n in range(n_done)]
    assert sorted(os.listdir(numbers / "copies")) == sorted([".ringpool", *(f"{n}.txt" for n in range(8))])


def test_a_function_may_leave_it_open_whether_it_has_an_output(numbers: Path, tmp_path: Path) -> None:
    assert run("run", f"{TASKS}:copy_or_list", numbers / "2.txt").stdout == f"{numbers}/2.txt\t3\n"
    assert run("run", f"{TASKS}:copy_or_list", numbers / "2.txt", "--out", f"{tmp_path}/copy").stdout == ""
    assert (tmp_path / "copy").read_text() == "222"


def test_modules_of_the_current_directory_are_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def stem(src):\n    return src.stem\n")
    done = run("run", "mine:stem", "mine.py", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine.py\tmine\n", "")


def test_parameters_become_what_their_annotations_say(numbers: Path) -> None:
    words = ["--param", "times=3", "--param", "mark=a=b", "--param", "loud=true"]
    done = run("run", f"{TASKS}:touch", numbers / "0.txt", *words)
    assert done.stdout == f"{numbers}/0.txt\t0.txt 3 'a=b' True\n"


def test_json_lines_hold_all_that_is_known_of_a_file(numbers: Path, tmp_path: Path) -> None:
    done = run("run", f"{TASKS}:copy", numbers / "4.txt", "--out", f"{tmp_path}/{{name}}.copy", "--json")
    line = json.loads(done.stdout)
    assert line.pop("duration_s") > 0
    assert line.pop("worker") >= 0
    assert line.pop("started_s") > 0
    assert line.pop("peak_rss_bytes") > 0
    digest = line["outputs"][0].pop("digest")
    assert re.fullmatch("[0-9a-f]{32}", digest)
    assert line == {
        "path": f"{numbers}/4.txt",
        "output": f"{tmp_path}/4.txt.copy",
        "ok": True,
        "value": 5,
        "error": None,
        "attempts": 1,
        "state": "done",
        "outputs": [{"path": f"{tmp_path}/4.txt.copy", "size": 5}],
        "input_bytes": 5,
        "deaths": 0,
    }


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("find", {"words": ["0"], "where": "PATH"}),
        ("odd_keys", "{(1, 2): b'x'}"),
        ("raw", "AP8="),
    ],
)
def test_values_without_a_form_in_json_are_printed_as_well_as_may_be(
    numbers: Path, function: str, expected: Any
) -> None:
    done = run("run", f"{TASKS}:{function}", numbers / "0.txt", "--json")
    assert json.loads(done.stdout)["value"] == json.loads(json.dumps(expected).replace("PATH", f"{numbers}/0.txt"))


def test_names_that_are_not_utf8_are_printed_byte_for_byte(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).write_text("x")
    assert run("run", f"{TASKS}:size", tmp_path).stdout == f"{tmp_path}/{name}\t1\n"
    words = ("--json", "--param", "times=1")
    assert json.loads(run("run", f"{TASKS}:touch", tmp_path, *words).stdout)["path"] == f"{tmp_path}/{name}"
    (tmp_path / "out" / name).mkdir(parents=True)  # in its way
    done = run("run", f"{TASKS}:copy", tmp_path, "--include", "caf*", "--out", f"{tmp_path}/out/{{name}}")
    assert done.returncode == 1
    assert f"failed: {tmp_path}/{name}: " in done.stderr


def test_a_worker_that_dies_costs_a_retry_and_nothing_else(numbers: Path, tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    done = run("run", f"{TASKS}:die_once", numbers, "--param", f"marks={tmp_path}/marks", "--json", "--workers", "2")
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["value"], line["attempts"]) for line in lines] == [("survived", 2)] * 8
    assert "8 files done, 0 failed, 8 retried" in done.stderr


# ---- some files fail -------------------------------------------------------------------------------------------------


def test_failures_are_listed_with_their_reasons_and_counted_by_kind(numbers: Path) -> None:
    done = run("run", f"{TASKS}:fail_on_odd", numbers)
    assert done.returncode == 1
    assert sorted(done.stdout.splitlines()) == [f"{numbers}/{n}.txt\t{n}" for n in (0, 2, 4, 6)]
    *failures, kinds, summary, ways = done.stderr.splitlines()
    assert sorted(failures) == [
        f"ringpool: failed: {numbers}/1.txt: ValueError: number 1 is odd",
        f"ringpool: failed: {numbers}/3.txt: LookupError: 3",
        f"ringpool: failed: {numbers}/5.txt: ValueError: number 5 is odd",
        f"ringpool: failed: {numbers}/7.txt: LookupError: 7",
    ]
    assert kinds in (
        "ringpool: failures by kind: 2 ValueError, 2 LookupError",
        "ringpool: failures by kind: 2 LookupError, 2 ValueError",
    )
    assert summary.startswith("ringpool: 4 files done, 4 failed, ")
    assert ways == (
        "ringpool: `ringpool status .` says what failed and why; `ringpool retry .` does the failed files again"
    )


def test_of_many_failures_twenty_are_listed(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"{4 * number + 1}").touch()
    done = run("run", f"{TASKS}:fail_on_odd", tmp_path, "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    *failures, more, kinds = done.stderr.splitlines()
    assert len(failures) == 20
    assert (more, kinds) == ("ringpool: failed: 5 more", "ringpool: failures by kind: 25 ValueError")


def test_a_file_that_kills_its_workers_fails_after_its_attempts(numbers: Path) -> None:
    done = run("run", f"{TASKS}:die", numbers / "0.txt", "--attempts", "2", "--json")
    assert done.returncode == 1
    line = json.loads(done.stdout)
    assert (line["ok"], line["attempts"], line["error"]["type"]) == (False, 2, "WorkerDiedError")
    assert "was killed by SIGKILL" in done.stderr


def test_a_failed_output_leaves_nothing_behind(numbers: Path, tmp_path: Path) -> None:
    done = run("run", f"{TASKS}:write_half_and_fail", numbers, "--out", f"{tmp_path}/out/{{relpath}}")
    assert done.returncode == 1
    assert os.listdir(tmp_path / "out") == [".ringpool"]


# ---- the command cannot be run ---------------------------------------------------------------------------------------

UNUSABLE = [
    ("no_such_module:f IN", "no_such_module:f: module no_such_module cannot be imported"),
    ("TASKS:no_such_function IN", "tests.cli.tasks has no no_such_function"),
    ("TASKS IN", "write it as module:function"),
    ("TASKS:size IN --param x=1", "it has no parameter 'x'"),
    ("TASKS:touch IN", "parameter 'times' is missing"),
    ("TASKS:touch IN --param times=often", "parameter 'times': expected `int`"),
    ("TASKS:touch IN --param times", "--param 'times' is not of the form NAME=VALUE"),
    ("TASKS:touch IN --param times=1 --param times=2", "--param times is given twice"),
    ("TASKS:size IN IN/nothing", "input IN/nothing: there is no such file"),
    ("TASKS:size IN/*.jpg", "input IN/*.jpg: there is no such file or directory, and no file that matches"),
    ("TASKS:copy IN", "say where with --out"),
    ("TASKS:size IN --out OUT/{name}", "leave --out away"),
    ("TASKS:copy IN --out OUT/{size}", "unknown field {size}; there are {relpath}"),
    ("TASKS:copy IN --out OUT/all.txt", "two inputs map to the output OUT/all.txt: IN/0.txt and IN/1.txt"),
    (
        "TASKS:copy IN/0.txt IN/0.txt --out OUT/{relpath}",
        "IN/0.txt is listed twice, or two of its outputs are the same: OUT/0.txt",
    ),
    ("TASKS:copy IN --out OUT/{suffix}x/../{name}", "may stand before the first field only"),
    ("TASKS:copy IN --out IN/0.txt/{name}", "IN/0.txt"),
    ("TASKS:size", "Missing argument 'INPUTS...'"),
    ("TASKS:size IN --workers 0", "--workers"),
    ("TASKS:size IN --attempts 99", "--attempts"),
    ("TASKS:size IN --durability some", "--durability"),
    ("TASKS:size IN --frobnicate", "--frobnicate"),
]


@pytest.mark.parametrize(("line", "says"), UNUSABLE, ids=[line for line, _ in UNUSABLE])
def test_a_command_that_cannot_be_run_says_why_in_one_line(numbers: Path, tmp_path: Path, line: str, says: str) -> None:
    def fill(text: str) -> str:
        return text.replace("TASKS", TASKS).replace("IN", str(numbers)).replace("OUT", f"{tmp_path}/out")

    says = says if "PUTS" in says else fill(says)
    done = run("run", *fill(line).split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_collision_that_shows_late_stops_the_run_after_what_was_drawn(tmp_path: Path) -> None:
    for name in ("in/a/1", "in/a/2", "in/a/3", "in/b/2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    done = run("run", f"{TASKS}:copy", tmp_path / "in", "--out", f"{tmp_path}/out/{{name}}")
    assert done.returncode == 2
    assert f"output {tmp_path}/out/2: {tmp_path}/in/a/2 and {tmp_path}/in/b/2" in done.stderr
    assert "3 files done, 0 failed" in done.stderr
    assert (tmp_path / "out/2").read_text() == "in/a/2"


def test_a_module_that_fails_at_import_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise RuntimeError('not\\ntoday')\n")
    done = run("run", "broken:f", "broken.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "module broken cannot be imported: RuntimeError: not today" in done.stderr


@pytest.mark.parametrize("status", [0, 1, 3])
@pytest.mark.parametrize("verb", ["run", "bench"])
def test_a_module_that_is_a_program_without_a_guard_is_told_so(tmp_path: Path, verb: str, status: int) -> None:
    (tmp_path / "program.py").write_text(f"raise SystemExit({status})\n")
    done = run(verb, "program:f", "program.py", cwd=tmp_path)
    assert done.returncode == 2
    assert f"program:f: its module, when it is imported, ends the program (SystemExit: {status}); put" in done.stderr


# ---- progress --------------------------------------------------------------------------------------------------------


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """More files than anyone waits for."""
    place = tmp_path / "endless"
    place.mkdir()
    for number in range(2000):
        (place / str(number)).touch()
    return place


def test_in_a_pipe_progress_is_a_line_now_and_then(endless: Path) -> None:
    command = start("run", f"{TASKS}:dawdle", endless, "--workers", "2", "--json")
    assert command.stderr is not None
    assert command.stdout is not None
    with command:
        assert command.stdout.readline()  # values come while the run goes on
        progress = command.stderr.readline()
        command.send_signal(signal.SIGINT)
        done = finish(command)
    assert re.fullmatch(
        r"ringpool: so far \d+ files done, 0 failed, 0 B of input, [\d.]+ s, [\d.]+ files/s\n", progress
    )
    assert done.returncode == 130
    assert len(done.stderr.splitlines()) <= 4


def test_on_a_terminal_progress_is_lines_that_change_and_then_go(endless: Path, tmp_path: Path) -> None:
    words = ["--workers", "2", "--out", f"{tmp_path}/out/{{relpath}}"]
    with Terminal("run", f"{TASKS}:copy_slowly", endless, *words) as terminal:
        terminal.wait_for("of 2,000 files")
        n_frames = len(terminal.screen.frames)
        wait_until(lambda: terminal.shows(".") and len(terminal.screen.frames) > n_frames + 3, "a count that rises")
        terminal.type("\x03")
        assert terminal.finish() == 130
    assert b"\x1b[2K" in terminal.screen.written  # it erases its lines
    lines = terminal.screen.text.splitlines()
    assert "%" not in terminal.screen.text
    assert len(lines) <= 3


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_ends_all_and_leaves_nothing(
    numbers: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    words = ["--param", f"begun={begun}", "--workers", "2", "--out", f"{tmp_path}/out/{{relpath}}", "--grace", "0"]
    command = start("run", f"{TASKS}:write_half_and_wait", numbers, *words)
    try:
        wait_until(lambda: len([p for p in begun.iterdir() if p.read_text()]) == 2, "two tasks that have begun")
        workers = [int(path.read_text()) for path in begun.iterdir()]
        segments = segments_of(command.pid)
        assert segments
        command.send_signal(number)
        done = finish(command)
    finally:
        command.kill()
    assert done.returncode == status
    way = f"`ringpool resume {tmp_path}/out` goes on"
    said = f"ringpool: stopped by {number.name}; every output that is there is whole; {way}"
    assert done.stderr.splitlines()[-1] == said
    wait_until(lambda: all(map(has_ended, workers)), "the end of the workers")
    assert not [segment for segment in segments if segment.exists()]
    names = set(os.listdir(tmp_path / "out")) - {".ringpool"}
    assert not names


def test_a_terminal_that_is_closed_ends_a_run(numbers: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    words = ["--param", f"begun={begun}", "--workers", "1", "--out", f"{tmp_path}/out/{{relpath}}"]
    command = start("run", f"{TASKS}:write_half_and_wait", numbers, *words)
    try:
        wait_until(lambda: any(path.read_text() for path in begun.iterdir()), "a task that has begun")
        command.send_signal(signal.SIGHUP)
        assert finish(command).returncode == 128 + signal.SIGHUP
    finally:
        command.kill()


def test_a_reader_that_has_enough_ends_the_run_quietly(endless: Path) -> None:
    command = start("run", f"{TASKS}:dawdle", endless, "--workers", "2", "--quiet")
    assert command.stdout is not None
    assert command.stderr is not None
    with command:
        command.stdout.readline()
        command.stdout.close()
        assert command.stderr.read() == ""
    assert command.returncode == 128 + signal.SIGPIPE

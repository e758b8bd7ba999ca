"""``ringpool status``, ``results``, ``clean``."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tests.cli.command import (
    TASKS,
    Terminal,
    environment,
    finish,
    has_ended,
    objects,
    run,
    segments_of,
    start,
    wait_until,
)

from ringpool.cli import look
from ringpool.coordinator.joblock import JobLock
from ringpool.coordinator.ledger import Ledger
from ringpool.shm import segment

FAIL = ("run", f"{TASKS}:fail_unless", "in", "--param", "healed=healed", "--attempts", "1", "--quiet")


# ---- status ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mixed")
def test_status_has_the_failures_by_cause_with_examples_and_the_way_on(here: Path) -> None:
    run(*FAIL)
    done = run("status")
    assert (done.returncode, done.stderr) == (0, "")
    job, last_run, files, *causes = done.stdout.splitlines()
    assert job == f"job        {TASKS}:fail_unless"
    assert last_run.startswith("last run   began 20")
    assert ", came to its end 20" in last_run
    assert files.startswith("files      1 done, 3 failed, 1 set aside; ")
    assert causes[0] == f"failed     2 ValueError, such as {here}/in/bad1.txt: bad1.txt is bad"
    assert f"failed     1 TimeoutError, such as {here}/in/slow1.txt: too slow" in causes
    assert any(line.startswith(f"set aside  1 WorkerDiedError, such as {here}/in/dead1.txt: ") for line in causes)
    assert causes[-5:] == [
        "go on      ringpool resume .",
        "           ringpool retry . --kind ValueError",
        "           ringpool retry . --kind TimeoutError",
        "           ringpool retry .",
        "           ringpool retry . --dead",
    ]


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_status_of_a_ledger_without_a_job_says_that_there_is_none(here: Path, more: tuple[str, ...]) -> None:
    """As a run leaves it that Ctrl-C ends at its very start."""
    Ledger.open(here).close()
    done = run("status", *more)
    assert (done.returncode, done.stdout) == (1, "")
    assert "none was begun; `ringpool run` begins one" in done.stderr


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("spec", [b"\x00", b"[]", b'{"cwd": "/"}', b'{"cwd": "/", "call": {}}', b"\xff"])
@pytest.mark.parametrize("verb", ["status", "results"])
def test_a_job_of_which_nobody_can_tell_how_it_was_started(here: Path, spec: bytes, verb: str) -> None:
    run(*FAIL)
    with closing(sqlite3.connect(here / ".ringpool/ledger.db")) as db:
        db.execute("UPDATE jobs SET spec = ?", (spec,))
        db.commit()
    done = run(verb)
    assert (done.returncode, done.stdout) == (1, "")
    assert "how it was started cannot be read in its ledger" in done.stderr
    assert "run its command again" in done.stderr


@pytest.mark.usefixtures("mixed")
def test_a_directory_in_the_place_of_a_lock_is_named(here: Path) -> None:
    run(*FAIL)
    lock = here / ".ringpool/job.lock"
    lock.unlink()
    lock.mkdir()
    assert run("status").stdout.startswith("job        ")
    done = run(*FAIL)
    assert done.returncode == 2
    assert done.stderr.endswith(".ringpool/job.lock: Is a directory\n")


@pytest.mark.usefixtures("mixed")
def test_status_as_json_has_all_of_it(here: Path) -> None:
    run(*FAIL)
    status = json.loads(run("status", "--json").stdout)
    assert (status["directory"], status["running"]) == (str(here), None)
    [job] = status["jobs"]
    assert job["files"] == {"done": 1, "failed": 3, "set_aside": 1, "retried": 0}
    assert job["call"]["cwd"] == str(here)
    assert job["call"]["call"]["inputs"] == ["in"]
    assert job["last_run"]["outcome"] == "ended"
    assert {(cause["kind"], cause["state"], cause["files"]) for cause in job["causes"]} == {
        ("ValueError", "failed", 2),
        ("TimeoutError", "failed", 1),
        ("WorkerDiedError", "set aside", 1),
    }
    assert job["causes"][0]["example"] == {"path": f"{here}/in/bad1.txt", "message": "bad1.txt is bad"}


@pytest.mark.usefixtures("numbers")
def test_status_has_every_job_of_the_directory_the_last_one_first() -> None:
    run("run", f"{TASKS}:size", "in")
    run("run", "--exec", "cat {src}", "in")
    jobs = [line for line in run("status").stdout.splitlines() if line.startswith("job ")]
    assert jobs == ["job        --exec 'cat {src}'", f"job        {TASKS}:size"]
    run("run", f"{TASKS}:copy", "in", "--out", "out/{relpath}")
    assert run("status", "out").stdout.splitlines()[0] == f"job        {TASKS}:copy -> out/{{relpath}}"


@pytest.mark.parametrize("meanwhile", ["it ends", "another begins", "nothing"])
def test_a_run_that_ends_while_one_looks_was_not_killed(here: Path, meanwhile: str) -> None:
    """Who runs a job and what the ledger says of it are two questions."""
    with Ledger.open(here) as ledger:
        job = ledger.job("a job")
        run_id = ledger.begin_run(job, "a segment", 1)

        class Lock(JobLock):
            """One whose holder goes just after one has looked at the ledger."""

            def holder(self) -> int | None:
                if meanwhile == "it ends" and not ended:
                    ended.append(run_id)
                    ledger.end_run(run_id, "ended", b"{}")
                elif meanwhile == "another begins" and not ended:
                    ended.append(run_id)
                    ledger.end_run(run_id, "ended", b"{}")
                    ledger.begin_run(job, "another", 2)
                return 2 if meanwhile == "another begins" else None

        ended: list[int] = []
        found = look._last_run(ledger, ledger.jobs()[0], Lock(here))
        assert found is not None
        expected = {"it ends": ("ended", 1), "another begins": ("running", 2), "nothing": ("killed", 1)}
        assert (found["outcome"], found["pid"]) == expected[meanwhile]


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mixed")
def test_results_are_those_of_files_that_are_done(here: Path) -> None:
    run(*FAIL)
    Path("healed").touch()
    run("retry", "--quiet")
    lines = objects(run("results"))
    assert [line["path"] for line in lines] == [f"{here}/in/{name}.txt" for name in ("bad1", "bad2", "fine", "slow1")]
    assert {line["value"] for line in lines} == {"well"}
    assert {line["state"] for line in lines} == {"done"}
    assert all(line["duration_s"] > 0 and line["attempts"] == 1 for line in lines)


@pytest.mark.usefixtures("numbers")
def test_results_have_outputs_sizes_and_digests_in_both_forms(here: Path) -> None:
    run("run", f"{TASKS}:thumb_and_meta", "in", "--out", "thumb=t/{relpath}", "--out", "meta=m/{stem}.json")
    [first, *_] = lines = objects(run("results", "t"))
    assert len(lines) == 8
    assert [(one["path"], one["size"]) for one in first["outputs"]] == [(f"{here}/t/0.txt", 1), (f"{here}/m/0.json", 1)]
    done = run("results", "t", "--format", "csv")
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert len(rows) == 8
    assert (rows[2]["path"], json.loads(rows[2]["value"])) == (f"{here}/in/2.txt", {"size": 3})
    assert (rows[2]["output_1"], rows[2]["output_2"]) == (f"{here}/t/2.txt", f"{here}/m/2.json")
    assert rows[0]["digest_1"] == first["outputs"][0]["digest"]
    assert (rows[2]["input_bytes"], rows[2]["attempts"]) == ("3", "1")


@pytest.mark.usefixtures("mixed")
def test_csv_has_its_header_where_no_file_is_done() -> None:
    assert run("run", f"{TASKS}:fail_unless", "in/bad1.txt", "--param", "healed=x", "--attempts", "1").returncode == 1
    header = "path,value,input_bytes,attempts,deaths,duration_s,started_s,peak_rss_bytes"
    assert run("results", "--format", "csv").stdout.splitlines() == [header]
    run(
        "run",
        "--exec",
        "false {dst.one} {dst.two}",
        "in/bad1.txt",
        "--out",
        "one=a/{name}",
        "--out",
        "two=b/{name}",
        "--job",
        "j",
    )
    outputs = "output_1,output_bytes_1,digest_1,output_2,output_bytes_2,digest_2"
    assert run("results", "j", "--format", "csv").stdout.splitlines() == [f"{header},{outputs}"]


@pytest.mark.parametrize("odd", ["a\nb", "a\rb", "a\r\nb", 'a"b', "a,b"])
def test_rows_of_csv_hold_whatever_names_and_values_do(here: Path, odd: str) -> None:
    (here / f"{odd}.txt").touch()
    assert run("run", f"{TASKS}:stem", here / f"{odd}.txt", "--quiet").returncode == 0
    with (here / "rows.csv").open("wb") as rows:
        assert finish(start("results", "--format", "csv", stdout=rows.fileno())).returncode == 0
    with (here / "rows.csv").open(newline="") as rows:
        [row] = csv.DictReader(rows)
    assert (row["path"], row["value"], row["attempts"]) == (f"{here}/{odd}.txt", odd, "1")


@pytest.mark.usefixtures("numbers")
def test_a_value_that_cannot_be_shown_keeps_no_other_from_it() -> None:
    lookup, value = (f"(a value that cannot be shown: {kind})" for kind in ("LookupError", "ValueError"))
    done = run("run", f"{TASKS}:unshown", "in", "--workers", "1")
    assert done.returncode == 0
    shown = [lookup, lookup, lookup, value, value, lookup, "\\ud800", "1"]
    assert done.stdout.splitlines() == [f"in/{number}.txt\t{text}" for number, text in enumerate(shown)]
    values = [line["value"] for line in objects(run("results"))]
    assert values == [lookup, [lookup], {"a": lookup}, value, value, lookup, "\ud800", 1]
    rows = list(csv.DictReader(run("results", "--format", "csv").stdout.splitlines()))
    assert [row["value"] for row in rows[:4]] == [lookup, f'["{lookup}"]', f'{{"a": "{lookup}"}}', value]


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@pytest.mark.usefixtures("numbers")
def test_numbers_that_json_has_not_are_text() -> None:
    done = run("run", f"{TASKS}:odd_numbers", "in", "--workers", "1", "--json")
    expected = ["NaN", "Infinity", "-Infinity", [1.5, "NaN"], {"a": {"b": "NaN"}}, [1, "Infinity"], {"value": "NaN"}, 1]
    for lines in (done.stdout, run("results").stdout):
        assert [json.loads(line, parse_constant=_no_number)["value"] for line in lines.splitlines()] == expected
    rows = list(csv.DictReader(run("results", "--format", "csv").stdout.splitlines()))
    assert [row["value"] for row in rows[:4]] == ["nan", "inf", "-inf", '[1.5, "NaN"]']


@pytest.mark.usefixtures("numbers")
def test_values_of_a_jobs_own_classes_are_found_from_anywhere(here: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Found:\n    n: int\n"
        "def find(src):\n    return Found(src.stat().st_size)\n"
    )
    assert run("run", "mine:find", "in", "--quiet").returncode == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert [line["value"] for line in objects(run("results", here, cwd=elsewhere))] == [{"n": n + 1} for n in range(8)]
    (tmp_path / "mine.py").write_text("")
    [first, *_] = objects(run("results"))
    assert first["value"].startswith("(cannot be rebuilt here: AttributeError: ")


@pytest.mark.usefixtures("numbers")
def test_a_reader_of_results_that_has_enough_ends_them_quietly() -> None:
    for number in range(3000):
        Path(f"in/x{number}").touch()
    run("run", f"{TASKS}:size", "in", "--quiet")
    command = start("results")
    assert command.stdout is not None
    assert command.stderr is not None
    with command:
        command.stdout.readline()
        command.stdout.close()
        assert command.stderr.read() == ""
    assert command.returncode == 128 + signal.SIGPIPE


# ---- clean -----------------------------------------------------------------------------------------------------------


def kill_a_run(here: Path) -> set[Path]:
    """Its files in /dev/shm."""
    (here / "begun").mkdir()
    words = ("--param", "begun=begun", "--param", "gate=gate", "--workers", "2", "--out", "out/{relpath}")
    command = start("run", f"{TASKS}:wait_for_gate", "in", *words)
    wait_until(lambda: len([p for p in Path("begun").iterdir() if p.read_text()]) == 2, "two files that have begun")
    workers = [int(path.read_text()) for path in Path("begun").iterdir()]
    segments = segments_of(command.pid)
    command.kill()
    finish(command)
    wait_until(lambda: all(map(has_ended, workers)), "the end of the workers")
    return segments


@pytest.mark.usefixtures("numbers")
def test_clean_writes_down_what_a_killed_run_had_done_and_removes_the_rest(here: Path) -> None:
    segments = kill_a_run(here)
    assert [path for path in segments if path.exists()]
    assert os.listdir("out/.ringpool/staging")
    assert "the next run or `ringpool clean` collects\n" in run("status", "out").stdout
    done = run("clean", "out")
    assert (done.returncode, done.stdout) == (0, "")
    said = "ringpool: out: 0 files found in what killed runs had left; all else of them is removed\n"
    assert done.stderr == said
    assert not [path for path in segments if path.exists()]
    assert not Path("out/.ringpool/staging").exists()
    assert run("clean", "out").stderr == said
    assert "was killed; what it left is collected\n" in run("status", "out").stdout


@pytest.mark.usefixtures("numbers")
def test_what_another_version_has_left_goes_with_the_ledger_only(here: Path) -> None:
    segments = kill_a_run(here)
    [ring] = [path for path in segments if segment.NAME.fullmatch(path.name)]
    with ring.open("r+b") as file:
        file.seek(8)
        file.write(b"\x63")  # its layout's version
    for words in (("clean", "out"), ("resume", "out")):
        done = run(*words)
        assert done.returncode == 1
        assert "it has layout version 99, and this build has" in done.stderr
        assert "or `ringpool clean --ledger out`, which removes it and forgets what is done" in done.stderr
        assert ring.exists()
    done = run("clean", "out", "--ledger", "--yes")
    assert done.returncode == 0
    said = (
        f"ringpool: /dev/shm/{ring.name}, which this version of ringpool cannot read, is removed; what it held is lost"
    )
    assert done.stderr.splitlines()[0] == said
    assert not list(ring.parent.glob(f"*{ring.name}*"))
    assert "8 files done" in run("run", f"{TASKS}:copy", "in", "--out", "out/{relpath}").stderr


@pytest.mark.usefixtures("numbers")
def test_clean_forgets_the_ledger_where_that_is_said_and_confirmed() -> None:
    run("run", f"{TASKS}:copy", "in", "--out", "out/{relpath}")
    done = run("clean", "out", "--ledger")
    assert done.returncode == 2
    assert "there is no terminal to ask: say --yes as well" in done.stderr
    with Terminal("clean", "out", "--ledger") as terminal:
        terminal.wait_for(r"Forget what is done in out\?")
        terminal.type("n\n")
        assert terminal.finish() == 1
    assert "8 done" in run("status", "out").stdout
    with Terminal("clean", "out", "--ledger") as terminal:
        terminal.wait_for(r"Forget what is done in out\?")
        terminal.type("y\n")
        assert terminal.finish() == 0
    assert run("status", "out").returncode == 1
    assert Path("out/7.txt").exists()
    assert "8 files done, 0 failed" in run("run", f"{TASKS}:copy", "in", "--out", "out/{relpath}").stderr
    Path("out/.ringpool/ledger.db").write_text("no database " * 1000)
    assert run("clean", "out").returncode == 1
    assert run("clean", "out", "--ledger", "--yes").returncode == 0
    assert run("status", "out").returncode == 1
    Path("out/.ringpool/ledger.db").write_bytes(b"")
    assert "its ledger was never finished" in run("clean", "out").stderr
    assert run("clean", "out", "--ledger", "--yes").returncode == 0
    assert not Path("out/.ringpool/ledger.db").exists()
    assert run("clean", "out", "--ledger", "--yes").returncode == 1, "there is nothing to forget"


def test_help_of_every_command_is_no_error() -> None:
    for verb in ("run", "resume", "retry", "status", "results", "clean"):
        done = run(verb, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"Usage: ringpool {verb} ")


def test_help_imports_neither_the_pool_nor_rich() -> None:
    program = "import sys; sys.argv[1:] = ['--help']; from ringpool.cli import main"
    program += "\ntry:\n    main()\nfinally:\n    print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    names = set(done.stdout.splitlines()[-1].split())
    assert "ringpool.cli.run" in names
    assert not {"rich", "sqlite3", "multiprocessing", "ringpool.coordinator.job"} & names


@pytest.mark.parametrize("verb", ["status", "results", "clean", "resume", "retry"])
def test_a_directory_without_a_name_is_not_the_current_one(verb: str) -> None:
    """As that of a shell's variable that is not set."""
    done = run(verb, "")
    assert (done.returncode, done.stdout) == (2, "")
    assert "it is empty; write . for the current directory" in done.stderr


@pytest.mark.usefixtures("mixed")
def test_a_command_to_go_on_with_names_any_directory(here: Path) -> None:
    odd = "new\nline 'and\x9b more"
    assert run("run", f"{TASKS}:size", "in", "--job", odd).returncode == 0
    line = next(line for line in run("status", odd).stdout.splitlines() if line.startswith("go on"))
    bash = ["bash", "-c", f"ringpool() {{ printf '%s' \"$2\"; }}; {line.removeprefix('go on')}"]
    assert os.fsdecode(subprocess.run(bash, capture_output=True, check=True).stdout) == odd


@pytest.mark.usefixtures("mixed")
def test_names_have_no_power_over_the_terminal(here: Path) -> None:
    for name in ("new\nline", "\x1b[31mred", "\x9b31mred"):
        (here / "in" / name).write_text("x")
    done = run("run", "--exec", "cat {src}; exit 3", "in", "--include", "*line", "--include", "*red")
    assert done.returncode == 1
    shown = done.stderr + run("status").stdout
    assert "new\\nline" in shown
    assert "\\x1b[31mred" in shown
    assert not any(character in shown for character in "\x1b\x9b")


@pytest.mark.usefixtures("mixed")
def test_filters_that_leave_nothing_are_told(here: Path) -> None:
    done = run("run", f"{TASKS}:size", "in", "--include", "*.jpgg")
    assert done.returncode == 0
    assert done.stderr.endswith("ringpool: the inputs have no file; what there is, --include and --exclude leave out\n")


@pytest.mark.usefixtures("mixed")
def test_a_file_in_the_place_of_a_directory_is_named(here: Path) -> None:
    (here / "file").touch()
    done = run("run", f"{TASKS}:size", "in", "--job", "file")
    assert done.returncode == 2
    assert "file: File exists; it is no directory, and one is needed" in done.stderr


@pytest.mark.usefixtures("mixed")
def test_a_pattern_whose_files_the_job_has_moved_away_is_no_mistake(here: Path) -> None:
    command = ("run", "--exec", "mv {src} {dst}", "in/**", "--out", "out/{relpath}")
    assert run(*command).returncode == 0
    assert not [path for path in (here / "in").rglob("*") if path.is_file()]
    for again in (("resume", "out"), command, (*command, "--dry-run")):
        done = run(*again)
        assert done.returncode == 0, done.stderr
    other = run("run", "--exec", "mv {src} {dst}", "in/*.other", "--out", "out/{relpath}")
    assert other.returncode == 2
    assert "no file that matches it as a pattern" in other.stderr


def test_what_was_set_aside_of_a_list_from_standard_input_is_done_after_all(here: Path) -> None:
    """As it is said."""
    Path("kill").touch()
    Path("file").write_text("content")
    command = "run --exec 'test ! -e kill || kill -9 $PPID; cat {src} > {dst}' - --out 'out/{name}'"
    shell = f"ls {here}/file | {shlex.quote(sys.executable)} -m ringpool {command}"
    said = subprocess.run(
        ["/bin/sh", "-c", shell], env=environment(), capture_output=True, text=True, timeout=60
    ).stderr
    Path("kill").unlink()
    advice = "the same command with the list in a file, as @FILE, and then"
    assert f"{advice} `ringpool retry out --dead` do those that are set aside" in said
    assert f"{advice} ringpool retry out --dead" in run("status", "out").stdout
    Path("list").write_text(f"{here}/file\n")
    assert "1 set aside" in run(*shlex.split(command.replace(" - ", " @list "))).stderr
    assert "1 file done" in run("retry", "out", "--dead").stderr
    assert Path("out/file").read_text() == "content"


@pytest.mark.usefixtures("mixed")
def test_a_job_whose_list_came_from_standard_input_is_not_said_to_be_resumed(here: Path) -> None:
    command = "run --exec 'cat {src} > {dst}; exit 3' - --out 'out/{name}'"
    shell = f"ls in/* | {shlex.quote(sys.executable)} -m ringpool {command}"
    done = subprocess.run(["/bin/sh", "-c", shell], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the same command with the same list does the failed files again" in done.stderr
    shown = run("status", "out").stdout
    assert "the same command with the same list" in shown
    for text in (done.stderr, shown):
        assert "ringpool retry" not in text
        assert "ringpool resume" not in text

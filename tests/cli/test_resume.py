"""A job that was stopped, killed, or has failures: ``resume``, ``retry``, and what Ctrl-C does."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from tests.cli.command import TASKS, Terminal, finish, has_ended, objects, run, segments_of, start, wait_until

from ringpool import Job

WAIT = ("run", f"{TASKS}:wait_for_gate", "in", "--param", "begun=begun", "--param", "gate=gate", "--workers", "2")


@pytest.fixture
def gated(here: Path, numbers: Path) -> Path:
    """Where files that have begun are noted; they end when there is a file ``gate``."""
    assert numbers.exists()
    (here / "begun").mkdir()
    return here / "begun"


def await_two(begun: Path) -> None:
    wait_until(lambda: len([path for path in begun.iterdir() if path.read_text()]) >= 2, "two files that have begun")


# ---- killed ----------------------------------------------------------------------------------------------------------


def test_a_job_whose_coordinator_was_killed_is_resumed_from_anywhere(here: Path, gated: Path) -> None:
    command = start(*WAIT, "--out", "out/{relpath}")
    await_two(gated)
    workers = [int(path.read_text()) for path in gated.iterdir()]
    segments = segments_of(command.pid)
    command.kill()
    assert finish(command).returncode == -signal.SIGKILL
    wait_until(lambda: all(map(has_ended, workers)), "the end of the workers")
    said = run("status", "out")
    assert "was killed; what it had done and not written down" in said.stdout
    (here / "gate").touch()
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    done = run("resume", "../out", cwd=elsewhere)
    assert done.returncode == 0
    assert done.stderr.startswith("ringpool: 8 files done, 0 failed")
    assert [Path(f"out/{n}.txt").read_text() for n in range(8)] == ["whole"] * 8
    assert not [segment for segment in segments if segment.exists()]
    assert "8 done before" in run("resume", "out").stderr


@pytest.mark.usefixtures("numbers")
def test_what_is_given_to_resume_goes_before_what_the_job_was_started_with() -> None:
    run("run", f"{TASKS}:touch", "in", "--param", "times=1", "--param", "mark=a", "--quiet", "--workers", "1")
    assert (run("resume").stderr, run("resume").stdout) == ("", "")
    done = run("resume", "--param", "mark=b", "--include", "3.txt", "--json")
    [line] = objects(done)
    assert (line["path"], line["value"]) == ("in/3.txt", "3.txt 1 'b' False")
    assert run("resume", "--dry-run").stdout == "skip in/3.txt: done and verified\n"  # and that is what it is now


def test_settings_of_the_directory_are_those_that_the_job_was_started_with(numbers: Path) -> None:
    Path("ringpool.toml").write_text('include = ["1.txt"]\n')
    assert run("run", f"{TASKS}:size", numbers).stdout == f"{numbers}/1.txt\t2\n"
    Path("ringpool.toml").write_text('include = ["2.txt"]\n')
    assert "0 files done, 1 done before" in run("resume").stderr


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize("words", [["-"], ["@/dev/stdin"], ["--manifest", "-"]])
def test_standard_input_cannot_be_read_again(words: list[str]) -> None:
    command = start("run", f"{TASKS}:size", *words, stdin=subprocess.PIPE)
    text = "path\nin/1.txt\n" if "--manifest" in words else "in/1.txt\n"
    assert finish(command, text).returncode == 0
    for verb in ("resume", "retry"):
        done = run(verb)
        assert done.returncode == 2
        assert done.stderr.startswith("ringpool: .: the inputs of its last job came from standard input, which cannot")
        assert "as @list.txt instead of -" in done.stderr


def test_the_job_of_a_program_is_resumed_by_the_program(numbers: Path) -> None:
    Job(f"{TASKS}:size", [str(numbers)]).run(1)
    for verb in ("resume", "retry"):
        done = run(verb)
        assert done.returncode == 1
        assert done.stderr.startswith("ringpool: .: the last job there was run by a Python program; to resume it, run")
    assert "run the Python program again" in run("status").stdout


@pytest.mark.parametrize("verb", ["resume", "retry", "status", "results", "clean"])
def test_where_there_is_no_job_that_is_said(verb: str) -> None:
    done = run(verb, "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("ringpool: no job in nowhere: there is no .ringpool/ledger.db; `ringpool run` begins one\n")


@pytest.mark.usefixtures("numbers")
def test_a_job_whose_directory_was_moved_is_not_taken_for_another() -> None:
    assert run("run", f"{TASKS}:copy", "in", "--out", "out/{relpath}").returncode == 0
    Path("out").rename("moved")
    done = run("resume", "moved")
    assert done.returncode == 1
    assert f"moved: its last job has its ledger in {Path('out').absolute()}; move it back" in done.stderr
    assert not Path("out").exists()


# ---- one at a time ---------------------------------------------------------------------------------------------------


def test_two_runs_of_a_directory_do_not_meet(here: Path, gated: Path) -> None:
    command = start(*WAIT, "--out", "out/{relpath}")
    await_two(gated)
    try:
        done = run(*WAIT, "--out", "out/{relpath}")
        assert done.returncode == 1
        assert done.stderr.startswith(f"ringpool: out: process {command.pid} runs a job there; wait for its end")
        assert f"runs as process {command.pid}" in run("status", "out").stdout
        assert run("clean", "out").returncode == 1
        (here / "gate").touch()
    finally:
        first = finish(command)
    assert first.returncode == 0


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_a_terminal_that_is_closed_ends_the_run_and_status_says_so(here: Path, gated: Path) -> None:
    command = start(*WAIT, "--out", "out/{relpath}")
    await_two(gated)
    command.send_signal(signal.SIGHUP)
    assert finish(command).returncode == 129
    assert ", was stopped (SIGHUP) 20" in run("status", "out").stdout
    (here / "gate").touch()
    assert run("resume", "out").returncode == 0


def test_ctrl_c_once_lets_what_runs_end_and_says_how_to_go_on(here: Path, gated: Path) -> None:
    with Terminal(*WAIT, "--out", "o'u t/{relpath}") as terminal:
        await_two(gated)
        terminal.type("\x03")
        terminal.wait_for(r"stopping: \d+ files? still runs?, Ctrl-C again to stop at once")
        (here / "gate").touch()
        assert terminal.finish() == 130
    said = terminal.screen.text.splitlines()[-1]
    assert said.startswith("ringpool: stopped by SIGINT; every output that is there is whole; `")
    assert said.endswith("` goes on")
    words = shlex.split(said.split("`")[1])
    assert words == ["ringpool", "resume", "o'u t"]
    n_whole = len([path for path in Path("o'u t").glob("*.txt") if path.read_text() == "whole"])
    assert n_whole >= 2
    assert n_whole == len(list(gated.iterdir()))  # each that had begun
    done = run(*words[1:])
    assert done.returncode == 0
    assert f"{8 - n_whole} files done" in done.stderr
    assert f"{n_whole} done before" in done.stderr or not n_whole


def test_ctrl_c_while_the_workers_start_costs_none_of_them(numbers: Path) -> None:
    with Terminal("run", f"{TASKS}:copy_slowly", numbers, "--out", "out/{relpath}", "--workers", "2") as terminal:
        wait_until(Path("out/.ringpool/staging").exists, "a run that has begun")
        terminal.type("\x03")
        assert terminal.finish() in (0, 130)
    assert "worker death" not in terminal.screen.text
    done = run("resume", "out")
    assert done.returncode == 0
    assert sorted(path.name for path in Path("out").glob("*.txt")) == [f"{n}.txt" for n in range(8)]


def test_ctrl_c_twice_stops_at_once_and_keeps_what_is_done(here: Path, gated: Path) -> None:
    with Terminal(*WAIT, "--out", "out/{relpath}") as terminal:
        await_two(gated)
        workers = [int(path.read_text()) for path in gated.iterdir()]
        terminal.type("\x03")
        terminal.wait_for("stopping: ")
        terminal.type("\x03")
        assert terminal.finish() == 130
    assert "`ringpool resume out` goes on" in terminal.screen.text
    wait_until(lambda: all(map(has_ended, workers)), "the end of the workers")
    assert os.listdir("out") == [".ringpool"]
    (here / "gate").touch()
    assert "8 files done, 0 failed" in run("resume", "out").stderr


def test_a_signal_to_the_command_and_to_its_process_group_is_one_request(here: Path, gated: Path) -> None:
    """As coreutils' ``timeout`` sends it: what has begun has its grace, and neither workers nor their server end."""
    command = start(*WAIT, "--out", "out/{relpath}", process_group=0)
    await_two(gated)
    os.kill(command.pid, signal.SIGTERM)
    os.killpg(command.pid, signal.SIGTERM)
    (here / "gate").touch()
    done = finish(command)
    assert done.returncode == 143
    assert "worker death" not in done.stderr
    n_begun = len(list(gated.iterdir()))
    assert f"ringpool: {n_begun} files done, 0 failed" in done.stderr
    assert len([path for path in Path("out").glob("*.txt") if path.read_text() == "whole"]) == n_begun


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_after_the_grace_period_what_still_runs_is_killed(gated: Path, number: signal.Signals, status: int) -> None:
    command = start(*WAIT, "--out", "out/{relpath}", "--grace", "0.2")
    await_two(gated)
    command.send_signal(number)
    done = finish(command)
    assert done.returncode == status
    said = done.stderr.splitlines()[-1]
    way = "`ringpool resume out` goes on"
    assert said == f"ringpool: stopped by {number.name}; every output that is there is whole; {way}"
    assert os.listdir("out") == [".ringpool"]


def test_an_input_that_does_not_come_is_not_waited_for_after_ctrl_c(gated: Path) -> None:
    words = [word if word != "in" else "-" for word in WAIT]
    command = start(*words, "--out", "out/{relpath}", "--grace", "0", stdin=subprocess.PIPE)
    assert command.stdin is not None
    command.stdin.write("in/1.txt\nin/2.txt\n")
    command.stdin.flush()
    await_two(gated)
    command.send_signal(signal.SIGINT)
    wait_until(lambda: command.poll() is not None, "the end, though standard input is open")
    done = finish(command)
    assert done.returncode == 130
    assert done.stderr.endswith("; the same command with the same list goes on\n")


# ---- retry -----------------------------------------------------------------------------------------------------------

FAIL = ("run", f"{TASKS}:fail_unless", "in", "--param", "healed=healed", "--attempts", "1")


@pytest.mark.usefixtures("mixed")
def test_retry_does_the_failed_files_of_a_kind_and_nothing_else() -> None:
    assert run(*FAIL).returncode == 1
    Path("healed").touch()
    Path("in/new.txt").touch()
    done = run("retry", "--kind", "outError", "--dry-run")
    assert done.stdout == "run in/slow1.txt: asked for\n"
    done = run("retry", "--kind", "outError")
    assert (done.returncode, done.stdout) == (0, "in/slow1.txt\twell\n")
    assert done.stderr.startswith("ringpool: 1 file done, 0 failed, ")
    done = run("retry", ".", "--json")
    assert sorted(line["path"] for line in objects(done)) == ["in/bad1.txt", "in/bad2.txt"]
    done = run("retry", "--dead")
    assert done.stdout == "in/dead1.txt\twell\n"
    assert run("retry").stderr == "ringpool: .: no file has failed\n"
    assert run("retry", "--kind", "OSError", "--dead").stderr == "ringpool: .: no file of kind OSError has failed\n"
    assert run("resume").stdout == "in/new.txt\twell\n"


@pytest.mark.usefixtures("mixed")
def test_a_retry_of_several_kinds_does_all_of_them() -> None:
    run(*FAIL)
    Path("healed").touch()
    done = run("retry", "--kind", "TimeoutError", "--kind", "ValueError", "--json")
    assert sorted(line["path"] for line in objects(done)) == ["in/bad1.txt", "in/bad2.txt", "in/slow1.txt"]
    done = run("retry", "--kind", "A", "--kind", "B")
    assert (
        done.stderr == "ringpool: .: no file of kind A or B has failed; besides: 1 set aside, which --dead does too\n"
    )


@pytest.mark.usefixtures("mixed")
def test_a_retry_that_stops_says_how_to_go_on_and_no_number_of_others() -> None:
    run(*FAIL)
    done = run("retry", "--kind", "ValueError", "--no-keep-going", "--workers", "1")
    assert done.returncode == 1
    assert "not asked for" not in done.stderr
    assert "`ringpool retry . --kind ValueError` does what is left of it" in done.stderr


@pytest.mark.usefixtures("mixed")
def test_a_retry_says_what_it_was_not_asked_for() -> None:
    run(*FAIL)
    Path("healed").touch()
    done = run("retry", "--kind", "Nope")
    assert done.stderr == (
        "ringpool: .: no file of kind Nope has failed; besides: 2 ValueError, 1 TimeoutError, "
        "1 set aside, which --dead does too\n"
    )
    done = run("retry")
    assert "ringpool: 1 file not asked for is not done either; `ringpool status .` says why" in done.stderr


@pytest.mark.usefixtures("mixed")
def test_what_is_set_aside_stays_so_in_a_resume_and_counts_as_not_done() -> None:
    assert run(*FAIL).returncode == 1
    Path("healed").touch()
    done = run("resume")
    assert done.returncode == 1
    assert "1 set aside" in done.stderr
    assert run("resume", "--dry-run").stdout.count("set aside in/dead1.txt: ") == 1
    assert run("retry", "--dead").returncode == 0
    assert run("resume").returncode == 0


@pytest.mark.usefixtures("mixed")
def test_a_failed_file_that_is_no_longer_an_input_is_not_retried_and_that_is_said() -> None:
    run(*FAIL)
    Path("in/bad1.txt").unlink()
    Path("healed").touch()
    done = run("retry")
    assert sorted(done.stdout.splitlines()) == ["in/bad2.txt\twell", "in/slow1.txt\twell"]
    assert done.stderr.splitlines()[-1] == "ringpool: 1 failed file not done again: no longer among the job's inputs"
    assert done.returncode == 1


@pytest.mark.usefixtures("mixed")
def test_options_of_a_retry_hold_once() -> None:
    run(*FAIL)
    done = run("retry", "--param", "healed=in/fine.txt", "--kind", "ValueError", "--quiet")
    assert done.returncode == 0
    done = run("retry")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "ringpool: failed: in/slow1.txt: TimeoutError: too slow"


@pytest.mark.usefixtures("mixed")
def test_what_a_retry_has_done_with_other_parameters_a_resume_does_not_undo() -> None:
    run(*FAIL)
    done = run("retry", "--param", "healed=in/fine.txt", "--kind", "ValueError", "--quiet")
    assert sorted(done.stdout.splitlines()) == ["in/bad1.txt\twell", "in/bad2.txt\twell"]
    done = run("resume", "--dry-run", "--quiet")
    assert "skip in/bad1.txt: done and verified" in done.stdout.splitlines()
    done = run("resume", "--param", "healed=never", "--dry-run", "--quiet")
    assert "run in/bad1.txt: the function or its parameters have changed" in done.stdout.splitlines()

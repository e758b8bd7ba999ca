"""``ringpool run``: every option, for real, and what it says at its end."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.cli.command import (
    TASKS,
    WATCHDOG_S,
    environment,
    finish,
    has_ended,
    objects,
    run,
    run_redirected,
    start,
    wait_until,
)

from ringpool.errors.words import MESSAGE_LENGTH_MAX, one_line


def sizes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The values that were printed, by path."""
    return dict(line.split("\t") for line in done.stdout.splitlines())


# ---- what is run -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("numbers")
def test_a_command_is_run_for_each_file_and_a_second_run_does_nothing() -> None:
    words = ("run", "--exec", "gzip -9c {src} > {dst}", "in", "--out", "packed/{relpath}.gz")
    done = run(*words)
    assert (done.returncode, done.stdout) == (0, "")
    for number in range(8):
        assert gzip.decompress(Path(f"packed/{number}.txt.gz").read_bytes()) == Path(f"in/{number}.txt").read_bytes()
    done = run(*words)
    assert done.returncode == 0
    assert done.stderr.startswith("ringpool: 0 files done, 8 done before, 0 failed, ")
    Path("packed/3.txt.gz").unlink()
    Path("in/4.txt").write_text("changed")
    assert run(*words).stderr.startswith("ringpool: 2 files done, 6 done before, 0 failed, ")


@pytest.mark.usefixtures("numbers")
def test_a_commands_output_is_its_value_where_it_has_no_dst() -> None:
    done = run("run", "--exec", "wc -c < {src}", "in/3.txt")
    assert (done.returncode, done.stdout.split()) == (0, ["in/3.txt", "4"])


@pytest.mark.usefixtures("numbers")
def test_several_outputs_have_names() -> None:
    words = ("--out", "thumb=t/{relpath}", "--out", "meta=m/{stem}.json")
    done = run("run", f"{TASKS}:thumb_and_meta", "in", *words, "--json")
    assert done.returncode == 0
    line = next(line for line in objects(done) if line["path"] == "in/2.txt")
    assert line["output"] == "t/2.txt"
    assert [one["path"] for one in line["outputs"]] == ["t/2.txt", "m/2.json"]
    assert line["value"] == {"size": 3}
    assert (Path("t/2.txt").read_text(), Path("m/2.json").read_text()) == ("2", "3")


@pytest.mark.usefixtures("numbers")
def test_the_ledger_of_a_job_without_outputs_is_where_it_is_told_to_be() -> None:
    assert len(sizes(run("run", f"{TASKS}:size", "in", "--job", "kept"))) == 8
    assert Path("kept/.ringpool/ledger.db").exists()
    assert not Path(".ringpool").exists()
    assert sizes(run("run", f"{TASKS}:size", "in", "--job", "kept")) == {}


# ---- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("numbers")
def test_filters_hold_for_what_is_found() -> None:
    done = run("run", f"{TASKS}:size", "in", "--include", "[0-4].txt", "--exclude", "2.txt", "--exclude", "3.*")
    assert sizes(done) == {"in/0.txt": "1", "in/1.txt": "2", "in/4.txt": "5"}


@pytest.mark.usefixtures("numbers")
def test_a_list_is_read_from_a_file_and_from_standard_input() -> None:
    Path("list").write_text("in/1.txt\nin/2.txt\n")
    assert sizes(run("run", f"{TASKS}:size", "@list")) == {"in/1.txt": "2", "in/2.txt": "3"}
    command = start("run", f"{TASKS}:size", "-", "--job", "other", stdin=subprocess.PIPE)
    assert sizes(finish(command, "in/5.txt\n")) == {"in/5.txt": "6"}


@pytest.mark.usefixtures("numbers")
def test_a_result_does_not_wait_for_the_next_line_of_a_list() -> None:
    with start("run", f"{TASKS}:size", "-", "--job", "job", stdin=subprocess.PIPE) as command:
        assert command.stdin is not None
        assert command.stdout is not None
        for number in (5, 7, 2):
            command.stdin.write(f"in/{number}.txt\n")
            command.stdin.flush()
            assert command.stdout.readline() == f"in/{number}.txt\t{number + 1}\n"  # or the test's time is over
        command.send_signal(signal.SIGINT)  # the list has not ended
        assert command.wait(WATCHDOG_S) == 128 + signal.SIGINT
    assert "3 done" in run("status", "job").stdout


@pytest.mark.usefixtures("numbers")
def test_what_leads_a_group_of_its_own_ends_with_its_worker() -> None:
    line = "timeout 1000 sleep 1000 & echo $! > begun/pid; wait; : {src}"
    Path("begun").mkdir()
    words = ("--job", "job", "--timeout", "5", "--attempts", "1", "--json")
    [result] = objects(run("run", "--exec", f"set -m; {line}", "in/1.txt", *words))
    assert result["error"]["type"] == "TaskTimeoutError"
    wait_until(lambda: has_ended(int(Path("begun/pid").read_text())), "the end of what it had started")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", "path,times,mark\nin/1.txt,3,a\nin/2.txt,4,\n"),
        ("m.jsonl", '{"path": "in/1.txt", "times": 3, "mark": "a"}\n{"path": "in/2.txt", "times": 4}\n'),
    ],
)
@pytest.mark.usefixtures("numbers")
def test_a_manifest_has_parameters_for_each_file(name: str, text: str) -> None:
    Path(name).write_text(text)
    done = run("run", f"{TASKS}:touch", "--manifest", name, "--param", "loud=true", "--param", "mark=z")
    assert sizes(done) == {"in/1.txt": "1.txt 3 'a' True", "in/2.txt": "2.txt 4 'z' True"}


@pytest.mark.usefixtures("numbers")
def test_a_file_of_a_manifest_without_what_its_function_needs_stops_the_run() -> None:
    Path("m.csv").write_text("path,times\nin/1.txt,3\nin/2.txt,\nin/3.txt,5\n")
    done = run("run", f"{TASKS}:touch", "--manifest", "m.csv", "--param", "mark=z")
    assert done.returncode == 2
    assert "input in/2.txt: parameter 'times' is missing" in done.stderr
    assert sizes(done) == {"in/1.txt": "1.txt 3 'z' False"}


@pytest.mark.parametrize("key", ["template", "fields", "shell", "environment"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.usefixtures("numbers")
def test_a_manifest_has_no_say_in_what_a_command_runs(key: str, suffix: str) -> None:
    csv, jsonl = f"path,{key}\nin/1.txt,x\n", json.dumps({"path": "in/1.txt", key: "x"})
    Path(f"m.{suffix}").write_text(csv if suffix == "csv" else jsonl)
    done = run("run", "--exec", "cat {src}", "--manifest", f"m.{suffix}", "--job", "job")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"list of inputs m.{suffix}, line 1: it has a {key}, and a list has no say" in done.stderr
    assert "leave it out" in done.stderr


@pytest.mark.usefixtures("numbers")
def test_a_column_that_a_command_has_no_use_for_is_named() -> None:
    Path("m.csv").write_text("path,title\nin/1.txt,x\n")
    done = run("run", "--exec", "cat {src}", "--manifest", "m.csv", "--job", "job")
    assert (done.returncode, done.stdout) == (2, "")
    assert "a command takes no parameter 'title', nor can it have it as a field; drop it, in a manifest" in done.stderr


@pytest.mark.parametrize("key", ["template", "fields", "environment"])
@pytest.mark.usefixtures("numbers")
def test_a_parameter_does_not_replace_what_a_command_has_of_its_own(key: str) -> None:
    done = run("run", "--exec", "cat {src}", "in/1.txt", "--param", f"{key}=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--param {key}: " in done.stderr


def test_names_are_no_files() -> None:
    Path("list").write_text("c\nhttp://d/e\n")
    done = run("run", f"{TASKS}:name", "a", "./b", "@list", "--names")
    assert (done.returncode, sizes(done)) == (0, {"a": "A", "./b": "./B", "c": "C", "http://d/e": "HTTP://D/E"})
    assert sizes(run("run", f"{TASKS}:name", "a", "f", "--names")) == {"f": "F"}


@pytest.mark.usefixtures("numbers")
def test_the_largest_come_first() -> None:
    done = run("run", f"{TASKS}:size", "in", "--largest-first", "--workers", "1")
    assert list(sizes(done)) == [f"in/{n}.txt" for n in range(7, -1, -1)]


@pytest.mark.usefixtures("numbers")
def test_content_tells_that_a_touched_file_is_the_same_where_that_is_asked_for() -> None:
    assert len(sizes(run("run", f"{TASKS}:size", "in", "--checksum"))) == 8
    os.utime("in/1.txt", (1, 1))
    assert sizes(run("run", f"{TASKS}:size", "in", "--checksum")) == {}
    assert sizes(run("run", f"{TASKS}:size", "in")) == {"in/1.txt": "2"}


# ---- how it is run ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("numbers")
def test_workers_are_as_nice_as_is_asked_for() -> None:
    done = run("run", f"{TASKS}:niceness", "in/1.txt", "--nice", "3")
    assert done.stdout == f"in/1.txt\t{min(os.nice(0) + 3, 19)}\n"


@pytest.mark.usefixtures("numbers")
def test_a_worker_is_replaced_after_so_many_files() -> None:
    done = run("run", f"{TASKS}:worker_pid", "in", "--workers", "1", "--max-tasks-per-child", "2")
    pids = list(sizes(done).values())
    assert len(pids) == 8
    assert all(pids.count(pid) <= 2 for pid in pids)
    assert "worker death" not in done.stderr


@pytest.mark.usefixtures("numbers")
def test_retries_are_for_the_errors_that_are_named() -> None:
    Path("marks").mkdir()
    words = ["run", f"{TASKS}:fail_once", "in/1.txt", "--param", "marks=marks", "--retries", "2", "--json"]
    [line] = objects(run(*words, "--retry-on", "OSError,LookupError"))
    assert (line["ok"], line["attempts"], line["error"]["type"]) == (False, 1, "TransientError")
    Path("marks/1.txt").unlink()
    [line] = objects(
        run(*words, "--retry-on", "OSError", "--retry-on", f"{TASKS}:TransientError", "--retry-delay", "0")
    )
    assert (line["ok"], line["attempts"], line["value"]) == (True, 2, 2)
    [line] = objects(run(*words[:2], "in/2.txt", *words[3:]))
    assert (line["ok"], line["attempts"]) == (True, 2)


@pytest.mark.usefixtures("numbers")
def test_a_file_that_takes_too_long_fails() -> None:
    Path("begun").mkdir()
    words = ("--param", "begun=begun", "--timeout", "0.2", "--attempts", "1", "--json")
    done = run("run", f"{TASKS}:wait_for_ever", "in/1.txt", *words)
    [line] = objects(done)
    assert (done.returncode, line["error"]["type"]) == (1, "TaskTimeoutError")


@pytest.mark.usefixtures("numbers")
def test_a_worker_that_takes_too_much_memory_is_killed() -> None:
    done = run("run", f"{TASKS}:grow", "in/1.txt", "--memory-limit", "300M", "--attempts", "1", "--json")
    [line] = objects(done)
    assert (done.returncode, line["state"], line["error"]["type"]) == (1, "dead", "MemoryLimitError")
    assert "1 set aside" in done.stderr
    assert "`ringpool retry . --dead` those that are set aside too" in done.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--no-keep-going"], "more than 0 failures"),
        (["--max-failures", "2"], "more than 2 failures"),
        (["--max-failures", "50%"], "more than 50 % of the files failed"),
    ],
)
def test_a_run_with_too_many_failures_takes_no_new_file(here: Path, words: list[str], reason: str) -> None:
    place = here / "in"
    place.mkdir()
    for number in range(4000):
        (place / f"{4 * number + 1}").touch()
    done = run("run", f"{TASKS}:fail_on_odd", "in", *words)
    assert (done.returncode, done.stdout) == (1, "")
    said = done.stderr.splitlines()[-1]
    assert said == f"ringpool: stopped ({reason}); every output that is there is whole; `ringpool resume .` goes on"
    assert "0 files done, 4000 failed" not in done.stderr


@pytest.mark.usefixtures("numbers")
def test_so_many_files_are_begun_in_a_second_at_most() -> None:
    began_s = time.monotonic()
    done = run("run", f"{TASKS}:size", "in", "--rate", "4")
    assert len(sizes(done)) == 8
    assert time.monotonic() - began_s > 6 / 4  # the first two may come together


@pytest.mark.usefixtures("numbers")
def test_digests_are_compared_where_that_is_asked_for() -> None:
    words = ("run", f"{TASKS}:copy", "in", "--out", "out/{relpath}")
    assert run(*words).returncode == 0
    before = Path("out/3.txt").stat()
    Path("out/3.txt").write_text("XXXX")  # of its size
    os.utime("out/3.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "8 done before" in run(*words).stderr
    assert "1 file done, 7 done before" in run(*words, "--verify", "digest").stderr
    assert Path("out/3.txt").read_text() == "3333"
    lines = objects(run("run", f"{TASKS}:copy", "in", "--out", "other/{relpath}", "--no-digest", "--json"))
    assert {line["outputs"][0]["digest"] for line in lines} == {""}


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize("durability", ["none", "atomic", "data"])
def test_outputs_are_whole_at_every_level(durability: str) -> None:
    done = run("run", f"{TASKS}:copy", "in", "--out", "out/{relpath}", "--durability", durability, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Path("out/7.txt").read_text() == "7" * 8


def _decoded(*words: bytes) -> tuple[str, ...]:
    return tuple(map(os.fsdecode, words))


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (_decoded(b"--exec", b"cat {src} > {dst}", b"in", b"--out", b"o\xff/{relpath}"), None),
        (_decoded(b"--exec", b"cat {src} > {dst}; : {relpath}", b"odd", b"--out", b"o/{relpath}"), None),
        (_decoded(b"--exec", b"echo {src} '\xff' | tail -c 2", b"in/1.txt"), "\\xff"),
        ((f"{TASKS}:stem", *_decoded(b"odd\xff"), "--job", "job"), "1"),
        ((f"{TASKS}:touch", "--manifest", "m.csv", "--job", "job"), "1.txt 1 'caf\\udce9' False"),
        (
            (f"{TASKS}:touch", "in/1.txt", "--param", "times=1", *_decoded(b"--param", b"mark=\xe9")),
            r"1.txt 1 '\udce9' False",
        ),
        ((f"{TASKS}:touch", "in/1.txt", "--param", f"times={10**30}"), f"1.txt {10**30} 'x' False"),
    ],
)
@pytest.mark.usefixtures("numbers")
def test_bytes_that_are_no_text_and_large_numbers_are_as_good_as_others(
    words: tuple[str, ...], value: str | None
) -> None:
    Path("odd").mkdir()
    Path(os.fsdecode(b"odd/\xff\xfe")).touch()
    Path(os.fsdecode(b"odd\xff")).mkdir()
    Path(os.fsdecode(b"odd\xff/1")).touch()
    Path("m.csv").write_bytes(b"path,times,mark\nin/1.txt,1,caf\xe9\n")
    done = run("run", *words, "--json")
    assert done.returncode == 0
    lines = objects(done)
    assert lines
    assert {line["value"] for line in lines} == {value}
    done = run("run", *words)
    assert (done.returncode, done.stdout) == (0, "")
    assert f" {len(lines)} done before, " in done.stderr


def test_a_directory_may_have_a_name_that_is_no_text(here: Path) -> None:
    place = Path(os.fsdecode(b"place\xff"))
    place.mkdir()
    (place / "a").write_text("a")
    words = ("run", f"{TASKS}:copy", "a", "--out", "out/{relpath}")
    assert run(*words, cwd=place).returncode == 0
    assert "1 done before" in run(*words, cwd=place).stderr
    assert "1 done before" in run("resume", place / "out").stderr
    assert [line["path"] for line in objects(run("results", place / "out"))] == [f"{here}/{place}/a"]


@pytest.mark.usefixtures("numbers")
def test_bytes_that_are_no_text_are_no_number() -> None:
    done = run("run", f"{TASKS}:touch", "in/1.txt", *_decoded(b"--param", b"times=\xe9"))
    assert done.returncode == 2
    assert r"'\udce9' is not what its parameter wants, nor UTF-8" in done.stderr


@pytest.mark.parametrize("how", [">&-", "2>&-", ">&- 2>&-", ">&- 2>&- <&-"])
@pytest.mark.usefixtures("numbers")
def test_a_stream_that_is_closed_is_as_good_as_dev_null(how: str) -> None:
    done = run_redirected(how, "run", f"{TASKS}:size", "in")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == (0 if ">&-" in how.split() else 8)
    assert ("8 files done" in done.stderr) == ("2>&-" not in how)
    assert len(objects(run("results"))) == 8


@pytest.mark.usefixtures("numbers")
def test_standard_output_that_is_full_is_named() -> None:
    for words in (("run", f"{TASKS}:size", "in"), ("status",), ("results",)):
        done = run_redirected(">/dev/full", *words)
        assert done.returncode == 1
        assert "ringpool: standard output: No space left on device; " in done.stderr


# ---- a dry run -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("numbers")
def test_a_dry_run_says_what_and_why_and_makes_nothing() -> None:
    words = ("run", f"{TASKS}:copy", "in", "--out", "out/{relpath}")
    done = run(*words, "--dry-run")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"run in/{n}.txt: new" for n in range(8)]
    assert done.stderr == "ringpool: 8 files to run, 0 done before, 0 set aside; nothing was changed\n"
    assert not Path("out").exists()
    run(*words)
    Path("out/1.txt").unlink()
    Path("in/2.txt").write_text("changed")
    done = run(*words, "--dry-run")
    assert done.stdout.splitlines()[:3] == [
        "skip in/0.txt: done and verified",
        f"run in/1.txt: its output {Path('out/1.txt').absolute()} is missing",
        "run in/2.txt: its input has changed",
    ]
    assert done.stderr == "ringpool: 2 files to run, 6 done before, 0 set aside; nothing was changed\n"
    [first, *_] = objects(run(*words, "--dry-run", "--json"))
    assert (first["path"], first["action"], first["reason"]) == ("in/0.txt", "skip", "done and verified")


# ---- it cannot be run ------------------------------------------------------------------------------------------------

UNUSABLE = [
    ("--exec 'cp {src} x' in --out out/{relpath}", "the command has no {dst}"),
    ("--exec 'cp {src} {dst}' in", "say where with --out, such as --out 'out/{relpath}'"),
    ("--exec 'cp {scr} {dst}' in --out out/{relpath}", "{scr}"),
    ("--exec 'cat {src}'", "Missing argument 'INPUTS...'"),
    ("", "Missing argument 'MODULE:FUNCTION'; or give --exec COMMAND"),
    ("TASKS:size in --manifest m.csv", "the inputs are given twice"),
    ("TASKS:size --manifest m.csv", "m.csv: No such file"),
    ("TASKS:size @nothing", "list of inputs nothing: No such file"),
    ("TASKS:size in --memory-limit 5Q", "'--memory-limit': '5Q' is no size; write bytes, or such as 512M, 2G"),
    ("TASKS:size in --job=", "'--job': it is empty; write . for the current directory"),
    ("TASKS:size in --include=", "'--include': it is empty; write one such as '*.jpg'"),
    ("TASKS:size --manifest=", "'--manifest': it is empty; name a file"),
    ("TASKS:size in --max-failures some", "'--max-failures': 'some' is neither a number of files"),
    ("TASKS:size in --max-failures 101%", "'--max-failures': '101%' is neither"),
    ("TASKS:size in --rate 0", "'--rate': '0' is not a number that is more than 0"),
    ("TASKS:size in --timeout nan", "'--timeout': 'nan' is not a number"),
    ("TASKS:size in --grace -1", "'--grace': '-1' is not a number, 0 or more"),
    ("TASKS:size in --retry-delay 1", "say with --retries how often"),
    ("TASKS:size in --retries 1 --retry-on Nope", "--retry-on Nope: there is no such exception; one that is not built"),
    ("TASKS:size in --retries 1 --retry-on TASKS:size", "it is no subclass of Exception"),
    ("TASKS:size in --retries 1 --retry-on no.such:E", "--retry-on no.such:E: no.such cannot be imported"),
    ("TASKS:size in --retries 1 --retry-on a;b", "'a;b' is no name of an exception"),
    ("TASKS:size in --max-failures 3 --no-keep-going", "--no-keep-going is --max-failures 0"),
    ("TASKS:copy in --out out/{relpath} --verify digest --no-digest", "--no-digest leaves out"),
    ("TASKS:size in --names --checksum", "--names says that inputs are no files, --checksum looks at files"),
    ("TASKS:size in --names --largest-first", "--names says that inputs are no files"),
    ("--exec 'wc {src}' in --param level=3", "--param level: a command has none but shell"),
    ("--exec 'wc {src}' in --param shell=/nope", "--param shell=/nope: there is no such program"),
    ("--exec 'cp {src} {dst.a}' in --out a=x/{name} --out b=y/{name}", "an output {dst.b}, which it does not name"),
    ("TASKS:copy in --out a=x/{relpath} --out y/{relpath}", "each of several outputs needs a name"),
    ("TASKS:copy in --out a=x/{relpath} --out a=y/{relpath}", "another output is called a too"),
]


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize(("line", "says"), UNUSABLE, ids=[line for line, _ in UNUSABLE])
def test_a_command_that_cannot_be_run_says_why_in_one_line(line: str, says: str) -> None:
    done = run("run", *shlex.split(line.replace("TASKS", TASKS)))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr
    assert not Path(".ringpool").exists()
    assert not Path("out").exists()


@pytest.mark.parametrize("out", ["out/{relpath}", "/tmp/nowhere/{relpath}"])
def test_a_directory_that_was_removed_is_one_line_and_status_2(tmp_path: Path, out: str) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    line = f'rmdir "$PWD" && exec {sys.executable} -m ringpool run {TASKS}:copy /etc/passwd --out "{out}"'
    done = subprocess.run(["sh", "-c", line], cwd=place, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "ringpool: the current directory was removed, and workers begin in it; go to another one first (cd, os.chdir)\n"
    )


@pytest.mark.usefixtures("numbers")
def test_a_ledger_that_cannot_be_used_is_one_line_and_status_1() -> None:
    Path(".ringpool").mkdir()
    Path(".ringpool/ledger.db").write_text("no database " * 1000)
    done = run("run", f"{TASKS}:size", "in")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "it is no SQLite database; move it away" in done.stderr


@pytest.mark.usefixtures("numbers")
def test_a_ledger_at_a_path_too_long_for_sqlite_says_so_and_where_else_it_may_be() -> None:
    done = run("run", f"{TASKS}:copy", "in", "--out", "/".join([*["d" * 200] * 3, "{relpath}"]))
    assert done.returncode == 1
    assert "bytes, and SQLite takes 504; keep it in a directory with a shorter one, by --job" in done.stderr
    done = run("run", f"{TASKS}:copy", "in", "--job", "job", "--out", "/".join([*["d" * 200] * 3, "{relpath}"]))
    assert done.returncode == 0


@pytest.mark.usefixtures("numbers")
def test_a_limit_of_file_sizes_is_no_failure_of_the_disk() -> None:
    limited = ["sh", "-c", 'ulimit -f 20; exec "$0" "$@"', sys.executable, "-m", "ringpool"]
    words = ["run", f"{TASKS}:copy", "in", "--out", "out/{relpath}"]
    done = subprocess.run([*limited, *words], env=environment(), stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "RLIMIT_FSIZE); raise `ulimit -f`" in done.stderr


def test_of_a_long_message_the_middle_is_cut() -> None:
    said = one_line(f"ledger /a/{'long/' * 200}path: its reason; a way out")
    assert len(said) == MESSAGE_LENGTH_MAX
    assert said.startswith("ledger /a/long/")
    assert said.endswith("path: its reason; a way out")


@pytest.mark.usefixtures("numbers")
def test_what_the_system_refuses_is_one_line_that_names_the_file(here: Path) -> None:
    (here / "made/.ringpool").mkdir(parents=True)
    (here / "made/.ringpool/staging").touch()
    done = run("run", f"{TASKS}:copy", "in", "--out", "made/{relpath}")
    assert done.stderr.splitlines()[-1].startswith(f"ringpool: {here}/made/.ringpool/staging")
    assert ": Not a directory; a file is in the place of a directory there: move it away" in done.stderr


@pytest.mark.usefixtures("numbers")
def test_values_that_json_cannot_hold_are_text() -> None:
    done = run("run", f"{TASKS}:odd_keys", "in/1.txt", "--json")
    assert json.loads(done.stdout)["value"] == "{(1, 2): b'x'}"

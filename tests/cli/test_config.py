"""``ringpool.toml`` and ``[tool.ringpool]``: what they may say, what goes before what, and what is wrong in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.command import TASKS, objects, run

ALL = """
out = "out/{relpath}"
job = "kept"
param = { times = 1 }
include = ["*.txt"]
exclude = "7.txt"
workers = 1
attempts = 2
retries = 1
retry-delay = 0
retry-on = ["OSError", "ValueError,LookupError"]
timeout = 30
memory-limit = "2G"
nice = 1
max-tasks-per-child = 100
max-failures = "50%"
keep-going = true
rate = 1000
largest-first = true
durability = "none"
checksum = true
no-digest = false
names = false
verify = "size"
dry-run = false
grace = 1.5
quiet = true
json = true
"""

pytestmark = pytest.mark.usefixtures("numbers")


def test_every_option_may_stand_in_the_file() -> None:
    Path("ringpool.toml").write_text(ALL.replace("param = { times = 1 }\n", ""))
    done = run("run", f"{TASKS}:copy", "in")
    assert (done.returncode, done.stderr) == (0, "")
    lines = objects(done)
    assert [line["path"] for line in lines] == [f"in/{n}.txt" for n in range(6, -1, -1)]
    assert Path("kept/.ringpool/ledger.db").exists()


def test_a_flag_goes_before_the_file_and_parameters_are_added_up() -> None:
    Path("ringpool.toml").write_text('param = { times = 3, mark = "file" }\nquiet = true\ninclude = ["1.txt"]\n')
    done = run("run", f"{TASKS}:touch", "in", "--param", "mark=flag")
    assert (done.stdout, done.stderr) == ("in/1.txt\t1.txt 3 'flag' False\n", "")
    done = run("run", f"{TASKS}:touch", "in", "--include", "2.txt")
    assert done.stdout == "in/2.txt\t2.txt 3 'file' False\n"


def test_what_the_file_switches_on_the_command_line_switches_off() -> None:
    switches = "".join(f"{flag} = true\n" for flag in ("no-digest", "checksum", "largest-first", "json", "quiet"))
    Path("ringpool.toml").write_text(f'{switches}manifest = "nowhere.csv"\nout = "out/{{relpath}}"\n')
    off = ("--digest", "--no-checksum", "--no-largest-first", "--no-json", "--no-quiet", "--verify", "digest")
    for says in ("3 files done, 0 failed", "0 files done, 3 done before"):
        done = run("run", f"{TASKS}:copy", "in/1.txt", "in/2.txt", "in/3.txt", *off)
        assert (done.returncode, done.stdout) == (0, "")
        assert says in done.stderr


def test_the_section_of_pyproject_is_read_where_there_is_no_file_of_its_own() -> None:
    Path("pyproject.toml").write_text('[project]\nname = "x"\n[tool.ringpool]\ninclude = ["1.txt"]\n')
    assert run("run", f"{TASKS}:size", "in").stdout == "in/1.txt\t2\n"
    Path("ringpool.toml").write_text('include = ["2.txt"]\n')
    assert run("run", f"{TASKS}:size", "in").stdout == "in/2.txt\t3\n"


def test_outputs_with_names_are_a_table() -> None:
    Path("ringpool.toml").write_text('out = { thumb = "t/{relpath}", meta = "m/{stem}.json" }\n')
    assert run("run", f"{TASKS}:thumb_and_meta", "in").returncode == 0
    assert Path("m/7.json").read_text() == "8"


def test_a_limit_of_failures_on_the_command_line_goes_before_keep_going_in_the_file() -> None:
    Path("ringpool.toml").write_text("keep-going = false\n")
    done = run("run", f"{TASKS}:fail_on_odd", "in", "--max-failures", "100")
    assert "4 files done, 4 failed" in done.stderr
    assert "stopped" not in done.stderr


MISTAKES = [
    ("workrs = 2", "ringpool.toml: there is no setting workrs; is workers meant?"),
    ("memory_limit = 5", "ringpool.toml: there is no setting memory_limit; is memory-limit meant?"),
    ("qqqqqq = 2", "ringpool.toml: there is no setting qqqqqq; there are attempts, checksum,"),
    ("exec = 'cp'", "exec is no setting: what a job runs stands on its command line"),
    ("workers = 0", "ringpool.toml: workers: 0 is not in the range"),
    ("workers = 1.5", "ringpool.toml: workers: it must be a whole number, not 1.5"),
    ("workers = true", "ringpool.toml: workers: True is of no use here"),
    ("quiet = 'yes'", "ringpool.toml: quiet: it must be true or false, not 'yes'"),
    ("memory-limit = 'much'", "ringpool.toml: memory-limit: 'much' is no size"),
    ("durability = 'some'", "ringpool.toml: durability: 'some' is not one of"),
    ("include = [1]", "ringpool.toml: include: it must be text, not 1"),
    ("param = 'a=b'", "ringpool.toml: param: write a table, such as { level = 9 }"),
    ("job = ['a']", "ringpool.toml: job: it must be text, not ['a']"),
    ("workers = ", "ringpool.toml cannot be read: Invalid value"),
]


@pytest.mark.parametrize(("text", "says"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_mistake_is_named_with_its_file(text: str, says: str) -> None:
    Path("ringpool.toml").write_text(text + "\n")
    done = run("run", f"{TASKS}:size", "in")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[tool]\nringpool = 5\n", "pyproject.toml: tool.ringpool is no table"),
        ("[tool.ringpool]\nworkrs = 5\n", "pyproject.toml [tool.ringpool]: there is no setting workrs"),
    ],
)
def test_a_mistake_in_pyproject_is_named_too(text: str, says: str) -> None:
    Path("pyproject.toml").write_text(text)
    done = run("run", f"{TASKS}:size", "in")
    assert done.returncode == 2
    assert says in done.stderr

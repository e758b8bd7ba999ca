"""Commands as tasks: what the shell makes of a template and of any path, what comes back, and what is left running."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.coordinator.program import WATCHDOG_S, Program, is_alive, wait_until

from ringpool import Coordinator, RingPoolExecutor, TaskOptions, WorkerDiedError
from ringpool.errors import CommandError, CommandTemplateError, TaskTimeoutError
from ringpool.workers import commands
from ringpool.workers.commands import run_command
from ringpool.workers.templates import Template

FUNCTION = "ringpool.workers.commands:run_command"
BASH = shutil.which("bash") or ""
SHELLS = ["/bin/sh", pytest.param(BASH, id="bash", marks=pytest.mark.skipif(not BASH, reason="there is no bash"))]
LASTING = "echo $$ > {src}.1; sleep 1000 & echo $! > {src}.2; : > {src}.begun; wait"


@pytest.fixture
def src(tmp_path: Path) -> bytes:
    path = tmp_path / "in put.tar.gz"
    path.write_bytes(b"hello\n")
    return os.fsencode(path)


@pytest.fixture(scope="module")
def pool() -> Iterator[Coordinator]:
    with Coordinator(2) as coordinator:
        yield coordinator


def pids_of(src: bytes) -> list[int]:
    """The processes of ``LASTING``, once it has begun."""
    wait_until(lambda: os.path.exists(src + b".begun"), "the command")
    return [int(Path(os.fsdecode(src) + end).read_text()) for end in (".1", ".2")]


def wait_for_end_of(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)), f"the end of {pids}")


# ---- quoting ---------------------------------------------------------------------------------------------------------


def same(name: bytes) -> bytes:
    return name


PLACES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "bare": ("printf %s {name}", same),
    "double": ('printf %s "{name}"', same),
    "single": ("printf %s '{name}'", same),
    "joined": ("printf %s a'b'{name}\"c\"d", lambda name: b"ab" + name + b"cd"),
    "double, joined": ("printf %s \"it's \\\"{name}\\\\{name}\"", lambda name: b'it\'s "%b\\%b' % (name, name)),
    "single, joined": ("printf %s '\"{name}\\'{name}", lambda name: b'"%b\\%b' % (name, name)),
    "escaped quotes": ("printf %s\\'\\\" {name}", lambda name: name + b"'\""),
    "words": ("for word in {name} {name}; do printf %s, $#; printf %s \"$word\"; done", lambda n: b"0,%b0,%b" % (n, n)),
    "assigned": ('x={name}; printf %s "$x"', same),
    "subshell": ("( printf %s {name} )", same),
    "substituted": ("x=$(printf %s. {name}); printf %s \"$x\"", lambda name: name + b"."),
    "substituted in double": ("printf %s \"$(printf %s. {name})\"", lambda name: name + b"."),
    "double in it": ('printf %s "$(printf %s. "$(printf %s- "{name}")")"', lambda name: name + b"-."),
    "single in it": ("printf %s \"$(printf '%s.' '{name}')'{name}'\"", lambda name: b"%b.'%b'" % (name, name)),
    "parenthesis in it": ("printf %s \"$( (printf ')'); printf %s. '(' {name})\"", lambda name: b")(." + name + b"."),
    "case in it": ('printf %s "$(case a in (b) ;; a) printf %s. {name};; esac)"{name}', lambda n: b"%b.%b" % (n, n)),
    "backquotes": ("x=`printf %s. {name}`; printf %s \"$x\"", lambda name: name + b"."),
    "backquotes in double": ("printf %s \"`printf %s. '{name}'`{name}\"", lambda name: b"%b.%b" % (name, name)),
    "comment in backquotes": ("printf %s a`# don't`{name}", lambda name: b"a" + name),
    "comment": ("# don't {name} \"\nprintf %s a#'b'{name} # it's\nprintf %s {name}", lambda n: b"a#b%b%b" % (n, n)),
    "default": ("printf %s ${NONE:-{name}}{name}", lambda name: name + name),
    "default in double": ("printf %s \"${NONE:-a {name}}{name}\"", lambda name: b"a %b%b" % (name, name)),
    "pattern": ('x=a{name}; printf %s "${x%{name}}" ${x#"a{name}"}', lambda _: b"a"),
    "lengths": ("x=abc; printf %s ${#x}$((1 << (2)))$#{name}", lambda name: b"340" + name),
    "document": ("cat <<END\nit's \"{name}\" $(printf %s. '{name}')\nEND", lambda n: b'it\'s "%b" %b.\n' % (n, n)),
    "quoted documents": ("cat <<-'A' - <<\\B; printf %s {name}\n\tit's\n\tA\n\"\nB\n: {name}", lambda n: b'"\n' + n),
    "before a document": ("cat <<E | cat - {src}; printf %s {name}\n{name}\nE", lambda n: n + b"\nhello\n" + n),
}  # fmt: skip
NAMES = [
    b"plain.txt",
    b" two  words\t ",
    b"-rf",
    b"*",
    b"~",
    b"it's",
    b'"',
    b"'; touch PWNED; '",
    b'"; touch PWNED; "',
    b"$(touch PWNED)",
    b"`touch PWNED`",
    b"'\"$(touch PWNED)\"'",
    b"\"'`touch PWNED`'\"",
    b"; touch PWNED #",
    b"& touch PWNED &",
    b"| touch PWNED",
    b"\ntouch PWNED\n",
    b"END\ntouch PWNED",
    b"} ; touch PWNED; {",
    b") ; touch PWNED; (",
    b"${NONE:=$(touch PWNED)}",
    b"a[$(touch PWNED)]",
    b"\\",
    b"\\'$(touch PWNED)",
    b"%s%n",
    b"{src}",
    b"\xff\xfe\x81\x88",
    b"\x01\x7f\x1b[31m",
    "\u00e9\u4e2d".encode(),
]
names = st.one_of(
    st.lists(st.sampled_from([*NAMES, b"'", b'"', b"`", b"$(", b"${", b")", b"}", b"\\", b"\n", b"#", b"<<E", b" "]))
    .map(b"".join)
    .filter(bool),
    st.lists(st.integers(1, 255).filter(lambda byte: byte != ord("/")), min_size=1, max_size=40).map(bytes),
).map(lambda name: name.replace(b"/", b"").strip(b".")[:200] or b"x")


def write_in(place: Path, name: bytes, scripts: dict[str, str], shell: str) -> dict[str, bytes]:
    """What each script writes for a file of that name, all run as one command, in ``place``."""
    place.mkdir(exist_ok=True)
    source = os.path.join(os.fsencode(place), name)
    Path(os.fsdecode(source)).write_bytes(b"hello\n")
    outputs = {f"at_{i}": os.fsencode(place / f"output {i}") for i in range(len(scripts))}
    lines = [f"{{ {script}\n}} > {{dst.at_{i}}}\n" for i, script in enumerate(scripts.values())]
    template = f'cd -- "$HERE" || exit\n{"".join(lines)}'
    run_command(source, outputs, template=template, shell=shell, environment={"HERE": str(place)})
    written = {key: Path(os.fsdecode(path)).read_bytes() for key, path in zip(scripts, outputs.values(), strict=True)}
    os.unlink(source)
    return written


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_never_read_by_the_shell_wherever_it_stands(tmp_path: Path, name: bytes, shell: str) -> None:
    written = write_in(tmp_path / "place", name, {key: script for key, (script, _) in PLACES.items()}, shell)
    assert written == {key: expected(name) for key, (_, expected) in PLACES.items()}
    assert not [path for path in tmp_path.rglob("*") if "PWNED" in path.name]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("key", PLACES)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(name=names)
def test_any_name_arrives_as_it_is(tmp_path: Path, key: str, name: bytes, shell: str) -> None:
    script, expected = PLACES[key]
    assert write_in(tmp_path / "place", name, {key: script}, shell) == {key: expected(name)}
    assert not [path for path in tmp_path.rglob("*") if "PWNED" in path.name]


@pytest.mark.skipif(not BASH, reason="there is no bash")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(name=names)
def test_what_only_bash_has_is_understood(tmp_path: Path, name: bytes) -> None:
    scripts = {
        "ansi": "printf %s $'it\\'s {name}'{name}",
        "here string": "cat <<< {name}",
        "process": "cat <(printf %s {name})",
        "descriptor": "exec {fd}>&1; printf %s {name} >&$fd",
    }
    expected = {"ansi": b"it's %b%b" % (name, name), "here string": name + b"\n", "process": name, "descriptor": name}
    assert write_in(tmp_path / "place", name, scripts, BASH) == expected


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(name=names)
@pytest.mark.skipif(not BASH, reason="there is no bash")
def test_the_command_of_an_error_can_be_typed(tmp_path: Path, name: bytes) -> None:
    keys = ["bare", "double", "single", "joined", "double, joined", "single, joined", "substituted", "double in it"]
    keys += ["single in it", "backquotes", "default", "document"]
    for key in keys:
        if key == "document" and name.endswith(b"\n"):
            continue  # nothing but $( ) shows it in there, and takes newlines from the end
        script, expected = PLACES[key]
        with pytest.raises(CommandError) as caught:
            run_command(b"/" + name, template=f"{script}\nexit 3", shell=BASH)
        assert caught.value.exit_status == 3
        typed = subprocess.run([BASH, "-c", os.fsencode(caught.value.command)], capture_output=True, cwd=tmp_path)
        assert (typed.stdout, typed.returncode) == (expected(name), 3)
        assert "\x1b" not in caught.value.command
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("V=a.gz; echo ${V} ${V%.gz} ${V:-{V}} {src} > /dev/null; echo ${V%.gz}", "a"),
        ("awk '{print $1} {print}' {src}", "hello\nhello"),
        ('awk "{print}" {src}', "hello"),
        ("echo {a,b} {1..3} {} : '{name}' | tr -d '\\n'", "{a,b} {1..3} {} : in put.tar.gz"),
        ("f() { cat {src}; }; { f; }", "hello"),
        ("src=mine; echo ${src} $src \"${src}\" '${src}' \\${src} \"\\${src}\" {name}",
         "mine mine mine ${src} ${src} ${src} in put.tar.gz"),
        ("echo \\{src} {suffix}", "{src} .gz"),
        ("echo $$_{suffix} | tr -d 0-9", "_.gz"),
        ("find {src} -exec echo {} \\; | sed 's/.*put/x/'", "x.tar.gz"),
        ("echo \"$RINGPOOL_NAME\" '{other}'", "in put.tar.gz {other}"),
        ("sh -c 'cat \"$RINGPOOL_SRC\"'", "hello"),
        ("sh -c 'cat \"$1\"' sh {src}", "hello"),
        ("wc -c '{src}' | cut -c 1", "6"),
        ("read -r x < {src}; echo $x {index}", "hello 7"),
        ("while read -r x; do echo $x; done < {src}", "hello"),
        ("trap - EXIT; cat {src}", "hello"),
        ("trap 'echo \"$RINGPOOL_SUFFIX\"' EXIT; cat {src}", "hello\n.gz"),
        ("export X={suffix} Y=a{suffix}; readonly Z={suffix}; echo $X $Y $Z", ".gz a.gz .gz"),
        ("[ {suffix} = .gz ] && echo ${NONE:-{suffix}} ${NONE-{suffix}} ${NONE:+{suffix}}", ".gz .gz"),
        ("cd / && echo a[{suffix}]* $(({index} + 1))", "a[.gz]* 8"),
    ],
)  # fmt: skip
def test_braces_of_the_shell_and_the_command_are_left_alone(src: bytes, template: str, expected: str) -> None:
    assert run_command(src, template=template, fields={"index": "7"}) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("", "names no file; write {src}"),
        ("ls -l", "names no file; write {src}"),
        ("awk '{print}' ${src}", "names no file"),
        ("# {src}", "names no file"),
        ("cat {source}", "{source} is no field; there are {src}, {dst}"),
        ("cat {src} > {dts}", "{dts} is no field"),
        ("cat {src}\0", "null byte"),
        ("echo $(( {name} + 1 ))", "{name} stands in arithmetic"),
        ("(( {hash} + (2) )) || :", "{hash} stands in arithmetic"),
        ("cat <<'END'\n{src}\nEND", "<<END without quotes"),
        ("cat <<\\END\n{src}\nEND", "<<END without quotes"),
        ("sh -c 'cat {src}'", '"$RINGPOOL_SRC"'),
        ("bash -o pipefail -c 'cat {src}'", '"$RINGPOOL_SRC"'),
        ("bash -c -o pipefail 'cat {src}'", '"$RINGPOOL_SRC"'),
        ("bash -euo pipefail +x -c 'cat {src}'", '"$RINGPOOL_SRC"'),
        ('/bin/bash -e -c "cat {src}"', '"$RINGPOOL_SRC"'),
        ("ls | xargs dash -ec 'x '\"$1 {dst.a}\"", '"$RINGPOOL_DST_a"'),
        ("x=$(sh -c {name})", '"$RINGPOOL_NAME"'),
        ("true; eval cat '{src}'", '"$RINGPOOL_SRC"'),
        ("trap 'rm -f {dst}.tmp' EXIT; cp {src} {dst}.tmp; mv {dst}.tmp {dst}", '"$RINGPOOL_DST"'),
        ('sh \\\n -c "wc -c < {src}"', '"$RINGPOOL_SRC"'),
        ("sh -c'cat {src}'", '"$RINGPOOL_SRC"'),
        ("\"sh\" -c 'cat {src}'", '"$RINGPOOL_SRC"'),
        ("rbash -c 'cat {src}'", '"$RINGPOOL_SRC"'),
        ("bash --rcfile x -c 'cat {src}'", '"$RINGPOOL_SRC"'),
        ("$SHELL -c 'cat {src}'", '"$RINGPOOL_SRC"'),
        ("\\eval cat '{src}'", '"$RINGPOOL_SRC"'),
        ("command eval cat '{src}'", '"$RINGPOOL_SRC"'),
        ('echo $(( "{name}" + 1 ))', "{name} stands in arithmetic"),
        ("echo $[ {name} ]", "{name} stands in arithmetic"),
        ('echo "$[{name}]"', "{name} stands in arithmetic"),
        ("x=abc; echo ${x:{name}}", "{name} stands in arithmetic"),
        ('x=abc; echo "${x:1:"{name}"}"', "{name} stands in arithmetic"),
        ('echo "${x[{name}]}"', "{name} stands in arithmetic"),
        ('echo ${#x["{name}"]}', "{name} stands in arithmetic"),
        ("x[{name}]=1", "{name} stands in arithmetic"),
        ('true; x["{name}"]+=1', "{name} stands in arithmetic"),
        ("let y={name}", "{name} stands in arithmetic"),
        ("declare -i y={name}", "{name} stands in arithmetic"),
        ("[[ {name} -eq 3 ]]", "{name} stands in arithmetic"),
        ('[[ 3 -lt "{name}" ]]', "{name} stands in arithmetic"),
        ("[[ -v {name} ]]", "{name} stands for the name of a variable"),
        ("unset {name}", "{name} stands for the name of a variable"),
        ("read -r {name} < {src}", "{name} stands for the name of a variable"),
        ("declare {name}=1", "{name} stands for the name of a variable"),
        ("printf -v {name} %s x", "{name} stands for the name of a variable"),
    ],
)
def test_a_template_that_cannot_be_meant_is_refused(template: str, words: str) -> None:
    with pytest.raises(CommandTemplateError, match=re.escape(words)) as caught:
        Template(template)
    assert caught.value.template == template


@pytest.mark.parametrize(
    ("template", "dst", "words"),
    [
        ("cat {src} > {dst}", None, "{dst} is no output of the task; it has none"),
        ("cat {src} > {dst}", {"a": b"/a", "b": b"/b"}, "{dst} is no output of the task; it has {dst.a}, {dst.b}"),
        ("cat {src} > {dst.c}", {"a": b"/a"}, "it has {dst.a}"),
        ("cat {src} > {dst.c}", b"/a", "it has {dst}"),
        ("cat {src}", b"/a", "write > {dst}"),
        ("cat {src} {relpath}", None, "{relpath} is not known; pass it in fields"),
    ],
)
def test_fields_and_outputs_must_fit(
    src: bytes, template: str, dst: bytes | dict[str, bytes] | None, words: str
) -> None:
    with pytest.raises(CommandTemplateError, match=re.escape(words)):
        run_command(src, dst, template=template)


def test_the_fields_of_a_template_are_known() -> None:
    template = Template("cp {src} \"$RINGPOOL_DST_Thumb\"; echo '{hash}' ${RINGPOOL_INDEX} # {name}")
    assert template.fields == {"src", "dst.Thumb", "hash", "index"}


def test_the_caller_gives_fields_and_variables(src: bytes) -> None:
    fields = {"relpath": "a/b", "parent": "a", "index": "7", "hash": "\udcff"}
    template = "echo {relpath} {parent} $(( {index} + 1 )) \"$MINE\"; printf '%s' {hash} | od -An -tx1"
    assert run_command(src, template=template, fields=fields, environment={"MINE": "x y"}) == "a/b a 8 x y\n ff"


# ---- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "value"),
    [
        ("cat {src}; echo; echo", "hello"),
        (": {src}", ""),
        ("printf 'a\\n\\n b \\n' # {src}\n: {src}", "a\n\n b "),
        ("printf '\\377\\303\\251' ; : {src}", "\\xff\u00e9"),
        ("cat - {src}", "hello"),
    ],
)
def test_standard_output_is_the_value(src: bytes, template: str, value: str) -> None:
    found = run_command(src, template=template)
    assert found == value
    assert found.encode().decode() == found


def test_a_value_of_a_mebibyte_is_one_and_a_byte_more_is_refused(src: bytes) -> None:
    template = "head -c $SIZE /dev/zero | tr '\\0' x; : {src}"
    largest = {"SIZE": str(commands.OUTPUT_BYTES_MAX)}
    assert run_command(src, template=template, environment=largest) == "x" * commands.OUTPUT_BYTES_MAX
    with pytest.raises(CommandError, match=r"more than 1,048,576 bytes .* --out"):
        run_command(src, template=template, environment={"SIZE": str(commands.OUTPUT_BYTES_MAX + 1)})
    with pytest.raises(CommandError, match=r"more than 1,048,576 bytes .* --out"):
        run_command(src, template="yes {src}")


@pytest.mark.parametrize(
    ("template", "status", "tail"),
    [
        ("exit 3 # {src}\n: {src}", 3, ""),
        ("echo out; echo err >&2; exit 4; {src}", 4, "err\n"),
        ("echo out; exit 5; {src}", 5, "out\n"),
        ("ls {src}/none", 2, "Not a directory"),
        ("no-such-command {src}", 127, "not found"),
        ("no-such-command {src}; exit", 127, "not found"),
        ("{src}", 126, "denied"),
        ("if then {src}", 2, "yntax error"),
        ("kill -9 $$ {src}", -signal.SIGKILL, ""),
        ("python3 -c 'import os; os.abort()' {src}", -signal.SIGABRT, ""),
        ("true {src}; sh -c 'kill -9 $$'; exit $?", 128 + signal.SIGKILL, "illed"),
    ],
)
def test_a_command_that_fails_says_how(src: bytes, template: str, status: int, tail: str) -> None:
    with pytest.raises(CommandError) as caught:
        run_command(src, template=template)
    error = caught.value
    assert error.exit_status == status
    assert error.signal == (-status if status < 0 else None)
    assert tail in error.stderr_tail
    assert tail or not error.stderr_tail
    assert f"'{os.fsdecode(src)}'" in error.command


def test_of_an_endless_standard_error_the_end_is_kept(src: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CommandError) as caught:
            run_command(src, template="head -c 50000000 /dev/zero | tr '\\0' e >&2; echo last {src} >&2; exit 1")
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
    assert len(caught.value.stderr_tail) == commands.TAIL_BYTES
    assert caught.value.stderr_tail.endswith(f"elast {os.fsdecode(src)}\n")


def test_a_tail_begins_with_a_whole_character(src: bytes) -> None:
    with pytest.raises(CommandError) as caught:
        run_command(src, template="yes '\u00e9' | tr -d '\\n' | head -c 6000 >&2; printf x >&2; exit 1; {src}")
    assert caught.value.stderr_tail == "\u00e9" * (commands.TAIL_BYTES // 2 - 1) + "x"


def test_with_an_output_both_streams_are_for_the_error(src: bytes, tmp_path: Path) -> None:
    dst = os.fsencode(tmp_path / "output")
    loud = "head -c 3000000 /dev/zero; cat {src} > {dst}; echo one; echo two >&2"
    assert run_command(src, dst, template=loud) is None
    assert (tmp_path / "output").read_bytes() == b"hello\n"
    with pytest.raises(CommandError) as caught:
        run_command(src, dst, template=f"{loud}; exit 1")
    assert caught.value.stderr_tail.endswith("one\ntwo\n")


def test_a_broken_pipe_ends_a_command_quietly(src: bytes) -> None:
    assert run_command(src, template="{ yes {src}; echo $? >&2; } 2>&1 | head -n 1") == os.fsdecode(src)
    assert run_command(src, template="{ yes {src}; echo $? > {src}.status; } | head -n 1") == os.fsdecode(src)
    wait_until(lambda: Path(os.fsdecode(src) + ".status").read_text() == f"{128 + signal.SIGPIPE}\n", "the status")


@pytest.mark.skipif(not BASH, reason="there is no bash")
def test_another_shell_may_run_it(src: bytes) -> None:
    with pytest.raises(CommandError) as caught:
        run_command(src, template="set -o pipefail; (exit 9) | cat {src}", shell=BASH)
    assert caught.value.exit_status == 9
    assert run_command(src, template="(exit 9) | cat {src}", shell=BASH) == "hello"


@pytest.mark.parametrize("shell", ["/none/sh", "/etc/passwd", "/etc/passwd/sh"])
def test_a_shell_that_is_not_there_is_named(src: bytes, shell: str) -> None:
    with pytest.raises(CommandTemplateError, match=f"its shell {shell}: .*; name one that is there"):
        run_command(src, template="cat {src}", shell=shell)


def test_the_peak_of_the_memory_is_that_of_the_command(src: bytes) -> None:
    run_command(src, template="true {src}")
    least_bytes = (
        commands.peak_rss_bytes
    )  # this process's own counts, in the moment before the shell's code replaces it
    assert least_bytes > 0
    n_bytes = least_bytes + (200 << 20)
    run_command(src, template=f"{sys.executable} -c 'bytes(bytearray(b\"x\") * {n_bytes})' {{src}}; true")
    assert commands.peak_rss_bytes > n_bytes
    run_command(src, template="true {src}")
    assert commands.peak_rss_bytes < n_bytes


@pytest.mark.usefixtures("no_garbage")
def test_no_descriptor_is_left_open(src: bytes) -> None:
    def run_all() -> None:
        run_command(src, template="cat {src}")
        for template, shell in [("exit 1; {src}", "/bin/sh"), ("yes {src}", "/bin/sh"), ("{src}", "/none")]:
            with pytest.raises((CommandError, CommandTemplateError)):
                run_command(src, template=template, shell=shell)

    run_all()
    before = os.listdir("/proc/self/fd")
    run_all()
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert (
        run_command(src, template="ls /proc/self/fd | wc -l; : {src}") == "5"
    )  # 0 1 2, the one it lists, the lifeline


# ---- what is left running --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "background",
    [
        "sleep 1000",
        "sleep 1000 > /dev/null 2>&1",
        "setsid sleep 1000",
        "(sleep 1000 & sleep 1000)",
        "env -i sleep 1000 > /dev/null 2>&1",
        pytest.param(
            "perl -e '$0 = q(a title for ps); sleep 1000'",
            marks=pytest.mark.skipif(not shutil.which("perl"), reason="there is no perl"),
        ),
    ],
)
@pytest.mark.parametrize("status", [0, 3])
def test_what_a_command_leaves_running_is_killed(src: bytes, background: str, status: int) -> None:
    template = f"{background} & echo $!; echo $! > {{src}}.pid; exit {status}"
    if status:
        with pytest.raises(CommandError):
            run_command(src, template=template)
    else:
        assert str(run_command(src, template=template)).isdigit()
    wait_for_end_of([int(Path(os.fsdecode(src) + ".pid").read_text())])


def test_a_command_that_opens_descriptors_by_number_leaves_nothing_running(pool: Coordinator, src: bytes) -> None:
    """A worker has few files open, so that what a command inherits might have one of these numbers."""
    opened = " ".join(f"{number}> /dev/null" for number in range(3, 10))
    template = f"exec {opened}; sleep 1000 > /dev/null 2>&1 & echo $! > {{src}}.pid"
    pool.submit_file_task(FUNCTION, src, params={"template": template}).result(WATCHDOG_S)
    wait_for_end_of([int(Path(os.fsdecode(src) + ".pid").read_text())])


def test_what_a_command_leaves_running_may_finish_its_writing(src: bytes) -> None:
    assert run_command(src, template="{ head -c 300000 /dev/zero | tr '\\0' x; } & : {src}") == "x" * 300_000


def test_an_escaped_child_is_not_waited_for(src: bytes) -> None:
    """It has another environment, so nobody knows whose it is; it ends with the worker, whose group it is in."""
    pid = int(str(run_command(src, template="env -i A=1 sleep 1000 & echo $! # {src}\n: {src}")))
    assert is_alive(pid)
    assert os.getpgid(pid) == os.getpgrp()
    os.kill(pid, signal.SIGKILL)


def test_an_interrupt_while_the_command_is_started_kills_it(src: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            pids_of(src)
            started.append(self)
            raise KeyboardInterrupt

    started: list[Interrupted] = []
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_command(src, template=LASTING)
    started[0].wait(WATCHDOG_S)
    wait_for_end_of(pids_of(src))


@pytest.mark.usefixtures("no_garbage")
def test_an_interrupt_kills_the_command(tmp_path: Path) -> None:
    """Also what is just taking on its program, which shows no environment then: several in a hundred of these.

    There is no garbage: an exception that comes while some old object's ``__del__`` runs is lost.
    """

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    def send(src: bytes) -> None:
        pids_of(src)
        os.kill(os.getpid(), signal.SIGUSR1)

    sources = [os.fsencode(tmp_path / f"{number}") for number in range(50)]
    former = signal.signal(signal.SIGUSR1, interrupt)
    try:
        for src in sources:
            sender = threading.Thread(target=send, args=(src,))
            sender.start()
            with pytest.raises(KeyboardInterrupt):
                run_command(src, template=LASTING)
            sender.join()
    finally:
        signal.signal(signal.SIGUSR1, former)
    for src in sources:
        wait_for_end_of(pids_of(src))


@pytest.mark.usefixtures("no_garbage")
def test_an_interrupt_while_what_is_left_may_end_kills_it(src: bytes) -> None:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            run_command(src, template="sleep 1000 & echo $! > {src}.pid")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    wait_for_end_of([int(Path(os.fsdecode(src) + ".pid").read_text())])


# ---- in a worker -----------------------------------------------------------------------------------------------------


def test_packing_files_is_what_a_loop_in_the_shell_does(pool: Coordinator, tmp_path: Path) -> None:
    sources = sorted(Path(os.__file__).parent.glob("[ab]*.py"))
    packed, expected = tmp_path / "packed", tmp_path / "expected"
    expected.mkdir()
    loop = 'for file; do gzip -9c "$file" > "$OUT/${file##*/}.gz"; done'
    subprocess.run(["/bin/sh", "-c", loop, "sh", *sources], check=True, env={**os.environ, "OUT": str(expected)})
    run = pool.run_file_tasks(
        FUNCTION, sources, output=lambda path: packed / f"{path.name}.gz", params={"template": "gzip -9c {src} > {dst}"}
    )
    assert [result.error for result in run] == [None] * len(sources)
    assert len(sources) > 5
    for path in sources:
        assert (packed / f"{path.name}.gz").read_bytes() == (expected / f"{path.name}.gz").read_bytes()


def test_values_and_errors_come_back_from_workers(pool: Coordinator, src: bytes) -> None:
    nasty = os.path.join(os.path.dirname(src), b"\xff $(touch x)'\n")
    shutil.copy(src, nasty)
    template = "cat {src}; case {name} in in*) exit 0;; esac; echo no >&2; exit 7"
    good, bad = sorted(
        pool.run_file_tasks(FUNCTION, [src, nasty], params={"template": template}), key=lambda r: not r.ok
    )
    assert (good.path, good.value) == (src, "hello")
    assert isinstance(bad.error, CommandError)
    assert (bad.error.exit_status, bad.error.stderr_tail) == (7, "no\n")
    assert "$'" in bad.error.command
    assert str(bad.error).encode()


def test_a_command_that_makes_no_output_leaves_none(pool: Coordinator, src: bytes, tmp_path: Path) -> None:
    target = tmp_path / "outputs" / "one"
    params = {"template": "echo half > {dst}; cat {src}; exit 1"}
    error = pool.submit_file_task(FUNCTION, src, target, params=params).exception(WATCHDOG_S)
    assert isinstance(error, CommandError)
    assert error.stderr_tail == "hello\n"
    assert set(os.listdir(target.parent)) <= {".ringpool"}


def test_a_command_that_overruns_is_killed_with_its_children(src: bytes) -> None:
    with RingPoolExecutor(1) as executor:
        future = executor.submit_with(TaskOptions(timeout=8), run_command, src, template=LASTING)
        pids = pids_of(src)
        assert isinstance(future.exception(WATCHDOG_S), TaskTimeoutError)
        wait_for_end_of(pids)


def test_a_command_ends_with_its_worker(src: bytes) -> None:
    with Coordinator(1, attempts_max=1) as own:
        future = own.submit_file_task(FUNCTION, src, params={"template": LASTING})
        pids = pids_of(src)
        os.kill(own.worker_pids[0], signal.SIGKILL)
        assert isinstance(future.exception(WATCHDOG_S), WorkerDiedError)
        wait_for_end_of(pids)


def test_a_command_ends_with_its_coordinator(src: bytes, tmp_path: Path) -> None:
    body = f"""\
    with Coordinator(1) as pool:
        pool.submit_file_task({FUNCTION!r}, {src!r}, params={{"template": {LASTING!r}}})
        wait()
    """
    with Program(tmp_path, body) as program:
        pids = pids_of(src)
        wait_until(lambda: set(pids) <= program.processes, "its processes' environment")
        program.signal(signal.SIGKILL, group=False)
        program.finish()
        wait_for_end_of(pids)
        program.assert_no_process_is_left()

"""Lists and manifests: what they name, what is given out before they have ended, and which lines are refused."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from ringpool.coordinator.lists import (
    BLOCK_BYTES,
    LINE_BYTES_MAX,
    InputFile,
    read_list,
    read_manifest,
    relpath_of,
)
from ringpool.errors import ListError

ROOT = Path(__file__).resolve().parents[2]
WATCHDOG_S = 60


def written(place: Path, content: bytes, name: str = "list") -> str:
    (place / name).write_bytes(content)
    return str(place / name)


def paths(files: Iterator[InputFile]) -> list[bytes]:
    return [os.fsencode(file.path) for file in files]


# ---- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n\n", []),
        (b"a\nb/c\n", [b"a", b"b/c"]),
        (b"a\n\nb", [b"a", b"b"]),
        (b"a\r\n\r\nb\r\n", [b"a", b"b"]),
        (b" a \n\tb\n", [b" a ", b"\tb"]),
        (b"caf\xe9\n", [b"caf\xe9"]),
        (b"a\0b\nc\0\0d\r\0", [b"a", b"b\nc", b"d\r"]),
        (b"\xef\xbb\xbfa\n", [b"\xef\xbb\xbfa"]),  # of any bytes: a list is no text
        (b"x" * (3 * BLOCK_BYTES) + b"\nb\n", [b"x" * (3 * BLOCK_BYTES), b"b"]),
        (b"a\n" * BLOCK_BYTES, [b"a"] * BLOCK_BYTES),
    ],
)
def test_a_list_is_of_lines_or_of_what_nul_bytes_end(tmp_path: Path, content: bytes, expected: list[bytes]) -> None:
    assert paths(read_list(written(tmp_path, content))) == expected


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(st.binary(min_size=1, max_size=9).map(lambda name: name.replace(b"\0", b"\n")), min_size=1))
def test_a_nul_list_keeps_names_of_any_bytes(tmp_path: Path, names: list[bytes]) -> None:
    assert paths(read_list(written(tmp_path, b"".join(name + b"\0" for name in names)))) == names


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=9).filter(lambda piece: b"\0" not in piece), max_size=20))
def test_lines_are_the_same_however_a_pipe_cuts_them(pieces: list[bytes]) -> None:
    reading, writing = os.pipe()
    files = read_list(f"/dev/fd/{reading}")
    try:
        drawing = threading.Thread(target=lambda: drawn.extend(paths(files)))
        drawn: list[bytes] = []
        drawing.start()
        for piece in pieces:
            os.write(writing, piece)
        os.close(writing)
        drawing.join(WATCHDOG_S)
    finally:
        os.close(reading)
    lines = (line.removesuffix(b"\r") for line in b"".join(pieces).split(b"\n"))
    assert drawn == [line for line in lines if line]


@pytest.mark.parametrize("separator", [b"\n", b"\0"])
def test_each_path_is_given_out_while_the_pipe_stays_open(separator: bytes) -> None:
    reading, writing = os.pipe()
    try:
        files = read_list(f"/dev/fd/{reading}")
        os.write(writing, b"a" + separator + b"half of")
        assert next(files).path == "a"
        os.write(writing, b" b" + separator)
        assert next(files).path == "half of b"
    finally:
        os.close(writing)
        assert list(files) == []
        os.close(reading)


DRAW_TWO = """
import sys
from ringpool.coordinator.{module} import {function} as read
files = read({argument})
for _ in range(2):
    print(next(files)[:2], flush=True)
print(list(files))
"""


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize(
    ("module", "function", "argument", "lines"),
    [
        ("lists", "read_list", "'-'", [b"", b"/d/a\n", b"b\n"]),
        ("inputs", "list_inputs", "['-']", [b"", b"/d/a\n", b"b\n"]),
        ("lists", "read_manifest", "'-'", [b"n,path\n", b"1,/d/a\n", b"2,b\n"]),
        ("lists", "read_manifest", "'-'", [b" \n", b' {"path": "/d/a", "n": 1}\n', b'{"path": "b"}\n']),
    ],
)
def test_standard_input_is_read_as_it_comes(
    module: str, function: str, argument: str, lines: list[bytes], blocking: bool
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, blocking)
    program = DRAW_TWO.format(module=module, function=function, argument=argument)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=reading, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as command:
        os.close(reading)
        watchdog = threading.Timer(WATCHDOG_S, command.kill)
        watchdog.start()
        assert command.stdout is not None
        try:
            os.write(writing, lines[0] + lines[1])
            assert command.stdout.readline() == "('/d/a', 'd/a')\n"
            os.write(writing, lines[2])
            assert command.stdout.readline() == "('b', 'b')\n"
        finally:
            os.close(writing)
            rest = command.stdout.read()
            watchdog.cancel()
    assert (rest, command.returncode) == ("[]\n", 0)


def test_a_closed_standard_input_is_an_error_at_once() -> None:
    program = "from ringpool.coordinator.lists import read_list\nread_list('-')"
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" <&-', sys.executable, program], cwd=ROOT, capture_output=True, text=True
    )
    assert "list of inputs -: standard input is closed" in done.stderr


def test_a_lists_memory_does_not_grow_with_its_length(tmp_path: Path) -> None:
    path = written(tmp_path, b"".join(b"%0100d\n" % n for n in range(100_000)))
    files = read_list(path)
    tracemalloc.start()
    try:
        assert sum(1 for _ in files) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # the list has 10 MB
    finally:
        tracemalloc.stop()


def test_the_limit_is_for_a_line_not_for_the_list(tmp_path: Path) -> None:
    line = b"x" * (BLOCK_BYTES - 100)
    path = written(tmp_path, (line + b"\n") * (3 * LINE_BYTES_MAX // BLOCK_BYTES))
    assert set(paths(read_list(path))) == {line}


@pytest.mark.usefixtures("no_garbage")
def test_a_list_that_is_left_early_is_closed(tmp_path: Path) -> None:
    files = read_list(written(tmp_path, b"a\nb\n"))
    before = len(os.listdir("/proc/self/fd"))
    assert next(files).path == "a"
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del files
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("read", [read_list, read_manifest])
def test_a_list_that_is_not_there_is_an_error_at_once(tmp_path: Path, read: Any) -> None:
    for path, says in [
        (f"{tmp_path}/missing", "No such file or directory"),
        (str(tmp_path), "it is a directory"),
        (f"{tmp_path}/\0", "embedded null (byte|character)"),  # the latter from Python 3.13 on
        ("", "No such file or directory"),
    ]:
        with pytest.raises(ListError, match=says) as caught:
            read(path)
        assert (caught.value.path, caught.value.line) == (path, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_list_that_may_not_be_read_is_an_error_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, b"a\n")
    os.chmod(path, 0)
    with pytest.raises(ListError, match="you may not read it"):
        read_list(path)


def test_a_list_that_vanishes_before_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, b"a\n")
    files = read_list(path)
    os.unlink(path)
    with pytest.raises(ListError, match="it cannot be read: No such file"):
        next(files)


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"a\n" * BLOCK_BYTES + b"b\0c\n", BLOCK_BYTES + 1, "NUL byte"),
        (b"a\n\n" + b"x" * (LINE_BYTES_MAX + BLOCK_BYTES), 3, "more than 16,777,216 bytes"),
    ],
)
def test_what_is_no_list_of_paths_is_refused(tmp_path: Path, content: bytes, line: int, says: str) -> None:
    with pytest.raises(ListError, match=says) as caught:
        list(read_list(written(tmp_path, content)))
    assert caught.value.line == line


@pytest.mark.parametrize(
    ("path", "relpath"),
    [
        ("a", "a"),
        ("./a/b", "a/b"),
        ("a//b/", "a/b"),
        ("x/../a", "a"),
        ("/data/2020/a.log", "data/2020/a.log"),
        ("//data/a", "data/a"),
        ("../../data/a", "data/a"),
        ("x/../../a", "a"),
        ("/../a", "a"),
        ("..a/b", "..a/b"),
        (".../b", ".../b"),
        (".", "."),
        ("..", "."),
        ("../..", "."),
        ("/", "."),
    ],
)
def test_a_relpath_has_nothing_that_leads_out(path: str, relpath: str) -> None:
    assert relpath_of(path) == relpath


@given(st.text("ab./", min_size=1))
def test_no_relpath_leads_out(path: str) -> None:
    parts = relpath_of(path).split("/")
    assert parts == ["."] or not {"", ".", ".."} & set(parts)


# ---- manifests -------------------------------------------------------------------------------------------------------


def manifest(place: Path, content: bytes, name: str) -> list[tuple[str, dict[str, Any] | None]]:
    return [(file.path, file.parameters) for file in read_manifest(written(place, content, name))]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.csv", b"path\na\nb\n", [("a", None), ("b", None)]),
        ("m.csv", b"path,q,label\na,80,x\nb,,\nc\n", [("a", {"q": "80", "label": "x"}), ("b", None), ("c", None)]),
        ("m.CSV", b"\xef\xbb\xbfpath,q\r\na,1\r\n\r\nb,2", [("a", {"q": "1"}), ("b", {"q": "2"})]),
        ("m.csv", b' path , q\n"a ""1"", b", 2\n', [('a "1", b', {"q": " 2"})]),
        ("m.csv", b'q,src\n"x\r\ny\nz",a\n', [("a", {"q": "x\r\ny\nz"})]),
        ("m.csv", b"input\na\n", [("a", None)]),
        ("m.csv", b"input,path,src\nx,a,y\n", [("a", {"input": "x", "src": "y"})]),
        ("m.csv", b"path,q\ncaf\xe9,caf\xc3\xa9\n", [(os.fsdecode(b"caf\xe9"), {"q": "caf\xe9"})]),
        ("m.csv", b"path;q,x\na;b,c\n", None),
        ("m.csv", b"path\n{}\n", [("{}", None)]),
        ("m.csv", b"\n\npath,q\na,1\n", [("a", {"q": "1"})]),
        ("m.tsv", b"path\tq,r\na,b\t1\n", [("a,b", {"q,r": "1"})]),
        (
            "m.jsonl",
            b'{"path": "a"}\n\n  \n{"src": "b", "q": 80, "on": true, "tags": ["x"], "none": null}',
            [
                ("a", None),
                ("b", {"q": 80, "on": True, "tags": ["x"], "none": None}),
            ],
        ),
        ("m.ndjson", b'\xef\xbb\xbf{"input": "caf\xc3\xa9", "e": ""}\r\n', [("caf\xe9", {"e": ""})]),
        ("m.jsonl", b'{"path": "caf\\udce9", "q": 1.5}\n', [(os.fsdecode(b"caf\xe9"), {"q": 1.5})]),
        ("m.jsonl", b'{"path": "caf\xe9"}\n', [(os.fsdecode(b"caf\xe9"), None)]),
        ("m.jsonl", b"", []),
        ("m", b' \t\n {"path": "a", "q": 1}', [("a", {"q": 1})]),
        ("m", b" \n\npath,q\na,1\n", [("a", {"q": "1"})]),
        ("m.txt", b"\xef\xbb\xbfpath,q\na,1\n", [("a", {"q": "1"})]),
        ("m.txt", b'\xef\xbb\xbf{"path": "a"}', [("a", None)]),
        ("m", b"\n \n", []),
    ],
)
def test_a_manifest_names_files_and_their_parameters(
    tmp_path: Path, name: str, content: bytes, expected: list[tuple[str, dict[str, Any] | None]] | None
) -> None:
    if expected is None:
        with pytest.raises(ListError, match="path;q, x"):
            manifest(tmp_path, content, name)
    else:
        assert manifest(tmp_path, content, name) == expected


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("m.csv", b"", 1, "a header with a column path (or src, input); its columns: none"),
        ("m.csv", b"\n\nfile,q\na,1\n", 3, "a header with a column path (or src, input); its columns: file, q"),
        ("m.csv", b"path,\na,\n", 1, "column 2 has no name"),
        ("m.csv", b"path,q,q\n", 1, "two columns are called q"),
        ("m.csv", b"path,q\na,1\n\nb,1,2\n", 4, "it has 3 cells, and the header has 2"),
        ("m.csv", b'path,q\na,"1\n2\n3"\nb,"1\n2",3\n', 5, "it has 3 cells"),
        ("m.csv", b"path,q\na,1\n,2\n", 3, "the path is '', which names no file"),
        ("m.csv", b"q,path\n1,a\n2\n", 3, "the path is '', which names no file"),
        ("m.csv", b"path,q\na\0,2\n", 2, ""),
        ("m.csv", b'path,q\na,"1\n2\n', 2, "it is no CSV: unexpected end of data"),
        ("m.csv", b'path,q\na,"1"2\n', 2, "it is no CSV"),
        ("m.csv", b"path,q\na,1\rb,2\r", 2, "it is no CSV"),
        ("m.csv", b'path,q\na,"' + b"x\n" * 200_000, 2, "field larger than field limit"),
        ("m.csv", b"path\na\n" + b"x" * (LINE_BYTES_MAX + BLOCK_BYTES), 3, "more than"),
        ("m.jsonl", b'{"path": "a"}\n\n{"path": "b"\n', 3, "it is no JSON"),
        ("m.jsonl", b'{"path": "a"} x\n', 1, "it is no JSON"),
        ("m.jsonl", b"[" * 100_000 + b"\n", 1, "it is no JSON"),
        ("m.jsonl", b'["a"]\n', 1, "it is no JSON object with a key path, but list"),
        ("m.jsonl", b'{"path": "a"}\n{"file": "b"}\n', 2, "it has no key path (or src, input)"),
        ("m.jsonl", b'{"path": 3}\n', 1, "the path is 3, which is no text"),
        ("m.jsonl", b'{"path": null}\n', 1, "the path is None, which is no text"),
        ("m.jsonl", b'{"path": ""}\n', 1, "which names no file"),
        ("m.jsonl", b'{"path": "a\\u0000"}\n', 1, "which names no file"),
        ("m.jsonl", b'{"path": "\\ud800"}\n', 1, "which no file can be called here"),
        ("m", b'\n{"path": "a"}\npath\n', 3, "it is no JSON"),
        ("m", b"\n \nfile\n", 3, "a header with a column path"),
    ],
)
def test_a_line_that_is_wrong_is_refused_by_its_number(
    tmp_path: Path, name: str, content: bytes, line: int, says: str
) -> None:
    with pytest.raises(ListError) as caught:
        manifest(tmp_path, content, name)
    assert (caught.value.path, caught.value.line) == (f"{tmp_path}/{name}", line)
    assert says in caught.value.reason


def test_the_lines_before_a_wrong_one_are_given_out(tmp_path: Path) -> None:
    files = read_manifest(written(tmp_path, b"path\na\nb,c\n", "m.csv"))
    assert next(files).path == "a"
    with pytest.raises(ListError):
        next(files)


CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))) | st.binary(max_size=5).map(
    lambda cell: os.fsdecode(cell.replace(b"\0", b""))
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(st.tuples(CELLS.filter(bool), CELLS, CELLS)), st.sampled_from(["csv", "tsv"]), st.booleans())
def test_what_the_csv_module_writes_is_read_as_it_was(
    tmp_path: Path, rows: list[tuple[str, str, str]], suffix: str, unix: bool
) -> None:
    if unix:  # the csv module does not quote a lone CR where lines end in LF
        rows = [(path.replace("\r", "R"), q.replace("\r", "R"), r.replace("\r", "R")) for path, q, r in rows]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if suffix == "tsv" else ",", lineterminator="\n" if unix else "\r\n")
    writer.writerows([("path", "q", "r"), *rows])
    expected = [(path, {name: cell for name, cell in (("q", q), ("r", r)) if cell} or None) for path, q, r in rows]
    assert manifest(tmp_path, text.getvalue().encode("utf-8", "surrogateescape"), f"m.{suffix}") == expected


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.lists(
        st.dictionaries(CELLS, CELLS | st.integers() | st.booleans() | st.none() | st.lists(st.integers())).flatmap(
            lambda parameters: CELLS.filter(bool).map(lambda path: {**parameters, "path": path})
        )
    ),
    st.booleans(),
)
def test_what_the_json_module_writes_is_read_as_it_was(
    tmp_path: Path, rows: list[dict[str, Any]], ascii_only: bool
) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    expected = [(row["path"], {name: row[name] for name in row if name != "path"} or None) for row in rows]
    assert manifest(tmp_path, lines.encode("utf-8", "surrogateescape"), "m.jsonl") == expected

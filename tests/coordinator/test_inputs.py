"""Inputs and outputs of a batch: what is listed, in which order, and which patterns are refused."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from ringpool.coordinator.inputs import InputFile, OutputPattern, Scope, list_inputs, with_outputs
from ringpool.errors import InputMissingError, OutputCollisionError, OutputPatternError
from ringpool.workers.files.naming import random_token, staging_name


def grow(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(os.fsencode(file))
    return root


def relpaths(*sources: str | Path, exclude_under: Path | None = None) -> list[str]:
    return [file.relpath for file in list_inputs(sources, exclude_under=exclude_under)]


# ---- what is listed --------------------------------------------------------------------------------------------------


def test_a_file_is_itself_under_its_name(tmp_path: Path) -> None:
    file = grow(tmp_path, "a/b.txt") / "a/b.txt"
    assert list(list_inputs([file])) == [InputFile(str(file), "b.txt")]


def test_a_directory_is_walked_in_order_files_first(tmp_path: Path) -> None:
    grow(tmp_path, "b.txt", "a/z", "a/y/x", "c", "B/q", ".hidden")
    assert relpaths(tmp_path) == [".hidden", "b.txt", "c", "B/q", "a/z", "a/y/x"]


def test_paths_begin_with_the_source_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(grow(tmp_path, "in/a"))
    for source, path in [
        ("in", "in/a"),
        ("in//", "in/a"),
        ("./in", "./in/a"),
        (".", "in/a"),
        ("../" + tmp_path.name, None),
    ]:
        [file] = list_inputs([source])
        assert file.path == (path or f"../{tmp_path.name}/in/a")
        assert Path(file.path).read_text() == "in/a"


def test_an_empty_directory_has_no_inputs(tmp_path: Path) -> None:
    assert relpaths(tmp_path) == []


def test_ringpools_own_files_are_not_inputs(tmp_path: Path) -> None:
    staged = (os.fsdecode(staging_name(target, random_token())) for target in (b"b.gz", b"sub/b.gz"))
    grow(tmp_path, "a", ".rp-notes", ".ringpool/locks/00.lock", "sub/.ringpool/ledger.db", "sub/b", *staged)
    assert relpaths(tmp_path) == [".rp-notes", "a", "sub/b"]
    assert relpaths(f"{tmp_path}/**/.rp*") == [".rp-notes"]


def test_the_place_of_the_outputs_is_not_entered_even_when_it_appears_during_the_walk(tmp_path: Path) -> None:
    grow(tmp_path, "a", "in/b")
    files = list_inputs([tmp_path], exclude_under=tmp_path / "out")
    assert next(files).relpath == "a"
    grow(tmp_path, "out/a.gz")
    os.symlink("out", tmp_path / "another name for it")
    assert [file.relpath for file in files] == ["in/b"]
    assert relpaths(tmp_path, exclude_under=tmp_path / "in" / ".." / "out") == ["a", "in/b"]


def test_a_source_is_taken_even_where_the_outputs_go(tmp_path: Path) -> None:
    grow(tmp_path, "a", "b/c")
    assert relpaths(tmp_path, exclude_under=tmp_path) == ["a", "b/c"]
    assert relpaths(tmp_path / "b", exclude_under=tmp_path) == ["c"]


def test_what_is_written_beside_inputs_during_the_walk_is_not_an_input(tmp_path: Path) -> None:
    grow(tmp_path, "a", "b", "d/c")
    seen: list[str] = []
    for file in list_inputs([tmp_path]):
        seen.append(file.relpath)
        Path(file.path + ".gz").write_text("output")
    assert seen == ["a", "b", "d/c"]


def test_links_are_followed_but_never_in_a_circle(tmp_path: Path) -> None:
    grow(tmp_path, "in/a", "elsewhere/b")
    os.symlink(tmp_path / "elsewhere", tmp_path / "in/linked")
    os.symlink(tmp_path / "in", tmp_path / "elsewhere/back")
    os.symlink("a", tmp_path / "in/alias")
    os.symlink("itself", tmp_path / "in/itself")
    os.symlink("nowhere", tmp_path / "in/dangling")
    assert relpaths(tmp_path / "in") == ["a", "alias", "linked/b"]
    assert relpaths(f"{tmp_path}/in/**/*") == ["a", "alias", "linked/b"]


def test_pipes_and_sockets_on_the_way_are_left_out(tmp_path: Path) -> None:
    os.mkfifo(grow(tmp_path, "a") / "pipe")
    assert relpaths(tmp_path) == ["a"]


def test_a_name_that_is_not_utf8_is_listed_and_leads_to_its_file(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n.txt")
    grow(tmp_path, name)
    [file] = list_inputs([tmp_path])
    assert file.relpath == name
    assert os.path.exists(file.path)


def test_a_directory_that_vanishes_during_the_walk_is_skipped(tmp_path: Path) -> None:
    grow(tmp_path, "a", "gone/b", "kept/c")
    files = list_inputs([tmp_path])
    next(files)
    (tmp_path / "gone/b").unlink()
    (tmp_path / "gone").rmdir()
    assert [file.relpath for file in files] == ["kept/c"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every directory")
def test_a_directory_that_cannot_be_read_is_an_error_not_an_empty_one(tmp_path: Path) -> None:
    grow(tmp_path, "locked/a")
    (tmp_path / "locked").chmod(0)
    try:
        with pytest.raises(PermissionError):
            relpaths(tmp_path)
    finally:
        (tmp_path / "locked").chmod(0o700)


@pytest.mark.parametrize("missing", ["nothing", "nothing/*.txt", "*.nothing", "a/x", "a/*", "", "x\0y"])
def test_a_missing_source_is_an_error_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.chdir(grow(tmp_path, "a", "b"))
    with pytest.raises(InputMissingError) as caught:
        list_inputs(["b", missing])
    assert caught.value.filename == missing


def test_listing_is_lazy_and_its_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    for directory in range(40):
        grow(tmp_path, *(f"{directory:02}/{file:03}" for file in range(50)))
    pairs = with_outputs(list_inputs([tmp_path]), OutputPattern("out/{parent}/{stem}.gz"), one_source=True)
    tracemalloc.start()
    try:
        next(pairs)
        tracemalloc.reset_peak()
        first = tracemalloc.get_traced_memory()[0]
        assert sum(1 for _ in pairs) == 40 * 50 - 1
        assert tracemalloc.get_traced_memory()[1] < first + 100_000  # all paths together would be 400 kB and more
    finally:
        tracemalloc.stop()


# ---- globs -----------------------------------------------------------------------------------------------------------

TREE = ("a.jpg", "b.png", "x/c.jpg", "x/y/d.jpg", "x/y/e.txt", "x/.h/f.jpg", ".g.jpg", "z[1]/i.jpg")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg"]),
        ("**/*.jpg", ["a.jpg", "x/c.jpg", "x/y/d.jpg", "z[1]/i.jpg"]),
        ("**", ["a.jpg", "b.png", "x/c.jpg", "x/y/d.jpg", "x/y/e.txt", "z[1]/i.jpg"]),
        ("x/**", ["c.jpg", "y/d.jpg", "y/e.txt"]),
        ("x/**/**/*.jpg", ["c.jpg", "y/d.jpg"]),
        ("**/y/*", ["x/y/d.jpg", "x/y/e.txt"]),
        ("*/*.jpg", ["x/c.jpg", "z[1]/i.jpg"]),
        ("*/", ["x/c.jpg", "x/y/d.jpg", "x/y/e.txt", "z[1]/i.jpg"]),
        ("x/?/[de].*", ["y/d.jpg", "y/e.txt"]),
        ("x/?/[!d].*", ["y/e.txt"]),
        ("**/.*.jpg", [".g.jpg"]),
        ("x/.*/*", [".h/f.jpg"]),
        ("z[1]/i.jpg", ["i.jpg"]),  # it exists as it is written
        ("z[[]1]/*", ["z[1]/i.jpg"]),
    ],
)
def test_a_glob_matches_as_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, expected: list[str]
) -> None:
    grow(tmp_path, *TREE)
    assert relpaths(f"{tmp_path}/{pattern}") == expected
    monkeypatch.chdir(tmp_path)
    assert relpaths(pattern) == expected
    assert all(Path(file.path).is_file() for file in list_inputs([pattern]))


# ---- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "relpath", "output", "base"),
    [
        ("thumbs/{relpath}.webp", "2020/sea.jpg", "thumbs/2020/sea.jpg.webp", "thumbs"),
        ("{relpath}.gz", "a", "a.gz", "."),
        ("/abs/out-{name}", "p/q.tar.gz", "/abs/out-q.tar.gz", "/abs"),
        ("../o/{stem}{suffix}", "p/q.tar.gz", "../o/q.tar.gz", "../o"),
        ("o/{parent}/{stem}.gz", "p/r/q.txt", "o/p/r/q.gz", "o"),
        ("o/{parent}/{stem}.gz", "q.txt", "o/q.gz", "o"),
        ("{parent}/{stem}.gz", "q.txt", "q.gz", "."),
        ("o/x{parent}/{name}", "q.txt", "o/x/q.txt", "o"),
        ("o/{suffix}/{name}", "README", "o/README", "o"),
        ("o/{{{stem}}}", "q.txt", "o/{q}", "o"),
        ("{{x}}/{name}", "q", "{x}/q", "{x}"),
        ("o/{name}", ".bashrc", "o/.bashrc", "o"),
        ("o/{stem}+{suffix}", ".bashrc", "o/.bashrc+", "o"),
        ("all.txt", "q", "all.txt", "."),
    ],
)
def test_a_pattern_makes_an_output_of_a_relpath(pattern: str, relpath: str, output: str, base: str) -> None:
    made = OutputPattern(pattern)
    assert made.path_for(InputFile("in/" + relpath, relpath)) == output
    assert str(made.base) == base


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("o/{size}", "{size}; there are {relpath}, {parent}, {name}, {stem}, {suffix}"),
        ("o/{}", "unknown field {}"),
        ("o/{0}", "unknown field {0}"),
        ("o/{stem.x}", "unknown field {stem.x}"),
        ("o/{stem!r}", "unknown field {stem!r}"),
        ("o/{stem:>9}", "unknown field {stem:>9}"),
        ("o/{stem", "{{ or }}"),
        ("o/stem}", "{{ or }}"),
        ("", "names a directory"),
        ("o/", "names a directory"),
        ("o/{relpath}/", "names a directory"),
        ("o/{relpath}/.", "names a directory"),
        ("o/{parent}/..", "names a directory"),
        ("o/{parent}/../{name}", "before the first field only"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused_at_once(pattern: str, says: str) -> None:
    with pytest.raises(OutputPatternError) as caught:
        OutputPattern(pattern)
    assert says in str(caught.value)
    assert repr(pattern) in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "relpath"),
    [
        ("{suffix}/{name}", "README"),  # /README
        ("o/{suffix}", "README"),  # o/
        ("o/{suffix}", "a."),  # o/.
        ("o/{stem}{suffix}", ".."),  # what no listing gives out, but a caller may
        ("o/{relpath}", "../a"),
        ("o/{parent}/x", "../../a"),
        ("{relpath}", "/etc/passwd"),
    ],
)
def test_an_output_that_would_leave_its_base_is_refused(pattern: str, relpath: str) -> None:
    with pytest.raises(OutputPatternError, match="no file below"):
        OutputPattern(pattern).path_for(InputFile(relpath, relpath))


# ---- collisions ------------------------------------------------------------------------------------------------------


def outputs(pattern: str, files: Iterable[str], *, one_source: bool = True) -> list[str]:
    inputs = [InputFile("in/" + file, file) for file in files]
    return [output for _, output in with_outputs(inputs, OutputPattern(pattern), one_source=one_source)]


@pytest.mark.parametrize(
    ("pattern", "files", "one_source"),
    [
        ("o/all", ["a", "b"], True),
        ("o/{stem}", ["a.txt", "a.md"], True),
        ("o/{parent}/{stem}.gz", ["x/a.txt", "x/a.md"], True),
        ("o/{name}", ["x/a", "y/a"], True),
        ("o/{parent}{stem}", ["x/ya", "xy/a"], True),
        ("o/{relpath}", ["a", "a"], False),
    ],
)
def test_two_inputs_with_one_output_fail_when_the_second_is_drawn(
    pattern: str, files: list[str], one_source: bool
) -> None:
    inputs = (InputFile(f"source{n}/{file}", file) for n, file in enumerate(files))
    pairs = with_outputs(inputs, OutputPattern(pattern), one_source=one_source)
    output = next(pairs)[1]
    with pytest.raises(OutputCollisionError) as caught:
        next(pairs)
    assert caught.value.args == (output, f"source0/{files[0]}", f"source1/{files[1]}")


@pytest.mark.parametrize(
    ("pattern", "scope"),
    [
        ("o/{relpath}.gz", Scope.NOWHERE),
        ("o/{relpath}{suffix}", Scope.SOURCE),
        ("o/{parent}/{stem}.gz", Scope.DIRECTORY),
        ("{parent}/{name}", Scope.DIRECTORY),
        ("o/{parent}/x/{name}", Scope.SOURCE),
        ("o/{parent}-{name}", Scope.SOURCE),
        ("o/{parent}/{relpath}", Scope.SOURCE),
        ("o/{stem}/{parent}/{name}", Scope.SOURCE),
        ("o/{name}", Scope.SOURCE),
        ("o/x", Scope.SOURCE),
    ],
)
def test_outputs_are_remembered_only_as_far_as_they_may_come_again(pattern: str, scope: Scope) -> None:
    assert OutputPattern(pattern).scope is scope


NAMES = st.text("ab./-", min_size=1, max_size=7)
PATTERNS = st.lists(
    st.sampled_from(["{relpath}", "{parent}", "{name}", "{stem}", "{suffix}", "/", "a", "-"]), max_size=6
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(NAMES, max_size=12, unique=True), PATTERNS.map(lambda parts: "o/" + "".join(parts)))
def test_no_collision_is_missed_by_remembering_less(names: list[str], pattern: str) -> None:
    files = {name for name in names if not {"", ".", ".."} & set(name.split("/"))}
    by_directory = sorted(files, key=lambda name: (name.rpartition("/")[0], name))
    try:
        everything = outputs(pattern, by_directory, one_source=False)
    except OutputCollisionError:
        with pytest.raises(OutputCollisionError):
            outputs(pattern, by_directory)
    except OutputPatternError:
        return
    else:
        assert outputs(pattern, by_directory) == everything
        assert len(set(everything)) == len(everything)
        assert all(".." not in output.split("/") and output.startswith("o/") for output in everything)

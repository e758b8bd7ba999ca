"""Inputs of a batch: what is listed, in which order, and what filters leave out."""

from __future__ import annotations

import errno
import os
import sqlite3
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ringpool.coordinator import inputs
from ringpool.coordinator.inputs import InputFile, largest_first, list_inputs, relpaths_are_unique, scratch_error
from ringpool.coordinator.outputs import NamedOutputs, with_outputs
from ringpool.errors import InputMissingError, ListError
from ringpool.workers.files.naming import random_token, staging_name


def grow(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(os.fsencode(file))
    return root


def relpaths(*sources: str | Path, under: Path | None = None, **filters: Sequence[str]) -> list[str]:
    places = [] if under is None else [under]
    return [file.relpath for file in list_inputs(sources, exclude_under=places, **filters)]


def places_of_open_files() -> list[str]:
    with os.scandir("/proc/self/fd") as entries:
        return sorted(os.readlink(entry.path) for entry in entries)


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
    files = list_inputs([tmp_path], exclude_under=[tmp_path / "out", tmp_path / "meta"])
    assert next(files).relpath == "a"
    grow(tmp_path, "out/a.gz", "meta/a.json")
    os.symlink("out", tmp_path / "another name for it")
    assert [file.relpath for file in files] == ["in/b"]
    assert relpaths(tmp_path, under=tmp_path / "in" / ".." / "out") == ["a", "in/b", "meta/a.json"]
    files = list_inputs([tmp_path], exclude_under=[tmp_path / "out", tmp_path / "meta", tmp_path / "missing"])
    assert [file.relpath for file in files] == ["a", "in/b"]


def test_a_source_is_taken_even_where_the_outputs_go(tmp_path: Path) -> None:
    grow(tmp_path, "a", "b/c")
    assert relpaths(tmp_path, under=tmp_path) == ["a", "b/c"]
    assert relpaths(tmp_path / "b", under=tmp_path) == ["c"]


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


@pytest.mark.parametrize("target", ["b/x", "b/../x", "n" * 300, f"d/{'n' * 300}"])
def test_what_lies_beside_a_link_that_can_lead_nowhere_is_found(tmp_path: Path, target: str) -> None:
    grow(tmp_path, "a", "b", "d/c")
    os.symlink(target, tmp_path / "link")
    assert relpaths(tmp_path) == ["a", "b", "d/c"]
    assert relpaths(f"{tmp_path}/*") == ["a", "b"]


def test_a_link_to_where_nobody_may_look_is_an_error_for_itself_unless_it_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(tmp_path, "in/a", "in/d/b", "closed/c")
    os.symlink("../closed/c", tmp_path / "in/link")
    (tmp_path / "in").chmod(0o755)
    monkeypatch.chdir(tmp_path / "in")
    (tmp_path / "closed").chmod(0)
    us = os.geteuid()
    if us == 0:
        os.seteuid(65_534)
    try:
        for source in (".", "**/*"):
            files = list_inputs([source])
            assert [next(files).relpath for _ in range(2)] == ["a", "d/b"]
            with pytest.raises(PermissionError, match=r"what this link leads to is not known.*link"):
                next(files)
            assert [file.relpath for file in list_inputs([source], exclude=["link"])] == ["a", "d/b"]
        assert [file.relpath for file in list_inputs(["d/*", "a*"])] == ["b", "a"]
    finally:
        os.seteuid(us)
        (tmp_path / "closed").chmod(0o700)


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


def test_what_lies_beside_a_directory_that_cannot_be_read_is_found_before_that_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(tmp_path, "one/a", "one/locked/b", "one/z/c", "two/d")
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if "locked" in path:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    files = list_inputs([tmp_path / "one", tmp_path / "two"])
    assert [next(files).relpath for _ in range(3)] == ["a", "z/c", "d"]
    with pytest.raises(PermissionError, match="one/locked"):
        next(files)
    with pytest.raises(PermissionError, match="one/locked"):
        list_inputs([f"{tmp_path}/one/*/b"])
    excluded = list_inputs([tmp_path / "one"], exclude=["locked"])
    assert [file.relpath for file in excluded] == ["a", "z/c"]
    glob = f"{tmp_path}/one/*/moved"
    with pytest.raises(PermissionError, match="one/locked"):
        list_inputs([glob], exclude=["x"], have_matched=lambda _matches: True)
    assert not list(list_inputs([glob], exclude=["locked"], have_matched=lambda _matches: True)), (
        "all of them were moved"
    )
    with pytest.raises(InputMissingError):
        list_inputs([glob], exclude=["locked"])


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
    pairs = with_outputs(list_inputs([tmp_path]), NamedOutputs(["out/{parent}/{stem}.gz"]), one_source=True)
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
        ("*/**", ["x/c.jpg", "x/y/d.jpg", "x/y/e.txt", "z[1]/i.jpg"]),  # below a directory, not the directory
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


# ---- filters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.jpg"], [], [".g.jpg", "a.jpg", "x/c.jpg", "x/.h/f.jpg", "x/y/d.jpg", "z[1]/i.jpg"]),
        (["*.png", "e.*"], [], ["b.png", "x/y/e.txt"]),
        (["x/*.jpg"], [], ["x/c.jpg"]),
        (["/*.jpg"], [], [".g.jpg", "a.jpg"]),
        (["./x/*/*"], [], ["x/.h/f.jpg", "x/y/d.jpg", "x/y/e.txt"]),
        (["**/y/*"], [], ["x/y/d.jpg", "x/y/e.txt"]),
        (["x/**"], [], ["x/c.jpg", "x/.h/f.jpg", "x/y/d.jpg", "x/y/e.txt"]),
        (["x/**/*.jpg"], [], ["x/c.jpg", "x/.h/f.jpg", "x/y/d.jpg"]),
        (["y/"], [], ["x/y/d.jpg", "x/y/e.txt"]),
        (["x"], [], []),  # a directory is no file
        ([""], [], []),
        ([], ["*.jpg"], ["b.png", "x/y/e.txt"]),
        ([], [".*"], ["a.jpg", "b.png", "x/c.jpg", "x/y/d.jpg", "x/y/e.txt", "z[1]/i.jpg"]),
        ([], ["y"], [".g.jpg", "a.jpg", "b.png", "x/c.jpg", "x/.h/f.jpg", "z[1]/i.jpg"]),
        ([], ["x/y"], [".g.jpg", "a.jpg", "b.png", "x/c.jpg", "x/.h/f.jpg", "z[1]/i.jpg"]),
        ([], ["x/y/"], [".g.jpg", "a.jpg", "b.png", "x/c.jpg", "x/.h/f.jpg", "z[1]/i.jpg"]),
        ([], ["/y", "a.jpg/", "x/**", "z?1?"], [".g.jpg", "a.jpg", "b.png"]),
        (["*.jpg"], ["x", "a.*"], [".g.jpg", "z[1]/i.jpg"]),  # what excludes wins
    ],
)
def test_filters_take_and_leave_out_by_name_or_by_relpath(
    tmp_path: Path, include: list[str], exclude: list[str], expected: list[str]
) -> None:
    grow(tmp_path, *TREE)
    assert relpaths(tmp_path, include=include, exclude=exclude) == expected


def test_filters_are_for_what_a_glob_finds_too_and_that_may_be_nothing(tmp_path: Path) -> None:
    grow(tmp_path, *TREE)
    assert relpaths(f"{tmp_path}/x/**", include=["*.jpg"], exclude=["y"]) == ["c.jpg"]
    assert relpaths(f"{tmp_path}/x/**", exclude=["*"]) == []
    with pytest.raises(InputMissingError):
        relpaths(f"{tmp_path}/q/**", exclude=["*"])


def test_what_a_source_or_a_list_names_is_not_filtered(tmp_path: Path) -> None:
    grow(tmp_path, "d/a.txt", "d/b.md")
    (tmp_path / "list").write_text(f"{tmp_path}/d/a.txt\n")
    sources = [tmp_path / "d/a.txt", f"@{tmp_path}/list", tmp_path / "d"]
    filters = {"include": ["*.md"], "exclude": ["d", "a.*"]}
    assert [os.path.basename(path) for path in relpaths(*sources, **filters)] == ["a.txt", "a.txt", "b.md"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every directory")
def test_an_excluded_directory_that_cannot_be_read_is_no_error(tmp_path: Path) -> None:
    grow(tmp_path, "locked/a", "b")
    (tmp_path / "locked").chmod(0)
    try:
        assert relpaths(tmp_path, exclude=["locked/"]) == ["b"]
    finally:
        (tmp_path / "locked").chmod(0o700)


@pytest.mark.parametrize("exclude", [["skip"], []])
def test_an_excluded_directory_is_not_entered(tmp_path: Path, exclude: list[str]) -> None:
    files = list_inputs([grow(tmp_path, "a", "skip/b", "walk/c")], exclude=exclude)
    assert next(files).relpath == "a"
    (tmp_path / "skip").rename(tmp_path / "elsewhere")
    os.symlink("skip", tmp_path / "skip")  # whoever enters it now gets an error
    if exclude:
        assert [file.relpath for file in files] == ["walk/c"]
    else:
        assert next(files).relpath == "walk/c"
        with pytest.raises(OSError, match="symbolic links"):
            next(files)


# ---- lists among the sources -----------------------------------------------------------------------------------------


def test_a_list_is_a_source_among_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(grow(tmp_path, "a", "d/b", "@here"))
    (tmp_path / "list").write_text("d/b\nmissing\n")
    assert relpaths("a", "@list", "d") == ["a", "d/b", "missing", "b"]
    assert relpaths("./@here", Path("@here")) == ["@here", "@here"]


def test_a_list_that_is_not_there_is_an_error_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(grow(tmp_path, "a", "@here"))
    with pytest.raises(ListError, match=r"list of inputs here: No such file or directory.*\./@name"):
        list_inputs(["a", "@here"])


def test_standard_input_is_read_once() -> None:
    with pytest.raises(ListError, match="named twice"):
        list_inputs(["-", "@-"])


@pytest.mark.parametrize(
    ("sources", "unique"),
    [
        (["a"], True),
        ([Path("-")], True),
        (["./@a"], True),
        (["-"], False),
        (["@a"], False),
        (["a", "b"], False),
        ([], False),
    ],
)
def test_relpaths_are_unique_only_where_there_is_one_source_that_is_no_list(
    sources: list[str | Path], unique: bool
) -> None:
    assert relpaths_are_unique(sources) is unique


# ---- order -----------------------------------------------------------------------------------------------------------


def test_the_largest_comes_first_and_equals_in_their_order(tmp_path: Path) -> None:
    files: list[InputFile] = []
    sizes = [3, 0, 70_000, 3, None, 5, 3]
    for number, size_bytes in enumerate(sizes):
        path = tmp_path / os.fsdecode(b"caf\xe9-%d" % number)
        if size_bytes is not None:
            path.write_bytes(bytes(size_bytes))
        parameters = {"n": number, "big": 1 << 80, "nested": [None, {"a": 1.5}]} if number % 2 else None
        files.append(InputFile(str(path), path.name, parameters))
    files.append(InputFile("nul\0byte", "x"))
    assert list(largest_first(iter(files))) == [files[n] for n in (2, 5, 0, 3, 6, 1, 4, 7)]
    assert list(largest_first(iter(()))) == []


def test_what_orders_by_size_is_on_disk_and_leaves_nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SCRATCH_CACHE_KIB", 256)
    files = (InputFile(f"/nowhere/{'x' * 200}/{n}", f"{n}") for n in range(20_000))
    before = places_of_open_files()
    tracemalloc.start()
    try:
        ordered = largest_first(files)
        assert next(ordered).relpath == "0"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # all paths together are 4 MB
    finally:
        tracemalloc.stop()
    on_disk = set(places_of_open_files()) - set(before)
    assert any("etilqs" in place and place.endswith("(deleted)") for place in on_disk)
    del ordered
    assert places_of_open_files() == before


def test_an_error_of_the_temporary_database_names_its_place_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", "/full")
    said = str(scratch_error(sqlite3.OperationalError("database or disk is full")))
    assert "database or disk is full" in said
    assert "SQLITE_TMPDIR" in said
    assert "'/full'" in said

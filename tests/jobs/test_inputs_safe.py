"""No output of a job takes the place of an input, whatever its patterns, filters and links lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringpool import InputFile, Job
from ringpool.coordinator.reach import Reach
from ringpool.errors import OutputPatternError

UPPER = "tr a-z A-Z < {src} > {dst}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(place: Path, *names: str) -> None:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"content of {name}")


def all_of(place: Path) -> dict[str, str]:
    found = (path for path in place.rglob("*") if path.is_file() and ".ringpool" not in path.parts)
    return {str(path.relative_to(place)): path.read_text() for path in found}


@pytest.mark.parametrize(
    ("names", "inputs", "output", "filters"),
    [
        (["src/tests/x", "tests/x"], ["src", "tests"], "{relpath}", {}),
        (["src/tests/x", "tests/y"], ["src", "tests"], "{relpath}.gz", {}),
        (["data/x", "data/data/x"], "data", "{relpath}", {}),
        (["in/sub/sub/x"], "in/sub", "in/{relpath}", {}),
        (["in/a"], "in", "in/{relpath}.gz", {"exclude": [".git/"]}),
        (["in/x1", "in/x2"], "in", "in/x{index}", {"include": ["x*"]}),
        (["in/x1", "in/x2"], "in/*", "in/x{index}", {"include": ["x*"]}),
        (["in/sub/x"], "in/*/", "in/{relpath}.gz", {}),
        (["in/keep/a"], "in", "in/{relpath}.gz", {"exclude": ["kept/", "/a.gz"]}),
    ],
)
def test_an_output_that_the_walk_of_a_source_would_find_is_refused(
    place: Path, names: list[str], inputs: list[str], output: str, filters: dict[str, list[str]]
) -> None:
    make(place, *names)
    before = all_of(place)
    with pytest.raises(OutputPatternError, match="an input too"):
        Job(command=UPPER, inputs=inputs, output=output, **filters).run(1)  # type: ignore[arg-type]
    assert all_of(place) == before


@pytest.mark.parametrize(
    ("names", "inputs", "output", "filters"),
    [
        (["src/x", "tests/y"], ["src", "tests"], "{relpath}", {}),
        (["in/sub/x"], "in/sub", "in/{relpath}", {}),
        (["in/a", "in/sub/b"], "in", "in/{relpath}.gz", {"exclude": ["*.gz"]}),
        (["in/a.txt", "in/sub/b.txt"], "in", "in/{parent}/{stem}.up", {"include": ["*.txt"]}),
        (["in/a", "in/b"], "in", "in/out/{relpath}", {}),
        (["in/a", "in/out/b"], "in", "in/out/{relpath}", {"exclude": ["out/"]}),
        (["in/a.txt"], "in/*.txt", "in/{name}.up", {}),
    ],
)
def test_outputs_beside_inputs_that_no_walk_finds_are_made_once(
    place: Path, names: list[str], inputs: list[str], output: str, filters: dict[str, list[str]]
) -> None:
    make(place, *names)
    for n_done in (len([name for name in names if not name.startswith("in/out/")]), 0):
        report = Job(command=UPPER, inputs=inputs, output=output, **filters).run(1)  # type: ignore[arg-type]
        assert (report.ok, report.progress.done) == (True, n_done)
    for name in names:
        assert (place / name).read_text() == f"content of {name}"


@pytest.mark.parametrize(
    ("inputs", "filters"),
    [("in/link*/*.txt", {}), ("in", {"include": ["*.txt"]}), ("elsewhere", {"include": ["*.txt"]})],
)
def test_an_output_that_a_walk_finds_through_a_link_is_refused(
    place: Path, inputs: str, filters: dict[str, list[str]]
) -> None:
    make(place, "elsewhere/x.txt", "in/y.txt")
    (place / "in/link").symlink_to("../elsewhere")
    output = "in/link/{relpath}.txt" if inputs == "elsewhere" else "in/{relpath}.txt"
    with pytest.raises(OutputPatternError, match="an input too"):
        Job(command=UPPER, inputs=inputs, output=output, **filters).run(1)  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", ["in", "in/*", ["in/a", "in/b"]])
def test_a_link_from_an_output_to_another_input_is_replaced(place: Path, inputs: str | list[str]) -> None:
    """As by a tool that looks for duplicates, and makes links of them."""
    make(place, "in/a", "in/b")
    (place / "out").mkdir()
    (place / "out/a").symlink_to("../in/b")
    assert Job(command=UPPER, inputs=inputs, output="out/{name}").run(1).ok
    assert not (place / "out/a").is_symlink()
    assert (place / "out/a").read_text() == "CONTENT OF IN/A"
    assert (place / "in/b").read_text() == "content of in/b"


@pytest.mark.parametrize(
    ("link", "to", "inputs", "filters"),
    [
        ("src/l", "z", "src", {}),
        ("src/l", "z", "src/**/*", {}),
        ("src/l", "z/sub/..", "src", {"include": ["*.txt"]}),
        ("src/l.txt", "z/b.txt", "src", {}),
        ("src/l.txt", "z/b.txt", ["src/a.txt", "src/l.txt"], {}),
    ],
)
def test_a_link_from_an_output_to_an_input_that_is_found_through_a_link_is_replaced(
    place: Path, link: str, to: str, inputs: str | list[str], filters: dict[str, list[str]]
) -> None:
    make(place, "src/a.txt", "z/b.txt", "z/sub/c.txt", "other/d.txt")
    (place / link).symlink_to(place / to)
    (place / "out").mkdir()
    (place / "out/a.txt").symlink_to("../z/b.txt")
    assert Job(command=UPPER, inputs=inputs, output="out/{relpath}", **filters).run(1).ok  # type: ignore[arg-type]
    assert (place / "z/b.txt").read_text() == "content of z/b.txt"
    assert not (place / "out/a.txt").is_symlink()
    assert (place / "out/a.txt").read_text() == "CONTENT OF SRC/A.TXT"


@pytest.mark.parametrize(
    ("to", "inputs", "exclude"),
    [
        ("other/d.txt", "src", []),
        ("z/b.txt", "src", ["l/"]),
        ("z/b.txt", "src/*.txt", []),
        ("gone/e.txt", "src", []),
        ("gone/e.txt", "src/**/*.txt", []),
    ],
)
def test_a_link_from_an_output_to_where_no_inputs_are_is_followed(
    place: Path, to: str, inputs: str, exclude: list[str]
) -> None:
    make(place, "src/a.txt", "z/b.txt", "other/d.txt")
    (place / "src/l").symlink_to(place / "z")
    (place / "src/dangling").symlink_to(place / "gone/e.txt")
    (place / "out").mkdir()
    (place / "gone").mkdir()
    (place / "out/a.txt").symlink_to(place / to)
    assert Job(command=UPPER, inputs=inputs, output="out/{relpath}", exclude=exclude).run(1).ok
    assert (place / to).read_text() == "CONTENT OF SRC/A.TXT"


def test_links_are_replaced_and_followed_among_many_outputs_of_an_input(place: Path) -> None:
    make(place, "src/a.txt", "z/b.txt", "other/d.txt")
    (place / "src/l").symlink_to(place / "z")
    outputs = {f"o{number}": f"out/{number}/{{relpath}}" for number in range(70)}
    for number, to in ((66, "z/b.txt"), (67, "other/d.txt")):
        (place / f"out/{number}").mkdir(parents=True)
        (place / f"out/{number}/a.txt").symlink_to(place / to)
    assert Job("tests.jobs.job_functions:copy_to_all", "src", outputs).run(1).ok
    assert (place / "z/b.txt").read_text() == "content of z/b.txt"
    assert (place / "other/d.txt").read_text() == "content of src/a.txt"


def test_an_input_below_a_link_to_the_root_is_one_too(place: Path) -> None:
    make(place, "src/a.txt", "z/b.txt")
    (place / "src/root").symlink_to("/")
    (place / "out").mkdir()
    (place / "out/a.txt").symlink_to(place / "z/b.txt")
    inputs = ["src/*.txt", f"src/root{place}/z/*.txt", f"src/*/{str(place)[1:]}/z/*.txt"]
    assert Job(command=UPPER, inputs=inputs[2:] + inputs[:1], output="out/{name}").run(1).ok
    assert (place / "z/b.txt").read_text() == "content of z/b.txt"


def test_an_output_in_the_place_that_a_named_link_leads_to_is_refused(place: Path) -> None:
    make(place, "src/b.txt", "out/b.txt")
    (place / "src/a").symlink_to("../out/b.txt")
    with pytest.raises(OutputPatternError, match="an input too"):
        Job(command=UPPER, inputs=["src/b.txt", "src/a"], output="out/{name}").run(1)
    assert (place / "out/b.txt").read_text() == "content of out/b.txt"


@pytest.mark.parametrize("inputs", ["src", "src/*"])
def test_a_link_that_filters_leave_out_is_nothing_to_outputs(place: Path, inputs: str) -> None:
    make(place, "src/a.txt")
    (place / "src/latest").symlink_to("../out/a.txt")
    for n_done in (1, 0):
        report = Job(command=UPPER, inputs=inputs, output="out/{relpath}", exclude=["latest"]).run(1)
        assert (report.ok, report.progress.done) == (True, n_done)


@pytest.mark.parametrize("inputs", ["src", "src/**/x.txt"])
@pytest.mark.parametrize("link", ["src/old", "src/b/old"])
def test_an_output_that_a_walk_finds_through_a_link_in_it_is_refused(place: Path, inputs: str, link: str) -> None:
    make(place, "src/data/x.txt", "src/b/c/x.txt", "store/data/x.txt")
    (place / link).symlink_to(place / "store/data")
    before = all_of(place)
    with pytest.raises(OutputPatternError, match="an input too"):
        Job(command=UPPER, inputs=inputs, output="store/{relpath}").run(1)
    assert all_of(place).items() >= before.items()


@pytest.mark.parametrize(
    ("link", "to"),
    [
        ("src/f.txt", "out/z.txt"),  # an input, and another's output
        ("src/f.txt", "out/x.txt.up"),  # once that is there
        ("src/later", "out/new"),
        ("out/b", "src/b"),  # by which outputs come to be among the inputs
        ("out/b", "src/c"),
    ],
)
def test_an_output_that_a_link_to_or_from_the_outputs_makes_an_input_is_refused(
    place: Path, link: str, to: str
) -> None:
    make(place, "src/x.txt", "src/z.txt", "src/b/y.txt", "src/c/y.txt", "src/new/y.txt", "out/z.txt")
    (place / link).symlink_to(place / to)
    before = all_of(place)
    output = "out/{relpath}.up" if link == "src/f.txt" and to != "out/z.txt" else "out/{relpath}"
    with pytest.raises(OutputPatternError, match="an input too"):
        Job(command=UPPER, inputs="src", output=output).run(1)
    for name in before.keys() - {"out/x.txt", "out/z.txt"}:
        assert (place / name).read_text() == before[name]


@pytest.mark.parametrize(
    ("link", "to", "filters"),
    [
        ("src/out", "out", {}),  # the place of the outputs, which no walk enters
        ("src/old", "out/made", {"exclude": ["old/"]}),
        ("src/old", "out/made", {"include": ["x.txt"]}),
        ("src/old", "out/others", {}),  # where no output comes to
        ("src/self", "src", {}),
    ],
)
def test_a_link_that_leads_to_no_output_is_followed_or_left_out_as_ever(
    place: Path, link: str, to: str, filters: dict[str, list[str]]
) -> None:
    make(place, "src/made/x.txt", "out/made/z.txt", "out/others/x.txt")
    (place / link).symlink_to(place / to)
    n = 1 + (to == "out/others")
    for n_done in (n, 0):
        report = Job(command=UPPER, inputs="src", output="out/{relpath}.gz", **filters).run(1)  # type: ignore[arg-type]
        assert (report.ok, report.progress.done) == (True, n_done)


def test_a_directory_of_outputs_among_the_inputs_may_be_a_link(place: Path) -> None:
    make(place, "photos/a.jpg", "disk/x")
    (place / "photos/thumbs").symlink_to("../disk")
    outputs = {"meta": "photos/{relpath}.json", "thumb": "photos/thumbs/{relpath}"}
    for n_done in (1, 0):
        job = Job(
            command="cp {src} {dst.meta}; cp {src} {dst.thumb}", inputs="photos", output=outputs, include=["*.jpg"]
        )
        report = job.run(1)
        assert (report.ok, report.progress.done) == (True, n_done)


def test_links_are_as_they_are_now_and_not_as_an_earlier_job_has_found_them(place: Path) -> None:
    make(place, "v1/a.txt", "v1/a.csv", "v2/a.txt", "v2/a.csv")
    for version in ("v1", "v2"):
        (place / "current").unlink(missing_ok=True)
        (place / "current").symlink_to(version)
        files = [InputFile(f"{version}/a.txt", "a.txt"), InputFile(f"{version}/a.csv", "z.csv")]
        with pytest.raises(OutputPatternError, match="an input too"):
            Job(command=UPPER, inputs=files, output="current/{stem}.csv").run(1)
        assert (place / version / "a.csv").read_text() == f"content of {version}/a.csv"


def test_a_pattern_that_leads_up_and_through_a_link_knows_what_was_moved_away(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(place, "real/a.txt", "sub/x")
    (place / "sub/in").symlink_to("../real")
    monkeypatch.chdir(place / "sub")
    for n_done in (1, 0):
        report = Job(command="mv {src} {dst}", inputs="../sub/in/*.txt", output="../o/{relpath}").run(1)
        assert (report.ok, report.progress.done) == (True, n_done)


def test_a_named_link_to_a_file_at_the_root_tells_where_inputs_are(place: Path) -> None:
    (place / "link").symlink_to("/ringpool-input-that-need-not-be-there")
    (place / "out").mkdir()
    (place / "out/a").symlink_to("/ringpool-another")
    (place / "out/b").symlink_to("/usr/ringpool-another")
    reach = Reach(["link"], [place / "out"])
    assert [reach.leads_to_inputs(str(place / "out" / name)) for name in "ab"] == [True, False]

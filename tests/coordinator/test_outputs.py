"""Outputs of a batch: what a pattern makes of an input, which patterns are refused, and what is said of a collision."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from ringpool.coordinator import inputs
from ringpool.coordinator.inputs import InputFile
from ringpool.coordinator.outputs import KEPT_MAX, Collisions, NamedOutputs, OutputPattern, Scope, with_outputs
from ringpool.errors import OutputCollisionError, OutputPatternError

HASH_OF_HIDDEN = blake2b(b"p/.x", digest_size=16).hexdigest()

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
        ("o/{parent}/{parent}/{name}", "q.txt", "o/q.txt", "o"),
        ("o/{parent}/{parent}/{name}", "p/q.txt", "o/p/p/q.txt", "o"),
        ("o/{relpath}", "a/./b//c", "o/a/b/c", "o"),  # what no listing gives out, but a caller may
        ("o/{hash:2}/{name}", "p/.x", f"o/{HASH_OF_HIDDEN[:2]}/.x", "o"),
        ("o/{index}-{index:04}-{index:x}", "q", "o/7-0007-7", "o"),
        ("o/{hash:2}/{name}", "p/q.txt", "o/ac/q.txt", "o"),
        ("o/{hash:2}/{hash}{suffix}", "p/q.txt", "o/ac/ac58e46b709916875bd61445b1ea7904.txt", "o"),
        ("o/{name}/{parent}/x", "q.txt", "o/q.txt/x", "o"),
    ],
)
def test_a_pattern_makes_an_output_of_a_relpath(pattern: str, relpath: str, output: str, base: str) -> None:
    made = OutputPattern(pattern)
    assert made.path_for(InputFile("in/" + relpath, relpath), 7) == output
    assert str(made.base) == base


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("o/{size}", "{size}; there are {relpath}, {parent}, {name}, {stem}, {suffix}, {index}, {hash}"),
        ("o/{}", "unknown field {}"),
        ("o/{0}", "unknown field {0}"),
        ("o/{stem.x}", "unknown field {stem.x}"),
        ("o/{stem!r}", "unknown field {stem!r}"),
        ("o/{stem:>9}", "the format in {stem:>9}"),
        ("o/{relpath:s}", "the format in {relpath:s}"),
        ("o/{index:.2f}", "the format in {index:.2f}"),
        ("o/{index:100}", "the format in {index:100}"),
        ("o/{index:/>6}", "the format in {index:/>6}"),
        ("o/{index:{name}}", "the format in {index:{name}}"),
        ("o/{hash:0}", "the format in {hash:0}"),
        ("o/{hash:33}", "the format in {hash:33}"),
        ("o/{hash:-1}", "the format in {hash:-1}"),
        ("o/{hash:\u0662}", "the format in {hash:\u0662}"),
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
        ("o/{relpath}", "a/../../b"),
        ("o/{relpath}/x", "a/.."),
        ("o/{relpath}", "a/"),
        ("o/{relpath}", ""),
        ("o/{parent}/x", "../../a"),
        ("{relpath}", "/etc/passwd"),
    ],
)
def test_an_output_that_would_leave_its_base_is_refused(pattern: str, relpath: str) -> None:
    with pytest.raises(OutputPatternError, match="no file below"):
        OutputPattern(pattern).path_for(InputFile(relpath, relpath), 0)


def test_the_hash_is_of_the_relpaths_bytes_and_of_nothing_else() -> None:
    relpath = os.fsdecode(b"p/caf\xe9")
    digits = blake2b(b"p/caf\xe9", digest_size=16).hexdigest()
    pattern = OutputPattern("o/{hash}")
    assert [pattern.path_for(InputFile(path, relpath), n) for n, path in enumerate("ab")] == [f"o/{digits}"] * 2


FIELDS = ["{relpath}", "{parent}", "{name}", "{stem}", "{suffix}", "{index}", "{index:02}", "{hash:1}", "{hash}"]
NAMES = st.text("ab./-0", min_size=1, max_size=7)
RELPATHS = NAMES | st.lists(st.sampled_from(["a", "b.0", ".a", "", ".", "..", "..."]), min_size=1).map("/".join)
PATTERNS = st.lists(st.sampled_from([*FIELDS, *FIELDS, "/", "/", "a", "-", ".", "0"]), max_size=7).map(
    lambda parts: "o/" + "".join(parts)
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RELPATHS, PATTERNS, st.integers(0, 200))
def test_the_quick_way_and_the_careful_one_make_the_same_output(relpath: str, words: str, index: int) -> None:
    file = InputFile("in/" + relpath, relpath)
    for text in (words, words[2:]):  # with a base, and without
        try:
            pattern = OutputPattern(text)
            output = pattern._path_with_care(file, index)
        except OutputPatternError:
            continue
        assert pattern.path_for(file, index) == output
        assert not {"", ".", ".."} & set(output[pattern.base_length :].split("/"))
        assert output.startswith("o/") or text is not words


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RELPATHS, PATTERNS)
def test_the_careful_way_refuses_nothing_that_the_quick_one_makes(relpath: str, words: str) -> None:
    file = InputFile("in/" + relpath, relpath)
    try:
        pattern = OutputPattern(words)
        pattern._path_with_care(file, 3)
    except OutputPatternError:
        with pytest.raises(OutputPatternError):
            OutputPattern(words).path_for(file, 3)


# ---- several outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names", "patterns", "bases"),
    [
        (["o/{relpath}"], (), ["o/{relpath}"], ["o"]),
        (["x=o/{relpath}"], ("x",), ["o/{relpath}"], ["o"]),
        (["t_1=t/{name}", "_m=/m/{name}=x"], ("t_1", "_m"), ["t/{name}", "/m/{name}=x"], ["t", "/m"]),
        (["./a=b/{name}"], (), ["./a=b/{name}"], ["a=b"]),
        (["{name}=x"], (), ["{name}=x"], ["."]),
        (["1=b/{name}"], (), ["1=b/{name}"], ["1=b"]),
        (["a-b=c/{name}"], (), ["a-b=c/{name}"], ["a-b=c"]),
        (["a=b=c/{name}"], ("a",), ["b=c/{name}"], ["b=c"]),
    ],
)
def test_a_name_is_an_identifier_before_the_first_equals_sign(
    words: list[str], names: tuple[str, ...], patterns: list[str], bases: list[str]
) -> None:
    outputs = NamedOutputs(words)
    assert outputs.names == names
    assert [pattern.pattern for pattern in outputs.patterns] == patterns
    assert outputs.bases == tuple(Path(base) for base in bases)
    assert outputs.base == outputs.bases[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a=o/{name}", "p/{name}"], "'p/{name}': each of several outputs needs a name, such as thumb=p/{name}"),
        (["o/{name}", "p/{name}"], "'o/{name}': each of several outputs needs a name"),
        (["a=o/{name}", "a=p/{name}"], "'a=p/{name}': another output is called a too"),
        (["a=o/{name}", "b=o/{name}"], "'b=o/{name}': it makes the same files as a=o/{name}"),
        (["a=o/{name}", "b=./x/..//o/{name}"], "it makes the same files as a=o/{name}"),
        (["a=o/{name}", "b=o/{nme}"], "'o/{nme}': unknown field {nme}"),
        (["a="], "names a directory"),
    ],
)
def test_outputs_that_cannot_be_used_beside_each_other_are_refused(words: list[str], says: str) -> None:
    with pytest.raises(OutputPatternError) as caught:
        NamedOutputs(words)
    assert says in str(caught.value)


def test_each_input_has_an_output_of_each_pattern_and_a_number() -> None:
    outputs = NamedOutputs(["t=t/{index:03}.webp", "m=m/{relpath}.json"])
    files = [InputFile("in/p/a", "p/a"), InputFile("in/b", "b", {"n": 1})]
    assert list(with_outputs(iter(files), outputs, one_source=True)) == [
        (files[0], ("t/000.webp", "m/p/a.json")),
        (files[1], ("t/001.webp", "m/b.json")),
    ]


# ---- collisions ------------------------------------------------------------------------------------------------------


def outputs_of(words: str | Sequence[str], files: Iterable[str], **how: bool) -> list[tuple[str, ...]]:
    listed = [InputFile("in/" + file, file) for file in files]
    named = NamedOutputs([words] if isinstance(words, str) else words)
    return [outputs for _, outputs in with_outputs(listed, named, **{"one_source": True, **how})]


@pytest.mark.parametrize(
    ("pattern", "files", "one_source"),
    [
        ("o/all", ["a", "b"], True),
        ("o/{stem}", ["a.txt", "a.md"], True),
        ("o/{parent}/{stem}.gz", ["x/a.txt", "x/a.md"], True),
        ("o/{name}", ["x/a", "y/a"], True),
        ("o/{parent}{stem}", ["x/ya", "xy/a"], True),
        ("o/{relpath}", ["a", "a"], False),
        ("o/{hash}", ["a", "a"], False),
    ],
)
def test_two_inputs_with_one_output_fail_when_the_second_is_drawn(
    pattern: str, files: list[str], one_source: bool
) -> None:
    listed = (InputFile(f"source{n}/{file}", file) for n, file in enumerate(files))
    pairs = with_outputs(listed, NamedOutputs([pattern]), one_source=one_source)
    [output] = next(pairs)[1]
    with pytest.raises(OutputCollisionError) as caught:
        next(pairs)
    assert caught.value.args == (output, f"source0/{files[0]}", f"source1/{files[1]}")


@pytest.mark.parametrize(
    ("pattern", "scope"),
    [
        ("o/{relpath}.gz", Scope.NOWHERE),
        ("o/x-{relpath}/{name}.json", Scope.NOWHERE),
        ("o/{hash:2}/{relpath}", Scope.NOWHERE),
        ("o/{hash:2}/{hash}{suffix}", Scope.NOWHERE),
        ("{hash:32}", Scope.NOWHERE),
        ("o/{index:06}{suffix}", Scope.NOWHERE),
        ("o/{index}", Scope.NOWHERE),
        ("o/{stem}-{index}.png", Scope.NOWHERE),
        ("o/{parent}/{stem}-{index:04}{suffix}", Scope.NOWHERE),
        ("o/{index}-{relpath}", Scope.NOWHERE),
        ("o/{relpath}/{index}.x", Scope.NOWHERE),
        ("o/{relpath}{suffix}", Scope.SOURCE),
        ("o/{parent}/{stem}.gz", Scope.DIRECTORY),
        ("o/{parent}/{hash:2}-{stem}.gz", Scope.DIRECTORY),
        ("{parent}/{name}", Scope.DIRECTORY),
        ("o/{parent}/x/{name}", Scope.SOURCE),
        ("o/{parent}-{name}", Scope.SOURCE),
        ("o/{parent}/{relpath}", Scope.SOURCE),
        ("o/{stem}/{parent}/{name}", Scope.SOURCE),
        ("o/{name}", Scope.SOURCE),
        ("o/{hash:31}", Scope.SOURCE),
        ("o/{index}{name}", Scope.SOURCE),
        ("o/{name}{index}", Scope.SOURCE),
        ("o/{stem}{index}{suffix}", Scope.SOURCE),
        ("o/{stem}1{index}{suffix}", Scope.SOURCE),
        ("o/a{hash}b{name}", Scope.SOURCE),
        ("o/{parent}-{index}{suffix}", Scope.SOURCE),
        ("o/{parent}/{index}/{parent}/x", Scope.SOURCE),
        ("o/x", Scope.SOURCE),
        ("o/\x05", Scope.SOURCE),
    ],
)
def test_outputs_are_remembered_only_as_far_as_they_may_come_again(pattern: str, scope: Scope) -> None:
    assert OutputPattern(pattern).scope is scope


@pytest.mark.parametrize(
    ("words", "one_source", "in_walk_order", "scopes"),
    [
        (["o/{relpath}"], True, False, [Scope.NOWHERE]),
        (["o/{relpath}"], False, True, [Scope.SOURCE]),
        (["o/{index}"], False, False, [Scope.NOWHERE]),
        (["o/{parent}/{stem}"], True, True, [Scope.DIRECTORY]),
        (["o/{parent}/{stem}"], True, False, [Scope.SOURCE]),
        (["o/{parent}/{stem}"], False, True, [Scope.SOURCE]),
        (["a=t/{relpath}", "b=m/{relpath}"], True, True, [Scope.NOWHERE] * 2),
        (["a=t/{relpath}.x", "b=t/{relpath}.y"], True, True, [Scope.NOWHERE] * 2),
        (["a=t/x-{relpath}", "b=t/y-{relpath}"], True, True, [Scope.NOWHERE] * 2),
        (["a=t/{relpath}", "b=t/{relpath}.y"], True, True, [Scope.SOURCE] * 2),
        (["a=t/{relpath}", "b=t/m/{relpath}"], True, True, [Scope.SOURCE] * 2),
        (["a=t/{name}/{relpath}", "b=t/{index}", "c=u/{index}"], True, True, [Scope.SOURCE] * 2 + [Scope.NOWHERE]),
    ],
)
def test_outputs_of_several_patterns_are_remembered_where_they_may_meet(
    words: list[str], one_source: bool, in_walk_order: bool, scopes: list[Scope]
) -> None:
    assert NamedOutputs(words).scopes(one_source=one_source, in_walk_order=in_walk_order) == tuple(scopes)


@pytest.mark.parametrize(
    ("words", "files", "collision"),
    [
        (["a=o/{relpath}.x", "b=o/{name}.x"], ["q/a", "a"], ("o/a.x", "in/q/a", "in/a")),
        (["a=o/{relpath}", "b=./{relpath}"], ["o/a", "a"], ("o/a", "in/o/a", "in/a")),
        (["a=o/{relpath}", "b=o/{relpath}.x"], ["a.x", "a"], ("o/a.x", "in/a.x", "in/a")),
        (["a=o/{stem}", "b=o/{name}"], ["a"], ("o/a", "in/a", "in/a")),
    ],
)
def test_an_output_of_one_name_that_is_one_of_another_is_a_collision(
    words: list[str], files: list[str], collision: tuple[str, str, str]
) -> None:
    with pytest.raises(OutputCollisionError) as caught:
        outputs_of(words, files)
    assert caught.value.args == collision


def test_an_input_that_is_listed_twice_is_named_as_both() -> None:
    with pytest.raises(OutputCollisionError) as caught:
        outputs_of("o/{relpath}", ["a", "b", "a"], one_source=False)
    assert caught.value.args == ("o/a", "in/a", "in/a")


LISTINGS = st.lists(NAMES, max_size=12, unique=True).map(
    lambda names: sorted(
        (name for name in names if not {"", ".", ".."} & set(name.split("/"))),
        key=lambda name: (name.rpartition("/")[0], name),
    )
)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LISTINGS, st.lists(PATTERNS, min_size=1, max_size=2, unique=True), st.sampled_from([0, 9, 11]))
def test_no_collision_is_missed_by_remembering_less(listing: list[str], patterns: list[str], n_before: int) -> None:
    words = patterns if len(patterns) == 1 else [f"n{n}={pattern}" for n, pattern in enumerate(patterns)]
    files = list(dict.fromkeys([*(f"{number}" for number in range(n_before)), *listing]))  # numbers of several digits
    try:
        named = NamedOutputs(words)
        listed = [InputFile("in/" + file, file) for file in files]
        everything = [output for n, file in enumerate(listed) for output in named.paths_for(file, n)]
    except OutputPatternError:
        return
    if len(set(map(os.path.normpath, everything))) == len(everything):
        assert [output for each in outputs_of(words, files) for output in each] == everything
    else:
        with pytest.raises(OutputCollisionError):
            outputs_of(words, files)


# ---- what is remembered ----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=2) | st.binary(max_size=2).map(os.fsdecode), max_size=40), st.integers(1, 9))
def test_collisions_are_exact_wherever_they_are_kept(outputs: list[str], kept_max: int) -> None:
    collisions = Collisions(kept_max)
    first_with: dict[str, str] = {}
    try:
        for number, output in enumerate(outputs):
            path = f"{number}{output}"
            assert collisions.add(output, path) == first_with.get(output)
            first_with.setdefault(output, path)
            assert collisions.n_kept < kept_max
    finally:
        collisions.close()


def test_collisions_are_forgotten_on_disk_too() -> None:
    collisions = Collisions(2)
    for output in "abc":
        assert collisions.add(output, f"in/{output}") is None
    assert collisions.add("a", "again") == "in/a"
    collisions.clear()
    assert collisions.n_kept == 0
    assert [collisions.add(output, "in/d") for output in "abc"] == [None] * 3
    collisions.close()


def test_no_more_than_kept_max_outputs_are_in_memory_however_many_there_are() -> None:
    collisions = Collisions(1000)
    tracemalloc.start()
    try:
        peaks: list[int] = []
        for n in range(20_000):
            assert collisions.add(f"o/{n:0200}", f"in/{n:0200}") is None
            assert collisions.n_kept < 1000
            if n in (3_000, 19_999):
                peaks.append(tracemalloc.get_traced_memory()[1])
        assert peaks[1] < 1.2 * peaks[0]
        for n in (0, 999, 1000, 12_345, 19_999):
            assert collisions.add(f"o/{n:0200}", "in/again") == f"in/{n:0200}"
    finally:
        tracemalloc.stop()
        collisions.close()


@pytest.mark.usefixtures("no_garbage")
def test_a_collision_with_an_output_on_disk_is_found_and_nothing_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SCRATCH_CACHE_KIB", 256)
    before = set(os.listdir("/proc/self/fd"))
    files = (InputFile(f"in/{n}", f"{n % (KEPT_MAX + 9)}") for n in range(KEPT_MAX + 10))
    drawn = with_outputs(files, NamedOutputs(["o/{name}"]), one_source=True)
    for _ in range(KEPT_MAX + 9):
        next(drawn)
    assert len(os.listdir("/proc/self/fd")) > len(before)  # it is on disk
    with pytest.raises(OutputCollisionError) as caught:
        next(drawn)
    assert caught.value.args == ("o/0", "in/0", f"in/{KEPT_MAX + 9}")
    assert len(os.listdir("/proc/self/fd")) == len(before)

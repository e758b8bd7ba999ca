"""Task functions: found again by name or refused at once, called as annotated, and never with a bad parameter."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import math
import os
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Optional

import msgspec
import pytest
from hypothesis import given, strategies as st

from ringpool.errors import ParameterError, UnknownFunctionError
from ringpool.workers import tasks
from ringpool.workers.tasks import FilePayload, FunctionSpec, Signature

# ---- functions to be named and called --------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


class Own:
    """A class that msgspec knows nothing of."""


@dataclasses.dataclass
class Size:
    width: int


def count(src: Path) -> int:
    return len(src.name)


def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    return call


@decorate
def decorated(src: str, *, level: int = 1) -> None: ...


def hidden(src: Path) -> None: ...


shadowed = hidden


def hidden(src: Path) -> None: ...


class Thumbnails:
    @staticmethod
    def make(src: Path) -> None: ...

    @classmethod
    def of_class(cls, src: Path) -> None: ...

    def of_instance(self, src: Path) -> None: ...

    def __call__(self, src: Path) -> None: ...


class Unhashable(Thumbnails):
    # As a class with ``__eq__`` has it.
    __hash__ = None  # pyright: ignore[reportAssignmentType]


callable_instance = Thumbnails()
unhashable = Unhashable()
not_callable = 5


def many(
    src: Path,
    dst: Path,
    *,
    number: int = 1,
    ratio: float = 0.5,
    flag: bool = False,
    text: str = "",
    place: Path = Path(),
    pure: PurePosixPath | None = None,
    numbers: list[int] = [],  # noqa: B006
    pair: tuple[int, int] = (1, 2),
    perhaps: int | None = None,
    mode: Literal["fast", "slow"] = "fast",
    level: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1,
    size: Size | None = None,
    colour: Colour = Colour.RED,
    day: datetime.date | None = None,
    sizes: dict[str, int] = {},  # noqa: B006
    own: Own | None = None,
    key: Callable[[int], int] | None = None,
    anything: Any = None,
    bare=None,
) -> None: ...


def strange(src: Path, *, either: list[int] | tuple[int, ...] = (), n: int = 1) -> None: ...


def unresolved(src: Path, *, n: Missing = 1) -> None: ...  # noqa: F821


def mandatory(src: Path, dst: Path, size: int, *, quality: int, level: int = 1) -> None: ...


def positional(src: Path, /, size: int = 1) -> None: ...


def two_positional(src: Path, other: int, /) -> None: ...


def optional_positional(src: Path, other: int = 1, /) -> None: ...


def any_keywords(src: Path, *, size: int = 1, **others: Any) -> None: ...


def any_arguments(*sources: Path) -> None: ...


def nothing() -> None: ...


def keywords_only(*, src: Path) -> None: ...


def everything_by_keyword(**all_of_it: Any) -> None: ...


def text_paths(src: str, dst: str) -> None: ...


def keyword_dst(src: Path, *, dst: Path) -> None: ...


def text_or_byte_paths(src: str | bytes, dst: Optional[str]) -> None: ...  # noqa: UP045


def any_paths(src: str | os.PathLike[str], dst: str | Path | None = None) -> None: ...


def byte_paths(src: bytes, dst: bytes) -> None: ...


def bare_paths(src, dst) -> None: ...


def optional_output(src: Path, dst: Path | None = None) -> None: ...


HERE = __name__


def signature(function: Callable[..., Any]) -> Signature:
    return tasks.signature_of(function, "it")


def validated(function: Callable[..., Any], **parameters: Any) -> dict[str, Any]:
    return tasks.validate("it", signature(function), parameters)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function", [count, decorated, Thumbnails.make, Thumbnails.of_instance, Size, len, Path, os.stat]
)
def test_a_function_is_found_again_by_its_name(function: Callable[..., Any]) -> None:
    name = tasks.name_of(function)
    assert name == f"{function.__module__}:{function.__qualname__}"
    assert tasks.resolve(name) is function


def test_a_name_is_taken_as_it_is() -> None:
    assert tasks.name_of("no_such_module:function") == "no_such_module:function"


def _local(src: Path) -> Callable[[Path], None]:
    def inner(src: Path) -> None: ...

    return inner


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda src: None, "a lambda or local function cannot be found by name; define it at a module's top level"),
        (_local(Path()), "a lambda or local function cannot be found by name"),
        (shadowed, "that name leads to something else"),
        (decorate(count), "that name leads to something else"),
        (callable_instance.of_instance, "that name leads to something else"),
        (functools.partial(count), "it has no module and qualified name; pass a function"),
        (callable_instance, "it has no module and qualified name; pass a function"),
        (str.upper, "it has no module and qualified name; pass a function"),
    ],
    ids=["lambda", "local", "shadowed", "wrapper", "bound method", "partial", "callable object", "method of a builtin"],
)
def test_a_function_without_a_name_that_leads_to_it_is_refused(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(UnknownFunctionError) as caught:
        tasks.name_of(function)
    assert reason in caught.value.reason
    assert caught.value.function in str(caught.value)


def test_an_object_without_a_hash_is_refused_as_any_other() -> None:
    with pytest.raises(UnknownFunctionError, match="it has no module and qualified name"):
        tasks.describe(unhashable)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "write it as module:function"),
        ("count", "write it as module:function"),
        (":count", "write it as module:function"),
        ("math:", "write it as module:function"),
        ("a/mine.py:count", "write mine:count, the module and not its file"),
        ("mine.py:count", "write mine:count, the module and not its file"),
        ("no_such_module:f", "module no_such_module cannot be imported: ModuleNotFoundError: No module named"),
        (".relative:f", "module .relative cannot be imported: TypeError"),
        ("math:nothing", "math has no nothing"),
        ("math:sin.more", "math has no sin.more"),
        ("math:pi", "pi is no function, it is of type float"),
        (f"{HERE}:not_callable", "not_callable is no function, it is of type int"),
    ],
)
def test_a_name_that_leads_nowhere_says_which_part_was_not_found(name: str, reason: str) -> None:
    with pytest.raises(UnknownFunctionError) as caught:
        tasks.resolve(name)
    assert caught.value.reason.startswith(reason)
    assert str(caught.value).startswith(f"task function {name}: ")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module that can be imported; gives its name."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"tasks_{os.getpid()}_{abs(hash(tmp_path))}"

    def write(source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    yield write
    sys.modules.pop(name, None)


def test_a_module_is_imported_when_its_function_is_wanted(module: Callable[[str], str]) -> None:
    name = module("class A:\n    @staticmethod\n    def f(src): return 7\n")
    assert tasks.resolve(f"{name}:A.f")(Path()) == 7


def test_an_error_in_the_imported_module_is_told(module: Callable[[str], str]) -> None:
    name = module("1 / 0\n")
    with pytest.raises(UnknownFunctionError, match="cannot be imported: ZeroDivisionError: division by zero") as caught:
        tasks.resolve(f"{name}:f")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("file", [None, "<stdin>"])
def test_a_function_of_an_interactive_main_is_refused(file: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    main.__file__ = file
    monkeypatch.setitem(sys.modules, "__main__", main)
    tasks.require_importable_main("math:sin")
    with pytest.raises(UnknownFunctionError, match="workers cannot import an interactive __main__"):
        tasks.require_importable_main("__main__:f")


@pytest.mark.parametrize("attribute", ["__file__", "__spec__"])
def test_a_function_of_a_main_that_was_started_from_a_file_is_fine(
    attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = types.ModuleType("__main__")
    setattr(main, attribute, "main.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    tasks.require_importable_main("__main__:f")


def test_what_is_known_of_a_function_is_the_same_however_it_is_named() -> None:
    name, known = tasks.describe(many)
    assert tasks.describe(f"{HERE}:many")[0] == name
    assert known.fields == tasks.describe(name)[1].fields
    assert tasks.describe(many)[1] is known


# ---- how it is called ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "source", "target"),
    [
        (many, Path("a/\udcff"), Path("b")),
        (text_paths, "a/\udcff", "b"),
        (byte_paths, b"a/\xff", b"b"),
        (bare_paths, Path("a/\udcff"), Path("b")),
        (text_or_byte_paths, "a/\udcff", "b"),
        (any_paths, Path("a/\udcff"), Path("b")),
    ],
)
def test_paths_are_of_the_type_that_the_annotation_says(
    function: Callable[..., Any], source: object, target: object
) -> None:
    known = signature(function)
    found = known.source_type(b"a/\xff"), known.target_type(b"b")
    assert found == (source, target)
    assert tuple(map(type, found)) == (type(source), type(target))


@pytest.mark.parametrize(
    ("function", "takes", "needs"),
    [(count, False, False), (many, True, True), (optional_output, True, False), (decorated, False, False)],
)
def test_a_function_with_a_dst_is_one_with_outputs(function: Callable[..., Any], takes: bool, needs: bool) -> None:
    known = signature(function)
    assert (known.takes_output, known.needs_output) == (takes, needs)
    assert "dst" not in known.fields


def test_a_decorated_function_is_called_as_what_it_wraps() -> None:
    known = signature(decorated)
    assert known.source_type(b"x") == "x"
    assert validated(decorated, level="3") == {"level": 3}


@pytest.mark.parametrize("function", [nothing, keywords_only, everything_by_keyword])
def test_a_function_that_takes_no_path_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(ParameterError, match="it takes no positional argument; the first one is the path of the input"):
        signature(function)


async def asynchronous(src: Path) -> None: ...


def generator(src: Path) -> Iterator[int]:
    yield 1


async def asynchronous_generator(src: Path) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (asynchronous, "it is an async function"),
        (generator, "it is a generator function"),
        (asynchronous_generator, "it is a generator function"),
    ],
)
def test_a_function_that_does_nothing_when_it_is_called_is_refused(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(ParameterError, match=reason):
        tasks.describe(function)


def test_a_second_positional_only_parameter_is_refused_unless_it_may_be_left_out() -> None:
    assert signature(positional).fields == {"size"}
    assert signature(optional_positional).fields == set()
    with pytest.raises(ParameterError, match="other is positional only"):
        signature(two_positional)


def test_an_output_by_keyword_is_refused() -> None:
    with pytest.raises(ParameterError, match="its dst is keyword only"):
        signature(keyword_dst)


@pytest.mark.parametrize("function", [any_arguments, len, os.path.getsize])
def test_a_function_of_a_path_and_nothing_else_takes_no_parameters(function: Callable[..., Any]) -> None:
    with pytest.raises(ParameterError, match="it has no parameter 'x'; it has: none"):
        validated(function, x=1)


def test_a_builtin_without_a_signature_takes_what_it_is_given() -> None:
    known = signature(max)
    assert known.takes_any
    assert known.takes_output
    assert not known.needs_output
    assert validated(max, key=len) == {"key": len}
    tasks.require("it", known, {})


# ---- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given_", "taken"),
    [
        ("number", 3, 3),
        ("number", "3", 3),
        ("number", "-3", -3),
        ("number", 3.0, 3),
        ("number", 10**30, 10**30),
        ("ratio", 1, 1.0),
        ("ratio", "1.5", 1.5),
        ("flag", True, True),
        ("flag", "true", True),
        ("flag", "0", False),
        ("text", "7", "7"),
        ("place", Path("a"), Path("a")),
        ("place", "a/b", Path("a/b")),
        ("pure", "a/b", PurePosixPath("a/b")),
        ("numbers", ("1", 2), [1, 2]),
        ("pair", ["3", 4], (3, 4)),
        ("perhaps", None, None),
        ("perhaps", "null", None),
        ("perhaps", "5", 5),
        ("mode", "slow", "slow"),
        ("level", "9", 9),
        ("size", Size(3), Size(3)),
        ("size", {"width": "3"}, Size(3)),
        ("colour", "red", Colour.RED),
        ("colour", Colour.RED, Colour.RED),
        ("day", "2024-02-29", datetime.date(2024, 2, 29)),
        ("sizes", {"a": "1"}, {"a": 1}),
        ("key", len, len),
        ("anything", (1, "x"), (1, "x")),
        ("bare", "1", "1"),
    ],
)
def test_a_parameter_becomes_what_its_annotation_says(name: str, given_: object, taken: object) -> None:
    found = validated(many, **{name: given_})
    assert found == {name: taken}
    assert type(found[name]) is type(taken)


def test_an_object_of_a_class_of_ones_own_is_handed_on_itself() -> None:
    own = Own()
    assert validated(many, own=own)["own"] is own


@pytest.mark.parametrize(
    ("name", "given_", "reason"),
    [
        ("number", "three", "parameter 'number': expected `int`, got `str`"),
        ("number", 3.5, "parameter 'number': expected `int`, got `float`"),
        ("number", True, "parameter 'number': expected `int`, got `bool`"),
        ("number", None, "parameter 'number': expected `int`, got `null`"),
        ("ratio", "half", "parameter 'ratio': expected `float`, got `str`"),
        ("flag", "yes", "parameter 'flag': expected `bool`, got `str`"),
        ("text", 7, "parameter 'text': expected `str`, got `int`"),
        ("place", 7, "parameter 'place': expected `Path`, got `int`"),
        ("numbers", ["1", "x"], "parameter 'numbers[1]': expected `int`, got `str`"),
        ("pair", [1], "parameter 'pair': expected `array` of length 2, got 1"),
        ("mode", "warp", "parameter 'mode': invalid enum value 'warp'"),
        ("level", 0, "parameter 'level': expected `int` >= 1"),
        ("colour", "mauve", "parameter 'colour': invalid enum value 'mauve'"),
        ("own", 5, "parameter 'own': "),
        ("sizes", {"a": "x"}, "parameter 'sizes[...]': expected `int`, got `str`"),
        (
            "nmber",
            3,
            "it has no parameter 'nmber'; it has: anything, bare, colour, day, flag, key, level, mode, number",
        ),
        ("src", "x", "it has no parameter 'src'; it has: "),
        ("dst", "x", "it has no parameter 'dst'; it has: "),
    ],
)
def test_a_wrong_parameter_is_named_with_what_was_expected(name: str, given_: object, reason: str) -> None:
    with pytest.raises(ParameterError) as caught:
        validated(many, **{name: given_})
    assert caught.value.reason.startswith(reason)
    assert str(caught.value).startswith("task function it: ")


def test_defaults_are_left_to_the_function() -> None:
    assert validated(many) == {}
    assert validated(many, number=2) == {"number": 2}


def test_a_missing_parameter_is_named() -> None:
    known = signature(mandatory)
    assert known.required == {"size", "quality"}
    tasks.require("it", known, {"size": 1, "quality": 2})
    for given_, missing in (({}, "quality"), ({"quality": 1}, "size"), ({"size": 1}, "quality")):
        with pytest.raises(ParameterError, match=f"parameter '{missing}' is missing"):
            tasks.require("it", known, given_)


def test_a_function_of_any_keywords_takes_any() -> None:
    assert validated(any_keywords, other="x", size=2) == {"other": "x", "size": 2}


def test_where_msgspec_has_no_notion_of_an_annotation_only_names_are_checked() -> None:
    assert validated(strange, either=[1], n="not checked") == {"either": [1], "n": "not checked"}
    with pytest.raises(ParameterError, match="it has no parameter 'm'; it has: either, n"):
        validated(strange, m=1)


def test_where_an_annotation_leads_nowhere_only_names_are_checked() -> None:
    assert validated(unresolved, n="x") == {"n": "x"}
    with pytest.raises(ParameterError, match="it has no parameter 'm'; it has: n"):
        validated(unresolved, m=1)


def test_what_was_given_is_not_changed() -> None:
    given_ = {"numbers": ["1"], "number": "2"}
    tasks.validate("it", signature(many), given_)
    assert given_ == {"numbers": ["1"], "number": "2"}


# ---- what travels ----------------------------------------------------------------------------------------------------


def test_parameters_arrive_as_they_were() -> None:
    parameters = {"pair": (1, 2), "place": Path("a"), "size": Size(1), "nothing": None}
    assert tasks.unpack_parameters(tasks.pack_parameters("it", parameters)) == parameters
    assert tasks.pack_parameters("it", {}) == b""
    assert tasks.unpack_parameters(b"") == tasks.unpack_parameters(None) == {}


def test_a_parameter_that_cannot_be_pickled_is_said_so() -> None:
    with pytest.raises(ParameterError, match="a parameter cannot be pickled: "):
        tasks.pack_parameters("it", {"key": lambda: None})


@given(st.binary(), st.none() | st.binary(), st.none() | st.binary())
def test_a_payload_arrives_as_it_was(source: bytes, target: bytes | None, parameters: bytes | None) -> None:
    payload = FilePayload(source, target, parameters)
    assert tasks.decode_payload(tasks.encode_payload(payload)) == payload
    assert tasks.decode_payload(memoryview(tasks.encode_payload(payload))) == payload


def test_a_path_that_is_not_utf_8_arrives_as_it_was() -> None:
    path = os.fsdecode(b"caf\xe9/\xff")
    payload = tasks.decode_payload(tasks.encode_payload(FilePayload(os.fsencode(path))))
    assert signature(count).source_type(payload.source) == Path(path)


def test_a_function_blob_arrives_as_it_was() -> None:
    spec = FunctionSpec("module:f", b"parameters", "full")
    assert tasks.decode_spec(tasks.encode_spec(spec)) == spec
    assert tasks.decode_spec(memoryview(tasks.encode_spec(spec))) == spec


def test_numbers_that_are_none_are_numbers() -> None:
    assert math.isnan(validated(many, ratio="nan")["ratio"])
    assert validated(many, ratio="inf") == {"ratio": math.inf}

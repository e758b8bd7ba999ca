"""Task functions: naming, resolving, validating parameters; and what a file task's payload says.

    function blob   FunctionSpec: module:qualname, and what all its tasks share (parameters, durability)
    payload         (source, target or nil, own parameters or nil): msgpack; paths as bytes, through os.fsencode

A task function is ``fn(src, **parameters)``, or ``fn(src, dst, **parameters)`` where the task has an output: having a
parameter called ``dst`` is what makes a function one with outputs. ``src`` and ``dst`` are ``Path``s, or ``str`` or
``bytes`` where the annotation says so. All that can be wrong with a function or its parameters is found before
anything is queued.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pickle
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import msgspec

from ringpool.errors import ParameterError, UnknownFunctionError
from ringpool.workers.retry import RetryPolicy, retrying

TaskFunction = Callable[..., Any]
_EMPTY = inspect.Parameter.empty
SHOWN_CHARACTERS_MAX = 80  # of a parameter that is text, where a number is wanted, say


class FunctionSpec(msgspec.Struct, frozen=True, array_like=True):
    """What a worker needs to run tasks of one function: its name, pickled shared parameters, level of durability, a
    pickled ``RetryPolicy`` where failed calls are to be tried again, and whether outputs of short tasks wait for those
    of others, to be put in place together.
    """

    name: str
    parameters: bytes
    durability: str
    retry: bytes = b""
    group_commit: bool = False


class FilePayload(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One file task: where it reads, where its output goes, and pickled parameters of its own."""

    source: bytes
    target: bytes | None = None
    parameters: bytes | None = None


encode_payload: Callable[[FilePayload], bytes] = msgspec.msgpack.Encoder().encode
decode_payload: Callable[[bytes | memoryview], FilePayload] = msgspec.msgpack.Decoder(FilePayload).decode
encode_spec: Callable[[FunctionSpec], bytes] = msgspec.msgpack.Encoder().encode
decode_spec: Callable[[bytes | memoryview], FunctionSpec] = msgspec.msgpack.Decoder(FunctionSpec).decode


class Signature(NamedTuple):
    """How a task function wants to be called.

    ``source_type`` and ``target_type`` make ``src`` and ``dst`` of bytes; ``takes_output``: it has a ``dst``;
    ``needs_output``: one without a default; ``model``: the struct that its keyword parameters must fit; ``fields``:
    their names; ``required``: of them those without a default; ``takes_any``: others too. A builtin that tells nothing
    about itself takes anything.
    """

    source_type: Callable[[bytes], Any]
    target_type: Callable[[bytes], Any]
    takes_output: bool
    needs_output: bool
    model: type[msgspec.Struct]
    fields: frozenset[str]
    required: frozenset[str]
    takes_any: bool


# ---- names -----------------------------------------------------------------------------------------------------------


def describe(function: TaskFunction | str) -> tuple[str, Signature]:
    """``name_of`` and ``signature_of`` a task function, remembered: both look into its module and its annotations."""
    try:
        return _described(function)
    except TypeError:  # it has no hash to be remembered by
        name = name_of(function)
        return name, signature_of(resolve(name), name)


@functools.lru_cache(maxsize=256)
def _described(function: TaskFunction | str) -> tuple[str, Signature]:
    name = name_of(function)
    return name, signature_of(resolve(name), name)


def name_of(function: TaskFunction | str) -> str:
    """``module:qualname`` of a task function. Raises ``UnknownFunctionError`` where that would not find it again."""
    if isinstance(function, str):
        return function
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module is None or qualname is None:
        raise UnknownFunctionError(repr(function), "it has no module and qualified name; pass a function")
    name = f"{module}:{qualname}"
    if "<" in qualname:
        raise UnknownFunctionError(
            name, "a lambda or local function cannot be found by name; define it at a module's top level"
        )
    if resolve(name) is not function:
        raise UnknownFunctionError(
            name, "that name leads to something else; define the function at its module's top level"
        )
    return name


def resolve(name: str) -> TaskFunction:
    """The function that ``module:qualname`` names. Raises ``UnknownFunctionError``, saying which part was not found."""
    module_name, colon, qualname = name.partition(":")
    if not colon or not module_name or not qualname:
        raise UnknownFunctionError(name, "write it as module:function")
    if "/" in module_name or module_name.endswith(".py"):
        module = os.path.basename(module_name).removesuffix(".py")
        raise UnknownFunctionError(name, f"write {module}:{qualname}, the module and not its file")
    try:
        found: Any = sys.modules.get(module_name) or importlib.import_module(module_name)
    except Exception as error:
        reason = f"module {module_name} cannot be imported: {type(error).__name__}: {error}"
        raise UnknownFunctionError(name, reason) from error
    for part in qualname.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise UnknownFunctionError(name, f"{module_name} has no {qualname}") from None
    if not callable(found):
        raise UnknownFunctionError(name, f"{qualname} is no function, it is of type {type(found).__name__}")
    return found


def require_importable_main(name: str) -> None:
    """Raise ``UnknownFunctionError`` for a function of a ``__main__`` that a new process cannot import."""
    main = sys.modules["__main__"]
    is_no_file = str(getattr(main, "__file__", None) or "<>").startswith("<")  # such as <stdin>
    if name.startswith("__main__:") and getattr(main, "__spec__", None) is None and is_no_file:
        raise UnknownFunctionError(
            name, "workers cannot import an interactive __main__; put it into a module, or use mp_context='fork'"
        )


# ---- signatures and parameters ---------------------------------------------------------------------------------------


def signature_of(function: TaskFunction, name: str) -> Signature:
    """How ``function`` wants to be called. Raises ``ParameterError`` where it cannot be a task function."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # a builtin without a signature: nothing to check against
        return Signature(_as_path, _as_path, True, False, _struct({}), frozenset(), frozenset(), True)
    if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise ParameterError(name, "it takes no positional argument; the first one is the path of the input")
    if inspect.iscoroutinefunction(function):
        raise ParameterError(
            name, "it is an async function, and a task function is just called: have it call asyncio.run"
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ParameterError(
            name, "it is a generator function, and a task function is just called: have it return a list"
        )
    hints = _hints(function)
    dst = next((p for p in parameters[1:] if p.name == "dst"), None)
    if dst is not None and dst.kind is inspect.Parameter.KEYWORD_ONLY:
        raise ParameterError(
            name, "its dst is keyword only; the output's path is passed by position, after the input's"
        )
    rest = [p for p in parameters[1:] if p is not dst]
    keywords = _keywords(name, rest)
    return Signature(
        _path_type(hints.get(parameters[0].name)),
        _path_type(hints.get("dst")),
        dst is not None,
        dst is not None and dst.default is _EMPTY,
        _model(keywords, hints),
        frozenset(p.name for p in keywords),
        frozenset(p.name for p in keywords if p.default is _EMPTY),
        any(p.kind is inspect.Parameter.VAR_KEYWORD for p in rest),
    )


def _hints(function: TaskFunction) -> dict[str, Any]:
    """The annotations, resolved; those that lead nowhere (names for type checkers only) are left out."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:
        hints: dict[str, Any] = {}
    for name, hint in getattr(function, "__annotations__", {}).items():
        try:
            hints[name] = eval(hint, getattr(function, "__globals__", {})) if isinstance(hint, str) else hint
        except Exception:
            continue
    return hints


def _path_type(hint: object) -> Callable[[bytes], Any]:
    """What makes a path of bytes into what the annotation asks for; of a union, a ``Path`` where that will do."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    wanted = {
        typing.get_args(kind)[-1] if typing.get_origin(kind) is dict else kind  # of several outputs, by name
        for kind in (typing.get_args(hint) if union else (hint,))
    } - {type(None)}
    if wanted == {bytes}:
        return bytes
    return os.fsdecode if str in wanted and wanted <= {str, bytes} else _as_path


def _as_path(path: bytes) -> Path:
    return Path(os.fsdecode(path))


def _keywords(name: str, parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and parameter.default is _EMPTY:
            raise ParameterError(
                name, f"{parameter.name} is positional only; only the input's path is passed by position"
            )
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [parameter for parameter in parameters if parameter.kind in by_keyword]


def _model(keywords: list[inspect.Parameter], hints: dict[str, Any]) -> type[msgspec.Struct]:
    """A struct with a field for each keyword parameter. All may be left out: defaults are the function's own affair."""
    try:
        model = _struct({parameter.name: hints.get(parameter.name, Any) for parameter in keywords})
        msgspec.convert({}, model)
    except TypeError:  # an annotation that msgspec has no notion of: then only the names are checked
        return _struct({parameter.name: Any for parameter in keywords})
    return model


def _struct(hints: dict[str, Any]) -> type[msgspec.Struct]:
    fields = [(name, hint if hint is Any else hint | msgspec.UnsetType, msgspec.UNSET) for name, hint in hints.items()]
    return msgspec.defstruct("Parameters", fields, kw_only=True)


def validate(name: str, signature: Signature, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """``parameters``, converted to what the function's annotations say; text is read as numbers where those are wanted.

    Raises ``ParameterError`` for one that is unknown or of the wrong type; for one that is missing, see ``require``.
    """
    if not parameters:
        return {}
    unknown = parameters.keys() - signature.fields
    if unknown and (not signature.takes_any or "dst" in unknown):
        known = ", ".join(sorted(signature.fields)) or "none"
        raise ParameterError(name, f"it has no parameter {min(unknown)!r}; it has: {known}")
    named = {key: value for key, value in parameters.items() if key in signature.fields}
    try:
        model = msgspec.convert(named, signature.model, strict=False, dec_hook=_convert_path)
    except msgspec.ValidationError as error:
        raise ParameterError(name, _reason(error, parameters)) from None
    except UnicodeEncodeError as error:  # bytes that are not UTF-8, where a number is wanted
        raise ParameterError(name, f"{error.object!r} is not what its parameter wants, nor UTF-8") from None
    return {**parameters, **{key: getattr(model, key) for key in named}}


def _convert_path(wanted: Any, value: Any) -> Any:
    """A path given as text, on the command line say, for a parameter that is a ``Path``."""
    if not isinstance(wanted, type):
        return value  # an annotation that nobody can check, such as Callable[[int], int]
    if issubclass(wanted, PurePath) and isinstance(value, str):
        return wanted(value)
    if isinstance(value, wanted):
        return value
    raise TypeError(f"expected `{wanted.__qualname__}`, got `{type(value).__qualname__}`")


def _reason(error: msgspec.ValidationError, parameters: Mapping[str, Any]) -> str:
    message, _, where = str(error).partition(" - at `$.")
    if not where:
        return message
    where = where.rstrip("`")
    value = parameters.get(where)
    is_shown = isinstance(value, str) and message.endswith("got `str`") and len(value) <= SHOWN_CHARACTERS_MAX
    return f"parameter {where!r}: {message[0].lower()}{message[1:]}{f' {value!r}' if is_shown else ''}"


def require(name: str, signature: Signature, parameters: Mapping[str, Any]) -> None:
    """Raise ``ParameterError`` where a parameter without a default is not among ``parameters``."""
    missing = signature.required - parameters.keys()
    if missing:
        raise ParameterError(name, f"parameter {min(missing)!r} is missing")


def pack_parameters(name: str, parameters: Mapping[str, Any]) -> bytes:
    """Validated parameters as bytes; empty for none. Raises ``ParameterError`` where one cannot travel."""
    if not parameters:
        return b""
    try:
        return pickle.dumps(dict(parameters), 5)
    except Exception as error:
        raise ParameterError(name, f"a parameter cannot be pickled: {type(error).__name__}: {error}") from error


def pack_policy(name: str, policy: RetryPolicy | None) -> bytes:
    """A policy as bytes; empty for none. Raises ``ParameterError`` where it cannot travel, ``TypeError``."""
    if policy is None:
        return b""
    if not isinstance(policy, RetryPolicy):  # pyright: ignore[reportUnnecessaryIsInstance]  (a caller may not check types)
        raise TypeError(f"retry must be a RetryPolicy or None, not {policy!r}")
    try:
        return pickle.dumps(policy, 5)
    except Exception as error:
        raise ParameterError(name, f"its retry policy cannot be pickled: {type(error).__name__}: {error}") from error


def with_retries(call: TaskFunction, packed: bytes) -> TaskFunction:
    """``call``, tried again as a packed policy says; itself for none."""
    return retrying(pickle.loads(packed))(call) if packed else call


def unpack_parameters(packed: bytes | None) -> dict[str, Any]:
    """What ``pack_parameters`` packed."""
    return pickle.loads(packed) if packed else {}

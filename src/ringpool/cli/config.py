"""Settings of a directory: the options of ``ringpool run`` that always hold there.

    ./ringpool.toml                          ./pyproject.toml, where there is no ringpool.toml
    workers = 8                              [tool.ringpool]
    out = "thumbs/{relpath}.webp"            out = { thumb = "t/{relpath}.webp", meta = "m/{relpath}.json" }
    exclude = ["*.tmp", ".git/"]             param = { level = 9 }
    memory-limit = "512M"                    keep-going = false

A key is the name of an option without its dashes. A file's values are read as the option's are; those that may be given
several times are a list, or one; pairs are a table. The command line goes before the file; parameters are added up.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import click
import msgspec

FILE, SECTION_FILE = "ringpool.toml", "pyproject.toml"
PAIRS = ("param", "out")
NO_SETTINGS = ("command",)  # with it, there is no function among the words of a command line


def settings(directory: Path, command: click.Command) -> dict[str, Any]:
    """What the file in ``directory`` says about the options of ``command``, by the fields of ``Call``.

    Raises ``click.UsageError``, which names the file and what is wrong in it.
    """
    path, table = _read(directory)
    options = {_key(option): option for option in command.params if isinstance(option, click.Option)}
    apart = [key for key, option in options.items() if option.name in NO_SETTINGS]
    for key in apart:
        del options[key]
    found: dict[str, Any] = {}
    for key, value in table.items():
        option = options.get(key)
        if key in apart:
            raise click.UsageError(f"{path}: {key} is no setting: what a job runs stands on its command line")
        if option is None:
            raise click.UsageError(f"{path}: there is no setting {key}{_nearest(key, options)}")
        try:
            found[str(option.name)] = _convert(option, value)
        except click.UsageError as error:
            raise click.UsageError(f"{path}: {key}: {_reason(error)}") from None
    return found


def _read(directory: Path) -> tuple[str, Mapping[str, Any]]:
    for name in (FILE, SECTION_FILE):
        path = directory / name
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:  # no TOML, or no UTF-8
            raise click.UsageError(f"{name} cannot be read: {error}") from None
        if name == FILE:
            return name, document
        tool = document.get("tool", {})
        section: Any = cast("dict[str, Any]", tool).get("ringpool") if isinstance(tool, dict) else None
        if section is not None:
            if not isinstance(section, dict):
                raise click.UsageError(f"{name}: tool.ringpool is no table; write [tool.ringpool]")
            return f"{name} [tool.ringpool]", cast("dict[str, Any]", section)
    return "", {}


def _key(option: click.Option) -> str:
    return option.opts[0].removeprefix("--")


def _nearest(key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(key.replace("_", "-"), names, 1)
    return f"; is {near[0]} meant?" if near else f"; there are {', '.join(names)}"


def _convert(option: click.Option, value: object) -> Any:
    """``value`` as the option has it. Raises ``click.UsageError``."""
    key = _key(option)
    if key in PAIRS and isinstance(value, dict):
        pairs = cast("dict[str, Any]", msgspec.to_builtins(value))  # dates are text then, as a ledger keeps them
        return pairs if key == "param" else tuple(f"{name}={_text(each)}" for name, each in pairs.items())
    if key == "param":
        raise click.UsageError("write a table, such as { level = 9 }")
    if option.is_flag:
        if not isinstance(value, bool):
            raise click.UsageError(f"it must be true or false, not {value!r}")
        return value
    if option.multiple:
        each = cast("list[object]", value) if isinstance(value, list) else [value]
        return tuple(option.type(_scalar(option, one), option) for one in each)
    return option.type(_scalar(option, value), option)


def _scalar(option: click.Option, value: object) -> object:
    """Text, or a number where that is wanted: what the command line could have given."""
    if isinstance(option.type, click.types.StringParamType | click.Choice):
        return _text(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise click.UsageError(f"{value!r} is of no use here")
    if isinstance(value, float) and isinstance(option.type, click.IntRange):
        raise click.UsageError(f"it must be a whole number, not {value!r}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise click.UsageError(f"it must be text, not {value!r}")
    return value


def _reason(error: click.UsageError) -> str:
    return error.message.rstrip(".")

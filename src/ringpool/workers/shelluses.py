"""For what a shell takes the next word of a simple command, besides a word: code, a number, the name of a variable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum

from ringpool.workers.shellwords import Before

_SHELL_ANYWHERE = re.compile(r"(?:.*/)?(?:[bd]a|[akz])?sh\Z")
_SHELL = re.compile(r"(?:.*/)?(?:(?:r?ba|da|[akzc]|tc|mk|ya|fi|pw)?sh)\Z|\$\{?(?:SHELL|BASH)\b")
_SHELL_CODE = re.compile(r"[-+][abefhiklmnoprstuvxBCDEHOPT]*c[abcefhiklmnoprstuvxBCDEHOPT]*")
_OPTION_WITH_WORD = re.compile(r"--(?:rcfile|init-file)\Z|[-+]\w*[oO]\Z")
_STANDARD_INPUT = re.compile(r"-\w*s\w*\Z|-\Z|/dev/(?:stdin|fd/0)\Z")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[.*\])?\+?=", re.DOTALL)
OF_NAMES = frozenset({"-v", "-R"})  # what follows these in a test is the name of a variable
_PREFIXES = frozenset({"command", "builtin", "exec", "nohup"})
_DECLARES = frozenset({"declare", "typeset", "local", "readonly", "export"})
_WITH_WORDS = {"read": "pdtnNui", "mapfile": "dnOsuc", "readarray": "dnOsuc", "unset": ""}
_INTEGERS = frozenset({"RANDOM", "SRANDOM", "SECONDS", "OPTIND", "LINENO", "HISTCMD"})
# What stands behind their -c; their other options with a word, and how many words may stand before it.
_RUN_COMMANDS = {
    "su": ("sgGw", 1),
    "runuser": ("sgGwu", 1),
    "flock": ("wE", 1),
    "sg": ("", 1),
    "script": ("oEmTBIO", 0),
}


class Use(Enum):
    """For what a shell takes a word, besides a word."""

    CODE = 0
    NUMBER = 1
    NAME = 2  # of a variable


def use_in(before: Before) -> Use | None:
    """What the next word of that command is; None: a word."""
    words, begun = before.words, before.word or ""
    if before.redirection:
        return Use.CODE if before.redirection == "<<<" and reads_input(words) else None
    at = _command_at(words)
    if _reads_code(words, at, begun):
        return Use.CODE
    if at == len(words):
        assigned = ASSIGNMENT.match(begun)
        return Use.NUMBER if assigned and assigned[1] in _INTEGERS else None
    return _use_by_name(words[at], words[at + 1 :], begun)


def _command_at(words: Sequence[str]) -> int:
    """Which of them is the command's name; their number, where none is yet."""
    at = 0
    while at < len(words) and (ASSIGNMENT.match(words[at]) or words[at] in _PREFIXES or (at and words[at] == "-p")):
        at += 1
    return at


def _use_by_name(name: str, arguments: list[str], begun: str) -> Use | None:
    last = arguments[-1] if arguments else ""
    if name == "eval" or (name == "trap" and not [each for each in arguments[:2] if each != "--"]):
        return Use.CODE
    if name == "let":
        return Use.NUMBER
    if name in _DECLARES:
        return _use_in_declaration(name, arguments, begun)
    if name == "getopts":
        return Use.NAME if len(arguments) == 1 else None
    if name in _WITH_WORDS:
        is_of_option = re.fullmatch(rf"-\w*[{_WITH_WORDS[name]}]", last) if _WITH_WORDS[name] else None
        return None if is_of_option or begun[:1] == "-" else Use.NAME
    if name == "printf":
        return Use.NAME if arguments == ["-v"] or (not arguments and begun.startswith("-v")) else None
    if (name in ("test", "[") and last in OF_NAMES) or (name == "wait" and last == "-p"):
        return Use.NAME
    directory, _, program = name.rpartition("/")
    if program == "script" and directory not in ("", "/bin", "/usr/bin"):  # one of the user's own
        return None
    return Use.CODE if program in _RUN_COMMANDS and _is_code_of(program, arguments, begun) else None


def _use_in_declaration(name: str, arguments: list[str], begun: str) -> Use | None:
    options = "".join(each[1:] for each in arguments if each[:1] == "-")
    assigned = ASSIGNMENT.match(begun)
    if "i" in options or (assigned and assigned[1] in _INTEGERS):
        return Use.NUMBER
    if "=" not in begun:
        return None if begun[:1] == "-" else Use.NAME
    is_read_again = not {"a", "A", "n"}.isdisjoint(options) and name != "export"
    return Use.CODE if is_read_again else None  # a="([x]=y)"


def _is_code_of(program: str, arguments: list[str], begun: str) -> bool:
    """Whether the next word of such a program is the code behind its -c."""
    with_word, operands_max = _RUN_COMMANDS[program]
    n_operands, is_word = 0, False
    for each in arguments[:-1]:
        if not is_word and each[:1] != "-":
            n_operands += 1
        is_word = not is_word and re.fullmatch(rf"-\w*[{with_word}]", each) is not None if with_word else False
    last = arguments[-1] if arguments else ""
    if re.fullmatch(r"-\w*c|--command", last):
        return n_operands <= operands_max
    n_operands += last[:1] not in ("-", "")
    return n_operands <= operands_max and re.match(r"-[a-z]*c|--command=", begun) is not None


def _reads_code(words: Sequence[str], at: int, begun: str) -> bool:
    """Whether a shell among ``words``, the command at ``at`` or one that another command starts, takes the next word
    for its code.
    """
    for number, word in enumerate(words):
        if not (_SHELL if number == at else _SHELL_ANYWHERE).match(word):
            continue
        found = skips = False
        for each in words[number + 1 :]:
            if skips:
                skips = False
            elif each[:1] in ("-", "+") and len(each) > 1:
                found = found or _SHELL_CODE.fullmatch(each) is not None
                skips = _OPTION_WITH_WORD.match(each) is not None
            else:  # the code, or a script
                break
        else:
            if (found and not skips) or _SHELL_CODE.match(begun):
                return True
    return False


def reads_input(words: Sequence[str]) -> bool:
    """Whether the command is a shell that takes its standard input for code."""
    at = _command_at(words)
    if at == len(words):
        return False
    if words[at] in (".", "source"):
        return any(map(_STANDARD_INPUT.match, words[at + 1 : at + 2]))
    if not _SHELL.match(words[at]):
        return False
    skips = False
    for each in words[at + 1 :]:
        if skips:
            skips = False
        elif _STANDARD_INPUT.match(each):
            return True
        elif each[:1] in ("-", "+"):
            if _SHELL_CODE.fullmatch(each):
                return False
            skips = _OPTION_WITH_WORD.match(each) is not None
        else:
            return False
    return True

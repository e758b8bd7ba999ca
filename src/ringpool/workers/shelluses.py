"""For what a shell takes the next word of a simple command, besides a word: code, a number, the name of a variable."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import Enum

from ringpool.workers.shellwords import Before

_SHELL_ANYWHERE = re.compile(r"(?:.*/)?(?:[bd]a|[akz])?sh\Z")
_SHELL = re.compile(
    r"(?:.*/)?(?:r?ba|da|r?[akz]|c|tc|[mlo]k|pdk|ya|fi|pw|po)?sh(?:93)?(?:-static)?\Z|\$\{?(?:SHELL|BASH)\b"
)
_SHELL_CODE = re.compile(r"[-+][abefhiklmnoprstuvxBCDEHOPT]*c[abcefhiklmnoprstuvxBCDEHOPT]*")
_OPTION_WITH_WORD = re.compile(r"--(?:rcfile|init-file)\Z|[-+]\w*[oO]\Z")
_STANDARD_INPUT = re.compile(r"-\w*s\w*\Z|-\Z|/dev/(?:stdin|fd/0)\Z")
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(?:\[.*\])?\+?=", re.DOTALL)
OF_NAMES = frozenset({"-v", "-R"})  # what follows these in a test is the name of a variable
# Programs that run another one: their options with a word, and how many words may stand before its name.
_WRAPPERS = {
    "command": ("", 0),
    "builtin": ("", 0),
    "exec": ("a", 0),
    "nohup": ("", 0),
    "busybox": ("", 0),
    "chroot": ("", 1),
    "chrt": ("TPD", 1),
    "doas": ("uC", 0),
    "env": ("uC", 0),
    "fakeroot": ("lsib", 0),
    "flock": ("wE", 1),
    "gosu": ("", 1),
    "ionice": ("cnpPu", 0),
    "nice": ("n", 0),
    "nsenter": ("tSG", 0),
    "setsid": ("", 0),
    "stdbuf": ("ioe", 0),
    "strace": ("abeEIoOPpsSuX", 0),
    "sudo": ("ugpChrtTUDR", 0),
    "taskset": ("", 1),
    "time": ("fo", 0),
    "timeout": ("ks", 1),
    "unshare": ("SGRw", 0),
    "xargs": ("adEILnPs", 0),
    "xvfb-run": ("efnps", 0),
}
_OF_THE_SHELL = frozenset({"command", "builtin", "exec"})  # behind these, a builtin is one
_ELSEWHERE = frozenset({"ssh", "docker", "podman", "kubectl", "lxc"})  # they give a shell there what they read
_SSH_WITH_WORD = "BbcDEeFIiJLlmOopQRSWw"
_DECLARES = frozenset({"declare", "typeset", "local", "readonly", "export"})
_WITH_WORDS = {"read": "pdtnNui", "mapfile": "dnOsuc", "readarray": "dnOsuc", "unset": ""}
_INTEGERS = frozenset({"RANDOM", "SRANDOM", "SECONDS", "OPTIND", "LINENO", "HISTCMD"})
_CODE_VARIABLES = frozenset({"PS4", "BASH_ENV", "ENV", "PROMPT_COMMAND"})
# What stands behind their -c; their other options with a word, and how many words may stand before it.
_RUN_COMMANDS = {
    "su": ("sgGw", 1),
    "runuser": ("sgGwu", 1),
    "flock": ("wE", 1),
    "sg": ("", 1),
    "script": ("oEmTBIO", 1),
}


class Use(Enum):
    """For what a shell takes a word, besides a word."""

    CODE = 0
    NUMBER = 1
    NAME = 2  # of a variable
    TARGET = 3  # of >&
    FORMAT = 4  # of printf


def use_in(before: Before, all_words: Callable[[], Sequence[str]]) -> Use | None:
    """What the next word of that command is; None: a word. ``all_words``: gives all of the command."""
    words, begun = before.words, before.word or ""
    if before.redirection:
        if before.redirection == "<<<":
            return Use.CODE if reads_input(all_words()) else None
        return Use.TARGET if before.redirection == ">&" else None
    at, is_of_shell = _command_at(words)
    if _reads_code(words, at, begun):
        return Use.CODE
    if at == len(words):
        assigned = ASSIGNMENT.match(begun)
        return _use_in_assignment(assigned[1]) if assigned else None
    arguments = words[at + 1 :]
    use = _use_by_name(words[at], arguments, begun) if is_of_shell else None
    if use is None and _runs_command(words[at]):
        return Use.CODE if _is_code_of(words[at].rpartition("/")[2], arguments, begun) else None
    return use


def _use_in_assignment(name: str) -> Use | None:
    return Use.NUMBER if name in _INTEGERS else Use.CODE if name in _CODE_VARIABLES else None


def _command_at(words: Sequence[str]) -> tuple[int, bool]:
    """Which of them is the command's name, or their number, where none is yet; and whether that may be a builtin."""
    at, is_of_shell = 0, True
    while True:
        while at < len(words) and ASSIGNMENT.match(words[at]):
            at += 1
        if at == len(words):
            return at, is_of_shell
        program = words[at].rpartition("/")[2]
        if program not in _WRAPPERS:
            return at, is_of_shell
        behind = _behind_operands(words, at + 1, *_WRAPPERS[program])
        if program in _RUN_COMMANDS and (behind == len(words) or words[behind][:1] == "-"):  # flock L -c
            return at, is_of_shell
        at, is_of_shell = behind, is_of_shell and program in _OF_THE_SHELL


def _behind_operands(words: Sequence[str], at: int, with_word: str, n_operands: int) -> int:
    """Where behind options, and that many operands, the next word is."""
    while at < len(words):
        word = words[at]
        if word == "--":
            at += 1
            break
        if word[:1] != "-" or word == "-":
            break
        at += 2 if with_word and re.fullmatch(rf"-\w*[{with_word}]", word) else 1
    return min(at + n_operands, len(words))


def _runs_command(name: str) -> bool:
    directory, _, program = name.rpartition("/")
    return program in _RUN_COMMANDS and (program != "script" or directory in ("", "/bin", "/usr/bin"))  # or the user's


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
        if arguments == ["-v"] or (not arguments and begun.startswith("-v")):
            return Use.NAME
        return None if arguments or begun else Use.FORMAT
    if (name in ("test", "[") and last in OF_NAMES) or (name == "wait" and last == "-p"):
        return Use.NAME
    return None


def _use_in_declaration(name: str, arguments: list[str], begun: str) -> Use | None:
    options = "".join(each[1:] for each in arguments if each[:1] == "-")
    assigned = ASSIGNMENT.match(begun)
    use = Use.NUMBER if "i" in options else _use_in_assignment(assigned[1]) if assigned else None
    if use is not None:
        return use
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
            elif each[:1] != "$" or found:  # the code, or a script; what is expanded may be options, or nothing
                break
        else:
            if (found and not skips) or _SHELL_CODE.match(begun):
                return True
    return False


def reads_input(words: Sequence[str]) -> bool:
    """Whether the command of these ``words`` is a shell that takes its standard input for code, or has one do so."""
    at, _ = _command_at(words)
    if at == len(words):
        return False
    if words[at] in (".", "source"):
        return any(map(_STANDARD_INPUT.match, words[at + 1 : at + 2]))
    program = words[at].rpartition("/")[2]
    if program == "ssh" and _behind_operands(words, at + 1, _SSH_WITH_WORD, 1) == len(words):
        return True
    if program in ("su", "runuser"):
        return not any(re.fullmatch(r"-\w*c|--command", each) for each in words[at + 1 :])
    if program in _ELSEWHERE:
        rest = range(at + 1, len(words))
        return any(_SHELL_ANYWHERE.match(words[i]) and _takes_input(words[i + 1 :]) for i in rest)
    return _SHELL.match(words[at]) is not None and _takes_input(words[at + 1 :])


def _takes_input(arguments: Sequence[str]) -> bool:
    """Whether a shell with these ``arguments`` reads its standard input."""
    skips = False
    for each in arguments:
        if skips:
            skips = False
        elif _STANDARD_INPUT.match(each):
            return True
        elif each[:1] in ("-", "+"):
            if _SHELL_CODE.fullmatch(each):
                return False
            skips = _OPTION_WITH_WORD.match(each) is not None
        elif each[:1] != "$":
            return False
    return True

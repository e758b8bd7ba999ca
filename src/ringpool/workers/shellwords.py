"""The simple command in which a place of a shell's text stands: its words so far, as the shell has them.

    text up to the place  -->  words that are whole, without their quotes | the beginning of the word at the place
                               redirections left out                      | what it is to a redirection

Operators (newline ; & | ( )) begin another command, and reserved words (if, do, {, ...) belong to none. Expansions stay
as they are written: $( ) with all that is in it, ${ }, ` `.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_OPERATOR = re.compile(r"&>>?|<<<|<<-?|<>|[<>]&|>>|>\||[<>]")
_RESERVED = frozenset({"{", "!", "if", "then", "else", "elif", "do", "while", "until", "time", "coproc"})
_CLOSERS = {"(": ")", "{": "}", "[": "]"}


class Before(NamedTuple):
    """``words`` that are whole; ``word``: what there is of the next one, None where it has not begun; ``redirection``:
    the operator whose target that is, empty for none; ``raw``: the text of the command so far.
    """

    words: list[str]
    word: str | None
    redirection: str
    raw: str


def command_before(text: str) -> Before:
    """What stands before the end of ``text`` in its last simple command; quotes may be open there."""
    words: list[str] = []
    word: str | None = None
    redirection, begin, at = "", 0, 0
    while at < len(text):
        char = text[at]
        if char in " \t\n;&|()<>" and not (char == "&" and text[at : at + 2] == "&>"):
            if char in "<>" and text[at + 1 : at + 2] == "(":  # a process, which is a word
                end = _after_pair(text, at + 1)
                word, at = (word or "") + text[at:end], end
                continue
            if char == "(" and word is not None and word.endswith("="):  # an array
                end = _after_pair(text, at)
                word, at = word + text[at:end], end
                continue
            if word is not None and not (char in "<>" and word.isdecimal()):  # which is a descriptor
                if not redirection:
                    words.append(word)
                redirection = ""
            word = None
        if char in " \t":
            at += 1
        elif operator := _OPERATOR.match(text, at):
            redirection, at = operator[0], operator.end()
        elif char in "\n;&|()":
            words, redirection, at = [], "", at + 1
            begin = at
        elif char == "#" and word is None:
            at = text.find("\n", at) if "\n" in text[at:] else len(text)
        else:
            part, at = _part(text, at)
            if part is not None:
                word = (word or "") + part
    while words and words[0] in _RESERVED:
        words.pop(0)
    return Before(words, word, redirection, text[begin:])


def _part(text: str, at: int) -> tuple[str | None, int]:
    """A piece of a word as the shell has it, and where it ends. None: it is none."""
    char, following = text[at], text[at + 1 : at + 2]
    if char == "\\":
        return (None if following == "\n" else following), at + 2
    if char == "'":
        end = _find(text, "'", at + 1)
        return text[at + 1 : end], end + 1
    if char == '"':
        return _double_quoted(text, at + 1)
    if char == "$" and following == "'":
        end = at + 2
        while end < len(text) and text[end] != "'":
            end += 2 if text[end] == "\\" else 1
        return text[at + 2 : end], end + 1
    if char == "$" and following and following in _CLOSERS:
        end = _after_pair(text, at + 1)
        return text[at:end], end
    if char == "`":
        end = _find(text, "`", at + 1) + 1
        return text[at:end], end
    return char, at + 1


def _double_quoted(text: str, at: int) -> tuple[str, int]:
    content = ""
    while at < len(text) and text[at] != '"':
        if text[at] == "\\" and text[at + 1 : at + 2] in ("$", "`", '"', "\\", "\n"):
            content, at = content + text[at + 1 : at + 2].strip("\n"), at + 2
        elif text[at] == "$" and text[at + 1 : at + 2] in ("(", "{"):
            end = _after_pair(text, at + 1)
            content, at = content + text[at:end], end
        else:
            content, at = content + text[at], at + 1
    return content, at + 1


def _after_pair(text: str, at: int) -> int:
    """Where what the bracket at ``at`` opens is over."""
    opener, depth = text[at], 0
    while at < len(text):
        char = text[at]
        if char == opener:
            depth += 1
        elif char == _CLOSERS[opener]:
            depth -= 1
            if not depth:
                return at + 1
        elif char in "\\'\"`":
            _, at = _part(text, at)
            continue
        at += 1
    return len(text)


def _find(text: str, char: str, at: int) -> int:
    found = text.find(char, at)
    return len(text) if found < 0 else found

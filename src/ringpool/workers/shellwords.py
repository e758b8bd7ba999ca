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
_RESERVED = frozenset({"{", "!", "if", "then", "else", "elif", "do", "while", "until", "time", "coproc", "function"})
_CLOSERS = {"(": ")", "{": "}", "[": "]"}


class Before(NamedTuple):
    """``words`` that are whole; ``word``: what there is of the next one, None where it has not begun; ``redirection``:
    the operator whose target that is, empty for none; ``raw``: the text from where that word, or an index before it
    with blanks in it, begins.
    """

    words: list[str]
    word: str | None
    redirection: str
    raw: str


class Reader:
    """Reads ``text`` from ``begin`` on; each place that is asked for is behind the one before."""

    def __init__(self, text: str, begin: int) -> None:
        self._text = text
        self._at = begin  # between two words
        self._words: list[str] = []
        self._redirection = ""
        self._is_named = False  # what follows may be the name of a function
        self._index_at = -1  # where a word with an open bracket begins

    def before(self, place: int) -> Before:
        """What stands before ``place`` in its simple command; quotes may be open there."""
        text, at = self._text, self._at
        begin, word = at, None
        while at < place:
            char = text[at]
            is_blank = char in " \t"
            if is_blank or (char in "\n;&|()<>" and not text.startswith("&>", at)):
                if char in "<>" and text.startswith("(", at + 1):  # a process, which is a word
                    end = _after_pair(text, at + 1, place)
                    word, at = (word or "") + text[at:end], end
                    continue
                if char == "(" and word is not None and word.endswith("="):  # an array
                    end = _after_pair(text, at, place)
                    word, at = word + text[at:end], end
                    continue
                if word is not None:
                    self._end_word(word, begin, is_descriptor=char in "<>" and word.isdecimal())
                word = None
            if is_blank:
                at += 1
                begin = self._at = at
            elif operator := _OPERATOR.match(text, at):
                self._redirection, at = operator[0], operator.end()
                begin = self._at = at
            elif char in "\n;&|()":
                self._words, self._redirection, self._index_at = [], "", -1
                at += 1
                begin = self._at = at
            elif char == "#" and word is None:
                end = text.find("\n", at, place)
                at = place if end < 0 else end
            else:
                part, at = _part(text, at, place)
                if part is not None:
                    word = (word or "") + part
        return Before(
            self._words, word, self._redirection, text[self._index_at if self._index_at >= 0 else begin : place]
        )

    def words_of_command(self) -> list[str]:
        """All of its simple command's, to its end."""
        text, at, n = self._text, self._at, len(self._text)
        while at < n and text[at] not in "\n;|)":
            if text[at] == "&" and text[at - 1 : at] not in ("<", ">") and text[at + 1 : at + 2] != ">":
                break
            at = _after_pair(text, at, n) if text[at] == "(" else _part(text, at, n)[1]
        before = self.before(at)
        return before.words if before.word is None or before.redirection else [*before.words, before.word]

    def _end_word(self, word: str, begin: int, *, is_descriptor: bool) -> None:
        if is_descriptor:
            return
        if self._redirection:
            self._redirection = ""
            return
        if not self._words and (word in _RESERVED or word in ("-p", "--")):  # time -p --
            self._is_named = self._is_named or word in ("function", "coproc")
            return
        if self._is_named and word == "{" and len(self._words) == 1:
            self._words, self._is_named = [], False
            return
        if self._index_at < 0 and word.count("[") > word.count("]"):
            self._index_at = begin
        elif self._index_at >= 0 and "]" in word:
            self._index_at = -1
        self._words.append(word)


def command_before(text: str) -> Before:
    """What stands before the end of ``text`` in its last simple command."""
    return Reader(text, 0).before(len(text))


def _part(text: str, at: int, end: int) -> tuple[str | None, int]:
    """A piece of a word as the shell has it, and where it ends. None: it is none."""
    char, following = text[at], text[at + 1 : at + 2] if at + 1 < end else ""
    if char == "\\":
        return (None if following == "\n" else following), min(at + 2, end)
    if char == "'":
        stop = _find(text, "'", at + 1, end)
        return text[at + 1 : stop], min(stop + 1, end)
    if char == '"':
        return _double_quoted(text, at + 1, end)
    if char == "$" and following == "'":
        stop = at + 2
        while stop < end and text[stop] != "'":
            stop += 2 if text[stop] == "\\" else 1
        return text[at + 2 : min(stop, end)], min(stop + 1, end)
    if char == "$" and following and following in _CLOSERS:
        stop = _after_pair(text, at + 1, end)
        return text[at:stop], stop
    if char == "`":
        stop = at + 1
        while stop < end and text[stop] != "`":
            stop += 2 if text[stop] == "\\" else 1
        return text[at : min(stop + 1, end)], min(stop + 1, end)
    return char, at + 1


def _double_quoted(text: str, at: int, end: int) -> tuple[str, int]:
    pieces: list[str] = []
    while at < end and text[at] != '"':
        following = text[at + 1 : at + 2]
        if text[at] == "\\" and following in ("$", "`", '"', "\\", "\n"):
            pieces.append(following.strip("\n"))
            at += 2
        elif text[at] == "$" and following in ("(", "{"):
            stop = _after_pair(text, at + 1, end)
            pieces.append(text[at:stop])
            at = stop
        else:
            pieces.append(text[at])
            at += 1
    return "".join(pieces), min(at + 1, end)


def _after_pair(text: str, at: int, end: int) -> int:
    """Where what the bracket at ``at`` opens is over."""
    opener, depth = text[at], 0
    while at < end:
        char = text[at]
        if char == opener and (opener != "{" or text[at - 1] == "$" or not depth):  # ${x#{} has one brace
            depth += 1
        elif char == _CLOSERS[opener]:
            depth -= 1
            if not depth:
                return at + 1
        elif char in "\\'\"`":
            _, at = _part(text, at, end)
            continue
        at += 1
    return end


def _find(text: str, char: str, at: int, end: int) -> int:
    found = text.find(char, at, end)
    return end if found < 0 else found

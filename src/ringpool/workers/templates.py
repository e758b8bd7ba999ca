"""Command templates: a line for the shell, with fields in braces.

    field                                       is
    {src} {dst} {dst.NAME}                      a path: of the input, the output, the output called NAME of several
    {name} {stem} {suffix}                      of the input's own name: sea.tar.gz, sea.tar, .gz
    {relpath} {parent} {index} {hash}           what the caller knows of it: ``fields``

    where it stands                             it becomes              so that the command gets
    outside quotes, also in $( ), ( ), ` `      "${RINGPOOL_SRC}"       one word
    in "quotes", in a here-document             ${RINGPOOL_SRC}         a part of that text
    in 'quotes', or in $'quotes'                '"${RINGPOOL_SRC}"'     a part of that text
    in a comment; as ${src}, \\{src}             stays as it is          what the shell makes of it
    in $(( )), [[ -eq ]], ${x[ ]}, ${x: }, let,  an error                bash would run what a name may hold
      declare -i, unless it is {index}
    in sh -c '...', eval '...', trap '...' EXIT an error                that shell would; take sh -c '... "$1"' x {src}
    in what sh reads: sh <<END, bash <<< "..."  an error                so would that
    as the name of a variable: unset {src}      an error                bash would run what is between brackets in it
    behind >&; as printf's format: {name}       an error                bash reads that twice; a name may be -v
    in PS4, BASH_ENV, ENV, PROMPT_COMMAND       an error                shells run what is in these
    in the document of a quoted <<'END'         an error                nothing is replaced there

The shell never reads a path: values are in its environment, by those names, and a command may look there as well. What
makes code of its arguments (awk, ssh, python -c) makes code of a path that is put into them: pass it beside the code.
So does a shell of what it is told to read once more by way of something else: ``n={stem}; echo $((n))``; ``| sh``.
Paths are absolute; {name}, {stem}, {relpath} and {parent} may begin with a dash: ``-- {name}``, or ``./{name}``.

All other braces are the shell's and the command's: ``${VAR%.gz}``, ``{a,b}``, ``awk '{print}'``. Only a single word in
braces outside quotes, that is no field, is taken for a slip, and is an error: quote it where the command wants it.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ringpool.errors import CommandTemplateError
from ringpool.workers.shelluses import ASSIGNMENT, OF_NAMES, Use, reads_input, use_in
from ringpool.workers.shellwords import Before, Reader

FIELDS = ("src", "dst", "dst.NAME", "name", "stem", "suffix", "relpath", "parent", "index", "hash")
ITS_OWN = frozenset({"template", "fields"})  # parameters of ``run_command`` that a job of a command gives itself
NAME_MAX = 99  # characters that are looked at
NOT_OF_A_FILE = ITS_OWN | {"shell", "environment"}  # those by which a list of files would run code of its own


class _Place(NamedTuple):
    """What the shell takes text for: the ``tokens`` that matter there, and what goes ``around`` a quoted word; None
    where there are double quotes, or none are needed.
    """

    tokens: re.Pattern[str]
    around: str | None


class _Frame:
    """Where it begins, and the command in it that is being read. ``is_code``: what is in it, a shell reads again."""

    __slots__ = ("begin", "closer", "is_code", "place", "reader", "start")

    def __init__(self, place: _Place, closer: str, start: int, begin: int, *, is_code: bool = False) -> None:
        self.place = place
        self.closer = closer
        self.start = start
        self.begin = begin
        self.is_code = is_code
        self.reader: Reader | None = None  # of the command at ``begin``

    def begin_command(self, at: int) -> int:
        """Another one begins there."""
        self.begin, self.reader = at, None
        return at

    def before(self, text: str, at: int) -> Before:
        """The command that is being read, up to ``at``."""
        if self.reader is None:
            self.reader = Reader(text, self.begin)
        return self.reader.before(at)


class _Found(NamedTuple):
    """A field, where it stands, and in how many pairs of backquotes."""

    start: int
    end: int
    field: str
    place: _Place
    n_backquotes: int


def _place(tokens: str, around: str | None = None) -> _Place:
    return _Place(re.compile(tokens, re.DOTALL | re.ASCII), around)


_FIELD = r"\{(?:src|dst(?:\.\w+)?|name|stem|suffix|relpath|parent|index|hash)\}"
_FIELD_AT = re.compile(_FIELD, re.ASCII)
_VARIABLE = re.compile(r"RINGPOOL_(?:DST_(\w+)|(SRC|DST|NAME|STEM|SUFFIX|RELPATH|PARENT|INDEX|HASH)\b)", re.ASCII)
_EXPANSIONS = rf"\\\$\{{|\\.|`|\$\(\(|\$\(|\$\[(?=[^]\"\n]*\])|\$\{{|\$\$|{_FIELD}"
_OUTSIDE_QUOTES = rf"\$\[(?=[^]\n]*\])|{_EXPANSIONS}"
_CODE = _place(
    rf"\$?'|\"|{_OUTSIDE_QUOTES}|\(\(|[()#\n;]|[<>]&|>\||&>|[&|]|<<<|<<-?|\bcase\b|\besac\b|\[\[(?=[\s(])|"
    r"\{[A-Za-z_]\w*\}(?![<>])",  # {fd}> is bash's
    "%s",
)
_TEST = _place(rf"\$?'|\"|{_EXPANSIONS}|(?<=[\s)])\]\](?=[\s;&|)`<>]|\Z)|\{{[A-Za-z_]\w*\}}", "%s")  # in [[ ]]
_WORD = _place(rf"\$?'|\"|{_EXPANSIONS}|\}}", "%s")  # in ${ }
_SUM = _place(rf"'|\"|{_EXPANSIONS}|[][()}}]")  # in $(( )), $[ ], ${x: }
_DOUBLE = _place(rf"\"|{_EXPANSIONS}|\}}")
_SINGLE = _place(rf"'|\$\{{|{_FIELD}", "'%s'")
_ANSI = _place(rf"\\.|'|\$\{{|{_FIELD}", "'%s$'")
_HERE = _place(_EXPANSIONS)
_OPENS = {
    "'": [(_SINGLE, "'")],
    '"': [(_DOUBLE, '"')],
    "$'": [(_ANSI, "'")],
    "`": [(_CODE, "`")],
    "(": [(_CODE, ")")],
    "$(": [(_CODE, ")")],
    "((": [(_SUM, ")")] * 2,
    "$((": [(_SUM, ")")] * 2,
    "$[": [(_SUM, "]")],
}
_SLICE = re.compile(r"\$\{(?:[!#]?\w+(?:\[(?:[^][]|\[[^]]*\])*\])?|[@*#?$!-]):(?![-+=?])")  # ${x:offset:length}
_PATTERN = re.compile(r"\$\{\w+(?:\[[^]]*\])?[#%/]")  # ${x%...}: quotes count in it, whatever stands around it
_DELIMITER = re.compile(r"[ \t]*((?:'[^']*'|\"[^\"]*\"|\\.|[^\s;&|<>()'\"\\])+)")
_KEY = re.compile(r"\$\{[!#]?(\w+)\[[^]]*\Z")  # ${x[...
_INDEX = re.compile(r"([A-Za-z_]\w*)\[((?:[^][]|\$\{[^}]*\}|\[[^]]*\])*)\Z")  # x[...
_INDEX_ENDS = re.compile(r"[^;&|\n]*?\]\+?=")
_ARRAY = re.compile(r"([A-Za-z_]\w*)\+?=\Z")
_OF_NUMBERS = frozenset({"-eq", "-ne", "-lt", "-le", "-gt", "-ge"})
_AFTER_NUMBER = re.compile(r"(?:[^\s\"']|\"[^\"]*\"|'[^']*')*[\"']?(?:\s|\\\n)+-(?:eq|ne|lt|le|gt|ge)\s")
_REST_OF_QUOTES = {'"': re.compile(r'(?:\\.|[^"\\])*"', re.DOTALL), "'": re.compile(r"[^']*'")}
_SIMPLE = re.compile(r"\s*([\w./+-]+)(?:\s(?:'[^']*'|\"[^\"`\\]*\"|[<>]&|[^;&|()`\n'\"\\])*)?")
_NO_FILES = re.compile(  # words that ``exec`` would not find, or would find something else for
    r"[.]|alias|bg|break|builtin|caller|case|cd|chdir|command|comp\w+|continue|coproc|declare|dirs|disown|do|done|echo|"
    r"elif|else|enable|esac|eval|exec|exit|export|false|fc|fg|fi|for|function|getopts|hash|help|history|if|in|jobs|kill|"
    r"let|local|logout|mapfile|popd|printf|pushd|pwd|read|readarray|readonly|return|select|set|shift|shopt|source|suspend|"
    r"test|then|time|times|trap|true|type|typeset|ulimit|umask|unalias|unset|until|wait|while"
)


class _Scanner:
    """Reads a template as a shell does, as far as it takes to know what quotes are around a field, and what command it
    is a word of. Where it errs, a value is split into words, or is not put in: the shell still does not read it.
    """

    def __init__(self, text: str) -> None:
        self.found: list[_Found] = []
        self._text = text
        self._frames = [_Frame(_CODE, "", 0, 0)]
        # << or <<-, the delimiter, and whether it is a shell that reads it, of those that begin on the next line
        self._documents: list[tuple[str, str, bool]] = []
        self._ended_at = -1  # where a list in parentheses, which is no word, was over
        self._declared: dict[tuple[str, str], bool] = {}
        self._last: tuple[_Frame, int, Use | None] | None = None  # the word of the last field, and what that was
        self._scan(0, len(text))

    def _scan(self, at: int, end: int) -> None:
        while match := self._frames[-1].place.tokens.search(self._text, at, end):
            at = self._take(match[0], match.start(), match.end(), end)

    def _take(self, token: str, at: int, after: int, end: int) -> int:
        """Heed a token; where to go on."""
        frame = self._frames[-1]
        place = frame.place
        if token == frame.closer:
            self._frames.pop()
            if self._text[frame.start] == "(":
                self._ended_at = after
        elif token[0] == "{":
            self._field(token, at, after)
        elif token == "${" and place not in (_SINGLE, _ANSI):
            quoted = place in (_DOUBLE, _HERE) and not _PATTERN.match(self._text, at)
            inner = _SUM if _SLICE.match(self._text, at) else _DOUBLE if quoted else _WORD
            self._frames.append(_Frame(inner, "}", at, after))
        elif token in ("(", "[") and place is _SUM:
            self._frames.append(_Frame(_SUM, ")" if token == "(" else "]", at, after))
        elif token in _OPENS:
            self._frames += [_Frame(*opened, at, after) for opened in _OPENS[token]]
        elif token == "case" and self._begins_command(at):
            self._frames.append(_Frame(_CODE, "esac", at, at))  # in which a ) closes nothing
        elif token == "[[" and self._begins_command(at):
            self._frames.append(_Frame(_TEST, "]]", at, after))
        elif token == "#" and self._begins_comment(at):
            stop = re.compile("[\n`]" if self._n_backquotes() else "\n").search(self._text, at, end)
            return stop.start() if stop else end
        elif token in ("<<", "<<-") and (match := _DELIMITER.match(self._text, after, end)):
            self._documents.append((token, match[1], reads_input(self._words_of_command(frame))))
            return match.end()
        elif token == "\n" and self._documents:
            return frame.begin_command(self._read_documents(after, end))
        elif token in ("\n", ";", "&", "|") or (token == ")" and frame.closer == "esac"):
            return frame.begin_command(after)
        return after

    def _begins_command(self, at: int) -> bool:
        before = self._frames[-1].before(self._text, at)
        return not before.words and before.word is None and not before.redirection

    def _begins_comment(self, at: int) -> bool:
        """Whether a # there does: not in a word, as behind $( ) or backquotes that close."""
        frame, former = self._frames[-1], self._text[at - 1 : at]
        return former in ("", " ", "\t", "\n", ";", "&", "|", "(") or (
            former in ")`" and at in (frame.begin, self._ended_at)
        )

    def _n_backquotes(self) -> int:
        return sum(frame.closer == "`" for frame in self._frames)

    def _read_documents(self, at: int, end: int) -> int:
        documents, self._documents = self._documents, []
        for token, written, is_code in documents:
            word = re.sub(r"\\(.)|['\"]", r"\1", written)
            tabs = r"\t*" if token == "<<-" else ""
            last = re.compile(rf"^{tabs}{re.escape(word)}$", re.MULTILINE).search(self._text, at, end)
            stop = last.start() if last else end
            if word == written:
                depth = len(self._frames)
                self._frames.append(_Frame(_HERE, "", at, at, is_code=is_code))
                self._scan(at, stop)
                del self._frames[depth:]
            elif field := _FIELD_AT.search(self._text, at, stop):
                self._refuse(field[0], f"stands in a here-document; write <<{word} without quotes")
            at = last.end() if last else end
        return at

    def _field(self, token: str, at: int, after: int) -> None:
        place, name = self._frames[-1].place, token[1:-1]
        if not _FIELD_AT.fullmatch(token):
            self._refuse(token, f"is no field; {_KNOWN}. Quote braces that are the command's")
        use = self._use(at, after)
        if use is Use.CODE:
            variable = f'"${variable_of(name)}"'
            self._refuse(token, f"stands in code that a shell reads again, to which a path is code; write {variable}")
        if use is Use.NUMBER and name != "index":
            self._refuse(token, "stands in arithmetic, where bash runs what a name may hold; only {index} may")
        if use is Use.NAME and name != "index":
            self._refuse(token, "stands for the name of a variable, in which bash runs what is between brackets")
        if use is Use.TARGET and name != "index":
            self._refuse(token, f"stands behind >&, where bash reads it again as code; write > {token} 2>&1")
        if use is Use.FORMAT and name in ("name", "stem", "relpath"):
            self._refuse(token, f"is printf's format, or an option, in which bash runs code; write printf %s {token}")
        self.found.append(_Found(at, after, name, place, self._n_backquotes()))

    def _use(self, at: int, after: int) -> Use | None:
        """What the shell takes for more than a word, of what stands from ``at`` to ``after``."""
        text, frames = self._text, self._frames
        i = max(i for i, frame in enumerate(frames) if frame.place in (_CODE, _SUM, _HERE, _TEST))
        frame = frames[i]
        for inner in frames[i:]:
            if inner.closer == "}" and (key := _KEY.match(text, inner.start, at)) and not self._is_map(key[1]):
                return Use.NUMBER
        if frame.place is _SUM:
            return Use.NUMBER
        if frame.place is _HERE:
            return Use.CODE if frame.is_code else None
        word = frames[i + 1].start if i + 1 < len(frames) else at
        if self._last is not None and word < at and self._last[:2] == (frame, word):
            return self._last[2]  # of the same word
        use = self._use_in_test(frame, at, after) if frame.place is _TEST else self._use_in_command(i, at, after)
        self._last = frame, word, use
        return use

    def _use_in_test(self, frame: _Frame, at: int, after: int) -> Use | None:
        before, innermost = frame.before(self._text, at), self._frames[-1]
        last = before.words[-1] if before.words else ""
        if last in OF_NAMES:
            return Use.NAME
        if innermost is not frame and (rest := _REST_OF_QUOTES.get(innermost.closer)):
            found = rest.match(self._text, after)
            after = found.end() if found else after
        return Use.NUMBER if last in _OF_NUMBERS or _AFTER_NUMBER.match(self._text, after) else None

    def _use_in_command(self, i: int, at: int, after: int) -> Use | None:
        text, frames = self._text, self._frames
        frame = frames[i]
        before = frame.before(text, at)
        is_list = frame.closer == ")" and text[frame.start] == "("
        array = _ARRAY.search(text[max(0, frame.start - NAME_MAX) : frame.start]) if is_list else None
        if array is not None:  # words of it are no commands
            if self._use_of_word(frames[i - 1], Reader(text, frames[i - 1].begin).before(frame.start)) is Use.NUMBER:
                return Use.NUMBER
            word = before.word or ""
            is_key = before.raw[:1] == "[" and word.count("[") > word.count("]") and _INDEX_ENDS.match(text, after)
            return Use.NUMBER if is_key and not self._is_map(array[1]) else None
        index = _INDEX.match(before.raw)
        is_first = all(map(ASSIGNMENT.match, before.words)) or before.raw.startswith(before.words[0])
        if index and is_first and _INDEX_ENDS.match(text, after) and not self._is_map(index[1]):
            return Use.NUMBER
        return self._use_of_word(frame, before)

    def _use_of_word(self, frame: _Frame, before: Before) -> Use | None:
        use = use_in(before, lambda: self._words_of_command(frame))
        if use is None and all(map(ASSIGNMENT.match, before.words)) and not before.redirection:
            assigned = ASSIGNMENT.match(before.word or "")
            if assigned and self._is_declared(assigned[1], "in"):  # an integer, or another one's name
                return Use.NUMBER
        return use

    def _words_of_command(self, frame: _Frame) -> list[str]:
        return Reader(self._text, frame.begin).words_of_command()

    def _is_map(self, name: str) -> bool:
        """Whether the template declares an associative array of that name, whose keys are text."""
        return self._is_declared(name, "A")

    def _is_declared(self, name: str, attributes: str) -> bool:
        """Whether the template declares a variable of that name with one of these ``attributes``."""
        found = self._declared.get((name, attributes))
        if found is None:
            options = rf"(?:-\w+\s+)*-\w*[{attributes}]\w*\s"
            pattern = rf"\b(?:declare|typeset|local)\s+{options}[^;&|\n]*\b{name}\b"
            found = self._declared[name, attributes] = re.search(pattern, self._text) is not None
        return found

    def _refuse(self, token: str, reason: str) -> None:
        raise CommandTemplateError(self._text, f"{token} {reason}")


class Template:
    """A command template. Attributes: ``text`` (str); ``fields`` (frozenset of str), in braces or by their variables;
    ``script`` (str), what the shell gets.

    Raises ``CommandTemplateError`` for one without a field, and where a field cannot stand where it does.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if "\0" in text:
            raise CommandTemplateError(text, "it contains a null byte, which no argument may; take it out")
        try:
            self._found = _Scanner(text).found
        except RecursionError:
            raise CommandTemplateError(text, "its quotes and brackets are nested too deep") from None
        named = {f"dst.{m[1]}" if m[1] else m[2].lower() for m in _VARIABLE.finditer(text)}
        self.fields = frozenset({found.field for found in self._found} | named)
        if not self.fields:
            raise CommandTemplateError(text, f"it names no file; write {{src}} where the input's path goes. {_KNOWN}")
        script = self._filled([_expansion(found) for found in self._found])
        simple = _SIMPLE.fullmatch(text)
        # In the shell's place, so that the signal that ends it is seen: dash makes a process of it otherwise.
        self.script = f"exec {script}" if simple and not _NO_FILES.fullmatch(simple[1]) else script

    def check(self, known: Collection[str]) -> None:
        """Raise ``CommandTemplateError`` where a field is not ``known``, or outputs are and none is a field."""
        outputs = [f"{{{field}}}" for field in known if field.startswith("dst")]
        for field in sorted(self.fields.difference(known)):
            there_are = f"it has {', '.join(outputs)}" if outputs else "it has none: give it one (--out)"
            is_output = field.startswith("dst")
            reason = f"is no output of the task; {there_are}" if is_output else "is not known; pass it in fields"
            raise CommandTemplateError(self.text, f"{{{field}}} {reason}")
        for output in outputs:
            if output[1:-1] not in self.fields:
                which = "" if len(outputs) == 1 else f" {output}, which it does not name"
                raise CommandTemplateError(self.text, f"the task has an output{which}; write > {output} to make it")

    def refuse_own(self, parameters: Collection[str]) -> None:
        """Raise ``CommandTemplateError`` where ``parameters`` has what a job gives itself, or what no command has."""
        for name in sorted(ITS_OWN.intersection(parameters)):
            raise CommandTemplateError(self.text, f"it comes with its own {name}; leave out that parameter")
        for name in sorted(set(parameters) - NOT_OF_A_FILE):
            reason = f"a command takes no parameter {name!r}, nor can it have it as a field"
            raise CommandTemplateError(self.text, f"{reason}; drop it, in a manifest its column or key")

    def check_environment(self, environment: Mapping[str, str]) -> None:
        """Raise ``CommandTemplateError`` where these cannot be variables of it, or are those of its fields."""
        fields = {variable_of(field): field for field in self.fields}
        for name, value in environment.items():
            if not name or "=" in name or "\0" in name + value:
                reason = f"its environment has {name!r}, which is empty, or holds = or a null byte, or its value does"
                raise CommandTemplateError(self.text, f"{reason}; no variable can")
            if name in fields:
                reason = f"its environment sets {name}, which is its field {{{fields[name]}}}"
                raise CommandTemplateError(self.text, f"{reason}; take another name")

    def command_with(self, values: Mapping[str, bytes]) -> str:
        """What somebody may type to run it with these values."""
        return self._filled([_shown(values[found.field], found) for found in self._found])

    def _filled(self, replacements: list[str]) -> str:
        filled, at = "", 0
        for found, replacement in zip(self._found, replacements, strict=True):
            filled += self.text[at : found.start] + replacement
            at = found.end
        return filled + self.text[at:]


parsed = functools.lru_cache(maxsize=32)(Template)
_KNOWN = "there are " + ", ".join(f"{{{field}}}" for field in FIELDS)


def variable_of(field: str) -> str:
    """The environment variable of a field."""
    return f"RINGPOOL_DST_{field[4:]}" if field.startswith("dst.") else f"RINGPOOL_{field.upper()}"


def _expansion(found: _Found) -> str:
    bare, around = f"${{{variable_of(found.field)}}}", found.place.around
    return bare if around is None else around % f'"{bare}"'


def _shown(value: bytes, found: _Found) -> str:
    """``value`` as it is typed where the field stands; in the shell's $'...' where it cannot be printed."""
    text = value.decode(errors="replace")
    printable = text.isprintable() and text.encode() == value
    if printable and found.place.around is None:
        shown = re.sub(r"[\\$`]" if found.place is _HERE else r'[\\$`"]', r"\\\g<0>", text)
    elif printable and text and shlex.quote(text) == text:
        shown = text
    else:
        around = found.place.around or ("$(printf %%s %s)" if found.place is _HERE else '"%s"')
        shown = around % (shlex.quote(text) if printable else ansi_quoted(value))
    for _ in range(found.n_backquotes):
        shown = re.sub(r"[\\`]", r"\\\g<0>", shown)
    return shown


def ansi_quoted(value: bytes) -> str:
    """``value`` in the shell's $'...', in which all of it can be printed."""
    escaped = "".join(chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in value)
    return f"$'{escaped}'"

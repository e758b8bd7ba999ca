"""Commands as task functions: a line for the shell, with fields in braces, is run for each file.

    field                                       is
    {src} {dst} {dst.NAME}                      a path: of the input, the output, the output called NAME of several
    {name} {stem} {suffix}                      of the input's own name: sea.tar.gz, sea.tar, .gz
    {relpath} {parent} {index} {hash}           what the caller knows of it: ``fields``

    where it stands                             it becomes              so that the command gets
    outside quotes, also in $( ), ( ), ` `      "${RINGPOOL_SRC}"       one word
    in "quotes", in a here-document             ${RINGPOOL_SRC}         a part of that text
    in 'quotes', or in $'quotes'                '"${RINGPOOL_SRC}"'     a part of that text
    in a comment; as ${src}, \\{src}             stays as it is          what the shell makes of it
    in $(( )), unless it is {index}             an error                bash would run what a name may hold
    in sh -c '...', eval '...'                  an error                that shell would; take sh -c '... "$1"' x {src}
    in the document of a quoted <<'END'         an error                nothing is replaced there

The shell never reads a path: values are in its environment, by those names, and a command may look there as well. What
makes code of its arguments (awk, ssh, python -c) makes code of a path that is put into them: pass it beside the code.
Paths are absolute; {name}, {stem}, {relpath} and {parent} may begin with a dash: ``-- {name}``, or ``./{name}``.

All other braces are the shell's and the command's: ``${VAR%.gz}``, ``{a,b}``, ``awk '{print}'``. Only a single word in
braces outside quotes, that is no field, is taken for a slip, and is an error: quote it where the command wants it.

``a | b`` ends as b does. With ``shell="/bin/bash"``, ``set -o pipefail; a | b`` fails where a does.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ringpool.errors import CommandError, CommandTemplateError

OUTPUT_BYTES_MAX = 1 << 20  # of standard output, where that is the task's value
TAIL_BYTES = 4096  # of what is kept for an error
LINGER_S = 1.0  # for what a command has left running: >(gzip > x) has yet to write its end
KILL_ROUNDS_MAX = 100  # it may fork meanwhile
FIELDS = ("src", "dst", "dst.NAME", "name", "stem", "suffix", "relpath", "parent", "index", "hash")
ITS_OWN = frozenset({"template", "fields"})  # parameters of ``run_command`` that a job of a command gives itself
NOT_OF_A_FILE = ITS_OWN | {"shell", "environment"}  # those by which a list of files would run code of its own
will_be: dict[bytes, bytes] = {}  # where outputs will be that are written elsewhere first, for the command of an error
peak_rss_bytes = 0
"""The largest resident size among the processes of the last command; 0 before the first. At least that of this process:
Linux counts the moment before the shell's program took the place of its own. Source: getrusage(2), ``ru_maxrss``."""


# ---- templates -------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """What the shell takes text for: the ``tokens`` that matter there, and what goes ``around`` a quoted word; None
    where there are double quotes, or none are needed.
    """

    tokens: re.Pattern[str]
    around: str | None


class _Frame(NamedTuple):
    place: _Place
    closer: str
    start: int


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
_EXPANSIONS = rf"\\\$\{{|\\.|`|\$\(\(|\$\(|\$\{{|\$\$|{_FIELD}"
_CODE = _place(
    rf"\$?'|\"|{_EXPANSIONS}|\(\(|[()#\n]|<<<|<<-?|\bcase\b|\besac\b|\{{[A-Za-z_]\w*\}}(?![<>])",  # {fd}> is bash's
    "%s",
)
_WORD = _place(rf"\$?'|\"|{_EXPANSIONS}|\}}", "%s")  # in ${ }
_SUM = _place(rf"'|\"|{_EXPANSIONS}|[()]")  # in $(( ))
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
}
_PATTERN = re.compile(r"\$\{\w+(?:\[[^]]*\])?[#%/]")  # ${x%...}: quotes count in it, whatever stands around it
_COMMAND_BEGINS = re.compile(r"(?:\A|[;&|(`{!\n]|\b(?:then|do|else|elif|if|while|until))\s*\Z")
_DELIMITER = re.compile(r"[ \t]*((?:'[^']*'|\"[^\"]*\"|\\.|[^\s;&|<>()'\"\\])+)")
_SHELL_OPTION = r"(?:\s+(?:[-+]\w*[oO]\s+\w+|[-+]\S+))"  # -o has a word of its own
_OTHER_SHELL = re.compile(
    rf"(?<![^\s;&|(`/])(?:(?:[bd]a|[akz])?sh{_SHELL_OPTION}*?\s+[-+]\w*c{_SHELL_OPTION}*\s+"
    r"(?:'[^']*'|\"[^\"]*\"|[^\s'\"])*|eval\s[^;&|\n]*)\Z"
)
_SIMPLE = re.compile(r"\s*([\w./+-]+)(?:\s(?:'[^']*'|\"[^\"`\\]*\"|[<>]&|[^;&|()`\n'\"\\])*)?")
_NO_FILES = re.compile(  # words that ``exec`` would not find, or would find something else for
    r"[.]|alias|bg|break|builtin|caller|case|cd|chdir|command|comp\w+|continue|coproc|declare|dirs|disown|do|done|echo|"
    r"elif|else|enable|esac|eval|exec|exit|export|false|fc|fg|fi|for|function|getopts|hash|help|history|if|in|jobs|kill|"
    r"let|local|logout|mapfile|popd|printf|pushd|pwd|read|readarray|readonly|return|select|set|shift|shopt|source|suspend|"
    r"test|then|time|times|trap|true|type|typeset|ulimit|umask|unalias|unset|until|wait|while"
)


class _Scanner:
    """Reads a template as a shell does, as far as it takes to know what quotes are around a field. Where it errs, a
    value is split into words, or is not put in: the shell still does not read it.
    """

    def __init__(self, text: str) -> None:
        self.found: list[_Found] = []
        self._text = text
        self._frames = [_Frame(_CODE, "", 0)]
        self._documents: list[
            tuple[str, str]
        ] = []  # << or <<-, and the delimiter, of those that begin on the next line
        self._scan(0, len(text))

    def _scan(self, at: int, end: int) -> None:
        while match := self._frames[-1].place.tokens.search(self._text, at, end):
            at = self._take(match[0], match.start(), match.end(), end)

    def _take(self, token: str, at: int, after: int, end: int) -> int:
        """Heed a token; where to go on."""
        place, closer, _ = self._frames[-1]
        if token == closer:
            self._frames.pop()
        elif token[0] == "{":
            self._field(token, at, after)
        elif token == "${" and place not in (_SINGLE, _ANSI):
            quoted = place in (_DOUBLE, _HERE) and not _PATTERN.match(self._text, at)
            self._frames.append(_Frame(_DOUBLE if quoted else _WORD, "}", at))
        elif token == "(" and place is _SUM:
            self._frames.append(_Frame(_SUM, ")", at))
        elif token in _OPENS:
            self._frames += [_Frame(*opened, at) for opened in _OPENS[token]]
        elif token == "case" and _COMMAND_BEGINS.search(self._text[:at]):
            self._frames.append(_Frame(_CODE, "esac", at))  # in which a ) closes nothing
        elif token == "#" and (not at or self._text[at - 1] in " \t\n;&|()`"):
            stop = re.compile("[\n`]" if self._n_backquotes() else "\n").search(self._text, at, end)
            return stop.start() if stop else end
        elif token in ("<<", "<<-") and (match := _DELIMITER.match(self._text, after, end)):
            self._documents.append((token, match[1]))
            return match.end()
        elif token == "\n" and self._documents:
            return self._read_documents(after, end)
        return after

    def _n_backquotes(self) -> int:
        return sum(frame.closer == "`" for frame in self._frames)

    def _read_documents(self, at: int, end: int) -> int:
        documents, self._documents = self._documents, []
        for token, written in documents:
            word = re.sub(r"\\(.)|['\"]", r"\1", written)
            tabs = r"\t*" if token == "<<-" else ""
            last = re.compile(rf"^{tabs}{re.escape(word)}$", re.MULTILINE).search(self._text, at, end)
            stop = last.start() if last else end
            if word == written:
                depth = len(self._frames)
                self._frames.append(_Frame(_HERE, "", at))
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
        if place is _SUM and name != "index":
            self._refuse(token, "stands in arithmetic, where bash runs what a name may hold; only {index} may")
        i = max(i for i, frame in enumerate(self._frames) if frame.place in (_CODE, _SUM, _HERE))
        word = self._frames[i + 1].start if i + 1 < len(self._frames) else at
        if _OTHER_SHELL.search(self._text[self._frames[i].start : word]):
            self._refuse(
                token, f'stands in code for another shell, to which a path is code; write "${variable_of(name)}"'
            )
        self.found.append(_Found(at, after, name, place, self._n_backquotes()))

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
        self._found = _Scanner(text).found
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


# ---- runs ------------------------------------------------------------------------------------------------------------


def run_command(
    src: bytes,
    dst: bytes | dict[str, bytes] | None = None,
    *,
    template: str,
    fields: dict[str, str] | None = None,
    shell: str = "/bin/sh",
    environment: dict[str, str] | None = None,
) -> str | None:
    """Run ``template`` for ``src``. Without ``dst``: its standard output, less the newlines at its end; else None.

    ``fields``: those that the path does not tell. ``environment``: variables, beside this process's own. Standard input
    is empty. Bytes that are not UTF-8 are shown as ``\\xff``. Of standard error, and with ``dst`` of output, the end is
    kept for an error. What the command leaves running has ``LINGER_S`` to end, and is killed then, unless it has closed
    all it inherited or emptied its environment.

    Raises ``CommandTemplateError``; ``CommandError`` where the exit status is not 0, or standard output is more than
    1 MiB. A status of 128 + n is the shell's for a command that signal n has ended, one of several in the template.
    """
    command = parsed(template)
    values = _values(src, dst, fields or {})
    command.check(values)
    variables = {variable_of(field).encode(): values[field] for field in command.fields}
    variables |= {os.fsencode(name): os.fsencode(value) for name, value in (environment or {}).items()}
    run = _Run(None if dst is not None else OUTPUT_BYTES_MAX)
    try:
        run.start([shell, "-c", os.fsencode(command.script)], variables)
        run.attend()
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise CommandTemplateError(template, f"its shell {shell}: {error.strerror}; name one that is there") from None
    finally:
        run.end()
    if run.is_too_long or run.exit_status:
        shown = {field: will_be.get(value, value) for field, value in values.items()}
        raise CommandError(command.command_with(shown), run.exit_status, run.tail())
    return None if dst is not None else _text(run.out.kept.rstrip(b"\n"))


def _values(src: bytes, dst: bytes | dict[str, bytes] | None, fields: Mapping[str, str]) -> dict[str, bytes]:
    """The value of each field that there is."""
    outputs = {f"dst.{name}": path for name, path in dst.items()} if isinstance(dst, dict) else {"dst": dst}
    name = os.path.basename(src)
    stem, suffix = os.path.splitext(name)
    known = {field: os.fsencode(value) for field, value in fields.items()}
    known |= {field: path for field, path in outputs.items() if path is not None}
    return known | {"src": src, "name": name, "stem": stem, "suffix": suffix}


def _text(raw: bytes | bytearray) -> str:
    """As text that can be encoded again, whatever it is."""
    return raw.decode(errors="backslashreplace")


class _Pipe:
    """A pipe from the command. ``kept``: the end of what came, at least its last ``keep_bytes``, at most twice that."""

    def __init__(self, keep_bytes: int) -> None:
        self.n_bytes = 0
        self.kept = bytearray()
        self._keep_bytes = keep_bytes
        self.reader, self.writer = os.pipe()

    def take(self) -> bool:
        """Read what there is; False at the end."""
        chunk = os.read(self.reader, 1 << 16)
        self.n_bytes += len(chunk)
        self.kept += chunk
        if len(self.kept) > 2 * self._keep_bytes:
            del self.kept[: len(self.kept) - self._keep_bytes]
        return bool(chunk)

    def tail(self) -> str:
        """The last of it, from the beginning of a character on."""
        last = self.kept[-TAIL_BYTES:]
        return _text(last if self.n_bytes == len(last) else last.lstrip(bytes(range(0x80, 0xC0))))


class _Run:
    """A command under way: start -> attend, until it has ended or written too much -> end, in any case.

    Three pipes: ``out``, standard error, and one that nobody writes to. Whatever the command starts inherits that one:
    its end says that nothing is left running, not even what has redirected all its output.
    """

    def __init__(self, out_bytes_max: int | None) -> None:
        self.exit_status = 0
        self.is_too_long = False
        self._out_bytes_max = out_bytes_max
        self._mark = b"RINGPOOL_COMMAND_" + os.urandom(8).hex().encode()
        self._process: subprocess.Popen[bytes] | None = None
        self._has_ended = False
        self._pidfd = -1
        self._poll = select.poll()
        self._open: dict[int, _Pipe] = {}

    def start(self, arguments: list[str | bytes], variables: dict[bytes, bytes]) -> None:
        """Start it, in this process's group, which is killed when this process is."""
        try:
            self._err = self._pipe(TAIL_BYTES)
            self.out = self._err if self._out_bytes_max is None else self._pipe(self._out_bytes_max)
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=self.out.writer,
                stderr=self._err.writer,
                pass_fds=(self._pipe(0).writer,),
                env={**os.environb, **variables, self._mark: b"1"},
            )
        finally:
            for pipe in self._open.values():
                os.close(pipe.writer)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._poll.register(self._pidfd, select.POLLIN)

    def _pipe(self, keep_bytes: int) -> _Pipe:
        pipe = _Pipe(keep_bytes)
        self._open[pipe.reader] = pipe
        self._poll.register(pipe.reader, select.POLLIN)
        return pipe

    def attend(self) -> None:
        """Read what it writes, until it has ended, or has written too much."""
        while not self._has_ended and not self.is_too_long:
            self._read(None)

    def _read(self, timeout_s: float | None) -> None:
        for fd, _ in self._poll.poll(None if timeout_s is None else timeout_s * 1000):
            if fd == self._pidfd:
                self._has_ended = True
                self._poll.unregister(fd)
            elif not self._open[fd].take():
                self._close(fd)
        self.is_too_long = self._out_bytes_max is not None and self.out.n_bytes > self._out_bytes_max

    def _close(self, reader: int) -> None:
        self._poll.unregister(reader)
        del self._open[reader]
        os.close(reader)

    def end(self) -> None:
        """Kill it if it has not ended, then what it has left running; and let go of all."""
        try:
            if self._process is not None:
                is_well = self._has_ended
                self._reap(self._process)
                self._settle(LINGER_S if is_well else 0.0)
            else:
                self._settle(0.0)  # what was interrupted in the midst of starting it may have started it
        finally:
            if self._pidfd >= 0:
                os.close(self._pidfd)
            for reader in list(self._open):
                self._close(reader)

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        global peak_rss_bytes
        if not self._has_ended:
            os.kill(process.pid, signal.SIGKILL)  # Popen.kill may reap it, and its usage with it
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = self.exit_status = os.waitstatus_to_exitcode(status)
        peak_rss_bytes = usage.ru_maxrss << 10

    def _settle(self, patience_s: float) -> None:
        """Read on until nobody is left who could write; after ``patience_s``, see to it."""
        deadline = time.monotonic() + patience_s
        self._read(0)
        while self._open and not self.is_too_long and (left_s := deadline - time.monotonic()) > 0:
            self._read(left_s)
        for _ in range(KILL_ROUNDS_MAX):
            if not self._open or not _kill_marked(self._mark):
                break
            self._read(0.05)

    def tail(self) -> str:
        """What is to be said of it in an error."""
        if self.is_too_long:
            return (
                f"more than {OUTPUT_BYTES_MAX:,} bytes on standard output; give the task an --out, and write to {{dst}}"
            )
        return self._err.tail() or self.out.tail()


def _kill_marked(mark: bytes) -> int:
    """Kill the processes with a variable ``mark`` in their environment; how many there were."""
    n_killed = 0
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if _has(pid, mark):
                pidfd = os.pidfd_open(pid)
                try:
                    if _has(pid, mark):  # still the same
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                        n_killed += 1
                finally:
                    os.close(pidfd)
    return n_killed


def _has(pid: int, mark: bytes) -> bool:
    with open(f"/proc/{pid}/environ", "rb", buffering=0) as environment:
        return mark in environment.read()

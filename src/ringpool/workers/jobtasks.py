"""The tasks of a batch job, in a worker: run, notice a changed input, stage, and commit in groups.

    stat input -> call(src, staged) -> stat input: the same, or moved away? -> finish each staged output -> STAGED
                         ^                    | no                                                  --commit--> OK
                         +--------------------+ at most 3 times, then InputChangedError

A task without an output is done when it has returned. With one, its outputs are put in their places together with those
of others, see ``group``.
"""

from __future__ import annotations

import ast
import errno
import inspect
import os
import pickle
import stat
import sys
import textwrap
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from resource import RUSAGE_SELF, getrusage
from typing import Any

import msgspec

from ringpool.errors import FileOperationError, FunctionChangedError, InputChangedError, InputMissingError
from ringpool.shm import blobs, layout
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.segment import Segment
from ringpool.workers import tasks, values
from ringpool.workers.confinement import Confinement
from ringpool.workers.files import naming, output
from ringpool.workers.files.durability import Durability, make_directories
from ringpool.workers.files.target import lstat, refused
from ringpool.workers.functions import CannotReadError, read
from ringpool.workers.group import Group
from ringpool.workers.groupcommit import (
    Source,
    StagedOutput,
    StagedTask,
    Staging,
    discard_or_keep,
    find_source,
    staged_name,
)
from ringpool.workers.posting import Post

COMMAND = "ringpool.workers.commands:run_command"
CONSUMED = -2  # in place of an inode
CHANGES_MAX = 3  # how often a task is run whose input changes meanwhile
DIRECTORIES_KNOWN_MAX = 4096
WRITTEN_WITHIN_NS = 500_000_000  # an editor is done with a module's file
WEIGH_EVERY_NS = 1_000_000  # how often a worker looks at its peak RSS, which costs more than some tasks
_OK, _STAGED, _MSGPACK = int(Status.OK), int(Status.STAGED), int(Encoding.MSGPACK)


class JobSpec(msgspec.Struct, frozen=True, array_like=True):
    """What the tasks of a job share.

    ``name`` of the function; pickled ``parameters``; ``durability``; a pickled ``RetryPolicy``, or none; ``stagings``:
    for each output, the directory where it is staged; their ``names`` (none: at most one, without a name);
    ``directory``: the job's, absolute; ``identity`` (the job's in the ledger) and
    ``digest`` (of function and parameters), for whoever finds this in a dead segment; whether to take
    ``fingerprints`` of inputs, ``checksums`` of their content, and ``digests`` of outputs; ``device``: that of the
    job's directory, so that one that was deleted can be told from one that is not mounted; ``bases``: where outputs
    go and where inputs are, each ending in a slash, without links; ``source``: of the function, see ``source_of``.
    """

    name: str
    parameters: bytes
    durability: str
    retry: bytes
    stagings: tuple[bytes, ...]
    names: tuple[str, ...]
    directory: bytes
    identity: bytes
    digest: bytes
    fingerprints: bool
    checksums: bool
    digests: bool
    device: int = 0
    bases: tuple[bytes, ...] = ()
    source: str = ""


class JobPayload(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One file: where it is, where its outputs go, its own parameters, pickled, and their digest. ``apart``: the
    numbers of those ``targets`` in whose place a link leads to where inputs are that were found by links.
    """

    source: bytes
    targets: tuple[bytes, ...] = ()
    parameters: bytes = b""
    own_digest: bytes = b""
    apart: tuple[int, ...] = ()


class Fingerprint(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What an input was: size in bytes, mtime in ns, inode, and blake2b-128 of its content where that is wanted.
    ``inode`` is ``CONSUMED`` where its task has moved it away, or removed it.
    """

    size: int = -1
    mtime_ns: int = -1
    inode: int = -1
    checksum: bytes = b""


class Output(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An output as it was staged: size in bytes, digest, device and inode, mtime in ns."""

    size: int
    digest: bytes
    device: int
    inode: int
    mtime_ns: int = 0


class JobOutcome(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a task ended well. ``value``: what the function returned, by ``encoding``; empty: None. ``calls``: how often
    it was called; ``started_s``: since the epoch; ``peak_rss``: of the worker, or the command, in bytes.
    """

    input: Fingerprint
    outputs: tuple[Output, ...]
    encoding: int
    value: bytes
    calls: int
    started_s: float
    peak_rss: int


encode_spec: Callable[[JobSpec], bytes] = msgspec.msgpack.Encoder().encode
decode_spec: Callable[[bytes | memoryview], JobSpec] = msgspec.msgpack.Decoder(JobSpec).decode
encode_payload: Callable[[JobPayload], bytes] = msgspec.msgpack.Encoder().encode
decode_payload: Callable[[bytes | memoryview], JobPayload] = msgspec.msgpack.Decoder(JobPayload).decode
encode_outcome: Callable[[JobOutcome], bytes] = msgspec.msgpack.Encoder().encode
decode_outcome: Callable[[bytes | memoryview], JobOutcome] = msgspec.msgpack.Decoder(JobOutcome).decode
_NO_FINGERPRINT = Fingerprint()


class _Bound(msgspec.Struct):
    """A task function, resolved, with what its tasks share. ``directories``: of targets, known to be there;
    ``heirs``: of those that hand on to new files something else than where they are staged, what these have from there,
    and should have;
    ``new_directories``: those that may not be on disk themselves; ``n_calls``: since the task began;
    ``source``: the input that the last call has had; ``peak_rss_of_command``: where commands are run, not functions.
    """

    spec: JobSpec
    durability: Durability
    staging: Staging | None
    source_type: Callable[[bytes], Any]
    target_type: Callable[[bytes], Any]
    parameters: dict[str, Any]
    peak_rss_of_command: Callable[[], int] | None
    retried: tasks.TaskFunction
    directories: set[bytes] = msgspec.field(default_factory=set[bytes])
    new_directories: list[bytes] = msgspec.field(default_factory=list[bytes])
    n_calls: int = 0
    source: Source | None = None
    heirs: dict[bytes, tuple[output.Heritage, output.Heritage]] = msgspec.field(default_factory=dict[bytes, Any])


class JobRunner:
    """Runs the tasks of jobs in one worker; what they stage goes into ``group``."""

    def __init__(self, segment: Segment, post: Post, confinement: Confinement, group: Group) -> None:
        self._segment = segment.name
        self._post = post
        self._confinement = confinement
        self._functions: dict[int, _Bound] = {}
        self._group = group
        self._peak_rss = self._weighed_ns = 0

    def run(self, entry: int, function_id: int, payload: bytes, blob: int, start_ns: int) -> int:
        """Run the task of ``entry``; post its result, or stage it. When that was done, ns.

        Raises ``CannotReadError``.
        """
        self._group.before_task()
        bound: _Bound | None = None
        try:
            bound = self._functions.get(function_id)
            if bound is None:
                bound = self._bind(function_id)
                start_ns = time.monotonic_ns()  # what importing it took is no task's
            bound.n_calls, bound.source = 0, None
            body: bytes | memoryview = payload
            if blob:
                _, body, _ = read(blobs.payload_name(self._segment, blob))
            end_ns = self._run(entry, bound, decode_payload(body), start_ns)
        except CannotReadError:
            raise
        except BaseException as error:  # a task may raise what it likes, SystemExit and KeyboardInterrupt too
            end_ns = time.monotonic_ns()
            self._post.error(entry, error, end_ns - start_ns, 0 if bound is None else bound.n_calls)
        self._group.observe(end_ns - start_ns)
        return end_ns

    def _run(self, entry: int, bound: _Bound, task: JobPayload, start_ns: int) -> int:
        started_s, targets = time.time(), task.targets
        names = self._prepare(entry, bound, targets) if targets else ()
        try:
            value, found = self._call(bound, task, names)
            self._confinement.disarm()  # what its handler raises is not to come between staging and the group
            staged: list[StagedOutput] = []
            outputs: list[Output] = []
            for number, (name, wanted) in enumerate(zip(names, targets, strict=True)):
                # access first: most targets are new, and to look at what is missing costs an exception
                is_new = not os.access(wanted, os.F_OK, effective_ids=True, follow_symlinks=False)
                target = wanted
                if not is_new and not (is_new := leads_to_another(bound.spec, task, number)):
                    target = self._target(bound, task.source, wanted)
                heirs = bound.heirs.get(os.path.dirname(wanted)) if is_new and bound.heirs else None
                file = output.finish_staged(name, target, digest=bound.spec.digests, is_new=is_new, heirs=heirs)
                staged.append(StagedOutput(name, target, file.n_links > 1, file.dev, file.ino))
                outputs.append(Output(file.size, file.digest, file.dev, file.ino, file.mtime_ns))
            end_ns = time.monotonic_ns()
            if self._confinement.forked:
                self._confinement.end_if_forked()
            if bound.peak_rss_of_command is not None:
                self._peak_rss = bound.peak_rss_of_command()
            elif end_ns - self._weighed_ns > WEIGH_EVERY_NS:
                self._weighed_ns, self._peak_rss = end_ns, getrusage(RUSAGE_SELF).ru_maxrss << 10
            encoding, own = _encode_value(value)
            outcome = JobOutcome(found, tuple(outputs), encoding, own, bound.n_calls, started_s, self._peak_rss)
            body, encoding, blob_bytes = encode_outcome(outcome), _MSGPACK, 0
            if len(body) > layout.INLINE_BYTES:
                encoded = values.Encoded(_MSGPACK, body)
                body, encoding, blob_bytes = self._post.place_in_time(entry, encoded, self._group.commit)
            self._post.results.post(entry, _STAGED if staged else _OK, encoding, body, end_ns - start_ns, blob_bytes)
        except BaseException:
            try:
                self._confinement.disarm_for_good()
            finally:
                self._confinement.end_if_forked()
                _discard_or_keep(names, bound)
                blobs.unlink(self._post.blob(entry))  # its name is the error's now
            raise
        if staged:
            assert bound.staging is not None
            done = StagedTask(entry, staged, source=bound.source)
            self._group.add(done, bound.staging, bound.durability, bound.new_directories)
        return end_ns

    @staticmethod
    def _target(bound: _Bound, source: bytes, wanted: bytes) -> bytes:
        """Where the output goes at whose place there is something. Raises ``AtomicWriteError`` where that is no file,
        or the input itself, to which a symlink may lead.
        """
        target = output.prepare_target(wanted, bound.durability)
        if bound.spec.fingerprints and os.path.realpath(target) == os.path.realpath(source):
            raise refused(wanted, errno.EEXIST, "it leads to the input itself; write the outputs somewhere else")
        return target

    @staticmethod
    def _prepare(entry: int, bound: _Bound, targets: Sequence[bytes]) -> list[bytes]:
        """Where its outputs are to be written; the directories that they will go to are made."""
        sequence, attempt, stagings = layout.sequence_of(entry), layout.attempt_of(entry), bound.spec.stagings
        for number, wanted in enumerate(targets):
            if len(wanted) > naming.NAME_BYTES_MAX:  # before the function has worked for nothing
                naming.check_path(wanted)
            directory = wanted[: wanted.rfind(b"/")]
            if directory not in bound.directories:
                make_directories(directory or b"/", durable=False)
                bound.new_directories.append(directory)
                if len(bound.directories) >= DIRECTORIES_KNOWN_MAX:
                    bound.directories.clear()
                    bound.heirs.clear()
                there, here = output.heritage_of(directory or b"/"), output.heritage_of(stagings[number])
                if there is not None and here is not None and there != here:
                    bound.heirs[directory] = here, there
                bound.directories.add(directory)
        return [
            staged_name(stagings[number], sequence, attempt, number, wanted) for number, wanted in enumerate(targets)
        ]

    def _call(self, bound: _Bound, task: JobPayload, staged: Sequence[bytes]) -> tuple[Any, Fingerprint]:
        """Call the function until its input was the same before and after, or is away."""
        spec, parameters = bound.spec, bound.parameters
        if task.parameters:
            parameters = {**parameters, **tasks.unpack_parameters(task.parameters)}
        arguments = [bound.source_type(task.source)]
        if spec.names:
            arguments.append({name: bound.target_type(one) for name, one in zip(spec.names, staged, strict=True)})
        elif staged:
            arguments.append(bound.target_type(staged[0]))
        if bound.peak_rss_of_command is not None:
            _tell_command(dict(zip(staged, task.targets, strict=True)))
        if not spec.fingerprints:
            return bound.retried(staged, *arguments, **parameters), _NO_FINGERPRINT
        for _ in range(CHANGES_MAX):
            before = fingerprint(task.source, spec.checksums)
            if bound.n_calls:
                _discard_or_keep(staged, bound)
            self._note_source(bound, Source(task.source, inode=before.inode))
            value = bound.retried(staged, *arguments, **parameters)
            if _is_as_it_was(before, task.source, spec.checksums):
                return value, before
            if not os.path.exists(task.source) or _has_become(staged, bound.source):
                return value, msgspec.structs.replace(before, inode=CONSUMED)
        raise InputChangedError(os.fsdecode(task.source), CHANGES_MAX)

    def _note_source(self, bound: _Bound, source: Source | None) -> None:
        """The function is about to be called for ``source``; whoever comes after this worker's death knows it, too."""
        bound.source = source
        self._post.results.note_input(0 if source is None else source.inode)

    def _bind(self, function_id: int) -> _Bound:
        _, body, _ = read(blobs.function_name(self._segment, function_id))
        spec = decode_spec(bytes(body))
        call = tasks.resolve(spec.name)
        source = _source_in_time(spec.name, spec.source) if spec.source else ""
        if source and source != spec.source:  # where one cannot be read, nothing is known
            raise FunctionChangedError(spec.name)
        signature = tasks.signature_of(call, spec.name)
        durability = Durability(spec.durability)

        def call_once(staged: Sequence[bytes], *arguments: Any, **parameters: Any) -> Any:
            if bound.n_calls:
                _discard_or_keep(staged, bound)
                if spec.fingerprints:
                    self._note_source(bound, find_source(os.fsencode(arguments[0])))
            bound.n_calls += 1
            try:
                return call(*arguments, **parameters)
            except Exception:
                self._confinement.end_if_forked()  # the original has what is staged
                self._group.commit()  # before a retry's delay, during which nobody would
                raise

        bound = _Bound(
            spec,
            durability,
            Staging(spec.stagings) if spec.stagings else None,
            signature.source_type,
            signature.target_type,
            tasks.unpack_parameters(spec.parameters),
            _peak_rss_of_command if spec.name == COMMAND else None,
            tasks.with_retries(call_once, spec.retry),
        )
        self._functions[function_id] = bound
        return bound


def _discard_or_keep(staged: Iterable[bytes], bound: _Bound) -> None:
    """What a call has left must not be taken for the next one's."""
    for one in staged:
        discard_or_keep(one, bound.source)


def _has_become(staged: Iterable[bytes], source: Source | None) -> bool:
    """Whether the input has become an output, and another file has its name by now: it is no link to the input."""
    inodes = [found.st_ino for one in staged if (found := lstat(one)) is not None]
    return source is not None and source.inode in inodes and os.stat(source.path).st_ino != source.inode


def movable_source(spec: JobSpec, path: bytes, inode: int = 0) -> Source | None:
    """The input that a task may have moved to where its output is staged; None: it is the name of anything."""
    return Source(path, inode=inode) if spec.fingerprints else None


def leads_to_another(spec: JobSpec, task: JobPayload, number: int) -> bool:
    """Whether what stands in the place of that output is a link to where another output is, or another input, or may
    be: the link is replaced, as who looks for duplicates has made it of two files that were the same. Other links are
    followed.
    """
    target = task.targets[number]
    if not os.path.islink(target):
        return False
    file = os.path.realpath(target)
    is_among_them = number in task.apart or file.startswith(spec.bases)
    return is_among_them and not os.path.isdir(file) and file != os.path.realpath(task.source)


def fingerprint(path: bytes, with_checksum: bool) -> Fingerprint:
    """What the file at ``path`` is. Raises ``InputMissingError`` where there is none, ``OSError``."""
    try:
        found = os.stat(path)
        if stat.S_ISFIFO(found.st_mode):  # to open it may be to wait for ever, and what it gives is gone then
            raise FileOperationError(
                os.fsdecode(path), "read the input", errno.EINVAL, "it is a pipe; write a file first"
            )
        checksum = b""
        if with_checksum:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                checksum = output.digest_of(fd, found.st_size)
            finally:
                os.close(fd)
    except FileNotFoundError:
        raise InputMissingError(os.fsdecode(path)) from None
    return Fingerprint(found.st_size, found.st_mtime_ns, found.st_ino, checksum)


def _is_as_it_was(before: Fingerprint, path: bytes, with_checksum: bool) -> bool:
    """Whether the input is what it was."""
    try:
        if with_checksum:
            return fingerprint(path, with_checksum=True) == before
        found = os.stat(path)
    except (FileNotFoundError, InputMissingError):
        return False
    return found.st_mtime_ns == before.mtime_ns and found.st_size == before.size and found.st_ino == before.inode


def source_of(name: str) -> str:
    """The text of a function without comments, and in one form: what it does, as far as it stands in itself. Empty for
    a builtin, and for what runs commands.
    """
    if name == COMMAND:
        return ""
    function = inspect.unwrap(tasks.resolve(name))
    try:
        return ast.unparse(_definition(function) or ast.parse(textwrap.dedent(inspect.getsource(function))))
    except (AttributeError, OSError, TypeError, SyntaxError, ValueError, tokenize.TokenError):  # builtin, or typed in
        return ""


def _source_in_time(name: str, before: str) -> str:
    """The text of a function whose text was that ``before``: where it is not now, its file may be half written."""
    deadline_ns = time.monotonic_ns() + WRITTEN_WITHIN_NS
    while (source := source_of(name)) != before and time.monotonic_ns() < deadline_ns:
        time.sleep(0.01)  # nobody tells when it is written
    return source


def _definition(function: Any) -> ast.Module | None:
    """The definition of a function, by its name: the lines at which it stood when it was imported may be others' by
    now. Of several of that name, the one at its line, or the last. None: it is not there by its name.
    """
    module = sys.modules.get(function.__module__)
    if module is None:
        return None
    scopes: list[Any] = [ast.parse(inspect.getsource(module))]
    for name in function.__qualname__.split("."):
        scopes = [each for scope in scopes for each in _definitions(scope) if each.name == name]
    line = getattr(getattr(function, "__code__", None), "co_firstlineno", 0)
    at_its_line = [each for each in scopes if line in (each.lineno, *(one.lineno for one in each.decorator_list))]
    found = at_its_line or scopes
    return ast.Module(found[-1:], []) if found else None


def _definitions(scope: ast.AST) -> Iterator[Any]:
    """What is defined there, in branches and blocks too."""
    for each in ast.iter_child_nodes(scope):
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield each
        else:
            yield from _definitions(each)


def parameters_digest(shared: bytes, own: bytes) -> bytes:
    """The digest of a function and of all parameters of a file: ``shared``, unless it has ``own`` ones."""
    return blake2b(shared + own, digest_size=16).digest() if own else shared


def _tell_command(will_be: dict[bytes, bytes]) -> None:
    from ringpool.workers import commands  # here: see below

    commands.will_be = will_be


def _peak_rss_of_command() -> int:
    from ringpool.workers import commands  # here: few jobs run commands, and its patterns take 10 ms

    return commands.peak_rss_bytes


def _encode_value(value: object) -> tuple[int, bytes]:
    """A value for the ledger: all of it in one piece."""
    if value is None:
        return _MSGPACK, b""
    body = values.encode_inline(value)
    if body is not None:
        return _MSGPACK, body
    encoded = values.encode_result(value)
    if encoded.buffers:
        return int(Encoding.PICKLE), pickle.dumps(value, 5)
    return encoded.encoding, encoded.body

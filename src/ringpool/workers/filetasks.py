"""File tasks, in a worker: resolve the function, run it, commit its output.

without an output   call -> post
with one            call(src, staged) -> STAGED --commit--> in its place: OK
                    alone, or where that is wanted with others, see ``group``
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec

from ringpool.shm import blobs, layout
from ringpool.shm.segment import Segment
from ringpool.workers import tasks, values
from ringpool.workers.confinement import Confinement
from ringpool.workers.files import naming, output
from ringpool.workers.files.durability import Durability
from ringpool.workers.functions import CannotReadError, Functions, read
from ringpool.workers.group import Group
from ringpool.workers.groupcommit import (
    Source,
    StagedOutput,
    StagedTask,
    StagingBeside,
    discard_or_keep,
    find_source,
)
from ringpool.workers.posting import Post

FUNCTIONS_MAX = 32  # bound at a time, with their parameters
_SYNCED = (Durability.DATA, Durability.FULL)


class BoundFunction(msgspec.Struct, frozen=True):
    """A task function, resolved, with what its tasks share."""

    call: tasks.TaskFunction
    source_type: Callable[[bytes], Any]
    target_type: Callable[[bytes], Any]
    parameters: dict[str, Any]
    durability: Durability
    group_commit: bool


class FileRunner:
    """Runs the file tasks of one worker; what they stage goes into ``group``."""

    def __init__(self, segment: Segment, post: Post, confinement: Confinement, group: Group) -> None:
        self._segment = segment.name
        self._token = segment.header.uuid.hex()[:16]
        self._post = post
        self._confinement = confinement
        self._functions = Functions[BoundFunction](segment.name, FUNCTIONS_MAX)
        self._group = group
        self._staging = StagingBeside()

    def run(self, entry: int, function_id: int, payload: bytes, blob: int, start_ns: int) -> int:
        """Run the task of ``entry``; post its result, of whatever kind, or stage it. When that was done, ns.

        Raises ``CannotReadError``.
        """
        self._group.before_task()
        is_to_commit = False
        try:
            function = self._functions.get(function_id)
            if function is None:
                function = self._bind(function_id)
                start_ns = time.monotonic_ns()  # what importing it took is no task's
            body: bytes | memoryview = payload
            if blob:
                _, body, _ = read(blobs.payload_name(self._segment, blob))
            task = tasks.decode_payload(body)
            parameters = function.parameters
            if task.parameters is not None:
                parameters = {**parameters, **tasks.unpack_parameters(task.parameters)}
            if task.target is None:
                value = function.call(function.source_type(task.source), **parameters)
                end_ns = time.monotonic_ns()
                self._post.value(entry, value, end_ns - start_ns)
            else:
                end_ns = self._run_with_output(entry, function, task, parameters, start_ns)
                is_to_commit = not function.group_commit
        except CannotReadError:
            raise
        except BaseException as error:  # a task may raise what it likes, SystemExit and KeyboardInterrupt too
            end_ns = time.monotonic_ns()
            self._post.error(entry, error, end_ns - start_ns)
        if is_to_commit:
            self._group.commit()  # outside: what it raises ends the process, and the coordinator goes on with it
        self._group.observe(end_ns - start_ns)
        return end_ns

    def caller(self, function_id: int) -> Callable[[bytes], Any]:
        """What is to be called with the path of each file of a vector. Raises ``UnknownFunctionError``, and what
        unpickling the parameters raises.
        """
        function = self._functions.get(function_id) or self._bind(function_id)
        call, source_type, parameters = function.call, function.source_type, function.parameters
        return lambda path: call(source_type(path), **parameters)

    def _bind(self, function_id: int) -> BoundFunction:
        _, body, _ = read(blobs.function_name(self._segment, function_id))
        spec = tasks.decode_spec(body)
        call = tasks.resolve(spec.name)
        signature = tasks.signature_of(call, spec.name)
        bound = BoundFunction(
            tasks.with_retries(self._committing(call), spec.retry) if spec.retry else call,
            signature.source_type,
            signature.target_type,
            tasks.unpack_parameters(spec.parameters),
            Durability(spec.durability),
            spec.group_commit,
        )
        self._functions.make_room()
        self._functions[function_id] = bound
        return bound

    def _run_with_output(
        self, entry: int, function: BoundFunction, task: tasks.FilePayload, parameters: dict[str, Any], start_ns: int
    ) -> int:
        """Run, and stage. A death leaves all or nothing."""
        assert task.target is not None
        post, source = self._post, self._note_source(task.source)
        target = output.prepare_target(task.target, function.durability)
        is_synced = function.durability in _SYNCED
        if is_synced:
            self._staging.expect(target)
        staged = staged_path(self._token, entry, target, of_file=source is not None)
        try:
            value = function.call(function.source_type(task.source), function.target_type(staged), **parameters)
            self._confinement.disarm()  # what its handler raises is not to come between staging and the group
            encoded = values.encode_result(value)
            file = output.finish_staged(staged, target)
            if is_synced:
                self._staging.find(target, file.dev)
            end_ns = time.monotonic_ns()
            self._confinement.end_if_forked()
            body, encoding, blob_bytes = post.place(entry, encoded)
            post.results.stage(entry, encoding, body, end_ns - start_ns, blob_bytes, file.dev, file.ino)
        except BaseException:
            try:
                self._confinement.disarm_for_good()
            finally:
                self._confinement.end_if_forked()
                discard_or_keep(staged, source)
                blobs.unlink(post.blob(entry))  # its name is the error's now
                if is_synced:
                    self._staging.forget()
            raise
        one = StagedOutput(staged, target, file.n_links > 1, file.dev, file.ino)
        self._group.add(StagedTask(entry, (one,), source=source), self._staging, function.durability)
        return end_ns

    def _note_source(self, path: bytes) -> Source | None:
        """The file that is about to be a task's input; whoever comes after this worker's death knows it, too."""
        source = find_source(path)
        self._post.results.note_input(0 if source is None else source.inode)
        return source

    def _committing(self, call: tasks.TaskFunction) -> tasks.TaskFunction:
        """``call``; where it raises, what is staged of others does not wait for the delay of its retry, and what it
        has written itself must not be taken for the next call's. The child of a call that forked is not tried again: it
        would write to what the original has staged.
        """

        @functools.wraps(call)
        def committing(*arguments: Any, **parameters: Any) -> Any:
            path, *staged = map(os.fsencode, arguments)
            source = self._note_source(path) if staged else None
            try:
                return call(*arguments, **parameters)
            except Exception:
                try:
                    self._confinement.disarm_for_good()
                finally:
                    self._confinement.end_if_forked()
                    for one in staged:
                        discard_or_keep(one, source)
                try:
                    self._group.commit()
                finally:
                    self._confinement.rearm()  # for the next call
                raise

        return committing


def staged_path(token: str, entry: int, target: bytes, *, of_file: bool) -> bytes:
    """Where an attempt writes its output until it commits: the coordinator finds it by the same name after a death.

    ``of_file``: the input was a file when the attempt began, and not the name of anything else.
    """
    attempt = f"{layout.attempt_of(entry)}" if of_file else f"a{layout.attempt_of(entry)}"
    return naming.staging_name(target, f"{token}-{layout.sequence_of(entry)}-{attempt}")
